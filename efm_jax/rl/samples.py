"""What critics and policies are trained on: transitions, with returns over n steps."""

from typing import NamedTuple

import numpy as np

from efm_jax import checks
from efm_jax.types import Array, Transitions


class Samples(NamedTuple):
    """Training samples; a pytree of arrays that share the leading axis.

    A critic's target is ``rewards + discounts * value(next_observations)``.
    """

    observations: Array  # [N, S]
    actions: Array  # [N, A]
    rewards: Array  # [N], discounted sum of the next n rewards
    next_observations: Array  # [N, S], n steps later
    discounts: Array  # [N], discount ** n, or 0 where the episode terminated within the n steps

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.rewards.shape[0]


def n_step(data: Transitions, n: int, discount: float) -> Samples:
    """Samples whose targets look ``n`` steps ahead along the data's own trajectories.

    For n > 1 the target follows the behavior policy for n steps, so values travel n times faster
    and are those of a policy that is greedy only every n steps (Sutton and Barto 2018, Sec. 7.1).
    Rows i and i + 1 are one trajectory where the next observation of i is the observation of i + 1;
    where a trajectory is truncated, or a step is missing, the target looks ahead as far as it goes.

    Args:
      data: ``N`` transitions on the host, those of an episode in order.
      n: steps, at least 1.
      discount: of one step, in [0, 1].

    Returns:
      ``N`` samples, of the data's types.
    """
    checks.check_integer("n_step", n, 1)
    rewards = np.asarray(data.rewards, np.float64)
    ended = np.asarray(data.terminated) == 1
    goes_on = np.zeros(len(rewards), bool)
    goes_on[:-1] = (data.next_observations[:-1] == data.observations[1:]).all(axis=1) & ~ended[:-1]
    last = np.arange(len(rewards))  # the last step that a row's target covers
    total, factor = rewards.copy(), np.full(len(rewards), float(discount))
    for _ in range(n - 1):
        more = goes_on[last]
        last = last + more
        total += np.where(more, factor * rewards[last], 0.0)
        factor = np.where(more, factor * discount, factor)
        if not more.any():
            break
    dtype = np.asarray(data.rewards).dtype
    return Samples(
        observations=data.observations,
        actions=data.actions,
        rewards=total.astype(dtype),
        next_observations=np.asarray(data.next_observations)[last],
        discounts=np.where(ended[last], 0.0, factor).astype(dtype),
    )
