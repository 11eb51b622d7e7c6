"""Choosing actions: energy-weighted policies sample their own field, CEP adds a gradient at every
step.

From observations on the host to actions on the host, by the very call that evaluates a policy
(:func:`efm_jax.rl.trainer.make_act`).  All methods have the same field network, and take turns.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax.networks import LogRatio
from efm_jax.rl.algorithm import Algorithm
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.model import GenerativeModel
from efm_jax.rl.policies import QGPO, Acting, Policy
from efm_jax.rl.trainer import make_act
from efm_jax.solvers import SOLVERS
from efm_jax.types import Normalizer
from experiments.systems.benchmarks import timing

# The fewest evaluations that keep quality (the row "sampling"), as in the presets of MuJoCo.
DEFAULT_STEPS = ("midpoint", 5)
STEPS = 15
OBSERVATION_SIZE, ACTION_SIZE = 17, 6
HIDDEN_DIMS = (512, 256, 128)
# GuidanceQt of QGPO's published code: four hidden layers of 256.
ENERGY_DIMS = (256, 256, 256, 256)
# Milliseconds of QGPO's published PyTorch code by number of states, on 2 cores of the kind used
# here.
PUBLISHED_MS = {1: 44.0, 10: 70.0, 256: 279.0}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What shrinks in a quick run."""

    hidden_dims: tuple[int, ...]
    energy_dims: tuple[int, ...]
    states: tuple[int, ...]
    seconds: float  # of the clock, for each method
    comparable: bool  # with the published figures


FULL = Sizes(HIDDEN_DIMS, ENERGY_DIMS, (1, 10, 256, 4096), 2.0, True)
QUICK = Sizes((32, 16), (32, 32), (64,), 0.2, False)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to choose actions."""

    label: str
    policy: str
    path: str
    solver: str
    steps: int

    @property
    def evaluations(self) -> int:
        """Of the field, for one action."""
        return self.steps * (len(SOLVERS[self.solver].nodes) if self.solver in SOLVERS else 1)


def methods() -> list[Method]:
    """At equal steps, then the default of EFM with CEP at as many evaluations."""
    solver, steps = DEFAULT_STEPS
    fewer = Method("EFM, default", "qipo", "ot", solver, steps)
    return [
        Method("CEP-guided", "qgpo", "vp", "dpmpp", STEPS),
        Method("EFM", "qipo", "ot", "euler", STEPS),
        Method("ED", "qipo", "vp", "dpmpp", STEPS),
        Method("CEP-guided", "qgpo", "vp", "dpmpp", fewer.evaluations),
        fewer,
    ]


@dataclasses.dataclass(frozen=True)
class _Guided(QGPO):
    """QGPO whose energy network has widths of its own, as in the published code."""

    energy_dims: tuple[int, ...] = ENERGY_DIMS

    @property
    def log_ratio(self) -> LogRatio:
        return LogRatio(self.energy_dims, self.config.activation)


@dataclasses.dataclass(frozen=True)
class _GuidedAlgorithm(Algorithm):
    energy_dims: tuple[int, ...] = ENERGY_DIMS

    def _policy(self, model: GenerativeModel) -> Policy:
        sizes = self.observation_size, self.action_size
        return _Guided(self.config, model, self.critic, *sizes, self.energy_dims)


def algorithm(method: Method, sizes: Sizes) -> Algorithm:
    """The library's algorithm of a method."""
    config = QIPOConfig(
        policy=method.policy, path=method.path, network="unet", hidden_dims=sizes.hidden_dims,
        solver=method.solver, sample_steps=method.steps,
    ).validate()  # fmt: skip
    if method.policy == "qgpo":
        return _GuidedAlgorithm(config, OBSERVATION_SIZE, ACTION_SIZE, sizes.energy_dims)
    return Algorithm(config, OBSERVATION_SIZE, ACTION_SIZE)


@functools.cache
def parameters(policy: str, sizes: Sizes) -> Acting:
    """Parameters of one seed; path, solver and steps do not matter to their shapes."""
    method = Method("", policy, "vp", "dpmpp", STEPS)
    state = jax.jit(jax.vmap(algorithm(method, sizes).init))(_keys())
    return state.acting()


def _keys() -> jax.Array:
    return jax.random.key(0)[None]


def actor(method: Method, sizes: Sizes, states: int) -> Callable[[], np.ndarray]:
    """A call that chooses actions for so many states."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((1, states, OBSERVATION_SIZE), np.float32)
    low, high = -jnp.ones(ACTION_SIZE), jnp.ones(ACTION_SIZE)
    normalizer = Normalizer(jnp.zeros(OBSERVATION_SIZE), jnp.ones(OBSERVATION_SIZE), low, high)
    acting = parameters(method.policy, sizes)
    act = make_act(algorithm(method, sizes), "policy", _keys(), acting, normalizer, range(states))
    return functools.partial(act, observations, 0)


def measure(states: int, sizes: Sizes) -> list[dict[str, Any]]:
    """One row for every method."""
    calls = {method: actor(method, sizes, states) for method in methods()}
    times = timing.in_turns(calls, sizes.seconds)
    guided = {method.evaluations: times[method].best for method in calls if method.policy == "qgpo"}
    published = PUBLISHED_MS.get(states) if sizes.comparable else None
    rows = []
    for method, time in times.items():
        milliseconds = 1e3 * time.best
        rows.append({
            "states": states, "method": method.label, "solver": method.solver, "steps": method.steps,
            "ms, best": milliseconds, "ms, median": 1e3 * time.median,
            "x faster than CEP-guided, equal evaluations": guided[method.evaluations] / time.best,
            f"x faster than QGPO's published code, {STEPS} steps": published and published / milliseconds,
        })  # fmt: skip
    return rows


def run(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The table of this row of the suite."""
    sizes = QUICK if quick else FULL
    dims, energy = ("/".join(map(str, widths)) for widths in (sizes.hidden_dims, sizes.energy_dims))
    title = f"Actions from host to host; U-shaped field {dims}, energy network {energy}"
    return {title: [row for states in sizes.states for row in measure(states, sizes)]}
