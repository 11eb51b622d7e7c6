"""What a run keeps in a device's memory, counted before it starts."""

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efm_jax.rl import guard
from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.programs import Programs
from efm_jax.training.parallel import Layout


class Memory(NamedTuple):
    """Bytes on each device at the most."""

    dataset: int
    tables: int  # the larger of next actions (critic phase) and the policy's table (policy phase)
    state: (
        int  # parameters, averages and optimizers of all three models, of every seed on the device
    )
    work: int = 0  # activations, or the guard's rows and models, as far as they exceed a table

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
    tiled = layout.devices[0].platform == "tpu"
    state, _, data = programs.on_devices()
    fits = guard.programs(programs.agent, num_rows) if programs.agent.guarded else {}
    most = [
        _bytes(inputs, tiled=tiled) + (_copied(inputs[-1]) if tiled else 0)
        for steps, _, inputs in fits.values()
        if steps
    ]
    tables = 0
    for phase in PHASES:
        found, rows = programs.on_devices(phase)[2], programs.shapes(phase)[2]
        table = seeds * _bytes((rows.next_actions, rows.support))
        if layout.on_cpu:
            tables = max(tables, table)
            continue
        finished = _bytes((found.next_actions, found.support)) // devices
        tables = max(tables, table + finished)  # in either form while it is being finished
        most.append(finished + seeds * _activations(programs, phase))
    if not layout.on_cpu:
        most.append(_bytes(programs.shapes()[2], tiled=tiled))  # the dataset before it is stored
    work = max(0, *most, tables) - tables
    return Memory(_bytes(data) // devices, tables, _bytes(state) // devices, work)


def _activations(programs: Programs, phase: str) -> int:
    """Bytes of a step of one seed: an output of every kernel for every sample.

    Layers of states, which are computed once for all their actions, stand for what the backward
    pass holds besides; so compilers come within 15% for large batches (docs/compiled.md).
    """
    agent, config = programs.agent, programs.config
    samples = config.of_phase("batch_size", phase) // programs.layout.num_shards
    samples *= agent.actions_per_state if phase == "policy" else 1
    kernels = jax.tree.leaves(getattr(programs.shapes()[0], phase).params)
    outputs = sum(leaf.size // leaf.shape[-2] for leaf in kernels if leaf.ndim > 1)
    size = 4 if phase == "critic" else jnp.dtype(config.dtype).itemsize
    return samples * outputs * size


def _bytes(tree: Any, *, tiled: bool = False) -> int:
    """Bytes of shapes; ``tiled``: as a TPU pads arrays whose layout is its own choice."""
    shapes = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct))
    return sum((_padded if tiled else math.prod)(x.shape) * x.dtype.itemsize for x in shapes)


def _copied(rows: tuple[jax.ShapeDtypeStruct, ...]) -> int:
    """Bytes that a TPU copies a table to before a loop that gathers its rows: 128 numbers each."""
    wide = [x for x in rows if len(x.shape) == 2]
    return sum(length * (n + -n % 128) * x.dtype.itemsize for x in wide for length, n in [x.shape])


def _padded(shape: tuple[int, ...]) -> int:
    """Numbers in tiles of 8 x 128: the longest axis in lanes, and the rows that waste least."""
    *rows, lanes = sorted(shape) or [1]
    count = math.prod(rows)
    least = min((count // n * (n + -n % 8) for n in rows), default=1)
    return (lanes + -lanes % 128) * (count if 1 in rows else least)


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
        "work": "batch_size, or max_transitions where there is a guard, or more devices",
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
