"""Q-weighted iterative policy optimisation: the pure functions of its three stages, for one seed.

Behaviour model by plain flow (or score) matching; an offline critic; then policy improvement on support
sets renewed every ``renew_every`` steps, after l of which the target is ``mu(a|s) exp((l + 1) beta Q)``
(Zhang et al. 2025, Sec. 5, Algorithm 2, eq. 5.4).  Nothing here knows of seeds, files or the clock; a
device axis enters only as ``axis_name``.
"""

import dataclasses
import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import Critic, CriticBatch, make_critic
from efm_jax.rl.policy import PolicyModel
from efm_jax.rl.support import SupportSet, draw_noise
from efm_jax.training.state import TrainState
from efm_jax.training.step import StepFn, make_step, sample_rows
from efm_jax.types import Array, Normalizer, Params, Transitions
from efm_jax.weights import AxisName, energy_weights

PHASES = ("behavior", "critic", "policy")


class Purpose(enum.IntEnum):
    """What a key is folded for; no key serves two purposes."""

    INIT = 0
    BEHAVIOR = 1
    CRITIC = 2
    POLICY = 3
    NEXT_ACTIONS = 4
    SUPPORT = 5
    EVALUATION = 6


class QIPOState(struct.PyTreeNode):
    """All that a run carries from step to step; with the seed it determines the rest of the run."""

    behavior: TrainState
    critic: TrainState
    policy: TrainState
    support_params: Params  # the policy that drew the current support sets


class Tables(struct.PyTreeNode):
    """Data on the device that one phase gathers from; rows belong to transitions."""

    transitions: Transitions
    next_actions: Array | None = None  # [N, M, A], for critics that ask for them
    support: SupportSet | None = None


@dataclasses.dataclass(frozen=True)
class QIPO:
    """The algorithm of one configuration on one kind of data."""

    config: QIPOConfig
    observation_size: int
    action_size: int

    @property
    def model(self) -> PolicyModel:
        """The generative policy."""
        return PolicyModel.from_config(self.config)

    @property
    def critic(self) -> Critic:
        """The critic."""
        return make_critic(self.config)

    def init(self, key: Array) -> QIPOState:
        """Fresh states of all three stages."""
        model_key, critic_key = jax.random.split(jax.random.fold_in(key, Purpose.INIT))
        params = self.model.init(model_key, self.observation_size, self.action_size)
        critic_params = self.critic.init(critic_key, self.observation_size, self.action_size)
        copy = jax.tree.map(jnp.copy, params)
        return QIPOState(
            behavior=TrainState.create(params, self._policy_optimizer()),
            critic=TrainState.create(critic_params, optax.adam(self.config.critic_learning_rate)),
            policy=TrainState.create(copy, self._policy_optimizer()),
            support_params=jax.tree.map(jnp.copy, params),
        )

    def start_policy(self, state: QIPOState) -> QIPOState:
        """The policy begins as the behaviour model that acts, with a fresh optimiser."""
        params = jax.tree.map(jnp.copy, state.behavior.average)
        return state.replace(policy=TrainState.create(params, self._policy_optimizer()))

    def _policy_optimizer(self) -> optax.GradientTransformation:
        clip = self.config.max_grad_norm
        adam = optax.adam(self.config.learning_rate)
        return optax.chain(optax.clip_by_global_norm(clip), adam) if clip > 0 else adam

    def step(self, phase: str, axis_name: AxisName = None) -> StepFn:
        """The training step of a phase: ``(TrainState, key, batch) -> (TrainState, metrics)``."""
        if phase == "critic":
            optimizer = optax.adam(self.config.critic_learning_rate)
            rate = self.config.polyak
            loss = self._critic_loss(axis_name)
        else:
            optimizer, rate = self._policy_optimizer(), 1.0 - self.config.ema_decay
            loss = self._behavior_loss(axis_name) if phase == "behavior" else self._policy_loss(axis_name)
        return make_step(loss, optimizer, average_rate=rate, axis_name=axis_name)

    def _behavior_loss(self, axis_name: AxisName) -> Callable:
        def loss(params: Params, _: Params, key: Array, batch: Tables) -> tuple[Array, dict]:
            data = batch.transitions
            return self.model.behavior_loss(params, key, data.observations, data.actions, axis_name)

        return loss

    def _critic_loss(self, axis_name: AxisName) -> Callable:
        def loss(params: Params, target: Params, key: Array, batch: Tables) -> tuple[Array, dict]:
            critic_batch = CriticBatch(batch.transitions, batch.next_actions)
            return self.critic.loss(params, target, key, critic_batch, axis_name)

        return loss

    def _policy_loss(self, axis_name: AxisName) -> Callable:
        """Both estimators have the same expected gradient; ``resample`` is M + 1 times cheaper."""
        beta = self.config.beta

        def full(params: Params, _: Params, key: Array, batch: Tables) -> tuple[Array, dict]:
            observations, support = batch.transitions.observations, batch.support
            return self.model.support_loss(
                params, key, observations, support.actions, support.q_values, beta, axis_name
            )

        def resample(params: Params, _: Params, key: Array, batch: Tables) -> tuple[Array, dict]:
            # draw_batch has left each state the one action that was drawn by its weight.
            observations, actions = batch.transitions.observations, batch.support.actions
            return self.model.behavior_loss(params, key, observations, actions, axis_name)

        return full if self.config.estimator == "full" else resample

    def draw_batch(
        self, key: Array, tables: Tables, *, num_devices: int = 1, axis_name: AxisName = None
    ) -> Tables:
        """Gather this device's part of a batch; with ``resample``, one support action a state."""
        index_key, choice_key = jax.random.split(key)
        size = self.config.batch_size
        num_rows = tables.transitions.size * num_devices
        indices = sample_rows(index_key, size, num_rows, num_devices=num_devices, axis_name=axis_name)
        if tables.support is None or self.config.estimator == "full":
            return jax.tree.map(lambda leaf: leaf[indices], tables)
        weights = energy_weights(-tables.support.q_values[indices], self.config.beta)
        offset = 0 if axis_name is None else jax.lax.axis_index(axis_name) * indices.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(choice_key, offset + jnp.arange(indices.shape[0]))
        choice = jax.vmap(jax.random.categorical)(keys, jnp.log(weights))
        chosen = SupportSet(*(leaf[indices, choice] for leaf in tables.support))
        transitions = jax.tree.map(lambda leaf: leaf[indices], tables.transitions)
        return Tables(transitions, support=chosen)

    def next_actions(self, params: Params, key: Array, next_observations: Array, indices: Array) -> Array:
        """Behaviour actions ``[b, M, A]`` at ``next_observations [b, S]``, rows ``indices`` of the data."""
        key = jax.random.fold_in(key, Purpose.NEXT_ACTIONS)
        noise = draw_noise(key, indices, (self.config.support_size, self.action_size))
        return self.model.sample(params, next_observations[:, None], noise)

    def support(
        self, state: QIPOState, key: Array, renewal: Array, data: Transitions, indices: Array
    ) -> SupportSet:
        """Support sets of the transitions ``data [b, ...]``, rows ``indices`` of the dataset.

        The data action, then M actions of ``state.support_params``.
        """
        key = jax.random.fold_in(jax.random.fold_in(key, Purpose.SUPPORT), renewal)
        noise = draw_noise(key, indices, (self.config.support_size, self.action_size))
        observations = data.observations[:, None]
        drawn = self.model.sample(state.support_params, observations, noise)
        actions = jnp.concatenate([data.actions[:, None], drawn], axis=1)
        return SupportSet(actions, self.critic.q_values(state.critic.average, observations, actions))

    def act(
        self,
        params: Params,
        normalizer: Normalizer,
        key: Array,
        observations: Array,
        step: Array,
        seeds: Array,
    ) -> Array:
        """Actions ``[E, A]`` in the environment's units for raw observations ``[E, S]``.

        The noise of an episode depends on its seed and step alone, not on the episodes beside it.
        """
        key = jax.random.fold_in(jax.random.fold_in(key, Purpose.EVALUATION), step)
        noise = draw_noise(key, seeds, (self.action_size,))
        scaled = self.model.sample(params, normalizer.normalize_observations(observations), noise)
        return normalizer.unscale_actions(scaled)
