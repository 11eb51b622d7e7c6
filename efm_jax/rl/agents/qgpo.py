"""QGPO: the behavior model guided by a learned intermediate energy."""

from typing import final

import jax
import jax.numpy as jnp
from jax import Array

from efm_jax import losses
from efm_jax.guidance import contrastive_guided
from efm_jax.losses import Aux
from efm_jax.networks import LogRatio, apply
from efm_jax.rl.agents.agent import Agent, AgentParams
from efm_jax.rl.agents.qipo import Support, WeightedSupport, draw_support, weigh_support
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.model import GenerativeModel
from efm_jax.types import Params
from efm_jax.weights import AxisName


@final
class QGPO(Agent):
    """Contrastive energy prediction on support sets of the behavior model; its gradient guides.

    The log-ratio network learns ``-E_t(a_t; s)`` of ``mu(a|s) exp(beta Q)`` on the support sets
    that QIPO begins with; the policy's score is the behavior model's plus the network's gradient.
    The behavior model is not trained again.

    Reference: Lu et al. 2023 (arXiv 2304.12824), Algorithm 1.
    """

    def __init__(self, config: QIPOConfig, observation_size: int, action_size: int):
        super().__init__(config, observation_size, action_size)
        # As wide as the behavior model's network.
        self.log_ratio = LogRatio(
            config.hidden_dims, config.activation, config.layer_norm, config.time_features
        )

    @property
    def name(self) -> str:
        return self.config.policy

    @property
    def actions_per_state(self) -> int:
        return self.config.support_size + 1

    def init_policy(self, key: Array) -> Params:
        action, observation = (
            jnp.zeros((1, self.action_size)),
            jnp.zeros((1, self.observation_size)),
        )
        return self.log_ratio.init(key, action, jnp.zeros(1), observation)

    def start_policy(self, behavior: Params, params: Params) -> Params:
        return params

    def support_set(self, params: AgentParams, key: Array, batch: Batch, index: Array) -> Support:
        key = jax.random.fold_in(key, 0)  # the noise of QIPO's first support sets
        return draw_support(self, params.behavior, params.critic, key, batch, index)

    def weigh(
        self, support: Support, axis_name: AxisName
    ) -> tuple[WeightedSupport, dict[str, Array]]:
        return weigh_support(self.config, support, axis_name)

    def policy_loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        actions, weights = batch.support

        def log_ratio(x: Array, t: Array) -> Array:
            return apply(self.log_ratio, params, x, t, batch.observations[:, None])

        return losses.contrastive(
            log_ratio, self.model.path, key, actions, weights, axis_name=axis_name
        )

    def sample(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        def log_ratio(x: Array, t: Array) -> Array:
            return apply(self.log_ratio, params.policy, x, t, observations)

        score = model.field(params.behavior, observations, "score")
        return model.integrate(contrastive_guided(score, log_ratio), noise, "score")
