"""The guard and the learned models in which it plays policies."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax.data.preprocess import first_rows
from efm_jax.rl import guard
from efm_jax.rl.agents import make_agent
from efm_jax.rl.agents.agent import AgentParams, Purpose
from efm_jax.rl.memory import predict
from efm_jax.types import Transitions
from tests.tiny import ROWS, A, S, config, layout, train, transitions

MODELS = {"guard_steps": 1500, "guard_length": 10, "hidden_dims": (32, 32), "batch_size": 64}
GUARDED = {"guard": 0.1, "guard_steps": 3, "guard_length": 4, "estimator": "resample"}


class Constant:
    """Plays the action that is its parameters; what the guard needs of an agent."""

    action_size = 1

    def __init__(self, errors=0.0):
        self.config = config(guard=errors, **MODELS)

    def act(self, params, normalizer, keys, observations):
        states = normalizer.normalize_observations(observations)
        return normalizer.unscale_actions(jnp.full((len(states), 1), params.policy))


def world(states, actions):
    """Next states, rewards, and whether the episode terminates."""
    states = 0.8 * states + 0.2 * actions
    return states, 2 + states[:, 0] - actions[:, 0] ** 2, states[:, 0] > 0.75


@pytest.fixture(scope="module")
def models():
    rng = np.random.default_rng(0)
    states, actions = rng.uniform(-1, 1, (2, 4000, 1)).astype(np.float32)
    following, rewards, ended = world(states, actions)
    data = Transitions(states, actions, rewards, following, ended.astype(np.float32))
    return guard.fit(config(**MODELS), data)


@pytest.mark.parametrize("action", [-0.5, 0.3, 1.0])
def test_returns_are_those_of_the_environment(models, action):
    """At action 1 episodes terminate on the way, and what comes after does not count."""
    states, alive = np.asarray(models.starts, np.float64), np.ones(guard.EPISODES)
    expected = endless = np.zeros(guard.EPISODES)
    for _ in range(10):
        states, rewards, ended = world(states, np.full_like(states, action))
        expected, alive, endless = expected + alive * rewards, alive * ~ended, endless + rewards
    assert (alive.max() == 0) == (action == 1.0)
    params = AgentParams((), (), jnp.asarray(action))
    found = guard.returns(Constant(), models, params, jax.random.key(0))
    if action == 1.0:  # learned ends come a little late
        assert expected.mean() < found.mean() < found.max() < 0.85 * endless.mean()
    else:
        assert_allclose(found, expected.mean(), rtol=0.12)
    assert len(set(found.tolist())) == guard.MEMBERS


def test_what_is_kept(models):
    new, old = (AgentParams((), (), jnp.asarray(action)) for action in (0.0, 0.4))
    of = [guard.returns(Constant(), models, p, jax.random.key(0)) for p in (new, old)]
    gains = np.asarray(of[0] - of[1], np.float64)
    error = gains.std(ddof=1) / np.sqrt(guard.MEMBERS)
    for errors in (gains.mean() / error * 0.99, gains.mean() / error * 1.01):
        found = guard.judge(Constant(errors), models, new, old, jax.random.key(0))
        assert_allclose([found["guard_gain"], found["guard_error"]], [gains.mean(), error], 1e-4)
        assert bool(found["accepted"]) == (gains.mean() > errors * error)
    assert not guard.judge(Constant(1.0), models, old, new, jax.random.key(0))["accepted"]


def test_programs_and_memory_are_those_of_a_run(monkeypatch):
    options, called = config(**GUARDED), {}
    functions = {name: getattr(guard, name) for name in ("_train", "returns")}

    def record(name, *inputs):
        called[name] = inputs
        return functions[name](*inputs)

    for name in functions:
        monkeypatch.setattr(guard, name, functools.partial(record, name))
    models = guard.fit(options, transitions())
    agent = make_agent(options, S, A)
    policy = agent.init(jax.random.key(0)).params()
    guard.judge(agent, models, policy, policy, jax.random.key(0))
    (steps, _, fits), (_, _, plays) = guard.programs(agent, ROWS).values()
    assert steps == 3
    chex.assert_trees_all_equal_shapes_and_dtypes(fits[3:], called["_train"][3:])
    chex.assert_trees_all_equal_shapes_and_dtypes(plays[1:], called["returns"][1:])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(called["_train"][3:]))
    predicted = predict(options, layout(1), ROWS, S, A)
    assert predicted.work == held - predicted.tables > 0  # there is no table yet
    assert predict(config(), layout(1), ROWS, S, A).work == 0


def test_first_rows_of_episodes():
    states = np.array([[0.0], [1], [2], [0], [1], [5], [6]])
    following = np.array([[1.0], [2], [3], [1], [9], [6], [7]])  # 3 | 2 (cut) | 2 steps
    ended = np.array([0, 0, 1, 0, 0, 0, 1])
    assert_array_equal(first_rows(Transitions(states, states, ended, following, ended)), [0, 3, 5])


def test_a_guarded_run_on_devices_and_resumed():
    """Two devices by the programs of accelerators, stopped on the way, against one at once."""
    options = config(**GUARDED)
    whole, told = train(options, (0, 1, 2))
    decisions = np.array([summary["accepted"] for _, summary in told.guards])
    assert [step for step, _ in told.guards] == [10, 20]
    assert ("models", 3, 3) in told.tables
    assert 0 < decisions.mean() < 1, "both decisions, else this test shows little"
    before, after = (saved.policy for saved in told.saved[-2:])
    assert_array_equal(
        [
            (b == a).all()
            for b, a in zip(*(jax.tree.leaves(p.average)[0] for p in (before, after)), strict=True)
        ],
        decisions[1] == 0,
    )

    seed = int(np.flatnonzero(decisions[1])[0])
    policies = whole.params(), whole.params(renewed=True)
    new, old = jax.tree.map(lambda leaf: leaf[seed], policies)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), Purpose.GUARD), 20)
    models = guard.fit(options, transitions())
    again = guard.judge(make_agent(options, S, A), models, new, old, key)
    assert_allclose(again["guard_gain"], told.guards[1][1]["guard_gain"][seed], rtol=1e-4)

    on = dataclasses.replace(layout(2, seeds=3), on_cpu=False)
    # Metrics come a chunk late: the run stops at the end of its first table.
    _, stopped = train(options, (0, 1, 2), on=on, stop_at=("policy", 5))
    assert stopped.saved[-1].policy.step.tolist() == [10] * 3
    found, resumed = train(options, (0, 1, 2), on=on, state=stopped.saved[-1])
    chex.assert_trees_all_close(found, whole, rtol=1e-3, atol=1e-5)
    again = stopped.guards + resumed.guards
    chex.assert_trees_all_close(again, told.guards, rtol=1e-2, atol=1e-6)
