"""The scaling model's closed-form properties; its counts against what JAX and XLA say of the same step."""

import dataclasses
import functools
import math
import pathlib
import re

import jax
import jax.extend
import pytest

from efm_jax.rl.config import QIPOConfig
from experiments.systems import scaling
from experiments.systems.benchmarks.products import flops, products

CONFIG = QIPOConfig(hidden_dims=(32, 24), critic_hidden_dims=(16, 20), support_size=4)
SMALL = scaling.Workload(CONFIG, 3, 2, 512)
SIZE = scaling.Sizes(
    "small", "policy full", 40_000, 160_000, 2e5, 1e6, 9e5, 1e6, 2e5, 200, 1e5, 40_012, 1
)
PROFILE = scaling.PROFILES["H100"]
profiles = pytest.mark.parametrize("profile", scaling.PROFILES.values(), ids=list(scaling.PROFILES))


@profiles
def test_one_device_sends_nothing(profile):
    assert scaling.allreduce_time(1e9, profile, 1) == 0
    alone = scaling.step_time(SIZE, profile, 1, 4096)
    assert alone == profile.overhead + scaling.compute_time(SIZE, profile, 4096)
    assert scaling.efficiency(SIZE, profile, 1, 4096) == 1


@profiles
@pytest.mark.parametrize("mode", ["data", "seeds"])
def test_no_grid_point_is_more_than_efficient_and_more_devices_are_never_more_so(profile, mode):
    for batch in scaling.BATCHES:
        found = [
            scaling.efficiency(SIZE, profile, d, batch, mode, d if mode == "seeds" else 1)
            for d in scaling.DEVICES
        ]
        assert all(0 < value <= 1 + 1e-12 for value in found)
        assert found == sorted(found, reverse=True)


@profiles
def test_seeds_send_nothing(profile):
    heavy = dataclasses.replace(SIZE, reduced_bytes=10**12)
    for devices in scaling.DEVICES:
        one = scaling.step_time(SIZE, profile, 1, 1024, "seeds", 1)
        assert scaling.step_time(heavy, profile, devices, 1024, "seeds", devices) == one
        if devices > 1:
            assert scaling.step_time(heavy, profile, devices, 1024) > 1


def test_limits_of_a_step():
    """Free communication and no floor: data-parallel is as good as its fixed traffic lets it be."""
    ideal = dataclasses.replace(PROFILE, launch=0.0, overhead=0.0, slowness=0.0)
    pure = dataclasses.replace(SIZE, flops_fixed=0.0, bytes_fixed=0.0)
    assert scaling.efficiency(pure, ideal, 256, 65_536) == pytest.approx(1)
    # Under the floor D devices are as slow as one, and D seeds on one device cost no more than one
    # seed.
    floor = dataclasses.replace(PROFILE, launch=1.0, overhead=0.0, slowness=0.0)
    assert scaling.efficiency(SIZE, floor, 64, 256) == pytest.approx(1 / 64)
    assert scaling.efficiency(SIZE, floor, 64, 256, "seeds", 64) == pytest.approx(1 / 64)
    arithmetic = dataclasses.replace(ideal, bandwidth=math.inf)
    assert scaling.compute_time(pure, arithmetic, 1000) == pytest.approx(1e9 / (0.5 * 494.7e12))
    # The gradients of all seeds are sent.
    wire = dataclasses.replace(ideal, peak=math.inf, bandwidth=math.inf, slowness=1.0)
    sent = scaling.allreduce_time(5 * SIZE.reduced_bytes, wire, 8)
    assert scaling.step_time(SIZE, wire, 8, 256, "data", 5) == pytest.approx(sent)
    memory = dataclasses.replace(ideal, peak=math.inf)
    assert scaling.compute_time(pure, memory, 1000, seeds=3) == pytest.approx(6e8 / (0.5 * 3.35e12))


def test_allreduce_by_hand():
    # TPU v5e: 2 devices are one hop each way on one axis; 32 are a mesh of 4 x 8, its two axes used
    # at once.
    v5e = scaling.PROFILES["TPU v5e"]
    assert scaling.allreduce_time(5e10, v5e, 2) == pytest.approx(2e-6 + 1.0)
    assert scaling.allreduce_time(5e10, v5e, 32, rounds=3) == pytest.approx(3 * 20e-6 + 31 / 32)
    # H100: 8 in a node, 7 links; 256 in 32 nodes, 5 levels between them.
    assert scaling.allreduce_time(0, PROFILE, 8) == pytest.approx(21.2e-6)
    assert scaling.allreduce_time(4e11, PROFILE, 256) == pytest.approx(106.2e-6 + 2 * 255 / 256)


def test_answers_of_the_tables():
    assert scaling.stops_at(SIZE, PROFILE, 256) == "2"
    devices = int(scaling.stops_at(SIZE, PROFILE, 65_536))
    assert scaling.efficiency(SIZE, PROFILE, devices, 65_536) < 0.5
    assert scaling.efficiency(SIZE, PROFILE, devices // 2, 65_536) >= 0.5
    batch = int(scaling.batch_for(SIZE, PROFILE, 8).replace(",", ""))
    assert scaling.efficiency(SIZE, PROFILE, 8, batch) >= 0.8
    assert scaling.efficiency(SIZE, PROFILE, 8, batch // 2) < 0.8


def test_what_fits():
    tpu = scaling.PROFILES["TPU v5e"]  # 80% of 16 GB hold 127,998 samples of 100 kB and the state
    assert scaling.fits(SIZE, tpu, 1, 127_998)
    assert not scaling.fits(SIZE, tpu, 1, 128_000)
    assert scaling.fits(SIZE, tpu, 8, 128_000, "data", 7)
    assert not scaling.fits(SIZE, tpu, 8, 128_000, "data", 8)
    assert scaling.fits(SIZE, tpu, 8, 120_000, "seeds", 8)
    assert not scaling.fits(SIZE, tpu, 8, 120_000, "seeds", 9)


@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        ("behavior", {}),
        ("critic", {}),
        ("critic", {"critic": "iql", "critic_layer_norm": True}),
        ("policy full", {}),
        ("policy full", {"network": "unet"}),
        ("policy resample", {"layer_norm": True}),
    ],
)
def test_dense_formula_is_every_product_of_the_step(phase, changes):
    workload = dataclasses.replace(SMALL, config=dataclasses.replace(CONFIG, **changes))
    step, draw, state, tables = scaling.build(workload, phase, 8, 64)
    counts = products(functools.partial(scaling.one_step, step, draw), state, 0, tables)
    assert 8 * scaling.dense_of_step(workload, phase) == flops(counts)


def test_xla_counts_the_dense_layers_and_little_else():
    """What is over is not products: activations, noise, weights.  The narrower the layers the more of it."""
    size = scaling.measure_sizes("small", SMALL, "policy full")
    assert 1 <= size.flops_per_sample / size.dense_per_sample < 1.4
    # At least every product's rows are read and every one's written, and no layer is wider than 32.
    assert size.bytes_per_sample > 4 * size.dense_per_sample / (2 * 32)
    assert size.operations > 20


@pytest.mark.parametrize("phase", scaling.PHASES)
def test_collectives_are_the_gradients_and_a_few_scalars(devices, phase):
    state = scaling.build(SMALL, phase, 8, 8)[2]
    leaves = [scaling.nbytes(leaf) for leaf in jax.tree.leaves(state.params)]
    # The loss; the critic's mean of Q; the support losses' two diagnostics, none of them for their
    # weights. A batch-normalized loss: least energy, sum of weights; two sums and a maximum of its
    # diagnostics.
    scalars = {"behavior": 1, "policy resample": 1, "critic": 2, "policy full": 3, "cefm": 6}[phase]
    found, left = scaling.collectives(SMALL, phase, 4 if phase == "policy full" else 2)
    assert sorted(found) == sorted([*leaves, *[4] * scalars])
    assert sum(found) == scaling.nbytes(state.params) + 4 * scalars
    assert 1 <= left <= len(found)


def test_bytes_of_a_transition():
    # s, a, r, s', terminated; 5 support actions and their Q; 4 next actions.
    assert scaling.row_bytes(SMALL) == (4 * (3 + 2 + 1 + 3 + 1), 4 * (5 * 2 + 5), 4 * (4 * 2))


def test_every_table_has_one_place_on_the_page():
    size = dataclasses.replace(SIZE, workload="demo")
    tables = scaling.make_tables([size], [["policy full", 1, 2, 3, 4, 5]], (256, 1024))
    page = (pathlib.Path(scaling.__file__).parents[1] / "docs" / "scaling.md").read_text()
    assert sorted(re.findall("<!-- table: (.*) -->", page)) == sorted(tables)
    for name, table in tables.items():
        rows = table.splitlines()
        assert len({row.count("|") for row in rows}) == 1, name  # as many cells in every row
        assert (
            f"<!-- table: {name} -->\n\n{rows[0].split(';')[0][:7]}" in page
        )  # and it has been filled
