"""Energy weights, effective sample size and the choice of beta, in NumPy float64."""

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax


def energy_weights(energy, beta, axis=-1):
    """Softmax of ``-beta energy`` for finite energies."""
    return softmax(-beta * np.asarray(energy, np.float64), axis=axis)


def effective_sample_size(weights, axis=-1):
    weights = np.asarray(weights, np.float64)
    return weights.sum(axis) ** 2 / (weights**2).sum(axis)


def beta_for_ess(energy, fraction):
    """The root in beta of ``ESS(beta) = fraction n``, for one vector of energies."""
    energy = np.asarray(energy, np.float64)

    def gap(log_beta):
        weights = energy_weights(energy, np.exp(log_beta))
        return effective_sample_size(weights) - fraction * energy.size

    return np.exp(brentq(gap, -40.0, 40.0, xtol=1e-13))
