"""The training steps that are timed: the library's own, on numbers that mean nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax.rl.agents import Agent, make_agent
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.programs import Programs
from efm_jax.rl.trainer import Trainer
from efm_jax.solvers import SOLVERS
from efm_jax.training.parallel import Layout, compile_ahead
from efm_jax.training.state import TrainState
from efm_jax.types import Params, Transitions


@dataclasses.dataclass(frozen=True)
class Workload:
    """A configuration with the sizes of its data."""

    config: QIPOConfig
    rows: int
    observation_size: int = 17  # HalfCheetah's
    action_size: int = 6

    @functools.cached_property
    def agent(self) -> Agent:
        return make_agent(self.config, self.observation_size, self.action_size)

    def transitions(self) -> Transitions:
        """Normal numbers; terminations do not matter."""
        random = np.random.default_rng(0)
        sizes = (self.observation_size,), (self.action_size,), (), (self.observation_size,)
        s, a, r, t = (random.standard_normal((self.rows, *n), np.float32) for n in sizes)
        return Transitions(s, np.tanh(a), r, t, np.zeros(self.rows, np.float32))

    def trainer(self, layout: Layout) -> Trainer:
        """A trainer of as many seeds as the layout has."""
        return Trainer(self.config, self.transitions(), range(layout.num_seeds), layout)

    def programs(self, layout: Layout) -> Programs:
        """The programs of a run."""
        return Programs(self.config, layout, self.rows, self.observation_size, self.action_size)

    def shapes(self, phase: str, rows: int) -> tuple[TrainState, Batch]:
        """Shapes of a phase's state, and of data with the table that the phase reads."""
        work = dataclasses.replace(self, rows=rows)
        layout = Layout.create(devices=jax.devices()[:1])
        state, _, data = work.programs(layout).shapes(phase)
        return getattr(state, phase), data

    def one_step(self, phase: str, state: TrainState, data: Batch, *, in_parts: bool) -> tuple:
        """One step of the training scan, with the drawing of its batch."""
        batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), state.step))
        batch = self.agent.draw_batch(phase, batch_key, data)
        return self.agent.step(phase, in_parts=in_parts)(state, loss_key, batch)

    def chunk(self, phase: str, layout: Layout, steps: int) -> tuple[Callable, tuple]:
        """What the trainer maps over devices for many steps, and arguments of their sizes."""
        programs = self.programs(layout)
        state, _, data = programs.on_devices(phase)
        place = layout.map_devices(lambda tree: tree)
        state, data = place(filled((getattr(state, phase), data)))
        keys = layout.put_seeds(jax.random.split(jax.random.key(0), layout.num_seeds))
        return programs.chunk(phase, steps), (state, keys, data)

    def training(self, phase: str, layout: Layout, steps: int) -> Callable[[], Any]:
        """A call that goes on training all the layout's seeds, as the trainer does it."""
        mapped, (state, keys, data) = self.chunk(phase, layout, steps)
        program = compile_ahead(mapped, state, keys, data)

        def call() -> Any:
            nonlocal state  # its buffers are reused for the next
            state, metrics = program(state, keys, data)
            return metrics

        return call

    def dense_flops(self, params: Params, actions: int = 1, *, train: bool = True) -> float:
        """Arithmetic of the dense layers for one state, ``2 n in out`` for n rows and a kernel.

        Forward and, to train, the kernel's gradient and the input's where the input is not data.  A
        state is multiplied once for all its actions.
        """
        total = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name, size_in = jax.tree_util.keystr(path), leaf.shape[-2] if leaf.ndim > 1 else 0
            if "kernel" not in name:
                continue
            first = "JointDense" in name or "embedding" in name
            once = min(self.observation_size, size_in) if first else 0  # of the state
            from_data = first or size_in == self.action_size
            rows = once + (size_in - once) * actions
            total += 2 * rows * (leaf.size // size_in) * (1 if not train else 2 if from_data else 3)
        return total

    def dense_of_step(self, phase: str) -> float:
        """:func:`dense_flops` of a step, for one state of the batch."""
        flops = functools.partial(self.dense_flops, self.shapes(phase, 1)[0].params)
        if phase != "critic":
            return flops(self.agent.actions_per_state if phase == "policy" else 1)
        actions = self.config.support_size if self.agent.critic.uses_next_actions else 1
        return flops() + flops(actions, train=False)

    def dense_of_renewal(self, rows: int) -> float:
        """:func:`dense_flops` of support sets, and of the values that their weights need."""
        policy, critic = (self.shapes(phase, 1)[0].params for phase in ("policy", "critic"))
        model, flops = self.agent.model, functools.partial(self.dense_flops, train=False)
        drawn = stages(model.solver) * model.sample_steps * flops(policy, self.config.support_size)
        # The ensemble's bound is of the advantage.
        values = flops(critic["v"]) if self.config.critic == "ensemble" else 0
        return rows * (drawn + flops(critic["q"], self.config.support_size + 1) + values)


def filled(tree: Any, *leading: int) -> Any:
    """Arrays of a tree's shapes, with leading axes; 0.01, because zeros could be faster."""
    return jax.tree.map(lambda leaf: jnp.full((*leading, *leaf.shape), 0.01, leaf.dtype), tree)


def stages(solver: str) -> int:
    """Evaluations of the field in one step of a solver; DPM-Solver++ makes one."""
    return len(SOLVERS[solver].nodes) if solver in SOLVERS else 1
