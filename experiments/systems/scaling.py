"""How training scales over devices: sizes counted in the compiled step, step times computed from
them.

data: D devices share every batch; gradients are all-reduced.  seeds: every device trains its own
  seeds on
whole batches; nothing is sent.  Times of accelerators are computed (docs/scaling.md has the
formulas and sources); the only clock that is read is this CPU's, to see how far such a model can be
trusted.

    python -m experiments.systems.scaling [--smoke] [--output=docs]

Writes scaling/predictions.csv and scaling/efficiency.png under --output, and its tables into
scaling.md there, wherever that page has ``<!-- table: name -->`` and ``<!-- end -->``.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import itertools
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from efm_jax import losses
from efm_jax.rl.algorithm import Algorithm, Tables
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.model import GenerativeModel
from efm_jax.rl.samples import Samples
from efm_jax.rl.support import WeightedSupport
from efm_jax.solvers import SOLVERS
from efm_jax.training.step import make_chunk, make_step
from experiments.configs import mujoco, qipo_ot, quick

PHASES = ("behavior", "critic", "policy full", "policy resample", "cefm")
DEVICES = tuple(2**k for k in range(9))
BATCHES = (256, 1024, 4096, 16_384, 65_536)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A configuration with the sizes of its data."""

    config: QIPOConfig
    observation_size: int
    action_size: int
    rows: int  # transitions


_UNET = dataclasses.replace(mujoco.get_config(), network="unet", hidden_dims=(512, 256, 128))
WORKLOADS = {
    "demo": Workload(qipo_ot.get_config(), 3, 1, 40_000),
    "mujoco": Workload(mujoco.get_config(), 17, 6, 1_000_000),
    "unet": Workload(_UNET, 17, 6, 1_000_000),
}
PAIR = ("H100", "TPU v5e")
SHOWN = (("demo", "policy full"), ("mujoco", "policy resample"), ("unet", "policy full"))


def _nccl_tree(devices: int) -> tuple[float, float]:
    """NCCL's own model of a tree all-reduce (src/graph/tuning.cc, LL128) over nodes of 8 GPUs."""
    nodes, per_node = -(-devices // 8), min(devices, 8)
    latency = 4.4e-6 + 2 * ((per_node - 1) * 1.2e-6 + math.log2(nodes) * 8.5e-6)
    return latency, 450e9 if nodes == 1 else 400e9


def _mesh(axes: int, link: float, devices: int) -> tuple[float, float]:
    """Reduce-scatter and all-gather along the axes of a mesh without wrap-around links, 1 us a hop."""
    power = round(math.log2(devices))
    used = min(axes, power)
    hops = sum(2 * (2 ** ((power + i) // used) - 1) for i in range(used))
    return 1e-6 * hops, link * used


@dataclasses.dataclass(frozen=True)
class Profile:
    """A kind of device and its network; the last four fields are assumptions."""

    peak: float  # operations per second on float32 matrices at JAX's default precision
    bandwidth: float  # of its memory, bytes per second
    memory: float  # bytes
    network: (
        Callable[[int], tuple[float, float]] | None
    )  # devices -> (seconds of latency, bytes per second)
    launch: float  # least seconds of an operation
    overhead: float  # seconds a step takes besides its operations
    achievable: float = 0.5  # of both peaks
    slowness: float = 1.0  # all-reduces take this times what the formula gives


PROFILES = {
    "H100": Profile(494.7e12, 3.35e12, 80e9, _nccl_tree, 2e-6, 10e-6),
    "TPU v5e": Profile(197e12, 819e9, 16e9, functools.partial(_mesh, 2, 5e10), 0.5e-6, 2e-6),
    "TPU v4": Profile(
        275e12, 1200e9, 32 * 2**30, functools.partial(_mesh, 3, 4.5e10), 0.5e-6, 2e-6
    ),
}
VARIED: dict[str, Callable[[Profile], dict]] = {
    "as assumed": lambda p: {},
    "all-reduces x 4": lambda p: {"slowness": 4.0},
    "all-reduces / 4": lambda p: {"slowness": 0.25},
    "least time of an operation x 4": lambda p: {"launch": 4 * p.launch},
    "least time of an operation / 4": lambda p: {"launch": p.launch / 4},
    "a quarter of the peaks": lambda p: {"achievable": 0.25},
    "all of the peaks": lambda p: {"achievable": 1.0},
    "memory traffic / 4": lambda p: {"bandwidth": 4 * p.bandwidth},
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one step of one phase needs; arithmetic and traffic are ``fixed + per_sample * batch``."""

    workload: str
    phase: str
    gradient_bytes: int
    state_bytes: int  # parameters, average and optimizer state
    flops_fixed: float
    flops_per_sample: float
    dense_per_sample: float  # by formula, dense layers alone
    bytes_fixed: float
    bytes_per_sample: float
    operations: int  # of the compiled step
    temporary_per_sample: float  # bytes that are held at once
    reduced_bytes: int  # of all collectives together
    rounds: int  # all-reduces left after compilation


def build(
    workload: Workload, phase: str, batch: int, rows: int, devices: int = 1, in_parts: bool = False
) -> tuple:
    """``(step, draw_batch, state, tables)``: the code that trains, and the shapes of what it works
    on.

    ``in_parts``: with large batches split, as they are on a CPU and not on an accelerator.
    """
    axis = "devices" if devices > 1 else None
    estimator = "resample" if phase == "policy resample" else "full"
    config = dataclasses.replace(workload.config, batch_size=batch, estimator=estimator)
    name = {"critic": "critic", "behavior": "behavior", "cefm": "behavior"}.get(phase, "policy")
    algorithm = Algorithm(config, workload.observation_size, workload.action_size)
    state = getattr(jax.eval_shape(lambda: algorithm.init(jax.random.key(0))), name)
    step = algorithm.step(name, axis, in_parts=in_parts)
    if phase == "cefm":  # weights over the global batch, which QIPO itself does not use

        def loss(params: Any, _: Any, key: Any, batch: Tables) -> tuple:
            data, model = batch.samples, algorithm.model
            field, energy = model.field(params, data.observations), -data.rewards
            return losses.cefm(
                field, model.path, key, data.actions, energy, config.beta, axis_name=axis
            )

        step = make_step(loss, optax.adam(config.learning_rate), axis_name=axis)
        state = state.replace(opt_state=jax.eval_shape(optax.adam(1e-3).init, state.params))

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *sizes), jnp.float32)

    s, a, m = workload.observation_size, workload.action_size, config.support_size
    samples = Samples(shape(s), shape(a), shape(), shape(s), shape())
    next_actions = shape(m, a) if name == "critic" and algorithm.critic.uses_next_actions else None
    support = WeightedSupport(shape(m + 1, a), shape(m + 1)) if name == "policy" else None
    draw = functools.partial(algorithm.draw_batch, num_devices=devices, axis_name=axis)
    return step, draw, state, Tables(samples, next_actions, support)


def one_step(step: Callable, draw: Callable, state: Any, seed: Any, tables: Tables) -> tuple:
    """The body of the training scan: XLA's cost analysis counts a loop's body once, whatever its length."""
    batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    return step(state, loss_key, draw(batch_key, tables))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def dense_flops(workload: Workload, params: Any, actions: int = 1, train: bool = True) -> float:
    """Arithmetic of the dense layers for one state: ``2 n in out`` for each product of n rows with
    a kernel.

    Forward and, to train, the kernel's gradient and the input's gradient where the input is not
    data.
    """
    states = workload.observation_size
    data = {states, workload.action_size, workload.config.time_features}
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "kernel" in jax.tree_util.keystr(path):
            size_in = leaf.shape[-2]
            rows = (
                1 if size_in == states else actions
            )  # a state is multiplied once for all its actions
            products = 1 if not train else 2 if size_in in data else 3
            total += 2 * rows * leaf.size * products
    return total


def dense_of_step(workload: Workload, phase: str) -> float:
    """``dense_flops`` of a step, for one state of the batch."""
    flops = functools.partial(dense_flops, workload, build(workload, phase, 1, 1)[2].params)
    m = workload.config.support_size
    if phase != "critic":
        return flops(m + 1 if phase == "policy full" else 1)
    return flops() + flops(m if workload.config.critic == "softmax_q" else 1, train=False)


def dense_of_renewal(workload: Workload) -> float:
    """``dense_flops`` of drawing all support sets, and of the values that their weights need."""
    policy, critic = (build(workload, phase, 1, 1)[2].params for phase in ("policy full", "critic"))
    config, flops = workload.config, functools.partial(dense_flops, workload, train=False)
    solver = GenerativeModel.from_config(config).solver
    stages = len(SOLVERS[solver].nodes) if solver in SOLVERS else 1
    drawn = stages * config.sample_steps * flops(policy, config.support_size)
    weighed = flops(critic["q"], config.support_size + 1)
    if config.critic == "ensemble":  # its bound is of the advantage
        weighed += flops(critic["v"])
    return workload.rows * (drawn + weighed)


def collectives(workload: Workload, phase: str, devices: int = 2) -> tuple[list[int], int]:
    """Bytes of every collective of the program as written, and the all-reduces left once it is compiled."""
    step, draw, *shapes = build(workload, phase, 64 * devices, 64 * devices, devices)
    mesh = jax.make_mesh((devices,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    here, split = PartitionSpec(), PartitionSpec("devices")
    body = functools.partial(one_step, step, draw)
    run = jax.shard_map(
        body, mesh=mesh, in_specs=(here, here, split), out_specs=here, check_vma=False
    )
    lowered = jax.jit(run).lower(shapes[0], 0, shapes[1])
    found = []
    for line in lowered.compiler_ir("hlo").as_hlo_text().splitlines():
        if match := re.search(r"= (.*) (all-reduce|all-gather|reduce-scatter|all-to-all)\(", line):
            shapes = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", match[1])
            found.append(
                sum(int(b) // 8 * math.prod(int(n) for n in d.split(",") if n) for b, d in shapes)
            )
    return found, len(re.findall(r" all-reduce(?:-start)?\(", lowered.compile().as_text()))


def measure_sizes(name: str, workload: Workload, phase: str) -> Sizes:
    """Compile a single step at two batch sizes and read what XLA counts."""
    batches, costs, text = (256, 1024), [], ""
    for batch in batches:
        # A table of as many rows as the batch: a gather inside a fusion counts as a read of the
        # whole table.
        step, draw, state, tables = build(workload, phase, batch, batch)
        compiled = (
            jax.jit(functools.partial(one_step, step, draw)).lower(state, 0, tables).compile()
        )
        cost, text = compiled.cost_analysis(), compiled.as_text()
        costs.append(
            [cost["flops"], cost["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes]
        )
    operations = re.findall(
        r"^ .*? = .*?([a-z][a-z\-]*)\(", text[text.index("\nENTRY") :], re.MULTILINE
    )
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy"}
    slopes = [(more - less) / (batches[1] - batches[0]) for less, more in zip(*costs, strict=True)]
    fixed = [
        max(cost - slope * batches[0], 0.0) for cost, slope in zip(costs[0], slopes, strict=True)
    ]
    reduced, rounds = collectives(workload, phase)
    return Sizes(
        workload=name,
        phase=phase,
        gradient_bytes=nbytes(state.params),
        state_bytes=nbytes(state),
        flops_fixed=fixed[0],
        flops_per_sample=slopes[0],
        dense_per_sample=dense_of_step(workload, phase),
        bytes_fixed=fixed[1],
        bytes_per_sample=slopes[1],
        operations=sum(operation not in free for operation in operations),
        temporary_per_sample=slopes[2],
        reduced_bytes=sum(reduced),
        rounds=rounds,
    )


def compute_time(size: Sizes, profile: Profile, batch: float, seeds: int = 1) -> float:
    """Seconds of ``seeds`` steps on one device in one program: the slowest of three limits."""
    flops = seeds * (size.flops_fixed + size.flops_per_sample * batch) / profile.achievable
    traffic = seeds * (size.bytes_fixed + size.bytes_per_sample * batch) / profile.achievable
    return max(flops / profile.peak, traffic / profile.bandwidth, size.operations * profile.launch)


def allreduce_time(nbytes: float, profile: Profile, devices: int, rounds: int = 1) -> float:
    """``rounds * latency(D) + 2 (D - 1) / D * bytes / bandwidth``; one device sends nothing."""
    if devices == 1:
        return 0.0
    latency, bandwidth = profile.network(devices)
    return profile.slowness * (rounds * latency + 2 * (devices - 1) / devices * nbytes / bandwidth)


def step_time(
    size: Sizes, profile: Profile, devices: int, batch: int, mode: str = "data", seeds: int = 1
) -> float:
    """Seconds of one step of all ``seeds``, each with a batch of ``batch``, on ``devices`` devices."""
    if mode == "seeds":
        return profile.overhead + compute_time(size, profile, batch, -(-seeds // devices))
    reduced = allreduce_time(seeds * size.reduced_bytes, profile, devices, size.rounds)
    return profile.overhead + compute_time(size, profile, batch / devices, seeds) + reduced


def efficiency(
    size: Sizes, profile: Profile, devices: int, batch: int, mode: str = "data", seeds: int = 1
) -> float:
    """Time of one device that does the whole job, over D times the time of D devices."""
    alone, together = (step_time(size, profile, d, batch, mode, seeds) for d in (1, devices))
    return alone / (devices * together)


def fits(
    size: Sizes, profile: Profile, devices: int, batch: int, mode: str = "data", seeds: int = 1
) -> bool:
    """Whether a step's state and temporaries, without the data, take at most 80% of a device's memory."""
    seeds, batch = (-(-seeds // devices), batch) if mode == "seeds" else (seeds, batch / devices)
    return seeds * (size.state_bytes + size.temporary_per_sample * batch) <= 0.8 * profile.memory


def stops_at(size: Sizes, profile: Profile, batch: int) -> str:
    """The first number of devices whose data-parallel efficiency is below one half."""
    return next((str(d) for d in DEVICES if efficiency(size, profile, d, batch) < 0.5), "-")


def batch_for(size: Sizes, profile: Profile, devices: int, least: float = 0.8) -> str:
    """The smallest power of two, from 256, at which data-parallel efficiency is at least ``least``."""
    batches = (2**k for k in range(8, 25))
    return next(
        (f"{b:,}" for b in batches if efficiency(size, profile, devices, b) >= least), "more"
    )


def row_bytes(workload: Workload) -> tuple[int, ...]:
    """Bytes of a transition: in the dataset, and for each seed in its support set and next actions."""
    policy, critic = (build(workload, phase, 1, 1)[3] for phase in ("policy full", "critic"))
    return nbytes(policy.samples), nbytes(policy.policy), nbytes(critic.next_actions)


def _seconds(function: Callable, *inputs: Any, repeats: int = 7) -> float:
    """The least of several calls, after one that compiles: other jobs only ever add."""
    jax.block_until_ready(function(*inputs))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        found.append(time.perf_counter() - start)
    return min(found)


def cpu_profile() -> Profile:
    """This machine: a matrix product, a pass over memory, and products too small to take time."""
    x, large = jnp.ones((1024, 1024)), jnp.ones(2**25)
    chain = functools.partial(functools.reduce, lambda y, _: y @ jnp.eye(8), range(64))
    chains = jax.jit(lambda y: jax.lax.fori_loop(0, 100, lambda _, y: chain(y), y))
    peak = 2 * 1024**3 / _seconds(jax.jit(jnp.matmul), x, x, repeats=30)
    bandwidth = 2 * nbytes(large) / _seconds(jax.jit(lambda x: 2 * x), large)
    return Profile(peak, bandwidth, 0.0, None, _seconds(chains, jnp.eye(8)) / 6400, 0.0)


def measure_step(workload: Workload, phase: str, batch: int, steps: int, seeds: int = 1) -> float:
    """Seconds of a step on this CPU, whole as on an accelerator, ``seeds`` of them in one program."""
    step, draw, shapes, tables = build(workload, phase, batch, workload.rows)
    keys = jax.random.split(jax.random.key(0), seeds)
    data = jax.tree.map(lambda leaf: jax.random.uniform(keys[0], leaf.shape), tables)
    state = jax.tree.map(lambda leaf: jnp.full((seeds, *leaf.shape), 0.01, leaf.dtype), shapes)
    run = jax.jit(jax.vmap(make_chunk(step, draw, steps), (0, 0, None)))
    return _seconds(run, state, keys, data) / steps


def measure(
    workload: Workload, sizes: list[Sizes], batches: tuple[int, ...], steps: int
) -> list[list]:
    """Step times of this CPU against the model's, and how they split: ``fixed + slope * batch``."""
    cpu, rows = cpu_profile(), []
    print(
        f"this CPU: {cpu.peak:.3g} flop/s, {cpu.bandwidth:.3g} B/s, {cpu.launch:.3g} s an operation"
    )
    for size in sizes:
        times = np.array([measure_step(workload, size.phase, batch, steps) for batch in batches])
        slope, fixed = np.polyfit(
            batches, times, 1, w=1 / times
        )  # least squares of relative errors
        row: list[Any] = [size.phase]
        for batch, seconds in zip(batches, times, strict=True):
            bare = (size.flops_fixed + size.flops_per_sample * batch) / cpu.peak
            row.append(
                f"{1e3 * seconds:.2f} ({1e3 * step_time(size, cpu, 1, batch):.2f}; "
                f"{1e3 * bare:.2f})"
            )
        row += [
            f"{1e3 * fixed:.2f} ({1e3 * size.operations * cpu.launch:.2f})",
            f"{1e6 * slope:.2f}",
        ]
        four = measure_step(workload, size.phase, batches[0], steps, seeds=4) / times[0]
        model = (step_time(size, cpu, 1, batches[0], "seeds", seeds) for seeds in (4, 1))
        rows.append([*row, f"{four:.2f} ({next(model) / next(model):.2f})"])
    return rows


def predictions(sizes: list[Sizes]) -> list[dict]:
    """The whole grid: ``data`` with one seed, ``seeds`` with one seed on every device."""
    rows = []
    grid = itertools.product(PROFILES.items(), sizes, ("data", "seeds"), BATCHES, DEVICES)
    for (name, profile), size, mode, batch, devices in grid:
        how = (size, profile, devices, batch, mode, 1 if mode == "data" else devices)
        row = {"profile": name, "workload": size.workload, "phase": size.phase, "mode": mode}
        row |= {"batch_size": batch, "devices": devices, "step_us": f"{1e6 * step_time(*how):.5g}"}
        rows.append(row | {"efficiency": f"{efficiency(*how):.4g}", "fits": int(fits(*how))})
    return rows


def make_tables(
    sizes: list[Sizes], measured: list[list], batches: tuple[int, ...]
) -> dict[str, str]:
    """The tables of the page by name, in Markdown."""

    def table(header: str, rows: Iterable[list]) -> str:
        names = header.split("; ")
        lines = [names, ["---"] * len(names), *rows]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

    def both(function: Callable[[Profile], str]) -> str:
        return " / ".join(function(PROFILES[name]) for name in PAIR)

    names = {size: f"{size.workload}, {size.phase}" for size in sizes}
    shown = [size for size in sizes if (size.workload, size.phase) in SHOWN] or sizes[:1]
    contents, sent, stops, memory, renewals, data, jobs, varied = [], [], [], [], [], [], [], []
    for s in sizes:
        row = [names[s], f"{s.gradient_bytes / 1e3:.1f}", f"{s.state_bytes / 1e3:.1f}"]
        row += [
            f"{s.flops_per_sample / 1e3:,.0f}",
            f"{100 * s.dense_per_sample / s.flops_per_sample:.1f}%",
        ]
        row += [f"{s.bytes_per_sample / 1e3:,.1f}", f"{s.bytes_fixed / 1e6:.2f}"]
        row += [f"{s.temporary_per_sample / 1e3:,.1f}", s.operations]
        contents.append([*row, f"{s.reduced_bytes - s.gradient_bytes} B", s.rounds])
        if s in shown or s.phase == "cefm":
            reduce = functools.partial(allreduce_time, s.reduced_bytes, rounds=s.rounds)
            row = [both(lambda p, r=reduce, d=d: f"{1e6 * r(p, d):.3g}") for d in (2, 8, 32, 256)]
            sent.append([names[s], f"{s.reduced_bytes:,}", *row])
        row = [names[s], *(both(lambda p, s=s, b=b: stops_at(s, p, b)) for b in BATCHES)]
        stops.append(row + [both(lambda p, s=s, d=d: batch_for(s, p, d)) for d in (8, 64, 256)])
    for key in ("demo", "mujoco"):
        work, rows = WORKLOADS[key], row_bytes(WORKLOADS[key])
        row = [key, *(f"{b} B" for b in rows), *(f"{b * work.rows / 1e6:.1f} MB" for b in rows[:2])]
        most = (0.8 * p.memory / sum(rows[:2]) for p in PROFILES.values())
        memory.append(row + [f"{n / 1e6:.0f} million" for n in most])
    for s in shown:
        flops, every = (
            dense_of_renewal(WORKLOADS[s.workload]),
            WORKLOADS[s.workload].config.renew_every,
        )
        row = [
            s.workload,
            f"{flops / 1e12:.2f}",
            both(lambda p, f=flops: f"{f / p.achievable / p.peak:.2g}"),
        ]
        row.append(both(lambda p, s=s, n=every: f"{n * step_time(s, p, 1, 256):.2g}"))
        renewals.append([*row, f"{every:,}", s.phase])
    for s, batch in itertools.product(shown, BATCHES[::2]):
        row, job = [names[s], f"{batch:,}"], [names[s], f"{batch:,}"]
        for p in (PROFILES[name] for name in PAIR):
            row.append(f"{1e6 * step_time(s, p, 1, batch):,.0f}" + "*" * (not fits(s, p, 1, batch)))
            row += [f"{100 * efficiency(s, p, d, batch):.3g}%" for d in (2, 8, 32, 256)]
            alone = step_time(s, p, 1, batch, seeds=8)
            job.append(f"{1e6 * alone:,.0f}" + "*" * (not fits(s, p, 1, batch, seeds=8)))
            job += [
                f"{alone / step_time(s, p, 8, batch, mode, 8):.2g}" for mode in ("data", "seeds")
            ]
        data.append(row)
        jobs.append(job)
    cases = list(itertools.product(shown, BATCHES[2::2]))
    for label, change in VARIED.items():
        changed = {
            name: dataclasses.replace(PROFILES[name], **change(PROFILES[name])) for name in PAIR
        }
        row = [" / ".join(stops_at(s, p, b) for p in changed.values()) for s, b in cases]
        varied.append([label, *row])
    header = "phase; gradients, kB; state, kB; kflop a sample; of it dense; traffic a sample, kB; "
    tables = {
        "sizes": table(
            header + "fixed, MB; held a sample, kB; operations; reduced besides; all-reduces",
            contents,
        )
    }
    tables["sent"] = table("phase; bytes; D = 2; 8; 32; 256", sent)
    header = "data; dataset; support set; next actions; whole dataset; whole support set; "
    tables["memory"] = table(header + "; ".join(PROFILES), memory)
    header = "data; one renewal, Tflop; its seconds; seconds of the steps until the next; steps; of"
    tables["renewal"] = table(header, renewals)
    header = "".join(f"; {name}, us; D = 2; 8; 32; 256" for name in PAIR)
    tables["data"] = table("phase; batch" + header, data)
    header = "phase" + "".join(f"; B = {b:,}" for b in BATCHES)
    tables["stops"] = table(header + "; 80% at D = 8; at 64; at 256", stops)
    header = "".join(f"; {name}, us; data; seeds" for name in PAIR)
    tables["jobs"] = table("phase; batch" + header, jobs)
    tables["sensitivity"] = table("" + "".join(f"; {names[s]}, {b:,}" for s, b in cases), varied)
    header = (
        "phase"
        + "".join(f"; B = {b:,}, ms" for b in batches)
        + "; fixed, ms; us a sample; 4 seeds over 1"
    )
    return tables | {"measured": table(header, measured)}


def draw_figure(sizes: list[Sizes], path: Path) -> None:
    """Efficiency against devices: a column for each phase shown, a row for each kind of device."""
    shown = [size for size in sizes if (size.workload, size.phase) in SHOWN] or sizes[:1]
    figure = Figure(figsize=(3.6 * len(shown) + 0.6, 6.4), dpi=110, layout="constrained")
    grid = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    for (i, name), (j, size) in itertools.product(enumerate(PAIR), enumerate(shown)):
        axes, profile = grid[i, j], PROFILES[name]
        for mode, style in (("data", "o-"), ("seeds", "s--")):
            for batch, color in zip(BATCHES[::2], ("#ee6677", "#228833", "#4477aa"), strict=True):
                seeds = {d: d if mode == "seeds" else 1 for d in DEVICES}
                line = [efficiency(size, profile, d, batch, mode, s) for d, s in seeds.items()]
                label = f"{mode.removesuffix('s')}-parallel, B = {batch:,}"
                axes.plot(
                    DEVICES, line, style, color=color, label=label, markersize=3.5, linewidth=1.3
                )
        axes.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(DEVICES[::2], [str(d) for d in DEVICES[::2]])
        axes.set_title(f"{name}: {size.workload}, {size.phase}", fontsize=10)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("devices" if i == 1 else "")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("efficiency (computed, not measured)", fontsize=10)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    FigureCanvasAgg(figure).print_png(path)


def _two_devices() -> None:
    jax.config.update("jax_num_cpu_devices", 2)


def main() -> None:
    """Count, time, compute, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="small and fast: only shows that all works"
    )
    parser.add_argument(
        "--output", type=Path, help="by default docs; of --smoke, runs/scaling-smoke"
    )
    arguments = parser.parse_args()
    output = arguments.output or Path("runs/scaling-smoke" if arguments.smoke else "docs")
    jobs, batches, steps = [], (32, 256, 2048), 10
    for (key, workload), phase in itertools.product(WORKLOADS.items(), PHASES):
        # The U-shape has MuJoCo's critic; one batch-normalized loss shows the collectives of all.
        if (key, phase) not in (("unet", "critic"), ("unet", "cefm"), ("mujoco", "cefm")):
            jobs.append((key, workload, phase))
    if arguments.smoke:
        batches, steps = (32, 128), 5
        jobs = [("demo", Workload(quick.get_config(), 3, 1, 2000), "policy full")]
    # Collectives need two devices, and two virtual devices share this CPU's threads in another way
    # than one: they are counted in a process of their own, and the clock is read in this one.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _two_devices) as pool:
        sizes = list(pool.map(measure_sizes, *zip(*jobs, strict=True)))
    timed = [size for size in sizes if size.workload == "demo" and size.phase != "cefm"]
    tables = make_tables(sizes, measure(jobs[0][1], timed, batches, steps), batches)
    folder, page = output / "scaling", output / "scaling.md"
    folder.mkdir(parents=True, exist_ok=True)
    rows = predictions(sizes)
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_figure(sizes, folder / "efficiency.png")
    text = page.read_text() if page.exists() else ""
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
        place, new = (
            rf"<!-- table: {name} -->.*?<!-- end -->",
            f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->",
        )
        text, found = re.subn(place, lambda _, new=new: new, text, flags=re.DOTALL)
        if text and found != 1:
            print(f"{page}: {found} places for the table {name}; expected 1")
    if text:
        page.write_text(text)


if __name__ == "__main__":
    main()
