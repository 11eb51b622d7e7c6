"""The study of the weights, small: it runs, and numbers that must hold at any size hold."""

import numpy as np
import pytest
from PIL import Image

from experiments.paper import weight_study
from experiments.paper.weight_figures import columns, read, select

QUESTIONS = ("gradient", "ess", "fraction", "noise", "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "weight_study"
    weight_study.main(["--smoke", f"--output={folder}", "--seed=3"])
    return folder


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_figure_for_each_question(folder, name):
    picture = folder / f"{name}.png"
    assert picture.stat().st_size < 150 * 1024
    colors = Image.open(picture).convert("RGB").getcolors(256)
    drawn = sum(count for count, color in colors if min(color) < 240)
    assert drawn > 0.01 * sum(count for count, _ in colors)
    assert len(colors) > 50


def test_bias_of_the_softmax_falls_as_one_over_the_batch_and_the_dataset_has_none(folder):
    rows = read(folder / "gradient.csv")
    smallest = []
    for beta in weight_study.GRADIENT_BETAS:
        softmax = select(rows, beta=beta, weights="softmax")[0]
        assert softmax["resolved"]
        assert softmax["bias"] > 6 * softmax["bias_noise"]
        assert -1.4 < weight_study.fitted_slope(rows, beta, "bias", 16) < -0.7
        assert -0.6 < weight_study.fitted_slope(rows, beta, "rms_error", 16) < -0.35
        smallest.append(softmax["bias"])
        for row in select(rows, beta=beta, weights="dataset"):
            assert not row["resolved"]
            assert row["bias_noise"] < softmax["bias"] / 5
            # Independent samples: the square error is that of one, over B.
            first = select(rows, beta=beta, weights="dataset", batch_size=16)[0]["rms_error"]
            np.testing.assert_allclose(
                row["rms_error"] * np.sqrt(row["batch_size"] / 16), first, rtol=0.1
            )
    assert smallest == sorted(smallest)


def test_effective_sample_size_agrees_with_the_closed_forms(folder):
    rows = read(folder / "ess.csv")
    for name, form in (("checkerboard", "uniform"), ("mixture_8d", "exact")):
        beta, found, expected = columns(select(rows, problem=name), "beta", "ess_fraction", form)
        np.testing.assert_allclose(found, expected, rtol=0.05)
        np.testing.assert_allclose(found[beta < 5], expected[beta < 5], rtol=0.01)


def test_beta_for_ess_holds_on_fresh_data(folder):
    rows = read(folder / "fraction.csv")
    largest = max(row["batch_size"] for row in rows)
    for fraction, tolerance in ((0.9, 0.005), (0.5, 0.02), (0.1, 0.1)):
        for row in select(rows, fraction=fraction, batch_size=largest):
            np.testing.assert_allclose(row["mean"], fraction, rtol=tolerance)
        few, many = (
            select(rows, fraction=fraction, batch_size=size)[0]["std"] for size in (64, largest)
        )
        np.testing.assert_allclose(
            few / many, np.sqrt(largest / 64), rtol=0.6
        )  # many: of 8 batches


def test_independent_noise_costs_samples_and_a_smooth_error_moves_the_target(folder):
    rows = read(folder / "noise.csv")
    for beta in weight_study.NOISE_BETAS:
        sigma, ratio, ess = columns(
            select(rows, beta=beta, error="independent"), "sigma", "ratio", "ess"
        )
        known = beta * sigma <= 1
        expected = ess[0] * np.exp(-((beta * sigma) ** 2))
        np.testing.assert_allclose(ess[known], expected[known], rtol=0.1)
        assert (abs(np.log(ratio[known])) < np.log(2)).all()
        moved, size = columns(select(rows, beta=beta, error="smooth"), "ratio", "ess")
        np.testing.assert_allclose(moved[0], ratio[0])  # no error, no difference
        far = (beta * sigma >= 1) & (size > 200)  # enough samples that noise is not what moved it
        assert (moved[far] > 2).all()
        assert far[-1] or beta > 5


def test_more_data_mends_noise_but_not_a_smooth_error(folder):
    rows = read(folder / "data.csv")
    (few, many), (same, still) = (
        columns(select(rows, beta=5.0, sigma=0.3, error=kind), "ratio")[0]
        for kind in ("independent", "smooth")
    )
    assert many < 1.5
    assert many < few < same
    assert still > 3
    assert still > 0.5 * same
