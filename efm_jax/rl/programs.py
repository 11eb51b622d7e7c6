"""The compiled programs of a run, which need neither data nor devices but only their shapes.

The trainer calls them; ``launch.train --compile_only`` and ``experiments.systems.compile`` compile
the very same ones, for machines that are not here too.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from efm_jax.rl import guard
from efm_jax.rl.agents import make_agent
from efm_jax.rl.agents.agent import Purpose, State, acting_inputs, play
from efm_jax.rl.batch import Batch, Table, TiledData, TiledRows, with_tables
from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.training.parallel import Layout
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk, steps_ahead

# Support actions that one device samples at once: they bound its memory, whatever M is.
_TABLE_ACTIONS = 65_536


class Program(NamedTuple):
    """What :meth:`Layout.map` returned, and the shapes of its inputs on this host's devices."""

    mapped: Any
    inputs: tuple

    def lower(self) -> Any:
        """Trace and lower, to be compiled."""
        return self.mapped.lower(*self.inputs)

    @property
    def has_dataset(self) -> bool:
        """Whether it is given the dataset, which is on the devices beside it otherwise."""
        return any(isinstance(part, (Batch, TiledData)) for part in self.inputs)


class Programs:
    """Everything that one agent's training computes on devices.

    Args:
      config: a configuration.
      layout: how seeds and data lie on the devices.
      num_rows: transitions of the whole dataset.
      observation_size: ``S``.
      action_size: ``A``.

    Raises:
      ValueError: a name in the configuration that is in no registry.
    """

    def __init__(
        self,
        config: QIPOConfig,
        layout: Layout,
        num_rows: int,
        observation_size: int,
        action_size: int,
    ):
        self.config, self.layout, self.num_rows = config, layout, num_rows
        self.agent = agent = make_agent(config, observation_size, action_size)
        block = table_block(config, layout, num_rows)
        self.next_actions = Table(layout, agent.next_actions, num_rows, block)
        self.support = Table(layout, agent.support_rows, num_rows, block)
        # On an accelerator the finished table has another shape.
        self.weigh = layout.map(self._weigh, donate=(0,) if layout.on_cpu else ())
        self.begin_policy = layout.map(agent.begin_policy, donate=(0,))
        self._tile_data = layout.map_devices(TiledData.from_rows)
        self._tile_table = layout.map(self._table)
        # A copy, because chunks reuse the buffers of what they are given.
        self.copy = layout.map(lambda tree: jax.tree.map(jnp.copy, tree))

    def store(self, rows: Batch) -> Batch | TiledData:
        """The dataset as steps read it, from rows on the devices."""
        return rows if self.layout.on_cpu else self._tile_data(rows)

    def store_table(self, rows: Any) -> Any:
        """A table as steps read it; that of the agent comes so from :attr:`weigh`."""
        return rows if self.layout.on_cpu else self._tile_table(rows)

    def _weigh(self, support: Any) -> tuple[Any, dict[str, Array]]:
        table, summary = self.agent.weigh(support, self.layout.axis_name)
        return self._table(table), summary

    def _table(self, rows: Any) -> Any:
        """A table as steps read it."""
        return rows if self.layout.on_cpu else jax.tree.map(TiledRows.from_rows, rows)

    def chunk(self, phase: str, num_steps: int) -> Callable:
        """The program of many steps, ``(TrainState, keys, Batch) -> (TrainState, metrics)``."""
        axis_name, num_devices = self.layout.axis_name, self.layout.num_shards
        on_cpu = self.layout.on_cpu
        draw = functools.partial(
            self.agent.draw_batch, phase, num_devices=num_devices, axis_name=axis_name
        )
        noise = functools.partial(self.agent.draws, phase, axis_name=axis_name)
        step = self.agent.step(phase, axis_name, in_parts=on_cpu)
        ahead = 1 if on_cpu else steps_ahead(num_steps, self._drawn_numbers(phase))
        run = make_chunk(step, draw, num_steps, draws=noise, ahead=ahead, packed=not on_cpu)

        def chunk(state: TrainState, key: Array, data: Batch | TiledData) -> tuple:
            return run(state, jax.random.fold_in(key, Purpose[phase.upper()]), data)

        return self.layout.map(chunk, in_axes=(0, 0, self._data_axes), donate=(0,))

    def _drawn_numbers(self, phase: str) -> int:
        """Numbers of all seeds' batches and noise on one device."""
        _, key, data = self.shapes(phase)

        def draw(key: Array, data: Batch) -> Any:
            batch = self.agent.draw_batch(phase, key, data)
            return batch, self.agent.draws(phase, key, batch)

        drawn = jax.eval_shape(draw, key, data)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(drawn)) * self.layout.seeds_per_device
        return -(-numbers // self.layout.num_shards)

    def shapes(self, phase: str | None = None) -> tuple[State, Array, Batch]:
        """State, key and rows of one seed on one device, with the table that a phase reads."""
        agent, rows = self.agent, self.num_rows // self.layout.num_shards
        number = jax.ShapeDtypeStruct((rows,), jnp.float32)
        s, a = (number.update(shape=(rows, n)) for n in (agent.observation_size, agent.action_size))
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(agent.init, key)
        data = Batch._make((s, a, number, s, number, None, None))
        inputs = state.params(), key, 0, data, jax.ShapeDtypeStruct((rows,), jnp.int32)
        if phase == "critic" and agent.critic.uses_next_actions:
            data = data._replace(next_actions=jax.eval_shape(agent.next_actions, *inputs))
        elif phase == "policy":
            support = jax.eval_shape(agent.support_rows, *inputs)
            weigh = functools.partial(agent.weigh, axis_name=None)
            data = data._replace(support=jax.eval_shape(weigh, support)[0])
        return state, key, data

    @property
    def _data_axes(self) -> Any:
        """For ``vmap``: seeds share the dataset, but not what a seed's parameters computed."""
        if self.layout.on_cpu:
            return Batch._make((None, None, None, None, None, 0, 0))
        data = jax.eval_shape(TiledData.from_rows, with_tables(self.shapes()[2], None, None))
        shared = jax.tree.map(lambda _: None, data)
        return shared.replace(next_actions=0, support=0)

    def on_devices(self, phase: str | None = None) -> tuple[State, Array, Batch | TiledData]:
        """:meth:`shapes` as they lie on this host's devices."""
        devices, seeds = len(self.layout.local_devices), self.layout.seeds_per_device

        state, key, rows = self.shapes(phase)
        data = with_tables(rows, None, None)
        if not self.layout.on_cpu:
            data = jax.eval_shape(TiledData.from_rows, data)
        tables = jax.eval_shape(self._table, (rows.next_actions, rows.support))
        state, key, tables = _leading((state, key, tables), devices, seeds)
        return state, key, with_tables(_leading(data, devices), *tables)

    def all(
        self, chunks: dict[str, set[int]], num_episodes: int
    ) -> Iterator[tuple[str, int, Program]]:
        """Every program of a run, in order of use: its name, its steps, and itself.

        Args:
          chunks: lengths of the chunks of each phase.
          num_episodes: that an evaluation plays at once.
        """
        agent, tiled = self.agent, not self.layout.on_cpu
        if tiled:
            rows = _leading(self.shapes()[2], len(self.layout.local_devices))
            yield "dataset in tiles", 0, Program(self._tile_data, (rows,))
        for phase in PHASES:
            lengths = chunks.get(phase, set())
            state, keys, data = self.on_devices(phase)
            plain = with_tables(data, None, None)
            if lengths and phase == "critic" and agent.critic.uses_next_actions:
                for name, program in self.next_actions.programs(state.params(), keys, plain):
                    yield f"next actions, {name}", 0, Program(*program)
                if tiled:
                    rows = self.next_actions.shapes(state.params(), keys, plain)
                    yield "next actions in tiles", 0, Program(self._tile_table, (rows,))
            if lengths and phase == "policy":
                if agent.guarded:
                    for name, (steps, *one) in guard.programs(agent, self.num_rows).items():
                        yield name, steps, self._on_one(*one)
                yield "begin policy", 0, Program(self.begin_policy, (state,))
                yield "copy of the policy", 0, Program(self.copy, (state.policy.average,))
                if data.support is not None:
                    for name, program in self.support.programs(state.params(), keys, plain):
                        yield f"support sets, {name}", 0, Program(*program)
                    rows = self.support.shapes(state.params(), keys, plain)
                    yield "support sets, weigh", 0, Program(self.weigh, (rows,))
            for steps in sorted(lengths):
                inputs = getattr(state, phase), keys, data
                yield f"{phase}, {steps} steps", steps, Program(self.chunk(phase, steps), inputs)
        yield f"acting, {num_episodes} episodes", 0, self.acting(num_episodes)

    def acting(self, num_episodes: int) -> Program:
        """What an evaluation calls in every step of the environment, on one device."""
        state, key, _ = self.shapes()
        inputs = acting_inputs(self.agent, state.params(), key, self.layout.num_seeds, num_episodes)
        return self._on_one(play, (self.agent, "policy", *inputs))

    def _on_one(self, function: Any, inputs: tuple) -> Program:
        """The program of a jitted function on the first device."""
        place = jax.sharding.SingleDeviceSharding(self.layout.devices[0])

        def placed(leaf: Any) -> Any:
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            return leaf.update(sharding=place) if is_shape else leaf

        return Program(function, jax.tree.map(placed, inputs))


def _leading(tree: Any, *sizes: int) -> Any:
    """Shapes with leading axes."""
    return jax.tree.map(lambda leaf: leaf.update(shape=(*sizes, *leaf.shape)), tree)


def table_block(config: QIPOConfig, layout: Layout, num_rows: int) -> int:
    """Rows of a table that a device computes at once."""
    return min(max(_TABLE_ACTIONS // config.support_size, 1), num_rows // layout.num_shards)
