"""Every agent and critic through one suite: training on several devices, resuming, acting."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax.rl.agents import AGENTS, make_agent
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import ACTION_SELECTIONS
from efm_jax.rl.critics import CRITICS
from efm_jax.training import step
from efm_jax.types import Normalizer, Transitions
from tests import tiny
from tests.tiny import A, S, layout

ROWS = 48
MEMBERS = [
    *((agent, "ensemble") for agent in AGENTS),
    ("reweight", "softmax_q"),
    ("reweight", "iql"),
]


def config(policy, critic, **options):
    base = {
        "policy": policy, "critic": critic, "path": "vp" if policy == "qgpo" else "ot",
        "batch_size": 12, "renew_every": 4, "target_ess": 0.5, "data_copies": 2.0, "n_step": 2,
        "beta": 1.0, "num_critics": 3, "behavior_steps": 4, "critic_steps": 4, "policy_steps": 8,
        "log_every": 4, "checkpoint_every": 4, "num_candidates": 3,
    }  # fmt: skip
    return tiny.config(**base | options)


def data(dtype=np.float64):
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((ROWS + 1, S))
    transitions = Transitions(
        observations[:-1], rng.uniform(-1, 1, (ROWS, A)), rng.standard_normal(ROWS),
        observations[1:], np.arange(ROWS) % 10 == 9,
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf.astype(dtype), transitions)


def train(config, devices=1, state=None):
    state, hooks = tiny.train(
        config, data=data(), on=layout(devices), state=state, dtype=np.float64
    )
    return jax.tree.map(np.asarray, state), hooks


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def run(runs, x64):
    def get(member):
        if member not in runs:
            runs[member] = train(config(*member))
        return runs[member]

    return get


@pytest.mark.parametrize("member", MEMBERS, ids="-".join)
def test_trains(member, run):
    state, hooks = run(member)
    policy = AGENTS[member[0]]
    assert int(state.policy.step[0]) == (8 if policy.trains else 0)
    renewals = [] if not policy.trains else [0, 4] if policy.renews else [0]
    assert [step for step, _ in hooks.renewals] == renewals
    chex.assert_tree_all_finite((state.critic, state.policy))
    before, after = hooks.saved[-2], hooks.saved[-1]
    changed = jax.tree.map(lambda a, b: (a != b).any(), before.policy.params, after.policy.params)
    assert any(jax.tree.leaves(changed)) == policy.trains


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-8, atol=1e-9)


@pytest.fixture
def hold(monkeypatch):
    """From now on caches hold so many numbers of a layer."""
    return lambda numbers: monkeypatch.setattr(step, "_CACHED_NUMBERS", numbers)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_critic_on_two_devices_in_parts_equals_one(critic, run, hold):
    one, hooks = run(("reweight", critic))
    hold(40)
    two, others = train(config("reweight", critic), devices=2)
    assert_close((two, others.renewals), (one, hooks.renewals))


@pytest.mark.parametrize("policy", [name for name, agent in AGENTS.items() if agent.trains])
def test_a_policy_continues_on_two_devices_in_parts(policy, run, hold):
    """From step 4 of 8 on one device, where some renew and others compute the same table again."""
    whole, hooks = run((policy, "ensemble"))
    hold(40)
    (middle,) = [state for state in hooks.saved if int(state.policy.step[0]) == 4]
    continued, _ = train(config(policy, "ensemble"), 2, jax.tree.map(jnp.asarray, middle))
    assert_close(continued, whole)


@pytest.mark.parametrize(
    ("options", "phase", "parts"),
    [
        ({}, "behavior", 2),  # 8 numbers for a sample: 9 fit, 6 are half of the batch
        ({}, "critic", 4),  # 3 members: 24
        ({"critic": "softmax_q"}, "critic", 4),  # its actions at the next state are not trained on
        ({}, "policy", 6),  # 4 actions: 32
        ({"estimator": "resample"}, "policy", 2),
        ({"policy": "qgpo", "path": "vp", "estimator": "resample"}, "policy", 6),
        ({"policy": "gaussian"}, "policy", 2),
        ({"policy": "reweight"}, "policy", 2),
    ],
)
def test_parts_of_a_batch_by_what_a_layer_holds(options, phase, parts, hold, x64):
    hold(72)
    agent = make_agent(config(**{"policy": "qipo", "critic": "iql"} | options), S, A)
    batch = Batch(*data())
    state, key = jax.eval_shape(agent.init, jax.random.key(0)), jax.random.key(0)
    if phase == "critic" and agent.critic.uses_next_actions:
        batch = batch._replace(next_actions=np.zeros((ROWS, 3, A)))
    if phase == "policy":
        inputs = state.params(), key, 0, batch, np.arange(ROWS)
        table = jax.eval_shape(agent.support_rows, *inputs)
        table, _ = jax.eval_shape(lambda rows: agent.weigh(rows, None), table)
        batch = batch._replace(support=jax.tree.map(lambda leaf: np.zeros(leaf.shape), table))
    batch = jax.eval_shape(lambda *inputs: agent.draw_batch(phase, *inputs), key, batch)
    jaxpr = jax.make_jaxpr(agent.step(phase))(getattr(state, phase), key, batch)
    loops = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert loops == ([parts] if parts > 1 else [])


NORMALIZER = Normalizer(*(np.float32(x) for x in ([0, 1, 2], [1, 2, 3], [-2, 0], [2, 10])))


@pytest.mark.parametrize("policy", AGENTS)
def test_acts_within_the_bounds(policy):
    options = [config(policy, "iql", action_selection=rule) for rule in ACTION_SELECTIONS]
    agents = [make_agent(each, S, A) for each in options]
    params = jax.jit(agents[0].init)(jax.random.key(0)).params()
    observations = np.random.default_rng(0).standard_normal((5, S)).astype(np.float32)
    keys, others = jax.random.split(jax.random.key(1), 5), np.array([3, 2, 2, 4, 3])

    @jax.jit
    def act(keys, observations):
        return [agent.act(params, NORMALIZER, keys, observations) for agent in agents]

    among_others = act(keys[others], observations[others])
    for actions, again in zip(act(keys, observations), among_others, strict=True):
        assert actions.shape == (5, A)
        assert (actions >= NORMALIZER.action_low).all()
        assert (actions <= NORMALIZER.action_high).all()
        assert_allclose(again, actions[others], rtol=1e-4, atol=1e-4)


def test_best_and_mean_of_the_sampled_actions():
    """Of the same three sampled actions: the one of the largest Q-value, and their mean."""
    params = jax.jit(make_agent(config("bc", "iql"), S, A).init)(jax.random.key(0)).params()
    observations = np.random.default_rng(1).standard_normal((6, S)).astype(np.float32)
    unit = Normalizer(np.zeros(S), np.ones(S), -np.ones(A), np.ones(A))
    keys, found = jax.random.split(jax.random.key(2), 6), {}
    for rule in ACTION_SELECTIONS:
        agent = make_agent(config("bc", "iql", action_selection=rule), S, A)
        found[rule] = agent.act(params, unit, keys, observations)
    noise = jax.vmap(lambda key: jax.random.normal(key, (3, A)))(keys)
    actions = agent.model.sample(params.behavior, observations[:, None], noise)
    q = agent.critic.q_values(params.critic, observations[:, None], actions)
    assert len(set(q.argmax(1).tolist())) > 1
    best = actions[np.arange(6), q.argmax(1)]
    assert_allclose(found["best"], best, rtol=1e-5, atol=1e-6)
    assert_allclose(found["mean"], actions.mean(1), rtol=1e-5, atol=1e-6)
    assert found["sample"].shape == (6, A)


def test_evaluation_may_sample_in_another_way():
    base = config("bc", "iql", sample_steps=2)
    finer = config("bc", "iql", sample_steps=2, eval_solver="rk4", eval_sample_steps=9)
    direct = config("bc", "iql", solver="rk4", sample_steps=9)
    agents = [make_agent(each, S, A) for each in (base, finer, direct)]
    params = jax.jit(agents[0].init)(jax.random.key(0)).params()
    observations = np.random.default_rng(0).standard_normal((8, S)).astype(np.float32)
    args = params, NORMALIZER, jax.random.key(1), observations
    coarse, fine, same = (agent.act(*args) for agent in agents)
    assert_allclose(fine, same, rtol=1e-6)
    assert np.abs(coarse - fine).max() > 1e-4
