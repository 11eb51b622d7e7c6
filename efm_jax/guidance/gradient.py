"""Guidance by the gradient of a scalar function of the noised point."""

from collections.abc import Callable

import jax

from efm_jax import checks
from efm_jax.types import Array, Field


def add_gradient(score_field: Field, log_factor: Callable[[Array, Array], Array], scale: Array) -> Field:
    """``score + scale * grad_x log_factor``: the score of ``p_t(x) exp(scale * log_factor(x, t))``.

    Args:
      score_field: ``(x: [..., d], t: [...]) -> [..., d]``.
      log_factor: ``(x: [..., d], t: [...]) -> [...]``, each point on its own.
      scale: multiplies the gradient.

    Returns:
      A score field.
    """

    def guided(x: Array, t: Array) -> Array:
        def total(x: Array) -> Array:
            value = log_factor(x, t)
            checks.check_shape("log_factor(x, t)", value, x.shape[:-1])
            return value.sum()

        return score_field(x, t) + scale * jax.grad(total)(x)

    return guided
