"""Classifier-free guidance: one network with and without its label, extrapolated.

Trained by any loss of :mod:`efm_jax.losses` on a field that closes over the labels, some of them dropped.

Reference: Ho & Salimans 2022 (arXiv 2207.12598); Zhang et al. 2025, eq. 4.6.
"""

import jax
import jax.numpy as jnp

from efm_jax import checks
from efm_jax.types import Array, Field


def drop_labels(key: Array, labels: Array, rate: float, null_label: int) -> Array:
    """Replace each label by ``null_label`` with probability ``rate``, so that one network learns both fields.

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


def classifier_free_guided(field: Field, conditional_field: Field, beta: Array) -> Field:
    """``(1 - beta) u(x, t) + beta u(x, t | c)``.

    Args:
      field: score, velocity or noise prediction without the label, ``(x: [B, d], t: [B]) -> [B, d]``.
      conditional_field: the same prediction with the label.
      beta: guidance scale.

    Returns:
      A field of the same kind; with exact inputs that of ``q ∝ p exp(-beta E)``, ``E = -log p(c | x)``, only
      where beta is 0 or 1.

    Reference: Zhang et al. 2025, eq. 4.6.

    Example:
      >>> guided = classifier_free_guided(lambda x, t: -x, lambda x, t: 1 - x, beta=3.0)
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[3.0, 3.0]]
    """

    def guided(x: Array, t: Array) -> Array:
        return (1 - beta) * field(x, t) + beta * conditional_field(x, t)

    return guided
