"""Agents on a bandit whose answer is known: data N(MEAN, STD) in every state, Q a parabola."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax.rl.agents import make_agent
from efm_jax.rl.agents.qipo import WeightedSupport
from efm_jax.rl.agents.reweighting import advantages, weigh_advantages
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import CRITICS
from efm_jax.types import Transitions
from tests import tiny
from tests.tiny import train

CURVATURE, BEST, MEAN, STD, BETA = 5.0, 0.5, -0.1, 0.3, 2.0
# mu exp(beta Q) of a Gaussian mu and a parabola Q is a Gaussian.
PRECISION = STD**-2 + BETA * CURVATURE
TILTED_MEAN = (MEAN * STD**-2 + BETA * CURVATURE * BEST) / PRECISION
TILTED_STD = PRECISION**-0.5


class KnownCritic(tiny.KnownCritic):
    """The best action is the same in all states; a level that differs must not matter."""

    def q_values(self, params, observations, actions):
        parabola = -0.5 * CURVATURE * (actions[..., 0] - BEST) ** 2
        return parabola + self.values(params, observations)


@pytest.mark.parametrize(
    ("policy", "path", "solver"),
    [("reweight", "ot", "midpoint"), ("qgpo", "ot", "midpoint"), ("gaussian", "ot", "auto")],
)
def test_reaches_the_tilted_behavior(monkeypatch, policy, path, solver):
    assert TILTED_MEAN - MEAN > STD / 2  # the answer differs from the data
    monkeypatch.setitem(CRITICS, "known", KnownCritic)
    config = QIPOConfig(
        policy=policy, path=path, solver=solver, sample_steps=10, hidden_dims=(32, 32),
        critic="known", critic_hidden_dims=(4,), beta=BETA, support_size=16, batch_size=128,
        learning_rate=3e-3, ema_decay=0.97, behavior_steps=600, critic_steps=1, policy_steps=1000,
        log_every=1000, checkpoint_every=10**6, eval_every=0,
    ).validate()  # fmt: skip
    rng, rows = np.random.default_rng(0), 2048
    states = rng.choice([-1.0, 1.0], (rows, 1))
    actions = np.clip(MEAN + STD * rng.standard_normal((rows, 1)), -1, 1)
    data = Transitions(states, actions, np.zeros(rows), states, np.zeros(rows))
    data = jax.tree.map(lambda leaf: leaf.astype(np.float32), data)
    state, _ = train(config, data=data)
    params = jax.tree.map(lambda leaf: leaf[0], state.params())
    noise = rng.standard_normal((2000, 1)).astype(np.float32)
    agent = make_agent(config, 1, 1)
    sample = jax.jit(lambda states: agent.sample(agent.model, params, states, noise))
    for level in (-1.0, 1.0):
        found = np.asarray(sample(np.full((2000, 1), level, np.float32)))
        assert found.mean() == pytest.approx(TILTED_MEAN, abs=0.05)
        assert found.std() == pytest.approx(TILTED_STD, rel=0.2)


def test_weights_of_advantages():
    advantages = np.random.default_rng(0).standard_normal(40).astype(np.float32) * 3
    weights = np.minimum(np.exp(2.0 * advantages.astype(np.float64)), 100)
    found, summary = weigh_advantages(jnp.asarray(advantages), 2.0)
    assert_allclose(found, weights / weights.mean(), rtol=1e-4)
    assert (weights == 100).any()
    expected = {
        "advantage_mean": advantages.mean(), "advantage_std": advantages.std(),
        "ess_share": weights.sum() ** 2 / (weights**2).sum() / 40,
    }  # fmt: skip
    assert summary == pytest.approx(expected, rel=1e-4)

    halves, both = jax.vmap(lambda part: weigh_advantages(part, 2.0, "i"), axis_name="i")(
        jnp.asarray(advantages).reshape(2, 20)
    )
    assert_allclose(halves.ravel(), found, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(both, jax.tree.map(lambda v: jnp.stack([v, v]), summary), rtol=1e-4)


def test_without_a_value_network_the_behaviors_mean_is_the_value():
    agent = make_agent(tiny.config(policy="reweight", support_size=64), 3, 2)
    assert agent.critic.values(None, None) is None
    params = jax.jit(agent.init)(jax.random.key(0)).params()
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((5, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, (5, 2)).astype(np.float32)
    batch = Batch(observations, actions, None, None, None)
    compute = jax.jit(lambda key, batch: advantages(agent, params, key, batch, np.arange(5)))
    found = compute(jax.random.key(1), batch)
    q_values = jax.jit(agent.critic.q_values)
    q = q_values(params.critic, observations, actions)
    noise = rng.standard_normal((5, 1000, 2)).astype(np.float32)
    drawn = jax.jit(agent.model.sample)(params.behavior, observations[:, None], noise)
    every = q_values(params.critic, observations[:, None], drawn)
    assert_allclose(found, q - every.mean(1), atol=5 * float(every.std(1).max()) / 8)


def test_an_average_draws_the_tables_while_the_last_policy_acts():
    agent = make_agent(tiny.config(table_polyak=0.25, ema_decay=0.9), 3, 2)
    state = jax.jit(agent.init)(jax.random.key(0))
    draw = np.random.default_rng(0).standard_normal
    support = WeightedSupport(draw((6, 4, 2)).astype(np.float32), np.ones((6, 4), np.float32))
    batch = Batch(draw((6, 3)).astype(np.float32), None, None, None, None, support=support)
    step = jax.jit(agent.step("policy", in_parts=False))
    after, _ = step(state.policy, jax.random.key(1), batch)
    pairs = state.policy.params, after.params
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, *pairs)
    chex.assert_trees_all_close(after.average, expected, rtol=1e-4, atol=1e-7)
    state = state.replace(policy=after)
    chex.assert_trees_all_equal(state.params().policy, after.params)
    chex.assert_trees_all_equal(state.params(renewed=True).policy, state.renewed_params)


def test_names_and_phases():
    names = {
        ("qipo", "ot"): "qipo_ot", ("qipo", "vp"): "qipo_diff", ("bc", "vp_cosine"): "bc_cosine",
        ("qgpo", "vp"): "qgpo", ("gaussian", "ot"): "gaussian",
    }  # fmt: skip
    for (policy, path), name in names.items():
        agent = make_agent(tiny.config(policy=policy, path=path), 3, 2)
        assert agent.name == name
        steps = {"behavior": 20, "critic": 20, "policy": 0 if policy == "bc" else 20}
        assert agent.phase_steps == steps


@pytest.mark.parametrize("field", ["policy", "critic"])
def test_a_name_in_no_registry_is_refused_by_its_field(field):
    with pytest.raises(ValueError, match=rf"^{field}: expected one of .*; got 'nosuch'"):
        make_agent(tiny.config(**{field: "nosuch"}), 3, 2)
