"""Offline RL in three stages, for one seed: behavior model, critic, policy.

Behavior model by plain flow (or score) matching; an offline critic; then a policy, which for QIPO
is policy improvement on support sets (Zhang et al. 2025, Sec. 5, Algorithm 2).  Pure functions:
nothing here knows of other seeds, files or the clock; a device axis enters only as ``axis_name``.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import CRITICS, Critic, CriticBatch
from efm_jax.rl.model import GenerativeModel
from efm_jax.rl.policies import POLICIES, Acting, Batch, Policy
from efm_jax.rl.samples import Samples
from efm_jax.rl.selection import select
from efm_jax.rl.support import draw_noise
from efm_jax.training.state import TrainState
from efm_jax.training.step import StepFn, cached_samples, make_step, sample_rows
from efm_jax.types import Array, Normalizer, Params
from efm_jax.weights import AxisName


class Purpose(enum.IntEnum):
    """What a key is folded for; no key serves two purposes."""

    INIT = 0
    BEHAVIOR = 1
    CRITIC = 2
    POLICY = 3
    NEXT_ACTIONS = 4
    SUPPORT = 5
    EVALUATION = 6
    POLICY_INIT = 7


class State(struct.PyTreeNode):
    """All that a run carries from step to step; with the seed it determines the rest of the run."""

    behavior: TrainState
    critic: TrainState
    policy: TrainState
    renewed_params: Params  # the policy's, when its table was last computed

    def acting(self, policy: Params | None = None) -> Acting:
        """The parameters that act, or with those of another policy."""
        policy = self.policy.average if policy is None else policy
        return Acting(self.behavior.average, self.critic.average, policy)


class Tables(struct.PyTreeNode):
    """Data on the device that one phase gathers from; rows belong to samples."""

    samples: Samples
    next_actions: Array | None = None  # [N, M, A], for critics that ask for them
    policy: Any = None  # the policy's own


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The algorithm of one configuration on one kind of data."""

    config: QIPOConfig
    observation_size: int
    action_size: int

    @property
    def model(self) -> GenerativeModel:
        """The generative model, as it is trained and drawn from in training."""
        return GenerativeModel.from_config(self.config)

    @property
    def critic(self) -> Critic:
        """The critic."""
        return CRITICS[self.config.critic].from_config(self.config)

    @property
    def policy(self) -> Policy:
        """The policy in training."""
        return self._policy(self.model)

    def _policy(self, model: GenerativeModel) -> Policy:
        sizes = self.observation_size, self.action_size
        return POLICIES[self.config.policy](self.config, model, self.critic, *sizes)

    def init(self, key: Array) -> State:
        """Fresh states of all three stages."""
        model_key, critic_key = jax.random.split(jax.random.fold_in(key, Purpose.INIT))
        params = self.model.init(model_key, self.observation_size, self.action_size)
        critic_params = self.critic.init(critic_key, self.observation_size, self.action_size)
        policy_params = self.policy.init(jax.random.fold_in(key, Purpose.POLICY_INIT))
        return State(
            behavior=TrainState.create(params, self._optimizer("behavior")),
            critic=TrainState.create(critic_params, self._optimizer("critic")),
            policy=TrainState.create(policy_params, self._optimizer("policy")),
            renewed_params=jax.tree.map(jnp.copy, policy_params),
        )

    def start_policy(self, state: State) -> State:
        """Before the policy's first step: its initial parameters, which may be the behavior model's."""
        params = self.policy.start(state.behavior.average, state.policy.params)
        params = jax.tree.map(jnp.copy, params)
        return state.replace(policy=TrainState.create(params, self._optimizer("policy")))

    def _optimizer(self, phase: str) -> optax.GradientTransformation:
        config = self.config
        if phase == "critic":
            return optax.adam(config.critic_learning_rate)
        rate = config.learning_rate
        if config.learning_rate_schedule == "cosine":
            # A policy without a phase of its own has a state all the same, of an optimizer that
            # never steps.
            rate = optax.cosine_decay_schedule(rate, max(config.phase_steps[phase], 1))
        adam = optax.adam(rate)
        clip = config.max_grad_norm
        return optax.chain(optax.clip_by_global_norm(clip), adam) if clip > 0 else adam

    def step(self, phase: str, axis_name: AxisName = None, *, in_parts: bool = True) -> StepFn:
        """The training step of a phase: ``(TrainState, key, batch) -> (TrainState, metrics)``.

        Args:
          phase: one of ``PHASES``.
          axis_name: mapped axis over which the batch is split.
          in_parts: on a CPU, compute a large batch in parts (:func:`cached_samples`).
        """
        losses = {
            "behavior": self._behavior_loss, "critic": self._critic_loss, "policy": self._policy_loss,
        }  # fmt: skip
        loss, optimizer = losses[phase](axis_name), self._optimizer(phase)
        rate = self.config.polyak if phase == "critic" else 1.0 - self.config.ema_decay
        part_size = self._part_size(phase) if in_parts else None
        return make_step(
            loss, optimizer, average_rate=rate, axis_name=axis_name, part_size=part_size
        )

    def _part_size(self, phase: str) -> int | None:
        config, policy = self.config, self.policy
        if phase == "critic":
            return cached_samples(max(config.critic_hidden_dims) * config.num_critics)
        if phase == "policy" and not policy.separable:
            return None
        actions = policy.actions_per_state if phase == "policy" else 1
        return cached_samples(max(config.hidden_dims) * actions)

    def _behavior_loss(self, axis_name: AxisName) -> Callable:
        def loss(params: Params, _: Params, key: Array, batch: Tables) -> tuple[Array, dict]:
            data = batch.samples
            return self.model.behavior_loss(params, key, data.observations, data.actions, axis_name)

        return loss

    def _critic_loss(self, axis_name: AxisName) -> Callable:
        def loss(params: Params, target: Params, key: Array, batch: Tables) -> tuple[Array, dict]:
            critic_batch = CriticBatch(batch.samples, batch.next_actions)
            return self.critic.loss(params, target, key, critic_batch, axis_name)

        return loss

    def _policy_loss(self, axis_name: AxisName) -> Callable:
        def loss(params: Params, _: Params, key: Array, batch: Tables) -> tuple[Array, dict]:
            return self.policy.loss(params, key, Batch(batch.samples, batch.policy), axis_name)

        return loss

    def draw_batch(
        self, key: Array, tables: Tables, *, num_devices: int = 1, axis_name: AxisName = None
    ) -> Tables:
        """Gather this device's part of a batch."""
        index_key, row_key = jax.random.split(key)
        num_rows = tables.samples.size * num_devices
        indices = sample_rows(
            index_key,
            self.config.batch_size,
            num_rows,
            num_devices=num_devices,
            axis_name=axis_name,
        )
        samples, next_actions = jax.tree.map(
            lambda leaf: leaf[indices], (tables.samples, tables.next_actions)
        )
        rows = None
        if tables.policy is not None:
            rows = self.policy.gather(row_key, tables.policy, indices, axis_name)
        return Tables(samples, next_actions, rows)

    def next_actions(
        self, params: Params, key: Array, next_observations: Array, indices: Array
    ) -> Array:
        """Behavior actions ``[b, M, A]`` at ``next_observations [b, S]``, rows ``indices`` of the data."""
        key = jax.random.fold_in(key, Purpose.NEXT_ACTIONS)
        noise = draw_noise(key, indices, (self.config.support_size, self.action_size))
        return self.model.sample(params, next_observations[:, None], noise)

    def policy_rows(
        self, state: State, key: Array, renewal: Array, samples: Samples, indices: Array
    ) -> Any:
        """Rows ``indices`` of the policy's table, of the samples ``[b, ...]``; see :meth:`Policy.rows`."""
        key = jax.random.fold_in(key, Purpose.SUPPORT)
        return self.policy.rows(state.acting(state.renewed_params), key, renewal, samples, indices)

    def num_noises(self, name: str) -> int:
        """Noise vectors that one decision of "policy" or "behavior" takes."""
        if name == "behavior" or self.config.action_selection == "sample":
            return 1
        return self.config.num_candidates

    def actions(
        self, name: str, acting: Acting, normalizer: Normalizer, observations: Array, noise: Array
    ) -> Array:
        """Actions ``[E, A]`` in the environment's units.

        Args:
          name: "policy", or "behavior": one sampled action of the behavior model.
          acting: parameters of all stages.
          normalizer: statistics of the training data.
          observations: ``[E, S]`` in the environment's units.
          noise: standard normal, ``[E, num_noises(name), A]``.
        """
        config = self.config
        states = normalizer.normalize_observations(observations)
        model = self.model.with_sampler(
            config.solver if config.eval_solver == "same" else config.eval_solver,
            config.eval_sample_steps or config.sample_steps,
        )
        if name == "behavior":
            return normalizer.unscale_actions(model.sample(acting.behavior, states, noise[:, 0]))
        policy = self._policy(model)
        scaled = select(
            config.action_selection,
            lambda states, noise: policy.sample(acting, states, noise),
            lambda states, noise: policy.mean(acting, states, noise),
            lambda states, actions: self.critic.q_values(acting.critic, states, actions),
            states,
            noise,
        )
        return normalizer.unscale_actions(scaled)

    def act(
        self,
        name: str,
        acting: Acting,
        normalizer: Normalizer,
        key: Array,
        observations: Array,
        step: Array,
        seeds: Array,
    ) -> Array:
        """:meth:`actions` with noise that depends on an episode's seed and step, not on those
        beside it.

        Args:
          name, acting, normalizer, observations: as in :meth:`actions`.
          key: root key of the training seed.
          step: of the episodes.
          seeds: of the episodes, ``[E]``.
        """
        key = jax.random.fold_in(jax.random.fold_in(key, Purpose.EVALUATION), step)
        noise = draw_noise(key, seeds, (self.num_noises(name), self.action_size))
        return self.actions(name, acting, normalizer, observations, noise)
