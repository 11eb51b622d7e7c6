"""The paper's theorems as the code states them, by quadrature in float64 (Zhang et al. 2025).

One-dimensional problems with a few data points, where every expectation is a sum over data and an
integral over the noise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
from scipy.special import softmax
from scipy.stats import norm

from efm_jax import exact, losses, paths, sampling
from efm_jax.weights import energy_weights
from tests.problems import each_path

# NumPy, since 64-bit types are enabled only inside a test.
DATA = np.array([-1.6, -0.7, 0.1, 0.9, 2.0])[:, None]
ENERGY = np.array([0.5, -1.0, 0.8, 0.1, -0.4])
BETA = 1.3


# --- Thm 4.3 and Cor. 4.8: the weighted conditional loss has the gradient of the marginal one ---


def network(theta, x, t):
    """A small tanh network ``[d], [] -> [d]``."""
    hidden = jnp.tanh(theta["inner"] @ jnp.append(x, t) + theta["bias"])
    return theta["outer"] @ hidden


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"inner": (8, 2), "bias": (8,), "outer": (1, 8)}
    return {key: jnp.asarray(0.7 * rng.normal(size=shape)) for key, shape in shapes.items()}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def over_time():
    """Gauss-Legendre nodes and weights on [0.05, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    return 0.525 + 0.475 * nodes, 0.475 * weights


def over_noise(number=200):
    """Nodes and weights of expectations over a standard normal variable."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(number)
    return nodes, weights / weights.sum()


def conditional_gradient(error, path):
    """Of CEFM or CED over the whole population: all data, Gauss-Hermite over the noise."""
    noises, noise_weights = over_noise()

    def loss(theta, time_weights, beta):
        def one(x0, noise, t):
            return error(lambda x, t: network(theta, x, t), path, x0, noise, t)

        for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
            one = jax.vmap(one, axes)
        errors = one(jnp.asarray(DATA), noises[:, None], over_time()[0])
        data_weights = energy_weights(ENERGY, beta)
        return jnp.einsum("i,j,k,ijk", data_weights, noise_weights, time_weights, errors)

    return jax.jit(jax.grad(loss))


def marginal_gradient(field, path):
    """Of EFM or ED as the paper has them: ``x ~ p_t`` on a grid, weights ``exp(-E_t(x)) / Z``."""
    grid, step = np.linspace(-14.0, 14.0, 6001, retstep=True)
    x, data = grid[:, None], jnp.asarray(DATA)

    def at(theta, t, beta):
        column = jnp.full(grid.shape, t)
        pdf = jax.scipy.stats.norm.pdf(x, path.mean_coef(t) * data[:, 0], path.std(t))
        energy = exact.intermediate_energy(path, x, column, data, ENERGY, beta)
        target = field(path, x, column, data, -beta * ENERGY)
        # Where the density vanishes the intermediate energy may be anything.
        weight = step * pdf.mean(-1) * jnp.exp(-energy) / jnp.exp(-beta * ENERGY).mean()
        prediction = jax.vmap(lambda x, t: network(theta, x, t))(x, column)
        return jnp.sum(weight * jnp.sum((prediction - target) ** 2, axis=-1))

    def loss(theta, time_weights, beta):
        return time_weights @ jax.vmap(at, (None, 0, None))(theta, over_time()[0], beta)

    return jax.jit(jax.grad(loss))


def difference(a, b):
    return np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b))


@each_path
def test_cefm_has_the_gradient_of_efm(x64, path, ref):
    """Thm 4.3; and at ``beta = 0`` Thm 3.1."""
    theta, weights = parameters(), over_time()[1]
    conditional, marginal = (
        {beta: gradient(theta, weights, beta) for beta in (0.0, BETA)}
        for gradient in (
            conditional_gradient(losses.cfm_error, path),
            marginal_gradient(exact.velocity, path),
        )
    )
    for beta in (0.0, BETA):
        assert difference(conditional[beta], marginal[beta]) < 1e-8
    assert difference(conditional[0.0], marginal[BETA]) > 0.05  # the weights matter


@each_path
def test_ced_has_the_gradient_of_ed(x64, path, ref):
    """Cor. 4.8, for any lambda: the variance and another one."""
    conditional = conditional_gradient(losses.dsm_error, path)
    marginal, (times, weights) = marginal_gradient(exact.score, path), over_time()
    for time_weight in (ref.sigma(times) ** 2, np.exp(-times)):
        inputs = parameters(), weights * time_weight
        found = conditional(*inputs, BETA)
        assert difference(found, marginal(*inputs, BETA)) < 1e-8
        assert difference(found, marginal(*inputs, 0.0)) > 0.005


# --- Thm 4.1: the guided field generates q_t ---


def log_guided_density(path, x, t, data, log_weights):
    """``log q_t(x)`` up to a constant, at one point: ``sum_i exp(l_i) N(x; mu x_i, sigma^2 I)``."""
    residual = x - path.mean_coef(t) * data
    log_normal = -jnp.sum(residual**2, -1) / (2 * path.std(t) ** 2) - data.shape[1] * jnp.log(
        path.std(t)
    )
    return jax.nn.logsumexp(log_weights + log_normal)


def continuity(log_density, field, x, t):
    """``d/dt log q + u . grad log q + div u``, which is 0, over the size of its terms."""

    def one(x, t):
        rate = jax.grad(log_density, argnums=1)(x, t)
        transport = field(x, t) @ jax.grad(log_density)(x, t)
        divergence = jnp.trace(jax.jacfwd(field)(x, t))
        return (rate + transport + divergence) / (abs(rate) + abs(transport) + abs(divergence))

    return jax.jit(jax.vmap(one))(x, t)


@each_path
def test_continuity_equation_on_finite_data(x64, path, ref):
    rng, d = np.random.default_rng(1), 2
    data = jnp.asarray(1.5 * rng.normal(size=(6, d)))
    log_weights, energy = -BETA * jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=6))
    x, t = jnp.asarray(rng.normal(size=(40, d))), jnp.asarray(rng.uniform(0.1, 0.99, 40))

    def field(x, t, log_weights=log_weights):
        return exact.velocity(path, x[None], t[None], data, log_weights)[0]

    def log_density(x, t):
        return log_guided_density(path, x, t, data, log_weights)

    assert_allclose(continuity(log_density, field, x, t), 0.0, atol=1e-9)
    other = functools.partial(field, log_weights=-energy)
    assert np.abs(continuity(log_density, other, x, t)).max() > 0.05


@each_path
def test_intermediate_energy_joins_the_two_densities(x64, path, ref):
    """``q_t = p_t exp(-E_t) / Z`` on finite data."""
    rng = np.random.default_rng(2)
    x, t = jnp.asarray(2 * rng.normal(size=(20, 1))), jnp.asarray(rng.uniform(0.05, 1.0, 20))
    data, energy = jnp.asarray(DATA), jnp.asarray(ENERGY)
    densities = jax.jit(jax.vmap(lambda x, t, w: log_guided_density(path, x, t, data, w)))
    log_p, log_q = (densities(x, t, np.tile(w, (20, 1))) for w in (np.zeros(5), -BETA * ENERGY))
    got = jax.jit(lambda x, t: exact.intermediate_energy(path, x, t, data, energy, BETA))(x, t)
    assert_allclose(got, log_p - log_q, rtol=1e-8, atol=1e-9)


@each_path
def test_continuity_equation_on_a_mixture(x64, path, ref):
    rng = np.random.default_rng(3)
    parts = rng.normal(size=3), 2 * rng.normal(size=(3, 2)), rng.uniform(0.05, 1.0, 3)
    mixture = exact.GaussianMixture(*map(jnp.asarray, parts))
    guided = mixture.guided(exact.QuadraticEnergy(jnp.array([1.0, -0.5]), 1.2, 0.4), BETA)
    # OT and cosine are smooth in t up to both ends; the linear VP path's sigma is a square root at
    # 0.
    t = jnp.asarray(np.append(rng.uniform(0.0, 1.0, 38), [1e-3, 1.0]))
    x = jnp.asarray(rng.normal(size=(40, 2)))

    def log_density(x, t):
        return guided.marginal_log_density(path, x, t)

    def field(x, t):
        return guided.velocity(path, x, t)

    assert_allclose(continuity(log_density, field, x, t), 0.0, atol=1e-9)
    plain = continuity(log_density, lambda x, t: mixture.velocity(path, x, t), x, t)
    assert np.abs(plain).max() > 0.05


@each_path
def test_the_guided_flow_reaches_the_weighted_data(x64, path, ref):
    """Noise at equal quantiles, whose order the flow keeps: no sampling error is left."""
    number = 800
    noise = jnp.asarray(norm.ppf((np.arange(number) + 0.5) / number)[:, None])
    data, energy = jnp.asarray(DATA), jnp.asarray(ENERGY)

    @jax.jit
    def run(noise):
        def field(x, t):
            return exact.velocity(path, x, t, data, -BETA * energy)

        return sampling.sample(field, noise, solver="rk4", num_steps=150, t_end=1e-3)

    distance = np.abs(np.asarray(run(noise)) - DATA[:, 0])
    fraction = np.bincount(distance.argmin(-1), minlength=5) / number
    # The linear VP path starts from N(mu_1 x_i, sigma_1^2), mu_1 = 0.0066, and not from N(0, 1).
    assert_allclose(fraction, softmax(-BETA * ENERGY), atol=0.01 if ref.mu(1.0) > 1e-3 else 0.004)
    assert np.abs(fraction - 0.2).max() > 0.1
    assert np.quantile(distance.min(-1), 0.9) < 0.1


# --- Lemma 4.10: classifier guidance is exact at beta = 0 and 1 only ---

BETAS = {"exact": (0.0, 1.0), "inexact": (2.0, 5.0)}


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@each_path
def test_classifier_guidance_by_gradients_of_densities(x64, path, ref):
    """Eq. 4.6 and 4.7 written with ``grad log E[p(c|x_0)]`` and ``grad log E[p^beta(c|x_0)]``."""
    rng = np.random.default_rng(4)
    data, probability = jnp.asarray(DATA), jnp.asarray(rng.uniform(0.05, 0.95, 5))
    x, t = jnp.asarray(rng.normal(size=(12, 1))), jnp.asarray(rng.uniform(0.2, 0.9, 12))

    @jax.jit
    def scores(beta):
        def log_expectation(x, t, power):
            weighted = log_guided_density(path, x, t, data, power * jnp.log(probability))
            return weighted - log_guided_density(path, x, t, data, jnp.zeros(5))

        gradient = jax.vmap(jax.grad(log_expectation), (0, 0, None))
        plain = exact.score(path, x, t, data)
        by_density = plain + beta * gradient(x, t, 1.0), plain + gradient(x, t, beta)
        ours = (
            exact.cg_score(path, x, t, data, probability, beta),
            exact.score(path, x, t, data, beta * jnp.log(probability)),
        )
        return by_density, ours

    for beta in sum(BETAS.values(), ()):
        (eq_46, eq_47), (classifier, guided) = scores(beta)
        assert_allclose(classifier, eq_46, rtol=1e-8, atol=1e-9)
        assert_allclose(guided, eq_47, rtol=1e-8, atol=1e-9)
        if beta in BETAS["exact"]:
            assert relative(classifier, guided) < 1e-9
        else:
            assert relative(classifier, guided) > 0.02


# --- CEP (Lu et al. 2023): the minimizer is -E_t up to a function of t ---


@dataclasses.dataclass(frozen=True)
class QuadraturePath(type(paths.vp_cosine())):  # any path: the loss only samples from it
    """A path for :func:`losses.cep`, at one time, on pairs (data point, noise)."""

    path: paths.GaussianPath
    time: float

    def sample(self, x0, noise, t):
        del noise
        return self.path.sample(x0[..., :1], x0[..., 1:], jnp.full_like(t, self.time))


@each_path
def test_minus_the_intermediate_energy_minimizes_cep(x64, path, ref):
    """The library's loss on its population: log quadrature weights go into both softmaxes."""
    data, nodes = jnp.asarray(DATA), np.linspace(-9.0, 9.0, 400)
    log_weight = np.tile(-(nodes**2) / 2, 5)
    pairs = jnp.asarray(np.stack([np.repeat(DATA[:, 0], 400), np.tile(nodes, 5)], axis=-1))
    energies = jnp.asarray(np.repeat(ENERGY, 400) - log_weight / BETA)

    def loss(theta, sign, time):
        def log_ratio(x, t):
            y, t = x[:, 0], jnp.full_like(t, time)
            features = jnp.stack([y, jnp.sin(2 * y), jnp.tanh(3 * y - 1), y**2 / 4])
            minus_energy = -sign * exact.intermediate_energy(path, x, t, data, ENERGY, BETA)
            return minus_energy + jnp.cos(5 * t) + theta @ features + log_weight  # any f(t)

        population = QuadraturePath(path, time)
        return losses.cep(log_ratio, population, jax.random.key(0), pairs, energies, BETA)[0]

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    for time in (0.15, 0.3, 0.6):
        least, gradient = value_and_gradient(np.zeros(4), 1.0, time)
        assert_allclose(gradient, 0.0, atol=1e-9)
        others = [(0.3 * direction, 1.0) for direction in np.eye(4)]
        for theta, sign in [*others, (np.zeros(4), 0.0), (np.zeros(4), -1.0)]:
            value, gradient = value_and_gradient(theta, sign, time)
            assert np.abs(gradient).max() > 1e-3
            assert value > least
