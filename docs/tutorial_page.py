"""Write the tutorial as a page: text, code, what each cell printed and the pictures it saved.

python docs/tutorial_page.py     # docs/tutorial.md and docs/tutorial/*.png
"""

import contextlib
import io
import re
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER.parent / "experiments" / "examples" / "tutorial.py"


def main() -> None:
    """Run the cells one after the other in one namespace."""
    pictures, page, namespace = FOLDER / "tutorial", [], {}
    for old in pictures.glob("*.png"):
        old.unlink()
    sys.path.insert(0, str(FOLDER.parent))
    sys.argv = [str(SOURCE), f"--output={pictures}"]
    for kind, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", SOURCE.read_text(), re.M):
        if "[markdown]" in kind:
            page.append(body.strip().strip('"').strip())
            continue
        before, printed, started = set(pictures.glob("*.png")), io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(printed):
            exec(compile(body, str(SOURCE), "exec"), namespace)
        page.append(f"```python\n{body.strip()}\n```")
        if printed.getvalue():
            page.append(f"```text\n{printed.getvalue().rstrip()}\n```")
        new = sorted(set(pictures.glob("*.png")) - before)
        page += [f"![{picture.stem}](tutorial/{picture.name})" for picture in new]
        print(
            f"{time.monotonic() - started:6.1f} s  {body.strip().splitlines()[0]}", file=sys.stderr
        )
    (FOLDER / "tutorial.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
