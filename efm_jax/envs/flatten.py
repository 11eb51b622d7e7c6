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
    leaves = _leaves(space, observation, "observation", batch_ndim)
    return np.concatenate(leaves, axis=-1)


def flat_size(space: Any) -> int:
    """The ``S`` of :func:`flatten_observation`; raises :class:`DataError` where it would."""
    return sum(int(np.prod(box.shape)) for _, box in box_leaves(space))


def box_leaves(space: Any, place: str = "observation") -> list[tuple[str, spaces.Box]]:
    """Every ``Box`` in ``space`` with its place, in the order of flattening; others are a DataError."""
    if isinstance(space, Mapping):
        return [
            leaf for key in sorted(space) for leaf in box_leaves(space[key], f"{place}[{key!r}]")
        ]
    if isinstance(space, (tuple, list, spaces.Tuple)):
        return [leaf for i, part in enumerate(space) for leaf in box_leaves(part, f"{place}[{i}]")]
    if isinstance(space, spaces.Box):
        return [(place, space)]
    raise DataError(f"{place}: expected Box spaces, alone or in Dict or Tuple; got {space}")


def _leaves(space: Any, observation: Any, place: str, batch_ndim: int) -> list[np.ndarray]:
    if isinstance(space, Mapping):
        keys = sorted(space)
        if not isinstance(observation, Mapping) or sorted(observation) != keys:
            got = (
                sorted(observation)
                if isinstance(observation, Mapping)
                else type(observation).__name__
            )
            raise DataError(f"{place}: expected the keys {keys}; got {got}")
        parts = [(space[key], observation[key], f"{place}[{key!r}]") for key in keys]
    elif isinstance(space, (tuple, list, spaces.Tuple)):
        if not isinstance(observation, (tuple, list)) or len(observation) != len(space):
            raise DataError(
                f"{place}: expected a tuple of {len(space)} arrays; got "
                f"{type(observation).__name__}"
            )
        parts = [(space[i], observation[i], f"{place}[{i}]") for i in range(len(space))]
    else:
        return [_ravel(space, observation, place, batch_ndim)]
    return [leaf for part in parts for leaf in _leaves(*part, batch_ndim)]


def _ravel(space: Any, observation: Any, place: str, batch_ndim: int) -> np.ndarray:
    if not isinstance(space, spaces.Box):
        raise DataError(f"{place}: expected Box spaces, alone or in Dict or Tuple; got {space}")
    array = np.asarray(observation)
    if array.ndim != batch_ndim + len(space.shape) or array.shape[batch_ndim:] != space.shape:
        axes = f"{batch_ndim} batch axes and then {space.shape}"
        raise DataError(f"{place}: expected {axes}; got shape {array.shape}")
    with np.errstate(
        over="ignore"
    ):  # beyond float32 becomes inf, which validation reports with its index
        array = array.astype(np.float32)
    return array.reshape(*array.shape[:batch_ndim], -1)
