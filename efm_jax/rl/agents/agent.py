"""The pattern of every agent: ``init``, ``step`` of three phases, ``act``.

1. behavior: a generative model of the data's actions, by plain flow matching;
2. critic: any offline critic;
3. policy: the agent's own; for QIPO, improvement on support sets (Zhang et al. 2025, Sec. 5).

Pure functions for one seed: an agent knows nothing of other seeds, files or the clock, and a device
axis enters as ``axis_name`` alone.
"""

import abc
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from efm_jax import checks, losses
from efm_jax.losses import Aux, sample_keys
from efm_jax.paths import PATHS
from efm_jax.rl.batch import Batch, TiledData, draw_noise, gather, with_tables
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import make_critic
from efm_jax.rl.model import GenerativeModel
from efm_jax.training.state import TrainState
from efm_jax.training.step import StepFn, cached_samples, make_step, sample_rows
from efm_jax.types import Normalizer, Params
from efm_jax.weights import AxisName

POLICIES = ("behavior", "policy")  # of every agent, each may act


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
    GUARD = 8


class AgentParams(NamedTuple):
    """Parameters that act: the averages of the three phases."""

    behavior: Params
    critic: Params
    policy: Params


class State(struct.PyTreeNode):
    """All that a run carries from step to step; with the seed it determines the rest of the run."""

    behavior: TrainState
    critic: TrainState
    policy: TrainState
    renewed_params: Params  # the policy's, when its table was last computed
    average_acts: bool = struct.field(pytree_node=False, default=True)  # or the last policy

    def params(self, *, renewed: bool = False) -> AgentParams:
        """The parameters that act, or with the policy's of the last renewal."""
        policy = self.policy.average if self.average_acts else self.policy.params
        policy = self.renewed_params if renewed else policy
        return AgentParams(self.behavior.average, self.critic.average, policy)

    def begun_as(self, other: "State") -> "State":
        """A fresh state with another's behavior model and critic; policies begin as the former."""
        models = {
            name: getattr(self, name).replace(params=model.params, average=model.average)
            for name, model in (("behavior", other.behavior), ("critic", other.critic))
        }
        return self.replace(**models)


class Agent(abc.ABC):
    """A way from a behavior model and a critic to actions; subclasses are final.

    An agent may keep a table with a row for every sample: :meth:`support_set` computes the rows
    before the first policy step and, if the agent ``renews``, again every ``renew_every`` steps
    from the policy of that moment; :meth:`weigh` finishes the table.  The critic is frozen
    meanwhile, so a policy step gathers and evaluates no critic.

    Args:
      config: a validated configuration.
      observation_size: ``S``.
      action_size: ``A``.

    Raises:
      ValueError: a name in the configuration that is in no registry.
    """

    trains = True  # whether there is a policy phase
    renews = False

    def __init__(self, config: QIPOConfig, observation_size: int, action_size: int):
        self.config = config
        self.observation_size = observation_size
        self.action_size = action_size
        self.model = GenerativeModel.from_config(config)
        self.acting_model = GenerativeModel.from_config(config, acting=True)
        self.critic = make_critic(config)

    @property
    def guarded(self) -> bool:
        """Whether learned models of the environment judge what came of every table."""
        return self.renews and self.config.guard > 0

    # An agent's own.

    @property
    def name(self) -> str:
        """The name of results; qipo_ot and qipo_diff are the paper's."""
        return f"{self.config.policy}_{PATHS[self.config.path].label}"

    @property
    def actions_per_state(self) -> int:
        """Actions for which a policy step evaluates the network in each state of its batch."""
        return 1

    def init_policy(self, key: Array) -> Params:
        """Parameters of the right shapes, from which :meth:`start_policy` may begin."""
        return self.model.init(key, self.observation_size, self.action_size)

    def start_policy(self, behavior: Params, params: Params) -> Params:
        """The policy before its first step: by default the behavior model."""
        return behavior

    def support_set(self, params: AgentParams, key: Array, batch: Batch, index: Array) -> Any:
        """Rows of the table for a batch at places ``index [b]`` of the dataset; None: no table.

        ``params.policy`` is that of the last renewal; ``key`` is of this purpose, seed and renewal.
        """
        return None

    def weigh(self, support: Any, axis_name: AxisName) -> tuple[Any, dict[str, Array]]:
        """The finished table of this device, from all its rows, and what a renewal logs."""
        return support, {}

    def gather(self, key: Array, table: Any, index: Array, axis_name: AxisName) -> Any:
        """The rows of a batch."""
        return gather(table, index)

    def policy_draws(self, key: Array, batch: Batch, axis_name: AxisName) -> Any:
        """What :meth:`policy_loss` would draw from its key, to be drawn ahead; or the key."""
        return key

    def policy_loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        """This device's share of a mean over the global batch, as in :mod:`efm_jax.losses`."""
        raise TypeError(f"agent {self.name}: expected trains = False or a policy_loss; got neither")

    @abc.abstractmethod
    def sample(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        """Actions in [-1, 1] from ``noise [..., A]``, states ``[..., S]`` broadcast to it."""

    def mean(
        self, model: GenerativeModel, params: AgentParams, observations: Array, noise: Array
    ) -> Array:
        """The mean action ``[E, A]`` for ``observations [E, 1, S]``, from ``noise [E, n, A]``."""
        return self.sample(model, params, observations, noise).mean(-2)

    # The same for all.

    @property
    def phase_steps(self) -> dict[str, int]:
        """Training steps of every phase."""
        config = self.config
        policy_steps = config.policy_steps if self.trains else 0
        return {
            "behavior": config.behavior_steps,
            "critic": config.critic_steps,
            "policy": policy_steps,
        }

    def init(self, key: Array) -> State:
        """Fresh states of all three phases."""
        model_key, critic_key = jax.random.split(jax.random.fold_in(key, Purpose.INIT))
        sizes = self.observation_size, self.action_size
        policy = self.init_policy(jax.random.fold_in(key, Purpose.POLICY_INIT))
        return State(
            behavior=self._fresh("behavior", self.model.init(model_key, *sizes)),
            critic=self._fresh("critic", self.critic.init(critic_key, *sizes)),
            policy=self._fresh("policy", policy),
            renewed_params=jax.tree.map(jnp.copy, policy),
            average_acts=not self.config.table_polyak,
        )

    def begin_policy(self, state: State) -> State:
        """The state before the policy's first step."""
        params = self.start_policy(state.behavior.average, state.policy.params)
        return state.replace(policy=self._fresh("policy", jax.tree.map(jnp.copy, params)))

    def _fresh(self, phase: str, params: Params) -> TrainState:
        return TrainState.create(params, self._optimizer(phase))

    def _optimizer(self, phase: str) -> optax.GradientTransformation:
        config, rate = self.config, self.config.of_phase("learning_rate", phase)
        if phase == "critic":
            return optax.adam(rate)
        if config.learning_rate_schedule == "cosine":
            # A policy without a phase has a state all the same, of an optimizer that never steps.
            rate = optax.cosine_decay_schedule(rate, max(self.phase_steps[phase], 1))
        adam, clip = optax.adam(rate), config.max_grad_norm
        return optax.chain(optax.clip_by_global_norm(clip), adam) if clip > 0 else adam

    def draws(self, phase: str, key: Array, batch: Batch, *, axis_name: AxisName = None) -> Any:
        """What the loss of a phase draws, which it takes as its key; or the key itself."""
        if phase == "behavior":
            return losses.draw(key, batch.actions, axis_name=axis_name)
        return self.policy_draws(key, batch, axis_name) if phase == "policy" else key

    def step(
        self, phase: str, axis_name: AxisName = None, *, in_parts: bool | None = None
    ) -> StepFn:
        """The training step of a phase: ``(TrainState, key, Batch) -> (TrainState, metrics)``.

        Args:
          phase: of ``PHASES``.
          axis_name: mapped axis over which the batch is split.
          in_parts: compute a large batch in parts (:func:`cached_samples`); None: on a CPU.
        """
        config = self.config
        in_parts = jax.default_backend() == "cpu" if in_parts is None else in_parts

        def behavior(params: Params, _: Params, key: Array, batch: Batch) -> tuple[Array, Aux]:
            return self.model.loss(
                params, key, batch.observations, batch.actions, axis_name=axis_name
            )

        def critic(params: Params, target: Params, key: Array, batch: Batch) -> tuple[Array, Aux]:
            return self.critic.loss(params, target, key, batch, axis_name)

        def policy(params: Params, _: Params, key: Array, batch: Batch) -> tuple[Array, Aux]:
            return self.policy_loss(params, key, batch, axis_name)

        width = max(config.hidden_dims)
        table_rate = config.table_polyak or 1.0 - config.ema_decay
        loss, rate, numbers = {
            "behavior": (behavior, 1.0 - config.ema_decay, width),
            "critic": (critic, config.polyak, max(config.critic_hidden_dims) * config.num_critics),
            "policy": (policy, table_rate, width * self.actions_per_state),
        }[phase]
        return make_step(
            loss,
            self._optimizer(phase),
            average_rate=rate,
            axis_name=axis_name,
            part_size=cached_samples(numbers) if in_parts else None,
        )

    def draw_batch(
        self,
        phase: str,
        key: Array,
        data: Batch | TiledData,
        *,
        num_devices: int = 1,
        axis_name: AxisName = None,
    ) -> Batch:
        """This device's part of a phase's batch, from its rows of the dataset."""
        index_key, row_key = jax.random.split(key)
        size, num_rows = self.config.of_phase("batch_size", phase), data.size * num_devices
        index = sample_rows(index_key, size, num_rows, num_devices=num_devices, axis_name=axis_name)
        batch = gather(with_tables(data, data.next_actions, None), index)
        if data.support is None:
            return batch
        return batch._replace(support=self.gather(row_key, data.support, index, axis_name))

    def next_actions(
        self, params: AgentParams, key: Array, _: Array, batch: Batch, index: Array
    ) -> Array:
        """Behavior actions ``[b, M, A]`` at the next states of a batch: rows of a table."""
        key = jax.random.fold_in(key, Purpose.NEXT_ACTIONS)
        noise = draw_noise(key, index, (self.config.support_size, self.action_size))
        return self.model.sample(params.behavior, batch.next_observations[:, None], noise)

    def support_rows(
        self, params: AgentParams, key: Array, renewal: Array, batch: Batch, index: Array
    ) -> Any:
        """:meth:`support_set` with the key of a renewal: rows of a table."""
        key = jax.random.fold_in(key, Purpose.SUPPORT)
        if self.renews:
            key = jax.random.fold_in(key, renewal)
        return self.support_set(params, key, batch, index)

    def act(
        self,
        params: AgentParams,
        normalizer: Normalizer,
        key: Array,
        observations: Array,
        policy: str = "policy",
    ) -> Array:
        """Actions ``[E, A]`` for ``observations [E, S]``, both in the environment's units.

        Args:
          params: of all phases.
          normalizer: statistics of the training data.
          key: one key, or a key for each observation, ``[E]``.
          observations: ``[E, S]``.
          policy: "policy" plays a sample, the best of several by Q-value (Hansen-Estruch et al.
            2023, IDQL, arXiv 2304.10573, Algorithm 2) or their mean, as ``action_selection`` says;
            "behavior" plays a sample of the behavior model.
        """
        states = jnp.asarray(normalizer.normalize_observations(observations))[:, None]
        rule = self.config.action_selection if policy == "policy" else "sample"
        shape = (1 if rule == "sample" else self.config.num_candidates, self.action_size)
        keys = sample_keys(key, observations.shape[0])
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        model = self.acting_model
        if policy == "behavior":
            scaled = model.sample(params.behavior, states, noise)[:, 0]
        elif rule == "mean":
            scaled = self.mean(model, params, states, noise)
        else:
            sampled = self.sample(model, params, states, noise)
            scaled = sampled[:, 0]
            if rule == "best":
                best = self.critic.q_values(params.critic, states, sampled).argmax(-1)
                scaled = jnp.take_along_axis(sampled, best[:, None, None], axis=1)[:, 0]
        return jnp.asarray(normalizer.unscale_actions(scaled))


@functools.partial(jax.jit, static_argnums=(0, 1))
def play(
    agent: Agent,
    policy: str,
    params: AgentParams,
    normalizer: Normalizer,
    keys: Array,
    observations: Array,
    step: Array,
    episodes: Array,
) -> Array:
    """Actions ``[K, E, A]`` of K seeds in E episodes at a step; other arguments as in `player`."""

    def of_seed(params: AgentParams, key: Array, observations: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, Purpose.EVALUATION), step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, episodes)
        return agent.act(params, normalizer, keys, observations, policy)

    return jax.vmap(of_seed)(params, keys, observations)


def acting_inputs(
    agent: Agent, params: AgentParams, key: Array, num_seeds: int, num_episodes: int
) -> tuple:
    """Shapes of the arguments of :func:`play`, from those of one seed."""
    number = jax.ShapeDtypeStruct((), jnp.float32)
    s, a = (number.update(shape=(n,)) for n in (agent.observation_size, agent.action_size))

    def of_seeds(leaf: Any) -> Any:
        return leaf.update(shape=(num_seeds, *leaf.shape))

    observations = number.update(shape=(num_seeds, num_episodes, agent.observation_size))
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    episodes = jax.ShapeDtypeStruct((num_episodes,), jnp.uint32)
    of = jax.tree.map(of_seeds, (params, key))
    return of[0], Normalizer._make((s, s, a, a)), of[1], observations, integer, episodes


def player(
    agent: Agent,
    policy: str,
    params: AgentParams,
    normalizer: Normalizer,
    keys: Array,
    episode_seeds: Sequence[int],
) -> Callable[[np.ndarray, int], np.ndarray]:
    """All seeds of a run in all episodes at once, as :func:`efm_jax.envs.evaluate` wants it.

    An action's noise depends on training seed, episode seed and step, not on what plays beside it.

    Args:
      agent: acts; its program is compiled once for any number of calls.
      policy: of ``POLICIES``.
      params: with a leading seed axis.
      normalizer: statistics of the training data.
      keys: root keys of the seeds, ``[K]``.
      episode_seeds: ``E`` environment seeds.

    Returns:
      ``act(observations [K, E, S], step) -> actions [K, E, A]`` in the environment's units.
    """
    checks.check_choice("policy", policy, POLICIES)
    episodes = jnp.asarray(episode_seeds)

    def act(observations: np.ndarray, step: int) -> np.ndarray:
        inputs = params, normalizer, keys, observations, jnp.asarray(step), episodes
        return np.asarray(play(agent, policy, *inputs))

    return act
