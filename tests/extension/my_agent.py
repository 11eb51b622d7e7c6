"""Clones the best action of every support set of the behavior model."""

from typing import final

import jax.numpy as jnp

from efm_jax.rl.agents import AGENTS, Agent
from efm_jax.rl.batch import draw_noise


@final
class Greedy(Agent):
    def support_set(self, params, key, batch, index):
        states = batch.observations[:, None]
        noise = draw_noise(key, index, (self.config.support_size, self.action_size))
        actions = self.model.sample(params.behavior, states, noise)
        q = self.critic.q_values(params.critic, states, actions)
        return jnp.take_along_axis(actions, q.argmax(-1)[:, None, None], axis=1)[:, 0]

    def policy_loss(self, params, key, batch, axis_name):
        return self.model.loss(params, key, batch.observations, batch.support, axis_name=axis_name)

    def sample(self, model, params, observations, noise):
        return model.sample(params.policy, observations, noise)


AGENTS["greedy"] = Greedy
