"""Checks of data before anything is trained on it; each failure is a one-line ``DataError``.

``source`` is what the message begins with (the dataset's name or file) and ``locate(i)`` may add
where row ``i`` is in it, such as its episode.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from efm_jax.envs.flatten import box_leaves
from efm_jax.errors import DataError

# An action this far outside its bounds, relative to their distance, is rounding and is clipped.
ACTION_TOLERANCE = 1e-5

# A bound of this size or more is none.
_NO_BOUND = 1e15
# Scaled by bounds farther apart than this, and than this many times what they use, actions would be
# rounded to a handful of float32 numbers.
_WIDEST = 1e5

Locate = Callable[[int], str]


def _nowhere(index: int) -> str:
    return ""


# Bytes of a number beside its own in the file: as float32, and as the mask of what is finite.
_COPIES = 5


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or left of its container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable:" in line)
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = (group / "memory.stat").read_text().split("inactive_file ")[1].split()[0]
        free = min(free, limit - used + int(cache))
    except (OSError, ValueError, IndexError):  # no container, or one without a limit
        pass
    return free


def check_memory(what: str, shape: tuple[int, ...], dtype: np.dtype, *, at_least: int = 0) -> None:
    """Refuse an array of a declared shape that does not fit into the memory that is free.

    ``at_least`` are bytes that reading takes whatever the shape.
    """
    size = max(math.prod(shape) * (dtype.itemsize + _COPIES), at_least)
    if size < 2**20:
        return
    free = available_memory()
    if size > free:
        raise DataError(
            f"{what}: shape {shape} of {dtype} takes {size / 1e9:.3g} GB of memory; "
            f"{free / 1e9:.3g} GB are free"
        )


def check_lengths(source: str, arrays: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> None:
    """Refuse an array that has not its rank, or not the leading size (of 1 at least) of all."""
    first, count = next((name, array.shape[:1]) for name, array in arrays.items())
    for name, array in arrays.items():
        if name.endswith("observations") and array.ndim > 2:
            shape = array.shape
            raise DataError(
                f"{source}: {name} of shape {shape} look like images; only vectors are supported"
            )
        if array.ndim != ranks[name]:
            raise DataError(
                f"{source}: {name}: expected {ranks[name]} axes; got shape {array.shape}"
            )
    for name, array in arrays.items():
        if array.shape[:1] != count:
            found = f"{first} have {count[0]} rows, {name} {len(array)}"
            raise DataError(f"{source}: lengths disagree: {found}")
    if count == (0,):
        raise DataError(f"{source}: the dataset is empty: 0 transitions")


def check_finite(
    source: str, name: str, array: np.ndarray, locate: Locate = _nowhere, first_row: int = 0
) -> None:
    """Refuse a NaN or an infinity in ``array [N, ...]``, with the place of the first.

    ``first_row`` is the number that the array's first row has in the source.
    """
    finite = np.isfinite(array)
    if finite.all():
        return
    row, *rest = index = tuple(int(i) for i in np.argwhere(~finite)[0])
    where = "".join(f"[{i}]" for i in (first_row + row, *rest))
    raise DataError(
        f"{source}: {name}{where} is not finite: {array[index]}{locate(first_row + row)}"
    )


def check_observation_space(source: str, space: spaces.Space) -> None:
    """Refuse all but vectors, alone or nested: images, and discrete or text observations."""
    try:
        leaves = box_leaves(space)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    for place, box in leaves:
        axes = len(box.shape)
        if axes >= 3 or (axes == 2 and box.dtype == np.uint8) or (box is space and axes != 1):
            raise DataError(
                f"{source}: {place} of shape {box.shape} looks like an image; only vectors are "
                "supported"
            )


def check_action_space(source: str, space: spaces.Space) -> spaces.Box:
    """Return ``space``; refuse all but a flat, continuous ``Box`` with finite bounds."""
    discrete = isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
    if discrete or (isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating)):
        raise DataError(
            f"{source}: actions are discrete ({space}); only continuous actions are supported"
        )
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise DataError(f"{source}: expected actions in a Box of one axis; got {space}")
    check_bounds(source, space.low, space.high)
    return space


def check_bounds(source: str, low: np.ndarray, high: np.ndarray) -> None:
    """Refuse action bounds ``[A]`` that are not finite with ``low < high``: actions are scaled.

    Bounds such as those of float32 itself are a way to say that there are none.
    """
    for i, (lower, upper) in enumerate(zip(low, high, strict=True)):
        if not max(abs(lower), abs(upper)) < _NO_BOUND:
            problem = (
                f"infinite bounds [{lower!s}, {upper!s}], by which actions cannot be scaled: put "
                "RescaleAction or ClipAction around the environment before recording"
            )
        elif lower >= upper:
            problem = f"empty bounds: low {lower!s} >= high {upper!s}"
        else:
            continue
        raise DataError(f"{source}: action dimension {i} has {problem}")


def check_action_dtype(source: str, actions: np.ndarray) -> None:
    """Refuse integers and booleans, which are the numbers of discrete actions."""
    if not np.issubdtype(actions.dtype, np.floating):
        kind = f"actions of type {actions.dtype} are discrete"
        raise DataError(f"{source}: {kind}; only continuous actions are supported")


def clip_actions(
    source: str,
    actions: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    locate: Locate = _nowhere,
    first_row: int = 0,
) -> np.ndarray:
    """Put actions ``[N, A]``, inside ``[low, high]`` but for rounding, exactly inside.

    Raises:
      DataError: ``A`` differs from the bounds', or an action is outside by more than
        ``ACTION_TOLERANCE * (high - low)``; the message has the first index, its value and the
        bounds.
    """
    if actions.shape[1] != low.shape[0]:
        raise DataError(
            f"{source}: actions have {actions.shape[1]} dimensions, their bounds {low.shape[0]}"
        )
    slack = ACTION_TOLERANCE * (high.astype(np.float64) - low)
    outside = (actions < low - slack) | (actions > high + slack)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        place = f"actions[{first_row + row}][{column}]"
        raise DataError(
            f"{source}: {place} is outside its bounds [{low[column]!s}, {high[column]!s}]: "
            f"{actions[row, column]!s}{locate(first_row + row)}"
        )
    used = np.ptp(actions.astype(np.float64), axis=0) if len(actions) else np.zeros(len(low))
    wide = (used > 0) & (high.astype(np.float64) - low > _WIDEST * np.maximum(used, 1))
    if wide.any():
        i = int(np.argmax(wide))
        raise DataError(
            f"{source}: action dimension {i} has bounds [{low[i]!s}, {high[i]!s}], of which its "
            f"actions use {used[i]:.3g}: too wide to scale by"
        )
    return np.clip(actions, low, high)


def as_float32(source: str, name: str, array: Any) -> np.ndarray:
    """Real numbers as float32; what overflows becomes infinite, for :func:`check_finite`."""
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{source}: {name}: expected real numbers; got type {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def check_rounding(source: str, name: str, array: np.ndarray) -> None:
    """Refuse numbers ``[N, ...]`` that vary by 1 or more in a place and are one number in float32.

    A time in seconds since 1970 is such a column where it varies by less than float32's steps of
    128.  What float32 keeps some of is noted by :func:`.preprocess.fit_normalizer`.
    """
    columns = np.asarray(array).reshape(len(array), -1)
    if columns.dtype.itemsize < 4 or columns.dtype == np.float32 or not len(columns):
        return
    first = as_float32(source, name, columns[:1])
    same = (as_float32(source, name, columns) == first).all(axis=0) & np.isfinite(first[0])
    for column in np.flatnonzero(same):
        low, high = columns[:, column].min(), columns[:, column].max()
        if float(high) - float(low) >= 1:
            raise DataError(
                f"{source}: {name}[:, {column}] varies from {low!s} to {high!s}, which is one "
                "number in float32: subtract a constant from it, in the data and in the environment"
            )


def as_flags(source: str, name: str, array: np.ndarray) -> np.ndarray:
    """Flags ``[N]``, stored as booleans or as the numbers 0 and 1, as bool; refuses others."""
    bad = ~np.isin(array, (0, 1))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{source}: {name}[{row}]: expected 0 or 1; got {array[row]}")
    return array.astype(bool)
