"""Exact posteriors, fields and intermediate energies on finite data: the oracle for learned fields.

For data ``x_1..x_n`` with log-weights ``l_i`` (``-beta E_i`` for a guided field) and
``d_i = ||x - mu_t x_i||^2 / (2 sigma_t^2)``, the posterior is ``r = softmax_i(l_i - d_i)`` and
``x_hat0 = sum_i r_i x_i``; velocity and score follow by the path's conversions.

Everything but :func:`posterior`, whose result is ``[B, n]``, streams over blocks of the data with
running maxima, so n = 1e6 needs one ``[B, block]`` array at a time.  As ``t -> 0`` the posterior
concentrates on the nearest point and stays finite, also at ``t = 0``.

Shapes: ``x: [B, d]``, ``t: [B]``, ``data: [n, d]``, ``log_weights, energy, class_prob: [n]``.
"""

import jax
import jax.numpy as jnp
from jax import lax

from efm_jax import checks
from efm_jax.paths import GaussianPath
from efm_jax.types import Array

# A block of the data and a batch make an array of about this many elements.
_BLOCK_ELEMENTS = 1 << 22
# Keeps squared distances over the variance finite where sigma underflows: the nearest point still wins.
_LEAST_VARIANCE = 1e-24


def posterior(path: GaussianPath, x: Array, t: Array, data: Array, log_weights: Array | None = None) -> Array:
    """Posterior ``p_{0t}(x_i | x)`` over the data, ``[B, n]``, rows summing to 1.

    Args:
      path: probability path.
      x: points at time t, ``[B, d]``.
      t: times, ``[B]``.
      data: ``[n, d]``.
      log_weights: unnormalised log-weights of the data, ``[n]``; ``-inf`` leaves a point out.

    Reference: Zhang et al. 2025, Thm 4.1.

    Example:
      >>> from efm_jax import paths
      >>> data = jnp.array([[-1.0], [1.0]])
      >>> posterior(paths.conditional_ot(), jnp.zeros((1, 1)), jnp.array([0.5]), data).tolist()
      [[0.5, 0.5]]
    """
    log_weights = _check(x, t, data, log_weights)
    nearest = _nearest(path, x, t, data)
    return jax.nn.softmax(_logits(path, x, t, data, log_weights, nearest), axis=-1)


def velocity(path: GaussianPath, x: Array, t: Array, data: Array, log_weights: Array | None = None) -> Array:
    """Exact velocity ``u_t(x)``, ``[B, d]``; guided with ``log_weights = -beta * energy``.

    Arguments as in :func:`posterior`.  At ``t = 0`` it is finite only on the data, as the field is.

    Reference: Zhang et al. 2025, Thm 4.1.
    """
    log_weights = _check(x, t, data, log_weights)
    _, mean = _stream(path, x, t, data, log_weights, _nearest(path, x, t, data))
    return path.velocity_from_x0(mean, x, t)


def score(path: GaussianPath, x: Array, t: Array, data: Array, log_weights: Array | None = None) -> Array:
    """Exact score ``grad log q_t(x)``, ``[B, d]``; arguments as in :func:`posterior`.

    Reference: Zhang et al. 2025, Lemma 4.10.
    """
    log_weights = _check(x, t, data, log_weights)
    _, mean = _stream(path, x, t, data, log_weights, _nearest(path, x, t, data))
    return path.score_from_x0(mean, x, t)


def intermediate_energy(
    path: GaussianPath, x: Array, t: Array, data: Array, energy: Array, beta: Array
) -> Array:
    """``E_t(x) = -log E_{p_{0t}(x_0 | x)}[exp(-beta E(x_0))]``, ``[B]``.

    Args:
      path: probability path.
      x: points at time t, ``[B, d]``.
      t: times, ``[B]``.
      data: ``[n, d]``.
      energy: energies of the data, ``[n]``.
      beta: guidance scale >= 0.

    Reference: Zhang et al. 2025, Thm 4.1.
    """
    log_weights = _check(x, t, data, -beta * energy)
    nearest = _nearest(path, x, t, data)
    log_total, _ = _stream(path, x, t, data, jnp.zeros_like(log_weights), nearest)
    log_guided, _ = _stream(path, x, t, data, log_weights, nearest)
    return log_total - log_guided


def cg_score(path: GaussianPath, x: Array, t: Array, data: Array, class_prob: Array, beta: Array) -> Array:
    """The score classifier guidance samples with: ``grad log p_t + beta grad log E_{p_{0t}}[p(c|x_0)]``.

    Equal to the guided score for ``E = -log p(c|x)`` at ``beta`` 0 and 1 only.

    Args:
      path: probability path.
      x: points at time t, ``[B, d]``.
      t: times, ``[B]``.
      data: ``[n, d]``.
      class_prob: ``p(c | x_i)`` of the data, ``[n]``.
      beta: guidance scale.

    Returns:
      ``[B, d]``.

    Reference: Zhang et al. 2025, eq. 4.6.
    """
    plain = score(path, x, t, data)
    conditional = score(path, x, t, data, jnp.log(class_prob))
    return plain + beta * (conditional - plain)


def _check(x: Array, t: Array, data: Array, log_weights: Array | None) -> Array:
    checks.check_rank("data", data, 2)
    checks.check_shape("x", x, (jnp.shape(x)[0] if jnp.ndim(x) else 0, data.shape[1]))
    checks.check_shape("t", t, (x.shape[0],))
    if log_weights is None:
        return jnp.zeros(data.shape[0], data.dtype)
    checks.check_shape("log_weights", log_weights, (data.shape[0],))
    return jnp.asarray(log_weights)


def _blocks(x: Array, data: Array, *columns: Array) -> tuple[Array, ...]:
    """The data and columns ``[n]`` beside it as ``[blocks, block, ...]``, columns padded with -inf."""
    n, d = data.shape
    block = min(n, max(1, _BLOCK_ELEMENTS // max(1, x.shape[0])))
    padding = -n % block
    # Repeating a point changes no minimum, and -inf leaves it out of every sum.
    data = jnp.concatenate([data, jnp.broadcast_to(data[:1], (padding, d))]).reshape(-1, block, d)
    padded = (jnp.pad(column, (0, padding), constant_values=-jnp.inf) for column in columns)
    return data, *(column.reshape(-1, block) for column in padded)


def _squared_distance(path: GaussianPath, x: Array, t: Array, data: Array) -> Array:
    """``||x - mu_t x_i||^2``: ``[B, n]``."""
    # Differences, not the expanded square: at small sigma the expansion cancels.
    return jnp.sum((x[:, None] - path.mean_coef(t)[:, None, None] * data) ** 2, axis=-1)


def _nearest(path: GaussianPath, x: Array, t: Array, data: Array) -> Array:
    """The least squared distance, ``[B]``.

    Distances are counted from it: at small sigma ``d_i`` is of size ``1 / sigma^2``, and adding a log-weight
    to it, or taking the difference of two sums of them, would lose every digit.
    """

    def least(carry: Array, block: tuple[Array]) -> tuple[Array, None]:
        return jnp.minimum(carry, _squared_distance(path, x, t, block[0]).min(-1)), None

    start = jnp.full(x.shape[0], jnp.inf, jnp.result_type(x, data))
    return lax.stop_gradient(lax.scan(least, start, _blocks(x, data))[0])


def _logits(path: GaussianPath, x: Array, t: Array, data: Array, log_weights: Array, nearest: Array) -> Array:
    """``l_i - (d_i - d_nearest)``: ``[B, n]``."""
    further = _squared_distance(path, x, t, data) - nearest[:, None]
    variance = jnp.maximum(path.std(t) ** 2, _LEAST_VARIANCE)
    return log_weights - further / (2 * variance[:, None])


def _stream(
    path: GaussianPath, x: Array, t: Array, data: Array, log_weights: Array, nearest: Array
) -> tuple[Array, Array]:
    """``logsumexp_i(l_i - d_i) + d_nearest``, ``[B]``, and ``x_hat0``, ``[B, d]``."""

    def accumulate(carry: tuple[Array, Array, Array], block: tuple[Array, Array]) -> tuple[tuple, None]:
        peak, total, weighted = carry
        data_block, weight_block = block
        logits = _logits(path, x, t, data_block, weight_block, nearest)
        # The peak only scales; it cancels in value, so it needs no gradient.
        new_peak = lax.stop_gradient(jnp.maximum(peak, logits.max(-1)))
        # While every weight so far is 0 the peak is -inf, and -inf - -inf is undefined.
        base = jnp.where(jnp.isneginf(new_peak), 0, new_peak)
        decay, terms = jnp.exp(peak - base), jnp.exp(logits - base[:, None])
        total = decay * total + terms.sum(-1)
        weighted = decay[:, None] * weighted + jnp.matmul(terms, data_block, precision="highest")
        return (new_peak, total, weighted), None

    dtype = jnp.result_type(x, data)
    batch, d = x.shape
    start = (jnp.full(batch, -jnp.inf, dtype), jnp.zeros(batch, dtype), jnp.zeros((batch, d), dtype))
    (peak, total, weighted), _ = lax.scan(accumulate, start, _blocks(x, data, log_weights))
    return peak + jnp.log(total), weighted / total[:, None]
