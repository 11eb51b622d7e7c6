"""Mixtures of isotropic Gaussians with quadratic energies, in NumPy float64.

A mixture is ``(weights [K], means [K, d], variances [K])``, weights summing to 1; an energy is
``(center [d], curvature, offset)``.  Components are conditioned one at a time with the usual rules
of Gaussians, and guided quantities come from the guided mixture, never from a tilted posterior.
"""

import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal


def energy_at(energy, x):
    center, curvature, offset = energy
    return offset + 0.5 * curvature * ((x - center) ** 2).sum(-1)


def _log_components(weights, means, variances, x):
    """``log w_k N(x; m_k, v_k I)``, ``[B, K]``, of means ``[B, K, d]`` and variances ``[B, K]``."""
    identity = np.eye(x.shape[-1])
    rows = [
        [
            np.log(w) + multivariate_normal.logpdf(point, m, v * identity)
            for w, m, v in zip(weights, m_row, v_row, strict=True)
        ]
        for point, m_row, v_row in zip(x, means, variances, strict=True)
    ]
    return np.array(rows)


def _at(path, mixture, x, t):
    """Components of ``p_t`` and the posterior over them: means, variances, ``log w_k N_k(x)``."""
    weights, means, variances = mixture
    mu, sigma = path.mu(t), path.sigma(t)
    means = mu[:, None, None] * means
    variances = mu[:, None] ** 2 * variances + sigma[:, None] ** 2
    return means, variances, _log_components(weights, means, variances, x)


def log_density(mixture, x):
    weights, means, variances = mixture
    means = np.broadcast_to(means, (len(x), *means.shape))
    variances = np.broadcast_to(variances, (len(x), *variances.shape))
    return logsumexp(_log_components(weights, means, variances, x), axis=-1)


def marginal_log_density(path, mixture, x, t):
    return logsumexp(_at(path, mixture, x, t)[2], axis=-1)


def score(path, mixture, x, t):
    means, variances, logs = _at(path, mixture, x, t)
    responsibility = np.exp(logs - logsumexp(logs, axis=-1, keepdims=True))
    return (responsibility[..., None] * (means - x[:, None]) / variances[..., None]).sum(1)


def x0(path, mixture, x, t):
    """Tweedie's formula on the score."""
    mu, sigma = path.mu(t)[:, None], path.sigma(t)[:, None]
    return (x + sigma**2 * score(path, mixture, x, t)) / mu


def velocity(path, mixture, x, t):
    mean = x0(path, mixture, x, t)
    noise = (x - path.mu(t)[:, None] * mean) / path.sigma(t)[:, None]
    return path.mu_dot(t)[:, None] * mean + path.sigma_dot(t)[:, None] * noise


def guided(mixture, energy, beta):
    """``(p exp(-beta E) / Z, log Z)``: precisions add, precision-weighted means add."""
    weights, means, variances = mixture
    center, curvature, _ = energy
    d = means.shape[-1]
    precision = 1.0 / variances + beta * curvature
    new_means = (means / variances[:, None] + beta * curvature * center) / precision[:, None]
    # The mass of a component is p exp(-beta E) / N(m', v') at any point: here at its mean.
    mass = np.array(
        [
            np.log(w)
            + multivariate_normal.logpdf(m, m, v * np.eye(d))
            - beta * energy_at(energy, m)
            - multivariate_normal.logpdf(m, m_new, np.eye(d) / p)
            for w, m, v, m_new, p in zip(
                weights, means, variances, new_means, precision, strict=True
            )
        ]
    )
    log_z = logsumexp(mass)
    return (np.exp(mass - log_z), new_means, 1.0 / precision), log_z


def intermediate_energy(path, mixture, x, t, energy, beta):
    tilted, log_z = guided(mixture, energy, beta)
    return (
        marginal_log_density(path, mixture, x, t) - marginal_log_density(path, tilted, x, t) - log_z
    )


def cg_score(path, mixture, x, t, energy, beta):
    """Eq. 4.6: the second gradient is that of ``-E_t`` at beta = 1."""
    plain = score(path, mixture, x, t)
    return plain + beta * (score(path, guided(mixture, energy, 1.0)[0], x, t) - plain)
