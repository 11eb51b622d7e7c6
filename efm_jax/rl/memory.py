"""What a run keeps in a device's memory, counted before it starts."""

import math
import os
from typing import Any, NamedTuple

import jax

from efm_jax.rl import guard
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.programs import Programs
from efm_jax.training.parallel import Layout


class Memory(NamedTuple):
    """Bytes on each device, without the intermediate results of a compiled step."""

    dataset: int
    tables: int  # the larger of next actions (critic phase) and the policy's table (policy phase)
    state: (
        int  # parameters, averages and optimizers of all three models, of every seed on the device
    )
    guard: int = 0  # on the first device: what its models are fitted to, and they

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(n)}" for name, n in self._asdict().items() if n)
        return f"{_size(self.total)} ({parts})"


def predict(
    config: QIPOConfig, layout: Layout, num_rows: int, observation_size: int, action_size: int
) -> Memory:
    """Memory of a run on ``num_rows`` transitions in all, as its devices lay it out."""
    programs = Programs(config, layout, num_rows, observation_size, action_size)
    seeds, devices = layout.seeds_per_device, len(layout.local_devices)
    tables = 0
    for phase in ("critic", "policy"):
        rows, data = programs.shapes(phase)[2], programs.on_devices(phase)[2]
        table = seeds * _bytes((rows.next_actions, rows.support))
        if not layout.on_cpu:  # there is one in either form while it is being finished
            table += _bytes((data.next_actions, data.support)) // devices
        tables = max(tables, table)
    state, _, data = programs.on_devices()
    fits = guard.programs(programs.agent, num_rows) if programs.agent.guarded else {}
    models = max((_bytes(inputs) for steps, _, inputs in fits.values() if steps), default=0)
    return Memory(_bytes(data) // devices, tables, _bytes(state) // devices, models)


def _bytes(tree: Any) -> int:
    shapes = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)


def device_limit(layout: Layout) -> int | None:
    """Bytes of one device's memory, None where it is not known.

    Devices that are the host's processor share its memory.
    """
    device = layout.local_devices[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(layout.local_devices)
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # it is only described
        return None


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
        "guard": "guard=0, or max_transitions",
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
