"""Rows that are steps, episode after episode: what files of D4RL and OGBench and arrays share."""

import contextlib
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from efm_jax.data import validation
from efm_jax.errors import DataError, reason
from efm_jax.types import Rows, Transitions, all_rows

# Name of an array -> its axes. One of a single axis may be stored with a second of size 1.
_RANKS = {
    "observations": 2,
    "actions": 2,
    "rewards": 1,
    "terminals": 1,
    "terminated": 1,
    "truncated": 1,
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


def read_npz(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that a file has; a ``DataError`` if it cannot be read safely."""
    with open_file(path, "npz") as handle, zipfile.ZipFile(handle) as archive:
        wanted = {f"{name}.npy": name for name in names}
        found = [member for member in archive.infolist() if member.filename in wanted]
        return {wanted[m.filename]: _read_member(path, archive, m) for m in found}


def _read_member(path: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array whose declared size is checked before memory is taken for it."""
    what = f"{path}: {member.filename!r}"
    # NumPy writes no others, and LZMA takes the memory that its header asks for.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{what}: expected no compression but deflate")
    # Unpacking stops at this size, whatever the compressed bytes hold.
    validation.check_memory(what, (member.file_size,), np.dtype(np.uint8))
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise DataError(f"{what}: expected numbers; got an array of version {version}")
        shape, _, dtype = readers[version](file)
        if dtype.kind not in "biuf":
            raise DataError(f"{what}: expected real numbers; got type {dtype}")
        validation.check_memory(what, shape, dtype)
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise DataError(
                f"{what}: shape {shape} of {dtype} is more than its {member.file_size} bytes"
            )
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


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


class Steps(NamedTuple):
    """Rows that became transitions, and the episodes that begin in them."""

    transitions: Transitions
    episode_returns: np.ndarray
    episode_lengths: np.ndarray
    first_row: int


def read_steps(
    source: str,
    columns: Columns,
    low: np.ndarray,
    high: np.ndarray,
    terminals: np.ndarray,
    timeouts: np.ndarray,
    ends: np.ndarray,
    rows: Rows = all_rows,
) -> Steps:
    """Read the transitions that ``rows`` selects, given their number.

    Without next observations those are the next row's; a row that has none and is not terminal is
    no transition.

    Args:
      source: what messages begin with.
      columns: observations, actions, rewards, and perhaps next observations.
      low, high: bounds of the actions ``[A]``.
      terminals, timeouts: ``[N]`` bool; a row with both is terminal.
      ends: ``[N]`` bool, the last rows of episodes.
      rows: of the transitions.
    """
    rewards = columns.numbers("rewards")
    kept = _kept_rows(source, terminals, timeouts, "next_observations" in columns)
    selected = rows(len(kept))
    # The rows of the source from the first selected one up to the first one after them.
    start = 0 if selected.start == 0 else int(kept[selected.start])
    stop = len(terminals) if selected.stop == len(kept) else int(kept[selected.stop])
    kept = kept[selected]
    actions = columns.numbers("actions", start, stop)
    actions = validation.clip_actions(source, actions, low, high, first_row=start)
    observations, next_observations = _observations(columns, ends, start, stop)
    firsts, returns, lengths = episodes(rewards, ends, terminals)
    begun = (firsts >= start) & (firsts < stop)
    transitions = Transitions(
        observations=observations[kept - start],
        actions=actions[kept - start],
        rewards=rewards[kept],
        next_observations=next_observations[kept - start],
        terminated=terminals[kept].astype(np.float32),
    )
    return Steps(transitions, returns[begun], lengths[begun], selected.start)


def _observations(
    columns: Columns, ends: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Observations and next observations of the rows ``start .. stop``."""
    if "next_observations" in columns:
        following = columns.numbers("next_observations", start, stop)
        return columns.numbers("observations", start, stop), following
    following = columns.numbers("observations", start, min(stop + 1, len(ends)))
    observations = following[: stop - start]
    following = np.concatenate([following[1:], following[-1:]])[: stop - start]
    return observations, np.where(ends[start:stop, None], observations, following)


def _kept_rows(
    source: str, terminals: np.ndarray, timeouts: np.ndarray, has_next: bool
) -> np.ndarray:
    """The rows that become transitions."""
    keep = np.ones(len(terminals), bool)
    if not has_next:
        keep = terminals | ~timeouts
        keep[-1] = terminals[-1]
    if not keep.any():
        raise DataError(
            f"{source}: the dataset is empty: no row of {len(keep)} has a next observation"
        )
    return np.flatnonzero(keep)
