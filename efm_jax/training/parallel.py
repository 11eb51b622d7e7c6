"""Devices: the only module that calls ``pmap``, replicates or shards.

Training functions are written for one seed on one device.  Here they gain two leading axes: seeds
(``vmap``, inner) and devices (``pmap``, outer).  One device is the case N = 1 of the same code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The mapped axis over which a global batch is split.
DEVICE_AXIS = "devices"


def device_count() -> int:
    """Number of devices that share a global batch."""
    return jax.local_device_count()


def replicate(tree: Any) -> Any:
    """Copy a tree to every device: leaves gain a leading device axis."""
    # pmap wants at least one argument with a mapped axis.
    return jax.pmap(lambda _, leaves: leaves, in_axes=(0, None))(jnp.arange(device_count()), tree)


def first_copy(tree: Any) -> Any:
    """The first device's copy of a replicated tree, without the device axis."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def over_devices_and_seeds(
    function: Callable, *, shared: tuple[int, ...] = (), donate: tuple[int, ...] = ()
) -> Callable:
    """Map a function of one seed on one device over both axes and compile it.

    Args:
      function: may use collectives over :data:`DEVICE_AXIS`.
      shared: positions of arguments that all seeds share (they have no seed axis).
      donate: positions of arguments whose buffers may be reused for the results.

    Returns:
      The compiled function; every argument and result has a leading device axis.
    """
    return jax.pmap(_over_seeds(function, shared), axis_name=DEVICE_AXIS, donate_argnums=donate)


def _over_seeds(function: Callable, shared: tuple[int, ...]) -> Callable:
    def mapped(*args: Any) -> Any:
        in_axes = tuple(None if i in shared else 0 for i in range(len(args)))
        return jax.vmap(function, in_axes)(*args)

    return mapped
