"""Behavior cloning: the behavior model itself."""

from typing import final

from jax import Array

from efm_jax.rl.agents.agent import Agent, AgentParams
from efm_jax.rl.model import GenerativeModel


@final
class BehaviorCloning(Agent):
    """Acts as the behavior model; with ``action_selection="best"`` IDQL's policy.

    Reference: Hansen-Estruch et al. 2023 (arXiv 2304.10573), Algorithm 2.
    """

    trains = False

    def sample(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        return model.sample(params.behavior, observations, noise)
