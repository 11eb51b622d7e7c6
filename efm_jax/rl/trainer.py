"""The trainer: one loop over events, made from the configuration's periods, for all seeds at once.

State is a pytree with a leading seed axis on the host (checkpoints, hooks) and with a device axis
before it on the devices.  The next event follows from the state's step counters alone, so a resumed
run does what an uninterrupted one does, on any number of devices.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efm_jax.data.preprocess import n_step
from efm_jax.rl import guard
from efm_jax.rl.agents import Agent, AgentParams, State
from efm_jax.rl.agents.agent import Purpose
from efm_jax.rl.batch import Batch, TiledData, with_tables
from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.programs import Programs
from efm_jax.training.loop import MetricsPipe, segments
from efm_jax.training.parallel import Layout, check_divides, compile_ahead
from efm_jax.training.state import TrainState
from efm_jax.types import Transitions

# ``(table, done rows, all rows)``; may raise to stop.
Report = Callable[[str, int, int], None]


class Hooks:
    """Events of a run that its surroundings may act on; by default nothing happens."""

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """A phase starts, or goes on after ``done`` steps."""

    def on_table(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows of the table of next actions or of the agent are computed."""

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        """The agent's table of this renewal was computed (after a resume: again); ``[K]`` each."""

    def on_guard(self, step: int, summary: dict[str, np.ndarray]) -> None:
        """The guard kept the policy or went back to that of the last table, ``[K]`` each."""

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        """Means over the chunk that ended at ``step``, ``[K]`` each."""

    def on_evaluate(self, step: int, params: AgentParams) -> None:
        """Time to evaluate the policy (leading seed axis); may raise :class:`StoppedError`."""

    def on_checkpoint(self, state: State) -> None:
        """Time to save the state (leading seed axis)."""

    def stop_requested(self) -> bool:
        """Whether to stop, asked after every chunk and block of a table; the same on every host."""
        return False


class StoppedError(Exception):
    """The run was asked to stop; the trainer has given ``on_checkpoint`` the state before."""


class Event(NamedTuple):
    """One thing that a run does, from ``start`` to ``stop`` steps of a phase."""

    kind: str
    phase: str
    start: int
    stop: int


def events(agent: Agent, done: Mapping[str, int]) -> Iterator[Event]:
    """Everything that is left of a run, in order.

    Kinds: ``phase`` begins or continues, ``next_actions`` are computed, ``evaluate`` the policy,
    ``renew`` the table by today's policy or ``restore`` it by that of the last renewal, train a
    ``chunk`` (and at the end of a table guard what came of it), ``save``.

    Args:
      agent: with its configuration.
      done: steps of every phase.
    """
    config = agent.config
    for phase in PHASES:
        first, total, policy = done[phase], agent.phase_steps[phase], phase == "policy"
        if first >= total:
            continue
        yield Event("phase", phase, first, total)
        if phase == "critic" and agent.critic.uses_next_actions:
            yield Event("next_actions", phase, first, total)
        renew_every = config.renew_every if policy and agent.renews else 0
        evaluate_every = config.eval_every if policy else 0
        periods = config.log_every, config.checkpoint_every, renew_every, evaluate_every
        for start, stop in segments(first, total, *periods):
            if start and evaluate_every and start % evaluate_every == 0:
                yield Event("evaluate", phase, start, start)
            if policy and (start == 0 or (renew_every and start % renew_every == 0)):
                yield Event("renew", phase, start, start)
            elif policy and start == first:
                yield Event("restore", phase, start, start)
            yield Event("chunk", phase, start, stop)
            if stop % config.checkpoint_every == 0 or stop == total:
                yield Event("save", phase, stop, stop)


def chunk_lengths(agent: Agent) -> dict[str, set[int]]:
    """Lengths of the chunks that each phase of a whole run is cut into."""
    found: dict[str, set[int]] = {phase: set() for phase in PHASES}
    for event in events(agent, dict.fromkeys(PHASES, 0)):
        if event.kind == "chunk":
            found[event.phase].add(event.stop - event.start)
    return found


class Trainer:
    """One agent on one dataset for several seeds.

    Args:
      config: a configuration.
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
        num_rows = data.size if num_rows is None else num_rows
        for phase in PHASES:
            size = config.of_phase("batch_size", phase)
            name = f"{phase}_batch_size" if getattr(config, f"{phase}_batch_size") else "batch_size"
            if size > num_rows:
                raise ValueError(
                    f"{name}: expected at most the {num_rows} transitions of the dataset; "
                    f"got {size}"
                )
            check_divides(name, size, self.layout.num_shards, "devices")
        part = self.layout.host_rows(num_rows)
        if data.size != part.stop - part.start:
            raise ValueError(
                f"data: expected the {part.stop - part.start} of {num_rows} transitions "
                f"that are this host's; got {data.size}"
            )
        for name, alone in (("n_step", 1), ("guard", 0)):
            if getattr(config, name) > alone and data.size != num_rows:
                raise ValueError(
                    f"{name}: expected {alone} where each host holds a part of the data; "
                    f"got {getattr(config, name)}; with parallel=seeds every host holds all of it"
                )
        sizes = data.observations.shape[1], data.actions.shape[1]
        self.programs = Programs(config, self.layout, num_rows, *sizes)
        self.agent = self.programs.agent
        self.keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        self._device_keys = self.layout.put_seeds(self.keys)
        targets = n_step(data, config.n_step, config.discount)
        rows = Batch._make((data.observations, data.actions, *targets, None, None))
        self.data = self.programs.store(self.layout.put_rows(rows))
        # Of the guard: what it is fitted to, and then its models.
        self._transitions = data if self.agent.guarded else None
        self._models: guard.Models | None = None
        # Compiled once a run, at their first use.
        self._chunks: dict[tuple[str, int], Callable] = {}

    def init_state(self) -> State:
        """Fresh states of all seeds, with a leading seed axis."""
        return jax.jit(jax.vmap(self.agent.init))(self.keys)

    def run(self, state: State, hooks: Hooks) -> State:
        """Train from ``state`` to the end of the last phase.

        Args:
          state: from :meth:`init_state` or a checkpoint, leading seed axis.
          hooks: told of everything on the way; on several hosts, on each of them.

        Returns:
          The final state, leading seed axis.

        Raises:
          NonFiniteLossError: at the first loss that is not finite, before it is saved.
          StoppedError: when a hook asked to stop; the state has been given to ``on_checkpoint``.
        """
        get, pipe = self.layout.get_seeds, MetricsPipe(hooks.on_metrics, self.layout.get_seeds)
        done = {phase: int(getattr(state, phase).step[0]) for phase in PHASES}
        state, data = self.layout.put_seeds(state), self.data

        def report(title: str, done: int, total: int) -> None:
            hooks.on_table(title, done, total)
            if hooks.stop_requested():
                raise StoppedError

        try:
            for kind, phase, start, stop in events(self.agent, done):
                if kind != "chunk":
                    pipe.drain()  # a loss that is not finite must stop the run before it is saved
                if kind == "phase":
                    data = self.data  # without the tables of the phase before
                    hooks.on_phase(phase, start, stop)
                    if phase == "policy" and start == 0:
                        state = self.programs.begin_policy(state)
                elif kind == "next_actions":
                    data = with_tables(data, self.next_actions(state, report), None)
                elif kind == "evaluate":
                    hooks.on_evaluate(start, get(state.params()))
                elif kind in ("renew", "restore"):
                    if self._transitions is not None and self._models is None:
                        told = functools.partial(report, "models")
                        self._models = guard.fit(self.config, self._transitions, told)
                    if kind == "renew":
                        state = state.replace(
                            renewed_params=self.programs.copy(state.policy.average)
                        )
                    data = self.data  # without the table's memory, for the next one
                    support, step, summary = self.renew(state, start, report)
                    data, support = with_tables(data, None, support), None
                    hooks.on_renewal(step, jax.tree.map(np.asarray, get(summary)))
                elif kind == "chunk":
                    trained = self._train(phase, start, stop, state, data, pipe)
                    state = state.replace(**{phase: trained})
                    # Before a stop, because a run that goes on from here has left the table.
                    if phase == "policy" and self._ends_table(stop):
                        state, summary = self._guard(get(state))
                        hooks.on_guard(stop, summary)
                    if hooks.stop_requested():
                        raise StoppedError
                else:
                    hooks.on_checkpoint(get(state))
        except StoppedError:
            pipe.drain()
            hooks.on_checkpoint(get(state))
            raise
        return get(state)

    def next_actions(self, state: State, report: Report | None = None) -> Array:
        """Behavior actions at every next state; all as it lies on the devices."""
        told = functools.partial(report, "next_actions") if report else None
        inputs = state.params(), self._device_keys, 0, self.data
        rows = self.programs.next_actions.fill(*inputs, told)
        return self.programs.store_table(rows)

    def renew(
        self, state: State, start: int = 0, report: Report | None = None
    ) -> tuple[Any, int, dict[str, Array]]:
        """The agent's table by ``state.renewed_params``, its renewal's step, and its summary."""
        renewal = start // self.config.renew_every if self.agent.renews else 0
        told = functools.partial(report, f"support set {renewal + 1}") if report else None
        params = state.params(renewed=True)
        rows = self.programs.support.fill(params, self._device_keys, renewal, self.data, told)
        table, summary = self.programs.weigh(rows)
        return table, renewal * self.config.renew_every, summary

    def _guard(self, state: State) -> tuple[State, dict[str, np.ndarray]]:
        """The state on the devices, and decisions ``[K]``; ``state`` has a leading seed axis."""
        if self._models is None:
            raise RuntimeError("the guard's models are fitted before its first table; got none")
        found = []
        for i, key in enumerate(self.keys):
            key = jax.random.fold_in(jax.random.fold_in(key, Purpose.GUARD), state.policy.step[i])
            policies = state.params(), state.params(renewed=True)
            new, old = jax.tree.map(lambda x, i=i: x[i], policies)
            found.append(guard.judge(self.agent, self._models, new, old, key))
        summary = jax.tree.map(lambda *values: np.stack(values), *found)
        stays = summary["accepted"] > 0

        def chosen(new: Array, old: Array) -> Array:
            return jnp.where(stays.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        policy = state.policy.replace(
            params=jax.tree.map(chosen, state.policy.params, state.renewed_params),
            average=jax.tree.map(chosen, state.policy.average, state.renewed_params),
        )
        return self.layout.put_seeds(state.replace(policy=policy)), summary

    def _ends_table(self, step: int) -> bool:
        """Whether the guard judges at a policy step."""
        total, every = self.agent.phase_steps["policy"], self.config.renew_every
        return self.agent.guarded and (step % every == 0 or step == total)

    def _train(
        self,
        phase: str,
        start: int,
        stop: int,
        state: State,
        data: Batch | TiledData,
        pipe: MetricsPipe,
    ) -> TrainState:
        """The state of a phase after a chunk; in a method, because no local may keep a table."""
        steps, inputs = stop - start, (getattr(state, phase), self._device_keys, data)
        if (phase, steps) not in self._chunks:
            self._chunks[phase, steps] = compile_ahead(self.programs.chunk(phase, steps), *inputs)
        chunk = functools.partial(self._chunks[phase, steps], *inputs)
        return pipe.run(phase, start, stop, chunk)
