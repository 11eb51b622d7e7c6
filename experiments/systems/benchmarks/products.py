"""The matrix products of a function, and how fast this machine does each of them alone."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


def products(function: Callable, *inputs: Any) -> collections.Counter[Product]:
    """How often a function computes which products, read from its traced program; loops count every turn."""
    found: collections.Counter[Product] = collections.Counter()
    _collect(jax.make_jaxpr(function)(*inputs).jaxpr, 1, found)
    return found


def _collect(jaxpr: core.Jaxpr, times: int, found: collections.Counter[Product]) -> None:
    for equation in _used(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), (shared, _) = equation.params["dimension_numbers"]
            a, b = (variable.aval.shape for variable in equation.invars)
            batch = math.prod(a[i] for i in shared)
            inner = math.prod(a[i] for i in contracted)
            rows, columns = math.prod(a) // (batch * inner), math.prod(b) // (batch * inner)
            found[Product(batch, rows, inner, columns)] += times
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inside in core.jaxprs_in_params(equation.params):
            _collect(inside, times * turns, found)


def _used(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that a result depends on; the compiler drops the others."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    used = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or needed.intersection(equation.outvars):
            used.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, core.Literal))
    return used


def flops(counts: collections.Counter[Product]) -> int:
    """All products together."""
    return sum(product.flops * times for product, times in counts.items())


@functools.cache
def seconds(product: Product) -> float:
    """The least time of one such product here: by XLA in any layout of its operands, or by NumPy's BLAS."""
    batch, rows, inner, columns = product
    rng = np.random.default_rng(0)
    a = rng.standard_normal((batch, rows, inner), np.float32)
    b = rng.standard_normal((batch, inner, columns), np.float32)
    # As many products in one call as take a few milliseconds, so that starting the call does not
    # count.
    turns = max(1, round(5e8 / product.flops))
    calls = {}
    for name, left, right, numbers in (
        ("nn", a, b, "bmk,bkn->bmn"),
        ("tn", a.transpose(0, 2, 1), b, "bkm,bkn->bmn"),
        ("nt", a, b.transpose(0, 2, 1), "bmk,bnk->bmn"),
    ):
        inputs = jnp.asarray(np.ascontiguousarray(left)), jnp.asarray(np.ascontiguousarray(right))
        calls[name] = functools.partial(_repeat, *inputs, numbers, turns)
    if jax.default_backend() == "cpu":
        out = np.empty((batch, rows, columns), np.float32)

        def blas() -> None:
            for _ in range(turns):
                np.matmul(a, b, out=out)

        calls["blas"] = blas
    return min(found.best for found in timing.in_turns(calls, 0.15).values()) / turns


@functools.partial(jax.jit, static_argnums=(2, 3))
def _repeat(a: jax.Array, b: jax.Array, numbers: str, turns: int) -> jax.Array:
    def turn(_: int, b: jax.Array) -> jax.Array:
        # The barrier keeps the whole product; one element of it makes the next turn wait for this
        # one.
        product = lax.optimization_barrier(jnp.einsum(numbers, a, b))
        return b.at[0, 0, 0].add(0 * product[0, 0, 0])

    return lax.fori_loop(0, turns, turn, b)


def least_seconds(counts: collections.Counter[Product]) -> float:
    """All products one after the other, each as fast as it goes alone: the limit of a function's time."""
    return sum(seconds(product) * times for product, times in counts.items())
