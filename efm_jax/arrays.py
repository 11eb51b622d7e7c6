"""Types, batch axes and shardings of array arguments, decided in one place.

Integers count as their float equals, arithmetic is in 32 bits at least, and nothing broadcasts by
accident: a time or a weight has the leading axes of its points.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from efm_jax import checks

Tree = TypeVar("Tree")


def to_float(name: str, array: Any) -> jax.Array:
    """Convert real numbers to a floating type: their own, or for integers the default one.

    Raises:
      TypeError: for complex numbers and what is not a number.
    """
    dtype = jax.dtypes.result_type(array)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(array)
    if not (jnp.issubdtype(dtype, jnp.integer) or dtype.kind == "b"):
        raise TypeError(f"{name}: expected real numbers; got dtype {dtype}")
    return jnp.asarray(array, float)


def wide_type(*arrays: Any) -> np.dtype:
    """Choose the type to compute in: float64 if an array has it, else float32."""
    types = [jax.dtypes.result_type(array) for array in arrays]
    return np.dtype(np.float64 if np.dtype(np.float64) in types else np.float32)


def widen(name: str, array: Any) -> jax.Array:
    """Convert real numbers to 32 bits at least, in which sums and schedules are computed."""
    array = to_float(name, array)
    return array.astype(wide_type(array))


def common_type(*arrays: jax.Array) -> np.dtype:
    """Choose the widest type of floating arrays, also where JAX promotes strictly."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(array.dtype for array in arrays))


def expand(name: str, coefficient: jax.Array, value: jax.Array) -> jax.Array:
    """Reshape a coefficient of shape ``[*batch]`` to multiply a value ``[*batch, *event]``.

    Raises:
      ValueError: if the coefficient's axes are not the value's first ones.
    """
    ndim = coefficient.ndim
    if coefficient.shape != value.shape[:ndim] or (ndim == value.ndim and ndim > 1):
        raise ValueError(
            f"{name}: expected a scalar or the leading axes of points of shape {value.shape}, "
            f"such as {value.shape[: max(value.ndim - 1, 0)]}; got {coefficient.shape}"
        )
    return coefficient.reshape(coefficient.shape + (1,) * (value.ndim - ndim))


def batch_shape(name: str, tree: Any, event_ndim: int | None, batch_ndim: int = 1) -> tuple:
    """Find the shape of the batch axes, which all leaves of a pytree of points share.

    Args:
      name: of the argument, for the error.
      tree: points ``[*batch, *event]``; a single array ``[d]`` is one point.
      event_ndim: number of trailing axes that make a point; None: all but the first
        ``batch_ndim``.
      batch_ndim: number of leading axes where ``event_ndim`` is None.

    Raises:
      ValueError: if there are too few axes, or leaves have different batches.
    """
    leaves = jax.tree.leaves(tree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if event_ndim is not None:
        checks.check_integer("event_ndim", event_ndim, 0)
        least, batches = event_ndim, {shape[: len(shape) - event_ndim] for shape in shapes}
    elif len(shapes) == 1 and len(shapes[0]) == 1:
        return ()
    else:
        least, batches = batch_ndim, {shape[:batch_ndim] for shape in shapes}
    if not shapes or min(map(len, shapes)) < least or len(batches) > 1:
        raise ValueError(
            f"{name}: expected arrays of at least {least} axes with the same batch axes; "
            f"got shapes {shapes}"
        )
    return batches.pop()


def check_like(name: str, tree: Any, expected: Any) -> None:
    """Require a pytree of the structure of another, with leaves of the same shapes."""
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        raise ValueError(
            f"{name}: expected the structure {jax.tree.structure(expected)}; "
            f"got {jax.tree.structure(tree)}"
        )
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        checks.check_shape(name, leaf, jnp.shape(other))


def is_sharded(array: Any) -> bool:
    """Whether an array's type says how it is sharded, as on meshes with Explicit axes."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def shard_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Give an array the sharding of another's leading axes, where types carry shardings.

    Operands of such types combine only if their shardings agree.
    """
    if not is_sharded(other):
        return array
    sharding = jax.typeof(other).sharding
    spec = PartitionSpec(*tuple(sharding.spec)[: array.ndim])
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def replicate(tree: Tree) -> Tree:
    """Gather arrays whose types carry shardings on every device."""

    def gather(array: jax.Array) -> jax.Array:
        if not is_sharded(array):
            return array
        mesh = jax.typeof(array).sharding.mesh
        return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(gather, tree)


def vary_like(state: Tree, slope: Callable[[], Tree]) -> Tree:
    """Give ``state`` the type that a scan over ``state + slope`` gives it under ``shard_map``.

    There a value's type says over which mapped axes it varies, and a scan's state must keep its
    type.  The slope's value is not used, so that compiled code does not compute it.

    Args:
      state: initial state of a scan.
      slope: computes something of the structure of ``state`` from all that the steps will use.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return state
    return jax.tree.map(
        lambda leaf, other: leaf + jnp.zeros_like(other, leaf.dtype), state, slope()
    )


def typed_axes(axis_name: Any) -> dict[Any, jax.Array]:
    """Find the mapped axes that types carry, each with a zero that varies over it.

    These are the axes of ``shard_map`` with its checks.  There the gradient with respect to a value
    that does not vary over an axis is summed over it already.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    found, zero = {}, jnp.zeros(())
    # In the order given, because every host must trace the same program.
    for name in (name for name in names if name in manual):
        varying = lax.pcast(zero, name, to="varying")
        if jax.typeof(varying) != jax.typeof(zero):
            found[name] = varying
    return found


def per_device(function: Callable, axis_name: Any) -> Callable:
    """Make the gradient of a function's closure each device's share of it, under all mappings.

    Where it is summed over devices already (:func:`typed_axes`), it is divided by their number.
    """
    typed = typed_axes(axis_name)
    if not typed:
        return function

    def share(value: jax.Array) -> jax.Array:
        same = [
            n
            for n, zero in typed.items()
            if jax.typeof(value + zero.astype(value.dtype)) != jax.typeof(value)
        ]
        return scale_gradient(value, 1 / math.prod(map(lax.axis_size, same)))

    def call(*args: Any) -> Any:
        converted, closure = jax.closure_convert(function, *args)
        return converted(*args, *map(share, closure))

    return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(value: Any, scale: float) -> Any:
    """Return the value, with its gradient times ``scale``."""
    return value


@scale_gradient.defjvp
def _(scale: float, primals: tuple, tangents: tuple) -> tuple:
    return primals[0], tangents[0] * scale
