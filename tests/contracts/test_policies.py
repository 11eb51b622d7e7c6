"""Every policy and critic through one suite: training on several devices, resuming, acting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efm_jax.rl.algorithm import Algorithm, Tables
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import CRITICS
from efm_jax.rl.policies import POLICIES
from efm_jax.rl.samples import n_step
from efm_jax.rl.selection import ACTION_SELECTIONS
from efm_jax.rl.trainer import Trainer
from efm_jax.training import step
from efm_jax.training.parallel import Layout
from efm_jax.types import Normalizer, Transitions

ROWS, S, A = 48, 3, 2
MEMBERS = [
    *((policy, "ensemble") for policy in POLICIES),
    ("reweight", "softmax_q"),
    ("reweight", "iql"),
]


def config(policy, critic, **options):
    base = {
        "policy": policy, "critic": critic, "path": "vp" if policy == "qgpo" else "ot", "hidden_dims": (8,),
        "critic_hidden_dims": (8,), "support_size": 3, "batch_size": 12, "time_features": 4, "renew_every": 4,
        "sample_steps": 2, "target_ess": 0.5, "data_copies": 2.0, "n_step": 2, "beta": 1.0, "num_critics": 3,
        "behavior_steps": 4, "critic_steps": 4, "policy_steps": 8, "log_every": 4, "checkpoint_every": 4,
        "eval_every": 0, "num_candidates": 3,
    }  # fmt: skip
    return QIPOConfig(**base | options).validate()


def data(dtype=np.float64):
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((ROWS + 1, S))
    transitions = Transitions(
        observations[:-1], rng.uniform(-1, 1, (ROWS, A)), rng.standard_normal(ROWS), observations[1:],
        np.arange(ROWS) % 10 == 9,
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf.astype(dtype), transitions)


class Hooks:
    def __init__(self):
        self.saved, self.renewals = [], []

    def on_checkpoint(self, state):
        self.saved.append(jax.tree.map(np.array, state))

    def on_renewal(self, step, summary):
        self.renewals.append((step, summary))

    def stop_requested(self):
        return False

    def __getattr__(self, name):
        return lambda *_: None


def train(config, devices=1, state=None):
    trainer, hooks = (
        Trainer(config, data(), (0,), Layout.create(devices=jax.devices()[:devices])),
        Hooks(),
    )
    if state is None:
        state = jax.tree.map(
            lambda x: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x,
            trainer.init_state(),
        )
    return jax.tree.map(np.asarray, trainer.run(state, hooks)), hooks


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
    policy = POLICIES[member[0]]
    assert int(state.policy.step[0]) == (8 if policy.trains else 0)
    assert [step for step, _ in hooks.renewals] == (
        [] if not policy.trains else [0, 4] if policy.renews else [0]
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.critic, state.policy)))
    before, after = hooks.saved[-2], hooks.saved[-1]
    changed = jax.tree.map(lambda a, b: (a != b).any(), before.policy.params, after.policy.params)
    assert any(jax.tree.leaves(changed)) == policy.trains


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


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


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.trains])
def test_a_policy_continues_on_two_devices_in_parts(policy, run, hold):
    """From step 4 of 8 on one device, where those that renew do; the others compute the same table again."""
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
        ({"policy": "reweight"}, "policy", 1),  # reports its batch's effective sample size
    ],
)
def test_parts_of_a_batch_by_what_a_layer_holds(options, phase, parts, hold, x64):
    hold(72)
    algorithm, samples = (
        Algorithm(config(**{"policy": "qipo", "critic": "iql"} | options), S, A),
        n_step(data(), 1, 0.9),
    )
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    tables = Tables(samples, np.zeros((ROWS, 3, A)) if algorithm.critic.uses_next_actions else None)
    if phase == "policy":
        table = jax.eval_shape(
            algorithm.policy_rows, state, jax.random.key(0), 0, samples, np.arange(ROWS)
        )
        prepared, _ = jax.eval_shape(lambda rows: algorithm.policy.prepare(rows, None), table)
        tables = tables.replace(policy=jax.tree.map(lambda leaf: np.zeros(leaf.shape), prepared))
    batch = jax.eval_shape(algorithm.draw_batch, jax.random.key(0), tables)
    jaxpr = jax.make_jaxpr(algorithm.step(phase))(getattr(state, phase), jax.random.key(0), batch)
    loops = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert loops == ([parts] if parts > 1 else [])


NORMALIZER = Normalizer(*(np.float32(x) for x in ([0, 1, 2], [1, 2, 3], [-2, 0], [2, 10])))


@pytest.mark.parametrize("selection", ACTION_SELECTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_acts_within_the_bounds(policy, selection):
    algorithm = Algorithm(config(policy, "iql", action_selection=selection), S, A)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    observations = np.random.default_rng(0).standard_normal((5, S)).astype(np.float32)
    act = jax.jit(
        lambda *args: algorithm.act("policy", state.acting(), NORMALIZER, jax.random.key(1), *args)
    )
    actions = act(observations, 0, np.arange(5))
    assert actions.shape == (5, A)
    assert (actions >= NORMALIZER.action_low).all()
    assert (actions <= NORMALIZER.action_high).all()
    np.testing.assert_allclose(
        act(observations[2:3], 0, np.array([2])), actions[2:3], rtol=1e-4, atol=1e-4
    )


def test_best_and_mean_of_the_sampled_actions():
    """Of the same three sampled actions: the one of the largest Q-value, and their mean."""
    state = jax.jit(Algorithm(config("bc", "iql"), S, A).init)(jax.random.key(0))
    observations = np.random.default_rng(1).standard_normal((6, S)).astype(np.float32)
    noise = np.random.default_rng(2).standard_normal((6, 3, A)).astype(np.float32)
    unit = Normalizer(np.zeros(S), np.ones(S), -np.ones(A), np.ones(A))
    found = {}
    for rule in ACTION_SELECTIONS:
        algorithm = Algorithm(config("bc", "iql", action_selection=rule), S, A)
        assert algorithm.num_noises("policy") == (1 if rule == "sample" else 3)
        found[rule] = algorithm.actions("policy", state.acting(), unit, observations, noise)
    actions = algorithm.model.sample(state.behavior.average, observations[:, None], noise)
    q = algorithm.critic.q_values(state.critic.average, observations[:, None], actions)
    assert len(set(q.argmax(1).tolist())) > 1
    np.testing.assert_allclose(
        found["best"], actions[np.arange(6), q.argmax(1)], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(found["mean"], actions.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["sample"], actions[:, 0], rtol=1e-5, atol=1e-6)


def test_evaluation_may_sample_in_another_way():
    base = config("bc", "iql", sample_steps=2)
    finer = config("bc", "iql", sample_steps=2, eval_solver="rk4", eval_sample_steps=9)
    direct = config("bc", "iql", solver="rk4", sample_steps=9)
    state = jax.jit(Algorithm(base, S, A).init)(jax.random.key(0))
    observations = np.random.default_rng(0).standard_normal((8, S)).astype(np.float32)
    args = (state.acting(), NORMALIZER, jax.random.key(1), observations, 0, np.arange(8))
    coarse, fine, same = (Algorithm(c, S, A).act("policy", *args) for c in (base, finer, direct))
    np.testing.assert_allclose(fine, same, rtol=1e-6)
    assert np.abs(coarse - fine).max() > 1e-4
