"""Closed forms for data ``N(mean, scale^2 I)`` carried along a Gaussian path."""

import numpy as np


def variance(path, t, scale):
    return path.mu(t) ** 2 * scale**2 + path.sigma(t) ** 2


def score(path, x, t, mean, scale):
    return -(x - path.mu(t)[:, None] * mean) / variance(path, t, scale)[:, None]


def velocity(path, x, t, mean, scale):
    centred = (x - path.mu(t)[:, None] * mean) / variance(path, t, scale)[:, None]
    x0 = mean + path.mu(t)[:, None] * scale**2 * centred
    return path.mu_dot(t)[:, None] * x0 + path.sigma_dot(t)[:, None] * path.sigma(t)[:, None] * centred


def flow_map(path, x, t_from, t_to, mean, scale):
    """Where the probability-flow ODE takes ``x`` from one time to another."""
    ratio = np.sqrt(variance(path, t_to, scale) / variance(path, t_from, scale))
    return path.mu(t_to) * mean + ratio * (x - path.mu(t_from) * mean)


def log_density(x, mean, scale):
    d = x.shape[-1]
    return -0.5 * ((x - mean) ** 2).sum(-1) / scale**2 - d * np.log(scale) - 0.5 * d * np.log(2 * np.pi)
