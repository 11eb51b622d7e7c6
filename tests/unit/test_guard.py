"""The guard and the critics of folds that it asks."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax.data.preprocess import episode_folds
from efm_jax.networks import QEnsemble, ValueEnsemble
from efm_jax.rl.agents.agent import State
from efm_jax.rl.batch import Batch
from efm_jax.rl.critics import EnsembleLCB
from efm_jax.rl.guard import guard
from efm_jax.training.state import TrainState
from efm_jax.types import Transitions
from tests.tiny import A, S, config, layout, train

ROWS = 64
SLOPES = np.array([1.0, 2.0, 4.0, -1.0])  # of Q over the action, by member
GUARDED = {"critic": "ensemble", "num_critics": 4, "critic_folds": 2, "guard": 0.1}


class Known(EnsembleLCB):
    """Member k of ``(0, 1, 0, 1)`` folds: ``slope_k a`` in its own fold's states, else 1000 a."""

    def members(self, params, observations, actions):
        own = self.learns(observations[..., 0].astype(int))
        slopes = jnp.where(own, SLOPES.reshape(-1, *[1] * (own.ndim - 1)), 1000.0)
        return slopes * actions[..., 0]


@pytest.mark.parametrize(
    ("errors", "new", "kept"),
    [(0.0, 0.5, True), (0.0, 0.1, False), (1.4, 0.5, True), (1.5, 0.5, False)],
)
@pytest.mark.parametrize("rule", ["sample", "mean"])
def test_what_is_kept(errors, new, kept, rule):
    """Actions 0.2 before and ``new`` now: gains 0.3 slope_k, of mean 1.5 and 1.04 errors wide."""
    critic = Known(QEnsemble((2,), 4), ValueEnsemble((2,), 4), 0.7, 1.0, folds=2)

    def play(model, params, states, noise):
        return jnp.broadcast_to(params.policy, (*noise.shape[:-1], 1))

    agent = types.SimpleNamespace(
        config=config(guard=errors, action_selection=rule),
        critic=critic,
        action_size=1,
        acting_model=None,
        sample=play,
        mean=lambda *args: play(*args).mean(-2),
    )
    folds = np.arange(ROWS) % 2
    states = np.repeat(folds[:, None], S, 1).astype(np.float32)
    data = Batch(states, np.zeros((ROWS, 1)), np.zeros(ROWS), states, np.zeros(ROWS), folds=folds)
    data = jax.tree.map(jnp.asarray, data)
    empty = TrainState(jnp.asarray(7), (), (), ())
    policy = TrainState(jnp.asarray(7), jnp.asarray(0.9), jnp.asarray(new), "moments")
    state = State(empty, empty, policy, jnp.asarray(0.2))

    after, summary = guard(agent, state, jax.random.key(0), data)
    gains = (np.float32(new) - np.float32(0.2)) * SLOPES
    assert_allclose(summary["guard_gain"], gains.mean(), rtol=1e-5)
    assert_allclose(summary["guard_error"], gains.std(ddof=1) / 2, rtol=1e-5)
    assert bool(summary["accepted"]) is kept
    expected = (0.9, new) if kept else (0.2, 0.2)
    assert_allclose((after.policy.params, after.policy.average), expected)
    assert (after.policy.opt_state, int(after.policy.step)) == ("moments", 7)
    last = guard(agent, state.replace(average_acts=False), jax.random.key(0), data)
    assert_allclose(last[1]["guard_gain"], (0.9 - 0.2) * SLOPES.mean(), rtol=1e-5)


def test_members_learn_from_their_fold_alone():
    critic = EnsembleLCB(QEnsemble((4,), 4), ValueEnsemble((4,), 4), 0.7, 0.5, folds=2)
    params = critic.init(jax.random.key(0), S, A)
    draw = np.random.default_rng(0).standard_normal
    rows = [draw(shape).astype(np.float32) for shape in ((8, S), (8, A), (8,), (8, S), (8,))]
    target = critic.init(jax.random.key(1), S, A)

    def gradients(critic, rows, folds):
        batch = Batch(*rows, folds=folds)
        return jax.grad(lambda p: critic.loss(p, target, None, batch)[0])(params)

    folds = np.arange(8) % 2
    plain = dataclasses.replace(critic, folds=1)
    found = gradients(critic, rows, folds)
    for member in range(4):
        own = gradients(plain, [row[folds == member % 2] for row in rows], None)
        chex.assert_trees_all_close(
            *(jax.tree.map(lambda g, k=member: g[k], g) for g in (found, own)), rtol=1e-5
        )


def test_values_by_members_to_which_a_fold_is_unseen():
    critic = EnsembleLCB(QEnsemble((4,), 4), ValueEnsemble((4,), 4), 0.7, 0.5, folds=2)
    params = critic.init(jax.random.key(0), S, A)
    states, actions = np.ones((6, 1, S), np.float32), np.ones((6, 3, A), np.float32)
    unseen = np.arange(6) % 2
    found = critic.q_values(params, states, actions, unseen)
    for fold in (0, 1):
        others = jax.tree.map(lambda leaf, f=fold: leaf[1 - f :: 2], params)
        pair = EnsembleLCB(QEnsemble((4,), 2), ValueEnsemble((4,), 2), 0.7, 0.5)
        expected = pair.q_values(others, states, actions)
        assert_allclose(found[unseen == fold], expected[unseen == fold], rtol=1e-5)


def test_folds_of_episodes():
    states = np.array([[0.0], [1], [2], [0], [1], [5], [6]])
    following = np.array([[1.0], [2], [3], [1], [9], [6], [7]])  # 3 | 2 (cut) | 2 steps
    ended = np.array([0, 0, 1, 0, 0, 0, 1])
    data = Transitions(states, states, ended, following, ended)
    assert_array_equal(episode_folds(data, 2), [0, 0, 0, 1, 1, 0, 0])
    assert_array_equal(episode_folds(data, 3), [0, 0, 0, 1, 1, 2, 2])


def test_a_guarded_run_on_devices_and_resumed():
    """Two devices by the programs of accelerators, stopped on the way, against one at once."""
    options = config(**GUARDED, estimator="resample")
    whole, told = train(options, (0, 1))
    decisions = np.array([summary["accepted"] for _, summary in told.guards])
    assert [step for step, _ in told.guards] == [10, 20]
    assert 0 < decisions.mean() < 1, "both decisions, else this test shows little"

    on = dataclasses.replace(layout(2, seeds=2), on_cpu=False)
    # Metrics come a chunk late: the run stops at the end of its first table.
    _, stopped = train(options, (0, 1), on=on, stop_at=("policy", 5))
    assert stopped.saved[-1].policy.step.tolist() == [10, 10]
    found, resumed = train(options, (0, 1), on=on, state=stopped.saved[-1])
    chex.assert_trees_all_close(found, whole, rtol=1e-3, atol=1e-5)
    again = stopped.guards + resumed.guards
    chex.assert_trees_all_close(again, told.guards, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": 1.0}, "guard: expected critic=ensemble and critic_folds at least 2"),
        ({"critic_folds": 2}, "critic_folds: expected 1 for critic=softmax_q"),
        ({**GUARDED, "num_critics": 1}, "critic_folds: expected at most the 1 of num_critics"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(config(**options))
