"""How training scales: seeds in one program, and devices.

Seeds: a step of S seeds at once, as a share of S steps of one seed.  Below 1, a seed costs less
beside others than alone.

Devices: a step on D virtual devices of the processor, each D in a process of its own, against a
step on one of these devices that does the same work, timed in turns.  Virtual devices share this
machine's cores, so they make nothing faster: the ratio is 1 if splitting and all-reduces cost
nothing.  What a step of two devices sends is counted in its program.
"""

import itertools
import json
import math
import os
import re
import sys
from typing import Any, NamedTuple

import jax

from efm_jax.rl.config import QIPOConfig
from efm_jax.training.parallel import Layout
from experiments.systems.benchmarks.timing import Rows, Tables, in_turns, measured_apart
from experiments.systems.benchmarks.workload import Workload

# Of one call on several devices: where there are more of them than cores, each of a step's
# all-reduces waits for the scheduler.
_MOST_STEPS = 20


class Sizes(NamedTuple):
    """How much is computed."""

    phases: tuple[str, ...] = ("behavior", "policy")
    sending: tuple[str, ...] = ("behavior", "critic", "policy")
    seeds: tuple[int, ...] = (1, 2, 4, 8, 16)
    widths: tuple[int, ...] = (64, 256)
    batch: int = 256
    rows: int = 10_000  # of the dataset
    devices: tuple[int, ...] = (1, 2, 4, 8)
    # Name, mode, batch and seeds: in weak scaling of each device, else of all together.
    cases: tuple[tuple[str, str, int, int], ...] = (
        ("weak, data", "data", 256, 1),
        ("strong, data", "data", 1024, 1),
        ("strong, seeds", "seeds", 256, 8),
    )
    seconds: float = 0.5  # of the clock, for each alternative


_ONE, _CASE = ("behavior",), ("weak, data", "data", 64, 1)
QUICK = Sizes(_ONE, _ONE, (1, 2), (64,), 64, 1024, (2,), (_CASE,), seconds=0.1)
SIZES = {
    "full": Sizes(),
    "quick": QUICK,
    "device": Sizes(("behavior", "critic", "policy"), (), (1, 2, 8, 32), (256,), devices=()),
    "smoke": QUICK._replace(devices=()),
}


def workload(width: int, batch: int, rows: int) -> Workload:
    """The default configuration with three hidden layers of a width."""
    return Workload(QIPOConfig(hidden_dims=(width,) * 3, batch_size=batch), rows)


def chunk_steps(work: Workload, phase: str, seeds: int) -> int:
    """Steps of a call: so many that its overhead is small, so few that it stays short."""
    if jax.default_backend() != "cpu":
        return 100
    states = work.config.batch_size * (work.agent.actions_per_state if phase == "policy" else 1)
    products = states * seeds * sum(n * n for n in work.config.hidden_dims)
    return max(1, min(100, 2_000_000_000 // products))


def measure_seeds(sizes: Sizes, phase: str, width: int) -> Rows:
    """What seeds together cost beside one alone."""
    work, device = workload(width, sizes.batch, sizes.rows), jax.devices()[:1]
    counts = {seeds: chunk_steps(work, phase, seeds) for seeds in sizes.seeds}
    times = in_turns({
        seeds: work.training(phase, Layout.create("data", seeds, device), count)
        for seeds, count in counts.items()
    }, sizes.seconds)  # fmt: skip
    step = {seeds: times[seeds].best / count for seeds, count in counts.items()}
    return [{
        "phase": phase, "width": width, "seeds": seeds, "ms a step": 1e3 * seconds,
        "time / of one seed": seconds / step[1],
        "time of a seed / of one alone": seconds / (seeds * step[1]),
    } for seeds, seconds in step.items()]  # fmt: skip


def measure_devices(sizes: Sizes) -> Rows:
    """The rows of this process's number of devices."""
    devices, rows = jax.device_count(), []
    phase = sizes.phases[0]  # what is all-reduced is alike in all
    for name, mode, batch, seeds in sizes.cases:
        shares = devices if name.startswith("weak") else 1
        together, alone = (workload(64, n * batch, sizes.rows) for n in (shares, 1))
        steps = min(_MOST_STEPS, chunk_steps(together, phase, seeds))
        one_device = Layout.create("data", seeds, jax.devices()[:1])
        times = in_turns({
            "together": together.training( phase, Layout.create(mode, seeds), steps),
            "alone": alone.training( phase, one_device, steps),
        }, sizes.seconds)  # fmt: skip
        same_work = shares * times["alone"].best
        rows.append({
            "phase": phase, "scaling": name, "devices": devices,
            "batch": together.config.batch_size, "seeds": seeds,
            "ms a step": 1e3 * times["together"].best / steps,
            "time / of one device for the same work": times["together"].best / same_work,
        })  # fmt: skip
    return rows


def count_sent(work: Workload, phase: str, layout: Layout) -> dict[str, Any]:
    """What one step reduces over devices, and the all-reduces left once it is compiled."""
    mapped, inputs = work.chunk(phase, layout, 1)
    lowered, found = mapped.lower(*inputs), []
    for result in re.findall(r"= (.*) all-reduce\(", lowered.compiler_ir("hlo").as_hlo_text()):
        for bits, sizes in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", result):
            found.append(int(bits) // 8 * math.prod(int(n) for n in sizes.split(",") if n))
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs[0].params)) // layout.num_shards
    return {
        "phase": phase, "gradients, bytes": gradients, "besides, bytes": sum(found) - gradients,
        "reduced arrays": len(found),
        "all-reduces": len(re.findall(r" all-reduce(?:-start)?\(", lowered.compile().as_text())),
    }  # fmt: skip


def run(sizes: Sizes) -> Tables:
    """All tables."""
    for phase, width in itertools.product(sizes.phases, sizes.widths):
        yield f"Seeds in one program, batch {sizes.batch}", measure_seeds(sizes, phase, width)
    cores = len(os.sched_getaffinity(0))
    for count in sizes.devices:  # after the flags that the user has set
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        environment = {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
        quick = ["--quick"] * (sizes is QUICK)
        devices, sent = measured_apart(__spec__.name, *quick, **environment)
        yield f"Virtual devices on {cores} cores (1 is parity of work), width 64", devices
        yield "What a step of two devices reduces, width 64", sent


def main() -> None:
    """Measure in a process with virtual devices, and print JSON."""
    sizes = QUICK if "--quick" in sys.argv else Sizes()
    sent, work = [], workload(64, sizes.batch, sizes.rows)
    if jax.device_count() == 2:
        sent = [count_sent(work, phase, Layout.create()) for phase in sizes.sending]
    print(json.dumps([measure_devices(sizes), sent]))


if __name__ == "__main__":
    main()
