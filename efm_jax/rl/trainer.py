"""Runs QIPO's three stages for all seeds at once; everything that happens to a run is a hook.

State is a pytree with a leading seed axis on the host (checkpoints, hooks) and with a device axis
before it on the devices.  What comes next follows from the state's step counters alone, so a resumed
run does what an uninterrupted one does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.qipo import PHASES, QIPO, Purpose, QIPOState, Tables, empty_tables
from efm_jax.rl.support import SupportSet, summarize, write_rows
from efm_jax.training import parallel
from efm_jax.training.loop import MetricsPipe, segments
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk
from efm_jax.types import Array, Normalizer, Params, Transitions

# States whose support actions are sampled at once.
_SUPPORT_BLOCK = 4096


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
        """Time to evaluate the policy's acting parameters (leading seed axis)."""

    def on_checkpoint(self, state: QIPOState) -> None:
        """Time to save the state (leading seed axis)."""

    def stop_requested(self) -> bool:
        """Whether to stop after this chunk; the state is then saved first."""


class StoppedError(Exception):
    """The run was asked to stop, and its state has been handed to ``on_checkpoint``."""


class Trainer:
    """QIPO on one dataset for several seeds.

    Args:
      config: a validated configuration.
      data: normalised transitions on the host.
      seeds: one root seed for each training run; all run in one program.

    Raises:
      ValueError: if the batch does not fit the dataset or the devices.
    """

    def __init__(self, config: QIPOConfig, data: Transitions, seeds: Sequence[int]):
        self.config = config
        self._devices = parallel.device_count()
        check_batch_size(config.batch_size, data.size, self._devices)
        self.algorithm = QIPO(config, data.observations.shape[1], data.actions.shape[1])
        self._num_rows = data.size
        self._keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        self._device_keys = parallel.replicate(self._keys)
        self._data = parallel.replicate(jax.tree.map(jnp.asarray, data))
        self._chunks: dict[tuple[str, int], Callable] = {}

    def init_state(self) -> QIPOState:
        """Fresh states of all seeds, with a leading seed axis."""
        return jax.jit(jax.vmap(self.algorithm.init))(self._keys)

    def run(self, state: QIPOState, hooks: Hooks) -> QIPOState:
        """Train from ``state`` to the end of the last phase.

        Args:
          state: from :meth:`init_state` or a checkpoint, leading seed axis.
          hooks: told of everything on the way.

        Returns:
          The final state, leading seed axis.

        Raises:
          NonFiniteLossError: at the first loss that is not finite, before it is saved.
          StoppedError: when a hook asked to stop.
        """
        state = parallel.replicate(state)
        for phase in PHASES:
            total = getattr(self.config, f"{phase}_steps")
            done = int(getattr(state, phase).step[0, 0])
            if done < total:
                hooks.on_phase(phase, done, total)
                state = self._run_phase(phase, state, done, total, hooks)
        return parallel.first_copy(state)

    def _run_phase(self, phase: str, state: QIPOState, done: int, total: int, hooks: Hooks) -> QIPOState:
        config, pipe = self.config, MetricsPipe(hooks.on_metrics)
        policy = phase == "policy"
        next_actions = support = None
        if phase == "critic" and self.algorithm.critic.uses_next_actions:
            next_actions = self._next_actions(state, hooks)
        if policy and done == 0:
            start = parallel.over_devices_and_seeds(self.algorithm.start_policy)
            state = start(state)
        periods = (config.log_every, config.checkpoint_every)
        for begin, end in segments(
            done, total, *periods, *((config.renew_every, config.eval_every) * policy)
        ):
            if policy and (support is None or begin % config.renew_every == 0):
                pipe.drain()
                state, support = self._renew(state, begin, hooks)
            tables = {"next_actions": next_actions, "support": support}
            inputs = (getattr(state, phase), self._device_keys, self._data, tables)
            if (phase, end - begin) not in self._chunks:
                # Compiled ahead of the call, so that steps per second are of steps alone.
                self._chunks[phase, end - begin] = (
                    self._make_chunk(phase, end - begin).lower(*inputs).compile()
                )
            chunk = functools.partial(self._chunks[phase, end - begin], *inputs)
            state = state.replace(**{phase: pipe.run(phase, begin, end, chunk)})
            stop = hooks.stop_requested()
            save = stop or end % config.checkpoint_every == 0 or end == total
            evaluate = policy and bool(config.eval_every) and end % config.eval_every == 0 and end < total
            if save or evaluate:
                pipe.drain()  # a loss that is not finite must stop the run before it is saved
                if evaluate:
                    hooks.on_evaluate(end, parallel.first_copy(state.policy.average))
                if save:
                    hooks.on_checkpoint(parallel.first_copy(state))
            if stop:
                raise StoppedError
        return state

    def _make_chunk(self, phase: str, num_steps: int) -> Callable:
        def draw_batch(key: Array, tables: Tables) -> Tables:
            return self.algorithm.draw_batch(
                key, tables, num_devices=self._devices, axis_name=parallel.DEVICE_AXIS
            )

        run = make_chunk(self.algorithm.step(phase, parallel.DEVICE_AXIS), draw_batch, num_steps)

        def chunk(state: TrainState, key: Array, data: Transitions, tables: dict[str, Any]) -> tuple:
            return run(state, jax.random.fold_in(key, Purpose[phase.upper()]), Tables(data, **tables))

        return parallel.over_devices_and_seeds(chunk, shared=(2,), donate=(0,))

    def _renew(self, state: QIPOState, step: int, hooks: Hooks) -> tuple[QIPOState, SupportSet]:
        """Draw the support sets; between renewals (after a resume) draw the current ones again."""
        renewal, offset = divmod(step, self.config.renew_every)
        if offset == 0:
            state = state.replace(support_params=jax.tree.map(jnp.copy, state.policy.average))

        def rows(indices: Array, state: QIPOState, key: Array, data: Transitions) -> SupportSet:
            return self.algorithm.support_rows(state, key, jnp.asarray(renewal), data, indices)

        _, empty = empty_tables(self.config, self._num_rows, self.algorithm.action_size)
        support = self._fill(f"support set {renewal + 1}", empty, rows, state, hooks)
        summary = jax.vmap(lambda table: summarize(table, self.config.beta))(parallel.first_copy(support))
        hooks.on_renewal(step - offset, jax.tree.map(np.asarray, summary))
        return state, support

    def _next_actions(self, state: QIPOState, hooks: Hooks) -> Array:
        def rows(indices: Array, state: QIPOState, key: Array, data: Transitions) -> Array:
            params = state.behavior.average
            return self.algorithm.next_action_rows(params, key, data.next_observations, indices)

        empty, _ = empty_tables(self.config, self._num_rows, self.algorithm.action_size)
        return self._fill("next actions", empty, rows, state, hooks)

    def _fill(self, name: str, empty: Any, rows: Callable, state: QIPOState, hooks: Hooks) -> Any:
        """Compute a per-state table block by block, in bounded memory, on all devices."""
        block = min(_SUPPORT_BLOCK, self._num_rows) // self._devices * self._devices

        def fill(table: Any, start: Array, state: QIPOState, key: Array, data: Transitions) -> Any:
            return write_rows(
                table,
                lambda indices: rows(indices, state, key, data),
                start,
                block,
                num_devices=self._devices,
                axis_name=parallel.DEVICE_AXIS,
            )

        fill = parallel.over_devices_and_seeds(fill, shared=(1, 4), donate=(0,))
        num_seeds = len(self._keys)
        table = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_seeds, *leaf.shape)), empty)
        table = parallel.replicate(table)
        for start in range(0, self._num_rows, block):
            # The last block overlaps the one before it and writes the same values again.
            first = parallel.replicate(jnp.asarray(min(start, self._num_rows - block)))
            table = fill(table, first, state, self._device_keys, self._data)
            hooks.on_table(name, min(start + block, self._num_rows), self._num_rows)
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


def check_batch_size(batch_size: int, num_rows: int, devices: int) -> None:
    """Refuse a batch that is larger than the dataset or does not divide over the devices."""
    if batch_size > num_rows:
        raise ValueError(
            f"batch_size: expected at most the {num_rows} transitions of the dataset; got {batch_size}"
        )
    if batch_size % devices:
        below = batch_size // devices * devices
        fitting = f"{below} or {below + devices}" if below else f"{devices}"
        raise ValueError(
            f"batch_size: expected a multiple of the {devices} devices, as {fitting}; got {batch_size}"
        )
