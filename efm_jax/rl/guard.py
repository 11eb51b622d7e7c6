"""The guard: a policy stands only if critics that did not choose its weights prefer it.

Weights select what the critic overestimates, so the critic that made them thinks well of every
policy.  Here the members of an ensemble are split into folds of episodes
(``critic_folds``): in a state, weights are made by the members that never saw its episode, and
what came of them is judged by those that did.  The mean advantage of a policy over another in the
data's states is the first-order term of its gain in return (Kakade and Langford 2002).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from efm_jax.rl.agents.agent import Agent, Purpose, State
from efm_jax.rl.batch import Batch, TiledData, draw_noise, gather, with_tables
from efm_jax.rl.critics import FoldedCritic
from efm_jax.training.step import sample_rows
from efm_jax.types import Params
from efm_jax.weights import AxisName, psum_if

_STATES = 4096  # or all there are


def guard(
    agent: Agent,
    state: State,
    key: Array,
    data: Batch | TiledData,
    *,
    num_devices: int = 1,
    axis_name: AxisName = None,
) -> tuple[State, dict[str, Array]]:
    """Keep the policy that acts, or go back to that of the last table.

    Member k's gain is the mean of ``Q_k(s, pi(s)) - Q_k(s, pi'(s))`` over states of its own fold;
    the policy stays if the mean gain is above ``config.guard`` standard errors over members.

    Args:
      agent: whose critic has folds.
      state: of one seed, ``renewed_params`` the policy to go back to.
      key: root key of the seed.
      data: this device's rows.
      num_devices: devices that share the rows.
      axis_name: their mapped axis.

    Returns:
      The state, and ``guard_gain``, ``guard_error`` (one standard error) and ``accepted``, ``[]``.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, Purpose.GUARD), state.policy.step)
    size, rows = agent.config.of_phase("batch_size", "policy"), data.size * num_devices
    size *= max(min(_STATES, rows) // size, 1)
    index = sample_rows(key, size, rows, num_devices=num_devices, axis_name=axis_name)
    batch = gather(with_tables(data, None, None), index)
    critic, params, acting = agent.critic, state.critic.average, state.params()
    if not isinstance(critic, FoldedCritic):
        raise TypeError(f"agent: expected one whose critic has folds; got {type(critic).__name__}")
    learns = critic.learns(batch.folds)
    keys_at = index if axis_name is None else index + lax.axis_index(axis_name) * data.size

    def values(policy: Params) -> Array:
        """``[num, b]``, of the action that plays or the mean of those drawn."""
        config, states = agent.config, batch.observations[:, None]
        noise = draw_noise(key, keys_at, (config.num_candidates, agent.action_size))
        of = agent.acting_model, acting._replace(policy=policy), states, noise
        if config.action_selection == "mean":
            return critic.members(params, batch.observations, agent.mean(*of))
        actions = agent.sample(*of)
        return critic.members(params, states, actions).mean(-1)

    gains = jnp.where(learns, values(acting.policy) - values(state.renewed_params), 0.0)
    total, count = psum_if((gains.sum(1), learns.sum(1)), axis_name)
    gains = total / jnp.maximum(count, 1)
    gain, error = gains.mean(), gains.std(ddof=1) / math.sqrt(gains.size)
    accepted = gain > agent.config.guard * error

    def chosen(new: Params, old: Params) -> Params:
        return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old)

    policy = state.policy.replace(
        params=chosen(state.policy.params, state.renewed_params),
        average=chosen(state.policy.average, state.renewed_params),
    )
    summary = {"guard_gain": gain, "guard_error": error, "accepted": accepted.astype(gain.dtype)}
    return state.replace(policy=policy), summary
