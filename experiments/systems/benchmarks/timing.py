"""The clock: alternatives are timed in turns, so that what else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

# A call is repeated until a sample of the clock is at least this long: a scheduler's slice is a few
# ms.
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


def in_turns(calls: Mapping[str, Callable[[], Any]], seconds: float = 2.0) -> dict[str, Timing]:
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
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(samples[name]) * counts[name] < seconds or len(samples[name]) < 3:
                samples[name].append(_sample(call, counts[name]))
    return {name: Timing(min(times), statistics.median(times)) for name, times in samples.items()}
