"""CEFM on a plain function of a dict of parameters."""

import functools

import jax
import jax.numpy as jnp
import optax

from efm_jax import losses, paths, sampling


def init(key):
    """Draw parameters of :func:`field`."""
    params = {}
    for i, (n, m) in enumerate([(3, 64), (64, 64), (64, 2)]):
        params[f"w{i}"] = n**-0.5 * jax.random.normal(jax.random.fold_in(key, i), (n, m))
        params[f"b{i}"] = jnp.zeros(m)
    return params


def field(params, x, t):
    """A velocity field (x: [B, 2], t: [B]) -> [B, 2]."""
    h = jax.nn.silu(jnp.concatenate([x, t[:, None]], axis=-1) @ params["w0"] + params["b0"])
    return jax.nn.silu(h @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, key):
    """Compute CEFM on a fresh batch: (loss, aux).  The parameters are closed over."""
    data_key, loss_key = jax.random.split(key)
    x0 = jax.random.normal(data_key, (512, 2))
    energy = jnp.sum((x0 - 1.0) ** 2, axis=-1)
    velocity = functools.partial(field, params)
    return losses.cefm(velocity, paths.conditional_ot(), loss_key, x0, energy, beta=0.5)


def train(key, num_steps):
    """Return the trained field."""
    init_key, train_key = jax.random.split(key)
    params, optimizer = init(init_key), optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))

    def step(carry, key):
        _, grads = jax.value_and_grad(loss, has_aux=True)(carry[0], key)
        updates, opt_state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), opt_state), None

    run, keys = jax.jit(jax.lax.scan, static_argnums=0), jax.random.split(train_key, num_steps)
    (params, _), _ = run(step, (params, optimizer.init(params)), keys)
    return functools.partial(field, params)


def main():
    """Print moments of guided samples beside the exact ones."""
    noise = jax.random.normal(jax.random.key(1), (16384, 2))
    x = sampling.sample(train(jax.random.key(0), 1000), noise, solver="midpoint")
    print(f"plain: mean {x.mean(0)}, exact 0.5; std {x.std(0)}, exact {0.5**0.5:.4f}")


if __name__ == "__main__":
    main()
