"""From energies to weights: over a batch, a state's support set, or every device together.

``g = softmax(-beta E)`` is self-normalized importance sampling of ``q_0 ∝ p_0 exp(-beta E)`` with
samples of ``p_0`` (Zhang et al. 2025, Cor. 4.8 and Remark 4.6).  Thm 4.3 divides by the data's
``Z = E_{p_0}[exp(-beta E)]`` instead: :func:`log_normalizer` measures it, :func:`energy_weights`
takes it.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Real

from efm_jax import arrays, checks
from efm_jax.types import Array, Scalar

AxisName = Hashable | tuple[Hashable, ...] | None
Tree = TypeVar("Tree")


def psum_if(value: Tree, axis_name: AxisName) -> Tree:
    """Sum over ``axis_name`` by ``lax.psum``; return the value itself when it is None."""
    return value if axis_name is None else lax.psum(value, axis_name)


def energy_weights(
    energy: Real[Array, "*#shape"],
    beta: Real[chex.Numeric, "*#shape"],
    *,
    axis: int = -1,
    axis_name: AxisName = None,
    log_normalizer: Real[chex.Numeric, "..."] | None = None,
) -> Float[jax.Array, "*shape"]:
    """Compute the weights ``softmax(-beta * energy)`` along ``axis``, which sum to 1.

    The least energy is taken off before anything is scaled, so no energy overflows.  An energy of
    ``+inf`` gets weight 0; energies of ``-inf`` share all the weight; where all are ``+inf``, or
    ``beta = 0``, the weights are uniform.  A NaN makes every weight along its axis NaN.

    With ``log_normalizer`` the weights are ``exp(-beta * energy - log_normalizer) / n`` instead, n
    energies along ``axis`` (of all devices together).  Weighted sums over a random batch are then
    unbiased, where the softmax's have a bias of the order of one over the effective sample size;
    the weights sum to 1 in expectation only.  Nothing is clipped: a weight beyond the largest
    number is ``inf``, and so is that of an energy of ``-inf`` (NaN if ``log_normalizer`` is
    infinite too); ``+inf`` still gets 0, ``beta = 0`` still takes no notice of the energies, a NaN
    is NaN alone.  Rounding is that of ``beta * energy``: take a large common offset off the
    energies first.

    Args:
      energy: ``[...]``, low is good.
      beta: guidance scale >= 0, a scalar or anything that broadcasts against ``energy`` and is the
        same along ``axis``.
      axis: the axis that is normalized.
      axis_name: if given, the normalization is also over this mapped axis of ``pmap``,
        ``shard_map`` or ``vmap``: the weights of all devices together sum to 1.
      log_normalizer: ``log E_{p_0}[exp(-beta E)]``, usually :func:`log_normalizer` of the whole
        dataset at the same ``beta``; a scalar, or of the shape of ``energy`` without ``axis``.
        None: the softmax.

    Returns:
      Weights of the shape of ``energy``, broadcast against ``beta``, in 32 bits at least.

    Raises:
      ValueError: if a scalar ``beta`` is concrete and negative or not finite, ``energy`` a scalar
        or empty along ``axis``, or the shapes disagree.

    Reference: Zhang et al. 2025, Algorithm 1; with ``log_normalizer``, Thm 4.3.

    Example:
      >>> weights = energy_weights(jnp.array([1e6, 1e6 + 1.0]), beta=1.0)
      >>> [round(float(w), 3) for w in weights]
      [0.731, 0.269]
    """
    energy, axis = _check(energy, beta, axis)
    if log_normalizer is not None:
        if jnp.ndim(log_normalizer) > 0:
            kept = [size for i, size in enumerate(energy.shape) if i != axis + energy.ndim]
            checks.check_shape("log_normalizer", log_normalizer, tuple(kept))
            log_normalizer = jnp.expand_dims(log_normalizer, axis)
        logits = boltzmann_logits(energy, beta) - jnp.asarray(log_normalizer, energy.dtype)
        return jnp.exp(logits) / _global_size(energy, axis, axis_name)
    logits = _shifted_logits(energy, _least(energy, axis, axis_name), beta)
    unnormalized = jnp.exp(logits)
    return unnormalized / psum_if(unnormalized.sum(axis, keepdims=True), axis_name)


def log_normalizer(
    energy: Real[Array, "*#shape"],
    beta: Real[chex.Numeric, "*#shape"],
    *,
    axis: int = -1,
    axis_name: AxisName = None,
) -> Float[jax.Array, "..."]:
    """Compute ``log Z = log mean exp(-beta * energy)`` along ``axis``; no energy overflows.

    A whole dataset's makes the weights of every batch those of Thm 4.3: see
    :func:`energy_weights`.  Energies of ``+inf`` count as 0 in the mean; one of ``-inf`` gives
    ``+inf``, all ``+inf`` give ``-inf``, ``beta = 0`` gives 0 whatever the energies, a NaN gives
    NaN.

    Arguments and errors as in :func:`energy_weights`; the result has no ``axis``.

    Reference: Zhang et al. 2025, Thm 4.3.

    Example:
      >>> energy = jnp.array([0.0, 1.0, 2.0, 3.0])  # the dataset's; then a lucky batch of it
      >>> log_z = log_normalizer(energy, beta=1.0)
      >>> batches = energy, energy[:2]
      >>> [round(float(energy_weights(e, 1.0, log_normalizer=log_z).sum()), 3) for e in batches]
      [1.0, 1.762]
    """
    energy, axis = _check(energy, beta, axis)
    least = _least(energy, axis, axis_name)
    total = psum_if(
        jnp.exp(_shifted_logits(energy, least, beta)).sum(axis, keepdims=True), axis_name
    )
    log_mean = jnp.log(total / _global_size(energy, axis, axis_name))
    return (log_mean + boltzmann_logits(least, beta)).squeeze(axis)


def _check(energy: Array, beta: chex.Numeric, axis: int) -> tuple[jax.Array, int]:
    """Return checked energies, of the result's shape, and the axis counted from its end."""
    checks.check_rank("energy", energy, 1)
    energy = arrays.widen("energy", energy)
    axis = np.lib.array_utils.normalize_axis_index(axis, energy.ndim) - energy.ndim
    checks.check_not_empty("energy", energy, axis)
    if jnp.ndim(beta) == 0:
        checks.check_number("beta", beta, minimum=0.0)
    else:
        column = list(energy.shape)
        column[axis] = 1
        try:
            shape = list(np.broadcast_shapes(jnp.shape(beta), tuple(column)))
        except ValueError:
            shape = []
        # A beta of each sample's own would make the weights depend on the energies' origin.
        if not shape or shape[axis] != 1:
            raise ValueError(
                f"beta: expected a scalar or a shape that broadcasts against {tuple(column)}; "
                f"got {jnp.shape(beta)}"
            )
        shape[axis] = energy.shape[axis]
        energy = jnp.broadcast_to(energy, shape)
    return energy, axis


def _global_size(energy: jax.Array, axis: int, axis_name: AxisName) -> int:
    return energy.shape[axis] * (1 if axis_name is None else lax.axis_size(axis_name))


def _least(energy: jax.Array, axis: int, axis_name: AxisName) -> jax.Array:
    """Find the least energy along ``axis``, which is kept; no result, so no gradient, needs it."""
    least = lax.stop_gradient(energy.min(axis, keepdims=True))
    return least if axis_name is None else lax.pmin(least, axis_name)


def boltzmann_logits(
    energy: Real[Array, "*#shape"], beta: Real[chex.Numeric, "*#shape"]
) -> Float[jax.Array, "*shape"]:
    """Compute ``-beta * energy``, 0 at ``beta = 0`` whatever the energy: no weighting then.

    An infinite energy, whose product with 0 is undefined, has no gradient.
    """
    energy = arrays.widen("energy", energy)
    infinite, beta = jnp.isinf(energy), jnp.asarray(beta, energy.dtype)
    product = -beta * jnp.where(infinite, 0, energy)
    return jnp.where(infinite & (beta > 0), -energy, product)


def _shifted_logits(energy: jax.Array, least: jax.Array, beta: chex.Numeric) -> jax.Array:
    """Compute ``-beta (energy - least)``: at most 0, and 0 for the least energy."""
    # inf - inf is undefined, but equal infinities are equally good.
    unbounded = jnp.isinf(least)
    gap = jnp.where(
        unbounded,
        jnp.where(energy == least, 0, jnp.where(jnp.isnan(energy), energy, jnp.inf)),
        # No infinity is taken from another, whose NaN jax_debug_nans would report.
        jnp.where(unbounded, 0, energy) - jnp.where(unbounded, 0, least),
    )
    return boltzmann_logits(gap, beta)


def effective_sample_size(
    weights: Real[Array, "..."], *, axis: int = -1, axis_name: AxisName = None
) -> Float[jax.Array, "..."]:
    """Compute Kish's effective sample size ``(sum w)^2 / sum w^2`` along ``axis``.

    Args:
      weights: ``[...]``, non-negative; they need not sum to 1.
      axis: the axis that is summed, removed from the result, which is between 1 and its length.
      axis_name: if given, the sums are also over this mapped axis.

    Raises:
      ValueError: if ``weights`` is a scalar, or empty along ``axis``.

    Example:
      >>> float(effective_sample_size(jnp.array([0.5, 0.5, 0.0])))
      2.0
    """
    checks.check_rank("weights", weights, 1)
    weights = arrays.widen("weights", weights)
    checks.check_not_empty("weights", weights, axis)
    # Squares of the weights themselves may overflow, or round to 0.
    largest = lax.stop_gradient(weights.max(axis, keepdims=True))
    weights = weights / (largest if axis_name is None else lax.pmax(largest, axis_name))
    total = psum_if(weights.sum(axis), axis_name)
    return total**2 / psum_if((weights**2).sum(axis), axis_name)


def bisect(
    above: Callable[[jax.Array], Bool[jax.Array, "..."]],
    low: Float[jax.Array, "*shape"],
    high: Float[jax.Array, "*shape"],
    steps: int,
) -> tuple[Float[jax.Array, "*shape"], Float[jax.Array, "*shape"]]:
    """Halve brackets of the points where falling functions cross their targets; jit-able.

    Args:
      above: whether the functions are still above their targets, called at the middles ``[...]``.
      low: low ends of the brackets, ``[...]``; the last brackets' ends are returned.
      high: high ends.
      steps: number of halvings.

    Example:
      >>> low, high = bisect(lambda x: x**2 < 2, jnp.array(0.0), jnp.array(2.0), 20)
      >>> round(float(low), 4), round(float(high), 4)
      (1.4142, 1.4142)
    """

    def halve(_: jax.Array, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        right = above(middle)
        return jnp.where(right, middle, low), jnp.where(right, high, middle)

    return lax.fori_loop(0, steps, halve, (low, high))


def beta_for_ess(
    energy: Real[Array, "..."], fraction: Scalar, *, axis: int = -1, axis_name: AxisName = None
) -> Float[jax.Array, "..."]:
    """Find the ``beta >= 0`` whose weights have an effective sample size of ``fraction * n``.

    The effective sample size falls from n at ``beta = 0`` to the number of energies that tie for
    the least; its logarithm is bisected in ``log beta``.

    Args:
      energy: ``[...]`` with n energies along ``axis``.
      fraction: in (0, 1]; 1 gives ``beta = 0``.
      axis: the axis of the weights, removed from the result.
      axis_name: if given, the n energies are those of all devices together over this mapped axis.

    Returns:
      ``beta``, of the shape of ``energy`` without ``axis``; differentiable.  Where ties (or
      ``fraction * n < 1``) put the target out of reach, a beta that leaves all the weight on the
      least energies; where all energies are equal, 0.

    Raises:
      ValueError: if ``fraction`` is not in (0, 1], or ``energy`` is empty along ``axis``.

    Example:
      >>> energy = jnp.arange(8.0)
      >>> beta = beta_for_ess(energy, 0.5)
      >>> round(float(effective_sample_size(energy_weights(energy, beta))), 3)
      4.0
    """
    checks.check_number("fraction", fraction, minimum=0.0, maximum=1.0, open_minimum=True)
    checks.check_rank("energy", energy, 1)
    energy = jnp.moveaxis(arrays.widen("energy", energy), axis, -1)
    checks.check_not_empty("energy", energy, -1)
    gap = -_shifted_logits(energy, _least(energy, -1, axis_name), 1.0)
    size = _global_size(energy, -1, axis_name)
    target = jnp.asarray(fraction, energy.dtype) * size
    finite = jnp.isfinite(gap)
    positive = finite & (gap > 0)
    # exp(-beta gap) is 1 up to rounding below the low end and 0 up to rounding above the high end.
    largest = jnp.max(jnp.where(positive, gap, 0), axis=-1)
    smallest = jnp.min(jnp.where(positive, gap, jnp.inf), axis=-1)
    if axis_name is not None:
        largest, smallest = lax.pmax(largest, axis_name), lax.pmin(smallest, axis_name)
    spread = largest > 0
    epsilon = float(jnp.finfo(energy.dtype).eps)
    low = np.log(epsilon) - jnp.log(jnp.where(spread, largest, 1))
    high = np.log(-2 * np.log(epsilon)) - jnp.log(jnp.where(spread, smallest, 1))

    def ess(beta: jax.Array, energy: jax.Array) -> jax.Array:
        weights = energy_weights(energy, beta[..., None], axis_name=axis_name)
        return effective_sample_size(weights, axis_name=axis_name)

    # The bracket of log beta is under 1000 wide; it is halved to one rounding error.
    steps = int(np.ceil(np.log2(1000 / epsilon)))
    _, high = bisect(lambda log_beta: ess(jnp.exp(log_beta), energy) > target, low, high, steps)
    beta = lax.stop_gradient(jnp.where(spread & (target < size), jnp.exp(high), 0))

    def log_ess(beta: jax.Array, energy: jax.Array) -> jax.Array:
        return jnp.log(ess(beta, energy))

    # Bisection has no gradient.  One Newton step does not move a root, and has the root's gradient
    # (implicit function theorem); where the target is out of reach, or at beta = 0, there is
    # nothing to differentiate.
    fixed = lax.stop_gradient(energy)
    found, slope = jax.jvp(lambda beta: log_ess(beta, fixed), (beta,), (jnp.ones_like(beta),))
    miss = log_ess(beta, energy) - jnp.log(target)
    solved = (beta > 0) & (slope < 0) & (jnp.abs(found - jnp.log(target)) < epsilon**0.5)
    beta = jnp.where(solved, beta - miss / lax.stop_gradient(jnp.where(solved, slope, 1)), beta)
    # A NaN among the energies, and nothing else, makes their sum times 0 a NaN.
    undefined = psum_if(jnp.where(jnp.isnan(energy), energy, 0).sum(-1), axis_name)
    return beta + undefined


def beta_for_mean_ess(
    mean_ess: Callable[[jax.Array], jax.Array], target: float, spread: jax.Array
) -> jax.Array:
    """The one beta at which many sets of weights have a mean effective sample size.

    Args:
      mean_ess: the mean over all sets at a beta ``[]``; falls with beta.
      target: the mean that is asked for.
      spread: of the energies within a set, ``[]``; the bracket of beta is ``exp(-20)`` to
        ``exp(20)`` over it, from no effect to all the weight on the least energies.

    Returns:
      ``[]``; the largest beta of the bracket where ties put the target out of reach.
    """
    unit = 1 / jnp.maximum(spread, jnp.finfo(spread.dtype).tiny ** 0.5)
    low, high = jnp.full((), -20.0, spread.dtype), jnp.full((), 20.0, spread.dtype)
    # 32 halvings of a bracket 40 wide: to a rounding error of float32.
    low, high = bisect(lambda log: mean_ess(unit * jnp.exp(log)) > target, low, high, steps=32)
    return unit * jnp.exp((low + high) / 2)
