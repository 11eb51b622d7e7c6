"""Files whose rows are steps, episode after episode: what D4RL's and OGBench's have in common."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from efm_jax.data import validation
from efm_jax.errors import DataError, reason

# Name of an array -> its axes. One of a single axis may be stored with a second of size 1.
_RANKS = {
    "observations": 2,
    "actions": 2,
    "rewards": 1,
    "terminals": 1,
    "timeouts": 1,
    "masks": 1,
    "valids": 1,
    "next_observations": 2,
}


@contextlib.contextmanager
def problems_of(what: str) -> Iterator[None]:
    """Say ``what`` failed in one line, whatever a reader of a foreign format raised.

    Everything is caught, because damage comes out of h5py, zipfile, zlib, NumPy's header parser and
    the clients of storage clouds as exceptions that have nothing in common.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({reason(error)})") from error


@contextlib.contextmanager
def open_file(path: str, kind: str, label: str | None = None) -> Iterator[IO[bytes]]:
    """A file, local or remote, for reading; ``label`` is what messages begin with, or the path."""
    label = label or path
    with problems_of(f"{label}: cannot be read as an {kind} file"):
        file = epath.Path(path).expanduser()
        if not file.exists():
            raise DataError(f"{label}: no such file")
        if file.is_dir():
            raise DataError(f"{label}: expected an {kind} file; got a folder")
        with file.open("rb") as handle:
            yield handle


class Columns:
    """The arrays of a file, a row a step; each is checked when it is read, for it may be large.

    Args:
      path: what messages begin with.
      arrays: NumPy's or h5py's, by name; those of other names than D4RL's and OGBench's are no
        columns.
      required: names that must be there.

    Raises:
      DataError: an array missing or of another shape, discrete actions, or no rows.
    """

    def __init__(self, path: str, arrays: Mapping[str, Any], required: tuple[str, ...]) -> None:
        missing = [name for name in required if name not in arrays]
        if missing:
            raise DataError(f"{path}: the file has no array {', '.join(map(repr, missing))}")
        self._path = path
        self._arrays = {name: array for name, array in arrays.items() if name in _RANKS}
        validation.check_action_dtype(path, arrays["actions"])
        ranks = {
            name: 2 if array.shape[1:] == (1,) else _RANKS[name]
            for name, array in self._arrays.items()
        }
        validation.check_lengths(path, self._arrays, ranks)
        shapes = [
            self[name].shape for name in ("observations", "next_observations") if name in self
        ]
        if shapes[0] != shapes[-1]:
            raise DataError(
                f"{path}: observations have shape {shapes[0]}, next_observations {shapes[1]}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Any:
        """The array as it is in the file."""
        return self._arrays[name]

    def __len__(self) -> int:
        return len(self._arrays["actions"])

    def numbers(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start .. stop`` of an array as float32, finite."""
        stored = self[name][start:stop]
        array = validation.as_float32(self._path, name, stored)
        if name == "observations":
            validation.check_rounding(self._path, name, stored)
        array = array.reshape(-1) if _RANKS[name] == 1 else array
        validation.check_finite(self._path, name, array, first_row=start)
        return array

    def flags(self, name: str) -> np.ndarray:
        """An array of zeros and ones ``[N]`` as bool."""
        return validation.as_flags(self._path, name, self[name][:].reshape(-1))


def episodes(
    rewards: np.ndarray, ends: np.ndarray, terminals: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row, return and length of each episode, from ``rewards [N]`` and flags of its rows.

    ``ends [N]`` marks an episode's last row, ``terminals [N]`` the environment's own ends.  Return
    and length are counted up to the first terminal row: where a recording went on after it, the
    environment would not have.
    """
    last = np.flatnonzero(ends)
    if len(last) == 0:
        last = np.array([len(rewards) - 1])
    starts = np.concatenate([[0], last[:-1] + 1])
    terminal_rows = np.append(np.flatnonzero(terminals), len(rewards))
    last = np.minimum(last, terminal_rows[np.searchsorted(terminal_rows, starts)])
    returns = np.array(
        [rewards[i : j + 1].sum(dtype=np.float64) for i, j in zip(starts, last, strict=True)]
    )
    return starts, returns, (last - starts + 1).astype(np.int64)
