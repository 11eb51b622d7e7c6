"""How a phase is cut into compiled chunks, and how their metrics reach the host without waiting."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names phase, step and seed."""


def segments(start: int, stop: int, *periods: int) -> Iterator[tuple[int, int]]:
    """Cut ``[start, stop)`` at every multiple of any period (0 means none).

    The cuts depend on absolute positions only, so a resumed run compiles and runs the same chunks.

    Example:
      >>> list(segments(0, 10, 4, 5))
      [(0, 4), (4, 5), (5, 8), (8, 10)]
    """
    while start < stop:
        ends = [(start // period + 1) * period for period in periods if period]
        end = min([stop, *ends])
        yield start, end
        start = end


@dataclasses.dataclass
class _Chunk:
    phase: str
    start: int
    stop: int
    metrics: dict[str, jax.Array]
    dispatched: float
    finished: float = 0.0  # set when its metrics have come


class MetricsPipe:
    """Hands a chunk's metrics on while the next chunk already runs, and stops on a non-finite loss.

    Args:
      emit: called with ``(phase, step, {name: [K] array})`` for every chunk, in order.
      get: brings a chunk's metrics from the devices, as arrays with a leading seed axis.
    """

    def __init__(
        self,
        emit: Callable[[str, int, dict[str, np.ndarray]], None],
        get: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    ):
        self._emit = emit
        self._get = get
        self._pending: _Chunk | None = None

    def run(
        self,
        phase: str,
        start: int,
        stop: int,
        chunk: Callable[[], tuple[Any, dict[str, jax.Array]]],
    ) -> Any:
        """Dispatch ``chunk() -> (state, metrics)``, return its state, emit the chunk before it."""
        # Waiting first costs one dispatch a chunk and makes every chunk's time its own.
        self._wait()
        dispatched = time.perf_counter()
        state, metrics = chunk()
        previous, self._pending = self._pending, _Chunk(phase, start, stop, metrics, dispatched)
        self._flush(previous)
        return state

    def drain(self) -> None:
        """Wait for the last chunk and emit its metrics."""
        self._wait()
        previous, self._pending = self._pending, None
        self._flush(previous)

    def _wait(self) -> None:
        if self._pending is not None:
            jax.block_until_ready(self._pending.metrics)
            self._pending.finished = time.perf_counter()

    def _flush(self, chunk: _Chunk | None) -> None:
        if chunk is None:
            return
        values = {name: np.asarray(value) for name, value in self._get(chunk.metrics).items()}
        first = values.pop("first_nonfinite")
        if (first >= 0).any():
            seed = int(np.argmax(first >= 0))
            raise NonFiniteLossError(
                f"{chunk.phase} phase: the loss of seed number {seed} is not finite "
                f"at step {chunk.start + int(first[seed]) + 1}"
            )
        rate = (chunk.stop - chunk.start) / (chunk.finished - chunk.dispatched)
        values["steps_per_second"] = np.full(first.shape, rate)
        self._emit(chunk.phase, chunk.stop, values)
