"""How training scales: seeds in one program, and devices.

Seeds: a step of S seeds at once, as a share of S steps of one seed.  Below 1, a seed costs less
  beside others
than alone.

Devices: a step on D virtual devices of the processor, each D in a process of its own, against a
  step on one
of these devices, timed in turns.  Virtual devices share this machine's cores, so they make nothing
faster. What can be seen is parity of work: the time of D devices over that of one device that does
the same work is 1 if splitting costs nothing, and what it is above 1 are splitting and all-reduces.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efm_jax.rl.config import QIPOConfig
from efm_jax.training.parallel import Layout, compile_ahead
from efm_jax.training.step import make_chunk
from efm_jax.types import Array
from experiments.systems.benchmarks.timing import in_turns
from experiments.systems.scaling import Workload, build

Rows = list[dict[str, Any]]

# Of one call on several devices: where there are more of them than cores, each of a step's
# all-reduces waits for the scheduler.
_MOST_STEPS = 20
PHASES = {
    "behavior": "behavior",
    "policy": "policy full",
}  # the table's name: that of experiments.systems.scaling


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    phases: tuple[str, ...] = ("behavior", "policy")
    seeds: tuple[int, ...] = (1, 2, 4, 8, 16)
    widths: tuple[int, ...] = (64, 256)
    batch: int = 256
    rows: int = 10_000  # of the dataset
    devices: tuple[int, ...] = (1, 2, 4, 8)
    weak_batch: int = 256  # of each device
    strong_batch: int = 1024  # of all devices together
    strong_seeds: int = 8  # of all devices together
    kinds: tuple[str, ...] = ("weak, data", "strong, data", "strong, seeds")
    seconds: float = 0.5  # of the clock, for each alternative


QUICK = Sizes(("behavior",), (1, 2), (64,), 64, 1024, (2,), 64, 128, 2, ("weak, data",), 0.1)


def workload(width: int, rows: int) -> Workload:
    """The default configuration with three hidden layers of a width, on data like HalfCheetah's."""
    return Workload(QIPOConfig(hidden_dims=(width,) * 3), 17, 6, rows)


def _filled(tree: Any, *leading: int) -> Any:
    """Arrays of the shapes of a tree, with leading axes."""
    return jax.tree.map(lambda leaf: jnp.full((*leading, *leaf.shape), 0.01, leaf.dtype), tree)


def _chunk_steps(work: Workload, phase: str, batch: int, seeds: int) -> int:
    """Steps of one call: enough that a call's overhead is small, few enough that a call stays short."""
    states = batch * (work.config.support_size + 1 if phase == "policy" else 1)
    products = states * seeds * sum(n * n for n in work.config.hidden_dims)
    return max(1, min(100, 2_000_000_000 // products))


def seed_call(work: Workload, phase: str, batch: int, seeds: int) -> tuple[Callable[[], Any], int]:
    """A call that trains ``seeds`` seeds in one program on one device, and the steps that it makes."""
    step, draw, shapes, tables = build(work, PHASES[phase], batch, work.rows, in_parts=True)
    count = _chunk_steps(work, phase, batch, seeds)
    run = jax.jit(jax.vmap(make_chunk(step, draw, count), (0, 0, None)))
    inputs = (_filled(shapes, seeds), jax.random.split(jax.random.key(0), seeds), _filled(tables))
    return functools.partial(run.lower(*inputs).compile(), *inputs), count


def measure_seeds(sizes: Sizes) -> Rows:
    """What a seed costs as a share of a lone one."""
    rows = []
    for phase, width in itertools.product(sizes.phases, sizes.widths):
        work = workload(width, sizes.rows)
        calls = {seeds: seed_call(work, phase, sizes.batch, seeds) for seeds in sizes.seeds}
        times = in_turns({str(seeds): call for seeds, (call, _) in calls.items()}, sizes.seconds)
        step = {seeds: times[str(seeds)].best / count for seeds, (_, count) in calls.items()}
        for seeds, seconds in step.items():
            share = seconds / (seeds * step[1])
            rows.append(
                {
                    "phase": phase,
                    "width": width,
                    "seeds": seeds,
                    "ms a step": 1e3 * seconds,
                    "time of a seed / of one alone": share,
                }
            )
    return rows


def device_call(
    work: Workload, phase: str, batch: int, layout: Layout, steps: int
) -> Callable[[], tuple[Any, Any]]:
    """A call of ``steps`` steps of all the layout's seeds, mapped over devices as the trainer maps them."""
    step, draw, shapes, tables = build(
        work, PHASES[phase], batch, work.rows, layout.num_shards, in_parts=True
    )
    run = make_chunk(step, draw, steps)

    def chunk(state: Any, key: Array, tables: Any) -> tuple:
        return run(state, key, tables)

    inputs = (
        layout.put_seeds(_filled(shapes, layout.num_seeds)),
        layout.put_seeds(jax.random.split(jax.random.key(0), layout.num_seeds)),
        layout.put_rows(_filled(tables)),
    )
    return functools.partial(compile_ahead(layout.map(chunk, shared=(2,)), *inputs), *inputs)


def _cases(sizes: Sizes, devices: int) -> list[tuple[str, str, int, int, int, int]]:
    """Kinds of scaling: name, mode, batch and seeds of all devices; batch and seeds of the one
    device.

    The one device of weak scaling makes a step of its share, which D devices do D times.
    """
    weak, strong, seeds = sizes.weak_batch, sizes.strong_batch, sizes.strong_seeds
    cases = [
        ("weak, data", "data", weak * devices, 1, weak, 1),
        ("strong, data", "data", strong, 1, strong, 1),
        ("strong, seeds", "seeds", weak, seeds, weak, seeds),
    ]
    return [case for case in cases if case[0] in sizes.kinds]


def measure_devices(sizes: Sizes) -> Rows:
    """The rows of this process's number of devices."""
    devices, rows, work = jax.device_count(), [], workload(64, sizes.rows)
    phase = sizes.phases[0]  # what is all-reduced is alike in all
    for case in _cases(sizes, devices):
        name, mode, batch, seeds, one_batch, one_seeds = case
        steps = min(_MOST_STEPS, _chunk_steps(work, phase, batch, seeds))
        together = Layout.create(mode, seeds)
        alone = Layout.create(mode, one_seeds, jax.devices()[:1])
        calls = {
            "together": device_call(work, phase, batch, together, steps),
            "alone": device_call(work, phase, one_batch, alone, steps),
        }
        times = in_turns(calls, sizes.seconds)
        work_alone = times["alone"].best * batch * seeds / (one_batch * one_seeds)
        rows.append(
            {
                "phase": phase,
                "scaling": name,
                "devices": devices,
                "batch": batch,
                "seeds": seeds,
                "ms a step": 1e3 * times["together"].best / steps,
                "time / of one device for the same work": times["together"].best / work_alone,
            }
        )
    return rows


def on_virtual_devices(devices: int, quick: bool) -> Rows:
    """:func:`measure_devices` in a process with that many devices, after the flags that the user
    has set.

    Raises:
      RuntimeError: with the end of the process's messages, if it fails.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", __spec__.name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{devices} virtual devices: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool) -> dict[str, Rows]:
    """Both tables."""
    sizes = QUICK if quick else Sizes()
    devices = [row for count in sizes.devices for row in on_virtual_devices(count, quick)]
    devices.sort(key=lambda row: (row["phase"], row["scaling"]))
    cores = len(os.sched_getaffinity(0))
    return {
        f"Seeds in one program, batch {sizes.batch}": measure_seeds(sizes),
        f"Virtual devices, which share this machine's {cores} cores (1 is parity of work), width 64": devices,
    }


def main() -> None:
    """Of a process with virtual devices: measure, and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    print(json.dumps(measure_devices(QUICK if parser.parse_args().quick else Sizes())))


if __name__ == "__main__":
    main()
