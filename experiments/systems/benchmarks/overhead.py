"""What a run of ``launch.train`` spends outside compiled code, and how long it takes to begin.

The same command runs three times: without a persistent compilation cache, with an empty one, and
with the one that the second left.  Its metrics.csv is watched: a row appears as its chunk of steps
ends and has the speed of the chunk, so what is left of the time between two rows is Python,
transfers, logging and checkpoints.  Rows between which a phase, a renewal or an evaluation begins
do not count.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import pandas as pd

from experiments.systems.benchmarks import Rows

_COMPILED = re.compile(r"Finished XLA compilation of .* in ([\d.]+) sec")


def measure(
    name: str, steps: int, folder: pathlib.Path, cache: pathlib.Path | None, **changes: int | str
) -> dict[str, Any]:
    """One run of three phases of ``steps`` steps each; ``changes`` are of the configuration."""
    environment = os.environ | {"JAX_LOG_COMPILES": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    every = steps // 10  # rows of equal length: a phase compiles one program
    changes |= {f"{phase}_steps": steps for phase in ("behavior", "critic", "policy")}
    changes |= {"log_every": every, "renew_every": 5 * every, "eval_every": 5 * every}
    flags = [f"--config.{field}={value}" for field, value in changes.items()]
    command = [sys.executable, "-m", "launch.train", f"--workdir={folder / name}", *flags]
    begin, seen = time.perf_counter(), []
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            rows = _lines(folder / name / "metrics.csv") - 1
            seen += [time.perf_counter() - begin] * (rows - len(seen))
            time.sleep(0.001)
    wall, log = time.perf_counter() - begin, (folder / f"{name}.log").read_text()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {log[-2000:]}")
    table = pd.read_csv(folder / name / "metrics.csv")
    table["seen"], table["seconds"] = seen, every / table["steps_per_second"]
    between = table["seen"].diff() - table["seconds"]
    begins = (table["phase"] != table["phase"].shift()) | (table["step"] == 6 * every)
    outside, counted = between[~begins].sum(), table["seen"].diff()[~begins].sum()
    return {
        "compilation cache": name, "steps": 3 * steps, "wall, s": wall,
        "start to first step, s": seen[0] - table["seconds"][0],
        "XLA's compiler, s": sum(map(float, _COMPILED.findall(log))),
        "steps, s": table["seconds"].sum(), "between rows, s": counted,
        "of it outside compiled code, s": outside, "share": f"{100 * outside / counted:.2f}%",
    }  # fmt: skip


def _lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(quick: bool) -> dict[str, Rows]:
    """The three runs."""
    steps, changes, caches = 5000, {}, {"none": None, "empty": "cache", "filled": "cache"}
    if quick:  # and less to compile
        steps, caches = 100, {"none": None}
        changes = {"max_transitions": 1000, "eval_episodes": 1, "critic": "iql", "solver": "euler"}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rows = [
            measure(label, steps, folder, cache and folder / cache, **changes)
            for label, cache in caches.items()
        ]
    return {"launch.train: where the time goes": rows}
