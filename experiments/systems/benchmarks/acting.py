"""Choosing actions: energy-weighted policies sample their own field, CEP adds a gradient to it.

From observations on the host to actions on the host, by the very call that evaluates a policy
(:func:`efm_jax.rl.agents.player`).  All methods have the same field network, and take turns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax.networks import LogRatio
from efm_jax.rl.agents import make_agent, player
from efm_jax.rl.config import QIPOConfig
from efm_jax.types import Normalizer
from experiments.systems.benchmarks.timing import Rows, Tables, in_turns
from experiments.systems.benchmarks.workload import stages

STEPS = 15
OBSERVATION_SIZE, ACTION_SIZE = 17, 6
# Milliseconds of QGPO's published PyTorch code by number of states, on 2 cores like those here.
PUBLISHED_MS = {1: 44.0, 10: 70.0, 256: 279.0}


class Sizes(NamedTuple):
    """What shrinks in a quick run."""

    hidden_dims: tuple[int, ...] = (512, 256, 128)
    energy_dims: tuple[int, ...] = (256, 256, 256, 256)  # GuidanceQt of QGPO's published code
    states: tuple[int, ...] = (1, 10, 256, 4096)
    seconds: float = 2.0  # of the clock, for each method
    methods: int | None = None  # the first so many


FULL, QUICK = Sizes(), Sizes((32, 16), (32, 32), (64,), 0.2)
SIZES = {
    "full": FULL,
    "quick": QUICK,
    "device": Sizes(states=(1, 256, 4096)),
    "smoke": QUICK._replace(methods=2),
}


class Method(NamedTuple):
    """A way to choose actions."""

    label: str
    policy: str
    path: str
    solver: str
    steps: int

    @property
    def evaluations(self) -> int:
        return self.steps * stages(self.solver)


# At equal steps; then the fewest evaluations that keep quality (the row "sampling"), as in the
# presets of MuJoCo, with CEP at as many.
METHODS = (
    Method("CEP-guided", "qgpo", "vp", "dpmpp", STEPS),
    Method("EFM", "qipo", "ot", "euler", STEPS),
    Method("ED", "qipo", "vp", "dpmpp", STEPS),
    Method("CEP-guided", "qgpo", "vp", "dpmpp", 10),
    Method("EFM, default", "qipo", "ot", "midpoint", 5),
)


def actor(method: Method, sizes: Sizes, states: int) -> Callable[[], np.ndarray]:
    """A call that chooses actions for so many states."""
    config = QIPOConfig(
        policy=method.policy, path=method.path, network="unet", hidden_dims=sizes.hidden_dims,
        solver=method.solver, sample_steps=method.steps,
    )  # fmt: skip
    agent = make_agent(config, OBSERVATION_SIZE, ACTION_SIZE)
    if method.policy == "qgpo":  # whose energy network is not as wide as the field's
        agent.log_ratio = LogRatio(sizes.energy_dims, config.activation)
    keys = jax.random.key(0)[None]
    params = jax.jit(jax.vmap(agent.init))(keys).params()
    low, high = -jnp.ones(ACTION_SIZE), jnp.ones(ACTION_SIZE)
    normalizer = Normalizer(jnp.zeros(OBSERVATION_SIZE), jnp.ones(OBSERVATION_SIZE), low, high)
    act = player(agent, "policy", params, normalizer, keys, range(states))
    shape = 1, states, OBSERVATION_SIZE
    observations = np.random.default_rng(0).standard_normal(shape, np.float32)
    return functools.partial(act, observations, 0)


def measure(states: int, sizes: Sizes) -> Rows:
    """One row for every method."""
    calls = {method: actor(method, sizes, states) for method in METHODS[: sizes.methods]}
    times = in_turns(calls, sizes.seconds)
    guided = {method.evaluations: times[method].best for method in calls if method.policy == "qgpo"}
    published = PUBLISHED_MS.get(states) if sizes is FULL else None
    return [{
        "states": states, "method": method.label, "solver": method.solver, "steps": method.steps,
        "ms, best": 1e3 * time.best, "ms, median": 1e3 * time.median,
        "x faster than CEP-guided, equal evaluations": guided[method.evaluations] / time.best,
        f"x faster than QGPO's published code, {STEPS} steps":
            published and published / (1e3 * time.best),
    } for method, time in times.items()]  # fmt: skip


def run(sizes: Sizes) -> Tables:
    """The table, by number of states."""
    dims, energy = ("/".join(map(str, widths)) for widths in (sizes.hidden_dims, sizes.energy_dims))
    title = f"Actions from host to host; U-shaped field {dims}, energy network {energy}"
    yield from ((title, measure(states, sizes)) for states in sizes.states)
