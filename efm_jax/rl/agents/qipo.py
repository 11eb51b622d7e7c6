"""QIPO: Q-weighted iterative policy optimization (Zhang et al. 2025, Sec. 5, Algorithm 2).

    for l = 0, 1, ...                                           every ``renew_every`` steps:
      a_i1 .. a_iM ~ pi_l(. | s_i), a_i0 from the data          :meth:`QIPO.support_set`
      g_ij = softmax_j(beta Q(s_i, a_ij))                       :meth:`QIPO.weigh`
      step on sum_ij g_ij ||v(a_ij,t, t; s_i) - u_{t0}||^2      :meth:`QIPO.policy_loss`

pi_0 is the behavior model mu.  After l renewals the target is ``mu exp((l + 1) beta Q)`` (eq. 5.4),
held back by the data action, which counts as ``data_copies`` actions of each support set.
"""

import math
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
from jax import Array, lax

from efm_jax.losses import Aux, Draws, draw, sample_keys
from efm_jax.rl.agents.agent import Agent, AgentParams
from efm_jax.rl.batch import Batch, draw_noise, gather
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.model import GenerativeModel
from efm_jax.types import Params
from efm_jax.weights import AxisName, beta_for_mean_ess, boltzmann_logits


class Support(NamedTuple):
    """Support actions of every state; index 0 is the data action."""

    actions: Array  # [N, M + 1, A], in [-1, 1]
    q_values: Array  # [N, M + 1]


class WeightedSupport(NamedTuple):
    """Support actions with importance weights of mean one in every state."""

    actions: Array  # [N, M + 1, A]
    weights: Array  # [N, M + 1], (M + 1) g


@final
class QIPO(Agent):
    """The energy-weighted loss, ``E = -Q``, on support sets that are redrawn from the policy."""

    renews = True

    @property
    def actions_per_state(self) -> int:
        return self.config.support_size + 1 if self.config.estimator == "full" else 1

    def support_set(self, params: AgentParams, key: Array, batch: Batch, index: Array) -> Support:
        return draw_support(self, params.policy, params.critic, key, batch, index)

    def weigh(
        self, support: Support, axis_name: AxisName
    ) -> tuple[WeightedSupport, dict[str, Array]]:
        return weigh_support(self.config, support, axis_name)

    def gather(
        self, key: Array, table: WeightedSupport, index: Array, axis_name: AxisName
    ) -> WeightedSupport:
        if self.config.estimator == "full":
            return gather(table, index)
        # One action a state, drawn by its weight: the same expected gradient, M + 1 times cheaper.
        # One uniform number against the cumulative weights, because categorical draws M + 1.
        keys = sample_keys(key, index.shape[0], axis_name)
        reached = jnp.cumsum(table.weights[index], axis=-1)
        drawn = jax.vmap(jax.random.uniform)(keys).astype(reached.dtype) * reached[:, -1]
        choice = jnp.sum(reached <= drawn[:, None], axis=-1)
        return WeightedSupport(table.actions[index, choice], jnp.ones_like(drawn))

    def policy_draws(self, key: Array, batch: Batch, axis_name: AxisName) -> Draws:
        actions = batch.support.actions
        return draw(key, actions, batch_ndim=actions.ndim - 1, axis_name=axis_name)

    def policy_loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        observations, (actions, weights) = batch.observations, batch.support
        if self.config.estimator == "resample":
            return self.model.loss(params, key, observations, actions, axis_name=axis_name)
        return self.model.loss(
            params, key, observations[:, None], actions, weights=weights, axis_name=axis_name
        )

    def sample(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        return model.sample(params.policy, observations, noise)


def draw_support(
    agent: Agent, policy: Params, critic: Params, key: Array, batch: Batch, index: Array
) -> Support:
    """The data action of every state and M of a policy, with their Q-values."""
    states = batch.observations[:, None]
    noise = draw_noise(key, index, (agent.config.support_size, agent.action_size))
    drawn = agent.model.sample(policy, states, noise)
    actions = jnp.concatenate([batch.actions[:, None], drawn], axis=1)
    return Support(actions, agent.critic.q_values(critic, states, actions))


def weigh_support(
    config: QIPOConfig, support: Support, axis_name: AxisName
) -> tuple[WeightedSupport, dict[str, Array]]:
    """Importance weights of every support set, at ``beta`` or at the beta of ``target_ess``.

    The summary has means over all states of the weights' concentration and of Q.
    """
    q, copies, beta = support.q_values, config.data_copies, config.beta

    def mean(values: Array) -> Array:
        return values.mean() if axis_name is None else lax.pmean(values.mean(), axis_name)

    def mean_ess(beta: Array) -> Array:
        return mean(effective_actions(support_weights(q, beta, copies), copies))

    if config.target_ess:
        count = config.support_size + copies
        beta = beta_for_mean_ess(mean_ess, config.target_ess * count, mean(q.std(-1)))
    weights = support_weights(q, beta, copies)
    ess = effective_actions(weights, copies)
    every = ess if axis_name is None else lax.all_gather(ess, axis_name, tiled=True)
    return WeightedSupport(support.actions, weights), {
        "beta": jnp.asarray(beta, ess.dtype),
        "ess": mean(ess),
        "ess_low": jnp.quantile(every, 0.1),
        "top_weight": mean(weights.max(-1)) / q.shape[-1],
        "q_data": mean(q[:, 0]),
        "q_support": mean(q[:, 1:]),
        "q_weighted": mean(weights * q),
        "q_spread": mean(q[:, 1:].std(axis=-1)),
    }


def support_weights(q_values: Array, beta: Array | float, data_copies: float = 1.0) -> Array:
    """``(M + 1) g_ij`` with ``g_ij ∝ c_j exp(beta Q_ij)``, ``[..., M + 1]``; of mean one over j.

    Args:
      q_values: ``[..., M + 1]``, the data action's first.
      beta: guidance scale >= 0; at 0 an infinite Q-value does not count.
      data_copies: ``c_0``, as many support actions as the data action stands for; other c are 1.
    """
    log_copies = math.log(data_copies) if data_copies else -math.inf
    logits = boltzmann_logits(-q_values, beta).at[..., 0].add(log_copies)
    return q_values.shape[-1] * jax.nn.softmax(logits, axis=-1)


def effective_actions(weights: Array, data_copies: float = 1.0) -> Array:
    """Effective sample size of support sets, ``[..., M + 1] -> [...]``.

    With ``data_copies`` c it is Kish's of M + c actions, among which the data action is c times.
    """
    squares = weights**2
    # c weights of w / c: their squares sum to c (w / c)^2 = w^2 / c.
    surplus = (1 - 1 / data_copies) * squares[..., 0] if data_copies else 0.0
    return weights.sum(-1) ** 2 / (squares.sum(-1) - surplus)
