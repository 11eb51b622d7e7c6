"""The clock: alternatives are timed in turns, so that what else runs here falls on all of them."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)
Rows = list[dict[str, Any]]  # of a table of results
Tables = Iterator[tuple[str, Rows]]  # parts of tables by title, as they are measured

# A sample of the clock is at least this long, because a scheduler's slice is a few ms.
_SAMPLE_SECONDS = 0.02


class Timing(NamedTuple):
    """Seconds of one call."""

    best: float  # the least of all samples: other jobs only ever add
    median: float


def _sample(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def in_turns(calls: Mapping[Name, Callable[[], Any]], seconds: float = 2.0) -> dict[Name, Timing]:
    """Time several alternatives, one sample of each in every round.

    Args:
      calls: what to time by name; results that are JAX arrays are waited for.
      seconds: about how long each is timed; at least three samples are taken.

    Returns:
      The timing of each, without its first call, which may compile.
    """
    counts, rounds = {}, 3
    for name, call in calls.items():
        jax.block_until_ready(call())
        once = _sample(call, 1)
        counts[name] = max(1, round(_SAMPLE_SECONDS / once))
        rounds = max(rounds, min(50, int(seconds / (once * counts[name]))))
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(samples[name]) * counts[name] < seconds or len(samples[name]) < 3:
                samples[name].append(_sample(call, counts[name]))
    return {name: Timing(min(times), statistics.median(times)) for name, times in samples.items()}


def measured_apart(module: str, *arguments: str, **environment: str) -> Any:
    """The JSON on the last line that a module prints in a process of its own.

    Raises:
      RuntimeError: with the end of the process's messages, if it fails.
    """
    command, environment = [sys.executable, "-m", module, *arguments], os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compiled_once(folder: Any) -> dict[str, str]:
    """The environment of processes that keep every program that they compile in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
