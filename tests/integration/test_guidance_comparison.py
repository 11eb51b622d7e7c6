"""The guidance comparison at smoke size: what it writes, that it continues, that its measure sees errors."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.paper import guidance_comparison as comparison
from experiments.paper import guidance_report
from experiments.paper.toy2d import problems

SETTINGS = dataclasses.replace(comparison.SMOKE, betas=(0.0, 5.0))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A finished comparison of one trained family and the exact fields on two problems."""
    folder = tmp_path_factory.mktemp("guidance")
    comparison.run(folder, SETTINGS, ("mixture_2d", "moons"), ("ot", comparison.ORACLE), (0, 1))
    guidance_report.write(folder)
    return folder


def test_every_cell_is_measured(output):
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    exact = ("exact_ot", "exact_cosine", "exact_vp", "exact_cg")
    expected = {
        (p, m, b) for p in ("mixture_2d", "moons") for m in ("efm_ot", *exact) for b in ("0", "5")
    }
    assert {(row["problem"], row["method"], row["beta"]) for row in rows} == expected
    for row in rows:
        for name in ("sliced_w2_ratio", "mmd_ratio", "energy_ratio", "batch_ess"):
            assert float(row[name]) > 0
        # Finite data have no density; everything else has a likelihood, which is a constant at beta
        # = 0.
        has_density = row["method"] == "efm_ot" or row["problem"] == "mixture_2d"
        assert bool(row["log_ratio_std"]) == has_density
        if has_density and row["beta"] == "0":
            assert float(row["log_ratio_std"]) < 1e-5
    by_cell = {(row["problem"], row["method"], row["beta"]): row for row in rows}
    for problem in ("mixture_2d", "moons"):
        # 250 samples and four repeats: a floor of 1 give or take a half, and eq. 4.6 is off at beta
        # = 5.
        assert float(by_cell[problem, "exact_vp", "5"]["sliced_w2_ratio"]) < 1.6
    cells = [by_cell["mixture_2d", method, "5"] for method in ("exact_vp", "exact_cg")]
    assert float(cells[1]["sliced_w2_ratio"]) > 1.5 * float(cells[0]["sliced_w2_ratio"])
    assert float(cells[1]["log_ratio_std"]) > 10 * float(cells[0]["log_ratio_std"])


def test_tables_and_figures(output):
    table = (output / "table.md").read_text()
    for part in (
        "energy-weighted flow, OT (EFM)",
        "beta = 5",
        "**moons**",
        "ESS of a batch",
        "## Goals",
    ):
        assert part in table
    for name in ("ratios", "samples_moons", "samples_mixture_2d"):
        assert imread(output / f"{name}.png").std() > 0.05


def test_a_finished_unit_is_not_run_again_and_settings_do_not_mix(output):
    unit = output / comparison.UNITS / "moons-ot-0.json"
    before = unit.stat().st_mtime_ns
    comparison.run(output, SETTINGS, ("moons",), ("ot",), (0, 1))
    assert unit.stat().st_mtime_ns == before
    assert len(json.loads(unit.read_text())) == 2
    with pytest.raises(ValueError, match="other settings"):
        comparison.run(output, dataclasses.replace(SETTINGS, seeds=2), ("moons",), ("ot",), (0, 1))


@pytest.mark.parametrize("name", problems())
def test_problems_have_the_energies_and_targets_they_promise(name):
    problem = problems()[name]
    x = problem.sample(jax.random.key(0), 20_000)
    energy = problem.energy(x)
    assert x.shape == (20_000, problem.dim)
    assert energy.min() >= 0
    if problem.mixture is None:
        assert energy.max() <= 1
    np.testing.assert_allclose(x.std(), 1.0, atol=0.35)
    beta = 3.0
    weights = np.exp(-beta * np.asarray(energy, np.float64))
    expected = (weights[:, None] * np.asarray(x)).sum(0) / weights.sum()
    ess = weights.sum() ** 2 / (weights**2).sum()
    target = problem.target(jax.random.key(1), 20_000, beta)
    assert target.shape == (20_000, problem.dim)
    error = np.asarray(target.std(0)) * np.sqrt(1 / ess + 1 / 20_000)
    np.testing.assert_array_less(np.abs(np.asarray(target.mean(0)) - expected), 5 * error)


def test_distances_notice_a_shift():
    problem = problems()["moons"]
    measure = comparison.Measure(problem, SETTINGS, problem.target)
    size = SETTINGS.repeats * SETTINGS.sample_size
    exact = problem.target(jax.random.key(5), size, 5.0)
    right = measure.distances(jax.random.key(6), exact, 5.0)
    wrong = measure.distances(jax.random.key(6), exact + jnp.array([0.3, 0.0]), 5.0)
    for name, floor in measure.floor(5.0).items():
        assert right[name] < 2 * floor < wrong[name]
