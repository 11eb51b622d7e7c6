"""Trajectories, time grids, ancestral samples, probes and chunks of likelihoods."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efm_jax import exact, paths, sampling

# --- trajectories, grids and evaluations ---


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_a_trajectory_ends_at_the_sample_and_counts_its_calls(solver):
    calls, noise = [], jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)

    def field(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(x) * t[:, None]

    path = sampling.sample_trajectory(field, noise, solver=solver, num_steps=5)
    jax.effects_barrier()
    assert len(calls) == path.num_evaluations
    np.testing.assert_array_equal(path.points[0], noise)
    np.testing.assert_allclose(path.times, np.linspace(1, 0, 6), atol=1e-6)
    end = sampling.sample(field, noise, solver=solver, num_steps=5)
    np.testing.assert_allclose(path.points[-1], end, rtol=1e-5)


def test_a_grid_of_ones_own_is_one_step_after_the_other():
    noise, times = jnp.ones((3, 2)), jnp.array([1.0, 0.7, 0.1, 0.0])
    field = lambda x, t: x * t[:, None]  # noqa: E731
    x = noise
    for start, end in itertools.pairwise(np.asarray(times)):
        x = sampling.sample(field, x, solver="rk4", num_steps=1, t_start=start, t_end=end)
    np.testing.assert_allclose(
        sampling.sample(field, noise, solver="rk4", times=times), x, rtol=1e-6
    )


def test_too_few_steps_of_dopri5_are_an_error():
    with pytest.raises(Exception, match="maximum number of solver steps"):
        sampling.sample(
            lambda x, t: jnp.sin(50 * x), jnp.ones((2, 2)), solver="dopri5", max_steps=4
        )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", [paths.conditional_ot(), paths.vp_linear()], ids=["ot", "vp"])
def test_ancestral_samples_have_the_datas_distribution(path, eta):
    """A Gaussian of mean 2 and variance 0.25, by its exact prediction of the data."""
    mixture = exact.GaussianMixture(jnp.zeros(1), jnp.full((1, 1), 2.0), jnp.full(1, 0.25))
    draw = jax.jit(
        lambda key, noise: sampling.sample_ancestral(
            lambda x, t: mixture.x0(path, x, t), path, key, noise, eta=eta, prediction="data"
        )
    )
    samples = draw(jax.random.key(0), jax.random.normal(jax.random.key(1), (20_000, 1)))
    assert np.mean(samples) == pytest.approx(2, abs=0.02)
    assert np.std(samples) == pytest.approx(0.5, abs=0.02)
    # Fresh noise, and none at eta = 0.
    other = draw(jax.random.key(2), jax.random.normal(jax.random.key(1), (20_000, 1)))
    assert np.array_equal(samples, other) == (eta == 0)


# Two components, whose distribution is not normal, in two dimensions.
MIXTURE = exact.GaussianMixture(
    jnp.log(jnp.array([0.3, 0.7])), jnp.array([[2.0, 0.0], [-1.0, 1.0]]), jnp.array([0.25, 0.1])
)
MIXTURE_MEAN = np.array([-0.1, 0.7])
MIXTURE_COVARIANCE = np.array([[2.035, -0.63], [-0.63, 0.355]])
NOISE = jax.random.normal(jax.random.key(1), (10_000, 2))


def mixture_field(path, prediction="velocity"):
    def field(x, t):
        return path.convert(MIXTURE.x0(path, x, t), x, t, "data", prediction)

    return field


@pytest.mark.parametrize("name", paths.PATHS)
@pytest.mark.parametrize("diffusion", [None, 0.4, lambda t: 2 * t], ids=["sigma", "0.4", "2t"])
def test_an_sde_of_any_noise_level_has_the_datas_distribution(name, diffusion):
    path = paths.PATHS[name].make()
    times = jnp.linspace(1, 0, 151) ** 2  # a constant level needs short steps near the data
    draw = jax.jit(
        lambda key: sampling.sample_sde(
            mixture_field(path), path, key, NOISE, diffusion=diffusion, times=times
        )
    )
    samples = draw(jax.random.key(0))
    np.testing.assert_allclose(samples.mean(0), MIXTURE_MEAN, atol=0.06)
    np.testing.assert_allclose(np.cov(samples.T), MIXTURE_COVARIANCE, atol=0.1)


@pytest.mark.parametrize("name", paths.PATHS)
def test_an_sde_without_noise_is_eulers_method(name):
    path, noise = paths.PATHS[name].make(), NOISE[:64]
    options = {"num_steps": 20, "t_end": 0.01}
    want = sampling.sample(mixture_field(path), noise, **options)
    for diffusion in (0, jnp.zeros_like):
        got = sampling.sample_sde(
            mixture_field(path), path, jax.random.key(0), noise, diffusion=diffusion, **options
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_an_sde_of_every_prediction_and_of_images_and_pytrees(prediction):
    path, key, noise = paths.vp_cosine(), jax.random.key(0), NOISE[:8]
    options = {"num_steps": 20, "t_start": 0.98, "t_end": 0.1}
    run = functools.partial(sampling.sample_sde, path=path, key=key, **options)
    want = run(mixture_field(path), noise=noise)
    field = mixture_field(path, prediction)
    got = run(field, noise=noise, prediction=prediction)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    image = run(
        lambda x, t: field(x.reshape(8, 2), t).reshape(8, 1, 2, 1),
        noise=noise.reshape(8, 1, 2, 1),
        prediction=prediction,
    )
    np.testing.assert_allclose(image.reshape(8, 2), got, rtol=1e-5, atol=1e-6)
    parts = run(
        lambda x, t: {"a": field(x["a"], t), "b": jnp.zeros_like(x["b"])},
        noise={"a": noise, "b": noise[:, 0]},
        diffusion=0.0,
        prediction=prediction,
    )
    alone = run(field, noise=noise, diffusion=0.0, prediction=prediction)
    np.testing.assert_allclose(parts["a"], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"diffusion": -1.0}, "diffusion"),
        ({"diffusion": lambda t: t[:, None]}, r"diffusion\(times\)"),
        ({"times": jnp.array([0.0, 1.0])}, "times"),
        ({"times": jnp.array([1.5, 0.0])}, "times"),
        ({"t_end": -0.1}, "t_end"),
        ({"prediction": "x0"}, "source"),
    ],
)
def test_an_sde_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        sampling.sample_sde(
            lambda x, t: x, paths.vp_cosine(), jax.random.key(0), NOISE[:4], **options
        )


# --- likelihoods ---


def test_probes_and_chunks(x64):
    x0, kernel = np.random.default_rng(0).normal(size=(3, 4)), np.random.default_rng(1)
    kernel = jnp.asarray(kernel.normal(size=(4, 4)))
    run = functools.partial(
        sampling.log_likelihood, lambda x, t: jnp.tanh(x @ kernel), jnp.asarray(x0), num_steps=3
    )
    exactly = run()
    for size in (1, 3, 9):
        np.testing.assert_allclose(run(chunk_size=size), exactly, rtol=1e-12)
    for probe in ("rademacher", "gaussian"):
        many = run(key=jax.random.key(0), num_probes=4000, probe=probe, chunk_size=500)
        np.testing.assert_allclose(many, exactly, atol=0.3)
        few = run(key=jax.random.key(0), num_probes=2, probe=probe)
        assert np.abs(few - exactly).max() > 1e-3
    bits = sampling.bits_per_dim(exactly, 4, bits=7.0)
    np.testing.assert_allclose(bits, 7 - np.asarray(exactly) / np.log(2) / 4)
