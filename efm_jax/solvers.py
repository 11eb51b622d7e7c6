"""Fixed-step solvers: explicit Runge-Kutta methods and the steps of DPM-Solver++.

No networks here: a right-hand side is ``f(t, y)`` with a scalar ``t`` and any pytree ``y``.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from efm_jax import arrays, checks

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


def integrate(
    f: Slope[State],
    y0: State,
    times: Float[jax.Array, " T"],
    *,
    solver: str,
    all_states: bool = False,
) -> State:
    """Integrate ``dy/dt = f(t, y)`` over a grid of times, one step from each to the next.

    Args:
      f: right-hand side, ``(t: [], y) -> dy`` with the structure of ``y``.
      y0: state at the first time, a pytree of floating-point arrays.
      times: ``[T]``, rising or falling.
      solver: a name in :data:`SOLVERS`.
      all_states: whether to return the states at all times.

    Returns:
      The state at the last time; or all, with a leading axis ``T``.

    Raises:
      ValueError: for an unknown solver.
    """
    checks.check_choice("solver", solver, SOLVERS)
    y0 = arrays.vary_like(y0, lambda: f(times[0], y0))

    def step(y: State, interval: tuple[jax.Array, jax.Array]) -> tuple[State, State | None]:
        t, t_next = interval
        y = SOLVERS[solver].step(f, t, y, t_next - t)
        return y, y if all_states else None

    y, states = lax.scan(step, y0, (times[:-1], times[1:]))
    if not all_states:
        return y
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), y0, states)
