"""Steps per second of each phase, as a share of what its matrix products alone would take.

Products are read from the traced step, so that nothing is left out, and compared with the formula
of dense layers and with XLA's own count.  A share of 100% would mean that activations, noise,
gathers, the optimizer and the loop cost nothing.  On an accelerator there is also the share of the
chip's published peak, each product at that of its type.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from efm_jax.training.machines import peak
from efm_jax.training.parallel import Layout
from efm_jax.training.step import make_chunk
from experiments.configs import mujoco
from experiments.systems.benchmarks.timing import Tables, in_turns
from experiments.systems.benchmarks.workload import Workload, filled

PHASES = ("behavior", "critic", "policy full", "policy resample")  # the policy's with an estimator
RENEWAL_STATES = 4096  # a block of the trainer's


class Product(NamedTuple):
    """``batch`` products of ``[rows, inner]`` and ``[inner, columns]``."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: str = "float32"

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each of the products' terms."""
        return 2 * math.prod(self[:4])


Counts = collections.Counter[Product]


def products(function: Callable, *inputs: object) -> Counts:
    """How often a traced function computes which products; loops count every turn."""
    found: Counts = collections.Counter()
    _collect(jax.make_jaxpr(function)(*inputs).jaxpr, 1, found)
    return found


def _collect(jaxpr: core.Jaxpr, times: int, found: Counts) -> None:
    # The compiler drops the equations that no result depends on.
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    for equation in reversed(jaxpr.eqns):
        if not (equation.effects or needed.intersection(equation.outvars)):
            continue
        needed.update(v for v in equation.invars if not isinstance(v, core.Literal))
        if equation.primitive.name == "dot_general":
            (contracted, _), (shared, _) = equation.params["dimension_numbers"]
            a, b = (variable.aval.shape for variable in equation.invars)
            dtype = str(equation.invars[0].aval.dtype)
            batch = math.prod(a[i] for i in shared)
            inner = math.prod(a[i] for i in contracted)
            rows, columns = (math.prod(shape) // (batch * inner) for shape in (a, b))
            found[Product(batch, rows, inner, columns, dtype)] += times
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inside in _branch_here(equation) or core.jaxprs_in_params(equation.params):
            _collect(inside, times * turns, found)


def _branch_here(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """Find the branch of :func:`jax.lax.platform_dependent` that is compiled here; or nothing."""
    platforms, here = equation.params.get("branches_platforms"), jax.default_backend()
    if platforms is None:
        return []
    own = [i for i, names in enumerate(platforms) if names and here in names]
    default = [i for i, names in enumerate(platforms) if names is None]
    return [equation.params["branches"][(own + default)[0]].jaxpr]


def flops(counts: Counts) -> int:
    """All products together."""
    return sum(product.flops * times for product, times in counts.items())


def least_seconds(counts: Counts) -> float:
    """All products one after the other, as fast as each goes alone: a function's limit."""
    return sum(seconds(product) * times for product, times in counts.items())


@functools.cache
def seconds(product: Product) -> float:
    """The least time of one product: by XLA in any layout of its operands, or by NumPy's BLAS.

    On an accelerator in one layout, because there a compiler tries kernels for seconds.
    """
    batch, rows, inner, columns, dtype = product
    on_cpu = jax.default_backend() == "cpu"
    random = np.random.default_rng(0)
    a = random.standard_normal((batch, rows, inner), np.float32)
    b = random.standard_normal((batch, inner, columns), np.float32)
    # One call computes some milliseconds of products, so that starting it does not count.
    turns, calls = max(1, round((5e8 if on_cpu else 5e12) / product.flops)), {}
    for numbers in ("bmk,bkn->bmn", "bkm,bkn->bmn", "bmk,bnk->bmn")[: None if on_cpu else 1]:
        left, right = numbers.split("->")[0].split(",")
        operands = (
            jnp.asarray(array if axes == plain else array.swapaxes(1, 2), dtype)
            for array, axes, plain in ((a, left, "bmk"), (b, right, "bkn"))
        )
        calls[numbers] = functools.partial(repeat, *operands, numbers, turns)
    if on_cpu and dtype == "float32":
        out = np.empty((batch, rows, columns), np.float32)

        def blas() -> None:
            for _ in range(turns):
                np.matmul(a, b, out=out)

        calls["blas"] = blas
    return min(found.best for found in in_turns(calls, 0.15).values()) / turns


@functools.partial(jax.jit, static_argnums=(2, 3))
def repeat(a: jax.Array, b: jax.Array, numbers: str, turns: int) -> jax.Array:
    """Compute one product in every turn of a loop; the result is ``b``."""

    def turn(_: int, b: jax.Array) -> jax.Array:
        # The barrier keeps the whole product; the next turn waits for one element of it.
        product = lax.optimization_barrier(jnp.einsum(numbers, a, b))
        return b.at[0, 0, 0].add(0 * product[0, 0, 0])

    return lax.fori_loop(0, turns, turn, b)


def workload(
    width: int, path: str, phase: str, batch: int, dtype: str = "float32", rows: int = 20_000
) -> Workload:
    """The MuJoCo preset with layers of another width, and 16 support actions."""
    config = dataclasses.replace(
        mujoco.get_config(), path=path, hidden_dims=(width,) * 3, critic_hidden_dims=(width,) * 2,
        solver="dpmpp" if path == "vp" else "midpoint", sample_steps=10 if path == "vp" else 5,
        support_size=16, batch_size=batch, dtype=dtype,
        estimator=phase.partition(" ")[2] or "resample",
    )  # fmt: skip
    return Workload(config, rows)


class Program(NamedTuple):
    """Something to time, and what it does in each of its ``steps``, to be traced: whole batches."""

    call: Callable[[], Any]
    steps: int
    function: Callable
    inputs: tuple
    formula: float  # operations of the products that are expected
    whole: Callable[[], Any] | None = None  # the same at once, where ``call`` splits a batch


def step_program(work: Workload, phase: str, steps: int | None = None) -> Program:
    """Compiled steps in one scan, as they are trained with; by default some tenths of a second."""
    inputs, on_cpu = work.shapes(phase, work.rows), jax.default_backend() == "cpu"
    formula = work.config.batch_size * work.dense_of_step(phase)
    steps = steps or (max(2, min(200, round(2e10 / formula))) if on_cpu else 100)
    parts, whole = (functools.partial(work.one_step, phase, in_parts=p) for p in (on_cpu, False))

    split = products(parts, *inputs) != products(whole, *inputs)
    call = work.training(phase, Layout.create(devices=jax.devices()[:1]), steps)
    return Program(
        call, steps, whole, inputs, formula, _at_once(work, phase, steps) if split else None
    )


def _at_once(work: Workload, phase: str, steps: int) -> Callable[[], Any]:
    """The same steps with whole batches, where the trainer splits them."""
    agent, (state, data) = work.agent, filled(work.shapes(phase, work.rows))
    draw = functools.partial(agent.draw_batch, phase)
    chunk = jax.jit(make_chunk(agent.step(phase, in_parts=False), draw, steps))
    return functools.partial(chunk, state, jax.random.key(0), data)


def renewal_program(work: Workload) -> Program:
    """Drawing the support sets of one block of states, with their Q-values."""
    params = jax.jit(work.agent.init)(jax.random.key(0)).params()
    _, data = work.shapes("behavior", RENEWAL_STATES)

    def rows(data: Any) -> Any:
        index = jnp.arange(RENEWAL_STATES)
        return work.agent.support_rows(params, jax.random.key(0), 0, data, index)

    call = functools.partial(jax.jit(rows), filled(data))
    return Program(call, 1, rows, (data,), work.dense_of_renewal(RENEWAL_STATES))


def share_of_peak(counts: Counts, kind: str, seconds: float) -> float | None:
    """The least time of products at a chip's published peaks, in percent of what they took."""
    peaks = {dtype: peak(kind, dtype) for dtype in {product.dtype for product in counts}}
    if None in peaks.values():
        return None
    least = sum(product.flops * times / peaks[product.dtype] for product, times in counts.items())
    return 100 * least / seconds


def measure(program: Program, alone: bool) -> dict[str, Any]:
    """One row of the table; products are timed, and counted by XLA, if they are ``alone`` too."""
    counts = products(program.function, *program.inputs)
    calls = {"": program.call} | ({"whole": program.whole} if program.whole else {})
    times = in_turns(calls, 1.0)
    time, whole = times[""].best / program.steps, times.get("whole")
    counted = None
    if alone and program.steps > 1:  # XLA counts the loop of a sampler once
        cost = jax.jit(program.function).lower(*program.inputs).compile().cost_analysis()
        counted = cost["flops"]
    total, least = flops(counts), least_seconds(counts) if alone else None
    kind = jax.devices()[0].device_kind
    return {
        "ms": 1e3 * time, "per second": 1 / time, "GFLOP": total / 1e9,
        "formula / traced": program.formula / total, "traced / XLA's": counted and total / counted,
        "GFLOP/s": total / time / 1e9, "share of peak, %": share_of_peak(counts, kind, time),
        "products alone, GFLOP/s": least and total / least / 1e9,
        "share of the limit, %": least and 100 * least / time,
        "batch at once / in parts": whole and whole.best / times[""].best,
    }  # fmt: skip


class Case(NamedTuple):
    """What is measured with layers of one width."""

    path: str
    width: int
    phases: tuple[str, ...]
    batches: tuple[int, ...]
    dtype: str = "float32"  # of the fields; critics have no other
    alone: bool = True  # whether their products are timed too


_POLICY = ("policy full", "policy resample", "behavior")
SIZES = {
    "full": (  # all phases once, and of the rest what could differ
        Case("ot", 256, (*PHASES, "renewal"), (256, 1024, 4096)),
        Case("ot", 512, ("behavior", "critic", "policy resample", "renewal"), (256, 4096)),
        Case("vp", 256, ("behavior", "policy resample"), (256, 4096)),
    ),
    "quick": (Case("ot", 32, ("behavior",), (256,)),),
    "device": (  # what a goal is for comes first
        Case("ot", 512, _POLICY, (4096,), "bfloat16"),
        Case("ot", 512, (*_POLICY, "critic", "renewal"), (4096,), alone=False),
        Case("ot", 256, PHASES, (256,), alone=False),
        Case("ot", 256, _POLICY, (256,), "bfloat16", alone=False),
    ),
    "smoke": (Case("ot", 16, ("policy full",), (16,), "bfloat16", alone=False),),
}


def run(cases: tuple[Case, ...]) -> Tables:
    """The table of the phases."""
    on_cpu = jax.default_backend() == "cpu"
    for case in cases:
        for phase, batch in itertools.product(case.phases, case.batches):
            renewal = phase == "renewal"
            slow = on_cpu and phase == "policy full" and batch > 1024  # a second a step
            if slow or (renewal and batch != case.batches[0]):
                continue  # a renewal has no batch
            work = workload(case.width, case.path, phase, batch, case.dtype)
            name = phase.partition(" ")[0]
            program = renewal_program(work) if renewal else step_program(work, name)
            head = {"path": case.path, "width": case.width, "dtype": case.dtype, "phase": phase}
            head["batch"] = RENEWAL_STATES if renewal else batch
            yield "Phases", [head | measure(program, case.alone)]
