"""The generative model: any prediction on any path with any sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax.losses import LOSSES
from efm_jax.paths import PATHS, PREDICTIONS
from efm_jax.rl.model import SOLVERS, GenerativeModel
from tests import tiny
from tests.tiny import A, S, config

ROWS, M = 40, 4
MEAN, STD = 0.2, 0.3


def gaussian_field(path, prediction):
    """The exact prediction for data N(MEAN, STD^2)."""

    def field(x, t):
        t = jnp.maximum(t, 1e-4)  # where data do not determine the velocity
        mu, sigma = path.mean_coef(t)[..., None], path.std(t)[..., None]
        gain = mu * STD**2 / (mu**2 * STD**2 + sigma**2)
        return path.convert(MEAN + gain * (x - mu * MEAN), x, t, "data", prediction)

    return field


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_any_prediction_on_any_path_with_any_sampler(path, prediction):
    """The flow of a Gaussian moves every point by one affine map, known in closed form."""
    noise = jnp.linspace(-2, 2, 9)[:, None] * jnp.ones((1, A))
    start = GenerativeModel.from_config(config(path=path)).start_time(prediction)
    assert start == (0.95 if prediction in ("noise", "score") and path != "vp" else 1.0)
    mu, sigma = (float(f(start)) for f in (PATHS[path].make().mean_coef, PATHS[path].make().std))
    expected = MEAN + STD * (sigma * noise - mu * MEAN) / np.hypot(mu * STD, sigma)
    # A solver of a velocity takes a converted prediction, whichever solver it is.
    for solver in SOLVERS if (path, prediction) == ("ot", "velocity") else ("midpoint", "dpmpp"):
        steps = 300 if solver == "euler" else 40
        model = GenerativeModel.from_config(config(path=path, solver=solver, sample_steps=steps))
        field = gaussian_field(model.path, prediction)
        sample = jax.jit(functools.partial(model.integrate, field, prediction=prediction))
        assert_allclose(sample(noise), expected, atol=0.01, err_msg=solver)


@pytest.mark.parametrize(("path", "prediction"), zip(["ot", *PATHS], PREDICTIONS, strict=True))
def test_the_loss_is_the_error_of_the_prediction(path, prediction):
    model = GenerativeModel.from_config(config(path=path, prediction=prediction))
    assert model.prediction == model.loss_entry.prediction == prediction
    params = jax.jit(model.init, static_argnums=(1, 2))(jax.random.key(0), S, A)
    data = tiny.transitions(ROWS)
    weights = np.linspace(0, 2, ROWS, dtype=np.float32)
    inputs = params, jax.random.key(1), data.observations, data.actions
    loss, aux = jax.jit(model.loss)(*inputs, weights=weights)

    def error(index, x0, observation):
        time_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(1), index))
        t, noise = 1 - jax.random.uniform(time_key), jax.random.normal(noise_key, (A,))
        found = model.network.apply(params, model.path.sample(x0, noise, t), t, observation)
        error = jnp.sum((found - model.path.target(prediction, x0, noise, t)) ** 2)
        return error * model.path.std(t) ** 2 if prediction == "score" else error

    errors = jax.jit(jax.vmap(error))(np.arange(ROWS), data.actions, data.observations)
    errors = np.asarray(errors)
    assert float(loss) == pytest.approx(np.mean(weights * errors), rel=1e-4)
    assert float(aux["ess"]) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-5)


@pytest.mark.parametrize(
    "field", ["path", "prediction", "loss", "network", "solver", "eval_solver"]
)
def test_a_name_in_no_registry_is_refused_by_its_field(field):
    with pytest.raises(ValueError, match=rf"^{field}: expected one of .*; got 'nosuch'"):
        GenerativeModel.from_config(config(**{field: "nosuch"}))


def test_a_loss_chooses_the_prediction_that_its_field_makes():
    model = GenerativeModel.from_config(config(path="vp", loss="cfm"))
    assert (model.prediction, model.loss_entry) == ("noise", LOSSES["cfm"])


@pytest.mark.parametrize(("path", "solver"), [("ot", "midpoint"), ("vp", "dpmpp")])
def test_samples_are_in_bounds_and_each_alone(path, solver):
    model = GenerativeModel.from_config(config(path=path, solver=solver))
    params = jax.jit(model.init, static_argnums=(1, 2))(jax.random.key(0), S, A)
    observations = tiny.transitions(ROWS).observations[:, None]
    noise = 3 * np.random.default_rng(0).standard_normal((ROWS, M, A)).astype(np.float32)
    actions = jax.jit(model.sample)(params, observations, noise)
    assert actions.shape == noise.shape
    assert np.isfinite(actions).all()
    assert np.abs(actions).max() <= 1
    alone = jax.jit(model.sample)(params, observations[:1], noise[:1])
    assert_allclose(actions[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_a_model_in_bfloat16_has_about_the_same_field_in_float32(path):
    exact, rounded = (
        GenerativeModel.from_config(config(path=path, dtype=d)) for d in ("float32", "bfloat16")
    )
    params = jax.jit(exact.init, static_argnums=(1, 2))(jax.random.key(0), S, A)
    x = np.random.default_rng(0).standard_normal((ROWS, A)).astype(np.float32)
    observations, t = tiny.transitions(ROWS).observations, np.full(ROWS, 0.5, np.float32)
    expected, found = (
        jax.jit(model.field(params, observations))(x, t) for model in (exact, rounded)
    )
    assert found.dtype == jnp.float32
    assert 0 < np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
