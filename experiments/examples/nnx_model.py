"""CEFM on a Flax NNX model (Flax 0.11 or later)."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from efm_jax import losses, paths, sampling


class Field(nnx.Module):
    """A velocity field (x: [B, 2], t: [B]) -> [B, 2]."""

    def __init__(self, rngs):
        first, second = nnx.Linear(3, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
        self.mlp = nnx.Sequential(first, nnx.silu, second, nnx.silu, nnx.Linear(64, 2, rngs=rngs))

    def __call__(self, x, t):
        return self.mlp(jnp.concatenate([x, t[:, None]], axis=-1))


def loss(model, key):
    """Compute CEFM on a fresh batch: (loss, aux).  The model is the field."""
    data_key, loss_key = jax.random.split(key)
    x0 = jax.random.normal(data_key, (512, 2))
    energy = jnp.sum((x0 - 1.0) ** 2, axis=-1)
    return losses.cefm(model, paths.conditional_ot(), loss_key, x0, energy, beta=0.5)


@nnx.jit
def step(model, optimizer, key):
    """Update model and optimizer in place."""
    (value, _), grads = nnx.value_and_grad(loss, has_aux=True)(model, key)
    optimizer.update(model, grads)
    return value


def train(key, num_steps):
    """Return the trained field."""
    init_key, train_key = jax.random.split(key)
    model, schedule = Field(nnx.Rngs(init_key)), optax.cosine_decay_schedule(1e-2, num_steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    for step_key in jax.random.split(train_key, num_steps):
        step(model, optimizer, step_key)
    return model


def main():
    """Print moments of guided samples beside the exact ones."""
    field = train(jax.random.key(0), 1000)
    x = sampling.sample(field, jax.random.normal(jax.random.key(1), (16384, 2)), solver="midpoint")
    print(f"nnx: mean {x.mean(0)}, exact 0.5; std {x.std(0)}, exact {0.5**0.5:.4f}")


if __name__ == "__main__":
    main()
