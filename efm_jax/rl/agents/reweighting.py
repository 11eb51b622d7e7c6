"""One-step reweighting: the data's own actions, weighted by their advantage."""

import math
from typing import final

import jax.numpy as jnp
from jax import Array, lax

from efm_jax.losses import Aux, Draws, draw
from efm_jax.rl.agents.agent import Agent, AgentParams
from efm_jax.rl.batch import Batch, draw_noise
from efm_jax.rl.model import GenerativeModel
from efm_jax.types import Params
from efm_jax.weights import AxisName, effective_sample_size

# Of an advantage, as in the authors' code of IQL (ikostrikov/implicit_q_learning).
MAX_WEIGHT = 100.0


@final
class Reweighting(Agent):
    """The energy-weighted loss on data actions with ``E = -A(s, a)``: no support sets, no renewals.

    The weights are ``exp(beta A)``, clipped, over their mean in the dataset (Zhang et al. 2025,
    Thm 4.3); an advantage instead of Q divides by the state's own normalizer (Peng et al. 2019,
    arXiv 1910.00177, eq. 11, for Gaussians).  The control for what QIPO's support sets and renewals
    add.
    """

    def support_set(self, params: AgentParams, key: Array, batch: Batch, index: Array) -> Array:
        return advantages(self, params, key, batch, index)

    def weigh(self, support: Array, axis_name: AxisName) -> tuple[Array, dict[str, Array]]:
        return weigh_advantages(support, self.config.beta, axis_name)

    def policy_draws(self, key: Array, batch: Batch, axis_name: AxisName) -> Draws:
        return draw(key, batch.actions, axis_name=axis_name)

    def policy_loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        loss, _ = self.model.loss(
            params,
            key,
            batch.observations,
            batch.actions,
            weights=batch.support,
            axis_name=axis_name,
        )
        return loss, {}  # a batch's effective sample size is no mean over its parts

    def sample(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        return model.sample(params.policy, observations, noise)


def advantages(agent: Agent, params: AgentParams, key: Array, batch: Batch, index: Array) -> Array:
    """``Q(s, a) - V(s)`` of data actions, ``[b]``.

    Where the critic has no value network, V is the mean of Q over ``support_size`` actions of the
    behavior model.
    """
    states = batch.observations
    q = agent.critic.q_values(params.critic, states, batch.actions)
    values = agent.critic.values(params.critic, states)
    if values is None:
        noise = draw_noise(key, index, (agent.config.support_size, agent.action_size))
        actions = agent.model.sample(params.behavior, states[:, None], noise)
        values = agent.critic.q_values(params.critic, states[:, None], actions).mean(-1)
    return q - values


def weigh_advantages(
    advantages: Array, beta: float, axis_name: AxisName = None
) -> tuple[Array, dict[str, Array]]:
    """``min(exp(beta A), 100)`` over its mean in the dataset, ``[n] -> [n]``, and a summary.

    Args:
      advantages: of this device's data actions.
      beta: guidance scale.
      axis_name: mapped axis over which the dataset is split.
    """
    logits = jnp.minimum(beta * advantages, math.log(MAX_WEIGHT))
    top = logits.max() if axis_name is None else lax.pmax(logits.max(), axis_name)
    weights = jnp.exp(logits - top)  # the largest is 1, because all could underflow
    means = weights.mean(), advantages.mean(), (advantages**2).mean()
    size = weights.size
    if axis_name is not None:
        means, size = lax.pmean(means, axis_name), size * lax.axis_size(axis_name)
    scale, mean, square = means
    weights = weights / scale
    return weights, {
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt(jnp.maximum(square - mean**2, 0)),
        "ess_share": effective_sample_size(weights, axis_name=axis_name) / size,
    }
