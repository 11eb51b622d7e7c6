"""Logit-normal times, by `t=`, and what makes their loss that of uniform ones, `time_weight=`.

Esser et al. 2024 (arXiv 2403.03206), Sec. 3.1: more samples in the middle, where the task is hard.
The weights are the ratio of the densities, ``1 / p(t)``.  With logit-normal times alone they have
no variance, since ``p`` vanishes faster than any power at 0 and 1; a share of uniform times bounds
them.
"""

import jax
import jax.numpy as jnp

from efm_jax import losses, paths

UNIFORM = 0.25  # share of uniform times


def draw(key, size):
    """Draw times ``[size]``: logit-normal, a share of them uniform."""
    keys = jax.random.split(key, 3)
    middle = jax.nn.sigmoid(jax.random.normal(keys[0], (size,)))
    anywhere = jax.random.uniform(keys[1], (size,))
    return jnp.where(jax.random.bernoulli(keys[2], UNIFORM, (size,)), anywhere, middle)


def weight(t):
    """Compute ``1 / p(t)``."""
    t = jnp.clip(t, 1e-6, 1 - 1e-6)
    logit_normal = jax.scipy.stats.norm.pdf(jax.scipy.special.logit(t)) / (t * (1 - t))
    return 1 / (UNIFORM + (1 - UNIFORM) * logit_normal)


def expected(key, size, *, t=None, time_weight=None):
    """Return the loss of the field -x on normal data, and its standard error."""
    data_key, loss_key = jax.random.split(key)
    x0 = jax.random.normal(data_key, (size, 2))
    batch = (lambda x, t: -x), paths.conditional_ot(), loss_key, x0
    loss, _ = losses.cfm(*batch, t=t, time_weight=time_weight)
    each = losses.errors(*batch, t=t) * (1 if time_weight is None else time_weight(t))
    return loss, each.std() / size**0.5


def main():
    """Print the loss with each kind of times; exactly, ``2 E[t^2 + (1 + t)^2] = 16 / 3``."""
    key, size = jax.random.key(0), 2**18
    t = draw(jax.random.key(1), size)
    for name, options in {
        "uniform": {},
        "logit-normal": {"t": t},
        "logit-normal, weighted": {"t": t, "time_weight": weight},
    }.items():
        loss, error = expected(key, size, **options)
        print(f"{name}: loss {loss:.3f} +- {error:.3f}, with uniform times {16 / 3:.3f}")


if __name__ == "__main__":
    main()
