"""Flow-matching and score-matching losses, plain and energy-weighted.

Each loss is made of a per-sample error by ``vmap``.  A *field* is any callable: parameters and
conditions are closed over, so the losses never see a module.  Noise and times come from ``key``
folded with each sample's index in the *global* batch, so a batch split over devices (same key on
all of them, ``axis_name`` given) draws what one device would.  ``key`` may instead hold a key for
each sample, ``[B]`` (:func:`sample_keys` of a larger batch, cut): so the parts of a batch, one
after the other, draw what it would at once, and where a loss is a mean over samples it is the mean
over its parts.  With ``axis_name`` the loss and its gradient are this device's share: sum them
(``psum``) over devices, do not average.

Reference: Zhang et al. 2025 (arXiv 2503.04975), Thm 3.1, Thm 4.3, Cor. 4.8, Algorithms 1 and 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from efm_jax import checks
from efm_jax.paths import GaussianPath
from efm_jax.types import Array, Field
from efm_jax.weights import AxisName, effective_sample_size, energy_weights, psum_if

Aux = dict[str, Array]
TimeWeight = Callable[[Array], Array]


def cfm_error(field: Field, path: GaussianPath, x0: Array, noise: Array, t: Array) -> Array:
    """Conditional flow-matching error ``||v(x_t, t) - u_{t0}(x_t | x_0)||^2`` of one sample.

    Made to be ``vmap``-ed: here the field sees ``x: [d]``, ``t: []``.

    Args:
      field: velocity field.
      path: probability path.
      x0: data sample, ``[d]``.
      noise: standard normal sample, ``[d]``.
      t: time in (0, 1], ``[]``.

    Returns:
      A scalar: the squared norm, summed over ``d``.

    Reference: Zhang et al. 2025, Thm 3.1.

    Example:
      >>> from efm_jax import paths
      >>> x0, noise = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
      >>> float(cfm_error(lambda x, t: jnp.zeros(2), paths.conditional_ot(), x0, noise, 0.5))
      5.0
    """
    return _squared_distance(field(path.sample(x0, noise, t), t), path.velocity(x0, noise, t))


def dsm_error(score_field: Field, path: GaussianPath, x0: Array, noise: Array, t: Array) -> Array:
    """Denoising score-matching error ``||s(x_t, t) + eps / sigma_t||^2`` of one sample.

    Arguments and result as in :func:`cfm_error`; the field predicts the score.
    """
    return _squared_distance(score_field(path.sample(x0, noise, t), t), path.score(noise, t))


def cfm(
    field: Field, path: GaussianPath, key: Array, x0: Array, *, axis_name: AxisName = None
) -> tuple[Array, Aux]:
    """Conditional flow matching: the mean of :func:`cfm_error` over the batch.

    Args:
      field: velocity field, ``(x: [B, d], t: [B]) -> [B, d]``.
      path: probability path.
      key: random key, the same on every device; or one for each sample, ``[B]``.
      x0: data, ``[B, d]``.
      axis_name: mapped axis over which the global batch is split.

    Returns:
      ``(loss, aux)``; a scalar share of the loss and an empty dict.

    Reference: Zhang et al. 2025, Thm 3.1.

    Example:
      >>> from efm_jax import paths
      >>> loss, _ = cfm(lambda x, t: -x, paths.conditional_ot(), jax.random.key(0), jnp.ones((8, 2)))
      >>> loss.shape
      ()
    """
    errors, _ = _batch_errors(cfm_error, field, path, key, x0, axis_name)
    return errors.sum() / _global_size(errors, axis_name), {}


def cefm(
    field: Field,
    path: GaussianPath,
    key: Array,
    x0: Array,
    energy: Array,
    beta: Array,
    *,
    log_normalizer: Array | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Conditional energy-weighted flow matching: ``sum_i g_i ||v - u_{t0}||^2``.

    ``g = softmax(-beta E)`` over the global batch, or with ``log_normalizer`` Thm 4.3's own
    ``g_i = exp(-beta E_i - log Z) / B``.  Its gradient equals that of energy-weighted flow
    matching, whose minimizer generates ``q_0 ∝ p_0 exp(-beta E)``: exactly, in expectation, with
    ``log_normalizer``; up to a bias of the order of one over the effective sample size with the
    softmax.

    Args:
      field: velocity field, ``(x: [B, d], t: [B]) -> [B, d]``.
      path: probability path.
      key: random key, the same on every device.
      x0: data, ``[B, d]``.
      energy: energies of the data, ``[B]``; no gradient flows into them.
      beta: guidance scale >= 0.
      log_normalizer: ``log Z``, ``[]``, as from :func:`efm_jax.weights.log_normalizer` of the whole
        dataset at the same ``beta``; no gradient flows into it.  None: the softmax.  How infinite
        energies and overflow are handled differs: see :func:`efm_jax.weights.energy_weights`.
      axis_name: mapped axis over which the global batch is split.

    Returns:
      ``(loss, aux)``; ``aux`` has ``ess`` (effective sample size) and ``top_weight`` (the largest
      weight's share of the sum), both of the global batch and the same with and without
      ``log_normalizer``; with it also ``weight_sum``, whose mean over batches is 1 if
      ``log_normalizer`` is the data's.

    Raises:
      ValueError: if the shapes disagree or ``beta`` is negative.

    Reference: Zhang et al. 2025, Thm 4.3; Algorithm 1 for the softmax.

    Example:
      >>> from efm_jax import paths
      >>> x0 = jax.random.normal(jax.random.key(1), (8, 2))
      >>> energy = (x0**2).sum(-1)
      >>> loss, aux = cefm(lambda x, t: -x, paths.conditional_ot(), jax.random.key(0), x0, energy, beta=1.0)
      >>> 1.0 <= float(aux["ess"]) <= 8.0
      True
    """
    errors, _ = _batch_errors(cfm_error, field, path, key, x0, axis_name)
    return _weighted_sum(errors, energy, beta, log_normalizer, axis_name)


def dsm(
    score_field: Field,
    path: GaussianPath,
    key: Array,
    x0: Array,
    *,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Denoising score matching: the mean of ``lambda(t) dsm_error`` over the batch.

    ``time_weight(t: [B]) -> [B]`` is ``lambda``, by default ``sigma_t^2`` (noise prediction); other
    arguments as in :func:`cfm`, with a score field.

    Reference: Vincent 2011; Zhang et al. 2025, Sec. 3.
    """
    errors, t = _batch_errors(dsm_error, score_field, path, key, x0, axis_name)
    errors = _time_weight(path, time_weight)(t) * errors
    return errors.sum() / _global_size(errors, axis_name), {}


def ced(
    score_field: Field,
    path: GaussianPath,
    key: Array,
    x0: Array,
    energy: Array,
    beta: Array,
    *,
    time_weight: TimeWeight | None = None,
    log_normalizer: Array | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Conditional energy-weighted diffusion: ``sum_i lambda(t_i) g_i ||s + eps_i / sigma||^2``.

    ``g = softmax(-beta E)`` over the global batch, or ``exp(-beta E - log Z) / B`` with
    ``log_normalizer``; ``time_weight`` as in :func:`dsm`, other arguments and results as in
    :func:`cefm`, with a score field.

    Reference: Zhang et al. 2025, Cor. 4.8 and Algorithm 1.
    """
    errors, t = _batch_errors(dsm_error, score_field, path, key, x0, axis_name)
    errors = _time_weight(path, time_weight)(t) * errors
    return _weighted_sum(errors, energy, beta, log_normalizer, axis_name)


def cep(
    log_ratio_fn: Callable[[Array, Array], Array],
    path: GaussianPath,
    key: Array,
    x0: Array,
    energy: Array,
    beta: Array,
    *,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Contrastive energy prediction: ``-sum_i softmax(-beta E)_i log softmax(f(x_t, t))_i``.

    One time for all samples that are contrasted.  With large groups the minimizer is ``f = -E_t``
    up to a function of t; in small ones the self-normalized weights are biased, as those of
    :func:`cefm` are.

    Args:
      log_ratio_fn: ``(x: [..., B, d], t: [..., B]) -> [..., B]``.
      path: probability path.
      key: random key; with leading axes of ``x0`` also one for each group, ``[N]``.
      x0: data, ``[B, d]``; with leading axes (a state's support actions, ``[N, M, d]``) the
        softmaxes are within each group and the loss is the mean over groups.
      energy: energies of the data, ``[..., B]``.
      beta: guidance scale >= 0.
      axis_name: mapped axis over which the groups, the first axis of ``x0 [N, ..., M, d]``, are
        split.

    Returns:
      ``(loss, aux)``; ``aux`` has ``ess`` and ``top_weight``, means over groups.

    Raises:
      ValueError: if the shapes disagree, or a single group gets ``axis_name`` or more than one key.

    Reference: Lu et al. 2023 (arXiv 2304.12824), eq. 12.
    """
    checks.check_rank("x0", x0, 2 if axis_name is None else 3)
    checks.check_shape("energy", energy, x0.shape[:-1])

    def draw(key: Array, x0: Array) -> tuple[Array, Array]:
        time_key, noise_key = jax.random.split(key)
        t = jnp.broadcast_to(_draw_time(time_key, (*x0.shape[:-2], 1), x0.dtype), x0.shape[:-1])
        return t, jax.random.normal(noise_key, x0.shape, x0.dtype)

    if x0.ndim == 2:
        if _is_typed(key):
            checks.check_shape("key", key, ())
        t, noise = draw(key, x0)
    else:
        t, noise = jax.vmap(draw)(sample_keys(key, x0.shape[0], axis_name), x0)
    log_ratio = log_ratio_fn(path.sample(x0, noise, t), t)
    checks.check_shape("log_ratio_fn(x, t)", log_ratio, t.shape)
    weights = lax.stop_gradient(energy_weights(energy, beta))
    # A weight of 0 contributes nothing even where the log-softmax is -inf; a weight that is NaN
    # must show.
    terms = jnp.where(weights == 0, 0, weights * jax.nn.log_softmax(log_ratio))
    devices = 1 if axis_name is None else lax.axis_size(axis_name)

    def mean(values: Array) -> Array:
        return psum_if(values.mean() / devices, axis_name)

    aux = {"ess": mean(effective_sample_size(weights)), "top_weight": mean(weights.max(-1))}
    return -terms.sum(-1).mean() / devices, aux


def support_cefm(
    field: Field,
    path: GaussianPath,
    key: Array,
    actions: Array,
    q_values: Array,
    beta: Array,
    *,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """QIPO-OT's policy loss: ``mean_i sum_j g_ij ||v(a_ij) - u_{t0}||^2`` over support action sets.

    ``g_ij = softmax_j(beta Q(s_i, a_ij))`` is normalized per state, so devices share nothing but
    the count of states.

    Args:
      field: velocity field, ``(x: [B, M, d], t: [B, M]) -> [B, M, d]``; states are closed over.
      path: probability path.
      key: random key, the same on every device; or one for each state, ``[B]``.
      actions: support actions, ``[B, M, d]``.
      q_values: their Q-values, ``[B, M]``; no gradient flows into them.
      beta: guidance scale >= 0, a scalar or ``[B, 1]``.
      axis_name: mapped axis over which the global batch of states is split.

    Returns:
      ``(loss, aux)``; ``aux`` has ``ess`` and ``top_weight``, means over the global batch of
      states.

    Reference: Zhang et al. 2025, Sec. 5 and Algorithm 2.
    """
    errors, _ = _batch_errors(cfm_error, field, path, key, actions, axis_name)
    return _support_mean(errors, q_values, beta, axis_name)


def support_ced(
    score_field: Field,
    path: GaussianPath,
    key: Array,
    actions: Array,
    q_values: Array,
    beta: Array,
    *,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """QIPO-Diff's policy loss: :func:`support_cefm` with a score field and :func:`ced`'s error."""
    errors, t = _batch_errors(dsm_error, score_field, path, key, actions, axis_name)
    return _support_mean(_time_weight(path, time_weight)(t) * errors, q_values, beta, axis_name)


def _squared_distance(prediction: Array, target: Array) -> Array:
    checks.check_shape("field(x, t)", prediction, target.shape)
    return jnp.sum((prediction - target) ** 2)


def _draw_time(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Uniform on (0, 1]: 0 is left out because scores and some velocities are infinite there."""
    return 1 - jax.random.uniform(key, shape, dtype)


def sample_keys(key: Array, size: int, axis_name: AxisName = None) -> Array:
    """Keys ``[size]`` of this device's samples, folded from their places in the global batch.

    Args:
      key: of the global batch, the same on every device; or already ``[size]`` keys, which are
        returned.
      size: of this device's share of the batch.
      axis_name: mapped axis over which the global batch is split.

    Raises:
      ValueError: if there are keys for another number of samples.
    """
    if _is_typed(key) and key.ndim:
        checks.check_shape("key", key, (size,))
        return key
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * size
    return jax.vmap(jax.random.fold_in, (None, 0))(key, offset + jnp.arange(size, dtype=jnp.int32))


def _is_typed(key: Array) -> bool:
    """Whether it is of JAX's key type; an old-style key is an array of integers, ``[2]`` for one key."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _batch_errors(
    error: Callable, field: Field, path: GaussianPath, key: Array, x0: Array, axis_name: AxisName
) -> tuple[Array, Array]:
    """Draw times and noise, call the field once on the whole batch: errors and times ``[B, ...]``.

    The first axis of ``x0`` is the batch; times are drawn for every sample ``[d]`` on its own.
    """
    checks.check_rank("x0", x0, 2)
    checks.check_float("x0", x0)

    def draw(key: Array) -> tuple[Array, Array]:
        time_key, noise_key = jax.random.split(key)
        t = _draw_time(time_key, x0.shape[1:-1], x0.dtype)
        return t, jax.random.normal(noise_key, x0.shape[1:], x0.dtype)

    t, noise = jax.vmap(draw)(sample_keys(key, x0.shape[0], axis_name))
    prediction = field(path.sample(x0, noise, t), t)
    checks.check_shape("field(x, t)", prediction, x0.shape)

    def one_error(prediction: Array, x0: Array, noise: Array, t: Array) -> Array:
        return error(lambda *_: prediction, path, x0, noise, t)

    for _ in range(t.ndim):
        one_error = jax.vmap(one_error)
    return one_error(prediction, x0, noise, t), t


def _time_weight(path: GaussianPath, time_weight: TimeWeight | None) -> TimeWeight:
    return time_weight if time_weight is not None else lambda t: path.std(t) ** 2


def _global_size(errors: Array, axis_name: AxisName) -> int:
    return errors.size if axis_name is None else errors.size * lax.axis_size(axis_name)


def _weighted_sum(
    errors: Array, energy: Array, beta: Array, log_normalizer: Array | None, axis_name: AxisName
) -> tuple[Array, Aux]:
    checks.check_shape("energy", energy, errors.shape)
    weights = lax.stop_gradient(energy_weights(energy, beta, axis_name=axis_name))
    top = weights.max() if axis_name is None else lax.pmax(weights.max(), axis_name)
    # Both are ratios of weights, so the softmax's hold for any normalizer, and no overflow reaches
    # them.
    aux = {"ess": effective_sample_size(weights, axis_name=axis_name), "top_weight": top}
    if log_normalizer is not None:
        weights = energy_weights(energy, beta, axis_name=axis_name, log_normalizer=log_normalizer)
        weights = lax.stop_gradient(weights)
        aux["weight_sum"] = psum_if(weights.sum(), axis_name)
    return jnp.sum(weights * errors), aux


def _support_mean(
    errors: Array, q_values: Array, beta: Array, axis_name: AxisName
) -> tuple[Array, Aux]:
    checks.check_shape("q_values", q_values, errors.shape)
    weights = lax.stop_gradient(energy_weights(-q_values, beta))
    states = _global_size(errors[:, 0], axis_name)

    def mean(values: Array) -> Array:
        return psum_if(values.sum(), axis_name) / states

    aux = {"ess": mean(effective_sample_size(weights)), "top_weight": mean(weights.max(-1))}
    return jnp.sum(weights * errors) / states, aux
