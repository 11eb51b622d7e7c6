"""The same numbers on any number of devices? Relative differences from one, phase by phase.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.systems.parity

Trains 8 seeds for 100 steps of every phase on 1, 2, 4, ... of the devices that there are, in both
layouts, in float64 and float32, and compares the parameters of each phase with those of one device;
and seed 3 of 8 with seed 3 alone.  Prints a Markdown table; exit status 1 where a difference is
over 1e-9 in float64 or 1e-4 in float32.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.trainer import Hooks, Trainer
from efm_jax.training.parallel import MODES, Layout
from efm_jax.types import Transitions

ROWS, OBSERVATION_SIZE, ACTION_SIZE = 1024, 5, 2
SEEDS = range(8)
TOLERANCES = {np.float64: 1e-9, np.float32: 1e-4}
VARIANTS = {
    "softmax_q, full": {"critic": "softmax_q", "estimator": "full"},
    "iql, resample": {"critic": "iql", "estimator": "resample"},
}


def transitions(dtype: type) -> Transitions:
    """Random data; only the order of sums is at stake."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((ROWS, OBSERVATION_SIZE))
    data = Transitions(
        observations=observations,
        actions=rng.uniform(-1, 1, (ROWS, ACTION_SIZE)),
        rewards=rng.standard_normal(ROWS),
        next_observations=observations + 0.1 * rng.standard_normal(observations.shape),
        terminated=rng.uniform(size=ROWS) < 0.05,
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), data)


def train(variant: str, seeds: Sequence[int], mode: str, devices: int, dtype: type) -> list:
    """Parameters that each phase trained: one pytree ``[K, ...]`` a phase."""
    config = QIPOConfig(
        hidden_dims=(32, 32), critic_hidden_dims=(32, 32), batch_size=64, support_size=8,
        sample_steps=4, behavior_steps=100, critic_steps=100, policy_steps=100, renew_every=50,
        log_every=50, checkpoint_every=100, eval_every=0, **VARIANTS[variant],
    )  # fmt: skip
    layout = Layout.create(mode, len(seeds), jax.devices()[:devices])
    trainer = Trainer(config, transitions(dtype), seeds, layout)

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf

    state = jax.device_get(trainer.run(jax.tree.map(cast, trainer.init_state()), Hooks()))
    return [getattr(state, phase).params for phase in PHASES]


def difference(found: Any, expected: Any) -> float:
    """The norm of the difference of two pytrees, relative to the second."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    error = sum(np.sum((a - b) ** 2) for a, b in zip(found, expected, strict=True))
    return float(np.sqrt(error / sum(np.sum(b**2) for b in expected)))


def main() -> int:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="2 devices, 1 variant, float64 only")
    counts = [count for count in (2, 4, 8) if count <= len(jax.devices())]
    variants, dtypes = list(VARIANTS), list(TOLERANCES)
    if parser.parse_args().smoke:
        counts, variants, dtypes = counts[:1], variants[:1], dtypes[:1]
    if not counts:
        parser.error("needs at least 2 devices; see the module's documentation")

    print(f"| critic, estimator | type | layout | {' | '.join(PHASES)} |\n{'|---' * 6}|")
    parity = True
    for variant, dtype in itertools.product(variants, dtypes):
        with jax.enable_x64(dtype is np.float64):
            one = train(variant, SEEDS, "data", 1, dtype)
            third = jax.tree.map(lambda leaf: leaf[3:4], one)
            cases = [(SEEDS, *case, one) for case in itertools.product(MODES, counts)]
            for seeds, mode, count, expected in [*cases, (SEEDS[3:4], "data", 1, third)]:
                name = f"{mode}, {count} devices" if count > 1 else "one seed alone"
                found = train(variant, seeds, mode, count, dtype)
                errors = [difference(*pair) for pair in zip(found, expected, strict=True)]
                parity &= max(errors) <= TOLERANCES[dtype]
                cells = " | ".join(f"{error:.1e}" for error in errors)
                print(f"| {variant} | {dtype.__name__} | {name} | {cells} |", flush=True)
    return int(not parity)


if __name__ == "__main__":
    sys.exit(main())
