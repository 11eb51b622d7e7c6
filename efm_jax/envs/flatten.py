"""Dict observations to one vector, in a fixed order.

The order: keys sorted by name, at every level; tuples by index; each array raveled in C order.  For
a Gymnasium ``Dict`` space (whose keys Gymnasium sorts too) this is ``gymnasium.spaces.flatten``.
So the goal environments (PointMaze, AntMaze, FrankaKitchen) read ``achieved_goal``,
``desired_goal``, ``observation``: a policy sees its goal.  ``achieved_goal`` is kept, although in
PointMaze it repeats the position in ``observation`` and in FrankaKitchen the objects' coordinates:
in AntMaze it alone has the position, and one rule for all is one that recordings and evaluations
share.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from efm_jax.errors import DataError


def flatten_observation(space: Any, observation: Any, batch_ndim: int) -> np.ndarray:
    """Observations of any nesting to ``[*batch, S]`` float32.

    Args:
      space: a Gymnasium space of one observation, or a nested mapping / tuple of ``Box`` spaces.
      observation: arrays nested as ``space``, each ``[*batch, *leaf shape]``.
      batch_ndim: number of leading batch axes: 0 one observation, 1 an episode or a vector
        environment.

    Raises:
      DataError: a key is missing, a shape differs from its space, or a space is not a ``Box`` (a
        discrete or text observation has no single obvious vector).
    """
    return np.concatenate(_arrays(space, observation, "observation", batch_ndim), axis=-1)


def flat_size(space: Any) -> int:
    """The ``S`` of :func:`flatten_observation`; raises :class:`DataError` where it would."""
    return sum(int(np.prod(box.shape)) for _, box in box_leaves(space))


def box_leaves(space: Any, place: str = "observation") -> list[tuple[str, spaces.Box]]:
    """Every ``Box`` of ``space`` with its place, in order; any other leaf is a ``DataError``."""
    keys = _keys(space, place)
    if keys is None:
        return [(place, space)]
    return [leaf for key in keys for leaf in box_leaves(space[key], f"{place}[{key!r}]")]


def _keys(space: Any, place: str) -> list[Any] | None:
    """The keys of a nested space in the order of flattening, None for a ``Box``."""
    if isinstance(space, Mapping):
        return sorted(space)
    if isinstance(space, (tuple, list, spaces.Tuple)):
        return list(range(len(space)))
    if isinstance(space, spaces.Box):
        return None
    raise DataError(f"{place}: expected Box spaces, alone or in Dict or Tuple; got {space}")


def _arrays(space: Any, observation: Any, place: str, batch_ndim: int) -> list[np.ndarray]:
    """The array of every leaf, ``[*batch, size]`` float32."""
    keys = _keys(space, place)
    if keys is None:
        array = np.asarray(observation)
        if array.ndim < batch_ndim or array.shape[batch_ndim:] != space.shape:
            axes = f"{batch_ndim} batch axes and then {space.shape}"
            raise DataError(f"{place}: expected {axes}; got shape {array.shape}")
        # What overflows becomes infinite, which validation reports with its index.
        with np.errstate(over="ignore"):
            return [array.astype(np.float32).reshape(*array.shape[:batch_ndim], -1)]
    if isinstance(observation, Mapping):
        found = sorted(observation)
    elif isinstance(observation, (tuple, list)):
        found = list(range(len(observation)))
    else:
        found = type(observation).__name__
    if found != keys:
        raise DataError(f"{place}: expected the keys {keys}; got {found}")
    return [
        array
        for key in keys
        for array in _arrays(space[key], observation[key], f"{place}[{key!r}]", batch_ndim)
    ]
