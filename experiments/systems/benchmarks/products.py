"""The matrix products of a function, and how fast this machine does each of them alone."""

import collections
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from experiments.systems.benchmarks import timing


class Product(NamedTuple):
    """``batch`` products of ``[rows, inner]`` and ``[inner, columns]``."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each of the products' terms."""
        return 2 * math.prod(self)


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
            batch = math.prod(a[i] for i in shared)
            inner = math.prod(a[i] for i in contracted)
            rows, columns = (math.prod(shape) // (batch * inner) for shape in (a, b))
            found[Product(batch, rows, inner, columns)] += times
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inside in core.jaxprs_in_params(equation.params):
            _collect(inside, times * turns, found)


def flops(counts: Counts) -> int:
    """All products together."""
    return sum(product.flops * times for product, times in counts.items())


def least_seconds(counts: Counts) -> float:
    """All products one after the other, as fast as each goes alone: a function's limit."""
    return sum(seconds(product) * times for product, times in counts.items())


@functools.cache
def seconds(product: Product) -> float:
    """The least time of one product: by XLA in any layout of its operands, or by NumPy's BLAS."""
    batch, rows, inner, columns = product
    random = np.random.default_rng(0)
    a = random.standard_normal((batch, rows, inner), np.float32)
    b = random.standard_normal((batch, inner, columns), np.float32)
    # One call computes some milliseconds of products, so that starting it does not count.
    turns, calls = max(1, round(5e8 / product.flops)), {}
    for numbers in ("bmk,bkn->bmn", "bkm,bkn->bmn", "bmk,bnk->bmn"):
        left, right = numbers.split("->")[0].split(",")
        operands = (
            jnp.asarray(array if axes == plain else array.swapaxes(1, 2))
            for array, axes, plain in ((a, left, "bmk"), (b, right, "bkn"))
        )
        calls[numbers] = functools.partial(repeat, *operands, numbers, turns)
    if jax.default_backend() == "cpu":
        out = np.empty((batch, rows, columns), np.float32)

        def blas() -> None:
            for _ in range(turns):
                np.matmul(a, b, out=out)

        calls["blas"] = blas
    return min(found.best for found in timing.in_turns(calls, 0.15).values()) / turns


@functools.partial(jax.jit, static_argnums=(2, 3))
def repeat(a: jax.Array, b: jax.Array, numbers: str, turns: int) -> jax.Array:
    """Compute one product in every turn of a loop; the result is ``b``."""

    def turn(_: int, b: jax.Array) -> jax.Array:
        # The barrier keeps the whole product; the next turn waits for one element of it.
        product = lax.optimization_barrier(jnp.einsum(numbers, a, b))
        return b.at[0, 0, 0].add(0 * product[0, 0, 0])

    return lax.fori_loop(0, turns, turn, b)
