import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax import losses, paths
from efm_jax.training import step as step_module
from efm_jax.training.loop import MetricsPipe, NonFiniteLossError, segments
from efm_jax.training.packing import Packing, pack_state, unpack_state, unpacked
from efm_jax.training.parallel import Layout
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk, make_step, sample_rows, steps_ahead

TARGET = np.float32([1.0, -2.0, 0.5])


def quadratic(params, average, key, batch):
    loss = 0.5 * jnp.sum((params["x"] - batch) ** 2)
    return loss, {"distance": jnp.abs(params["x"] - batch).max(), "average": average["x"].sum()}


def start(optimizer):
    return TrainState.create({"x": jnp.zeros(3)}, optimizer)


def test_step_with_adam_and_a_polyak_average():
    optimizer, rate = optax.adam(0.05), 0.3
    step = jax.jit(make_step(quadratic, optimizer, average_rate=rate))
    state = start(optimizer)
    x, m, v, average = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    for i in range(1, 5):
        gradient = x - TARGET
        expected = {
            "loss": 0.5 * np.sum(gradient**2),
            "grad_norm": np.linalg.norm(gradient),
            "distance": np.abs(gradient).max(),
            "average": average.sum(),  # the loss sees the old average
        }
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - 0.05 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
        average = rate * x + (1 - rate) * average
        state, metrics = step(state, jax.random.key(0), TARGET)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert_allclose(state.params["x"], x, rtol=1e-4)
        assert_allclose(state.average["x"], average, rtol=1e-4)
        assert state.step == i


def test_step_sums_shares_of_the_loss_over_an_axis():
    def share(params, average, key, batch):
        return quadratic(params, average, key, batch)[0] / 4, {}

    optimizer = optax.sgd(0.1)
    step = make_step(share, optimizer, axis_name="i")
    batches = np.stack([TARGET * k for k in range(4)])
    state, metrics = jax.vmap(step, (None, None, 0), axis_name="i")(start(optimizer), None, batches)
    assert_allclose(state.params["x"], np.tile(0.1 * batches.mean(0), (4, 1)), rtol=1e-6)
    chex.assert_trees_all_equal(state.average, state.params)  # the default
    losses = 0.5 * (batches**2).sum(1).mean()
    assert_allclose(metrics["loss"], np.full(4, losses), rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "part_size", "seen", "axis"),
    [(8, 2, 2, None), (8, 3, 2, "i"), (8, 8, 8, None), (7, 3, 7, "i")],
)
def test_step_in_parts_equals_one_of_the_whole_batch(x64, size, part_size, seen, axis):
    """Its losses draw; (8, 3) has no two or three equal parts of at most 3, and 7 none at all."""
    path, optimizer, sizes = paths.conditional_ot(), optax.adam(0.1), []

    def loss(params, average, key, batch):
        sizes.append(batch.shape[0])
        field = lambda x, t: x * params["x"] + t[:, None]  # noqa: E731
        value, aux = losses.cfm(field, path, key, batch, axis_name=axis)
        mean = batch.mean() if axis is None else jax.lax.pmean(batch.mean(), axis)
        return value, aux | {"mean": mean, "average": average["x"].sum()}

    def run(part):
        step = make_step(loss, optimizer, axis_name=axis, part_size=part)
        batch = np.random.default_rng(0).standard_normal((2, size, 3))
        if axis is None:
            return jax.jit(step)(start(optimizer), jax.random.key(1), batch[0])
        mapped = jax.jit(jax.vmap(step, (None, None, 0), axis_name=axis))
        return mapped(start(optimizer), jax.random.key(1), batch)

    chex.assert_trees_all_close(run(part_size), run(None), rtol=1e-10, atol=1e-12)
    assert set(sizes) == {size, seen}


def noisy_chunk(length):
    """Steps whose batch and loss both draw; `history` of every draw is what the state holds."""

    def loss(params, average, key, batch):
        noise = jax.random.normal(key)
        return jnp.sum((params["x"] - batch.mean() - noise) ** 2), {
            "index": batch.sum(),
            "noise": noise,
        }

    def draw(key, table):
        return table[sample_rows(key, 4, table.shape[0])]

    return jax.jit(make_chunk(make_step(loss, optax.adam(0.1)), draw, length))


def test_chunks_of_any_length_draw_the_same():
    table, results, logs = np.arange(50, dtype=np.float32), {}, {}
    for length in (10, 5, 1):
        chunk, state, logs[length] = noisy_chunk(length), start(optax.adam(0.1)), []
        for _ in range(10 // length):
            state, metrics = chunk(state, jax.random.key(1), table)
            logs[length].append(jax.device_get(metrics))
        means = {k: np.mean([m[k] for m in logs[length]]) for k in ("index", "noise", "loss")}
        results[length] = state, means
    assert len({float(m["index"]) for m in logs[1]}) > 5  # a new batch and new noise in every step
    assert len({float(m["noise"]) for m in logs[1]}) == 10
    for length in (5, 1):
        chex.assert_trees_all_equal(results[length][0], results[10][0])
        assert results[length][1] == pytest.approx(results[10][1], rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_drawing_ahead_and_packing_change_nothing(packed):
    path, optimizer = paths.conditional_ot(), optax.adam(0.1)
    table = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)

    def loss(params, average, key, batch):
        field = lambda x, t: jnp.tanh(x @ params["w"]) @ params["w"].T + params["b"] * t[:, None]  # noqa: E731
        return losses.cfm(field, path, key, batch)

    def draw(key, table):
        return table[sample_rows(key, 8, 40)]

    def run(**options):
        params = {"w": jnp.linspace(-1, 1, 24).reshape(3, 8), "b": jnp.ones(3)}
        state = TrainState.create(params, optimizer)
        step = make_step(loss, optimizer, average_rate=0.1)
        return jax.jit(make_chunk(step, draw, 12, **options))(state, jax.random.key(1), table)

    found = run(ahead=4, draws=losses.draw, packed=packed)
    chex.assert_trees_all_close(found, run(), rtol=1e-5, atol=1e-6)
    assert found[0].step == 12


def test_packed_leaves_come_back():
    shapes = {"a": (5, 16, 8), "b": (8, 3), "c": (3,), "d": (), "e": (2, 11), "f": (7, 8)}
    tree = {k: np.random.default_rng(0).standard_normal(v) for k, v in shapes.items()}
    tree = jax.tree.map(jnp.asarray, tree)
    packed = Packing.of(tree).pack(tree)
    chex.assert_trees_all_equal(unpacked(packed), tree)
    # 80 rows of a, 7 of f, 3 of b (transposed), 1, 1 and 3 of the others: whole tiles
    assert packed.rows.shape == (96, 8)
    assert jnp.sum(packed.rows**2) == pytest.approx(float(optax.tree.norm(tree)) ** 2, rel=1e-5)
    assert Packing.of({"one": jnp.ones(3)}) is None
    assert Packing.of({"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}) is None


def test_a_packed_state_comes_back():
    """With the moments and the count of its optimizer, also behind clipping."""
    params = {"w": jnp.arange(24.0).reshape(3, 8), "b": jnp.ones(3)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    state = TrainState.create(params, optimizer)
    packed = pack_state(state)
    buffers = [leaf for leaf in jax.tree.leaves(packed) if leaf.shape == (8, 8)]
    assert len(buffers) == 4  # parameters, average, both moments
    chex.assert_trees_all_equal(unpack_state(packed), state)


def test_steps_ahead_divide_the_chunk(monkeypatch):
    monkeypatch.setattr(step_module, "_DRAWN_NUMBERS", 1000)
    assert [steps_ahead(100, n) for n in (1, 30, 200, 1001)] == [100, 25, 5, 1]
    assert steps_ahead(97, 30) == 1


def test_chunk_reports_the_first_loss_or_gradient_that_is_not_finite():
    def first_of(loss, rate):
        chunk = jax.jit(make_chunk(make_step(loss, optax.sgd(rate)), lambda key, tables: None, 5))
        return chunk(start(optax.sgd(rate)), jax.random.key(0), None)

    def loss(params, average, key, batch):
        return jnp.where(params["x"][0] > 2.5, jnp.nan, -params["x"].sum()), {}

    def gradient(params, average, key, batch):
        """Finite, but the parameters after it are not, and would be saved."""
        return jnp.sqrt(jnp.abs(params["x"]).sum() * 0.0), {}

    assert first_of(loss, 1.0)[1]["first_nonfinite"] == 3
    assert first_of(loss, 0.1)[1]["first_nonfinite"] == -1
    state, metrics = first_of(gradient, 1.0)
    assert np.isnan(state.params["x"]).all()
    assert metrics["first_nonfinite"] == 0


@pytest.mark.parametrize(("batch", "rows"), [(24, 96), (10, 10), (7, 23)])
def test_a_batch_has_one_sample_of_every_part(batch, rows):
    """And every row is drawn equally often: a batch's mean is unbiased."""
    draw = jax.jit(jax.vmap(lambda key: sample_rows(key, batch, rows)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    edges = np.arange(batch + 1) * rows / batch
    assert (draws >= np.floor(edges[:-1])).all()
    assert (draws < np.ceil(edges[1:])).all()
    counts, expected = np.bincount(draws.reshape(-1), minlength=rows), 4000 * batch / rows
    assert counts.shape == (rows,)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_rows_of_tables_and_batches_beyond_32_bits_of_products():
    rows = np.asarray(sample_rows(jax.random.key(0), 65_536, 2_000_000_000))
    edges = np.arange(65_537) * 2_000_000_000 / 65_536
    assert (rows >= np.floor(edges[:-1])).all()
    assert (rows < np.ceil(edges[1:])).all()


def test_devices_lie_host_by_host(monkeypatch):
    """A slice of 4 x 2 chips and two hosts numbers the first host's chips 0, 1, 4 and 5."""
    hosts = [0, 0, 1, 1, 0, 0, 1, 1]
    chips = [
        types.SimpleNamespace(platform="tpu", id=i, process_index=h) for i, h in enumerate(hosts)
    ]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    described = Layout.create(devices=chips)  # by this one host: it compiles for all of them
    assert (described.sharding, described.local_devices) == ("mesh", tuple(chips))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    layout = Layout.create()
    assert (layout.sharding, len(layout.local_devices)) == ("pmap", 4)
    assert [chip.id for chip in layout.devices] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert layout.host_rows(16) == slice(0, 8)


def test_devices_share_one_global_batch():
    def part(_):
        return sample_rows(jax.random.key(5), 24, 1000, num_devices=4, axis_name="i")

    parts = np.asarray(jax.vmap(part, axis_name="i")(jnp.arange(4)))
    assert 0 <= parts.min() <= parts.max() < 250
    rows = parts + np.arange(4)[:, None] * 250
    assert_array_equal(rows.reshape(-1), sample_rows(jax.random.key(5), 24, 1000))


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


def first_copy(metrics):
    return {name: value[0] for name, value in metrics.items()}


def test_pipe_emits_in_order_one_chunk_behind():
    seen = []
    pipe = MetricsPipe(lambda phase, step, values: seen.append((phase, step, values)), first_copy)
    assert pipe.run("critic", 0, 5, lambda: chunk_result(1.0)) == 1.0
    assert seen == []
    pipe.run("critic", 5, 7, lambda: chunk_result(2.0))
    assert [(s[0], s[1]) for s in seen] == [("critic", 5)]
    pipe.drain()
    pipe.drain()
    assert [(s[0], s[1]) for s in seen] == [("critic", 5), ("critic", 7)]
    assert_array_equal(seen[1][2]["loss"], [2.0, 2.0])
    assert set(seen[0][2]) == {"loss", "steps_per_second"}
    assert seen[0][2]["steps_per_second"].shape == (2,)
    assert (seen[0][2]["steps_per_second"] > 0).all()


def test_pipe_stops_at_a_loss_that_is_not_finite():
    pipe = MetricsPipe(lambda *_: pytest.fail("must not be emitted"), first_copy)
    pipe.run("policy", 20, 30, lambda: chunk_result(1.0, (-1, 4)))
    with pytest.raises(
        NonFiniteLossError, match=r"policy phase: the loss of seed number 1 .* at step 25"
    ):
        pipe.drain()
