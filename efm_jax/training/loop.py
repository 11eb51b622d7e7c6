"""How a phase is cut into compiled chunks, and how their metrics reach the host without waiting."""

import time
from collections.abc import Callable, Iterator

import numpy as np

from efm_jax.training.parallel import first_copy
from efm_jax.types import Array


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


class MetricsPipe:
    """Hands a chunk's metrics on while the next chunk already runs, and stops on a non-finite loss.

    Args:
      emit: called with ``(phase, step, {name: [K] array})`` for every chunk, in order.
    """

    def __init__(self, emit: Callable[[str, int, dict[str, np.ndarray]], None]):
        self._emit = emit
        self._pending: tuple[str, int, int, dict[str, Array]] | None = None
        self._clock = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave what happened since the last chunk out of the next one's steps per second."""
        self._clock = time.perf_counter()

    def push(self, phase: str, start: int, stop: int, metrics: dict[str, Array]) -> None:
        """Take the metrics of a chunk just dispatched; emit those of the one before."""
        previous, self._pending = self._pending, (phase, start, stop, metrics)
        self._flush(previous)

    def drain(self) -> None:
        """Wait for the last chunk and emit its metrics."""
        previous, self._pending = self._pending, None
        self._flush(previous)

    def _flush(self, entry: tuple[str, int, int, dict[str, Array]] | None) -> None:
        if entry is None:
            return
        phase, start, stop, metrics = entry
        values = {name: np.asarray(value) for name, value in first_copy(metrics).items()}
        elapsed = time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        first = values.pop("first_nonfinite")
        if (first >= 0).any():
            seed = int(np.argmax(first >= 0))
            raise NonFiniteLossError(
                f"{phase} phase: the loss of seed number {seed} is not finite "
                f"at step {start + int(first[seed]) + 1}"
            )
        values["steps_per_second"] = np.full(first.shape, (stop - start) / elapsed)
        self._emit(phase, stop, values)
