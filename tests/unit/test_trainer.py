"""The trainer: devices, seeds, resumption."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from efm_jax.rl.agents import player
from efm_jax.rl.batch import Batch, Table
from efm_jax.rl.config import PHASES
from efm_jax.rl.trainer import Trainer
from efm_jax.training.loop import NonFiniteLossError
from efm_jax.types import Normalizer
from tests.tiny import A, Recorder, S, config, layout, train, transitions

assert_close, assert_same_tree = chex.assert_trees_all_close, chex.assert_trees_all_equal
VARIANTS = {
    "softmax_q full": {},
    "iql resample": {"critic": "iql", "estimator": "resample", "ema_decay": 0.5},
}
EIGHT = tuple(range(8))
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

    def get(variant, seeds=(0,)):
        if (variant, seeds) not in runs:
            options = config(**VARIANTS[variant], **LONG)
            runs[variant, seeds] = train(options, seeds, dtype=np.float64)
        return runs[variant, seeds]

    return get


FULL, RESAMPLE = VARIANTS
ACCELERATOR = {"on_cpu": False}  # draws ahead, packed parameters, tiled tables


@pytest.mark.parametrize(
    ("variant", "devices", "mode", "seeds", "how"),
    [
        (FULL, 8, "data", (0,), {}),
        (RESAMPLE, 8, "seeds", EIGHT, {}),
        (FULL, 1, "data", (0,), ACCELERATOR),
        (RESAMPLE, 4, "data", (0,), ACCELERATOR),
        (RESAMPLE, 2, "seeds", EIGHT, ACCELERATOR),
        (RESAMPLE, 4, "data", (0,), {"sharding": "mesh"}),
        (RESAMPLE, 4, "seeds", EIGHT, {"sharding": "mesh"}),
    ],
)
def test_every_layout_computes_the_same(x64, one_device, variant, devices, mode, seeds, how):
    on = dataclasses.replace(layout(devices, mode, len(seeds)), **how)
    found = train(config(**VARIANTS[variant], **LONG), seeds, on=on, dtype=np.float64)
    assert_same_run(found, one_device(variant, seeds), 1e-9)


@pytest.mark.parametrize("devices", [1, 2])
def test_blocks_fill_a_table(devices):
    """The last block of a device overlaps the one before it; each seed has rows of its own."""
    on = layout(devices, seeds=2)

    def rows(params, key, renewal, batch, index):
        return {"a": batch.rewards[:, None] * params + renewal, "index": index}

    columns = np.zeros((20, 1)), np.zeros((20, 1)), np.arange(20.0), np.zeros((20, 1)), np.zeros(20)
    keys = on.put_seeds(jnp.stack([jax.random.key(0)] * 2))
    params, told = on.put_seeds(jnp.array([[1.0, 2.0], [3.0, 4.0]])), []
    table = Table(on, rows, 20, 7).fill(
        params, keys, 5, on.put_rows(Batch(*columns)), lambda *done: told.append(done)
    )
    found = jax.tree.map(lambda leaf: np.concatenate(np.asarray(leaf), axis=1), table)
    assert told == ([(7, 20), (14, 20), (20, 20)] if devices == 1 else [(14, 20), (20, 20)])
    assert_array_equal(found["index"], [np.arange(20)] * 2)
    expected = np.arange(20)[None, :, None] * np.array([[[1, 2]], [[3, 4]]]) + 5
    assert_array_equal(found["a"], expected)


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
            act = player(trainer.agent, "policy", acting, normalizer, trainer.keys, [0, 1])
            act(np.zeros((1, 2, S), np.float32), 0)
            counts.append(compiled.count(event))

    trainer.run(trainer.init_state(), hooks := Counting())
    assert [step for step, _ in hooks.renewals] == [0, 5, 10, 15]
    assert len(counts) == 3
    assert 0 < counts[1] == counts[2]


def test_a_seed_among_eight_equals_itself_alone(x64, one_device):
    several, alone = (
        (state, [values for _, _, values in hooks.metrics])
        for state, hooks in (one_device(RESAMPLE, s) for s in (EIGHT, (0,)))
    )
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], several)
    assert_close(first, jax.tree.map(np.asarray, alone), rtol=1e-6, atol=1e-8)
    policy = jax.tree.leaves(several[0].policy.params)
    different = [np.ptp(np.asarray(leaf), axis=0).max() for leaf in policy]
    assert min(different) > 1e-4


WHOLE = config(eval_every=10, policy_steps=30, renew_every=20)


@pytest.fixture(scope="module")
def trainers():
    """Two that compile what they run once: what continues on the second meets a new one."""
    return [Trainer(WHOLE, transitions(), (0,), layout()) for _ in range(2)]


@pytest.fixture(scope="module")
def whole_run(trainers):
    return train(WHOLE, by=trainers[0])


def test_what_a_run_tells_its_hooks(whole_run):
    state, hooks = whole_run
    totals = {"behavior": 20, "critic": 20, "policy": 30}
    starts = [(phase, 0, total) for phase, total in totals.items()]
    assert hooks.phases == [*starts, ("evaluate", 10), ("evaluate", 20)]
    logged = [(phase, step) for phase, n in totals.items() for step in range(5, n + 1, 5)]
    assert [m[:2] for m in hooks.metrics] == logged
    assert [step for step, _ in hooks.renewals] == [0, 20]
    tables = {"next_actions", "support set 1", "support set 2"}
    assert {name for name, _, _ in hooks.tables} == tables
    steps = [tuple(int(getattr(s, phase).step[0]) for phase in PHASES) for s in hooks.saved]
    assert steps[:4] == [(10, 0, 0), (20, 0, 0), (20, 10, 0), (20, 20, 0)]
    assert steps[4:] == [(20, 20, 10), (20, 20, 20), (20, 20, 30)]
    assert_same_tree(state, hooks.saved[-1])
    # The policy starts as the behavior model, which stays as it was.
    first = hooks.saved[4]
    assert_same_tree(first.behavior, hooks.saved[1].behavior)
    assert_same_tree(first.renewed_params, hooks.saved[1].behavior.average)
    assert_same_tree(hooks.saved[6].renewed_params, hooks.saved[5].policy.average)


# Seen one chunk later: these stop at behavior step 10, critic step 20, policy step 10 between
# renewals, and in the renewal at policy step 20.
@pytest.mark.parametrize(
    ("stop_at", "step"),
    [(("behavior", 5), 0), (("critic", 15), 0), (("policy", 5), 10), (("policy", 20), 20)],
)
def test_stopped_run_continues_bit_for_bit(stop_at, step, trainers, whole_run):
    whole, logged = whole_run
    nothing, first = train(WHOLE, stop_at=stop_at, by=trainers[0])
    assert nothing is None
    assert int(first.saved[-1].policy.step[0]) == step
    final, second = train(WHOLE, state=first.saved[-1], by=trainers[1])
    assert_same_tree(final, whole)
    assert [m[:2] for m in first.metrics + second.metrics] == [m[:2] for m in logged.metrics]
    # A run that continues between renewals tells the current one again, the same.
    expected = dict(logged.renewals)
    for renewal, summary in first.renewals + second.renewals:
        assert_same_tree(summary, expected[renewal])
    assert [renewal for renewal, _ in second.renewals] == ([20] if step == 20 else [0, 20])


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
        ({"policy_batch_size": 97}, 96, {}, r"policy_batch_size: .* the 96 transitions .*; got 97"),
        ({"critic_batch_size": 6}, 96, {"devices": 4}, r"critic_batch_size: .* as 4 or 8; got 6"),
        ({"batch_size": 15}, 96, {"devices": 4}, r"batch_size: .* 4 devices, as 12 or 16; got 15"),
        ({"batch_size": 3}, 96, {"devices": 4}, r"batch_size: .* 4 devices, as 4; got 3"),
        ({}, 95, {"devices": 4}, r"max_transitions: .* devices, as 92; got 95"),
        ({}, 96, {"devices": 4, "parallel": "seeds", "seeds": 6}, r"num_seeds: .* 4 or 8; got 6"),
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


def test_each_phase_has_its_own_batch_size_and_learning_rate():
    own = config(
        batch_size=8, behavior_batch_size=16, policy_batch_size=32, learning_rate=3e-3,
        behavior_learning_rate=1e-3, critic_learning_rate=0.0,
    )  # fmt: skip
    plain = config(batch_size=16, learning_rate=1e-3)
    found, expected = (train(c, stop_at=("behavior", 15))[1].saved[-1] for c in (own, plain))
    assert int(found.behavior.step[0]) == 20
    assert_same_tree(found.behavior, expected.behavior)
    trainer = Trainer(own, transitions(), (0,), layout())
    data = jax.tree.map(lambda leaf: leaf[0], trainer.data)
    draw = lambda phase: trainer.agent.draw_batch(phase, jax.random.key(0), data)  # noqa: E731
    assert [draw(phase).size for phase in PHASES] == [16, 8, 32]
    assert [own.of_phase("learning_rate", phase) for phase in PHASES] == [1e-3, 3e-3, 3e-3]
