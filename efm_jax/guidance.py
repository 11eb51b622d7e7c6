"""Other ways to guide a diffusion model toward low energy, to compare energy weighting with.

Each trains something and returns a guided score field from an unguided one:

===================  ==============================  ==========================  =================
guidance             trained besides the score       needs a gradient to sample  exact at beta > 0
===================  ==============================  ==========================  =================
classifier           a classifier of noised data     yes                         at beta = 1 only
classifier-free      the score's label               no                          at beta = 1 only
contrastive energy   the intermediate energy         yes                         at every beta
===================  ==============================  ==========================  =================

For the first two an energy is ``E(x) = -log p(c | x)`` with a class c.  A velocity field is guided
through its path's conversions, :meth:`~efm_jax.paths.GaussianPath.score_from_velocity` and back.

Reference: Zhang et al. 2025 (arXiv 2503.04975), Table 1 and Sec. 4.3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Real

from efm_jax import checks
from efm_jax.losses import Aux
from efm_jax.paths import GaussianPath
from efm_jax.types import Array, Field, Key, Scalar

# (x: [..., d], t: [...]) -> [...], each point on its own.
PointFn = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_loss(
    logit_fn: PointFn,
    path: GaussianPath,
    key: Key,
    x0: Float[Array, "B d"],
    class_prob: Real[Array, " B"],
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

    Returns:
      ``(loss, aux)``: the mean over the batch in nats, and ``accuracy``, the share of samples whose
      likelier class is predicted.

    Raises:
      ValueError: if shapes disagree.

    Reference: Dhariwal & Nichol 2021, Sec. 4.

    Example:
      >>> from efm_jax import paths
      >>> x0 = jax.random.normal(jax.random.key(1), (8, 2))
      >>> prob, path = jnp.exp(-0.5 * x0[:, 0] ** 2), paths.vp_linear()
      >>> loss, _ = classifier_loss(lambda x, t: x[:, 0], path, jax.random.key(0), x0, prob)
      >>> loss.shape
      ()
    """
    checks.check_rank("x0", x0, 2)
    checks.check_shape("class_prob", class_prob, x0.shape[:-1])
    time_key, noise_key = jax.random.split(key)
    t = jax.random.uniform(time_key, x0.shape[:-1], x0.dtype)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    logit = logit_fn(path.sample(x0, noise, t), t)
    checks.check_shape("logit_fn(x, t)", logit, t.shape)
    class_prob = lax.stop_gradient(class_prob)
    # -p log sigmoid(l) - (1 - p) log sigmoid(-l), without overflow.
    loss = jnp.mean(jax.nn.softplus(logit) - class_prob * logit)
    return loss, {"accuracy": jnp.mean((logit > 0) == (class_prob > 0.5), dtype=x0.dtype)}


def classifier_guided(score_field: Field, logit_fn: PointFn, beta: Scalar) -> Field:
    """Return the score field ``grad log p_t(x) + beta grad log p(c | x, t)``.

    Args:
      score_field: unguided score, ``(x: [B, d], t: [B]) -> [B, d]``.
      logit_fn: trained with :func:`classifier_loss`.
      beta: guidance scale.

    Returns:
      A score field; with exact inputs that of ``q ∝ p exp(-beta E)``, ``E = -log p(c | x)``, only
      where beta is 0 or 1.

    Reference: Zhang et al. 2025, eq. 4.6.

    Example:
      >>> guided = classifier_guided(lambda x, t: -x, lambda x, t: x.sum(-1), beta=2.0)
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[1.0, 1.0]]
    """
    return _add_gradient(score_field, lambda x, t: jax.nn.log_sigmoid(logit_fn(x, t)), beta)


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


def classifier_free_guided(field: Field, conditional_field: Field, beta: Scalar) -> Field:
    """Return the field ``(1 - beta) u(x, t) + beta u(x, t | c)``.

    Args:
      field: score, velocity or noise without the label, ``(x: [B, d], t: [B]) -> [B, d]``.
      conditional_field: the same prediction with the label.
      beta: guidance scale.

    Returns:
      A field of the same kind; with exact inputs that of ``q ∝ p exp(-beta E)``, ``E = -log p(c |
      x)``, only where beta is 0 or 1.

    Reference: Zhang et al. 2025, eq. 4.6.

    Example:
      >>> guided = classifier_free_guided(lambda x, t: -x, lambda x, t: 1 - x, beta=3.0)
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[3.0, 3.0]]
    """

    def guided(
        x: Float[jax.Array, "*batch d"], t: Float[jax.Array, "*batch"]
    ) -> Float[jax.Array, "*batch d"]:
        return field(x, t) * (1 - beta) + conditional_field(x, t) * beta

    return guided


def contrastive_guided(score_field: Field, log_ratio_fn: PointFn) -> Field:
    """Return ``grad log p_t(x) + grad f(x, t)`` with ``f = -E_t``, up to a function of t.

    Args:
      score_field: unguided score, ``(x: [B, d], t: [B]) -> [B, d]``.
      log_ratio_fn: ``(x: [B, d], t: [B]) -> [B]``, trained with :func:`efm_jax.losses.cep`, beta
        included.

    Returns:
      A score field; with exact inputs that of ``q ∝ p exp(-beta E)``.

    Reference: Lu et al. 2023, eq. 8; Zhang et al. 2025, eq. 4.7.

    Example:
      >>> guided = contrastive_guided(lambda x, t: -x, lambda x, t: 2 * x.sum(-1))
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[2.0, 2.0]]
    """
    return _add_gradient(score_field, log_ratio_fn, 1.0)


def _add_gradient(score_field: Field, log_factor: PointFn, scale: Scalar) -> Field:
    """Return ``score + scale * grad_x log_factor``, of ``p_t(x) exp(scale * log_factor(x, t))``."""

    def guided(
        x: Float[jax.Array, "*batch d"], t: Float[jax.Array, "*batch"]
    ) -> Float[jax.Array, "*batch d"]:
        def total(x: jax.Array) -> jax.Array:
            value = log_factor(x, t)
            checks.check_shape("log_factor(x, t)", value, x.shape[:-1])
            return value.sum()

        return score_field(x, t) + scale * jax.grad(total)(x)

    return guided
