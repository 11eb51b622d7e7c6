"""Steps per second of each phase, as a share of what its matrix products alone would take.

Products are read from the traced step, so that nothing is left out, and compared with the formula
of ``experiments.systems.scaling`` and with XLA's own count.  A share of 100% would mean that
activations, noise, gathers, the optimizer and the loop cost nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efm_jax.rl.algorithm import Algorithm
from efm_jax.rl.config import QIPOConfig
from efm_jax.training.step import make_chunk
from experiments.configs import mujoco
from experiments.systems.benchmarks import timing
from experiments.systems.benchmarks.products import Product, flops, least_seconds, products, seconds
from experiments.systems.scaling import Workload, build, dense_of_renewal, dense_of_step, one_step

PHASES = ("behavior", "critic", "policy full", "policy resample")
RENEWAL_STATES = 4096  # as the trainer's block


def workload(width: int, path: str, rows: int) -> Workload:
    """The MuJoCo preset with layers of another width, and 16 support actions."""
    config: QIPOConfig = dataclasses.replace(
        mujoco.get_config(), path=path, hidden_dims=(width,) * 3, critic_hidden_dims=(width,) * 2,
        solver="dpmpp" if path == "vp" else "midpoint", sample_steps=10 if path == "vp" else 5,
        support_size=16,
    )  # fmt: skip
    return Workload(config, 17, 6, rows)


def fill(shapes: Any) -> Any:
    """Numbers of the order of the real ones in arrays of these shapes."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)


class Program(NamedTuple):
    """Something to time, and what it does in each of its ``steps``, to be traced: whole batches."""

    call: Callable[[], Any]
    steps: int
    function: Callable
    inputs: tuple
    whole: Callable[[], Any] | None = None  # the same at once, where ``call`` splits a batch


def step_program(work: Workload, phase: str, batch: int, steps: int) -> Program:
    """``steps`` compiled steps in one scan, as they are trained with."""
    step, draw, state, tables = build(work, phase, batch, work.rows, in_parts=True)
    whole, *_ = build(work, phase, batch, work.rows)
    data = jax.tree.map(lambda leaf: jax.random.uniform(jax.random.key(1), leaf.shape), tables)
    inputs = state, 0, tables
    one, one_whole = (functools.partial(one_step, function, draw) for function in (step, whole))

    def run(function: Callable) -> Callable[[], Any]:
        chunk = jax.jit(make_chunk(function, draw, steps))
        return functools.partial(chunk, fill(state), jax.random.key(0), data)

    split = products(one, *inputs) != products(one_whole, *inputs)
    return Program(run(step), steps, one_whole, inputs, run(whole) if split else None)


def renewal_program(work: Workload) -> Program:
    """Drawing the support sets of one block of states, with their Q-values."""
    algorithm = Algorithm(work.config, work.observation_size, work.action_size)
    _, _, _, tables = build(work, "policy full", 1, RENEWAL_STATES)
    state = jax.jit(algorithm.init)(jax.random.key(0))

    def rows(samples: Any) -> Any:
        return algorithm.policy_rows(
            state, jax.random.key(0), 0, samples, jnp.arange(RENEWAL_STATES)
        )

    call = functools.partial(jax.jit(rows), fill(tables.samples))
    return Program(call, 1, rows, (tables.samples,))


def measure(program: Program, formula: float) -> dict[str, Any]:
    """One row of the table; ``formula`` are the operations of the products that are expected."""
    counts = products(program.function, *program.inputs)
    calls = {"": program.call} | ({"whole": program.whole} if program.whole else {})
    times = timing.in_turns(calls, 1.0)
    time, whole = times[""].best / program.steps, times.get("whole")
    counted = None
    if program.steps > 1:  # XLA counts the loop of a sampler once
        cost = jax.jit(program.function).lower(*program.inputs).compile().cost_analysis()
        counted = cost["flops"]
    total, least = flops(counts), least_seconds(counts)
    return {
        "ms": 1e3 * time, "per second": 1 / time, "GFLOP": total / 1e9,
        "formula over traced": f"{formula / total:.3f}",
        "of XLA's count": None if counted is None else f"{100 * total / counted:.0f}%",
        "GFLOP/s": total / time / 1e9, "products alone, GFLOP/s": total / least / 1e9,
        "share of the limit": f"{100 * least / time:.0f}%",
        "batch at once / in parts": whole and whole.best / times[""].best,
    }  # fmt: skip


# Path, width, phases, batches: all phases once, and of the rest what could differ.
FULL = (
    ("ot", 256, (*PHASES, "renewal"), (256, 1024, 4096)),
    ("ot", 512, ("behavior", "critic", "policy resample", "renewal"), (256, 4096)),
    ("vp", 256, ("behavior", "policy resample"), (256, 4096)),
)
QUICK = (("ot", 32, ("behavior",), (256,)),)


def run(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The table of the phases, and the best product for comparison."""
    rows: list[dict[str, Any]] = []
    for path, width, phases, batches in QUICK if quick else FULL:
        work = workload(width, path, 20_000)
        for phase, batch in itertools.product(phases, batches):
            if phase == "policy full" and batch > 1024:
                continue  # a second a step, and 17 times as many rows as its batch says
            head = {"path": path, "width": width, "phase": phase, "batch": batch}
            if phase != "renewal":
                estimate = batch * dense_of_step(work, phase)
                steps = max(2, min(200, round(2e10 / estimate)))
                rows.append(head | measure(step_program(work, phase, batch, steps), estimate))
            elif batch == batches[0]:
                block = dataclasses.replace(work, rows=RENEWAL_STATES)
                head["batch"] = RENEWAL_STATES
                rows.append(head | measure(renewal_program(block), dense_of_renewal(block)))
    size = 256 if quick else 2048
    square = Product(1, size, size, size)
    best = {"product": f"{size} x {size} x {size}", "GFLOP/s": square.flops / seconds(square) / 1e9}
    return {"Phases": rows, "The largest product": [best]}
