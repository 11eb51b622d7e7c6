"""The suite; every number that matters is a ratio of two measurements made in turns in this run.

    python -m experiments.systems.benchmarks [--only=phases,...] [--quick] [--out=runs/benchmarks]
    python -m experiments.systems.benchmarks --device [--smoke] [--budget_minutes=25] [--resume]

phases      steps per second of each training phase, and its share of the best matrix products
overhead    what a run of launch.train spends outside compiled code; start to first step
acting      actions for 1 to 4096 states: EFM and ED against guidance by a gradient (CEP)
sampling    distance to the exact target against evaluations of the field, for every solver
scaling     seeds in one program, and virtual devices (which share this machine's cores)
memory      peak memory of dataset, support set, state and step against the prediction; compilation
peers       CFM training and sampling beside PyTorch, and beside a JAX loop fed from the host

--device: what an accelerator is asked, unattended: seeds 1 to 32 in one program, phases in float32
and bfloat16 with shares of the chip's peak, acting, peers, memory, compilation, persistent cache;
and which goals were reached.  An item is stopped at its share of the budget, and left out where it
does not fit any more; --resume measures what the files in OUT do not have.

Every item runs in a process of its own; one that fails is recorded with its reason, the rest goes
on, and the status is 1.  Tables are printed, and after every item written with versions and device
to OUT/benchmarks.json and OUT/benchmarks.md.  docs/performance.md explains them.
"""

import functools
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pandas as pd

from efm_jax.files import write_whole
from experiments.results import make_parser, parse_names
from experiments.systems.benchmarks import item
from experiments.systems.benchmarks.timing import Rows

ROWS = ("phases", "overhead", "acting", "sampling", "scaling", "memory", "peers")
# Of an accelerator's list, in the order of what they are worth: the most minutes that each takes.
DEVICE = {
    "machine": 1, "phases": 6, "scaling": 4, "peers": 5, "acting": 3, "memory": 3, "overhead": 3,
}  # fmt: skip
_LESS_COMPILATION = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
Record = dict[str, Any]


class Goal(NamedTuple):
    """A bound for a column in every row that has the given cells."""

    what: str
    name: str  # the item's
    cells: Mapping[str, Any]
    column: str
    bound: float
    at_most: bool = False


GOALS = (
    Goal("8 seeds beside one", "scaling", {"seeds": 8}, "time / of one seed", 2.0, at_most=True),
    *(
        Goal(f"{what} beside ours", "peers", {"what": what}, "ratio to ours", bound)
        for what, bound in (
            ("PyTorch, eager", 5.0),
            ("PyTorch, eager, fused Adam", 5.0),
            ("JAX, batches from the host", 20.0),
        )
    ),
    *(
        Goal(
            "share of its products alone, in bfloat16", "phases", cells, "share of the limit, %", 40
        )
        for cells in (
            {"phase": f"policy {kind}", "batch": 4096, "width": 512, "dtype": "bfloat16"}
            for kind in ("full", "resample")
        )
    ),
)
_KEYS = ("phase", "width", "batch")  # which tell rows of a goal apart


def judge(items: Mapping[str, Record]) -> Rows:
    """A line for every row that a goal is for; of one that has none, that it was not measured."""
    lines = []
    for goal in GOALS:
        tables = items.get(goal.name, {}).get("tables", {})
        rows = [
            row for table in tables.values() for row in table
            if goal.column in row and goal.cells.items() <= row.items()
        ]  # fmt: skip
        for row in rows or [{}]:
            found = row.get(goal.column)
            reached = found is not None and (found <= goal.bound) == goal.at_most
            sign = "<=" if goal.at_most else ">="
            lines.append({
                "goal": goal.what, **{key: row.get(key, goal.cells.get(key)) for key in _KEYS},
                "column": goal.column, "wanted": f"{sign} {goal.bound:g}", "found": found,
                "": "not measured" if found is None else "reached" if reached else "missed",
            })  # fmt: skip
    return lines


def markdown(title: str, rows: Rows) -> str:
    """One table with four significant digits; None is a cell without a number."""
    table = pd.DataFrame(rows, dtype=object)
    table = table.where(table.notna(), None)
    text = table.to_markdown(index=False, floatfmt=",.4g", intfmt=",", missingval="")
    return f"### {title}\n\n{text}\n"


def report(name: str, record: Record) -> str:
    """An item's tables, notes and end."""
    text = "".join(f"{markdown(*table)}\n" for table in record["tables"].items())
    text += "".join(f"- {note}\n" for note in record["notes"])
    reason = f" ({record['reason']})" if record["reason"] else ""
    return f"{text}\n{name}: {record['status']}{reason}, {record['seconds']:,} s\n\n"


def measure_within(
    minutes: float, names: list[str], size: str, environment: Mapping[str, str]
) -> Iterator[tuple[str, Record]]:
    """One item after the other, each within its share and what is left of a budget."""
    end = time.monotonic() + 60 * minutes
    for name in names:
        most = DEVICE[name] * 60
        left = end - time.monotonic()
        if left < most / 2:
            reason = f"{left / 60:.1f} of up to {most / 60:g} minutes are left"
            yield name, {
                "status": "skipped", "reason": reason, "seconds": 0.0, "tables": {}, "notes": [],
            }  # fmt: skip
        else:
            yield name, item.run(name, size, min(most, left), environment)


def measure_all(
    names: list[str], quick: bool, environment: Mapping[str, str]
) -> Iterator[tuple[str, Record]]:
    """One item after the other; quick ones, whose times mean nothing, on all cores of a CPU."""
    workers = len(os.sched_getaffinity(0)) if quick else 1
    if quick:
        environment = {**environment, "JAX_PLATFORMS": "cpu"}
    one = functools.partial(
        item.run, size="quick" if quick else "full", seconds=None, environment=environment
    )
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(names, pool.map(one, names), strict=True)


def main() -> int:
    """Run the items asked for, print and write."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", help="items, separated by commas")
    parser.add_argument(
        "--quick", "--smoke", action="store_true", help="small sizes: to see that all works"
    )
    parser.add_argument("--device", action="store_true", help="the list for an accelerator")
    parser.add_argument("--budget_minutes", type=float, default=sum(DEVICE.values()))
    parser.add_argument("--resume", action="store_true", help="keep what OUT has of this list")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"))
    args = parser.parse_args()
    known = tuple(DEVICE) if args.device else ("machine", *ROWS)
    names = parse_names(parser, "--only", args.only, known) if args.only else list(known)
    names = list(dict.fromkeys(("machine", *names)))
    file, items = args.out / "benchmarks.json", {}
    what = {"device": args.device, "quick": args.quick}
    if args.resume and file.exists():
        before = json.loads(file.read_text())
        if {key: before.get(key) for key in what} != what:
            parser.error(f"--resume: expected a file of the same list; got {file} of another")
        items = {name: one for name, one in before["items"].items() if one["status"] == "done"}
    names = [name for name in names if name not in items]
    environment = {}
    if args.quick:
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _LESS_COMPILATION
    if args.device:
        size = "smoke" if args.quick else "device"
        found = measure_within(args.budget_minutes, names, size, environment)
    else:
        found = measure_all(names, args.quick, environment)
    for name, record in found:
        items[name] = record
        print(report(name, record), flush=True)
        # After every item: a suite that is stopped keeps what it has.
        goals = judge(items) if args.device else []
        write_whole(file, json.dumps({**what, "goals": goals, "items": items}, indent=1))
        text = "".join(report(*one) for one in items.items())
        text += markdown("Goals", goals) if goals else ""
        write_whole(args.out / "benchmarks.md", text)
    if args.device:
        print(markdown("Goals", judge(items)))
    return int(any(record["status"] in ("failed", "stopped") for record in items.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an item is stopped too
    sys.exit(main())
