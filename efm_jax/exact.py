"""Exact posteriors, fields and intermediate energies: the oracle for learned fields.

On finite data, functions.  For data ``x_1..x_n`` with log-weights ``l_i`` (``-beta E_i`` for a
guided field) and ``d_i = ||x - mu_t x_i||^2 / (2 sigma_t^2)``, the posterior is ``r = softmax_i(l_i
- d_i)`` and ``x_hat0 = sum_i r_i x_i``; velocity and score follow by the path's conversions.

Everything but :func:`posterior`, whose result is ``[B, n]``, streams over blocks of the data with
running maxima, so n = 1e6 needs one ``[B, block]`` array at a time.  As ``t -> 0`` the posterior
concentrates on the nearest point and stays finite, also at ``t = 0``.

On a :class:`GaussianMixture` guided by a :class:`QuadraticEnergy`, methods in closed form.
Component k of ``p_t`` is ``N(mu m_k, s_k^2 I)``, ``s_k^2 = mu^2 v_k + sigma^2``; all is finite at
both ends of [0, 1].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Real

from efm_jax import arrays, checks
from efm_jax.paths import GaussianPath
from efm_jax.types import Array, Key, Points, Scalar, Times
from efm_jax.weights import boltzmann_logits

Data = Float[Array, "n d"]
PerDatum = Real[Array, " n"]

# A block of the data and a batch make an array of about this many elements.
_BLOCK_ELEMENTS = 1 << 22
# Keeps squared distances over the variance finite where sigma underflows: the nearest still wins.
_LEAST_VARIANCE = 1e-24


def posterior(
    path: GaussianPath, x: Points, t: Times, data: Data, log_weights: PerDatum | None = None
) -> Float[jax.Array, "*batch n"]:
    """Compute the posterior ``p_{0t}(x_i | x)`` over the data; its rows sum to 1.

    Args:
      path: probability path.
      x: points at time t, ``[B, d]``.
      t: times, ``[B]``.
      data: ``[n, d]``.
      log_weights: unnormalized log-weights of the data, ``[n]``; ``-inf`` leaves a point out, and
        points of ``+inf`` share all the weight.

    Reference: Zhang et al. 2025, Thm 4.1.

    Example:
      >>> from efm_jax import paths
      >>> data = jnp.array([[-1.0], [1.0]])
      >>> posterior(paths.conditional_ot(), jnp.zeros((1, 1)), jnp.array([0.5]), data).tolist()
      [[0.5, 0.5]]
    """
    points, t, data, log_weights = _check(x, t, data, log_weights)
    log_weights, _ = _shift(log_weights)
    nearest = _nearest(path, points, t, data, log_weights)
    logits = _logits(path, points, t, data, log_weights, nearest)
    return jax.nn.softmax(logits, axis=-1).astype(x.dtype)


def x0(
    path: GaussianPath, x: Points, t: Times, data: Data, log_weights: PerDatum | None = None
) -> Float[jax.Array, "*batch d"]:
    """Compute the posterior mean ``x_hat0 = E[x_0 | x]``.

    Arguments as in :func:`posterior`; guided with ``log_weights = -beta * energy``.

    Reference: Zhang et al. 2025, Thm 4.1.

    Example:
      >>> from efm_jax import paths
      >>> data = jnp.array([[-1.0], [3.0]])
      >>> x0(paths.conditional_ot(), jnp.array([[0.5]]), jnp.array([0.5]), data).tolist()
      [[1.0]]
    """
    _, mean, _ = _stream(path, *_check(x, t, data, log_weights))
    return mean.astype(x.dtype)


def velocity(
    path: GaussianPath, x: Points, t: Times, data: Data, log_weights: PerDatum | None = None
) -> Float[jax.Array, "*batch d"]:
    """Compute the exact velocity ``u_t(x)``; at ``t = 0`` it is finite only on the data.

    Arguments as in :func:`posterior`; guided with ``log_weights = -beta * energy``.

    Reference: Zhang et al. 2025, Thm 4.1.
    """
    points, t, data, log_weights = _check(x, t, data, log_weights)
    mean = x0(path, points, t, data, log_weights)
    return path.velocity_from_x0(mean, points, t).astype(x.dtype)


def score(
    path: GaussianPath, x: Points, t: Times, data: Data, log_weights: PerDatum | None = None
) -> Float[jax.Array, "*batch d"]:
    """Compute the exact score ``grad log q_t(x)``; arguments as in :func:`posterior`.

    Reference: Zhang et al. 2025, Lemma 4.10.
    """
    points, t, data, log_weights = _check(x, t, data, log_weights)
    return path.score_from_x0(x0(path, points, t, data, log_weights), points, t).astype(x.dtype)


def intermediate_energy(
    path: GaussianPath, x: Points, t: Times, data: Data, energy: PerDatum, beta: Scalar
) -> Float[jax.Array, "*batch"]:
    """Compute ``E_t(x) = -log E_{p_{0t}(x_0 | x)}[exp(-beta E(x_0))]``.

    Args:
      path: probability path.
      x: points at time t, ``[B, d]``.
      t: times, ``[B]``.
      data: ``[n, d]``.
      energy: energies of the data, ``[n]``.
      beta: guidance scale >= 0.

    Reference: Zhang et al. 2025, Thm 4.1.
    """
    points, t, data, log_weights = _check(x, t, data, boltzmann_logits(energy, beta))
    log_total, _, nearest = _stream(path, points, t, data, jnp.zeros_like(log_weights))
    log_guided, _, nearest_guided = _stream(path, points, t, data, log_weights)
    # Both sums count distances from their nearest points, which are the same unless a weight is 0.
    further = (nearest_guided - nearest) / (2 * _variance(path, t))
    return (log_total - log_guided + further).astype(x.dtype)


def cg_score(
    path: GaussianPath, x: Points, t: Times, data: Data, class_prob: PerDatum, beta: Scalar
) -> Float[jax.Array, "*batch d"]:
    """Compute classifier guidance's score ``grad log p_t + beta grad log E_{p_{0t}}[p(c|x_0)]``.

    It equals the guided score for ``E = -log p(c|x)`` at ``beta`` 0 and 1 only.  Arguments as in
    :func:`intermediate_energy`, with the data's class probabilities ``p(c | x_i)``, ``[n]``.

    Reference: Zhang et al. 2025, eq. 4.6.
    """
    points, t, data, log_prob = _check(x, t, data, jnp.log(arrays.widen("class_prob", class_prob)))
    plain, conditional = score(path, points, t, data), score(path, points, t, data, log_prob)
    return (plain + jnp.asarray(beta, plain.dtype) * (conditional - plain)).astype(x.dtype)


class QuadraticEnergy(NamedTuple):
    """Isotropic quadratic energy ``E(x) = offset + curvature / 2 ||x - center||^2``; a pytree.

    Example:
      >>> energy = QuadraticEnergy(center=jnp.array([1.0, 0.0]), curvature=2.0)
      >>> energy(jnp.array([[1.0, 0.0], [0.0, 0.0]])).tolist()
      [0.0, 1.0]
    """

    center: Float[Array, " d"]
    curvature: Scalar  # >= 0
    offset: Scalar = 0.0

    def __call__(self, x: Real[Array, "*batch d"]) -> Float[jax.Array, "*batch"]:
        """Evaluate the energy of each point."""
        checks.check_rank("x", x, 1)
        self._check(jnp.shape(x)[-1])
        x = arrays.widen("x", x)
        center, curvature, offset = (jnp.asarray(part, x.dtype) for part in self)
        return offset + curvature / 2 * _squared_norm(x - _against(center, x))

    def _check(self, d: int) -> None:
        checks.check_shape("center", self.center, (d,))
        checks.check_shape("curvature", self.curvature, ())
        checks.check_number("curvature", self.curvature, minimum=0.0)
        checks.check_shape("offset", self.offset, ())


class GaussianMixture(NamedTuple):
    """Mixture ``sum_k w_k N(m_k, v_k I)`` as data, with its exact fields along a path; a pytree.

    Points are ``x: [..., d]`` and times ``t: [...]``, of the same leading shape.  A variance of 0
    makes a point mass; its fields are finite wherever ``sigma_t > 0``.

    Example:
      >>> from efm_jax import paths
      >>> mixture = GaussianMixture(jnp.zeros(2), jnp.array([[-2.0], [2.0]]), jnp.full(2, 0.25))
      >>> energy = QuadraticEnergy(center=jnp.array([2.0]), curvature=1.0)
      >>> guided = mixture.guided(energy, beta=1.0)
      >>> [round(float(w), 3) for w in jnp.exp(guided.log_weights)]
      [0.002, 0.998]
      >>> x, t = jnp.zeros((3, 1)), jnp.array([0.0, 0.5, 1.0])
      >>> guided.velocity(paths.conditional_ot(), x, t).shape
      (3, 1)
    """

    log_weights: Float[Array, " K"]  # unnormalized
    means: Float[Array, "K d"]
    variances: Float[Array, " K"]  # >= 0

    def sample(self, key: Key, num: int) -> Float[jax.Array, "num d"]:
        """Draw ``num >= 1`` independent samples."""
        checks.check_integer("num", num, 1)
        log_weights, means, variances = self._parts()
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, log_weights, shape=(num,))
        noise = jax.random.normal(noise_key, (num, means.shape[1]), means.dtype)
        return (means[component] + jnp.sqrt(variances)[component, None] * noise).astype(
            jnp.result_type(self.means)
        )

    def log_density(self, x: Real[Array, "*batch d"]) -> Float[jax.Array, "*batch"]:
        """Evaluate ``log p_0(x)``, in nats."""
        log_weights, means, variances = self._parts()
        checks.check_rank("x", x, 1)
        checks.check_shape("x", x, (*jnp.shape(x)[:-1], means.shape[1]))
        residual = arrays.widen("x", x).astype(means.dtype)[..., None, :]
        residual = residual - _against(means, residual)
        log_joint = _log_normal(residual, _against(variances, residual[..., 0]))
        return jax.nn.logsumexp(_against(log_weights, log_joint) + log_joint, axis=-1)

    def guided(self, energy: QuadraticEnergy, beta: Scalar) -> "GaussianMixture":
        """Return the mixture ``q_0 ∝ p_0 exp(-beta E)``, its weights normalized.

        With curvature a and center c, ``v' = v / (1 + beta a v)``, ``m' = (m + beta a v c) / (1 +
        beta a v)`` and ``w' ∝ w (1 + beta a v)^(-d/2) exp(-beta a ||m - c||^2 / (2 (1 + beta a
        v)))``.  Its :meth:`velocity` is the guided field, its :meth:`score` the guided score.

        Raises:
          ValueError: if ``energy`` is of another event size, or ``beta`` is concrete and negative.

        Reference: Zhang et al. 2025, Thm 4.1.
        """
        log_weights, means, variances = self._parts()
        log_tilt = _log_tilt(means, variances, energy, beta)
        center, curvature, _ = (jnp.asarray(part, means.dtype) for part in energy)
        scale = jnp.asarray(beta, means.dtype) * curvature * variances
        guided = (
            jax.nn.log_softmax(log_weights + log_tilt),
            (means + scale[:, None] * center[None]) / (1 + scale[:, None]),
            variances / (1 + scale),
        )
        return GaussianMixture(
            *(new.astype(jnp.result_type(old)) for new, old in zip(guided, self, strict=True))
        )

    def log_normalizer(self, energy: QuadraticEnergy, beta: Scalar) -> Float[jax.Array, ""]:
        """Compute ``log Z = log E_{p_0}[exp(-beta E)]``; arguments as in :meth:`guided`."""
        log_weights, means, variances = self._parts()
        log_tilt = _log_tilt(means, variances, energy, beta)
        shift = jnp.asarray(beta, log_tilt.dtype) * jnp.asarray(energy.offset, log_tilt.dtype)
        return jax.nn.logsumexp(log_weights + log_tilt) - shift

    def marginal_log_density(
        self, path: GaussianPath, x: Points, t: Times
    ) -> Float[jax.Array, "*batch"]:
        """Evaluate ``log p_t(x)``, in nats, of points ``[..., d]`` at times ``[...]``."""
        return jax.nn.logsumexp(self._at(path, x, t).log_joint, axis=-1).astype(x.dtype)

    def x0(self, path: GaussianPath, x: Points, t: Times) -> Float[jax.Array, "*batch d"]:
        """Compute the posterior mean ``E[x_0 | x]``.

        Each component's is ``m_k + mu v_k (x - mu m_k) / s_k^2``.
        """
        at = self._at(path, x, t)
        return _mean(at.log_joint, at.posterior_means).astype(x.dtype)

    def velocity(self, path: GaussianPath, x: Points, t: Times) -> Float[jax.Array, "*batch d"]:
        """Compute the exact velocity ``u_t(x)``.

        Each component's is ``mu' m_k + (mu mu' v_k + sigma sigma') (x - mu m_k) / s_k^2``.

        Reference: Zhang et al. 2025, Thm 4.1 (guided: of the mixture that :meth:`guided` returns).
        """
        at = self._at(path, x, t)
        mean_dot = path.mean_coef_dot(at.t)
        # sigma sigma' = (sigma D) (sigma' / D): finite where sigma' is not (linear VP at t = 0).
        std_product = path._std_det(at.t) * path._std_dot_over_det(at.t)
        slope = path.mean_coef(at.t) * mean_dot * at.variances + std_product
        drift = mean_dot[..., None] * at.means
        rate = (slope / at.variance)[..., None]
        return _mean(at.log_joint, drift + rate * at.residual).astype(x.dtype)

    def score(self, path: GaussianPath, x: Points, t: Times) -> Float[jax.Array, "*batch d"]:
        """Compute the exact score ``grad log p_t(x)``.

        Each component's is ``-(x - mu m_k) / s_k^2``.

        Reference: Zhang et al. 2025, Lemma 4.10.
        """
        at = self._at(path, x, t)
        return _mean(at.log_joint, -at.residual / at.variance[..., None]).astype(x.dtype)

    def intermediate_energy(
        self, path: GaussianPath, x: Points, t: Times, energy: QuadraticEnergy, beta: Scalar
    ) -> Float[jax.Array, "*batch"]:
        """Compute ``E_t(x) = -log E_{p_{0t}(x_0 | x)}[exp(-beta E(x_0))]``, ``beta E(x)`` at 0.

        It equals ``log p_t(x) - log q_t(x) - log Z``, but subtracts no logarithms.

        Reference: Zhang et al. 2025, Thm 4.1.
        """
        at = self._at(path, x, t)
        variances = path.std(at.t) ** 2 * at.variances / at.variance
        log_tilt = _log_tilt(at.posterior_means, variances, energy, beta)
        shift = jnp.asarray(beta, log_tilt.dtype) * jnp.asarray(energy.offset, log_tilt.dtype)
        log_mean = jax.nn.logsumexp(jax.nn.log_softmax(at.log_joint) + log_tilt, axis=-1)
        return (shift - log_mean).astype(x.dtype)

    def cg_score(
        self, path: GaussianPath, x: Points, t: Times, energy: QuadraticEnergy, beta: Scalar
    ) -> Float[jax.Array, "*batch d"]:
        """Compute classifier guidance's score for ``p(c|x) = exp(-E(x))``, as :func:`cg_score`."""
        plain = self.score(path, x, t)
        change = self.guided(energy, 1.0).score(path, x, t) - plain
        return plain + jnp.asarray(beta, plain.dtype) * change

    def _parts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the normalized log-weights, means and variances, checked."""
        if jnp.ndim(self.means) != 2:
            raise ValueError(f"means: expected shape [K, d]; got {jnp.shape(self.means)}")
        for name in ("log_weights", "variances"):
            checks.check_shape(name, getattr(self, name), jnp.shape(self.means)[:1])
        for name, array in self._asdict().items():
            checks.check_float(name, array)
        wide = arrays.wide_type(*self)
        log_weights, means, variances = (jnp.asarray(part).astype(wide) for part in self)
        return jax.nn.log_softmax(log_weights), means, variances

    def _at(self, path: GaussianPath, x: Array, t: Array) -> "_AtTime":
        log_weights, means, variances = self._parts()
        checks.check_rank("x", x, 1)
        checks.check_shape("x", x, (*jnp.shape(x)[:-1], means.shape[1]))
        checks.check_float("x", x)
        checks.check_shape("t", t, jnp.shape(x)[:-1])
        wide = arrays.wide_type(x, means)
        points = jnp.asarray(x).astype(wide)[..., None, :]
        time = arrays.to_float("t", t).astype(wide)[..., None]
        means = _against(means.astype(wide), points)
        variances = _against(variances.astype(wide), time)
        mean_coef = path.mean_coef(time)
        residual = points - mean_coef[..., None] * means
        variance = mean_coef**2 * variances + path.std(time) ** 2
        log_normal = _log_normal(residual, variance)
        log_joint = _against(log_weights.astype(wide), log_normal) + log_normal
        gain = mean_coef * variances / variance
        posterior_means = means + gain[..., None] * residual
        return _AtTime(time, means, variances, residual, variance, log_joint, posterior_means)


class _AtTime(NamedTuple):
    """A mixture's components at points and times; its arrays broadcast against ``[..., K, d]``."""

    t: jax.Array  # [..., 1]
    means: jax.Array  # [K, d] with leading axes of size 1
    variances: jax.Array  # [K], likewise
    residual: jax.Array  # x - mu m_k, [..., K, d]
    variance: jax.Array  # s_k^2, [..., K]
    log_joint: jax.Array  # log w_k N(x; mu m_k, s_k^2), [..., K]
    posterior_means: jax.Array  # E[x_0 | x, k], [..., K, d]


def _against(array: jax.Array, other: jax.Array) -> jax.Array:
    """Add leading axes of size 1 until both have as many."""
    return array.reshape((1,) * (other.ndim - array.ndim) + array.shape)


def _squared_norm(x: jax.Array) -> jax.Array:
    return jnp.sum(x**2, axis=-1)


def _log_normal(residual: jax.Array, variance: jax.Array) -> jax.Array:
    """Compute ``log N(residual; 0, variance I)``, ``[..., K, d], [..., K] -> [..., K]``."""
    d = residual.shape[-1]
    return -_squared_norm(residual) / (2 * variance) - d / 2 * jnp.log(2 * math.pi * variance)


def _log_tilt(
    means: jax.Array, variances: jax.Array, energy: QuadraticEnergy, beta: Scalar
) -> jax.Array:
    """Compute ``log E_{N(m_k, v_k I)}[exp(-beta (E - offset))]``, ``[..., K]``.

    The offset is the same for all: adding it here would take digits from what differs.
    """
    d = means.shape[-1]
    energy._check(d)
    checks.check_shape("beta", beta, ())
    checks.check_number("beta", beta, minimum=0.0)
    center, curvature, _ = (jnp.asarray(part, means.dtype) for part in energy)
    rate = jnp.asarray(beta, means.dtype) * curvature
    distance = _squared_norm(means - _against(center, means))
    return -d / 2 * jnp.log1p(rate * variances) - rate / 2 * distance / (1 + rate * variances)


def _mean(log_joint: jax.Array, values: jax.Array) -> jax.Array:
    """Average ``values: [..., K, d]`` over the components: ``[..., d]``."""
    # A sum of products: a matrix product has fewer digits on accelerators.
    return jnp.sum(jax.nn.softmax(log_joint, axis=-1)[..., None] * values, axis=-2)


def _check(
    x: Array, t: Array, data: Array, log_weights: Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Check the shapes; return the arguments as JAX arrays, log-weights of 0 for None."""
    checks.check_rank("data", data, 2)
    checks.check_not_empty("data", data, 0)
    checks.check_float("x", x)
    checks.check_shape("x", x, (jnp.shape(x)[0] if jnp.ndim(x) else 0, data.shape[1]))
    checks.check_shape("t", t, (x.shape[0],))
    if log_weights is None:
        log_weights = jnp.zeros(data.shape[0], jnp.float32)
    checks.check_shape("log_weights", log_weights, (data.shape[0],))
    inputs = [arrays.to_float(*p) for p in (("x", x), ("data", data), ("log_weights", log_weights))]
    wide = arrays.wide_type(*inputs)
    points, data, log_weights = (array.astype(wide) for array in inputs)
    # The data are cut into blocks, which a mesh's types do not allow along a sharded axis.
    data, log_weights = arrays.replicate((data, log_weights))
    return points, arrays.to_float("t", t).astype(wide), data, log_weights


def _blocks(x: jax.Array, data: jax.Array, log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cut data and log-weights into ``[blocks, block, ...]``; the last block is padded."""
    n, d = data.shape
    # A gradient keeps differences in each of the d components too; 16 times as many are allowed.
    block = min(n, max(1, _BLOCK_ELEMENTS // (max(1, x.shape[0]) * -(-d // 16))))
    padding = -n % block
    # Repeating a point changes no minimum, and -inf leaves it out of every sum.
    padded = jnp.concatenate([data, jnp.broadcast_to(data[:1], (padding, d))])
    log_weights = jnp.pad(log_weights, (0, padding), constant_values=-jnp.inf)
    return padded.reshape(-1, block, d), log_weights.reshape(-1, block)


def _squared_distance(path: GaussianPath, x: jax.Array, t: jax.Array, data: jax.Array) -> jax.Array:
    """Compute ``||x - mu_t x_i||^2``, ``[B, n]``."""
    # Differences, because the expanded square cancels at small sigma.  A sum along an axis, because
    # the compiler computes components one by one anew for each use and rounds each differently, and
    # a last digit divided by a small sigma^2 decides which point is the nearest.
    return jnp.sum((x[:, None] - path.mean_coef(t)[:, None, None] * data[None]) ** 2, axis=-1)


def _shift(log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Count log-weights from the largest, so that a common offset costs no digits; and return it.

    Weights of ``+inf`` share all the weight.
    """
    top = lax.stop_gradient(log_weights.max())
    shared = jnp.where(log_weights == jnp.inf, 0, -jnp.inf).astype(log_weights.dtype)
    finite = jnp.isfinite(top)
    return jnp.where(top == jnp.inf, shared, log_weights - jnp.where(finite, top, 0)), top


def _variance(path: GaussianPath, t: jax.Array) -> jax.Array:
    return jnp.maximum(path.std(t) ** 2, _LEAST_VARIANCE)


def _nearest(
    path: GaussianPath, x: jax.Array, t: jax.Array, data: jax.Array, log_weights: jax.Array
) -> jax.Array:
    """Find the least squared distance to a point that is not left out, ``[B]``.

    Distances are counted from it: at small sigma ``d_i`` is of size ``1 / sigma^2``, and adding a
    log-weight to it, or taking the difference of two sums of them, would lose every digit.
    """

    def least(carry: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        distance = _squared_distance(path, x, t, block[0])
        return jnp.minimum(
            carry, jnp.where(jnp.isneginf(block[1])[None], jnp.inf, distance).min(-1)
        ), None

    start = jnp.full_like(_varying(x, t, data, log_weights), jnp.inf)
    found = lax.scan(least, start, _blocks(x, data, log_weights))[0]
    # It is infinite where every point is left out.
    return lax.stop_gradient(jnp.where(jnp.isinf(found), 0, found))


def _varying(x: jax.Array, t: jax.Array, data: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Return ``[B]`` of the type that ``shard_map`` gives a scan's state all the arguments enter.

    Its value is not used, so that compiled code does not compute it.
    """
    return x[:, 0] + t + data[0, 0] + log_weights[0]


def _logits(
    path: GaussianPath,
    x: jax.Array,
    t: jax.Array,
    data: jax.Array,
    log_weights: jax.Array,
    nearest: jax.Array,
) -> jax.Array:
    """Compute ``l_i - (d_i - d_nearest)``, ``[B, n]``."""
    further = _squared_distance(path, x, t, data) - nearest[:, None]
    return log_weights[None] - further / (2 * _variance(path, t)[:, None])


def _stream(
    path: GaussianPath, x: jax.Array, t: jax.Array, data: jax.Array, log_weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute ``logsumexp_i(l_i - d_i) + d_nearest``, ``x_hat0`` and the least squared distance."""
    log_weights, top = _shift(log_weights)
    nearest = _nearest(path, x, t, data, log_weights)

    def accumulate(
        carry: tuple[jax.Array, ...], block: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, ...], None]:
        peak, total, weighted = carry
        data_block, weight_block = block
        logits = _logits(path, x, t, data_block, weight_block, nearest)
        # The peak only scales; it cancels in value, so it needs no gradient.
        new_peak = lax.stop_gradient(jnp.maximum(peak, logits.max(-1)))
        # While every weight so far is 0 the peak is -inf, and -inf - -inf is undefined.
        base = jnp.where(jnp.isneginf(new_peak), 0, new_peak)
        decay, terms = jnp.exp(peak - base), jnp.exp(logits - base[:, None])
        total = decay * total + terms.sum(-1)
        weighted = decay[:, None] * weighted + jnp.matmul(terms, data_block, precision="highest")
        return (new_peak, total, weighted), None

    zero = jnp.zeros_like(_varying(x, t, data, log_weights))
    start = (zero - jnp.inf, zero, zero[:, None] + jnp.zeros_like(data[:1]))
    # The backward pass recomputes: the kept terms of all blocks would be the array to avoid.
    step = jax.checkpoint(accumulate, prevent_cse=False)
    (peak, total, weighted), _ = lax.scan(step, start, _blocks(x, data, log_weights))
    return peak + jnp.log(total) + top, weighted / total[:, None], nearest
