"""Write the tutorials as pages and notebooks: text, code, what each cell printed and drew.

python docs/pages.py tutorial digits    # docs/NAME.md, docs/NAME/*.png, docs/notebooks/NAME.ipynb
"""

import contextlib
import io
import json
import re
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER.parent / "experiments" / "examples"
TUTORIALS = ("tutorial", "digits")
_CELL = re.compile(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", re.M)
INSTALL = """\
# In Colab or another fresh kernel: upload the wheel that `pip wheel --no-deps .` makes of the
# repository, or name another place that pip knows.
import importlib.util

SOURCE = "efm_jax-0.1.0-py3-none-any.whl"
if importlib.util.find_spec("efm_jax") is None:
    %pip install --quiet {SOURCE}
%matplotlib inline"""


def cells(name: str) -> list[tuple[str, str]]:
    """The cells of a script: ``markdown`` or ``code``, and its text."""
    found = _CELL.findall((SOURCES / f"{name}.py").read_text())
    return [
        ("markdown", body.strip().strip('"').strip())
        if "[markdown]" in kind
        else ("code", body.strip())
        for kind, body in found
    ]


def notebook(name: str) -> str:
    """A notebook of the script's cells, which installs the package where it is not."""
    first, *rest = cells(name)
    every = [first, ("code", INSTALL), *rest]
    content = [
        {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.splitlines(True)}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for i, (kind, text) in enumerate(every)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": content, "metadata": {"kernelspec": kernel}}
    return (
        json.dumps(book | {"nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"
    )


def page(name: str) -> str:
    """Run the cells one after the other in one namespace; the page of what they did."""
    pictures, parts, namespace = FOLDER / name, [], {}
    for old in pictures.glob("*.png"):
        old.unlink()
    sys.argv = [name, f"--output={pictures}"]
    for kind, body in cells(name):
        if kind == "markdown":
            parts.append(body)
            continue
        before, printed, started = set(pictures.glob("*.png")), io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(printed):
            exec(compile(body, name, "exec"), namespace)
        parts.append(f"```python\n{body}\n```")
        if printed.getvalue():
            parts.append(f"```text\n{printed.getvalue().rstrip()}\n```")
        new = sorted(set(pictures.glob("*.png")) - before)
        parts += [f"![{picture.stem}]({name}/{picture.name})" for picture in new]
        print(f"{time.monotonic() - started:6.1f} s  {body.splitlines()[0]}", file=sys.stderr)
    parts.append(f"The same as a notebook: [{name}.ipynb](notebooks/{name}.ipynb).")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the pages that are named, and the notebooks of all."""
    names = sys.argv[1:]
    sys.path.insert(0, str(FOLDER.parent))
    for name in TUTORIALS:
        (FOLDER / "notebooks" / f"{name}.ipynb").write_text(notebook(name))
    for name in names:
        (FOLDER / f"{name}.md").write_text(page(name))


if __name__ == "__main__":
    main()
