"""The training state of one model, a pytree."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from efm_jax.types import Params


class TrainState(struct.PyTreeNode):
    """Everything that a training step reads and writes; randomness is derived from ``step``."""

    step: Array  # [] int32, steps done
    params: Params
    average: (
        Params  # Polyak average of params: target networks of a critic, acting weights of a policy
    )
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """A state at step 0 whose average equals its parameters."""
        # A copy: buffers are donated, and a donated buffer may not appear twice.
        average = jax.tree.map(jnp.copy, params)
        return cls(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))
