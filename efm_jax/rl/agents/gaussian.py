"""IQL's policy: a Gaussian regressed on advantage-weighted data actions."""

from typing import final

import jax.numpy as jnp
from jax import Array

from efm_jax.losses import Aux
from efm_jax.networks import GaussianActor, apply
from efm_jax.rl.agents.agent import Agent, AgentParams
from efm_jax.rl.agents.reweighting import advantages, weigh_advantages
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import global_mean, share_of_mean
from efm_jax.rl.model import GenerativeModel
from efm_jax.types import Params
from efm_jax.weights import AxisName


@final
class Gaussian(Agent):
    """Advantage-weighted regression ``-exp(beta A(s, a)) log pi(a|s)``, weights as in reweighting.

    Reference: Kostrikov et al. 2021 (arXiv 2110.06169), eq. 7.
    """

    def __init__(self, config: QIPOConfig, observation_size: int, action_size: int):
        super().__init__(config, observation_size, action_size)
        # As wide as the behavior model's network.
        self.actor = GaussianActor(
            config.hidden_dims, action_size, config.activation, config.layer_norm
        )

    @property
    def name(self) -> str:
        return self.config.policy

    def init_policy(self, key: Array) -> Params:
        return self.actor.init(key, jnp.zeros((1, self.observation_size)))

    def start_policy(self, behavior: Params, params: Params) -> Params:
        return params

    def support_set(self, params: AgentParams, key: Array, batch: Batch, index: Array) -> Array:
        return advantages(self, params, key, batch, index)

    def weigh(self, support: Array, axis_name: AxisName) -> tuple[Array, dict[str, Array]]:
        return weigh_advantages(support, self.config.beta, axis_name)

    def policy_loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        mean, std = apply(self.actor, params, batch.observations)
        z = (batch.actions - mean) / std
        log_prob = -0.5 * jnp.sum(z**2 + 2 * jnp.log(std) + jnp.log(2 * jnp.pi), axis=-1)
        aux = {"std": global_mean(std, axis_name)}
        return share_of_mean(-batch.support * log_prob, axis_name), aux

    def sample(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        mean, std = apply(self.actor, params.policy, observations)
        return jnp.clip(mean + std * noise, -1, 1)

    def mean(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        return apply(self.actor, params.policy, observations[:, 0])[0]
