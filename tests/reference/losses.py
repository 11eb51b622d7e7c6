"""The losses of method.md with every random number given, in NumPy float64.

``predict`` is the field's output at the samples; nothing here draws anything.
"""

from scipy.special import log_softmax, softmax

from tests.reference import paths


def cfm_errors(path, predict, x0, noise, t):
    """``||v - u_{t0}||^2`` over the last axis."""
    return ((predict - paths.velocity(path, x0, noise, t)) ** 2).sum(-1)


def dsm_errors(path, predict, noise, t):
    """``||s + eps / sigma_t||^2`` over the last axis."""
    return ((predict - paths.score(path, noise, t)) ** 2).sum(-1)


def cfm(path, predict, x0, noise, t):
    return cfm_errors(path, predict, x0, noise, t).mean()


def cefm(path, predict, x0, noise, t, energy, beta):
    return (softmax(-beta * energy) * cfm_errors(path, predict, x0, noise, t)).sum()


def dsm(path, predict, noise, t, time_weight=None):
    weight = path.sigma(t) ** 2 if time_weight is None else time_weight(t)
    return (weight * dsm_errors(path, predict, noise, t)).mean()


def ced(path, predict, noise, t, energy, beta, time_weight=None):
    weight = path.sigma(t) ** 2 if time_weight is None else time_weight(t)
    return (softmax(-beta * energy) * weight * dsm_errors(path, predict, noise, t)).sum()


def cep(log_ratio, energy, beta):
    return -(softmax(-beta * energy) * log_softmax(log_ratio)).sum()


def support_cefm(path, predict, actions, noise, t, q_values, beta):
    errors = cfm_errors(path, predict, actions, noise, t)
    return (softmax(beta * q_values, axis=-1) * errors).sum(-1).mean()


def support_ced(path, predict, noise, t, q_values, beta):
    errors = path.sigma(t) ** 2 * dsm_errors(path, predict, noise, t)
    return (softmax(beta * q_values, axis=-1) * errors).sum(-1).mean()
