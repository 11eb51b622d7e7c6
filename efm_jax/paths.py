"""Gaussian probability paths and the conversions between what a network may predict.

A path is ``p_{t0}(x | x_0) = N(mu_t x_0, sigma_t^2 I)``, ``x_t = mu_t x_0 + sigma_t eps``, with
``t = 0`` data and ``t = 1`` noise (Zhang et al. 2025, Sec. 3).  Write ``x_hat0 = E[x_0 | x]`` and
``eps_hat = E[eps | x]``.  Then

    x = mu x_hat0 + sigma eps_hat,    u = mu' x_hat0 + sigma' eps_hat,    s = -eps_hat / sigma,

and every conversion solves this pair of equations.  Its determinant ``D = mu sigma' - mu' sigma``
is kept by each path in products that stay finite at both ends, so a conversion is finite
wherever its limit is.  What cannot be finite: at ``mu = 0`` (pure noise) neither score nor noise
determines ``x_0``, and at ``sigma = 0`` (pure data) ``x_0`` does not determine the noise; there the
result is infinite or NaN.  One exception: ``velocity_from_x0`` at ``sigma = 0`` with ``x = mu x_0``
takes the noise to be 0, the limit on data.

Shapes: coefficients have the shape of ``t``; values and points are ``[..., d]`` with ``t`` of shape
``[...]`` or a scalar.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efm_jax import checks
from efm_jax.types import Array

# Kinds of prediction: the velocity u, the noise eps_hat, the score s, the data x_hat0.
PREDICTIONS = ("velocity", "noise", "score", "data")


def _column(coefficient: jax.Array, x: Array) -> jax.Array:
    """``[...]`` to ``[..., 1]`` against ``x: [..., d]``; only a scalar may have fewer axes."""
    if coefficient.ndim and coefficient.shape != jnp.shape(x)[:-1]:
        raise ValueError(
            f"t: expected a scalar or shape {jnp.shape(x)[:-1]} for points of shape "
            f"{jnp.shape(x)}; "
            f"got {coefficient.shape}"
        )
    return coefficient[..., None]


def _constant(value: float, t: Array) -> jax.Array:
    """``value`` in the shape of ``t`` and its type, but never an integer type."""
    t = jnp.asarray(t)
    return jnp.full_like(t, value, dtype=t.dtype if jnp.issubdtype(t.dtype, jnp.inexact) else float)


@dataclasses.dataclass(frozen=True)
class GaussianPath(abc.ABC):
    """A Gaussian probability path; hashable, so it may be a static argument of ``jit``.

    A new path defines the four coefficient functions below; the conversions follow.

    Example:
      >>> import jax.numpy as jnp
      >>> path = conditional_ot()
      >>> x0, noise, t = jnp.ones((4, 2)), jnp.zeros((4, 2)), jnp.full(4, 0.25)
      >>> xt = path.sample(x0, noise, t)
      >>> velocity = path.velocity(x0, noise, t)
      >>> bool(jnp.allclose(path.x0_from_velocity(velocity, xt, t), x0))
      True
    """

    @abc.abstractmethod
    def mean_coef(self, t: Array) -> jax.Array:
        """``mu_t``."""

    @abc.abstractmethod
    def std(self, t: Array) -> jax.Array:
        """``sigma_t``."""

    @abc.abstractmethod
    def mean_coef_dot(self, t: Array) -> jax.Array:
        """``d mu_t / dt``."""

    @abc.abstractmethod
    def std_dot(self, t: Array) -> jax.Array:
        """``d sigma_t / dt``."""

    # A path overrides these where the quotients are not finite at an end of [0, 1].

    def _inverse_det(self, t: Array) -> jax.Array:
        """``1 / D``."""
        return 1 / (self.mean_coef(t) * self.std_dot(t) - self.mean_coef_dot(t) * self.std(t))

    def _std_det(self, t: Array) -> jax.Array:
        """``sigma D``."""
        return self.std(t) / self._inverse_det(t)

    def _std_dot_over_det(self, t: Array) -> jax.Array:
        """``sigma' / D``."""
        return self.std_dot(t) * self._inverse_det(t)

    def sample(self, x0: Array, noise: Array, t: Array) -> jax.Array:
        """``x_t = mu_t x_0 + sigma_t eps``: ``[..., d]``."""
        t = jnp.asarray(t)
        return _column(self.mean_coef(t), x0) * x0 + _column(self.std(t), noise) * noise

    def velocity(self, x0: Array, noise: Array, t: Array) -> jax.Array:
        """Conditional velocity ``u_{t0}(x_t | x_0) = mu'_t x_0 + sigma'_t eps``: ``[..., d]``."""
        t = jnp.asarray(t)
        return _column(self.mean_coef_dot(t), x0) * x0 + _column(self.std_dot(t), noise) * noise

    def score(self, noise: Array, t: Array) -> jax.Array:
        """Conditional score ``-eps / sigma_t``: ``[..., d]``; infinite where ``sigma_t = 0``."""
        t = jnp.asarray(t)
        return -jnp.asarray(noise) / _column(self.std(t), noise)

    def velocity_from_score(self, score: Array, x: Array, t: Array) -> jax.Array:
        """``u = (mu' x - sigma D s) / mu``."""
        t = jnp.asarray(t)
        numerator = _column(self.mean_coef_dot(t), x) * x - _column(self._std_det(t), x) * score
        return numerator / _column(self.mean_coef(t), x)

    def score_from_velocity(self, velocity: Array, x: Array, t: Array) -> jax.Array:
        """``s = (mu' x - mu u) / (sigma D)``."""
        t = jnp.asarray(t)
        numerator = _column(self.mean_coef_dot(t), x) * x - _column(self.mean_coef(t), x) * velocity
        return numerator / _column(self._std_det(t), x)

    def velocity_from_noise(self, noise: Array, x: Array, t: Array) -> jax.Array:
        """``u = (mu' x + D eps) / mu``."""
        t = jnp.asarray(t)
        numerator = _column(self.mean_coef_dot(t), x) * x + noise / _column(self._inverse_det(t), x)
        return numerator / _column(self.mean_coef(t), x)

    def noise_from_velocity(self, velocity: Array, x: Array, t: Array) -> jax.Array:
        """``eps = (mu u - mu' x) / D``."""
        t = jnp.asarray(t)
        numerator = _column(self.mean_coef(t), x) * velocity - _column(self.mean_coef_dot(t), x) * x
        return numerator * _column(self._inverse_det(t), x)

    def velocity_from_x0(self, x0: Array, x: Array, t: Array) -> jax.Array:
        """``u = mu' x_0 + sigma' (x - mu x_0) / sigma``."""
        t = jnp.asarray(t)
        std, std_dot = self.std(t), self.std_dot(t)
        residual = x - _column(self.mean_coef(t), x) * x0
        # Where sigma = 0 the residual decides: 0 means noise 0, anything else is infinitely far
        # off.
        rate = _column(jnp.where(std > 0, std_dot / jnp.where(std > 0, std, 1), jnp.inf), x)
        on_data = (residual == 0) & _column(std == 0, x)
        noise_part = jnp.where(on_data, 0, jnp.where(on_data, 0, rate) * residual)
        return _column(self.mean_coef_dot(t), x) * x0 + noise_part

    def x0_from_velocity(self, velocity: Array, x: Array, t: Array) -> jax.Array:
        """``x_0 = (sigma' x - sigma u) / D``."""
        t = jnp.asarray(t)
        return (
            _column(self._std_dot_over_det(t), x) * x
            - _column(self.std(t) * self._inverse_det(t), x) * velocity
        )

    def score_from_noise(self, noise: Array, x: Array, t: Array) -> jax.Array:
        """``s = -eps / sigma``."""
        return self.score(noise, t)

    def noise_from_score(self, score: Array, x: Array, t: Array) -> jax.Array:
        """``eps = -sigma s``."""
        return -_column(self.std(jnp.asarray(t)), x) * score

    def noise_from_x0(self, x0: Array, x: Array, t: Array) -> jax.Array:
        """``eps = (x - mu x_0) / sigma``."""
        t = jnp.asarray(t)
        return (-_column(self.mean_coef(t), x) * x0 + x) / _column(self.std(t), x)

    def x0_from_noise(self, noise: Array, x: Array, t: Array) -> jax.Array:
        """``x_0 = (x - sigma eps) / mu``."""
        t = jnp.asarray(t)
        return (-_column(self.std(t), x) * noise + x) / _column(self.mean_coef(t), x)

    def x0_from_score(self, score: Array, x: Array, t: Array) -> jax.Array:
        """``x_0 = (x + sigma^2 s) / mu``."""
        t = jnp.asarray(t)
        return (_column(self.std(t), x) ** 2 * score + x) / _column(self.mean_coef(t), x)

    def score_from_x0(self, x0: Array, x: Array, t: Array) -> jax.Array:
        """``s = (mu x_0 - x) / sigma^2``."""
        t = jnp.asarray(t)
        return (_column(self.mean_coef(t), x) * x0 - x) / _column(self.std(t), x) ** 2

    def target(self, prediction: str, x0: Array, noise: Array, t: Array) -> jax.Array:
        """The value that a network of a kind of ``PREDICTIONS`` learns at ``x_t``: ``[..., d]``."""
        checks.check_choice("prediction", prediction, PREDICTIONS)
        if prediction == "velocity":
            return self.velocity(x0, noise, t)
        if prediction == "score":
            return self.score(noise, t)
        return jnp.asarray(noise if prediction == "noise" else x0)

    def convert(self, value: Array, x: Array, t: Array, source: str, target: str) -> jax.Array:
        """A prediction of the kind ``source`` at ``x`` as one of the kind ``target``: ``[..., d]``.

        Example:
          >>> path, noise, t = vp_cosine(), jnp.zeros((1, 2)), jnp.array([0.5])
          >>> x = path.sample(jnp.ones((1, 2)), noise, t)
          >>> path.convert(noise, x, t, "noise", "data").round(3).tolist()
          [[1.0, 1.0]]
        """
        for name, kind in (("source", source), ("target", target)):
            checks.check_choice(name, kind, PREDICTIONS)
        if source == target:
            return jnp.asarray(value)
        source, target = ("x0" if kind == "data" else kind for kind in (source, target))
        return getattr(self, f"{target}_from_{source}")(value, x, t)


@dataclasses.dataclass(frozen=True)
class _ConditionalOT(GaussianPath):
    """``mu = 1 - t``, ``sigma = sigma_min + (1 - sigma_min) t``, so ``D = 1``."""

    sigma_min: float

    def mean_coef(self, t: Array) -> jax.Array:
        return 1 - jnp.asarray(t)

    def std(self, t: Array) -> jax.Array:
        return self.sigma_min + (1 - self.sigma_min) * jnp.asarray(t)

    def mean_coef_dot(self, t: Array) -> jax.Array:
        return _constant(-1, t)

    def std_dot(self, t: Array) -> jax.Array:
        return _constant(1 - self.sigma_min, t)

    def _inverse_det(self, t: Array) -> jax.Array:
        return _constant(1, t)


@dataclasses.dataclass(frozen=True)
class _VariancePreserving(GaussianPath):
    """``mu^2 + sigma^2 = 1``, so ``mu mu' = -sigma sigma'`` and ``D = -mu' / sigma``."""

    def _std_det(self, t: Array) -> jax.Array:
        return -self.mean_coef_dot(t)

    def _std_dot_over_det(self, t: Array) -> jax.Array:
        return self.mean_coef(t)


@dataclasses.dataclass(frozen=True)
class _LinearVP(_VariancePreserving):
    """``log mu = -(b1 - b0) t^2 / 4 - b0 t / 2``: the rate ``-2 mu' / mu`` goes from b0 to b1."""

    beta_min: float
    beta_max: float

    def _log_mean(self, t: Array) -> jax.Array:
        t = jnp.asarray(t)
        return -(self.beta_max - self.beta_min) * t**2 / 4 - self.beta_min * t / 2

    def mean_coef(self, t: Array) -> jax.Array:
        return jnp.exp(self._log_mean(t))

    def std(self, t: Array) -> jax.Array:
        # expm1 keeps full precision where sigma is small.
        return jnp.sqrt(-jnp.expm1(2 * self._log_mean(t)))

    def mean_coef_dot(self, t: Array) -> jax.Array:
        t = jnp.asarray(t)
        return -self.mean_coef(t) * ((self.beta_max - self.beta_min) * t + self.beta_min) / 2

    def std_dot(self, t: Array) -> jax.Array:
        return -self.mean_coef(t) * self.mean_coef_dot(t) / self.std(t)

    def _inverse_det(self, t: Array) -> jax.Array:
        return -self.std(t) / self.mean_coef_dot(t)


@dataclasses.dataclass(frozen=True)
class _CosineVP(_VariancePreserving):
    """``mu = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``, so ``D = pi / 2``."""

    def mean_coef(self, t: Array) -> jax.Array:
        # The sine of the complement is exactly 0 at t = 1, where the cosine rounds to -4e-8.
        return jnp.sin(jnp.pi / 2 * (1 - jnp.asarray(t)))

    def std(self, t: Array) -> jax.Array:
        return jnp.sin(jnp.pi / 2 * jnp.asarray(t))

    def mean_coef_dot(self, t: Array) -> jax.Array:
        return -jnp.pi / 2 * self.std(t)

    def std_dot(self, t: Array) -> jax.Array:
        return jnp.pi / 2 * self.mean_coef(t)

    def _inverse_det(self, t: Array) -> jax.Array:
        return _constant(2 / jnp.pi, t)


def conditional_ot(sigma_min: float = 0.0) -> GaussianPath:
    """Conditional optimal-transport path of flow matching (Lipman et al. 2023; QIPO-OT).

    Args:
      sigma_min: standard deviation left at ``t = 0``, in [0, 1).
    """
    checks.check_number("sigma_min", sigma_min, minimum=0.0, maximum=1.0)
    if sigma_min == 1:
        raise ValueError("sigma_min: expected a number in [0, 1); got 1")
    return _ConditionalOT(float(sigma_min))


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> GaussianPath:
    """Variance-preserving path with a linear rate (Song et al. 2021; QIPO-Diff).

    Args:
      beta_min: rate at ``t = 0``, positive.
      beta_max: rate at ``t = 1``, at least ``beta_min``.
    """
    checks.check_number("beta_min", beta_min, minimum=0.0, open_minimum=True)
    checks.check_number("beta_max", beta_max, minimum=beta_min)
    return _LinearVP(float(beta_min), float(beta_max))


def vp_cosine() -> GaussianPath:
    """Cosine variance-preserving path (Nichol & Dhariwal 2021, without offset).

    ``mu = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``.
    """
    return _CosineVP()


class PathEntry(NamedTuple):
    """A registered path: how it is made, and the prediction a network learns on it by default."""

    make: Callable[[], GaussianPath]
    prediction: str  # of PREDICTIONS
    label: str  # in names of results: qipo_ot, qipo_diff


# The names of the configuration field `path`; a new path is one more entry.
PATHS = {
    "ot": PathEntry(conditional_ot, "velocity", "ot"),
    "vp": PathEntry(vp_linear, "noise", "diff"),
    "vp_cosine": PathEntry(vp_cosine, "velocity", "cosine"),
}
