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
