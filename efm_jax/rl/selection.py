"""Which of several sampled actions is played."""

from collections.abc import Callable

import jax.numpy as jnp

from efm_jax.types import Array

ACTION_SELECTIONS = ("sample", "best", "mean")


def best(actions: Array, q_values: Array) -> Array:
    """The action of the largest value: ``[E, n, A]``, ``[E, n] -> [E, A]``.

    Reference: Hansen-Estruch et al. 2023 (IDQL, arXiv 2304.10573), Algorithm 2.
    """
    return jnp.take_along_axis(actions, q_values.argmax(-1)[:, None, None], axis=1)[:, 0]


def select(
    rule: str,
    sample: Callable[[Array, Array], Array],
    mean: Callable[[Array, Array], Array],
    q_values: Callable[[Array, Array], Array],
    observations: Array,
    noise: Array,
) -> Array:
    """Actions ``[E, A]`` for states ``[E, S]`` by one of the rules of ``ACTION_SELECTIONS``.

    Args:
      rule: "sample" plays the first sampled action, "best" that of the largest value, "mean" the
        mean.
      sample: ``(observations [E, 1, S], noise [E, n, A]) -> actions [E, n, A]``.
      mean: the same arguments, to the mean action ``[E, A]``.
      q_values: ``(observations [E, 1, S], actions [E, n, A]) -> [E, n]``.
      observations: normalized.
      noise: standard normal, ``[E, n, A]``.
    """
    states = observations[:, None]
    if rule == "mean":
        return mean(states, noise)
    if rule == "best":
        actions = sample(states, noise)
        return best(actions, q_values(states, actions))
    return sample(states, noise[:, :1])[:, 0]
