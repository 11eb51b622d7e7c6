"""Runs the three stages for all seeds at once; everything that happens to a run is a hook.

State is a pytree with a leading seed axis on the host (checkpoints, hooks) and with a device axis
before it on the devices.  What comes next follows from the state's step counters alone, so a
resumed run does what an uninterrupted one does, on any number of devices.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax.rl.algorithm import Algorithm, Purpose, State, Tables
from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.policies import Acting
from efm_jax.rl.samples import Samples, n_step
from efm_jax.rl.support import write_rows
from efm_jax.training.loop import MetricsPipe, segments
from efm_jax.training.parallel import Layout, check_divides, compile_ahead
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk
from efm_jax.types import Array, Normalizer, Transitions

# Support actions that one device samples at once: they bound its memory, whatever M is.
_TABLE_ACTIONS = 65_536


class Hooks(Protocol):
    """What a run tells its surroundings."""

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """A phase starts, or goes on after ``done`` steps."""

    def on_table(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows of the next-action table or the policy's table are computed."""

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        """The policy's table of this renewal was computed (after a resume: again); ``[K]`` each."""

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        """Means over the chunk that ended at ``step``, ``[K]`` each."""

    def on_evaluate(self, step: int, acting: Acting) -> None:
        """Time to evaluate the policy with these parameters (leading seed axis); may raise StoppedError."""

    def on_checkpoint(self, state: State) -> None:
        """Time to save the state (leading seed axis)."""

    def stop_requested(self) -> bool:
        """Whether to stop now, asked after every chunk and block of a table; the same on every host."""


class StoppedError(Exception):
    """The run was asked to stop; when the trainer raises it, ``on_checkpoint`` has been given the state."""


class Trainer:
    """One algorithm on one dataset for several seeds.

    Args:
      config: a validated configuration.
      data: normalized transitions on the host, the rows ``layout.host_rows(num_rows)``.
      seeds: one root seed for each training run; all run in one program.
      layout: how seeds and data lie on the devices; by default data-parallel over all there are.
      num_rows: transitions of the whole dataset, where ``data`` is this host's part of it.

    Raises:
      ValueError: if the batch does not fit the dataset, or batch, dataset or seeds the devices.
    """

    def __init__(
        self,
        config: QIPOConfig,
        data: Transitions,
        seeds: Sequence[int],
        layout: Layout | None = None,
        num_rows: int | None = None,
    ):
        self.config = config
        self.layout = Layout.create(num_seeds=len(seeds)) if layout is None else layout
        self._num_rows = data.size if num_rows is None else num_rows
        if config.batch_size > self._num_rows:
            raise ValueError(
                f"batch_size: expected at most the {self._num_rows} transitions of the dataset; "
                f"got {config.batch_size}"
            )
        check_divides("batch_size", config.batch_size, self.layout.num_shards, "devices")
        part = self.layout.host_rows(self._num_rows)
        if data.size != part.stop - part.start:
            raise ValueError(
                f"data: expected the {part.stop - part.start} of {self._num_rows} transitions "
                f"that are this host's; got {data.size}"
            )
        if config.n_step > 1 and data.size != self._num_rows:
            raise ValueError(
                "n_step: expected 1 where each host holds a part of the data; got "
                f"{config.n_step}; "
                "with parallel=seeds every host holds all of it"
            )
        self.algorithm = Algorithm(config, data.observations.shape[1], data.actions.shape[1])
        self._keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        self._device_keys = self.layout.put_seeds(self._keys)
        self._samples = self.layout.put_rows(n_step(data, config.n_step, config.discount))
        self._programs: dict[Hashable, Any] = {}

    def _program(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for this key at first: a program is traced and compiled once in a run."""
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def init_state(self) -> State:
        """Fresh states of all seeds, with a leading seed axis."""
        return jax.jit(jax.vmap(self.algorithm.init))(self._keys)

    def run(self, state: State, hooks: Hooks) -> State:
        """Train from ``state`` to the end of the last phase.

        Args:
          state: from :meth:`init_state` or a checkpoint, leading seed axis.
          hooks: told of everything on the way; on several hosts, on each of them.

        Returns:
          The final state, leading seed axis.

        Raises:
          NonFiniteLossError: at the first loss that is not finite, before it is saved.
          StoppedError: when a hook asked to stop.
        """
        state = self.layout.put_seeds(state)
        for phase in PHASES:
            total = self.config.phase_steps[phase]
            done = int(getattr(state, phase).step[0, 0])
            if done < total:
                hooks.on_phase(phase, done, total)
                state = self._run_phase(phase, state, done, total, hooks)
        return self.layout.get_seeds(state)

    def _run_phase(self, phase: str, state: State, done: int, total: int, hooks: Hooks) -> State:
        config, pipe = self.config, MetricsPipe(hooks.on_metrics, self.layout.get_seeds)
        policy = phase == "policy"
        renews = policy and self.algorithm.policy.renews
        tables: dict[str, Any] = {"next_actions": None, "policy": None}
        if policy and done == 0:
            state = self.layout.map(self.algorithm.start_policy, donate=(0,))(state)
        periods = (config.log_every, config.checkpoint_every)
        for begin, end in segments(
            done, total, *periods, config.renew_every * renews, config.eval_every * policy
        ):
            renewal = policy and (begin == 0 or (renews and begin % config.renew_every == 0))
            if renewal:
                state = state.replace(renewed_params=self._copy(state.policy.average))
            try:
                if policy and begin > 0 and config.eval_every and begin % config.eval_every == 0:
                    pipe.drain()
                    hooks.on_evaluate(begin, self.layout.get_seeds(state.acting()))
                if renewal or (policy and begin == done):
                    pipe.drain()
                    tables["policy"] = None  # its memory, for the next one
                    tables["policy"] = self._renew(state, begin, hooks)
                if phase == "critic" and self.algorithm.critic.uses_next_actions and begin == done:
                    tables["next_actions"] = self._next_actions(state, hooks)
            except StoppedError:
                hooks.on_checkpoint(self.layout.get_seeds(state))
                raise
            inputs = (getattr(state, phase), self._device_keys, self._samples, tables)
            chunk = functools.partial(self._chunk(phase, end - begin, inputs), *inputs)
            state = state.replace(**{phase: pipe.run(phase, begin, end, chunk)})
            stop = hooks.stop_requested()
            if stop or end % config.checkpoint_every == 0 or end == total:
                pipe.drain()  # a loss that is not finite must stop the run before it is saved
                hooks.on_checkpoint(self.layout.get_seeds(state))
            if stop:
                raise StoppedError
        return state

    def _copy(self, tree: Any) -> Any:
        """A copy on the devices: the chunks reuse the buffers of what they are given."""
        copy = self._program(
            "copy", lambda: self.layout.map(lambda tree: jax.tree.map(jnp.copy, tree))
        )
        return copy(tree)

    def _chunk(self, phase: str, num_steps: int, inputs: tuple) -> Callable:
        return self._program(
            (phase, num_steps), lambda: compile_ahead(self._make_chunk(phase, num_steps), *inputs)
        )

    def _make_chunk(self, phase: str, num_steps: int) -> Callable:
        axis_name = self.layout.axis_name

        def draw_batch(key: Array, tables: Tables) -> Tables:
            return self.algorithm.draw_batch(
                key, tables, num_devices=self.layout.num_shards, axis_name=axis_name
            )

        run = make_chunk(self.algorithm.step(phase, axis_name), draw_batch, num_steps)

        def chunk(state: TrainState, key: Array, samples: Samples, tables: dict[str, Any]) -> tuple:
            return run(
                state, jax.random.fold_in(key, Purpose[phase.upper()]), Tables(samples, **tables)
            )

        return self.layout.map(chunk, shared=(2,), donate=(0,))

    def _renew(self, state: State, step: int, hooks: Hooks) -> Any:
        """Compute the policy's table by ``state.renewed_params``; after a resume, the current one again."""
        policy = self.algorithm.policy
        renewal = step // self.config.renew_every if policy.renews else 0
        rows = self.algorithm.policy_rows
        table = self._fill(f"support set {renewal + 1}", "policy", rows, state, renewal, hooks)
        prepare = functools.partial(policy.prepare, axis_name=self.layout.axis_name)
        table, summary = self._program("prepare", lambda: self.layout.map(prepare, donate=(0,)))(
            table
        )
        first = renewal * self.config.renew_every
        hooks.on_renewal(first, jax.tree.map(np.asarray, self.layout.get_seeds(summary)))
        return table

    def _next_actions(self, state: State, hooks: Hooks) -> Array:
        def rows(state: State, key: Array, _: Array, samples: Samples, indices: Array) -> Array:
            return self.algorithm.next_actions(
                state.behavior.average, key, samples.next_observations, indices
            )

        return self._fill("next actions", "next actions", rows, state, 0, hooks)

    def _fill(
        self, title: str, name: str, rows: Callable, state: State, renewal: int, hooks: Hooks
    ) -> Any:
        """Compute a table with a row for every sample, block by block: each device its own rows.

        Args:
          title: shown while it goes on.
          name: of the table; its programs are compiled once.
          rows: ``(state, key, renewal, samples [b, ...], indices [b]) -> rows``, pure, of one seed.
          state: on the devices.
          renewal: number of the renewal.
          hooks: told after every block.

        Raises:
          StoppedError: when a hook asked to stop.
        """
        per_device, block = self._num_rows // self.layout.num_shards, self.table_block
        empty, fill = self._program(name, lambda: self._table_programs(rows, per_device, block))
        inputs = (
            state,
            self._device_keys,
            self.layout.replicate(jnp.asarray(renewal)),
            self._samples,
        )
        table = empty(*inputs)
        for start in range(0, per_device, block):
            # The last block overlaps the one before it and writes the same values again.
            first = self.layout.replicate(jnp.asarray(min(start, per_device - block)))
            table = fill(table, first, *inputs)
            # Dispatch runs ahead of the devices: without waiting, progress and a stop would come
            # too early.
            jax.block_until_ready(table)
            done = min(start + block, per_device) * self.layout.num_shards
            hooks.on_table(title, done, self._num_rows)
            if hooks.stop_requested():
                raise StoppedError
        return table

    def _table_programs(
        self, rows: Callable, per_device: int, block: int
    ) -> tuple[Callable, Callable]:
        """``(inputs) -> table`` of zeros, and ``(table, start, inputs) -> table`` with a block computed."""
        axis_name = self.layout.axis_name

        def compute(
            places: Array, state: State, key: Array, renewal: Array, samples: Samples
        ) -> Any:
            first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * per_device
            part = jax.tree.map(lambda leaf: leaf[places], samples)
            return rows(state, key, renewal, part, first + places)

        def empty(*inputs: Any) -> Any:
            shapes = jax.eval_shape(compute, jnp.arange(per_device), *inputs)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def fill(table: Any, start: Array, *inputs: Any) -> Any:
            return write_rows(table, lambda places: compute(places, *inputs), start, block)

        return (
            self.layout.map(empty, shared=(2, 3)),
            self.layout.map(fill, shared=(1, 4, 5), donate=(0,)),
        )

    @property
    def table_block(self) -> int:
        """Rows of a table that a device computes at once."""
        per_device = self._num_rows // self.layout.num_shards
        return min(max(_TABLE_ACTIONS // self.config.support_size, 1), per_device)

    def act_fn(
        self, name: str, acting: Acting, normalizer: Normalizer, episode_seeds: Sequence[int]
    ) -> Callable:
        """A policy as :func:`efm_jax.envs.evaluate` wants it; arguments as of :func:`make_act`."""
        program = self._program(("act", name), lambda: _act_program(self.algorithm, name))
        return _bind(program, self._keys, acting, normalizer, episode_seeds)


def make_act(
    algorithm: Algorithm,
    name: str,
    keys: Array,
    acting: Acting,
    normalizer: Normalizer,
    episode_seeds: Sequence[int],
) -> Callable[[np.ndarray, int], np.ndarray]:
    """One jitted policy call for all seeds and episodes.

    Args:
      algorithm: whose policy acts.
      name: "policy" or "behavior".
      keys: root keys of the seeds, ``[K]``.
      acting: parameters with a leading seed axis.
      normalizer: statistics of the training data.
      episode_seeds: ``E`` environment seeds; they also seed the actions' noise.

    Returns:
      ``act(observations [K, E, S] float32, step) -> actions [K, E, A]`` in the environment's units.
    """
    return _bind(_act_program(algorithm, name), keys, acting, normalizer, episode_seeds)


def _act_program(algorithm: Algorithm, name: str) -> Callable:
    return jax.jit(
        jax.vmap(functools.partial(algorithm.act, name), in_axes=(0, None, 0, 0, None, None))
    )


def _bind(
    program: Callable,
    keys: Array,
    acting: Acting,
    normalizer: Normalizer,
    episode_seeds: Sequence[int],
) -> Callable[[np.ndarray, int], np.ndarray]:
    episodes = jnp.asarray(episode_seeds)

    def act(observations: np.ndarray, step: int) -> np.ndarray:
        return np.asarray(
            program(acting, normalizer, keys, observations, jnp.asarray(step), episodes)
        )

    return act
