"""Support action sets: actions of a policy for every state of the dataset, with their Q-values and
weights.

The critic is frozen between renewals, so everything a policy step needs of it is computed once a
renewal, for the whole dataset; a step then only gathers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efm_jax.types import Array
from efm_jax.weights import AxisName, effective_sample_size, log_normalizer

# Of a bracket of log beta that is 40 wide: to a rounding error of float32.
_HALVINGS = 32
# Of an advantage, as in the authors' code of IQL (ikostrikov/implicit_q_learning).
MAX_WEIGHT = 100.0


class SupportSet(NamedTuple):
    """Support actions of every state; index 0 is the data action."""

    actions: Array  # [N, M + 1, A], in [-1, 1]
    q_values: Array  # [N, M + 1]


class WeightedSupport(NamedTuple):
    """Support actions with the logarithms of their weights, which sum to 1 in every state."""

    actions: Array  # [N, M + 1, A]
    log_weights: Array  # [N, M + 1]


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


def log_weights(q_values: Array, beta: Array, data_copies: float = 1.0) -> Array:
    """``log g_ij`` with ``g_ij ∝ c_j exp(beta Q_ij)``, ``c`` the data action's ``data_copies`` or
    1.

    Args:
      q_values: ``[..., M + 1]``, the data action's first.
      beta: guidance scale >= 0; at 0 an infinite Q-value does not count.
      data_copies: as many actions of the support set the data action stands for.
    """
    logits = jnp.where(beta > 0, beta * jnp.where(beta > 0, q_values, 0), 0)
    logits = logits.at[..., 0].add(math.log(data_copies))
    return jax.nn.log_softmax(logits, axis=-1)


def weigh(support: SupportSet, beta: Array, data_copies: float = 1.0) -> WeightedSupport:
    """The table that policy steps gather from."""
    return WeightedSupport(support.actions, log_weights(support.q_values, beta, data_copies))


def effective_actions(weights: Array, data_copies: float = 1.0) -> Array:
    """Effective sample size of a support set, ``[..., M + 1] -> [...]``.

    With ``data_copies`` c it is Kish's of the M + c actions in which the data action is there c
    times.
    """
    kept = weights.at[..., 0].divide(
        math.sqrt(data_copies)
    )  # c weights of w / c: c (w / c)^2 = w^2 / c
    return effective_sample_size(weights) if data_copies == 1 else 1 / jnp.sum(kept**2, axis=-1)


def support_beta(
    q_values: Array, data_copies: float, fraction: float, axis_name: AxisName = None
) -> Array:
    """The one ``beta`` at which the mean over states of the effective sample size is a fraction of
    M + c.

    Where every state's Q-values tie, no beta reaches the target and the largest tried is returned.

    Args:
      q_values: ``[N, M + 1]``, the data action's first.
      data_copies: as in :func:`log_weights`.
      fraction: in (0, 1); of the actions in a support set.
      axis_name: mapped axis over which the states are split.
    """
    count = q_values.shape[-1] - 1 + data_copies
    spread = q_values.std(-1).mean()
    if axis_name is not None:
        spread = lax.pmean(spread, axis_name)
    # In units of one over the Q-values' mean spread within a state: from no effect to the best
    # action alone.
    unit = 1 / jnp.maximum(spread, jnp.finfo(q_values.dtype).tiny ** 0.5)

    def mean_ess(log_beta: Array) -> Array:
        weights = jnp.exp(log_weights(q_values, unit * jnp.exp(log_beta), data_copies))
        mean = effective_actions(weights, data_copies).mean()
        return mean if axis_name is None else lax.pmean(mean, axis_name)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        above = mean_ess(middle) > fraction * count
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jnp.full((), -20.0, q_values.dtype), jnp.full((), 20.0, q_values.dtype)
    low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return unit * jnp.exp((low + high) / 2)


def summarize(
    support: SupportSet, beta: Array, data_copies: float = 1.0, axis_name: AxisName = None
) -> dict[str, Array]:
    """What a renewal logs: means over all states of the weights' concentration and of Q.

    Args:
      support: the support sets of this device's states.
      beta: guidance scale.
      data_copies: as in :func:`log_weights`.
      axis_name: mapped axis over which the states are split.
    """
    weights = jnp.exp(log_weights(support.q_values, beta, data_copies))
    ess = effective_actions(weights, data_copies)
    means = {
        "beta": jnp.asarray(beta, ess.dtype),
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


def advantage_log_weights(advantages: Array, beta: Array, axis_name: AxisName = None) -> Array:
    """``log min(exp(beta A), 100)`` less the logarithm of its mean over the dataset, ``[n] ->
    [n]``.

    Args:
      advantages: of this device's data actions.
      beta: guidance scale.
      axis_name: mapped axis over which the dataset is split.
    """
    logits = jnp.minimum(beta * advantages, math.log(MAX_WEIGHT))
    return logits - log_normalizer(-logits, 1.0, axis_name=axis_name)


def summarize_advantages(
    advantages: Array, log_weights: Array, axis_name: AxisName = None
) -> dict[str, Array]:
    """Mean and deviation of the advantages ``[n]``; the effective sample size as a share of the dataset."""
    mean, square = advantages.mean(), (advantages**2).mean()
    size = log_weights.size
    if axis_name is not None:
        mean, square = lax.pmean((mean, square), axis_name)
        size *= lax.axis_size(axis_name)
    return {
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt(jnp.maximum(square - mean**2, 0)),
        "ess_share": effective_sample_size(jnp.exp(log_weights), axis_name=axis_name) / size,
    }
