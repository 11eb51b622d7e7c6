"""Policies on a bandit whose answer is known: data N(MEAN, STD) in every state, Q a parabola."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efm_jax.networks import QEnsemble, Value
from efm_jax.rl.algorithm import Algorithm
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import IQL
from efm_jax.rl.support import advantage_log_weights, summarize_advantages
from efm_jax.rl.trainer import Trainer
from efm_jax.training.parallel import Layout
from efm_jax.types import Transitions

CURVATURE, BEST, MEAN, STD, BETA = 5.0, 0.5, -0.1, 0.3, 2.0
# mu exp(beta Q) of a Gaussian mu and a parabola Q is a Gaussian.
PRECISION = STD**-2 + BETA * CURVATURE
TILTED_MEAN = (MEAN * STD**-2 + BETA * CURVATURE * BEST) / PRECISION
TILTED_STD = PRECISION**-0.5


@dataclasses.dataclass(frozen=True)
class KnownAdvantage(IQL):
    """A level that differs from state to state must not matter."""

    def q_values(self, params, observations, actions):
        return -0.5 * CURVATURE * (actions[..., 0] - BEST) ** 2 + 20 * observations[..., 0]

    def values(self, params, observations):
        return 20 * observations[..., 0]


class Quiet:
    def stop_requested(self):
        return False

    def __getattr__(self, name):
        return lambda *_: None


def test_the_answer_differs_from_the_data():
    assert TILTED_MEAN - MEAN > STD / 2


@pytest.mark.parametrize(
    ("policy", "path", "solver"),
    [
        ("reweight", "ot", "midpoint"),
        ("reweight", "vp", "dpmpp"),
        ("qgpo", "vp", "dpmpp"),
        ("gaussian", "ot", "auto"),
    ],
)
def test_reaches_the_tilted_behaviour(monkeypatch, policy, path, solver):
    known = KnownAdvantage(QEnsemble((4,)), Value((4,)), 0.7)
    monkeypatch.setattr(Algorithm, "critic", property(lambda self: known))
    config = QIPOConfig(
        policy=policy, path=path, solver=solver, sample_steps=10, hidden_dims=(32, 32), critic="iql",
        critic_hidden_dims=(4,), beta=BETA, support_size=16, batch_size=128, learning_rate=3e-3,
        ema_decay=0.97, behavior_steps=600, critic_steps=1, policy_steps=1000, log_every=1000,
        checkpoint_every=10**6, eval_every=0,
    ).validate()  # fmt: skip
    rng, rows = np.random.default_rng(0), 2048
    states = rng.choice([-1.0, 1.0], (rows, 1))
    actions = np.clip(MEAN + STD * rng.standard_normal((rows, 1)), -1, 1)
    data = Transitions(states, actions, np.zeros(rows), states, np.zeros(rows))
    data = jax.tree.map(lambda leaf: leaf.astype(np.float32), data)
    trainer = Trainer(config, data, [0], Layout.create(devices=jax.devices()[:1]))
    state = trainer.run(trainer.init_state(), Quiet())
    acting = jax.tree.map(lambda leaf: leaf[0], state.acting())
    noise = rng.standard_normal((2000, 1)).astype(np.float32)
    sample = jax.jit(trainer.algorithm.policy.sample)
    for level in (-1.0, 1.0):
        found = np.asarray(sample(acting, np.full((2000, 1), level, np.float32), noise))
        assert found.mean() == pytest.approx(TILTED_MEAN, abs=0.05)
        assert found.std() == pytest.approx(TILTED_STD, rel=0.2)


def test_weights_of_advantages():
    advantages = np.random.default_rng(0).standard_normal(40).astype(np.float32) * 3
    weights = np.minimum(np.exp(2.0 * advantages.astype(np.float64)), 100)
    found = advantage_log_weights(jnp.asarray(advantages), 2.0)
    np.testing.assert_allclose(np.exp(found), weights / weights.mean(), rtol=1e-4)
    assert (weights == 100).any()
    summary = summarize_advantages(jnp.asarray(advantages), found)
    expected = {
        "advantage_mean": advantages.mean(), "advantage_std": advantages.std(),
        "ess_share": weights.sum() ** 2 / (weights**2).sum() / 40,
    }  # fmt: skip
    assert summary.keys() == expected.keys()
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, rel=1e-4), name

    def half(part):
        log_weights = advantage_log_weights(part, 2.0, "i")
        return log_weights, summarize_advantages(part, log_weights, "i")

    halves, both = jax.vmap(half, axis_name="i")(jnp.asarray(advantages).reshape(2, 20))
    np.testing.assert_allclose(halves.ravel(), found, rtol=1e-5, atol=1e-6)
    for name, value in summary.items():
        np.testing.assert_allclose(both[name], [value, value], rtol=1e-4, err_msg=name)


def test_without_a_value_network_the_behaviours_mean_is_the_value():
    config = QIPOConfig(
        policy="reweight",
        critic="softmax_q",
        hidden_dims=(8,),
        critic_hidden_dims=(8,),
        support_size=64,
    )
    algorithm = Algorithm(config.validate(), 3, 2)
    assert algorithm.critic.values(None, None) is None
    state = jax.jit(algorithm.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((5, 3)).astype(np.float32)
    samples = Transitions(observations, rng.uniform(-1, 1, (5, 2)).astype(np.float32), *[None] * 3)
    indices = np.arange(5)
    found = algorithm.policy.advantages(state.acting(), jax.random.key(1), samples, indices)
    q = algorithm.critic.q_values(state.critic.average, observations, samples.actions)
    noise = rng.standard_normal((5, 4000, 2)).astype(np.float32)
    drawn = jax.jit(algorithm.model.sample)(state.behavior.average, observations[:, None], noise)
    every = algorithm.critic.q_values(state.critic.average, observations[:, None], drawn)
    np.testing.assert_allclose(found, q - every.mean(1), atol=5 * float(every.std(1).max()) / 8)
