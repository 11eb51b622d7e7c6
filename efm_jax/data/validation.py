"""What data must satisfy before anything is trained on it; each failure is a one-line
:class:`DataError`.

``source`` is what the message begins with (the dataset's name or file) and ``locate(i)`` may add
where row ``i`` is in it, such as its episode.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from efm_jax.envs.flatten import box_leaves
from efm_jax.errors import DataError

# An action this far outside its bounds, relative to their distance, is rounding and is clipped.
ACTION_TOLERANCE = 1e-5

Locate = Callable[[int], str]


def _nowhere(index: int) -> str:
    return ""


def check_lengths(source: str, arrays: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> None:
    """Each array must have its rank, and all of them one and the same leading size of at least 1."""
    first = next(iter(arrays))
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
        if len(array) != len(arrays[first]):
            found = f"{first} have {len(arrays[first])} rows, {name} {len(array)}"
            raise DataError(f"{source}: lengths disagree: {found}")
    if len(arrays[first]) == 0:
        raise DataError(f"{source}: the dataset is empty: 0 transitions")


def check_finite(
    source: str, name: str, array: np.ndarray, locate: Locate = _nowhere, first_row: int = 0
) -> None:
    """No NaN and no infinity in ``array [N, ...]``; the message names the array and the first bad
    row.

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
    """Vectors, alone or nested: no images, and no discrete or text observations."""
    if isinstance(space, spaces.Box) and len(space.shape) != 1:
        raise DataError(
            f"{source}: observations of shape {space.shape} look like images; only vectors are "
            "supported"
        )
    try:
        leaves = box_leaves(space)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    for place, box in leaves:
        if len(box.shape) >= 3 or (len(box.shape) == 2 and box.dtype == np.uint8):
            raise DataError(
                f"{source}: {place} of shape {box.shape} looks like an image; only vectors are "
                "supported"
            )


def check_action_space(source: str, space: spaces.Space) -> None:
    """A flat, continuous ``Box`` with finite bounds."""
    discrete = isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
    if discrete or (isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating)):
        raise DataError(
            f"{source}: actions are discrete ({space}); only continuous actions are supported"
        )
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise DataError(f"{source}: expected actions in a Box of one axis; got {space}")
    check_bounds(source, space.low, space.high)


def check_bounds(source: str, low: np.ndarray, high: np.ndarray) -> None:
    """Action bounds ``[A]`` must be finite with ``low < high``, for actions are scaled by them."""
    for i, (lower, upper) in enumerate(zip(low, high, strict=True)):
        if not (np.isfinite(lower) and np.isfinite(upper)):
            raise DataError(
                f"{source}: action dimension {i} has infinite bounds [{lower!s}, {upper!s}]"
            )
        if lower >= upper:
            raise DataError(
                f"{source}: action dimension {i} has empty bounds: low {lower!s} >= high {upper!s}"
            )


def check_action_dtype(source: str, actions: np.ndarray) -> None:
    """Integer or boolean action arrays are the numbers of discrete actions."""
    if not np.issubdtype(actions.dtype, np.floating):
        dtype = actions.dtype
        raise DataError(
            f"{source}: actions of type {dtype} are discrete; only continuous actions are supported"
        )


def clip_actions(
    source: str,
    actions: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    locate: Locate = _nowhere,
    first_row: int = 0,
) -> np.ndarray:
    """Actions ``[N, A]`` put exactly inside ``[low, high]``, if they are inside but for rounding.

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
        value, bounds = str(actions[row, column]), f"[{low[column]!s}, {high[column]!s}]"
        row += first_row
        raise DataError(
            f"{source}: actions[{row}][{column}] is outside its bounds {bounds}: "
            f"{value}{locate(row)}"
        )
    return np.clip(actions, low, high)


def as_float32(source: str, name: str, array: Any) -> np.ndarray:
    """Numbers as float32; what overflows becomes infinite and is then refused by :func:`check_finite`."""
    array = np.asarray(array)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise DataError(f"{source}: {name}: expected numbers; got type {array.dtype}")
    if np.iscomplexobj(array):
        raise DataError(f"{source}: {name}: expected real numbers; got type {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def as_flags(source: str, name: str, array: np.ndarray) -> np.ndarray:
    """Flags ``[N]`` stored as booleans or as the numbers 0 and 1, as bool; others are a DataError."""
    bad = ~np.isin(array, (0, 1))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{source}: {name}[{row}]: expected 0 or 1; got {array[row]}")
    return array.astype(bool)
