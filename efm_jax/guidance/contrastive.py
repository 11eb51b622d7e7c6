"""Contrastive energy prediction: a learned intermediate energy, whose gradient is added to the score.

Trained with :func:`efm_jax.losses.cep`.

Reference: Lu et al. 2023 (arXiv 2304.12824).
"""

from collections.abc import Callable

from efm_jax.guidance.gradient import add_gradient
from efm_jax.types import Array, Field


def contrastive_guided(score_field: Field, log_ratio_fn: Callable[[Array, Array], Array]) -> Field:
    """``grad log p_t(x) + grad f(x, t)`` with ``f = -E_t``, up to a function of t.

    Args:
      score_field: unguided score, ``(x: [B, d], t: [B]) -> [B, d]``.
      log_ratio_fn: ``(x: [B, d], t: [B]) -> [B]``, trained with :func:`efm_jax.losses.cep`, beta included.

    Returns:
      A score field; with exact inputs that of ``q ∝ p exp(-beta E)``.

    Reference: Lu et al. 2023, eq. 8; Zhang et al. 2025, eq. 4.7.

    Example:
      >>> import jax.numpy as jnp
      >>> guided = contrastive_guided(lambda x, t: -x, lambda x, t: 2 * x.sum(-1))
      >>> guided(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
      [[2.0, 2.0]]
    """
    return add_gradient(score_field, log_ratio_fn, 1.0)
