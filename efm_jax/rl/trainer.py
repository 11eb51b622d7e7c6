"""Runs QIPO's three stages for all seeds at once; everything that happens to a run is a hook.

State is a pytree with a leading seed axis on the host (checkpoints, hooks) and with a device axis
before it on the devices.  What comes next follows from the state's step counters alone, so a resumed
run does what an uninterrupted one does, on any number of devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.qipo import PHASES, QIPO, Purpose, QIPOState, Tables
from efm_jax.rl.support import SupportSet, summarize, write_rows
from efm_jax.training.loop import MetricsPipe, segments
from efm_jax.training.parallel import Layout, check_divides, compile_ahead
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk
from efm_jax.types import Array, Normalizer, Params, Transitions

# States of one device whose support actions are sampled at once.
_TABLE_BLOCK = 4096


class Hooks(Protocol):
    """What a run tells its surroundings."""

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """A phase starts, or goes on after ``done`` steps."""

    def on_table(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows of the next-action table or a support set are drawn."""

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        """The support set of the renewal at ``step`` was drawn (after a resume: again); ``[K]`` each."""

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        """Means over the chunk that ended at ``step``, ``[K]`` each."""

    def on_evaluate(self, step: int, params: Params) -> None:
        """Time to evaluate the policy's acting parameters (leading seed axis); may raise StoppedError."""

    def on_checkpoint(self, state: QIPOState) -> None:
        """Time to save the state (leading seed axis)."""

    def stop_requested(self) -> bool:
        """Whether to stop now, asked after every chunk and block of a table; the same on every host."""


class StoppedError(Exception):
    """The run was asked to stop; when the trainer raises it, ``on_checkpoint`` has been given the state."""


class Trainer:
    """QIPO on one dataset for several seeds.

    Args:
      config: a validated configuration.
      data: normalised transitions on the host, the rows ``layout.host_rows(num_rows)``.
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
        self.algorithm = QIPO(config, data.observations.shape[1], data.actions.shape[1])
        self._keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        self._device_keys = self.layout.put_seeds(self._keys)
        self._data = self.layout.put_rows(data)
        self._chunks: dict[tuple[str, int], Callable] = {}

    def init_state(self) -> QIPOState:
        """Fresh states of all seeds, with a leading seed axis."""
        return jax.jit(jax.vmap(self.algorithm.init))(self._keys)

    def run(self, state: QIPOState, hooks: Hooks) -> QIPOState:
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
            total = getattr(self.config, f"{phase}_steps")
            done = int(getattr(state, phase).step[0, 0])
            if done < total:
                hooks.on_phase(phase, done, total)
                state = self._run_phase(phase, state, done, total, hooks)
        return self.layout.get_seeds(state)

    def _run_phase(self, phase: str, state: QIPOState, done: int, total: int, hooks: Hooks) -> QIPOState:
        config, pipe = self.config, MetricsPipe(hooks.on_metrics, self.layout.get_seeds)
        policy = phase == "policy"
        tables: dict[str, Any] = {"next_actions": None, "support": None}
        if policy and done == 0:
            state = self.layout.map(self.algorithm.start_policy, donate=(0,))(state)
        periods = (config.log_every, config.checkpoint_every)
        for begin, end in segments(
            done, total, *periods, *((config.renew_every, config.eval_every) * policy)
        ):
            renew = policy and (tables["support"] is None or begin % config.renew_every == 0)
            if renew and begin % config.renew_every == 0:
                state = state.replace(support_params=jax.tree.map(jnp.copy, state.policy.average))
            try:
                if policy and begin > 0 and config.eval_every and begin % config.eval_every == 0:
                    pipe.drain()
                    hooks.on_evaluate(begin, self.layout.get_seeds(state.policy.average))
                if renew:
                    pipe.drain()
                    tables["support"] = None  # its memory, for the next one
                    tables["support"] = self._renew(state, begin, hooks)
                if phase == "critic" and self.algorithm.critic.uses_next_actions and begin == done:
                    tables["next_actions"] = self._next_actions(state, hooks)
            except StoppedError:
                hooks.on_checkpoint(self.layout.get_seeds(state))
                raise
            inputs = (getattr(state, phase), self._device_keys, self._data, tables)
            if (phase, end - begin) not in self._chunks:
                self._chunks[phase, end - begin] = compile_ahead(
                    self._make_chunk(phase, end - begin), *inputs
                )
            chunk = functools.partial(self._chunks[phase, end - begin], *inputs)
            state = state.replace(**{phase: pipe.run(phase, begin, end, chunk)})
            stop = hooks.stop_requested()
            if stop or end % config.checkpoint_every == 0 or end == total:
                pipe.drain()  # a loss that is not finite must stop the run before it is saved
                hooks.on_checkpoint(self.layout.get_seeds(state))
            if stop:
                raise StoppedError
        return state

    def _make_chunk(self, phase: str, num_steps: int) -> Callable:
        axis_name = self.layout.axis_name

        def draw_batch(key: Array, tables: Tables) -> Tables:
            return self.algorithm.draw_batch(
                key, tables, num_devices=self.layout.num_shards, axis_name=axis_name
            )

        run = make_chunk(self.algorithm.step(phase, axis_name), draw_batch, num_steps)

        def chunk(state: TrainState, key: Array, data: Transitions, tables: dict[str, Any]) -> tuple:
            return run(state, jax.random.fold_in(key, Purpose[phase.upper()]), Tables(data, **tables))

        return self.layout.map(chunk, shared=(2,), donate=(0,))

    def _renew(self, state: QIPOState, step: int, hooks: Hooks) -> SupportSet:
        """Draw the support sets of ``state.support_params``; after a resume, the current ones again."""
        renewal, offset = divmod(step, self.config.renew_every)

        def rows(state: QIPOState, key: Array, data: Transitions, indices: Array) -> SupportSet:
            return self.algorithm.support(state, key, jnp.asarray(renewal), data, indices)

        support = self._fill(f"support set {renewal + 1}", rows, state, hooks)
        summary = self.layout.map(
            functools.partial(summarize, beta=self.config.beta, axis_name=self.layout.axis_name)
        )(support)
        hooks.on_renewal(step - offset, jax.tree.map(np.asarray, self.layout.get_seeds(summary)))
        return support

    def _next_actions(self, state: QIPOState, hooks: Hooks) -> Array:
        def rows(state: QIPOState, key: Array, data: Transitions, indices: Array) -> Array:
            return self.algorithm.next_actions(state.behavior.average, key, data.next_observations, indices)

        return self._fill("next actions", rows, state, hooks)

    def _fill(self, name: str, rows: Callable, state: QIPOState, hooks: Hooks) -> Any:
        """Compute a table with a row for every transition, block by block: each device its own rows.

        Args:
          name: shown while it goes on.
          rows: ``(state, key, data [b, ...], indices [b]) -> rows``, pure, of one seed.
          state: on the devices.
          hooks: told after every block.

        Raises:
          StoppedError: when a hook asked to stop.
        """
        per_device = self._num_rows // self.layout.num_shards
        block = min(_TABLE_BLOCK, per_device)
        axis_name = self.layout.axis_name

        def compute(places: Array, state: QIPOState, key: Array, data: Transitions) -> Any:
            first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * per_device
            return rows(state, key, jax.tree.map(lambda leaf: leaf[places], data), first + places)

        def empty(state: QIPOState, key: Array, data: Transitions) -> Any:
            shapes = jax.eval_shape(compute, jnp.arange(per_device), state, key, data)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def fill(table: Any, start: Array, state: QIPOState, key: Array, data: Transitions) -> Any:
            return write_rows(table, lambda places: compute(places, state, key, data), start, block)

        inputs = (state, self._device_keys, self._data)
        table = self.layout.map(empty, shared=(2,))(*inputs)
        fill = self.layout.map(fill, shared=(1, 4), donate=(0,))
        for start in range(0, per_device, block):
            # The last block overlaps the one before it and writes the same values again.
            first = self.layout.replicate(jnp.asarray(min(start, per_device - block)))
            table = fill(table, first, *inputs)
            # Dispatch runs ahead of the devices: without waiting, progress and a stop would come too early.
            jax.block_until_ready(table)
            done = min(start + block, per_device) * self.layout.num_shards
            hooks.on_table(name, done, self._num_rows)
            if hooks.stop_requested():
                raise StoppedError
        return table

    def act_fn(self, params: Params, normalizer: Normalizer, episode_seeds: Sequence[int]) -> Callable:
        """The policy as :func:`efm_jax.evaluation.evaluate` wants it; see :func:`make_act`."""
        return make_act(self.algorithm, self._keys, params, normalizer, episode_seeds)


def make_act(
    algorithm: QIPO, keys: Array, params: Params, normalizer: Normalizer, episode_seeds: Sequence[int]
) -> Callable[[np.ndarray, int], np.ndarray]:
    """One jitted policy call for all seeds and episodes.

    Args:
      algorithm: whose model acts.
      keys: root keys of the seeds, ``[K]``.
      params: parameters with a leading seed axis.
      normalizer: statistics of the training data.
      episode_seeds: ``E`` environment seeds; they also seed the actions' noise.

    Returns:
      ``act(observations [K, E, S] float32, step) -> actions [K, E, A]`` in the environment's units.
    """
    episodes = jnp.asarray(episode_seeds)
    mapped = jax.jit(jax.vmap(algorithm.act, in_axes=(0, None, 0, 0, None, None)))

    def act(observations: np.ndarray, step: int) -> np.ndarray:
        return np.asarray(mapped(params, normalizer, keys, observations, jnp.asarray(step), episodes))

    return act
