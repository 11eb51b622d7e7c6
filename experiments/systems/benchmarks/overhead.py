"""What a run of ``launch.train`` spends outside compiled code, and how long it takes to begin.

The same command runs three times in processes of their own: without a persistent compilation cache,
with an empty one, and with the one that the second left.  A clock is put around the parts of the
trainer from outside; what is left of its time is Python, transfers, logging and checkpoints.
"""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

_COMPILING = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring
_START, _OUTPUT = "BENCHMARK_START", "BENCHMARK_OUTPUT"


def _timed(clocks: collections.Counter, name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            clocks[name] += time.perf_counter() - start

    return wrapper


def child() -> None:
    """``launch.train`` with the command line of this process, its clocks written at the end."""
    begun = float(os.environ[_START])
    from efm_jax.rl import trainer
    from efm_jax.rl.trainer import Trainer
    from efm_jax.training.loop import MetricsPipe
    from launch import cli, train

    clocks: collections.Counter = collections.Counter()
    clocks["imports"] = time.time() - begun

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILING:
            clocks["compilation"] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    run_chunk, flush = MetricsPipe.run, MetricsPipe._flush

    def first_chunk(self: MetricsPipe, *args: Any) -> Any:
        clocks["start to first step"] = clocks["start to first step"] or time.time() - begun
        return run_chunk(self, *args)

    def count(self: MetricsPipe, chunk: Any) -> None:
        if chunk is not None:
            clocks["steps"] += chunk.finished - chunk.dispatched
        flush(self, chunk)

    MetricsPipe.run, MetricsPipe._flush = first_chunk, count
    Trainer.run = _timed(clocks, "training", Trainer.run)
    Trainer._renew = _timed(clocks, "tables", Trainer._renew)
    Trainer._next_actions = _timed(clocks, "tables", Trainer._next_actions)
    trainer.compile_ahead = _timed(clocks, "programs", trainer.compile_ahead)
    train._Run.on_evaluate = _timed(clocks, "evaluation", train._Run.on_evaluate)
    try:
        cli.run(train.main, {"config": str(train._DEFAULT_PRESET)})
    finally:
        pathlib.Path(os.environ[_OUTPUT]).write_text(json.dumps(clocks))


def measure(
    steps: int, folder: pathlib.Path, cache: pathlib.Path | None, name: str, **changes: int | str
) -> dict[str, Any]:
    """One run of three phases of ``steps`` steps each, with evaluation during its policy phase.

    ``changes`` are of the configuration.
    """
    output = folder / f"{name}.json"
    environment = {**os.environ, _START: repr(time.time()), _OUTPUT: str(output)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }  # fmt: skip
    changes |= {f"{phase}_steps": steps for phase in ("behavior", "critic", "policy")}
    # All chunks are of one length: a second one would compile while the first runs, and count
    # twice.
    changes |= {"log_every": steps // 10, "renew_every": steps // 2, "eval_every": steps // 2}
    command = [
        sys.executable,
        "-m",
        "experiments.systems.benchmarks.overhead",
        f"--workdir={folder / name}",
    ]
    command += [f"--config.{field}={value}" for field, value in changes.items()]
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    wall = time.perf_counter() - start
    clock = collections.Counter(json.loads(output.read_text()))
    inside = clock["steps"] + clock["tables"]  # those with the compilation of their programs
    # Evaluation steps the environment, which is no part of the training that is asked about.
    outside = clock["training"] - clock["evaluation"] - clock["programs"] - inside
    return {
        "compilation cache": name, "steps": 3 * steps, "wall, s": wall, "imports, s": clock["imports"],
        "start to first step, s": clock["start to first step"], "XLA's compiler, s": clock["compilation"],
        "tracing and compiling the steps, s": clock["programs"], "steps and tables, s": inside,
        "evaluation while training, s": clock["evaluation"],
        "outside compiled code in training, s": outside, "of wall time": f"{100 * outside / wall:.2f}%",
    }  # fmt: skip


def run(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The three runs."""
    steps, changes = 5000, {}
    if quick:  # and less to compile
        steps, changes = (
            100,
            {"max_transitions": 1000, "eval_episodes": 1, "critic": "iql", "solver": "euler"},
        )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        caches = {"none": None, "empty": folder / "cache", "filled": folder / "cache"}
        if quick:
            caches = {"none": None}
        rows = [measure(steps, folder, cache, label, **changes) for label, cache in caches.items()]
    return {"launch.train: where the time goes": rows}


if __name__ == "__main__":
    child()
