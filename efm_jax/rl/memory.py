"""What a run keeps in a device's memory, counted before it starts."""

import math
import os
from typing import NamedTuple

import jax
import numpy as np

from efm_jax.rl.agents import make_agent
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.training.parallel import Layout

_FLOAT = 4  # bytes


class Memory(NamedTuple):
    """Bytes on each device, without the intermediate results of a compiled step."""

    dataset: int
    tables: int  # the larger of next actions (critic phase) and the policy's table (policy phase)
    state: (
        int  # parameters, averages and optimizers of all three models, of every seed on the device
    )

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(value)}" for name, value in self._asdict().items())
        return f"{_size(self.total)} ({parts})"


def predict(
    config: QIPOConfig, layout: Layout, num_rows: int, observation_size: int, action_size: int
) -> Memory:
    """Memory of a run on ``num_rows`` transitions in all."""
    rows, seeds, m = num_rows // layout.num_shards, layout.seeds_per_device, config.support_size
    agent = make_agent(config, observation_size, action_size)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    sizes = (observation_size, action_size, None, observation_size, None)  # None: a number
    shapes = [(1,) if size is None else (1, size) for size in sizes]
    row = Batch._make([*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes), None, None])
    inputs = jax.random.key(0), 0, row, np.zeros(1, np.int32)
    table = jax.eval_shape(agent.support_rows, state.params(), *inputs)
    table_size = sum(math.prod(x.shape) for x in jax.tree.leaves(table))
    next_actions = m * action_size if agent.critic.uses_next_actions else 0
    return Memory(
        dataset=rows * (2 * observation_size + action_size + 2) * _FLOAT,
        tables=rows * seeds * max(table_size, next_actions) * _FLOAT,
        state=seeds * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)),
    )


def device_limit(layout: Layout) -> int | None:
    """Bytes of one device's memory, None where it is not known.

    Devices that are the host's processor share its memory.
    """
    device = layout.local_devices[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(layout.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def check_fits(memory: Memory, limit: int | None, layout: Layout) -> None:
    """Refuse a run that does not fit.

    Raises:
      ValueError: with the sizes, and the setting that makes the largest of them smaller.
    """
    if limit is None or memory.total <= limit:
        return
    split = layout.mode == "data"
    settings = {
        "dataset": "max_transitions, or more devices" if split else "parallel=data",
        "tables": "support_size or num_seeds, or more devices",
        "state": "num_seeds" if split else "num_seeds, or more devices",
    }
    largest = max(settings, key=lambda name: getattr(memory, name))
    raise ValueError(
        f"memory: a device needs {memory}, and has {_size(limit)}; change {settings[largest]}"
    )


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
