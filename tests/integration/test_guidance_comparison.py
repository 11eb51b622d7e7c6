"""The guidance comparison, small: what it writes, that it continues, that it sees errors."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from efm_jax.envs import mean_and_interval
from experiments.paper import guidance_comparison as comparison
from experiments.paper import toy2d
from experiments.paper.toy2d import problems
from tests.markdown import cells

SETTINGS = comparison.SMOKE


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A finished comparison of one trained family and the exact fields on two problems."""
    folder = tmp_path_factory.mktemp("guidance")
    comparison.run(folder, SETTINGS, ("mixture_2d", "moons"), ("ot", comparison.ORACLE))
    comparison.report(folder)
    return folder


def test_every_cell_is_measured(output):
    rows = pd.read_csv(output / "results.csv").set_index(["problem", "method", "beta"])
    methods = ("efm_ot", "exact_ot", "exact_cosine", "exact_vp", "exact_cg")
    assert set(rows.index) == {*itertools.product(("mixture_2d", "moons"), methods, (0, 5))}
    ratios = ["sliced_w2_ratio", "mmd_ratio", "energy_ratio", "batch_ess"]
    assert (rows[ratios] > 0).all(axis=None)
    # Finite data have no density; everything else has a likelihood, which is a constant at beta 0.
    method, problem = (rows.index.get_level_values(name) for name in ("method", "problem"))
    has_density = (method == "efm_ot") | (problem == "mixture_2d")
    np.testing.assert_array_equal(rows["log_ratio_std"].notna(), has_density)
    assert rows["log_ratio_std"].xs(0, level="beta").max() < 1e-5
    # 250 samples and four repeats: a floor of 1 give or take a half, and eq. 4.6 is off at beta 5.
    assert rows.loc[(slice(None), "exact_vp", 5), "sliced_w2_ratio"].max() < 1.6
    right, wrong = (rows.loc["mixture_2d", method, 5] for method in ("exact_vp", "exact_cg"))
    assert wrong["sliced_w2_ratio"] > 1.5 * right["sliced_w2_ratio"]
    assert wrong["log_ratio_std"] > 10 * right["log_ratio_std"]


def row(text, heading, name):
    """Cells of a row in the first table with it below a heading."""
    found = cells(text.split(f"{heading}\n", 1)[1])
    return next(row[1:] for row in found if row[0] == name)


def test_tables_and_figures(output):
    table = (output / "table.md").read_text()
    rows = pd.read_csv(output / "results.csv").set_index(["problem", "method", "beta"])
    label = "energy-weighted flow, OT (EFM)"
    found = rows.xs("efm_ot", level="method")
    means = found["sliced_w2_ratio"].groupby("beta").mean()
    summary = row(table, "## Over all problems", label)
    assert summary == ["yes", "yes", *(f"{m:.2f} ({m:.2f} to {m:.2f})" for m in means)]
    likelihood = found["log_ratio_std"].xs(5, level="beta").median()
    assert row(table, "## Likelihood", label)[0] == f"{likelihood:.3f}"
    moons = rows.loc["moons"]["sliced_w2_ratio"]
    expected = [f"{moons['efm_ot', beta]:.2f} ± 0.00" for beta in (0, 5)]
    assert row(table, "**moons**", label) == expected
    assert row(table, "**moons**", "ESS of a batch")[0] == "128"
    exact = rows.loc[(slice(None), ["exact_ot", "exact_cosine", "exact_vp"]), "sliced_w2_ratio"]
    assert f"at most 1.05 x the floor: {(exact <= 1.05).sum()} of 12 cells" in table
    assert "beta = 5" in table
    assert "## Cost" not in table
    for name in ("ratios", "samples_moons", "samples_mixture_2d"):
        assert imread(output / f"{name}.png").std() > 0.05


def test_the_report_takes_intervals_over_seeds_and_cost_relative_to_ed(output, tmp_path):
    shutil.copytree(output / comparison.UNITS, tmp_path / comparison.UNITS)
    first = tmp_path / comparison.UNITS / "moons-ot-0.json"
    units = pd.read_json(first)
    for seed, ratio in enumerate(ratios := [1.0, 1.3, 1.7]):
        text = units.assign(seed=seed, mmd_ratio=ratio).to_json(orient="records")
        first.with_name(f"moons-ot-{seed}.json").write_text(text)
    columns = "method", "parameters", "auxiliary_parameters", "train_seconds", "sample_seconds"
    cost = pd.DataFrame([("ed", 7, 3, 2.0, 0.5), ("cep", 7, 3, 3.0, 2.0)], columns=columns)
    (tmp_path / "cost.json").write_text(cost.to_json(orient="records"))
    comparison.report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert row(table, "## Cost", "contrastive energy (CEP)") == ["7", "3", "1.50", "4.00"]
    mean, _, high = mean_and_interval(ratios)
    expected = f"{mean:.2f} ± {high - mean:.2f}"
    part = table.split("## Every problem: MMD", 1)[1]
    assert row(part, "**moons**", "energy-weighted flow, OT (EFM)")[1] == expected


def test_the_picture_of_the_problems(tmp_path):
    toy2d.main([f"--output={tmp_path / 'toy2d.png'}"])
    assert imread(tmp_path / "toy2d.png").std() > 0.05


def test_cost_is_measured_for_every_method():
    settings = dataclasses.replace(comparison.SMOKE, cost_rounds=1)
    cost = comparison.measure_cost(problems()["mixture_2d"], settings).set_index("method")
    assert list(cost.index) == [*("efm_ot", "efm_cosine", "ed", "cep", "cg", "cfg", "monte_carlo")]
    assert (cost[["train_seconds", "sample_seconds"]] > 0).all(axis=None)
    assert (cost["auxiliary_parameters"] > 0).tolist() == [
        *(False, False, False, True, True, False, False)
    ]


def test_a_finished_unit_is_not_run_again_and_settings_do_not_mix(output):
    unit = output / comparison.UNITS / "moons-ot-0.json"
    before = unit.stat().st_mtime_ns
    comparison.run(output, SETTINGS, ("moons",), ("ot",))
    assert unit.stat().st_mtime_ns == before
    assert len(json.loads(unit.read_text())) == 2
    with pytest.raises(ValueError, match="other settings"):
        comparison.run(output, dataclasses.replace(SETTINGS, seeds=2), ("moons",), ("ot",))
    with pytest.raises(ValueError, match="no unit of the comparison is done yet"):
        comparison.report(output / "elsewhere")


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
    weights = np.exp(-3.0 * np.asarray(energy, np.float64))
    expected = (weights[:, None] * np.asarray(x)).sum(0) / weights.sum()
    ess = weights.sum() ** 2 / (weights**2).sum()
    target = problem.target(jax.random.key(1), 20_000, 3.0)
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
