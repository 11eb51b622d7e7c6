"""Other ways to guide a diffusion model toward low energy, to compare energy weighting with.

Each trains something and returns a guided score field from an unguided one:

===================  ==============================  ==========================  =================
guidance             trained besides the score       needs a gradient to sample  exact at beta > 0
===================  ==============================  ==========================  =================
classifier           a classifier of noised data     yes                         at beta = 1 only
classifier-free      the score's label               no                          at beta = 1 only
contrastive energy   the intermediate energy         yes                         at every beta
===================  ==============================  ==========================  =================

For the first two an energy is ``E(x) = -log p(c | x)`` with a class c.  A velocity, noise or data
field is guided as it is, by what a change of the score changes in it; where that is infinite (``mu
= 0``), by the change just before.  :func:`monte_carlo_guided` trains nothing at all.

Reference: Zhang et al. 2025 (arXiv 2503.04975), Table 1 and Sec. 4.3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Real

from efm_jax import arrays, checks, exact
from efm_jax.losses import Aux, draw, share
from efm_jax.paths import PREDICTIONS, GaussianPath
from efm_jax.sampling import latest_time
from efm_jax.types import Array, Field, Key, Scalar
from efm_jax.weights import AxisName, boltzmann_logits

# (x: [..., d], t: [...]) -> [...], each point on its own.
PointFn = Callable[[jax.Array, jax.Array], jax.Array]
# A guidance scale: a number, one for each point ``[...]``, or a function of times ``[...]``.
Scale = Any


def classifier_loss(
    logit_fn: PointFn,
    path: GaussianPath,
    key: Key,
    x0: Float[Array, "B d"],
    class_prob: Real[Array, " B"],
    *,
    axis_name: AxisName = None,
) -> tuple[Float[jax.Array, ""], Aux]:
    """Compute a binary classifier's cross-entropy with the class probabilities of noised data.

    Its minimizer has ``sigmoid(logit(x, t)) = E_{p_{0t}(x_0 | x)}[p(c | x_0)]``.

    Args:
      logit_fn: ``(x: [B, d], t: [B]) -> [B]``.
      path: probability path.
      key: random key.
      x0: data, ``[B, d]``.
      class_prob: ``p(c | x0)``, ``[B]`` in [0, 1]; a drawn label, 0 or 1, has the same minimizer.
        For an energy, ``exp(-E(x0))``.
      axis_name: mapped axis over which the global batch is split; the loss is then this device's
        share, as in :mod:`efm_jax.losses`.

    Returns:
      ``(loss, aux)``: the mean over the batch in nats, and ``accuracy``, the share of samples of
      the global batch whose likelier class is predicted.

    Raises:
      ValueError: if shapes disagree, or the batch is empty.

    Reference: Dhariwal & Nichol 2021, Sec. 4.

    Example:
      >>> from efm_jax import paths
      >>> x0 = jax.random.normal(jax.random.key(1), (8, 2))
      >>> prob, path = jnp.exp(-0.5 * x0[:, 0] ** 2), paths.vp_linear()
      >>> loss, _ = classifier_loss(lambda x, t: x[:, 0], path, jax.random.key(0), x0, prob)
      >>> loss.shape
      ()
    """
    checks.check_shape("class_prob", class_prob, jnp.shape(x0)[:-1])
    noise, t = draw(key, x0, axis_name=axis_name)
    logit = arrays.per_device(logit_fn, axis_name)(path.sample(x0, noise, t), t)
    checks.check_shape("logit_fn(x, t)", logit, t.shape)
    logit = arrays.widen("logit_fn(x, t)", logit)
    class_prob = arrays.to_float("class_prob", lax.stop_gradient(class_prob)).astype(logit.dtype)
    # -p log sigmoid(l) - (1 - p) log sigmoid(-l), without overflow.
    loss = jnp.mean(jax.nn.softplus(logit) - class_prob * logit)
    accuracy = jnp.mean((logit > 0) == (class_prob > 0.5), dtype=logit.dtype)
    if axis_name is not None:
        accuracy = lax.pmean(accuracy, axis_name)
    return share(loss, axis_name), {"accuracy": accuracy}


def classifier_guided(
    field: Field,
    logit_fn: PointFn,
    beta: Scale,
    *,
    prediction: str = "score",
    path: GaussianPath | None = None,
) -> Field:
    """Return the field of the score ``grad log p_t(x) + beta grad log p(c | x, t)``.

    Args:
      field: unguided score or another ``prediction``, ``(x: [B, d], t: [B]) -> [B, d]``.
      logit_fn: trained with :func:`classifier_loss`.
      beta: guidance scale: a number, one for each point ``[B]``, or a function of times ``[B]``.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`; ``field`` and the result predict it.
      path: probability path, which predictions other than the score need.

    Returns:
      A field; with exact inputs that of ``q ∝ p exp(-beta E)``, ``E = -log p(c | x)``, only
      where beta is 0 or 1.

    Reference: Zhang et al. 2025, eq. 4.6.

    Example:
      >>> guided = classifier_guided(lambda x, t: -x, lambda x, t: x.sum(-1), beta=2.0)
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[1.0, 1.0]]
    """
    log_prob = lambda x, t: jax.nn.log_sigmoid(logit_fn(x, t))  # noqa: E731
    return _add_gradient(field, log_prob, beta, prediction, path)


def drop_labels(
    key: Key, labels: Int[Array, "*batch"], rate: Scalar, null_label: int
) -> Int[jax.Array, "*batch"]:
    """Replace labels by ``null_label`` with probability ``rate``: one network learns both fields.

    Args:
      key: random key.
      labels: integers, ``[...]``.
      rate: probability in [0, 1].
      null_label: stands for "no label".

    Returns:
      Labels of the same shape and type.

    Reference: Ho & Salimans 2022, Algorithm 1.

    Example:
      >>> drop_labels(jax.random.key(0), jnp.array([0, 1, 1]), rate=1.0, null_label=2).tolist()
      [2, 2, 2]
    """
    checks.check_number("rate", rate, minimum=0.0, maximum=1.0)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers; got dtype {labels.dtype}")
    dropped = jax.random.bernoulli(key, rate, labels.shape)
    return jnp.where(dropped, jnp.asarray(null_label, labels.dtype), labels)


def classifier_free_guided(field: Field, conditional_field: Field, beta: Scale) -> Field:
    """Return the field ``(1 - beta) u(x, t) + beta u(x, t | c)``.

    Args:
      field: score, velocity or noise without the label, ``(x: [B, d], t: [B]) -> [B, d]``.
      conditional_field: the same prediction with the label.
      beta: guidance scale, as in :func:`classifier_guided`.

    Returns:
      A field of the same kind; with exact inputs that of ``q ∝ p exp(-beta E)``, ``E = -log p(c |
      x)``, only where beta is 0 or 1.

    Reference: Zhang et al. 2025, eq. 4.6.

    Example:
      >>> guided = classifier_free_guided(lambda x, t: -x, lambda x, t: 1 - x, beta=3.0)
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[3.0, 3.0]]
    """

    def guided(x: Any, t: jax.Array) -> Any:
        def mix(plain: jax.Array, conditional: jax.Array) -> jax.Array:
            scale = _scale(beta, t, plain)
            return plain * (1 - scale) + conditional * scale

        plain, conditional = field(x, t), conditional_field(x, t)
        arrays.check_like("conditional_field(x, t)", conditional, plain)
        return jax.tree.map(mix, plain, conditional)

    return guided


def contrastive_guided(
    field: Field,
    log_ratio_fn: PointFn,
    *,
    prediction: str = "score",
    path: GaussianPath | None = None,
) -> Field:
    """Return the field of the score ``grad log p_t(x) + grad f(x, t)``, with ``f = -E_t``.

    Args:
      field: unguided score or another ``prediction``, ``(x: [B, d], t: [B]) -> [B, d]``.
      log_ratio_fn: ``(x: [B, d], t: [B]) -> [B]``, trained with :func:`efm_jax.losses.cep`, beta
        included; a function of t added to it changes nothing.
      prediction: as in :func:`classifier_guided`.
      path: as in :func:`classifier_guided`.

    Returns:
      A field; with exact inputs that of ``q ∝ p exp(-beta E)``.

    Reference: Lu et al. 2023, eq. 8; Zhang et al. 2025, eq. 4.7.

    Example:
      >>> guided = contrastive_guided(lambda x, t: -x, lambda x, t: 2 * x.sum(-1))
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[2.0, 2.0]]
    """
    return _add_gradient(field, log_ratio_fn, 1.0, prediction, path)


def monte_carlo_guided(
    field: Field,
    path: GaussianPath,
    data: Float[Array, "n d"],
    energy: Real[Array, " n"],
    beta: Scalar,
    *,
    prediction: str = "velocity",
) -> Field:
    """Return a guided field without training: samples of the data tilt the posterior mean.

    ``E[x_0 | x]`` is estimated over the same samples with weights ``exp(-beta E)`` and without, and
    the difference is added to what the field predicts.

    Args:
      field: unguided ``prediction``, ``(x: [B, d], t: [B]) -> [B, d]``.
      path: probability path.
      data: samples of ``p(x)``, ``[n, d]``; the more, the less the variance.
      energy: their energies, ``[n]``.
      beta: guidance scale >= 0.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`; ``field`` and the result predict it.

    Returns:
      A field; as n grows that of ``q ∝ p exp(-beta E)``.

    Reference: Feng et al. 2025 (arXiv 2502.02150), training-free Monte-Carlo guidance.

    Example:
      >>> from efm_jax import paths
      >>> data, path = jnp.array([[-1.0], [1.0]]), paths.conditional_ot()
      >>> guided = monte_carlo_guided(lambda x, t: x, path, data, jnp.array([9.0, 0.0]), beta=1.0)
      >>> guided(jnp.zeros((1, 1)), jnp.array([0.5])).round(2).tolist()
      [[-2.0]]
    """
    log_weights = boltzmann_logits(energy, beta)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        plain, tilted = (exact.x0(path, x, t, data, weights) for weights in (None, log_weights))
        change = path.convert(tilted - plain, jnp.zeros_like(x), t, "data", prediction)
        return field(x, t) + change

    return guided


def _scale(beta: Scale, t: jax.Array, x: jax.Array) -> jax.Array:
    """Shape a guidance scale to multiply points."""
    scale = arrays.to_float("beta", beta(t) if callable(beta) else beta).astype(x.dtype)
    return arrays.expand("beta", scale, x)


def _add_gradient(
    field: Field, log_factor: PointFn, beta: Scale, prediction: str, path: GaussianPath | None
) -> Field:
    """Return the field of the score ``s + beta * grad_x log_factor``."""
    checks.check_choice("prediction", prediction, PREDICTIONS)
    if prediction != "score" and path is None:
        raise ValueError(f"path: expected the probability path of a {prediction} field; got None")

    def guided(x: Any, t: jax.Array) -> Any:
        late = t
        if path is not None and prediction in ("velocity", "data"):
            late = jnp.minimum(t, latest_time(path))

        def total(x: Any) -> jax.Array:
            value = log_factor(x, late)
            checks.check_shape("log_factor(x, t)", value, jnp.shape(t))
            return value.sum()

        change = jax.tree.map(lambda g: _scale(beta, t, g) * g, jax.grad(total)(x))
        if path is not None:
            # A conversion is linear: at x = 0 it converts the change alone.
            origin = jax.tree.map(jnp.zeros_like, x)
            change = path.convert(change, origin, late, "score", prediction)
        return jax.tree.map(jnp.add, field(x, t), change)

    return guided
