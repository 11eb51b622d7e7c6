"""The suite; every number that matters is a ratio of two measurements made in turns in this run.

    python -m experiments.systems.benchmarks [--only=phases,...] [--quick] [--out=runs/benchmarks]

phases      steps per second of each training phase, and its share of the best matrix products
overhead    what a run of launch.train spends outside compiled code; start to first step
acting      actions for 1 to 4096 states: EFM and ED against guidance by a gradient (CEP)
sampling    distance to the exact target against evaluations of the field, for every solver
scaling     seeds in one program, and virtual devices (which share this machine's cores)
memory      peak memory of dataset, support set, state and step against the prediction
peers       CFM training and sampling beside PyTorch, and beside a JAX loop fed from the host

Tables are printed, and written with versions and device to OUT/benchmarks.json and
OUT/benchmarks.md. docs/performance.md explains them.
"""

import json
import multiprocessing
import os
import pathlib
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from typing import Any

import pandas as pd

from efm_jax.files import write_whole
from experiments.results import make_parser, parse_names
from experiments.systems.benchmarks.timing import Rows, run_module

ROWS = ("phases", "overhead", "acting", "sampling", "scaling", "memory", "peers")
_LESS_COMPILATION = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


def machine() -> dict[str, Any]:
    """What the numbers are measured on."""
    import jax

    installed = {found.name: found.version for found in metadata.distributions()}
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": ", ".join(sorted({device.device_kind for device in jax.devices()})),
        "devices": jax.device_count(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in _VERSIONS},
    }


def markdown(title: str, rows: Rows) -> str:
    """One table with four significant digits; None is a cell without a number."""
    table = pd.DataFrame(rows, dtype=object)
    table = table.where(table.notna(), None)
    text = table.to_markdown(index=False, floatfmt=",.4g", intfmt=",", missingval="")
    return f"### {title}\n\n{text}\n"


def run(names: list[str], quick: bool) -> Iterator[tuple[str, float, dict[str, Rows]]]:
    """One row after the other; quick ones, whose times mean nothing, on all cores of a CPU."""
    import jax

    if not quick or len(names) == 1 or jax.default_backend() != "cpu":
        yield from (run_module(name, quick) for name in names)
        return
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _LESS_COMPILATION
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as pool:
        yield from pool.map(run_module, names, [quick] * len(names))


def main() -> int:
    """Run the rows asked for, print and write."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that all works")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"))
    args = parser.parse_args()
    names = parse_names(parser, "--only", args.only, ROWS)
    record = {"machine": machine(), "quick": args.quick, "seconds": {}, "tables": {}}
    print(json.dumps(record["machine"]), flush=True)
    written = ""
    for name, seconds, tables in run(names, args.quick):
        record["seconds"][name], record["tables"][name] = seconds, tables
        text = "\n".join(markdown(*table) for table in tables.items())
        print(f"\n{text}\n{name}: {seconds} s", flush=True)
        written += f"{text}\n"
        # After every row: a suite that is stopped keeps what it has.
        write_whole(args.out / "benchmarks.json", json.dumps(record, indent=1))
        write_whole(args.out / "benchmarks.md", written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
