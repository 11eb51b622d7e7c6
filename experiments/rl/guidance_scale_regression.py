"""The effective guidance scale: a regression within states, and QIPO's own with perfect models."""

from typing import NamedTuple

import numpy as np

# A slope through fewer actions says little of its state.
_MIN_ACTIONS = 4


class Slope(NamedTuple):
    """Slopes of log-ratios on Q-values within states."""

    slope: float  # median over states
    low: float  # its 95% bootstrap interval over states
    high: float
    r2: float  # share of a state's variance that its line explains, median over states
    pooled: float  # one slope for all states, by least squares
    pooled_low: float
    pooled_high: float
    pooled_r2: float
    kept: float  # share of the actions that were used


def within_regression(
    log_ratios: np.ndarray,
    q_values: np.ndarray,
    keep: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> Slope:
    """Regress ``log pi - log mu`` on Q with an intercept of its own for every state.

    The law ``pi = mu exp(b Q) / Z(s)`` is ``log pi - log mu = b Q - log Z(s)``: a line with slope b
    whose level is the state's.  Where it holds exactly, any choice of actions and any weighting of
    states gives b; where it does not, the pooled slope is that of the states with the widest
    Q-values (each counts with its variance of Q), the median that of a typical state.  Leaving out
    actions by where they are (``keep``) is such a choice and no selection on the result.

    All are ``[n, m]``, of m actions at n states.  A state counts if ``keep`` leaves it four
    actions, not all of one Q-value; where none does all but ``kept`` is NaN.  The bootstrap draws
    whole states, as the actions of one share its intercept.
    """
    keep = np.asarray(keep, bool)
    used = keep & (keep.sum(1, keepdims=True) >= _MIN_ACTIONS)

    def centered(values: np.ndarray) -> np.ndarray:
        values = np.where(used, np.asarray(values, np.float64), 0.0)
        means = values.sum(1, keepdims=True) / np.maximum(used.sum(1, keepdims=True), 1)
        return (values - means) * used

    x, y = centered(q_values), centered(log_ratios)
    # All that a state's own and the pooled regression need of it, so resampling states is cheap.
    sums = np.stack([(x * x).sum(1), (x * y).sum(1), (y * y).sum(1)])
    sums = sums[:, sums[0] > 0]
    if not sums.size:
        return Slope(*[float("nan")] * 8, kept=float(keep.mean()))

    def estimates(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> list[np.ndarray]:
        r2 = xy**2 / np.where(yy > 0, xx * yy, np.inf)
        pooled, pooled_yy = xy.sum(-1) / xx.sum(-1), yy.sum(-1)
        pooled_r2 = pooled * xy.sum(-1) / np.where(pooled_yy > 0, pooled_yy, np.inf)
        return [np.median(xy / xx, axis=-1), np.median(r2, axis=-1), pooled, pooled_r2]

    count = sums.shape[1]
    states = np.random.default_rng(seed).integers(count, size=(resamples, count))
    drawn = estimates(*sums[:, states])
    (low, high), (pooled_low, pooled_high) = (np.quantile(drawn[i], [0.025, 0.975]) for i in (0, 2))
    slope, r2, pooled, pooled_r2 = estimates(*sums)
    numbers = slope, low, high, r2, pooled, pooled_low, pooled_high, pooled_r2, keep.mean()
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
    """Compute ``log pi_l - log mu`` of QIPO with perfect models, on distributions over K actions.

    A period replaces the policy by the actions of its support sets, each drawn with its weight
    ``g_j ∝ c_j exp(beta Q_j)``: one data action ``a_0 ~ mu`` that counts c times, and M of the
    policy.  So ``pi'(a) = mu(a) E[c e(a) / (c e(a) + S_M)] + M pi(a) E[e(a) / (c e(a_0) + e(a) +
    S_{M-1})]`` with ``e = exp(beta Q)`` and ``S_m`` its sum over m actions of the policy;
    expectations are averages over ``draws`` support sets.  For M to infinity this is ``pi exp(beta
    Q) / Z`` (Zhang et al. 2025, eq. 5.4); as a weight is at most 1, ``pi' <= mu + M pi``: with M
    actions a period cannot tilt further than that.

    From ``masses [n, K]`` of mu at n states, ``q_values [n, K]`` and ``betas [L]`` of each period
    to ``[L, n, K]``, after each period.
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
    """Draw places with these masses."""
    total = np.cumsum(masses)
    places = np.searchsorted(total, total[-1] * rng.random(shape), side="right")
    return np.minimum(places, len(masses) - 1)
