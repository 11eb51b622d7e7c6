"""Classifier guidance: a classifier of noised data, whose log-probability's gradient is added to the score.

Reference: Dhariwal & Nichol 2021 (arXiv 2105.05233); Zhang et al. 2025, eq. 4.6.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from efm_jax import checks
from efm_jax.guidance.gradient import add_gradient
from efm_jax.losses import Aux
from efm_jax.paths import GaussianPath
from efm_jax.types import Array, Field

LogitFn = Callable[[Array, Array], Array]


def classifier_loss(
    logit_fn: LogitFn, path: GaussianPath, key: Array, x0: Array, class_prob: Array
) -> tuple[Array, Aux]:
    """Cross-entropy of a time-dependent binary classifier with the data's class probabilities.

    Its minimizer has ``sigmoid(logit(x, t)) = E_{p_{0t}(x_0 | x)}[p(c | x_0)]``.

    Args:
      logit_fn: ``(x: [B, d], t: [B]) -> [B]``.
      path: probability path.
      key: random key.
      x0: data, ``[B, d]``.
      class_prob: ``p(c | x0)``, ``[B]`` in [0, 1]; a drawn label, 0 or 1, has the same minimizer.  For an
        energy, ``exp(-E(x0))``.

    Returns:
      ``(loss, aux)``: the mean over the batch in nats, and ``accuracy``, the share of samples whose likelier
      class is predicted.

    Raises:
      ValueError: if shapes disagree.

    Reference: Dhariwal & Nichol 2021, Sec. 4.

    Example:
      >>> from efm_jax import paths
      >>> x0 = jax.random.normal(jax.random.key(1), (8, 2))
      >>> prob = jnp.exp(-0.5 * x0[:, 0] ** 2)
      >>> loss, _ = classifier_loss(lambda x, t: x[:, 0], paths.vp_linear(), jax.random.key(0), x0, prob)
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


def classifier_guided(score_field: Field, logit_fn: LogitFn, beta: Array) -> Field:
    """``grad log p_t(x) + beta grad log p(c | x, t)``.

    Args:
      score_field: unguided score, ``(x: [B, d], t: [B]) -> [B, d]``.
      logit_fn: trained with :func:`classifier_loss`.
      beta: guidance scale.

    Returns:
      A score field; with exact inputs that of ``q ∝ p exp(-beta E)``, ``E = -log p(c | x)``, only where beta
      is 0 or 1.

    Reference: Zhang et al. 2025, eq. 4.6.

    Example:
      >>> guided = classifier_guided(lambda x, t: -x, lambda x, t: x.sum(-1), beta=2.0)
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[1.0, 1.0]]
    """
    return add_gradient(score_field, lambda x, t: jax.nn.log_sigmoid(logit_fn(x, t)), beta)
