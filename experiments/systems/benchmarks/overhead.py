"""What a run of ``launch.train`` spends outside compiled code, and how long it takes to begin.

The same command runs three times: without a persistent compilation cache, with an empty one, and
with the one that the second left.  Its metrics.csv is watched: rows have the speed of their chunk
of steps, and the row before a checkpoint appears as its chunk ends.  So what is left of the time
between the checkpoints in the middle and at the end of a phase is Python, transfers, logging and
saving.  The policy phase, which has a renewal and an evaluation in between, does not count.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from experiments.systems.benchmarks.timing import Tables, compiled_once


def measure(
    name: str, steps: int, folder: pathlib.Path, cache: pathlib.Path | None, **changes: int | str
) -> dict[str, Any]:
    """One run of three phases of ``steps`` steps each; ``changes`` are of the configuration."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= compiled_once(cache) if cache is not None else {}
    every, half = steps // 10, steps // 2  # chunks of one length: a phase compiles one program
    changes |= {f"{phase}_steps": steps for phase in ("behavior", "critic", "policy")}
    changes |= dict.fromkeys(("checkpoint_every", "renew_every", "eval_every"), half)
    changes |= {"log_every": every}
    flags = [f"--config.{field}={value}" for field, value in changes.items()]
    command = [sys.executable, "-m", "launch.train", f"--workdir={folder / name}", *flags]
    begin, seen, metrics = time.perf_counter(), [], folder / name / "metrics.csv"
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            if metrics.exists():
                rows = metrics.read_bytes().count(b"\n") - 1
                seen += [time.perf_counter() - begin] * (rows - len(seen))
            time.sleep(0.001)
    wall, log = time.perf_counter() - begin, (folder / f"{name}.log").read_text()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {log[-2000:]}")
    table = pd.read_csv(metrics)
    table["seen"], table["seconds"] = seen, every / table["steps_per_second"]
    rows = table.set_index(["phase", "step"])
    outside = between = 0.0
    for phase in ("behavior", "critic"):
        seconds = rows.loc[phase, "seen"][steps] - rows.loc[phase, "seen"][half]
        between += seconds
        outside += seconds - rows.loc[phase, "seconds"].loc[half + every :].sum()
    first = rows.loc["behavior"].loc[:half]
    return {
        "compilation cache": name, "steps": 3 * steps, "wall, s": wall,
        "start to first step, s": first["seen"].iloc[-1] - first["seconds"].sum(),
        "steps, s": table["seconds"].sum(), "second halves of two phases, s": between,
        "of them outside compiled code, s": outside, "share": f"{100 * outside / between:.2f}%",
    }  # fmt: skip


class Sizes(NamedTuple):
    """How much is run."""

    steps: int = 5000  # of each phase
    caches: tuple[str, ...] = ("none", "empty", "filled")
    changes: Mapping[str, int | str] = {}


_LITTLE = {"max_transitions": 1000, "eval_episodes": 1, "critic": "iql", "solver": "euler"}
SIZES = {
    "full": Sizes(),
    "quick": Sizes(100, ("none",), _LITTLE),
    "device": Sizes(caches=("empty", "filled")),
    "smoke": Sizes(100, ("empty",), _LITTLE),
}


def run(sizes: Sizes) -> Tables:
    """The runs, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for label in sizes.caches:
            cache = None if label == "none" else folder / "cache"
            row = measure(label, sizes.steps, folder, cache, **sizes.changes)
            yield "launch.train: where the time goes", [row]
