"""Flow-matching and score-matching losses, plain and importance-weighted.

Each loss is a mean of per-sample errors, made by ``vmap``, times importance weights of mean one:
``mean(weights * errors)`` (Zhang et al. 2025, Thm 4.3).  A *field* is any callable: parameters and
conditions are closed over, so the losses never see a module.  Noise and times come from ``key``
folded with each sample's index in the *global* batch, so a batch split over devices (same key on
all of them, ``axis_name`` given) draws what one device would.  ``key`` may instead hold a key for
each sample, ``[B]`` (:func:`sample_keys` of a larger batch, cut): the parts of a batch then draw
what the whole batch would.  With ``axis_name`` a loss and its gradient are this device's share: sum
them (``psum``) over devices, do not average.

Reference: Zhang et al. 2025 (arXiv 2503.04975), Thm 3.1, Thm 4.3, Cor. 4.8, Algorithms 1 and 2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from efm_jax import checks
from efm_jax.paths import GaussianPath
from efm_jax.types import Field
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


def matching(
    field: Field,
    path: GaussianPath,
    key: Array,
    x0: Array,
    *,
    prediction: str = "velocity",
    weights: Array | None = None,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Regression on any prediction: ``mean(weights lambda(t) ||f(x_t, t) - target||^2)``.

    Args:
      field: ``(x: [B, d], t: [B]) -> [B, d]``; the prediction named by ``prediction``.
      path: probability path; :meth:`~efm_jax.paths.GaussianPath.target` is the target.
      key: random key, the same on every device; or one for each sample, ``[B]``.
      x0: data, ``[B, d]``; or with more axes before ``d``, such as the support actions of a state,
        ``[B, M, d]``: every ``[d]`` has a time of its own, and the field sees ``t: [B, M]``.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`.
      weights: importance weights of mean one, or 0 and 1 as a mask, ``[B]`` (``x0`` without ``d``);
        no gradient flows into them.  None: ones.
      time_weight: ``lambda(t: [B]) -> [B]``; None: 1.
      axis_name: mapped axis over which the global batch is split.

    Returns:
      ``(loss, aux)``: a scalar share of the loss; with ``weights`` ``aux`` has their ``ess``
      (effective sample size) and ``top_weight`` (the largest one's share of the sum) along the last
      axis: of the global batch for ``[B]``, means over the global batch for ``[B, M]``.

    Raises:
      ValueError: if shapes disagree, or for an unknown prediction.

    Reference: Zhang et al. 2025, Thm 3.1; with weights, Thm 4.3.
    """
    checks.check_rank("x0", x0, 2)
    checks.check_float("x0", x0)

    def draw(key: Array) -> tuple[Array, Array]:
        time_key, noise_key = jax.random.split(key)
        t = _draw_time(time_key, x0.shape[1:-1], x0.dtype)
        return t, jax.random.normal(noise_key, x0.shape[1:], x0.dtype)

    t, noise = jax.vmap(draw)(sample_keys(key, x0.shape[0], axis_name))
    predicted = field(path.sample(x0, noise, t), t)
    checks.check_shape("field(x, t)", predicted, x0.shape)

    def error(predicted: Array, x0: Array, noise: Array, t: Array) -> Array:
        return _squared_distance(predicted, path.target(prediction, x0, noise, t))

    for _ in range(t.ndim):
        error = jax.vmap(error)
    errors = error(predicted, x0, noise, t)
    if time_weight is not None:
        errors = time_weight(t) * errors
    aux = {}
    if weights is not None:
        checks.check_shape("weights", weights, errors.shape)
        weights = lax.stop_gradient(weights)
        errors, aux = weights * errors, _concentration(weights, axis_name)
    return errors.sum() / (errors.size * _num_devices(axis_name)), aux


def cfm(
    field: Field,
    path: GaussianPath,
    key: Array,
    x0: Array,
    *,
    weights: Array | None = None,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Conditional flow matching: the mean of ``weights *`` :func:`cfm_error` over the batch.

    Arguments and results as in :func:`matching`, with a velocity field.

    Reference: Zhang et al. 2025, Thm 3.1; with weights, Thm 4.3.

    Example:
      >>> from efm_jax import paths
      >>> ot, key = paths.conditional_ot(), jax.random.key(0)
      >>> loss, _ = cfm(lambda x, t: -x, ot, key, jnp.ones((8, 2)))
      >>> masked, aux = cfm(lambda x, t: -x, ot, key, jnp.ones((8, 2)), weights=jnp.arange(8) % 2)
      >>> loss.shape, float(aux["ess"])
      ((), 4.0)
    """
    return matching(
        field, path, key, x0, weights=weights, time_weight=time_weight, axis_name=axis_name
    )


def dsm(
    score_field: Field,
    path: GaussianPath,
    key: Array,
    x0: Array,
    *,
    weights: Array | None = None,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Denoising score matching: the mean of ``weights lambda(t)`` :func:`dsm_error`.

    Arguments and results as in :func:`matching`, with a score field; ``time_weight`` is by default
    ``sigma_t^2``, which weighs as noise prediction does.

    Reference: Vincent 2011; Zhang et al. 2025, Sec. 3.
    """
    if time_weight is None:
        time_weight = lambda t: path.std(t) ** 2  # noqa: E731
    return matching(
        score_field,
        path,
        key,
        x0,
        prediction="score",
        weights=weights,
        time_weight=time_weight,
        axis_name=axis_name,
    )


def cefm(
    field: Field,
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
      time_weight: as in :func:`matching`.
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
      >>> ot, key = paths.conditional_ot(), jax.random.key(0)
      >>> x0 = jax.random.normal(jax.random.key(1), (8, 2))
      >>> loss, aux = cefm(lambda x, t: -x, ot, key, x0, energy=(x0**2).sum(-1), beta=1.0)
      >>> 1.0 <= float(aux["ess"]) <= 8.0
      True
    """
    weights, aux = _importance(x0, energy, beta, log_normalizer, axis_name)
    return cfm(field, path, key, x0, weights=weights, time_weight=time_weight, axis_name=axis_name)[
        0
    ], aux


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

    ``time_weight`` as in :func:`dsm`, other arguments and results as in :func:`cefm`, with a score
    field.

    Reference: Zhang et al. 2025, Cor. 4.8 and Algorithm 1.
    """
    weights, aux = _importance(x0, energy, beta, log_normalizer, axis_name)
    return dsm(
        score_field, path, key, x0, weights=weights, time_weight=time_weight, axis_name=axis_name
    )[0], aux


def contrastive(
    log_ratio_fn: Callable[[Array, Array], Array],
    path: GaussianPath,
    key: Array,
    x0: Array,
    weights: Array,
    *,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """Weighted contrast ``-mean_i w_i log softmax(f(x_t, t))_i``; one time for all of a group.

    Args:
      log_ratio_fn: ``(x: [..., B, d], t: [..., B]) -> [..., B]``.
      path: probability path.
      key: random key; with leading axes of ``x0`` also one for each group, ``[N]``.
      x0: data, ``[B, d]``; with leading axes (a state's support actions, ``[N, M, d]``) the softmax
        is within each group and the loss is the mean over groups.
      weights: importance weights of mean one within each group, ``[..., B]``; no gradient flows
        into them.
      axis_name: mapped axis over which the groups, the first axis of ``x0 [N, ..., M, d]``, are
        split.

    Returns:
      ``(loss, aux)``; ``aux`` has ``ess`` and ``top_weight``, means over groups.

    Raises:
      ValueError: if the shapes disagree, or a single group gets ``axis_name`` or more than one key.

    Reference: Lu et al. 2023 (arXiv 2304.12824), eq. 12.
    """
    checks.check_rank("x0", x0, 2 if axis_name is None else 3)
    checks.check_shape("weights", weights, x0.shape[:-1])

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
    weights = lax.stop_gradient(weights)
    # A weight of 0 contributes nothing even where the log-softmax is -inf; a NaN must show.
    terms = jnp.where(weights == 0, 0, weights * jax.nn.log_softmax(log_ratio))
    return -terms.mean() / _num_devices(axis_name), _concentration(
        jnp.atleast_2d(weights), axis_name
    )


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

    With large groups the minimizer is ``f = -E_t`` up to a function of t; in small ones the
    self-normalized weights are biased, as those of :func:`cefm` are.

    Args:
      energy: energies of the data, ``[..., B]``.
      beta: guidance scale >= 0.

    Other arguments, results and errors as in :func:`contrastive`.

    Reference: Lu et al. 2023 (arXiv 2304.12824), eq. 12.
    """
    checks.check_shape("energy", energy, jnp.shape(x0)[:-1])
    weights = energy.shape[-1] * energy_weights(energy, beta)
    return contrastive(log_ratio_fn, path, key, x0, weights, axis_name=axis_name)


def support_cefm(
    field: Field,
    path: GaussianPath,
    key: Array,
    actions: Array,
    q_values: Array,
    beta: Array,
    *,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Aux]:
    """QIPO-OT's policy loss: ``mean_i sum_j g_ij ||v(a_ij) - u_{t0}||^2`` over support action sets.

    ``g_ij = softmax_j(beta Q(s_i, a_ij))`` is normalized in every state, so devices share nothing
    but the count of states.

    Args:
      field: velocity field, ``(x: [B, M, d], t: [B, M]) -> [B, M, d]``; states are closed over.
      path: probability path.
      key: random key, the same on every device; or one for each state, ``[B]``.
      actions: support actions, ``[B, M, d]``.
      q_values: their Q-values, ``[B, M]``; no gradient flows into them.
      beta: guidance scale >= 0, a scalar or ``[B, 1]``.
      time_weight: as in :func:`matching`.
      axis_name: mapped axis over which the global batch of states is split.

    Returns:
      ``(loss, aux)``; ``aux`` has ``ess`` and ``top_weight``, means over the global batch of
      states.

    Reference: Zhang et al. 2025, Sec. 5 and Algorithm 2.
    """
    weights = _support_importance(actions, q_values, beta)
    return cfm(
        field, path, key, actions, weights=weights, time_weight=time_weight, axis_name=axis_name
    )


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
    weights = _support_importance(actions, q_values, beta)
    return dsm(
        score_field,
        path,
        key,
        actions,
        weights=weights,
        time_weight=time_weight,
        axis_name=axis_name,
    )


class LossEntry(NamedTuple):
    """A registered loss and the prediction that its field makes.

    ``loss(field, path, key, x0, *, weights, axis_name) -> (loss, aux)`` as :func:`matching`: a mean
    over samples that takes a key for each of them.
    """

    loss: Callable[..., tuple[Array, Aux]]
    prediction: str


# The names of the configuration field `loss`, whose `auto` takes the first of a prediction.
LOSSES = {
    "cfm": LossEntry(cfm, "velocity"),
    "dsm": LossEntry(dsm, "score"),
    "noise": LossEntry(functools.partial(matching, prediction="noise"), "noise"),
    "data": LossEntry(functools.partial(matching, prediction="data"), "data"),
}


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
    """Whether a key is of JAX's key type; an old-style one is an array of integers, ``[2]``."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _num_devices(axis_name: AxisName) -> int:
    return 1 if axis_name is None else lax.axis_size(axis_name)


def _importance(
    x0: Array, energy: Array, beta: Array, log_normalizer: Array | None, axis_name: AxisName
) -> tuple[Array, Aux]:
    """Importance weights ``[B]``, of mean one over the global batch (or the dataset)."""
    checks.check_shape("energy", energy, x0.shape[:-1])
    size = energy.size * _num_devices(axis_name)
    weights = energy_weights(energy, beta, axis_name=axis_name)
    # Ratios of weights are the softmax's for any normalizer, and no overflow reaches them.
    aux = _concentration(lax.stop_gradient(weights), axis_name)
    if log_normalizer is not None:
        weights = energy_weights(energy, beta, axis_name=axis_name, log_normalizer=log_normalizer)
        aux["weight_sum"] = lax.stop_gradient(psum_if(weights.sum(), axis_name))
    return size * weights, aux


def _support_importance(actions: Array, q_values: Array, beta: Array) -> Array:
    """Importance weights ``[B, M]``, of mean one over the support actions of every state."""
    checks.check_shape("q_values", q_values, actions.shape[:-1])
    return q_values.shape[-1] * energy_weights(-q_values, beta)


def _concentration(weights: Array, axis_name: AxisName) -> Aux:
    """Effective sample size and largest share of the weights along the last axis.

    Weights ``[B]`` are of the global batch; of more axes, each row is a state's, and the result is
    the mean over the global batch.
    """
    if weights.ndim == 1:
        top = weights.max() if axis_name is None else lax.pmax(weights.max(), axis_name)
        ess = effective_sample_size(weights, axis_name=axis_name)
        return {"ess": ess, "top_weight": top / psum_if(weights.sum(), axis_name)}
    ess, top = effective_sample_size(weights), weights.max(-1) / weights.sum(-1)
    means = {"ess": ess.mean(), "top_weight": top.mean()}
    return jax.tree.map(lambda mean: psum_if(mean, axis_name) / _num_devices(axis_name), means)
