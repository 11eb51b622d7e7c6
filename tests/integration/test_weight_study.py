"""The study of the weights, small: it runs, and numbers that must hold at any size hold."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments.paper import weight_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "weight_study"
    weight_study.main(["--smoke", f"--output={folder}", "--seed=3"])
    return folder


@pytest.mark.parametrize("name", weight_study.STUDIES)
def test_a_figure_for_each_question(folder, name):
    picture = folder / f"{name}.png"
    assert picture.stat().st_size < 150 * 1024
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert (pixels.min(-1) < 240).mean() > 0.01
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_bias_of_the_softmax_falls_as_one_over_the_batch_and_the_dataset_has_none(folder):
    rows = pd.read_csv(folder / "gradient.csv")
    assert rows["beta"].nunique() == len(weight_study.GRADIENT_BETAS)
    smallest = rows.query("weights == 'softmax' and batch_size == 16")
    assert smallest["bias"].is_monotonic_increasing
    for (_, softmax), (beta, here) in zip(smallest.iterrows(), rows.groupby("beta"), strict=True):
        dataset = here[here["weights"] == "dataset"]
        assert softmax["resolved"]
        assert softmax["bias"] > 6 * softmax["bias_noise"]
        assert -1.4 < weight_study.fitted_slope(rows, beta, "bias", 16) < -0.7
        assert -0.6 < weight_study.fitted_slope(rows, beta, "rms_error", 16) < -0.35
        assert not dataset["resolved"].any()
        assert (dataset["bias_noise"] < softmax["bias"] / 5).all()
        # Independent samples: the square error is that of one, over B.
        scaled = dataset["rms_error"] * np.sqrt(dataset["batch_size"])
        np.testing.assert_allclose(scaled, scaled.iloc[0], rtol=0.1)


def test_effective_sample_size_agrees_with_the_closed_forms(folder):
    rows = pd.read_csv(folder / "ess.csv")
    for name, form in (("checkerboard", "uniform"), ("mixture_8d", "exact")):
        here = rows[rows["problem"] == name]
        error = np.abs(here["ess_fraction"] / here[form] - 1)
        assert (error < np.where(here["beta"] < 5, 0.01, 0.05)).all()


def test_beta_for_ess_holds_on_fresh_data(folder):
    rows = pd.read_csv(folder / "fraction.csv")
    largest = rows["batch_size"].max()
    for fraction, tolerance in ((0.9, 0.005), (0.5, 0.02), (0.1, 0.1)):
        here = rows[rows["fraction"] == fraction].set_index("batch_size")
        np.testing.assert_allclose(here.loc[largest, "mean"], fraction, rtol=tolerance)
        few, many = (here.loc[size, "std"].iloc[0] for size in (64, largest))
        np.testing.assert_allclose(few / many, np.sqrt(largest / 64), rtol=0.6)  # many: of 8


def test_independent_noise_costs_samples_and_a_smooth_error_moves_the_target(folder):
    rows = pd.read_csv(folder / "noise.csv")
    for beta in weight_study.NOISE_BETAS:
        of_beta = rows[rows["beta"] == beta].set_index("error")
        noise, smooth = of_beta.loc["independent"], of_beta.loc["smooth"]
        size = beta * noise["sigma"].to_numpy()
        known = noise[size <= 1]
        expected = noise["ess"].iloc[0] * np.exp(-(size[size <= 1] ** 2))
        np.testing.assert_allclose(known["ess"], expected, rtol=0.1)
        assert (abs(np.log(known["ratio"])) < np.log(2)).all()
        # No error, no difference.
        np.testing.assert_allclose(smooth["ratio"].iloc[0], noise["ratio"].iloc[0])
        # Enough samples that noise is not what moved it.
        far = (size >= 1) & (smooth["ess"] > 200)
        assert (smooth["ratio"][far] > 2).all()
        assert far.iloc[-1] or beta > 5


def test_more_data_mends_noise_but_not_a_smooth_error(folder):
    rows = pd.read_csv(folder / "data.csv").query("beta == 5 and sigma == 0.3").set_index("error")
    (few, many), (same, still) = (rows.loc[kind, "ratio"] for kind in ("independent", "smooth"))
    assert many < 1.5
    assert many < few < same
    assert still > 3
    assert still > 0.5 * same
