"""Minibatch optimal transport: a coupling of noise and data of one's own, by `noise=`.

Pooladian et al. 2023 (arXiv 2302.05672); Tong et al. 2024 (arXiv 2302.00482).
"""

import functools

import jax
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from efm_jax import distances, losses, paths, sampling
from experiments.examples import plain_function

PATH = paths.conditional_ot()


def draw(rng, size):
    """Draw data of eight Gaussians on a circle, and noise: ``[size, 2]`` each, independent."""
    angle = 2 * np.pi * rng.integers(8, size=size) / 8
    centers = 3 * np.stack([np.cos(angle), np.sin(angle)], -1)
    x0, noise = centers + 0.2 * rng.normal(size=(size, 2)), rng.normal(size=(size, 2))
    return x0.astype(np.float32), noise.astype(np.float32)


def couple(x0, noise):
    """Permute the noise so that the batch's sum of squared distances to the data is least."""
    cost = ((x0[:, None] - noise[None]) ** 2).sum(-1)
    return noise[linear_sum_assignment(cost)[1]]


def train(coupling, num_steps=400, size=128):
    """Return the trained field and the mean loss over the last half of the steps."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    params, optimizer = plain_function.init(key), optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state, key, x0, noise):
        fit = lambda p: losses.cfm(  # noqa: E731
            functools.partial(plain_function.field, p), PATH, key, x0, noise=noise
        )[0]
        loss, grads = jax.value_and_grad(fit)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, history = optimizer.init(params), []
    for step_key in jax.random.split(key, num_steps):
        x0, noise = draw(rng, size)
        params, opt_state, loss = step(params, opt_state, step_key, x0, coupling(x0, noise))
        history.append(float(loss))
    return functools.partial(plain_function.field, params), np.mean(history[num_steps // 2 :])


def main():
    """Print cost, loss and the quality of few steps, of both couplings."""
    x0, noise = draw(np.random.default_rng(1), 2048)
    for name, coupling in (("independent", lambda x0, noise: noise), ("optimal", couple)):
        cost = ((x0 - coupling(x0, noise)) ** 2).sum(-1).mean()
        field, loss = train(coupling)
        x = sampling.sample(field, noise, num_steps=2)
        distance = distances.sliced_wasserstein(jax.random.key(1), x, x0)
        print(f"{name}: cost {cost:.3f}, loss {loss:.3f}, distance in 2 steps {distance:.3f}")


if __name__ == "__main__":
    main()
