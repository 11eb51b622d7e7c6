"""Exact posterior, fields and intermediate energies on finite data: the plain ``[B, n, d]`` way."""

from scipy.special import logsumexp, softmax


def _log_kernel(path, x, t, data):
    mu, sigma = path.mu(t)[:, None], path.sigma(t)[:, None]
    distance = ((x[:, None, :] - mu[..., None] * data[None]) ** 2).sum(-1)
    return -distance / (2.0 * sigma**2)


def posterior(path, x, t, data, log_weights=0.0):
    return softmax(_log_kernel(path, x, t, data) + log_weights, axis=-1)


def posterior_mean(path, x, t, data, log_weights=0.0):
    return posterior(path, x, t, data, log_weights) @ data


def velocity(path, x, t, data, log_weights=0.0):
    mu, sigma = path.mu(t)[:, None], path.sigma(t)[:, None]
    ratio = path.sigma_dot(t)[:, None] / sigma
    mean = posterior_mean(path, x, t, data, log_weights)
    return ratio * (x - mu * mean) + path.mu_dot(t)[:, None] * mean


def score(path, x, t, data, log_weights=0.0):
    mean = posterior_mean(path, x, t, data, log_weights)
    return (path.mu(t)[:, None] * mean - x) / path.sigma(t)[:, None] ** 2


def intermediate_energy(path, x, t, data, energy, beta):
    kernel = _log_kernel(path, x, t, data)
    return logsumexp(kernel, axis=-1) - logsumexp(kernel - beta * energy, axis=-1)


def cg_score(path, x, t, data, class_prob, beta):
    """Eq. 4.6: ``grad log p_t + beta grad log E[p(c|x0)]``, gradients written per data point."""
    mu, sigma = path.mu(t)[:, None, None], path.sigma(t)[:, None, None]
    pull = (mu * data[None] - x[:, None, :]) / sigma**2  # grad_x log p_{t0}(x|x_i): [B, n, d]
    plain = posterior(path, x, t, data)
    joint = plain * class_prob  # p(x_i, c | x)
    joint = joint / joint.sum(-1, keepdims=True)
    unguided = (plain[..., None] * pull).sum(1)
    return unguided + beta * ((joint[..., None] * pull).sum(1) - unguided)
