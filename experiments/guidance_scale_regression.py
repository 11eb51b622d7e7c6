"""The effective guidance scale: a regression within states, and QIPO's own with perfect models."""

from typing import NamedTuple

import numpy as np


class Slope(NamedTuple):
    """The slope of log-ratios on Q-values within states."""

    slope: float
    low: float  # 95% bootstrap interval over states
    high: float
    r2: float  # share of the variance within states
    median: float  # of the states' own slopes
    kept: float  # share of the actions that were used


def within_regression(
    log_ratios: np.ndarray, q_values: np.ndarray, keep: np.ndarray, resamples: int = 1000, seed: int = 0
) -> Slope:
    """Regress ``log pi - log mu`` on Q with an intercept of its own for every state.

    The law ``pi = mu exp(b Q) / Z(s)`` is ``log pi - log mu = b Q - log Z(s)``: a line with slope b whose
    level is the state's.  Where it holds exactly, any choice of actions gives b; where it does not, the slope
    is the best line's over the actions chosen.  Leaving out actions by where they are (``keep``) is such a
    choice and no selection on the result.

    Args:
      log_ratios: ``[n, m]``, of m actions at n states.
      q_values: ``[n, m]``.
      keep: ``[n, m]``, which actions to use; a state needs two of them to count.
      resamples: bootstrap samples; whole states are drawn, as the actions of one share its intercept.
      seed: of the bootstrap.

    Returns:
      NaN slopes where no state has two actions with different Q-values.
    """
    keep = np.asarray(keep, bool)
    usable = keep.sum(1) >= 2
    weights = (keep & usable[:, None]).astype(np.float64)

    def centred(values: np.ndarray) -> np.ndarray:
        values = np.where(weights > 0, np.asarray(values, np.float64), 0.0)
        means = values.sum(1, keepdims=True) / np.maximum(weights.sum(1, keepdims=True), 1)
        return (values - means) * weights

    x, y = centred(q_values), centred(log_ratios)
    xx, xy, yy = (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)
    if not xx.sum() > 0:
        return Slope(*[float("nan")] * 5, kept=float(keep.mean()))
    # A state's sums are all that the pooled slope needs of it, so resampling states is cheap.
    counts = np.random.default_rng(seed).multinomial(len(xx), np.full(len(xx), 1 / len(xx)), resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (counts @ xy) / (counts @ xx)
        r2 = xy.sum() ** 2 / (xx.sum() * yy.sum())
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    median = np.median(xy[xx > 0] / xx[xx > 0])
    numbers = xy.sum() / xx.sum(), low, high, r2, median, keep.mean()
    return Slope(*map(float, numbers))


def reference_log_ratios(
    masses: np.ndarray,
    q_values: np.ndarray,
    betas: np.ndarray,
    support_size: int,
    data_copies: float,
    draws: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """``log pi_l - log mu`` of QIPO with perfect models, on distributions over K actions.

    A period replaces the policy by the actions of its support sets, each drawn with its weight
    ``g_j ∝ c_j exp(beta Q_j)``: one data action ``a_0 ~ mu`` that counts c times, and M of the policy.  So
    ``pi'(a) = mu(a) E[c e(a) / (c e(a) + S_M)] + M pi(a) E[e(a) / (c e(a_0) + e(a) + S_{M-1})]``
    with ``e = exp(beta Q)`` and ``S_m`` its sum over m actions of the policy; expectations are averages over
    ``draws`` support sets.  For M to infinity this is ``pi exp(beta Q) / Z`` (Zhang et al. 2025, eq. 5.4); as
    a weight is at most 1, ``pi' <= mu + M pi``: with M actions a period cannot tilt further than that.

    Args:
      masses: ``[n, K]``, mu at n states; each row sums to 1.
      q_values: ``[n, K]``.
      betas: ``[L]``, of each period.
      support_size: M.
      data_copies: c.
      draws: support sets per state and period.
      seed: of the support sets.

    Returns:
      ``[L, n, K]``, after each period.
    """
    rng, c, size = np.random.default_rng(seed), float(data_copies), int(support_size)
    found = np.empty((len(betas), *masses.shape))
    for state, (mass, q) in enumerate(zip(masses, q_values, strict=True)):
        ratio = np.ones_like(mass)
        for period, beta in enumerate(betas):
            e = np.exp(beta * (q - q.max()))
            data = e[_draw(rng, mass, (draws, 1))]
            drawn = e[_draw(rng, mass * ratio, (draws, size))]
            rest, last = drawn[:, :-1].sum(1, keepdims=True), drawn[:, -1:]
            of_data = (c * e / (c * e + rest + last)).mean(0)
            of_policy = size * (e / (c * data + e + rest)).mean(0)
            ratio = of_data + ratio * of_policy
            ratio /= (mass * ratio).sum()  # 1 but for the error of the averages
            found[period, state] = np.log(np.maximum(ratio, np.finfo(float).tiny))
    return found


def _draw(rng: np.random.Generator, masses: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Places drawn with these masses."""
    total = np.cumsum(masses)
    return np.minimum(np.searchsorted(total, total[-1] * rng.random(shape), side="right"), len(masses) - 1)
