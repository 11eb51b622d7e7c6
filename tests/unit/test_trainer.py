"""The trainer: devices, seeds, resumption."""

from unittest import mock

import jax
import numpy as np
import pytest

from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.support import write_rows
from efm_jax.rl.trainer import StoppedError, Trainer
from efm_jax.training.loop import NonFiniteLossError
from efm_jax.training.parallel import Layout
from efm_jax.types import Normalizer, Transitions
from experiments.systems.benchmarks.memory import temporaries

ROWS, S, A = 96, 3, 2


def transitions(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    observations = rng.standard_normal((ROWS, S))
    data = Transitions(
        observations=observations,
        actions=rng.uniform(-1, 1, (ROWS, A)),
        rewards=rng.standard_normal(ROWS),
        next_observations=observations + 0.1 * rng.standard_normal((ROWS, S)),
        terminated=rng.uniform(size=ROWS) < 0.1,
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), data)


def config(**options):
    base = {
        "hidden_dims": (8,), "critic_hidden_dims": (8,), "support_size": 3, "batch_size": 16,
        "sample_steps": 2, "renew_every": 10, "log_every": 5, "checkpoint_every": 10, "eval_every": 0,
        "time_features": 4, "behavior_steps": 20, "critic_steps": 20, "policy_steps": 20,
    }  # fmt: skip
    return QIPOConfig(**base | options).validate()


class Recorder:
    """Hooks that keep what they are told, and ask to stop at a checkpoint."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.metrics, self.renewals, self.saved, self.phases, self.tables = [], [], [], [], []

    def on_phase(self, phase, done, total):
        self.phases.append((phase, done, total))

    def on_table(self, name, done, total):
        self.tables.append((name, done, total))

    def on_renewal(self, step, summary):
        self.renewals.append((step, summary))

    def on_metrics(self, phase, step, values):
        self.metrics.append(
            (phase, step, {k: v for k, v in values.items() if k != "steps_per_second"})
        )

    def on_evaluate(self, step, params):
        self.phases.append(("evaluate", step))

    def on_checkpoint(self, state):
        self.saved.append(jax.tree.map(lambda leaf: np.array(leaf, copy=True), state))

    def stop_requested(self):
        last = self.metrics[-1][:2] if self.metrics else None
        return self.stop_at is not None and last == self.stop_at


def layout(devices=1, parallel="data", seeds=1):
    assert len(jax.devices()) >= devices, "too few devices in the XLA_FLAGS of the caller"
    return Layout.create(parallel, seeds, jax.devices()[:devices])


def train(
    config, seeds=(0,), *, devices=1, parallel="data", stop_at=None, state=None, dtype=np.float32
):
    trainer = Trainer(
        config, transitions(dtype=dtype), seeds, layout(devices, parallel, len(seeds))
    )
    hooks = Recorder(stop_at)
    if state is None:
        state = trainer.init_state()
        state = jax.tree.map(
            lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x, state
        )
    try:
        state = trainer.run(state, hooks)
    except StoppedError:
        state = None
    return state, hooks


def assert_same_tree(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )


VARIANTS = {
    "softmax_q full": {},
    "iql resample": {"critic": "iql", "estimator": "resample", "ema_decay": 0.5},
}
LONG = {
    **{f"{phase}_steps": 30 for phase in PHASES},
    **{f"{period}_every": 15 for period in ("log", "checkpoint", "renew")},
}


def assert_same_run(found, expected, tolerance):
    """States, metrics and renewals of two runs, relative to the size of each array."""
    (state, hooks), (other, logged) = found, expected
    pairs = zip(
        jax.tree_util.tree_leaves_with_path((state, hooks.renewals, [m[2] for m in hooks.metrics])),
        jax.tree.leaves((other, logged.renewals, [m[2] for m in logged.metrics])),
        strict=True,
    )
    for (path, a), b in pairs:
        error = np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), 1e-3)
        assert error < tolerance, (jax.tree_util.keystr(path), error)
    assert [m[:2] for m in hooks.metrics] == [m[:2] for m in logged.metrics]


@pytest.fixture(scope="module")
def one_device():
    """Runs on one device, each trained once."""
    runs = {}

    def get(variant, dtype, seeds=(0,)):
        key = variant, dtype, seeds
        if key not in runs:
            runs[key] = train(config(**VARIANTS[variant], **LONG), seeds, dtype=dtype)
        return runs[key]

    return get


@pytest.mark.parametrize(
    ("variant", "devices"),
    [("softmax_q full", 8), ("iql resample", 4)],
)
def test_data_on_many_devices_in_float64(x64, one_device, variant, devices):
    many = train(config(**VARIANTS[variant], **LONG), devices=devices, dtype=np.float64)
    assert_same_run(many, one_device(variant, np.float64), 1e-9)


def test_seeds_on_eight_devices_in_float64(x64, one_device):
    seeds, variant = tuple(range(8)), "iql resample"
    many = train(
        config(**VARIANTS[variant], **LONG), seeds, devices=8, parallel="seeds", dtype=np.float64
    )
    assert_same_run(many, one_device(variant, np.float64, seeds), 1e-9)


def test_blocks_of_a_table_that_do_not_divide(monkeypatch, whole_run):
    monkeypatch.setattr("efm_jax.rl.trainer._TABLE_ACTIONS", 33 * config().support_size + 1)
    monkeypatch.setattr("efm_jax.rl.trainer.write_rows", seen := mock.Mock(wraps=write_rows))
    assert_same_run(train(config()), whole_run, 1e-4)
    assert {call.args[3] for call in seen.call_args_list} == {33}


@pytest.fixture
def compiled():
    """Names of JAX's timed events, one for each that ends."""
    names = []

    def listen(name, *_, **__):
        names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_renewals_and_evaluations_compile_nothing_again(compiled):
    counts = []
    # also where a program comes from a cache on disk
    event = "/jax/core/compile/backend_compile_duration"
    trainer = Trainer(config(renew_every=5, eval_every=5), transitions(), (0,), layout())
    normalizer = Normalizer(np.zeros(S), np.ones(S), -np.ones(A), np.ones(A))

    class Counting(Recorder):
        def on_evaluate(self, step, acting):
            trainer.act_fn("policy", acting, normalizer, [0, 1])(np.zeros((1, 2, S), np.float32), 0)
            counts.append(compiled.count(event))

    trainer.run(trainer.init_state(), hooks := Counting())
    assert [step for step, _ in hooks.renewals] == [0, 5, 10, 15]
    assert len(counts) == 3
    assert 0 < counts[1] == counts[2]
    # What the benchmark of memory asks of these programs.
    assert list(temporaries(trainer)) == [
        *(f"{phase} step" for phase in PHASES),
        "96 rows of the policy's table",
    ]


def test_a_seed_of_two_equals_itself_alone():
    both, hooks = train(config(), (3, 4))
    alone, own = train(config(), (4,))
    assert_close(
        jax.tree.map(lambda leaf: leaf[1], both), jax.tree.map(lambda leaf: leaf[0], alone), 1e-4
    )
    for a, b in zip(hooks.metrics, own.metrics, strict=True):
        assert_close({n: v[1] for n, v in a[2].items()}, {n: v[0] for n, v in b[2].items()}, 1e-4)
    different = [np.abs(leaf[0] - leaf[1]).max() for leaf in jax.tree.leaves(both.policy.params)]
    assert min(different) > 1e-4


def test_what_a_run_tells_its_hooks():
    state, hooks = train(config(eval_every=10))
    assert hooks.phases == [*((phase, 0, 20) for phase in PHASES), ("evaluate", 10)]
    assert [m[:2] for m in hooks.metrics] == [
        (phase, step) for phase in PHASES for step in (5, 10, 15, 20)
    ]
    assert [step for step, _ in hooks.renewals] == [0, 10]
    assert {name for name, _, _ in hooks.tables} == {
        "next actions",
        "support set 1",
        "support set 2",
    }
    steps = [tuple(int(getattr(s, phase).step[0]) for phase in PHASES) for s in hooks.saved]
    assert steps == [(10, 0, 0), (20, 0, 0), (20, 10, 0), (20, 20, 0), (20, 20, 10), (20, 20, 20)]
    assert_same_tree(jax.tree.map(np.asarray, state), hooks.saved[-1])
    # The policy starts as the behavior model, which stays as it was.
    first = hooks.saved[4]
    assert_same_tree(first.behavior, hooks.saved[1].behavior)
    assert_same_tree(first.renewed_params, hooks.saved[1].behavior.average)
    assert_same_tree(hooks.saved[5].renewed_params, hooks.saved[4].policy.average)


def step_of(hooks):
    return int(hooks.saved[-1].policy.step[0])


# Seen one chunk later: these stop at behavior step 10, critic step 20, and in the renewal at policy
# step 10.
@pytest.mark.parametrize("stop_at", [("behavior", 5), ("critic", 15), ("policy", 10)])
def test_stopped_run_continues_bit_for_bit(stop_at, whole_run):
    whole, logged = whole_run
    nothing, first = train(config(), stop_at=stop_at)
    assert nothing is None
    final, second = train(config(), state=first.saved[-1])
    assert_same_tree(jax.tree.map(np.asarray, final), jax.tree.map(np.asarray, whole))
    assert [m[:2] for m in first.metrics + second.metrics] == [m[:2] for m in logged.metrics]
    # A run that continues between renewals tells the current one again, the same.
    expected = dict(logged.renewals)
    for step, summary in first.renewals + second.renewals:
        assert_same_tree(summary, expected[step])
    assert [step for step, _ in second.renewals] == [
        s for s in (0, 10) if s >= step_of(first) // 10 * 10
    ]


@pytest.fixture(scope="module")
def whole_run():
    return train(config())


@pytest.mark.parametrize(
    ("phase", "option"), [("behavior", "learning_rate"), ("critic", "critic_learning_rate")]
)
def test_non_finite_loss_is_never_saved(phase, option):
    # One chunk a checkpoint: nothing but waiting for its metrics can stop the save.
    trainer = Trainer(config(log_every=10, **{option: 1e30}), transitions(), (0,), layout())
    hooks = Recorder()
    with pytest.raises(NonFiniteLossError, match=rf"{phase} phase: .* at step [23]\b"):
        trainer.run(trainer.init_state(), hooks)
    assert all(m[0] != phase for m in hooks.metrics)
    assert len(hooks.saved) == (0 if phase == "behavior" else 2)
    for state in hooks.saved:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("options", "rows", "arguments", "message"),
    [
        ({"batch_size": 96}, 95, {}, r"batch_size: .* at most the 95 transitions .*; got 96"),
        ({"batch_size": 15}, 96, {"devices": 4}, r"batch_size: .* 4 devices, as 12 or 16; got 15"),
        ({"batch_size": 3}, 96, {"devices": 4}, r"batch_size: .* multiple of the 4 devices, as 4; got 3"),
        ({}, 95, {"devices": 4}, r"max_transitions: .* multiple of the 4 devices, as 92; got 95"),
        ({}, 96, {"devices": 4, "parallel": "seeds", "seeds": 6}, r"num_seeds: .* as 4 or 8; got 6"),
        ({}, 96, {"parallel": "both"}, r"parallel: expected one of data, seeds; got 'both'"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(options, rows, arguments, message):
    data = jax.tree.map(lambda leaf: leaf[:rows], transitions())
    with pytest.raises(ValueError, match=message):
        Trainer(config(**options), data, range(arguments.get("seeds", 1)), layout(**arguments))


def test_a_part_of_the_data_that_is_not_this_hosts_is_refused():
    data = jax.tree.map(lambda leaf: leaf[:48], transitions())
    with pytest.raises(ValueError, match=r"data: expected the 96 of 96 transitions .*; got 48"):
        Trainer(config(), data, (0,), layout(), num_rows=96)


def test_seeds_keep_batches_and_data_whole():
    data = jax.tree.map(lambda leaf: leaf[:95], transitions())
    Trainer(config(batch_size=15), data, (0, 1), layout(2, "seeds", 2))
