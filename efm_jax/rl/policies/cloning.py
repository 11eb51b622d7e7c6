"""Behavior cloning: the behavior model itself."""

from __future__ import annotations

from efm_jax.losses import Aux
from efm_jax.rl.policies.base import Acting, Batch, Policy
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName


class BehaviorCloning(Policy):
    """Acts as the behavior model; with ``action_selection="best"`` this is IDQL's policy.

    Reference: Hansen-Estruch et al. 2023 (arXiv 2304.10573), Algorithm 2.
    """

    trains = False

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        raise NotImplementedError("behavior cloning has nothing to train after its behavior phase")

    def sample(self, acting: Acting, observations: Array, noise: Array) -> Array:
        return self.model.sample(acting.behavior, observations, noise)
