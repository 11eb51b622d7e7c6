"""The benchmark suite: every number that matters is a ratio of two measurements made in turns in
this run.

    python -m experiments.systems.benchmarks [--only=phases,overhead,...] [--quick] [--out=runs/benchmarks]

phases      steps per second of each training phase, and its share of the best matrix products of
its shapes overhead    what a run of launch.train spends outside compiled code; start to first step;
compilation acting      actions for 1 to 4096 states: EFM and ED against guidance by a gradient
(CEP) sampling    distance to the exact target against evaluations of the field, for every solver
scaling     seeds in one program, and virtual devices (which share this machine's cores)
memory      peak memory of dataset, support set, state and step against the prediction
peers       CFM training and sampling beside PyTorch, and beside a JAX loop that feeds batches from
the host

Tables are printed, and written with versions and device to OUT/benchmarks.json and
OUT/benchmarks.md. docs/performance.md explains them.
"""

import argparse
import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from efm_jax.files import write_whole

ROWS = ("phases", "overhead", "acting", "sampling", "scaling", "memory", "peers")
_LESS_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_APART = "EFM_JAX_BENCHMARKS_APART"  # set where rows already run beside others
Tables = dict[str, list[dict[str, Any]]]


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchcfm", "flow_matching")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    processor = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                  if line.startswith("model name")]  # fmt: skip
        processor = models[0] if models else processor
    devices = sorted({device.device_kind for device in jax.devices()})
    return {
        "device": ", ".join(devices), "devices": jax.device_count(), "processor": processor,
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
        "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def format_cell(value: Any) -> str:
    """Three significant digits; None is a cell without a number."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """One table; columns in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[format_cell(row.get(name)) for name in columns] for row in rows]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def measure(name: str, quick: bool) -> tuple[str, float, Tables]:
    """A row's name, seconds and tables."""
    start = time.perf_counter()
    tables = importlib.import_module(f"experiments.systems.benchmarks.{name}").run(quick)
    return name, round(time.perf_counter() - start, 1), tables


def measure_apart(names: list[str]) -> list[tuple[str, float, Tables]]:
    """:func:`measure` of some rows, quick, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "experiments.systems.benchmarks",
            "--quick",
            f"--only={','.join(names)}",
        ]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {_LESS_COMPILATION}".strip()
        environment = os.environ | {"XLA_FLAGS": flags, _APART: "1"}
        subprocess.run(
            [*command, f"--out={folder}"], env=environment, check=True, stdout=subprocess.DEVNULL
        )
        record = json.loads((pathlib.Path(folder) / "benchmarks.json").read_text())
    return [(name, record["seconds"][name], record["tables"][name]) for name in names]


def run(names: list[str], quick: bool) -> Iterator[tuple[str, float, Tables]]:
    """One row after the other; quick ones, whose times mean nothing, on all cores of a CPU at once."""
    import jax

    if quick and len(names) > 1 and jax.default_backend() == "cpu" and _APART not in os.environ:
        cores = min(len(os.sched_getaffinity(0)), len(names))
        with ThreadPoolExecutor(cores) as pool:
            for rows in pool.map(measure_apart, (names[i::cores] for i in range(cores))):
                yield from rows
    else:
        yield from (measure(name, quick) for name in names)


def main() -> int:
    """Run the rows asked for, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, side by side: only to see that all works"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"))
    args = parser.parse_args()
    names = args.only.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"--only: unknown {unknown[0]!r}; expected {', '.join(ROWS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "machine": machine(),
        "quick": args.quick,
        "seconds": {},
        "tables": {},
    }
    print(json.dumps(record["machine"]), flush=True)
    for name, seconds, tables in run(names, args.quick):
        record["seconds"][name], record["tables"][name] = seconds, tables
        parts = [markdown(title, rows) for title, rows in tables.items()]
        print("\n" + "\n".join(parts) + f"\n{name}: {seconds} s", flush=True)
        # After every row: a suite that is stopped keeps what it has.
        write_whole(args.out / "benchmarks.json", json.dumps(record, indent=1).encode())
        everything = [
            markdown(*table) for tables in record["tables"].values() for table in tables.items()
        ]
        write_whole(args.out / "benchmarks.md", ("\n".join(everything) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
