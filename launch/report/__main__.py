"""Make a page of what runs gave: python -m launch.report --workdir=DIR [--workdir=DIR ...]
[--out=FILE]

The page is one HTML file that needs no network: results, comparison of the runs, returns with
intervals, videos that lie in a work directory (*.mp4, *.gif), effective sample sizes, curves of
every metric by phase, data and configuration.  Runs may be unfinished.  The last line printed is
JSON. Exit status: 0 done, 2 bad flags, or a work directory that cannot be read.
"""

import datetime
import json

from etils import epath

from efm_jax.files import write_whole

from .. import cli
from .page import build_page
from .runs import load_runs

FLAGS = cli.Flags()
_WORKDIRS = FLAGS.multi_string("workdir", [], "Of launch.train; may be repeated.")
_OUT = FLAGS.string("out", None, "The page; default: report.html in the first workdir.")


def main(_: list[str]) -> int:
    """Read, draw, write."""
    with cli.usage_errors():
        if not _WORKDIRS.value or "" in _WORKDIRS.value:
            raise ValueError("--workdir: expected the work directory of a training run; got none")
        default = epath.Path(_WORKDIRS.value[0]).expanduser() / "report.html"
        out = default if _OUT.value is None else epath.Path(_OUT.value).expanduser()
        if _OUT.value == "" or out.is_dir():
            raise ValueError(f"--out={_OUT.value}: expected a file")
        runs = load_runs(_WORKDIRS.value)
    page = build_page(runs, f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")
    with cli.usage_errors():
        write_whole(out, page)
    print(json.dumps({"report": str(out), "runs": len(runs), "bytes": len(page.encode())}))
    return 0


command = cli.command(main, FLAGS)

if __name__ == "__main__":
    command()
