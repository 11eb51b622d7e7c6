import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.qipo import PHASES
from efm_jax.rl.trainer import StoppedError, Trainer, check_batch_size
from efm_jax.training import parallel
from efm_jax.training.checkpoint import Checkpointer, CheckpointError
from efm_jax.training.loop import MetricsPipe, NonFiniteLossError, segments
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk, make_step, sample_indices
from efm_jax.types import Transitions

TARGET = np.float32([1.0, -2.0, 0.5])


def quadratic(params, average, key, batch):
    loss = 0.5 * jnp.sum((params["x"] - batch) ** 2)
    return loss, {"distance": jnp.abs(params["x"] - batch).max(), "average": average["x"].sum()}


def start(optimizer):
    return TrainState.create({"x": jnp.zeros(3)}, optimizer)


def test_step_is_plain_gradient_descent():
    step = jax.jit(make_step(quadratic, optax.sgd(0.1)))
    state, x = start(optax.sgd(0.1)), np.zeros(3)
    for i in range(3):
        loss, gradient = 0.5 * np.sum((x - TARGET) ** 2), x - TARGET
        state, metrics = step(state, jax.random.key(0), TARGET)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
        assert metrics["distance"] == pytest.approx(np.abs(gradient).max(), rel=1e-6)
        x = x - 0.1 * gradient
        np.testing.assert_allclose(state.params["x"], x, rtol=1e-6)
        np.testing.assert_array_equal(state.average["x"], state.params["x"])
        assert state.step == i + 1


def test_step_with_adam_and_a_polyak_average():
    optimizer, rate = optax.adam(0.05), 0.3
    step = jax.jit(make_step(quadratic, optimizer, average_rate=rate))
    state = start(optimizer)
    x, m, v, average = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    for i in range(1, 5):
        gradient = x - TARGET
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - 0.05 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
        before = average.sum()
        average = rate * x + (1 - rate) * average
        state, metrics = step(state, jax.random.key(0), TARGET)
        np.testing.assert_allclose(state.params["x"], x, rtol=1e-4)
        np.testing.assert_allclose(state.average["x"], average, rtol=1e-4)
        assert metrics["average"] == pytest.approx(
            before, rel=1e-4, abs=1e-7
        )  # the loss sees the old average


def test_step_sums_shares_of_the_loss_over_an_axis():
    def share(params, average, key, batch):
        return quadratic(params, average, key, batch)[0] / 4, {}

    optimizer = optax.sgd(0.1)
    step = make_step(share, optimizer, axis_name="i")
    batches = np.stack([TARGET * k for k in range(4)])
    state, metrics = jax.vmap(step, (None, None, 0), axis_name="i")(start(optimizer), None, batches)
    np.testing.assert_allclose(state.params["x"], np.tile(0.1 * batches.mean(0), (4, 1)), rtol=1e-6)
    losses = 0.5 * (batches**2).sum(1).mean()
    np.testing.assert_allclose(metrics["loss"], np.full(4, losses), rtol=1e-6)


def noisy_chunk(length):
    """Steps whose batch and loss both draw; `history` of every draw is what the state holds."""

    def loss(params, average, key, batch):
        noise = jax.random.normal(key)
        return jnp.sum((params["x"] - batch.mean() - noise) ** 2), {"index": batch.sum(), "noise": noise}

    def draw(key, table):
        return table[sample_indices(key, 4, table.shape[0])]

    return jax.jit(make_chunk(make_step(loss, optax.adam(0.1)), draw, length))


def test_chunks_of_any_length_draw_the_same():
    table = np.arange(50, dtype=np.float32)
    chunks = {length: noisy_chunk(length) for length in (10, 5, 1)}
    results = {}
    for length, chunk in chunks.items():
        state, logged = start(optax.adam(0.1)), []
        for _ in range(10 // length):
            state, metrics = chunk(state, jax.random.key(1), table)
            logged.append(metrics)
        results[length] = state, {k: np.mean([m[k] for m in logged]) for k in ("index", "noise", "loss")}
        if length == 1:  # a new batch and new noise in every step
            assert len({float(m["index"]) for m in logged}) > 5
            assert len({float(m["noise"]) for m in logged}) == 10
    for length in (5, 1):
        jax.tree.map(np.testing.assert_array_equal, results[10][0], results[length][0])
        for name, value in results[10][1].items():
            assert results[length][1][name] == pytest.approx(value, rel=1e-5)


def test_chunk_reports_the_first_loss_that_is_not_finite():
    def loss(params, average, key, batch):
        return jnp.where(params["x"][0] > 2.5, jnp.nan, -params["x"].sum()), {}

    chunk = jax.jit(make_chunk(make_step(loss, optax.sgd(1.0)), lambda key, tables: None, 5))
    _, metrics = chunk(start(optax.sgd(1.0)), jax.random.key(0), None)
    assert metrics["first_nonfinite"] == 3
    _, metrics = noisy_chunk(5)(start(optax.adam(0.1)), jax.random.key(1), np.ones(8, np.float32))
    assert metrics["first_nonfinite"] == -1


def test_chunk_reports_a_gradient_that_is_not_finite():
    """Its loss is finite, but the parameters after it are not, and would be saved."""

    def loss(params, average, key, batch):
        return jnp.sqrt(jnp.abs(params["x"]).sum() * 0.0), {}

    chunk = jax.jit(make_chunk(make_step(loss, optax.sgd(1.0)), lambda key, tables: None, 1))
    state, metrics = chunk(start(optax.sgd(1.0)), jax.random.key(0), None)
    assert np.isnan(state.params["x"]).all()
    assert metrics["first_nonfinite"] == 0


def test_sampled_indices_cover_the_rows_evenly():
    indices = np.asarray(sample_indices(jax.random.key(0), 20_000, 10))
    counts = np.bincount(indices, minlength=10)
    assert counts.shape == (10,)
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_one_global_batch(devices):
    def part(_):
        return sample_indices(jax.random.key(5), 24, 1000, num_devices=devices, axis_name="i")

    parts = jax.vmap(part, axis_name="i")(jnp.arange(devices))
    np.testing.assert_array_equal(parts.reshape(-1), sample_indices(jax.random.key(5), 24, 1000))


def test_segments():
    assert list(segments(0, 10, 4, 5)) == [(0, 4), (4, 5), (5, 8), (8, 10)]
    assert list(segments(0, 3, 100, 0)) == [(0, 3)]
    assert list(segments(5, 5, 2)) == []
    assert list(segments(3, 10, 4)) == [(3, 4), (4, 8), (8, 10)]
    whole = list(segments(0, 97, 10, 7, 25))
    for cut in {end for _, end in whole} | {13, 55}:
        assert [s for s in whole if s[0] >= cut] == [
            s for s in segments(cut, 97, 10, 7, 25) if s[0] in dict(whole)
        ]


def chunk_result(value, first=(-1, -1)):
    return value, {"loss": np.float32([[value, value]]), "first_nonfinite": np.array([first])}


def test_pipe_emits_in_order_one_chunk_behind():
    seen = []
    pipe = MetricsPipe(lambda phase, step, values: seen.append((phase, step, values)))
    assert pipe.run("critic", 0, 5, lambda: chunk_result(1.0)) == 1.0
    assert seen == []
    pipe.run("critic", 5, 7, lambda: chunk_result(2.0))
    assert [(s[0], s[1]) for s in seen] == [("critic", 5)]
    pipe.drain()
    pipe.drain()
    assert [(s[0], s[1]) for s in seen] == [("critic", 5), ("critic", 7)]
    np.testing.assert_array_equal(seen[1][2]["loss"], [2.0, 2.0])
    assert set(seen[0][2]) == {"loss", "steps_per_second"}
    assert seen[0][2]["steps_per_second"].shape == (2,)
    assert (seen[0][2]["steps_per_second"] > 0).all()


def test_pipe_stops_at_a_loss_that_is_not_finite():
    pipe = MetricsPipe(lambda *_: pytest.fail("must not be emitted"))
    pipe.run("policy", 20, 30, lambda: chunk_result(1.0, (-1, 4)))
    with pytest.raises(NonFiniteLossError, match=r"policy phase: the loss of seed number 1 .* at step 25"):
        pipe.drain()


# ---- checkpoints ----


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "state": TrainState.create({"w": rng.standard_normal((64, 8)).astype(np.float32)}, optax.adam(1e-3)),
        "count": np.int32(seed),
        "pair": (rng.standard_normal(3).astype(np.float32), np.array([True, False])),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 20, 30 and 40 of five that were saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpointer = Checkpointer(folder / "c", max_to_keep=3)
    for step in (0, 10, 20, 30, 40):
        checkpointer.save(step, tree(step))
    checkpointer.close()
    return folder / "c"


@pytest.fixture
def checkpoints(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "c")


def restore(folder, **options):
    lines = []
    checkpointer = Checkpointer(folder, report=lines.append)
    try:
        return checkpointer.restore(tree(0), **options), lines
    finally:
        checkpointer.close()


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def test_newest_checkpoint_comes_back_exactly(saved):
    (step, found), lines = restore(saved)
    assert (step, lines) == (40, [])
    assert_same_tree(found, tree(40))


def test_the_last_few_are_kept(saved):
    assert sorted(int(p.name) for p in saved.iterdir() if p.name.isdigit()) == [20, 30, 40]


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "new") == (None, [])


def test_saving_copies_what_training_reuses(tmp_path):
    values = {"w": np.ones(5_000_000, np.float32)}
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(1, values)
    values["w"][:] = 7
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path / "c")
    _, found = checkpointer.restore(values)
    checkpointer.close()
    assert (found["w"] == 1).all()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path, kind):
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "halved":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(
            data[:middle] + bytes(b ^ 0x5A for b in data[middle : middle + 4]) + data[middle + 4 :]
        )


@pytest.mark.parametrize("kind", ["halved", "deleted", "flipped"])
def test_any_damaged_file_of_the_newest(checkpoints, kind):
    """Whatever the damage, what comes back is exactly what was saved: then, or one checkpoint before."""
    newest = checkpoints / "40"
    fell_back = 0
    for path in files(newest):
        data = path.read_bytes()
        if not data:
            continue
        damage(path, kind)
        (step, found), lines = restore(checkpoints)
        path.write_bytes(data)
        assert step in (30, 40), path
        assert_same_tree(found, tree(step))
        if step == 30:
            fell_back += 1
            assert len(lines) == 1
            assert str(newest) in lines[0]
            assert "\n" not in lines[0]
        else:
            assert lines == []
    assert fell_back >= 3


def test_data_of_the_newest_deleted(checkpoints):
    shutil.rmtree(checkpoints / "40" / "state")
    (step, _), lines = restore(checkpoints)
    assert step == 30
    assert len(lines) == 1


def test_two_damaged(checkpoints):
    for step in (40, 30):
        for path in files(checkpoints / str(step)):
            damage(path, "halved")
    (step, found), lines = restore(checkpoints)
    assert step == 20
    assert_same_tree(found, tree(20))
    assert [("/40 " in line, "/30 " in line) for line in lines] == [(True, False), (False, True)]


@pytest.mark.parametrize("bad", [(40,), (40, 30), (40, 30, 20)])
def test_one_line_about_each_unreadable_checkpoint(checkpoints, caplog, bad):
    """Orbax logs an error of its own about such files; an error is all that is said when none is good."""
    for step in bad:
        for path in files(checkpoints / str(step)):
            path.write_bytes(path.read_bytes()[:10])
    lines = []
    checkpointer = Checkpointer(checkpoints, report=lines.append)
    if len(bad) < 3:
        assert checkpointer.restore(tree(0))[0] == max({20, 30, 40} - set(bad))
        assert len(lines) == len(bad)
    else:
        with pytest.raises(CheckpointError, match=r"/40 cannot be read.*none of the 3 can"):
            checkpointer.restore(tree(0))
        assert lines == []
    checkpointer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_levels_of_the_log_are_left_alone(checkpoints):
    level = logging.getLogger("absl").level
    restore(checkpoints)
    assert logging.getLogger("absl").level == level


def test_discarding_lets_the_run_save_again(checkpoints):
    for path in files(checkpoints / "40"):
        damage(path, "halved")
    checkpointer = Checkpointer(checkpoints, report=lambda _: None)
    step, _ = checkpointer.restore(tree(0), discard=True)
    assert step == 30
    checkpointer.save(40, tree(41))
    checkpointer.close()
    (step, found), lines = restore(checkpoints)
    assert (step, lines) == (40, [])
    assert_same_tree(found, tree(41))


@pytest.mark.parametrize("discard", [False, True])
def test_all_damaged_is_an_error_that_deletes_nothing(checkpoints, discard):
    for path in files(checkpoints):
        damage(path, "halved")
    with pytest.raises(CheckpointError, match=r"cannot be read") as caught:
        restore(checkpoints, discard=discard)
    assert "\n" not in str(caught.value)
    assert {p.name for p in checkpoints.iterdir()} >= {"20", "30", "40"}


def test_another_structure_is_an_error(saved):
    checkpointer = Checkpointer(saved, report=lambda _: None)
    with pytest.raises(CheckpointError):
        checkpointer.restore(tree(0) | {"count": np.zeros(3, np.int32)})
    checkpointer.close()


# ---- the trainer: devices, seeds, resumption ----

ROWS, S, A = 100, 3, 2


def transitions(seed=0):
    rng = np.random.default_rng(seed)
    observations = rng.standard_normal((ROWS, S))
    data = Transitions(
        observations=observations,
        actions=rng.uniform(-1, 1, (ROWS, A)),
        rewards=rng.standard_normal(ROWS),
        next_observations=observations + 0.1 * rng.standard_normal((ROWS, S)),
        terminated=rng.uniform(size=ROWS) < 0.1,
    )
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), data)


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
        self.stop_at, self.metrics, self.renewals, self.saved, self.phases, self.tables = (
            stop_at,
            [],
            [],
            [],
            [],
            [],
        )

    def on_phase(self, phase, done, total):
        self.phases.append((phase, done, total))

    def on_table(self, name, done, total):
        self.tables.append((name, done, total))

    def on_renewal(self, step, summary):
        self.renewals.append((step, summary))

    def on_metrics(self, phase, step, values):
        self.metrics.append((phase, step, {k: v for k, v in values.items() if k != "steps_per_second"}))

    def on_evaluate(self, step, params):
        self.phases.append(("evaluate", step))

    def on_checkpoint(self, state):
        self.saved.append(jax.tree.map(lambda leaf: np.array(leaf, copy=True), state))

    def stop_requested(self):
        last = self.metrics[-1][:2] if self.metrics else None
        return self.stop_at is not None and last == self.stop_at


def train(config, seeds=(0,), stop_at=None, state=None):
    trainer, hooks = Trainer(config, transitions(), seeds), Recorder(stop_at)
    try:
        state = trainer.run(trainer.init_state() if state is None else state, hooks)
    except StoppedError:
        state = None
    return state, hooks


def on_one_device(monkeypatch):
    """pmap over the first device only, as on a machine that has no other."""
    monkeypatch.setattr(parallel, "device_count", lambda: 1)


def assert_close(found, expected, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


VARIANTS = {
    "softmax_q full": {},
    "iql resample": {"critic": "iql", "estimator": "resample", "ema_decay": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_devices_equal_one(monkeypatch, devices, variant):
    four, logged_by_four = train(config(**VARIANTS[variant]))
    on_one_device(monkeypatch)
    one, logged_by_one = train(config(**VARIANTS[variant]))
    assert_close(four, one, 2e-4)
    assert [m[:2] for m in logged_by_four.metrics] == [m[:2] for m in logged_by_one.metrics]
    for a, b in zip(logged_by_four.metrics, logged_by_one.metrics, strict=True):
        assert_close(a[2], b[2], 1e-3)
    assert_close(logged_by_four.renewals, logged_by_one.renewals, 1e-3)
    # The last block of a table overlaps the one before when its rows do not divide.
    monkeypatch.setattr("efm_jax.rl.trainer._SUPPORT_BLOCK", 33)
    blocks, _ = train(config(**VARIANTS[variant]))
    assert_close(blocks, one, 1e-4)


def test_two_seeds_equal_each_alone(monkeypatch):
    on_one_device(monkeypatch)
    both, hooks = train(config(), (3, 4))
    for k, seed in enumerate((3, 4)):
        alone, own = train(config(), (seed,))
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], both), jax.tree.map(lambda x: x[0], alone), 1e-4)
        for a, b in zip(hooks.metrics, own.metrics, strict=True):
            assert_close({n: v[k] for n, v in a[2].items()}, {n: v[0] for n, v in b[2].items()}, 1e-4)
    different = [np.abs(leaf[0] - leaf[1]).max() for leaf in jax.tree.leaves(both.policy.params)]
    assert min(different) > 1e-4


def test_what_a_run_tells_its_hooks(monkeypatch):
    on_one_device(monkeypatch)
    state, hooks = train(config(eval_every=10))
    assert hooks.phases == [*((phase, 0, 20) for phase in PHASES), ("evaluate", 10)]
    assert [m[:2] for m in hooks.metrics] == [(phase, step) for phase in PHASES for step in (5, 10, 15, 20)]
    assert [step for step, _ in hooks.renewals] == [0, 10]
    assert {name for name, _, _ in hooks.tables} == {"next actions", "support set 1", "support set 2"}
    steps = [tuple(int(getattr(s, phase).step[0]) for phase in PHASES) for s in hooks.saved]
    assert steps == [(10, 0, 0), (20, 0, 0), (20, 10, 0), (20, 20, 0), (20, 20, 10), (20, 20, 20)]
    assert_same_tree(jax.tree.map(np.asarray, state), hooks.saved[-1])
    # The policy starts as the behaviour model, which stays as it was.
    first = hooks.saved[4]
    assert_same_tree(first.behavior, hooks.saved[1].behavior)
    assert_same_tree(first.support_params, hooks.saved[1].behavior.average)
    assert_same_tree(hooks.saved[5].support_params, hooks.saved[4].policy.average)


def step_of(hooks):
    return int(hooks.saved[-1].policy.step[0])


# Seen one chunk later: these stop after behaviour step 10, critic step 20, policy steps 5, 10 and 15.
@pytest.mark.parametrize(
    "stop_at", [("behavior", 5), ("critic", 15), ("critic", 20), ("policy", 5), ("policy", 10)]
)
def test_stopped_run_continues_bit_for_bit(monkeypatch, stop_at, whole_run):
    on_one_device(monkeypatch)
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
    assert [step for step, _ in second.renewals] == [s for s in (0, 10) if s >= step_of(first) // 10 * 10]


@pytest.fixture(scope="module")
def whole_run():
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        return train(config())


@pytest.mark.parametrize(
    ("phase", "option"), [("behavior", "learning_rate"), ("critic", "critic_learning_rate")]
)
def test_non_finite_loss_is_never_saved(monkeypatch, phase, option):
    on_one_device(monkeypatch)
    # One chunk a checkpoint: nothing but waiting for its metrics can stop the save.
    trainer = Trainer(config(log_every=10, **{option: 1e30}), transitions(), (0,))
    hooks = Recorder()
    with pytest.raises(NonFiniteLossError, match=rf"{phase} phase: .* at step [23]\b"):
        trainer.run(trainer.init_state(), hooks)
    assert all(m[0] != phase for m in hooks.metrics)
    assert len(hooks.saved) == (0 if phase == "behavior" else 2)
    for state in hooks.saved:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_batch_sizes_that_fit():
    check_batch_size(256, 256, 4)
    with pytest.raises(ValueError, match=r"batch_size: .*the 255 transitions.*; got 256"):
        check_batch_size(256, 255, 1)
    with pytest.raises(ValueError, match=r"multiple of the 4 devices, as 252 or 256; got 255"):
        check_batch_size(255, 1000, 4)
    with pytest.raises(ValueError, match=r"multiple of the 4 devices, as 4; got 3"):
        check_batch_size(3, 1000, 4)
