"""Gaussian probability paths and their conversions (method.md, Paths), in NumPy float64.

Every conversion goes through the pair (x0_hat, eps_hat) that solves
``x = mu x0 + sigma eps`` with the second equation of the given prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Path:
    """The four coefficients of ``x_t = mu_t x0 + sigma_t eps``."""

    mu: Callable
    sigma: Callable
    mu_dot: Callable
    sigma_dot: Callable


def conditional_ot(sigma_min=0.0):
    return Path(
        mu=lambda t: 1.0 - t,
        sigma=lambda t: sigma_min + (1.0 - sigma_min) * t,
        mu_dot=lambda t: -np.ones_like(t),
        sigma_dot=lambda t: (1.0 - sigma_min) * np.ones_like(t),
    )


def vp_linear(beta_min=0.1, beta_max=20.0):
    def log_mu(t):
        return -(beta_max - beta_min) * t**2 / 4.0 - beta_min * t / 2.0

    def mu(t):
        return np.exp(log_mu(t))

    def sigma(t):
        return np.sqrt(-np.expm1(2.0 * log_mu(t)))

    def mu_dot(t):
        return mu(t) * (-(beta_max - beta_min) * t / 2.0 - beta_min / 2.0)

    def sigma_dot(t):
        with np.errstate(divide="ignore"):
            return -mu(t) * mu_dot(t) / sigma(t)  # mu^2 + sigma^2 = 1

    return Path(mu, sigma, mu_dot, sigma_dot)


def vp_cosine():
    half = np.pi / 2.0
    return Path(
        mu=lambda t: np.cos(half * t),
        sigma=lambda t: np.sin(half * t),
        mu_dot=lambda t: -half * np.sin(half * t),
        sigma_dot=lambda t: half * np.cos(half * t),
    )


def coefficients(path, t, x):
    """(mu, sigma, mu', sigma') with trailing axes added to reach the rank of ``x``."""
    t = np.asarray(t, np.float64)
    t = t.reshape(t.shape + (1,) * (np.ndim(x) - t.ndim))
    return path.mu(t), path.sigma(t), path.mu_dot(t), path.sigma_dot(t)


def sample(path, x0, noise, t):
    mu, sigma, _, _ = coefficients(path, t, x0)
    return mu * x0 + sigma * noise


def velocity(path, x0, noise, t):
    _, _, mu_dot, sigma_dot = coefficients(path, t, x0)
    return mu_dot * x0 + sigma_dot * noise


def score(path, noise, t):
    _, sigma, _, _ = coefficients(path, t, noise)
    return -noise / sigma


def predictions(path, kind, value, x, t):
    """(x0_hat, eps_hat) behind a prediction of one ``kind``: velocity, score, noise or x0."""
    mu, sigma, mu_dot, sigma_dot = coefficients(path, t, x)
    if kind == "velocity":  # Cramer's rule on [[mu, sigma], [mu', sigma']] (x0, eps) = (x, u)
        determinant = mu * sigma_dot - sigma * mu_dot
        return (sigma_dot * x - sigma * value) / determinant, (mu * value - mu_dot * x) / determinant
    if kind == "score":
        return (x + sigma**2 * value) / mu, -sigma * value
    if kind == "noise":
        return (x - sigma * value) / mu, value
    if kind == "x0":
        return value, (x - mu * value) / sigma
    raise KeyError(kind)


def convert(path, target, source, value, x, t):
    """Prediction of kind ``target`` from one of kind ``source``, as in `target_from_source`."""
    _, sigma, mu_dot, sigma_dot = coefficients(path, t, x)
    x0, eps = predictions(path, source, value, x, t)
    results = {
        "velocity": lambda: mu_dot * x0 + sigma_dot * eps,
        "score": lambda: -eps / sigma,
        "noise": lambda: eps,
        "x0": lambda: x0,
    }
    return results[target]()
