"""Exact posteriors, fields and energies against the plain NumPy way."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax import exact, paths, sampling
from tests.reference import exact as reference
from tests.reference import paths as reference_paths

PATHS = {
    "ot": (paths.conditional_ot(), reference_paths.conditional_ot()),
    "vp_linear": (paths.vp_linear(), reference_paths.vp_linear()),
    "vp_cosine": (paths.vp_cosine(), reference_paths.vp_cosine()),
}
each_path = pytest.mark.parametrize("name", PATHS)
B, D = 4, 2
TIMES = np.array([0.05, 0.3, 0.7, 1.0])
REFERENCE_NAMES = {"x0": "posterior_mean"}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def problem(n, *, some_impossible=False):
    """Points, times, data and log weights."""
    log_weights = normal(2, n)
    if some_impossible:
        log_weights[:: max(n // 3, 2)] = -np.inf  # the first point among them
    return normal(0, B, D), TIMES, 1.5 * normal(1, n, D), log_weights


@each_path
@pytest.mark.parametrize(
    ("n", "weights"), [(1, "finite"), (7, "none"), (7, "finite"), (5003, "some_impossible")]
)
def test_posterior_mean_velocity_and_score_match_numpy(x64, name, n, weights):
    path, ref = PATHS[name]
    x, t, data, log_weights = problem(n, some_impossible=weights == "some_impossible")
    extra = () if weights == "none" else (log_weights,)

    @jax.jit
    def everything(*inputs):
        return {
            f: getattr(exact, f)(path, *inputs) for f in ("posterior", "x0", "velocity", "score")
        }

    for function, got in everything(x, t, data, *extra).items():
        expected = getattr(reference, REFERENCE_NAMES.get(function, function))(
            ref, x, t, data, *extra
        )
        assert got.dtype == jnp.float64
        assert_allclose(got, expected, rtol=1e-8, atol=1e-9, err_msg=function)


@each_path
@pytest.mark.parametrize("n", [1, 5003])
def test_energies_and_classifier_guidance_match_numpy(x64, name, n):
    path, ref = PATHS[name]
    x, t, data, energy = problem(n)
    probability = 1.0 / (1.0 + np.exp(energy))

    @jax.jit
    def both(x, t, data, energy, probability):
        guided = exact.cg_score(path, x, t, data, probability, 3.0)
        return exact.intermediate_energy(path, x, t, data, energy, 1.7), guided

    got, guided = both(x, t, data, energy, probability)
    expected = reference.intermediate_energy(ref, x, t, data, energy, 1.7)
    assert_allclose(got, expected, rtol=1e-8, atol=1e-9)
    assert_allclose(
        guided, reference.cg_score(ref, x, t, data, probability, 3.0), rtol=1e-8, atol=1e-9
    )


@each_path
def test_infinite_energies(x64, name):
    path, ref = PATHS[name]
    x, t, data, energy = problem(7)
    energy[[0, 3]] = np.inf
    inputs = path, jnp.asarray(x), jnp.asarray(t), jnp.asarray(data)
    got = exact.intermediate_energy(*inputs, jnp.asarray(energy), 1.7)
    assert_allclose(got, reference.intermediate_energy(ref, x, t, data, energy, 1.7), rtol=1e-8)
    probability = np.where(np.isinf(energy), 0.0, 0.5 + 0.1 * np.arange(7) / 7)
    got = exact.cg_score(*inputs, jnp.asarray(probability), 2.0)
    assert_allclose(got, reference.cg_score(ref, x, t, data, probability, 2.0), rtol=1e-8)


def test_constant_energy_passes_through(x64):
    path, _ = PATHS["ot"]
    x, t, data, _ = problem(7)
    got = exact.intermediate_energy(
        path, jnp.asarray(x), t, jnp.asarray(data), jnp.full(7, 1e6), 2.0
    )
    assert_allclose(got, 2e6, rtol=1e-12)


@each_path
def test_gradient_of_the_energy_is_the_difference_of_scores(x64, name):
    """Eq. 4.3: ``q_t ∝ p_t exp(-E_t)``, so ``grad E_t = score_p - score_q``."""
    path, _ = PATHS[name]
    x, t, data, energy = (jnp.asarray(a) for a in problem(7))
    gradient = jax.jit(
        jax.grad(lambda x: exact.intermediate_energy(path, x, t, data, energy, 2.0).sum())
    )(x)
    expected = exact.score(path, x, t, data) - exact.score(path, x, t, data, -2.0 * energy)
    assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)


@each_path
def test_score_is_the_gradient_of_the_log_density(x64, name):
    path, ref = PATHS[name]
    x, t, data, log_weights = problem(5003)
    mu, sigma = ref.mu(t)[:, None, None], ref.sigma(t)[:, None]

    def log_density(x):
        distance = ((x[:, None] - mu * data) ** 2).sum(-1) / (2 * sigma**2)
        return jax.nn.logsumexp(log_weights - distance, axis=-1).sum()

    got = exact.score(
        path, jnp.asarray(x), jnp.asarray(t), jnp.asarray(data), jnp.asarray(log_weights)
    )
    assert_allclose(got, jax.grad(log_density)(jnp.asarray(x)), rtol=1e-7, atol=1e-8)


@each_path
def test_velocity_differentiates_in_x(x64, name):
    path, ref = PATHS[name]
    x, t, data, log_weights = problem(23)
    direction, h = normal(9, B, D), 1e-6

    @jax.jit
    def field(x):
        return exact.velocity(path, x, jnp.asarray(t), jnp.asarray(data), jnp.asarray(log_weights))

    difference = (
        reference.velocity(ref, x + h * direction, t, data, log_weights)
        - reference.velocity(ref, x - h * direction, t, data, log_weights)
    ) / (2 * h)
    tangent = jax.jvp(field, (jnp.asarray(x),), (jnp.asarray(direction),))[1]
    assert_allclose(tangent, difference, rtol=1e-5, atol=1e-5)
    pulled = jax.grad(lambda x: (field(x) * direction).sum())(jnp.asarray(x))
    assert np.isfinite(pulled).all()


@each_path
def test_classifier_guidance_is_exact_only_at_zero_and_one(x64, name):
    path, _ = PATHS[name]
    x, t, data, energy = (jnp.asarray(a) for a in problem(7))
    probability = jnp.exp(-jnp.abs(energy))

    @jax.jit
    def both(beta):
        guided = exact.score(path, x, t, data, beta * jnp.log(probability))
        return exact.cg_score(path, x, t, data, probability, beta), guided

    for beta in (0.0, 1.0):
        assert_allclose(*both(beta), rtol=1e-8, atol=1e-9)
    classifier, guided = both(3.0)
    assert np.abs(classifier - guided)[:3].max() > 1e-3


@each_path
def test_near_zero_one_point_takes_the_posterior(x64, name):
    path, ref = PATHS[name]
    data, t = 1.5 * normal(1, 7, D), np.full(7, 1e-4)
    x = reference_paths.sample(ref, data, normal(3, 7, D), t)
    got = exact.posterior(path, jnp.asarray(x), jnp.asarray(t), jnp.asarray(data))
    assert_allclose(got, np.eye(7), atol=1e-8)
    velocity = exact.velocity(path, jnp.asarray(x), jnp.asarray(t), jnp.asarray(data))
    assert_allclose(velocity, reference.velocity(ref, x, t, data), rtol=1e-6)


@each_path
def test_float32_near_zero(name):
    path, _ = PATHS[name]
    data = (1.5 * normal(1, 7, D)).astype(np.float32)
    t = np.full(B, 1e-5, np.float32)
    x = normal(0, B, D).astype(np.float32)  # far from every data point: distances / sigma^2 of 1e10
    functions = exact.posterior, exact.velocity, exact.score
    got = [f(path, jnp.asarray(x), jnp.asarray(t), jnp.asarray(data)) for f in functions]
    chex.assert_type(got, jnp.float32)
    chex.assert_tree_all_finite(got)
    near = np.argmin(((x[:, None] - data) ** 2).sum(-1), -1)
    assert_allclose(exact.posterior(path, x, t, data), np.eye(7)[near], atol=1e-6)


@each_path
@pytest.mark.parametrize("time", [1e-3, 1e-5, 1e-7])
def test_float32_towards_time_zero(name, time):
    """Near its own datum, which takes all the posterior, a point loses only the rounding of x."""
    path, ref = PATHS[name]
    data = np.array([[-2.0, 0.5], [-1.0, -1.0], [0.0, 1.5], [1.0, 0.0], [2.0, -2.0]])
    noise, t, energy = normal(3, 5, D), np.full(5, np.float32(time), np.float64), 2.0 * normal(4, 5)
    x = reference_paths.sample(ref, data, noise, t).astype(np.float32)
    inputs = path, *(jnp.asarray(a, jnp.float32) for a in (x, t, data))
    log_weights = jnp.asarray(-energy, jnp.float32)
    assert_allclose(exact.posterior(*inputs, log_weights), np.eye(5), atol=1e-6)
    assert_allclose(exact.x0(*inputs, log_weights), data, rtol=1e-6, atol=1e-6)
    intermediate = exact.intermediate_energy(*inputs, jnp.asarray(energy, jnp.float32), 1.0)
    assert_allclose(intermediate, energy, rtol=1e-5, atol=1e-5)
    sigma, lost = ref.sigma(t)[0], 1e-6 / ref.sigma(t)[0]  # of the noise that x holds
    velocity, score = (getattr(exact, f)(*inputs, log_weights) for f in ("velocity", "score"))
    expected = reference_paths.velocity(ref, data, noise, t)
    assert_allclose(velocity, expected, atol=lost * ref.sigma_dot(t)[0] + 1e-5)
    assert_allclose(score, reference_paths.score(ref, noise, t), atol=(lost + 1e-5) / sigma)


@each_path
def test_posterior_mean_at_both_ends(x64, name):
    """At ``t = 0`` it is the nearest datum; in pure noise (``mu = 0``) the weighted mean."""
    path, _ = PATHS[name]
    x, _, data, log_weights = problem(7)
    nearest = ((x[:, None] - data) ** 2).sum(-1).argmin(-1)
    inputs = jnp.asarray(data), jnp.asarray(log_weights)
    assert_allclose(exact.x0(path, x, jnp.zeros(B), *inputs), data[nearest], rtol=1e-12)
    if name != "vp_linear":
        expected = np.tile(np.exp(log_weights) @ data / np.exp(log_weights).sum(), (B, 1))
        assert_allclose(exact.x0(path, x, jnp.ones(B), *inputs), expected, rtol=1e-10)


@each_path
@pytest.mark.parametrize("time", [1e-5, 0.05])
def test_float32_energy_keeps_its_digits(name, time):
    """Two logarithms of sums of size 1 / sigma^2 must not be subtracted from each other."""
    path, ref = PATHS[name]
    data = (1.5 * normal(1, 7, D)).astype(np.float32)
    x, t, energy = (
        normal(0, B, D).astype(np.float32),
        np.full(B, time, np.float32),
        np.arange(7, dtype=np.float32),
    )
    got = jax.jit(lambda x, t: exact.intermediate_energy(path, x, t, data, energy, 2.0))(x, t)
    wide = [a.astype(np.float64) for a in (x, t, data, energy)]
    assert_allclose(got, reference.intermediate_energy(ref, *wide, 2.0), rtol=2e-3, atol=2e-3)


@each_path
def test_float32_keeps_its_digits(name):
    path, ref = PATHS[name]
    x, t, data, log_weights = (a.astype(np.float32) for a in problem(500))
    got = exact.velocity(
        path, jnp.asarray(x), jnp.asarray(t), jnp.asarray(data), jnp.asarray(log_weights)
    )
    expected = reference.velocity(ref, *(a.astype(np.float64) for a in (x, t, data, log_weights)))
    assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


@each_path
def test_at_time_zero_on_a_data_point(x64, name):
    path, _ = PATHS[name]
    data, zero = 1.5 * normal(1, 7, D), np.zeros(7)
    posterior = exact.posterior(path, jnp.asarray(data), jnp.asarray(zero), jnp.asarray(data))
    assert_allclose(posterior, np.eye(7), atol=1e-12)
    velocity = exact.velocity(path, jnp.asarray(data), jnp.asarray(zero), jnp.asarray(data))
    assert np.isfinite(velocity).all()
    energy = exact.intermediate_energy(
        path, jnp.asarray(data), zero, jnp.asarray(data), jnp.arange(7.0), 2.0
    )
    assert_allclose(energy, 2.0 * np.arange(7), rtol=1e-9)


@pytest.mark.parametrize("block_elements", [1, 4 * 37, 4 * 5003])
def test_streaming_in_several_blocks(x64, monkeypatch, block_elements):
    """Whole blocks carry no weight, the first and the last among them."""
    monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", block_elements)
    path, ref = PATHS["ot"]
    n = 40 if block_elements == 1 else 5003
    x, t, data, log_weights = problem(n)
    log_weights[: n // 4] = log_weights[-n // 4 :] = -np.inf
    inputs = jnp.asarray(x), jnp.asarray(t), jnp.asarray(data)
    got = exact.x0(path, *inputs, jnp.asarray(log_weights))
    assert_allclose(got, reference.posterior_mean(ref, x, t, data, log_weights), rtol=1e-8)
    got = exact.velocity(path, *inputs, jnp.asarray(log_weights))
    assert_allclose(got, reference.velocity(ref, x, t, data, log_weights), rtol=1e-8, atol=1e-9)
    got = exact.intermediate_energy(path, *inputs, jnp.asarray(-log_weights), 1.3)
    expected = reference.intermediate_energy(ref, x, t, data, -log_weights, 1.3)
    assert_allclose(got, expected, rtol=1e-8)


def test_two_hundred_thousand_points():
    path, ref = PATHS["ot"]
    data = normal(4, 200_000, 4).astype(np.float32)
    x, t, energy = normal(5, B, 4).astype(np.float32), TIMES.astype(np.float32), data[:, 0]
    velocity = jax.jit(lambda x: exact.velocity(path, x, t, data, -energy))(x)
    # the reference on all of them takes seconds: a tenth is close by the law of large numbers
    some = 20_000
    expected = reference.velocity(
        ref, *(a.astype(np.float64) for a in (x, t, data[:some], -energy[:some]))
    )
    chex.assert_shape(velocity, (B, 4))
    assert_allclose(velocity[1:], expected[1:], atol=0.15)
    assert np.isfinite(exact.intermediate_energy(path, x, t, data, energy, 1.0)).all()


def test_memory_does_not_hold_every_pair():
    """Compiled for n = 1e6, d = 16: work space against one ``[B, n, d]`` array."""
    path, batch, n, d = PATHS["ot"][0], 64, 1_000_000, 16

    def work_space(function):
        shapes = [
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((batch, d), (batch,), (n, d), (n,))
        ]
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes / (4 * batch * n * d)

    assert work_space(lambda x, t, data, w: exact.x0(path, x, t, data, w)) < 0.05
    assert work_space(lambda x, t, data, w: exact.velocity(path, x, t, data, w)) < 0.05
    assert (
        work_space(lambda x, t, data, w: exact.intermediate_energy(path, x, t, data, w, 1.0)) < 0.05
    )
    assert work_space(lambda x, t, data, w: exact.cg_score(path, x, t, data, w, 2.0)) < 0.05

    def gradient(x, t, data, w):
        return jax.grad(lambda x: exact.intermediate_energy(path, x, t, data, w, 1.0).sum())(x)

    assert work_space(gradient) < 0.15


def test_a_million_points():
    """Streamed in float32; one point of the batch sits on a datum at a small time."""
    path, _ = PATHS["ot"]
    data = normal(6, 1_000_000, 2).astype(np.float32)
    x, t = np.stack([data[700_000], np.ones(2, np.float32)]), np.array([1e-4, 0.6], np.float32)
    got = jax.jit(lambda *inputs: exact.x0(path, *inputs))(x, t, data)
    assert_allclose(got[0], data[700_000], atol=1e-3)
    # Standard normal data: E[x_0 | x] = mu x / (mu^2 + sigma^2).
    assert_allclose(got[1], 0.4 / (0.4**2 + 0.6**2) * x[1], atol=0.01)


@each_path
def test_the_guided_flow_reaches_the_weighted_data(name):
    """Continuity: Thm 4.1's field takes noise to the data points in proportion to their weights."""
    path, _ = PATHS[name]
    data = jnp.array([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])
    log_weights = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    noise = jax.random.normal(jax.random.key(0), (2000, 2))

    def run(noise):
        def field(x, t):
            return exact.velocity(path, x, t, data, log_weights)

        return sampling.sample(field, noise, solver="midpoint", num_steps=60, t_end=1e-3)

    distance = jnp.linalg.norm(jax.jit(run)(noise)[:, None] - data, axis=-1)
    frequency = np.bincount(np.asarray(distance.argmin(-1)), minlength=4) / 2000
    assert_allclose(frequency, np.exp(log_weights), atol=0.045)
    assert np.median(distance.min(-1)) < 0.1
