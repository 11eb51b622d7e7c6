"""Q-learning over the support: the target is the best of the behavior model's next actions."""

import dataclasses

import jax.numpy as jnp

from efm_jax import checks
from efm_jax.networks import QEnsemble
from efm_jax.rl.config import register_options
from efm_jax.rl.critics import CRITICS, Critic, global_mean, share_of_mean


@dataclasses.dataclass
class Options:
    pessimism: float = 0.5  # weight of the ensemble's spread

    def validate(self):
        checks.check_number("best_q.pessimism", self.pessimism, minimum=0.0)


@dataclasses.dataclass(frozen=True)
class BestQ(Critic):
    network: QEnsemble
    pessimism: float

    uses_next_actions = True

    @classmethod
    def from_config(cls, config):
        return cls(QEnsemble(config.critic_hidden_dims), config.best_q.pessimism)

    def init(self, key, observation_size, action_size):
        return self.network.init(key, jnp.zeros((1, observation_size)), jnp.zeros((1, action_size)))

    def q_values(self, params, observations, actions):
        q = self.network.apply(params, observations, actions)
        return q.mean(0) - self.pessimism * q.std(0)

    def loss(self, params, target, key, batch, axis_name=None):
        following = self.q_values(target, batch.next_observations[:, None], batch.next_actions)
        y = batch.rewards + batch.discounts * following.max(-1)
        q = self.network.apply(params, batch.observations, batch.actions)
        loss = share_of_mean(((q - y) ** 2).sum(0), axis_name)
        return loss, {"q_mean": global_mean(q, axis_name)}


CRITICS["best_q"] = BestQ
register_options("best_q", Options)
