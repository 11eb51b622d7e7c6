"""Fixed-step solvers: explicit Runge-Kutta methods and the steps of DPM-Solver++.

No networks here: a right-hand side is ``f(t, y)`` with a scalar ``t`` and any pytree ``y``.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from efm_jax import checks
from efm_jax.types import Scalar

State = TypeVar("State")
Slope = Callable[[Float[jax.Array, ""], State], State]


@dataclasses.dataclass(frozen=True)
class RungeKutta:
    """Explicit Runge-Kutta method as its Butcher tableau."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]  # row i weighs the slopes of stages before i
    weights: tuple[float, ...]

    def step(
        self, f: Slope[State], t: Float[jax.Array, ""], y: State, dt: Float[jax.Array, ""]
    ) -> State:
        """Advance ``y`` from ``t`` to ``t + dt`` (``dt`` may be negative)."""
        slopes: list[State] = []
        for node, row in zip(self.nodes, self.stages, strict=True):
            slopes.append(f(t + node * dt, _advance(y, slopes, row, dt)))
        return _advance(y, slopes, self.weights, dt)


def _advance(y: State, slopes: list[State], weights: tuple[float, ...], dt: jax.Array) -> State:
    used = [(w, slope) for w, slope in zip(weights, slopes, strict=True) if w != 0]
    coefficients = [w for w, _ in used]

    def combine(leaf: jax.Array, *slope_leaves: jax.Array) -> jax.Array:
        total = sum(c * slope for c, slope in zip(coefficients, slope_leaves, strict=True))
        return leaf + (dt * total).astype(leaf.dtype)

    return jax.tree.map(combine, y, *(slope for _, slope in used)) if used else y


SOLVERS = {
    "euler": RungeKutta((0.0,), ((),), (1.0,)),
    "midpoint": RungeKutta((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": RungeKutta((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": RungeKutta(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


def vary_like(state: State, slope: Callable[[], State]) -> State:
    """Give ``state`` the type that a scan over ``state + slope`` gives it under ``shard_map``.

    There a value's type says over which mapped axes it varies, and a scan's state must keep its
    type.  The slope's value is not used, so that compiled code does not compute it.

    Args:
      state: initial state of a scan.
      slope: computes something of the structure of ``state`` from all that the steps will use.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state)):
        return state
    return jax.tree.map(
        lambda leaf, other: leaf + jnp.zeros_like(other, leaf.dtype), state, slope()
    )


def integrate(
    f: Slope[State],
    y0: State,
    t_start: Scalar,
    t_end: Scalar,
    *,
    solver: str,
    num_steps: int,
) -> State:
    """Integrate ``dy/dt = f(t, y)`` from ``t_start`` to ``t_end`` in equal steps.

    Args:
      f: right-hand side, ``(t: [], y) -> dy`` with the structure of ``y``.
      y0: state at ``t_start``, a pytree of floating-point arrays.
      t_start: initial time.
      t_end: final time, on either side of ``t_start``.
      solver: a name in :data:`SOLVERS`.
      num_steps: number of steps >= 1.

    Returns:
      The state at ``t_end``.

    Raises:
      ValueError: for an unknown solver or ``num_steps < 1``.
    """
    checks.check_choice("solver", solver, SOLVERS)
    checks.check_integer("num_steps", num_steps, 1)
    dtype = jnp.result_type(*jax.tree.leaves(y0))
    times = jnp.linspace(t_start, t_end, num_steps + 1, dtype=dtype)
    y0 = vary_like(y0, lambda: f(times[0], y0))

    def step(y: State, interval: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
        t, t_next = interval
        return SOLVERS[solver].step(f, t, y, t_next - t), None

    y, _ = lax.scan(step, y0, (times[:-1], times[1:]))
    return y
