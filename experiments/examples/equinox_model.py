"""CEFM on an Equinox model; diffrax brings Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from efm_jax import losses, paths, sampling


class Field(eqx.Module):
    """A velocity field (x: [2], t: []) -> [2] of one sample; vmap makes the batch's."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(3, 2, 64, depth=2, activation=jax.nn.silu, key=key)

    def __call__(self, x, t):
        return self.mlp(jnp.append(x, t))


def loss(model, key):
    """Compute CEFM on a fresh batch: (loss, aux)."""
    data_key, loss_key = jax.random.split(key)
    x0 = jax.random.normal(data_key, (512, 2))
    energy = jnp.sum((x0 - 1.0) ** 2, axis=-1)
    return losses.cefm(jax.vmap(model), paths.conditional_ot(), loss_key, x0, energy, beta=0.5)


def train(key, num_steps):
    """Return the trained field."""
    init_key, train_key = jax.random.split(key)
    model, optimizer = Field(init_key), optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state, key):
        _, grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state

    for step_key in jax.random.split(train_key, num_steps):
        model, opt_state = step(model, opt_state, step_key)
    return jax.vmap(model)


def main():
    """Print moments of guided samples beside the exact ones."""
    field = train(jax.random.key(0), 1000)
    x = sampling.sample(field, jax.random.normal(jax.random.key(1), (16384, 2)), solver="midpoint")
    print(f"equinox: mean {x.mean(0)}, exact 0.5; std {x.std(0)}, exact {0.5**0.5:.4f}")


if __name__ == "__main__":
    main()
