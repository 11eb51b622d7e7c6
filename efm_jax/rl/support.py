"""Support action sets: actions of a policy for every state of the dataset, with their Q-values.

The critic is frozen between renewals, so everything a policy step needs of it is computed once a
renewal, for the whole dataset; a step then only gathers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efm_jax.types import Array
from efm_jax.weights import AxisName, effective_sample_size, energy_weights


class SupportSet(NamedTuple):
    """Support actions of every state; index 0 is the data action."""

    actions: Array  # [N, M + 1, A], in [-1, 1]
    q_values: Array  # [N, M + 1]


def draw_noise(key: Array, indices: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal ``[b, *shape]``; each row has a key folded from its state's index in the dataset."""

    def draw(index: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), shape)

    return jax.vmap(draw)(indices)


def write_rows(table: Any, rows: Callable[[Array], Any], start: Array, block: int) -> Any:
    """Fill rows ``start .. start + block`` of a device's table.

    Args:
      table: pytree of ``[n, ...]`` arrays, the rows of this device.
      rows: computes the rows of given places in the table, ``[b] -> pytree of [b, ...]``.
      start: first row; ``start + block <= n``.
      block: number of rows.

    Returns:
      The table with the block written.
    """
    part = rows(start + jnp.arange(block))

    def write(leaf: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), start, axis=0)

    return jax.tree.map(write, table, part)


def summarize(support: SupportSet, beta: float, axis_name: AxisName = None) -> dict[str, Array]:
    """What a renewal logs: means over all states of the weights' concentration and of Q.

    Args:
      support: the support sets of this device's states.
      beta: guidance scale.
      axis_name: mapped axis over which the states are split.
    """
    weights = energy_weights(-support.q_values, beta)
    ess = effective_sample_size(weights)
    means = {
        "ess": ess.mean(),
        "top_weight": weights.max(-1).mean(),
        "q_data": support.q_values[:, 0].mean(),
        "q_support": support.q_values[:, 1:].mean(),
        "q_weighted": jnp.sum(weights * support.q_values, axis=-1).mean(),
        "q_spread": support.q_values[:, 1:].std(axis=-1).mean(),
    }
    if axis_name is not None:
        means, ess = lax.pmean(means, axis_name), lax.all_gather(ess, axis_name, tiled=True)
    return means | {"ess_low": jnp.quantile(ess, 0.1)}
