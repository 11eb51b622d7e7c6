"""One CEFM loss in Flax NNX, Equinox and a plain function; couplings, times; and the tutorial."""

import importlib
import itertools
import math
import re
import runpy
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import nnx
from scipy.integrate import quad

from experiments.examples import coupling, equinox_model, nnx_model, plain_function, times

NAMES = ("nnx_model", "equinox_model", "plain_function")
each_name = pytest.mark.parametrize("name", NAMES)
NUM = 16384
# How far 1000 steps may leave a mean or variance from the target's, beside the error of a finite
# sample. A plain function with seeds 0, 1 and 3 was off by up to 0.02.
TRAINING_TOLERANCE = 0.03


@each_name
def test_the_script_samples_the_closed_form(name, monkeypatch, capsys):
    """N(0, I) reweighted by exp(-0.5 ||x - 1||^2) is N(0.5, 0.5 I)."""
    module = importlib.import_module(f"experiments.examples.{name}")
    drawn, sample = [], module.sampling.sample

    def recorded(*args, **options):
        drawn.append(sample(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(module.sampling, "sample", recorded)
    module.main()
    (x,) = drawn
    assert x.shape == (NUM, 2)
    # Four standard errors of the mean and of the variance of NUM normal samples of variance 0.5.
    np.testing.assert_allclose(x.mean(0), 0.5, atol=4 * math.sqrt(0.5 / NUM) + TRAINING_TOLERANCE)
    np.testing.assert_allclose(
        x.var(0), 0.5, atol=4 * 0.5 * math.sqrt(2 / NUM) + TRAINING_TOLERANCE
    )
    covariance = jnp.cov(x.T)[0, 1]
    assert abs(covariance) < 4 * 0.5 / math.sqrt(NUM) + TRAINING_TOLERANCE
    printed = capsys.readouterr().out
    assert f"mean {x.mean(0)}, exact 0.5" in printed
    assert f"std {x.std(0)}, exact 0.7071" in printed


@each_name
def test_the_script_is_short(name):
    module = importlib.import_module(f"experiments.examples.{name}")
    assert len(Path(module.__file__).read_text().splitlines()) < 60


def test_all_frameworks_see_one_loss_and_gradient():
    """One set of weights in three frameworks' own layers, through each script's own loss."""
    params = plain_function.init(jax.random.key(3))
    params = {name: value + 0.1 for name, value in params.items()}  # biases off 0
    key = jax.random.key(4)

    (plain_loss, plain_aux), plain_grads = jax.value_and_grad(plain_function.loss, has_aux=True)(
        params, key
    )

    nnx_field = nnx_model.Field(nnx.Rngs(0))
    layers = [layer for layer in nnx_field.mlp.layers if isinstance(layer, nnx.Linear)]
    for i, layer in enumerate(layers):
        layer.kernel.set_value(params[f"w{i}"])
        layer.bias.set_value(params[f"b{i}"])
    (nnx_loss, nnx_aux), grads = nnx.value_and_grad(nnx_model.loss, has_aux=True)(nnx_field, key)
    # Sequential also holds the activations: layers 0, 2 and 4 are the linear ones.
    nnx_grads = {
        f"{short}{i}": grads["mlp"]["layers"][2 * i][long].get_value()
        for i in range(3)
        for short, long in (("w", "kernel"), ("b", "bias"))
    }

    def weights_of(field):
        return [array for layer in field.mlp.layers for array in (layer.weight, layer.bias)]

    # Equinox keeps matrices as [out, in].
    values = [v for i in range(3) for v in (params[f"w{i}"].T, params[f"b{i}"])]
    eqx_field = eqx.tree_at(weights_of, equinox_model.Field(jax.random.key(0)), values)
    (eqx_loss, eqx_aux), grads = eqx.filter_value_and_grad(equinox_model.loss, has_aux=True)(
        eqx_field, key
    )
    eqx_grads = {
        f"{short}{i}": array
        for i, layer in enumerate(grads.mlp.layers)
        for short, array in (("w", layer.weight.T), ("b", layer.bias))
    }

    assert plain_loss > 0.1
    assert all(np.abs(g).max() > 1e-3 for g in plain_grads.values())
    for loss, aux, found in ((nnx_loss, nnx_aux, nnx_grads), (eqx_loss, eqx_aux, eqx_grads)):
        # float32 products may be summed in another order.
        np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
        np.testing.assert_allclose(aux["ess"], plain_aux["ess"], rtol=1e-5)
        assert found.keys() == plain_grads.keys()
        for name, expected in plain_grads.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def numbers_of(line):
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_optimal_couplings_are_the_cheapest_and_make_straight_flows(capsys):
    x0, noise = coupling.draw(np.random.default_rng(0), 5)
    found = coupling.couple(x0, noise)
    costs = [((x0 - noise[list(order)]) ** 2).sum() for order in itertools.permutations(range(5))]
    np.testing.assert_allclose(((x0 - found) ** 2).sum(), min(costs), rtol=1e-6)
    assert sorted(map(tuple, found)) == sorted(map(tuple, noise))
    coupling.main()
    independent, optimal = (numbers_of(line) for line in capsys.readouterr().out.splitlines())
    # Cost; the loss, which is the targets' variance that is left; and the distance of two steps.
    assert independent[0] == pytest.approx(9 + 2 * 0.2**2 + 2, rel=0.05)
    assert (np.array(optimal) < np.array(independent) / 2).all()


def test_weights_make_up_for_logit_normal_times(capsys):
    density = lambda t: 1 / float(times.weight(t))  # noqa: E731
    assert quad(density, 0, 1)[0] == pytest.approx(1, abs=1e-4)
    drawn = np.asarray(times.draw(jax.random.key(0), 100_000))
    share = quad(density, 0, 0.2)[0]
    assert (drawn < 0.2).mean() == pytest.approx(share, abs=4 * (share / 1e5) ** 0.5)
    times.main()
    found = {}
    for line in capsys.readouterr().out.splitlines():
        name, numbers = line.split(":")
        found[name] = numbers_of(numbers)[:2]
    off = {name: abs(loss - 16 / 3) / error for name, (loss, error) in found.items()}
    assert off["uniform"] < 4
    assert off["logit-normal, weighted"] < 4
    assert off["logit-normal"] > 8


@pytest.mark.parametrize(
    ("name", "pictures", "numbers"), [("tutorial", "12345", 30), ("digits", "12", 12)]
)
def test_a_tutorial_runs_and_draws(name, pictures, numbers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--smoke", f"--output={tmp_path}"])
    try:
        with matplotlib.rc_context():
            runpy.run_module(f"experiments.examples.{name}", run_name="__main__")
    finally:
        plt.close("all")
    found = sorted(tmp_path.glob("*.png"))
    assert [picture.stem[0] for picture in found] == list(pictures)
    for picture in found:
        pixels = matplotlib.image.imread(picture)[..., :3]
        # A blank canvas has one color; text and axes alone leave far less than 1% of it drawn on.
        assert (pixels < 0.9).any(-1).mean() > 0.02, picture.name
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, picture.name
    printed = capsys.readouterr().out
    assert len(re.findall(r"-?\d+\.\d+", printed)) > numbers
    assert "nan" not in printed
