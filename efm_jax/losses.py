"""Flow-matching and score-matching losses, plain and importance-weighted.

Each loss is a mean of per-sample errors times importance weights of mean one: ``mean(weights *
errors)`` (Zhang et al. 2025, Thm 4.3).  A *field* is any callable: parameters and conditions are
closed over, so the losses never see a module.  Data are ``[B, d]``, or ``[B, *event]`` (images,
sequences), or pytrees of such arrays; a sample has one time.  Errors, sums and times are in 32 bits
at least, and so are the losses.

Noise and times come from ``key`` folded with each sample's index in the *global* batch, so a batch
split over devices (same key on all of them, ``axis_name`` given) draws what one device would.
``key`` may instead hold a key for each sample, ``[B]`` (:func:`sample_keys` of a larger batch,
cut): the parts of a batch then draw what the whole batch would.

With ``axis_name`` a loss is this device's share: shares and their gradients are to be summed
(``psum``) over devices, not averaged, under ``pmap`` and under ``shard_map`` with and without its
checks.  With the checks all shares are equal, so a sum of shares must not be differentiated from
outside with respect to parameters that vary over devices.

Reference: Zhang et al. 2025 (arXiv 2503.04975), Thm 3.1, Thm 4.3, Cor. 4.8, Algorithms 1 and 2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Real, Shaped

from efm_jax import arrays, checks
from efm_jax.paths import GaussianPath
from efm_jax.types import Array, Field, Key, Scalar
from efm_jax.weights import AxisName, effective_sample_size, energy_weights, psum_if

Aux = dict[str, jax.Array]
TimeWeight = Callable[[jax.Array], jax.Array]
# An array [*batch, *event], usually [B, d], or a pytree of such arrays.
Data = Any
Loss = Float[jax.Array, ""]
# Of any real type; a mask may be boolean.
PerSample = Shaped[Array, "*batch"]


class Draws(NamedTuple):
    """What a loss draws for a batch."""

    noise: Data  # standard normal, like the data
    t: jax.Array  # [*batch], times, uniform on (0, 1]


def cfm_error(
    field: Field, path: GaussianPath, x0: Data, noise: Data, t: Scalar
) -> Float[jax.Array, ""]:
    """Conditional flow-matching error ``||v(x_t, t) - u_{t0}(x_t | x_0)||^2`` of one sample.

    Made to be ``vmap``-ed: here the field sees ``x: [d]``, ``t: []``.

    Args:
      field: velocity field.
      path: probability path.
      x0: data sample, ``[d]``, of any event shape, or a pytree.
      noise: standard normal sample like ``x0``.
      t: time in (0, 1], ``[]``.

    Returns:
      A scalar: the squared norm, summed over the event.

    Reference: Zhang et al. 2025, Thm 3.1.

    Example:
      >>> from efm_jax import paths
      >>> x0, noise = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
      >>> float(cfm_error(lambda x, t: jnp.zeros(2), paths.conditional_ot(), x0, noise, 0.5))
      5.0
    """
    return _errors(field, path, "velocity", x0, noise, t, ())


def dsm_error(
    score_field: Field, path: GaussianPath, x0: Data, noise: Data, t: Scalar
) -> Float[jax.Array, ""]:
    """Denoising score-matching error ``||s(x_t, t) + eps / sigma_t||^2`` of one sample.

    Arguments and result as in :func:`cfm_error`; the field predicts the score.
    """
    return _errors(score_field, path, "score", x0, noise, t, ())


def draw(
    key: Key | Draws | None,
    x0: Data,
    *,
    noise: Data | None = None,
    t: PerSample | None = None,
    event_ndim: int | None = None,
    batch_ndim: int = 1,
    axis_name: AxisName = None,
) -> Draws:
    """Draw the noise and times of a batch, as every loss does, where they are not given.

    Arguments and errors as in :func:`errors`; ``batch_ndim`` is the number of leading axes whose
    entries have a time each, where ``event_ndim`` is None.  A loss takes the result as its key, so
    that it can be drawn before.
    """
    if isinstance(key, Draws):
        noise, t, key = key.noise if noise is None else noise, key.t if t is None else t, None
    leaves, structure = jax.tree.flatten(x0)
    for leaf in leaves:
        checks.check_float("x0", leaf)
        checks.check_rank("x0", leaf, 2 if len(leaves) == 1 else 1)
    batch = arrays.batch_shape("x0", x0, event_ndim, batch_ndim)
    if not batch:
        raise ValueError(f"event_ndim: expected an axis of samples before it; got {event_ndim}")
    checks.check_not_empty("x0", leaves[0], 0)
    if noise is None or t is None:
        if key is None:
            raise ValueError("key: expected a key, or both noise and t; got None")

        def draw_one(key: jax.Array) -> tuple[Data, jax.Array]:
            time_key, noise_key = jax.random.split(key)
            # One leaf takes the key itself: an array draws the same in and out of a pytree.
            keys = [noise_key] if len(leaves) == 1 else jax.random.split(noise_key, len(leaves))
            noises = [
                _draw_noise(key, leaf.shape[1:], leaf.dtype)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
            time = _draw_time(time_key, batch[1:], leaves[0].dtype)
            return structure.unflatten(noises), time

        keys = arrays.shard_like(sample_keys(key, batch[0], axis_name), leaves[0])
        drawn, drawn_t = jax.vmap(draw_one)(keys)
        noise = jax.tree.map(arrays.shard_like, drawn, x0) if noise is None else noise
        t = drawn_t if t is None else t
    arrays.check_like("noise", noise, x0)
    checks.check_shape("t", t, batch)
    return Draws(noise, arrays.widen("t", t))


def errors(
    field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    x0: Data,
    *,
    prediction: str = "velocity",
    noise: Data | None = None,
    t: PerSample | None = None,
    event_ndim: int | None = None,
    axis_name: AxisName = None,
) -> Float[jax.Array, "*batch"]:
    """Compute the error of every sample, ``||f(x_t, t) - target||^2``, ``[B]``.

    For losses of one's own: other weights, other times, a coupling of noise and data.

    Args:
      field: ``(x: [B, d], t: [B]) -> [B, d]``; the prediction named by ``prediction``.
      path: probability path; :meth:`~efm_jax.paths.GaussianPath.target` is the target.
      key: random key, the same on every device; or one for each sample, ``[B]``; or what
        :func:`draw` drew before; may be None if noise and times are given.
      x0: data, ``[B, d]``.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`.
      noise: like ``x0``, where each sample is coupled to its noise; None: standard normal.
      t: times, ``[B]``; None: uniform on (0, 1].
      event_ndim: trailing axes of ``x0`` that make one sample; None: all but the first.
      axis_name: mapped axis over which the global batch is split.

    Raises:
      ValueError: if shapes disagree, the batch is empty, or for an unknown prediction.
      TypeError: if ``x0`` is not of a floating type.

    Reference: Zhang et al. 2025, Thm 3.1.

    Example:
      >>> from efm_jax import paths
      >>> x0, t = jnp.ones((4, 2)), jnp.full(4, 0.5)
      >>> ot, zeros = paths.conditional_ot(), jnp.zeros((4, 2))
      >>> errors(lambda x, t: -x, ot, None, x0, noise=zeros, t=t).tolist()
      [0.5, 0.5, 0.5, 0.5]
    """
    noise, t = draw(key, x0, noise=noise, t=t, event_ndim=event_ndim, axis_name=axis_name)
    return _errors(field, path, prediction, x0, noise, t, t.shape)


def matching(
    field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    x0: Data,
    *,
    prediction: str = "velocity",
    weights: PerSample | None = None,
    time_weight: TimeWeight | None = None,
    noise: Data | None = None,
    t: PerSample | None = None,
    event_ndim: int | None = None,
    axis_name: AxisName = None,
) -> tuple[Loss, Aux]:
    """Regression on any prediction: ``mean(weights lambda(t) ||f(x_t, t) - target||^2)``.

    Args:
      field: ``(x: [B, d], t: [B]) -> [B, d]``; the prediction named by ``prediction``.
      path: as in :func:`errors`.
      key: as in :func:`errors`.
      x0: data, ``[B, d]``.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`.
      weights: importance weights of mean one, or 0 and 1 as a mask, ``[B]``; with more axes, as for
        the support actions of a state, ``[B, M]`` for ``x0: [B, M, d]``, every weight has a time of
        its own, and the field sees ``t: [B, M]``.  No gradient flows into them.  None: ones.
      time_weight: ``lambda(t: [B]) -> [B]``; None: 1.
      noise: as in :func:`errors`.
      t: as in :func:`errors`.
      event_ndim: trailing axes of ``x0`` that make one sample; None: all after those of ``weights``
        or, without weights, after the first.
      axis_name: mapped axis over which the global batch is split.

    Returns:
      ``(loss, aux)``: a scalar share of the loss; with ``weights`` ``aux`` has their ``ess``
      (effective sample size) and ``top_weight`` (the largest one's share of the sum) along the last
      axis: of the global batch for ``[B]``, means over the global batch for ``[B, M]``.

    Raises:
      ValueError: if shapes disagree, the batch is empty, or for an unknown prediction.
      TypeError: if ``x0`` is not of a floating type.

    Reference: Zhang et al. 2025, Thm 3.1; with weights, Thm 4.3.
    """
    batch_ndim = 1
    if weights is not None:
        least = min((jnp.shape(leaf) for leaf in jax.tree.leaves(x0)), key=len)
        batch_ndim = max(jnp.ndim(weights), 1)
        checks.check_shape("weights", weights, least[: min(batch_ndim, max(len(least) - 1, 1))])
    sizes = {"event_ndim": event_ndim, "batch_ndim": batch_ndim}
    noise, t = draw(key, x0, noise=noise, t=t, **sizes, axis_name=axis_name)
    field = arrays.per_device(field, axis_name)
    values = _errors(field, path, prediction, x0, noise, t, t.shape)
    if time_weight is not None:
        factor = arrays.widen("time_weight(t)", arrays.per_device(time_weight, axis_name)(t))
        checks.check_shape("time_weight(t)", factor, t.shape)
        values = factor.astype(values.dtype) * values
    aux = {}
    if weights is not None:
        checks.check_shape("weights", weights, t.shape)  # of event_ndim
        weights = arrays.widen("weights", lax.stop_gradient(weights))
        values, aux = weights.astype(values.dtype) * values, _concentration(weights, axis_name)
    return share(values.mean(), axis_name), aux


def cfm(
    field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    x0: Data,
    *,
    weights: PerSample | None = None,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
    **options: Any,
) -> tuple[Loss, Aux]:
    """Conditional flow matching: the mean of ``weights *`` :func:`cfm_error` over the batch.

    Arguments and results as in :func:`matching`, with a velocity field; ``options`` are its
    ``noise``, ``t`` and ``event_ndim``.

    Reference: Zhang et al. 2025, Thm 3.1; with weights, Thm 4.3.

    Example:
      >>> from efm_jax import paths
      >>> ot, key = paths.conditional_ot(), jax.random.key(0)
      >>> loss, _ = cfm(lambda x, t: -x, ot, key, jnp.ones((8, 2)))
      >>> masked, aux = cfm(lambda x, t: -x, ot, key, jnp.ones((8, 2)), weights=jnp.arange(8) % 2)
      >>> loss.shape, float(aux["ess"])
      ((), 4.0)
    """
    options |= {"weights": weights, "time_weight": time_weight, "axis_name": axis_name}
    return matching(field, path, key, x0, prediction="velocity", **options)


def dsm(
    score_field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    x0: Data,
    *,
    weights: PerSample | None = None,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
    **options: Any,
) -> tuple[Loss, Aux]:
    """Denoising score matching: the mean of ``weights lambda(t)`` :func:`dsm_error`.

    Arguments and results as in :func:`cfm`, with a score field; ``time_weight`` is by default
    ``sigma_t^2``, which weighs as noise prediction does.

    Reference: Vincent 2011; Zhang et al. 2025, Sec. 3.
    """
    time_weight = time_weight or (lambda t: path.std(t) ** 2)
    options |= {"weights": weights, "time_weight": time_weight, "axis_name": axis_name}
    return matching(score_field, path, key, x0, prediction="score", **options)


def cefm(
    field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    x0: Data,
    energy: Real[Array, " B"],
    beta: Scalar,
    *,
    time_weight: TimeWeight | None = None,
    log_normalizer: Scalar | None = None,
    axis_name: AxisName = None,
    **options: Any,
) -> tuple[Loss, Aux]:
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
      **options: ``noise``, ``t``, ``event_ndim`` of :func:`matching`.

    Returns:
      ``(loss, aux)``; ``aux`` has ``ess`` (effective sample size) and ``top_weight`` (the largest
      weight's share of the sum), both of the global batch and the same with and without
      ``log_normalizer``; with it also ``weight_sum``, whose mean over batches is 1 if
      ``log_normalizer`` is the data's.

    Raises:
      ValueError: if the shapes disagree, the batch is empty or ``beta`` is negative.

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
    options |= {"weights": weights, "time_weight": time_weight, "axis_name": axis_name}
    return cfm(field, path, key, x0, **options)[0], aux


def ced(
    score_field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    x0: Data,
    energy: Real[Array, " B"],
    beta: Scalar,
    *,
    time_weight: TimeWeight | None = None,
    log_normalizer: Scalar | None = None,
    axis_name: AxisName = None,
    **options: Any,
) -> tuple[Loss, Aux]:
    """Conditional energy-weighted diffusion: ``sum_i lambda(t_i) g_i ||s + eps_i / sigma||^2``.

    ``time_weight`` as in :func:`dsm`, other arguments and results as in :func:`cefm`, with a score
    field.

    Reference: Zhang et al. 2025, Cor. 4.8 and Algorithm 1.
    """
    weights, aux = _importance(x0, energy, beta, log_normalizer, axis_name)
    options |= {"weights": weights, "time_weight": time_weight, "axis_name": axis_name}
    return dsm(score_field, path, key, x0, **options)[0], aux


def contrastive(
    log_ratio_fn: Callable[[jax.Array, jax.Array], jax.Array],
    path: GaussianPath,
    key: Key,
    x0: Float[Array, "*group B d"],
    weights: Real[Array, "*group B"],
    *,
    axis_name: AxisName = None,
) -> tuple[Loss, Aux]:
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
    checks.check_float("x0", x0)
    checks.check_shape("weights", weights, jnp.shape(x0)[:-1])
    checks.check_not_empty("x0", x0, 0)
    x0 = jnp.asarray(x0)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        group = x0.shape if x0.ndim == 2 else x0.shape[1:]
        time_key, noise_key = jax.random.split(key)
        t = _draw_time(time_key, (*group[:-2], 1), x0.dtype)
        return jnp.broadcast_to(t, group[:-1]), _draw_noise(noise_key, group, x0.dtype)

    if x0.ndim == 2:
        if _is_typed(key):
            checks.check_shape("key", key, ())
        t, noise = draw(key)
        t, noise = arrays.shard_like(t, x0), arrays.shard_like(noise, x0)
    else:
        keys = arrays.shard_like(sample_keys(key, x0.shape[0], axis_name), x0)
        t, noise = jax.vmap(draw)(keys)
    log_ratio = arrays.per_device(log_ratio_fn, axis_name)(path.sample(x0, noise, t), t)
    checks.check_shape("log_ratio_fn(x, t)", log_ratio, t.shape)
    log_share = jax.nn.log_softmax(arrays.widen("log_ratio_fn(x, t)", log_ratio))
    weights = arrays.widen("weights", lax.stop_gradient(weights))
    # A weight of 0 contributes nothing even where the log-softmax is -inf; a NaN must show.
    terms = jnp.where(weights == 0, 0, weights.astype(log_share.dtype) * log_share)
    return share(-terms.mean(), axis_name), _concentration(jnp.atleast_2d(weights), axis_name)


def cep(
    log_ratio_fn: Callable[[jax.Array, jax.Array], jax.Array],
    path: GaussianPath,
    key: Key,
    x0: Float[Array, "*group B d"],
    energy: Real[Array, "*group B"],
    beta: Real[chex.Numeric, "..."],
    *,
    axis_name: AxisName = None,
) -> tuple[Loss, Aux]:
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
    weights = jnp.shape(energy)[-1] * energy_weights(energy, beta)
    return contrastive(log_ratio_fn, path, key, x0, weights, axis_name=axis_name)


def support_cefm(
    field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    actions: Float[Array, "B M d"],
    q_values: Real[Array, "B M"],
    beta: Real[chex.Numeric, "..."],
    *,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
    **options: Any,
) -> tuple[Loss, Aux]:
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
      **options: ``noise`` like ``actions`` and ``t``, ``[B, M]``, of :func:`matching`.

    Returns:
      ``(loss, aux)``; ``aux`` has ``ess`` and ``top_weight``, means over the global batch of
      states.

    Reference: Zhang et al. 2025, Sec. 5 and Algorithm 2.
    """
    options |= {"time_weight": time_weight, "axis_name": axis_name}
    weights = _support_importance(actions, q_values, beta)
    return cfm(field, path, key, actions, weights=weights, **options)


def support_ced(
    score_field: Field,
    path: GaussianPath,
    key: Key | Draws | None,
    actions: Float[Array, "B M d"],
    q_values: Real[Array, "B M"],
    beta: Real[chex.Numeric, "..."],
    *,
    time_weight: TimeWeight | None = None,
    axis_name: AxisName = None,
    **options: Any,
) -> tuple[Loss, Aux]:
    """QIPO-Diff's policy loss: :func:`support_cefm` with a score field and :func:`ced`'s error."""
    options |= {"time_weight": time_weight, "axis_name": axis_name}
    weights = _support_importance(actions, q_values, beta)
    return dsm(score_field, path, key, actions, weights=weights, **options)


class LossEntry(NamedTuple):
    """A registered loss and the prediction that its field makes.

    ``loss(field, path, key, x0, *, weights, axis_name) -> (loss, aux)`` as :func:`matching`: a mean
    over samples that takes a key for each of them.
    """

    loss: Callable[..., tuple[jax.Array, Aux]]
    prediction: str


# The names of the configuration field `loss`, whose `auto` takes the first of a prediction.
LOSSES = {
    "cfm": LossEntry(cfm, "velocity"),
    "dsm": LossEntry(dsm, "score"),
    "noise": LossEntry(functools.partial(matching, prediction="noise"), "noise"),
    "data": LossEntry(functools.partial(matching, prediction="data"), "data"),
}


def _errors(
    field: Field,
    path: GaussianPath,
    prediction: str,
    x0: Data,
    noise: Data,
    t: Any,
    batch: tuple[int, ...],
) -> jax.Array:
    """Compute squared distances of predictions and targets over the event axes, ``[*batch]``."""
    predicted, target = field(path.sample(x0, noise, t), t), path.target(prediction, x0, noise, t)
    arrays.check_like("field(x, t)", predicted, target)

    def squares(predicted: jax.Array, target: jax.Array) -> jax.Array:
        predicted, target = (arrays.widen("field(x, t)", x) for x in (predicted, target))
        gap = predicted - target.astype(predicted.dtype)
        return jnp.sum(gap**2, axis=tuple(range(len(batch), gap.ndim)))

    leaves = jax.tree.leaves(jax.tree.map(squares, predicted, target))
    return functools.reduce(jnp.add, leaves)


def _draw_time(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform on (0, 1]: 0 is left out because scores and some velocities are infinite there."""
    return 1 - jax.random.uniform(key, shape, arrays.wide_type(dtype))


def _draw_noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw in 32 bits at least: of 16 random bits a normal has no tails."""
    wide = arrays.wide_type(dtype)
    return jax.random.normal(key, shape, wide).astype(dtype)


def sample_keys(key: Key, size: int, axis_name: AxisName = None) -> jax.Array:
    """Keys ``[size]`` of this device's samples, folded from their places in the global batch.

    Args:
      key: of the global batch, the same on every device; or already ``[size]`` keys, which are
        returned.  Keys of JAX's ``rbg`` kinds seed threefry ones, because their draws would depend
        on how a batch is split.
      size: of this device's share of the batch.
      axis_name: mapped axis over which the global batch is split.

    Raises:
      ValueError: if there are keys for another number of samples.
    """
    data = jax.random.key_data(key) if _is_typed(key) else key
    if data.shape[-1] == 4:
        key = jax.random.wrap_key_data(data[..., :2] ^ data[..., 2:], impl="threefry2x32")
    if _is_typed(key) and key.ndim:
        checks.check_shape("key", key, (size,))
        return key
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * size
    return jax.vmap(jax.random.fold_in, (None, 0))(key, offset + jnp.arange(size, dtype=jnp.int32))


def _is_typed(key: jax.Array) -> bool:
    """Whether a key is of JAX's key type; an old-style one is an array of integers, ``[2]``."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def share(mean: jax.Array, axis_name: AxisName) -> jax.Array:
    """Make a device's mean over its samples its share of the global mean.

    Of a loss whose functions were wrapped by :func:`efm_jax.arrays.per_device`.
    """
    if axis_name is None:
        return mean
    size = lax.axis_size(axis_name)
    if not arrays.typed_axes(axis_name):
        return mean / size
    # A share that varied could not be summed and then differentiated; as it does not, its gradient
    # would be that of a mean over devices.
    return arrays.scale_gradient(lax.pmean(mean, axis_name) / size, size)


def _importance(
    x0: Data,
    energy: Array,
    beta: chex.Numeric,
    log_normalizer: Scalar | None,
    axis_name: AxisName,
) -> tuple[jax.Array, Aux]:
    """Importance weights ``[B]``, of mean one over the global batch (or the dataset)."""
    checks.check_shape("energy", energy, jnp.shape(jax.tree.leaves(x0)[0])[:1])
    weights = energy_weights(energy, beta, axis_name=axis_name)
    size = weights.size * (1 if axis_name is None else lax.axis_size(axis_name))
    # Ratios of weights are the softmax's for any normalizer, and no overflow reaches them.
    aux = _concentration(lax.stop_gradient(weights), axis_name)
    if log_normalizer is not None:
        weights = energy_weights(energy, beta, axis_name=axis_name, log_normalizer=log_normalizer)
        aux["weight_sum"] = lax.stop_gradient(psum_if(weights.sum(), axis_name))
    return size * weights, aux


def _support_importance(actions: Array, q_values: Array, beta: chex.Numeric) -> jax.Array:
    """Importance weights ``[B, M]``, of mean one over the support actions of every state."""
    checks.check_shape("q_values", q_values, jnp.shape(actions)[:-1])
    q_values = arrays.to_float("q_values", q_values)
    return q_values.shape[-1] * energy_weights(-q_values, beta)


def _concentration(weights: jax.Array, axis_name: AxisName) -> Aux:
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
    return means if axis_name is None else lax.pmean(means, axis_name)
