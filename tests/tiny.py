"""One tiny configuration, dataset and record of a run, for every test that trains."""

import dataclasses

import jax
import numpy as np

from efm_jax.networks import QEnsemble, Value
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import IQL
from efm_jax.rl.trainer import Hooks, StoppedError, Trainer
from efm_jax.training.parallel import Layout
from efm_jax.types import Transitions

ROWS, S, A = 96, 3, 2


def config(**options):
    base = {
        "hidden_dims": (8,), "critic_hidden_dims": (8,), "time_features": 4, "sample_steps": 2,
        "support_size": 3, "batch_size": 16, "renew_every": 10, "log_every": 5, "eval_every": 0,
        "checkpoint_every": 10, "behavior_steps": 20, "critic_steps": 20, "policy_steps": 20,
    }  # fmt: skip
    return QIPOConfig(**base | options).validate()


def transitions(rows=ROWS, dtype=np.float32):
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((rows, S))
    data = Transitions(
        observations=observations,
        actions=rng.uniform(-1, 1, (rows, A)),
        rewards=rng.standard_normal(rows),
        next_observations=observations + 0.1 * rng.standard_normal((rows, S)),
        terminated=rng.uniform(size=rows) < 0.1,
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), data)


def layout(devices=1, parallel="data", seeds=1):
    assert len(jax.devices()) >= devices, "too few devices in the XLA_FLAGS of the caller"
    return Layout.create(parallel, seeds, jax.devices()[:devices])


class Recorder(Hooks):
    """Keeps all that a run tells, and asks to stop when it has told the metrics of a step."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.metrics, self.renewals, self.saved, self.phases, self.tables = [], [], [], [], []
        self.guards = []

    def on_phase(self, phase, done, total):
        self.phases.append((phase, done, total))

    def on_table(self, name, done, total):
        self.tables.append((name, done, total))

    def on_renewal(self, step, summary):
        self.renewals.append((step, summary))

    def on_guard(self, step, summary):
        self.guards.append((step, summary))

    def on_metrics(self, phase, step, values):
        values = {name: value for name, value in values.items() if name != "steps_per_second"}
        self.metrics.append((phase, step, values))

    def on_evaluate(self, step, params):
        self.phases.append(("evaluate", step))

    def on_checkpoint(self, state):
        self.saved.append(jax.tree.map(lambda leaf: np.array(leaf, copy=True), state))

    def stop_requested(self):
        return self.stop_at is not None and [m[:2] for m in self.metrics][-1:] == [self.stop_at]


def train(
    config, seeds=(0,), *, data=None, on=None, stop_at=None, state=None, dtype=np.float32, by=None
):
    """The final state, None for a run that was stopped, and what the run told."""
    data = transitions(dtype=dtype) if data is None else data
    trainer = by or Trainer(config, data, seeds, on or layout(seeds=len(seeds)))
    hooks = Recorder(stop_at)
    if state is None:
        floats = lambda leaf: np.issubdtype(leaf.dtype, np.floating)  # noqa: E731
        state = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if floats(leaf) else leaf, trainer.init_state()
        )
    try:
        return trainer.run(state, hooks), hooks
    except StoppedError:
        return None, hooks


@dataclasses.dataclass(frozen=True)
class KnownCritic(IQL):
    """``Q(s, a) = -0.5 K (a - c s)^2 + 20 s`` and ``V = 20 s``, whatever was trained."""

    curvature: float = 5.0
    best: float = 0.5

    @classmethod
    def from_config(cls, config):
        return cls(QEnsemble((4,)), Value((4,)), 0.7)

    def q_values(self, params, observations, actions):
        s = observations[..., 0]
        return -0.5 * self.curvature * (actions[..., 0] - self.best * s) ** 2 + self.values(
            params, observations
        )

    def values(self, params, observations):
        return 20 * observations[..., 0]
