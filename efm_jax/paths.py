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

Shapes: coefficients have the shape of ``t``; values and points are ``[*batch, *event]``, usually
``[B, d]``, or pytrees of such arrays, with ``t`` of shape ``[*batch]`` or a scalar.  Types:
coefficients are float32 at least, and a result has the type of its values, whatever ``t`` is.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float, Real

from efm_jax import arrays, checks

Time = Real[chex.Numeric, "*batch"]
Coefficient = Float[jax.Array, "*batch"]

# Kinds of prediction: the velocity u, the noise eps_hat, the score s, the data x_hat0.
PREDICTIONS = ("velocity", "noise", "score", "data")


P = ParamSpec("P")


def _wide(t: Time) -> jax.Array:
    return arrays.widen("t", t)


def _constant(value: float, t: Time) -> jax.Array:
    return jnp.full_like(_wide(t), value)


def _leafwise(method: Callable[P, Any]) -> Callable[P, Any]:
    """Apply a method ``(self, *values, t)`` to points of any shape and to every leaf of pytrees.

    The method sees values in 32 bits at least and times reshaped to multiply them; the result has
    the values' type.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def apply(*args: P.args, **kwargs: P.kwargs) -> Any:
        path, *values, t = signature.bind(*args, **kwargs).args

        def leaf(*leaves: Any) -> jax.Array:
            points = [arrays.to_float("points", value) for value in leaves]
            for point in points[1:]:
                checks.check_shape("points", point, points[0].shape)
            wide = arrays.wide_type(*points)
            time = arrays.expand("t", arrays.to_float("t", t).astype(wide), points[0])
            wide_points = (point.astype(wide) for point in points)
            result = method(path, *wide_points, time)  # pyright: ignore[reportCallIssue] bound above
            return result.astype(arrays.common_type(*points))

        return jax.tree.map(leaf, *values)

    return apply


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
    def mean_coef(self, t: Time) -> Coefficient:
        """``mu_t``."""

    @abc.abstractmethod
    def std(self, t: Time) -> Coefficient:
        """``sigma_t``."""

    @abc.abstractmethod
    def mean_coef_dot(self, t: Time) -> Coefficient:
        """``d mu_t / dt``."""

    @abc.abstractmethod
    def std_dot(self, t: Time) -> Coefficient:
        """``d sigma_t / dt``."""

    # A path overrides these where the quotients are not finite at an end of [0, 1].

    def _inverse_det(self, t: Time) -> Coefficient:
        """``1 / D``."""
        return 1 / (self.mean_coef(t) * self.std_dot(t) - self.mean_coef_dot(t) * self.std(t))

    def _std_det(self, t: Time) -> Coefficient:
        """``sigma D``."""
        return self.std(t) / self._inverse_det(t)

    def _std_dot_over_det(self, t: Time) -> Coefficient:
        """``sigma' / D``."""
        return self.std_dot(t) * self._inverse_det(t)

    @_leafwise
    def sample(self, x0: Any, noise: Any, t: Time) -> Any:
        """``x_t = mu_t x_0 + sigma_t eps``: ``[..., d]``."""
        return self.mean_coef(t) * x0 + self.std(t) * noise

    @_leafwise
    def velocity(self, x0: Any, noise: Any, t: Time) -> Any:
        """Conditional velocity ``u_{t0}(x_t | x_0) = mu'_t x_0 + sigma'_t eps``: ``[..., d]``."""
        return self.mean_coef_dot(t) * x0 + self.std_dot(t) * noise

    @_leafwise
    def score(self, noise: Any, t: Time) -> Any:
        """Conditional score ``-eps / sigma_t``: ``[..., d]``; infinite where ``sigma_t = 0``."""
        return -noise / self.std(t)

    @_leafwise
    def velocity_from_score(self, score: Any, x: Any, t: Time) -> Any:
        """``u = (mu' x - sigma D s) / mu``."""
        return (self.mean_coef_dot(t) * x - self._std_det(t) * score) / self.mean_coef(t)

    @_leafwise
    def score_from_velocity(self, velocity: Any, x: Any, t: Time) -> Any:
        """``s = (mu' x - mu u) / (sigma D)``."""
        return (self.mean_coef_dot(t) * x - self.mean_coef(t) * velocity) / self._std_det(t)

    @_leafwise
    def velocity_from_noise(self, noise: Any, x: Any, t: Time) -> Any:
        """``u = (mu' x + D eps) / mu``."""
        return (self.mean_coef_dot(t) * x + noise / self._inverse_det(t)) / self.mean_coef(t)

    @_leafwise
    def noise_from_velocity(self, velocity: Any, x: Any, t: Time) -> Any:
        """``eps = (mu u - mu' x) / D``."""
        return (self.mean_coef(t) * velocity - self.mean_coef_dot(t) * x) * self._inverse_det(t)

    @_leafwise
    def velocity_from_x0(self, x0: Any, x: Any, t: Time) -> Any:
        """``u = mu' x_0 + sigma' (x - mu x_0) / sigma``."""
        std, residual = self.std(t), x - self.mean_coef(t) * x0
        # Where sigma = 0 the residual decides: 0 means noise 0, anything else is infinitely far
        # off.
        rate = jnp.where(std > 0, self.std_dot(t) / jnp.where(std > 0, std, 1), jnp.inf)
        on_data = (residual == 0) & (std == 0)
        noise_part = jnp.where(on_data, 0, jnp.where(on_data, 0, rate) * residual)
        return self.mean_coef_dot(t) * x0 + noise_part

    @_leafwise
    def x0_from_velocity(self, velocity: Any, x: Any, t: Time) -> Any:
        """``x_0 = (sigma' x - sigma u) / D``."""
        return self._std_dot_over_det(t) * x - self.std(t) * self._inverse_det(t) * velocity

    def score_from_noise(self, noise: Any, x: Any, t: Time) -> Any:
        """``s = -eps / sigma``."""
        return self.score(noise, t)

    @_leafwise
    def noise_from_score(self, score: Any, x: Any, t: Time) -> Any:
        """``eps = -sigma s``."""
        return -self.std(t) * score

    @_leafwise
    def noise_from_x0(self, x0: Any, x: Any, t: Time) -> Any:
        """``eps = (x - mu x_0) / sigma``."""
        return (x - self.mean_coef(t) * x0) / self.std(t)

    @_leafwise
    def x0_from_noise(self, noise: Any, x: Any, t: Time) -> Any:
        """``x_0 = (x - sigma eps) / mu``."""
        return (x - self.std(t) * noise) / self.mean_coef(t)

    @_leafwise
    def x0_from_score(self, score: Any, x: Any, t: Time) -> Any:
        """``x_0 = (x + sigma^2 s) / mu``."""
        return (x + self.std(t) ** 2 * score) / self.mean_coef(t)

    @_leafwise
    def score_from_x0(self, x0: Any, x: Any, t: Time) -> Any:
        """``s = (mu x_0 - x) / sigma^2``."""
        return (self.mean_coef(t) * x0 - x) / self.std(t) ** 2

    def target(self, prediction: str, x0: Any, noise: Any, t: Time) -> Any:
        """The value that a network of a kind of ``PREDICTIONS`` learns at ``x_t``: ``[..., d]``."""
        checks.check_choice("prediction", prediction, PREDICTIONS)
        if prediction == "velocity":
            return self.velocity(x0, noise, t)
        if prediction == "score":
            return self.score(noise, t)
        return jax.tree.map(jnp.asarray, noise if prediction == "noise" else x0)

    def convert(self, value: Any, x: Any, t: Time, source: str, target: str) -> Any:
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
            return jax.tree.map(jnp.asarray, value)
        source, target = ("x0" if kind == "data" else kind for kind in (source, target))
        return getattr(self, f"{target}_from_{source}")(value, x, t)


@dataclasses.dataclass(frozen=True)
class _ConditionalOT(GaussianPath):
    """``mu = 1 - t``, ``sigma = sigma_min + (1 - sigma_min) t``, so ``D = 1``."""

    sigma_min: float

    def mean_coef(self, t: Time) -> Coefficient:
        return 1 - _wide(t)

    def std(self, t: Time) -> Coefficient:
        return self.sigma_min + (1 - self.sigma_min) * _wide(t)

    def mean_coef_dot(self, t: Time) -> Coefficient:
        return _constant(-1.0, t)

    def std_dot(self, t: Time) -> Coefficient:
        return _constant(1 - self.sigma_min, t)

    def _inverse_det(self, t: Time) -> Coefficient:
        return _constant(1.0, t)


@dataclasses.dataclass(frozen=True)
class _VariancePreserving(GaussianPath):
    """``mu^2 + sigma^2 = 1``, so ``mu mu' = -sigma sigma'`` and ``D = -mu' / sigma``."""

    def _std_det(self, t: Time) -> Coefficient:
        return -self.mean_coef_dot(t)

    def _std_dot_over_det(self, t: Time) -> Coefficient:
        return self.mean_coef(t)


@dataclasses.dataclass(frozen=True)
class _LinearVP(_VariancePreserving):
    """``log mu = -(b1 - b0) t^2 / 4 - b0 t / 2``: the rate ``-2 mu' / mu`` goes from b0 to b1."""

    beta_min: float
    beta_max: float

    def _log_mean(self, t: Time) -> Coefficient:
        t = _wide(t)
        return -(self.beta_max - self.beta_min) * t**2 / 4 - self.beta_min * t / 2

    def mean_coef(self, t: Time) -> Coefficient:
        return jnp.exp(self._log_mean(t))

    def std(self, t: Time) -> Coefficient:
        # expm1 keeps full precision where sigma is small.
        return jnp.sqrt(-jnp.expm1(2 * self._log_mean(t)))

    def mean_coef_dot(self, t: Time) -> Coefficient:
        t = _wide(t)
        return -self.mean_coef(t) * ((self.beta_max - self.beta_min) * t + self.beta_min) / 2

    def std_dot(self, t: Time) -> Coefficient:
        return -self.mean_coef(t) * self.mean_coef_dot(t) / self.std(t)

    def _inverse_det(self, t: Time) -> Coefficient:
        return -self.std(t) / self.mean_coef_dot(t)


@dataclasses.dataclass(frozen=True)
class _CosineVP(_VariancePreserving):
    """``mu = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``, so ``D = pi / 2``."""

    def mean_coef(self, t: Time) -> Coefficient:
        # The sine of the complement is exactly 0 at t = 1, where the cosine rounds to -4e-8.
        return jnp.sin(jnp.pi / 2 * (1 - _wide(t)))

    def std(self, t: Time) -> Coefficient:
        return jnp.sin(jnp.pi / 2 * _wide(t))

    def mean_coef_dot(self, t: Time) -> Coefficient:
        return -jnp.pi / 2 * self.std(t)

    def std_dot(self, t: Time) -> Coefficient:
        return jnp.pi / 2 * self.mean_coef(t)

    def _inverse_det(self, t: Time) -> Coefficient:
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
