"""Fixed-step Runge-Kutta and DPM-Solver++ updates, in NumPy float64."""

import numpy as np

TABLEAUS = {  # (nodes c, matrix A, weights b)
    "euler": ([0.0], [[]], [1.0]),
    "midpoint": ([0.0, 0.5], [[], [0.5]], [0.0, 1.0]),
    "heun": ([0.0, 1.0], [[], [1.0]], [0.5, 0.5]),
    "rk4": (
        [0.0, 0.5, 0.5, 1.0],
        [[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def integrate(field, x, solver, num_steps, t_start=1.0, t_end=0.0):
    """Equal steps of one of the tableaus above; ``field(x, t)`` with scalar ``t``."""
    nodes, matrix, weights = TABLEAUS[solver]
    h = (t_end - t_start) / num_steps
    for k in range(num_steps):
        t, slopes = t_start + k * h, []
        for c, row in zip(nodes, matrix, strict=True):
            stage = x + h * sum((a * s for a, s in zip(row, slopes, strict=True)), np.zeros_like(x))
            slopes.append(field(stage, t + c * h))
        x = x + h * sum(b * s for b, s in zip(weights, slopes, strict=True))
    return x


def dpmpp_step(path, x, x0_hat, t, t_next, x0_previous=None, t_previous=None):
    """DPM-Solver++ (Lu et al. 2022): eq. 9 of order 1; algorithm 2 (2M) with a previous x0."""
    half_log_snr = [
        np.log(path.mu(s) / path.sigma(s)) for s in (t_previous, t, t_next) if s is not None
    ]
    h = half_log_snr[-1] - half_log_snr[-2]
    estimate = x0_hat
    if x0_previous is not None:
        r = (half_log_snr[1] - half_log_snr[0]) / h
        estimate = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * x0_previous
    return path.sigma(t_next) / path.sigma(t) * x - path.mu(t_next) * np.expm1(-h) * estimate
