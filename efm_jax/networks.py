"""Flax Linen networks: conditional fields; Q, value, log-ratio and Gaussian policy networks.

All work on any leading axes.  The first layer joins inputs of different kinds (action, time, state)
in one product; a state that is shared by M support actions is given as ``[B, 1, S]`` against
``[B, M, A]``.

Fields have ``dtype``, the type that their layers compute in, by default that of inputs and
parameters promoted; parameters and the output keep their types, and time features are float32 at
least.  Q and value networks have none: actions of a state differ in Q by less than bfloat16
resolves at the level of Q.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float

from efm_jax import arrays, checks
from efm_jax.types import Array, Params, Points, Times

States = Float[Array, "*#batch S"]


def silu(x: jax.Array) -> jax.Array:
    """Compute ``x sigmoid(x)`` by tanh, which on a CPU takes half the time of an exponential."""
    return 0.5 * x * (1 + jnp.tanh(0.5 * x))


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
}


def fourier_features(t: Times, size: int) -> Float[jax.Array, "*batch {size}"]:
    """Compute cosines and sines of ``pi t / 2`` and of its octaves above.

    The lowest frequency alone separates all of [0, 1].  On a CPU, where a sine costs as much as a
    row of a small layer, octaves follow by the double-angle formulas; elsewhere, where every column
    that is computed alone costs a launch, all at once.
    """
    if size % 2:
        raise ValueError(f"size: expected an even number; got {size}")
    t = arrays.widen("t", t)

    def octaves(t: jax.Array) -> jax.Array:
        cosine, sine = jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t)
        features = []
        for _ in range(size // 2):
            features += [cosine, sine]
            cosine, sine = 2 * cosine**2 - 1, 2 * sine * cosine
        return jnp.stack(features, axis=-1)

    def at_once(t: jax.Array) -> jax.Array:
        number = np.arange(size)
        scales, shifts = np.pi / 2 * 2.0 ** (number // 2), np.pi / 2 * (number % 2)
        return jnp.cos(t[..., None] * scales.astype(t.dtype) - shifts.astype(t.dtype))

    return lax.platform_dependent(t, cpu=octaves, default=at_once)


def apply(network: nn.Module, params: Params, *inputs: Array) -> Any:
    """Evaluate a network; the type of ``network.apply`` allows for mutable collections too."""
    variables: Any = params
    return network.apply(variables, *inputs)


def _check_options(hidden_dims: Sequence[int], activation: str) -> None:
    checks.check_choice("activation", activation, ACTIVATIONS)
    if not hidden_dims:
        raise ValueError("hidden_dims: expected at least one hidden layer; got none")


class JointDense(nn.Module):
    """Dense layer on the concatenation of its inputs, whose leading axes broadcast.

    On a CPU an input that others share is multiplied once, before it is broadcast; elsewhere its
    few columns are broadcast, because the many that it becomes would go through memory.
    """

    features: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, *inputs: Array) -> jax.Array:
        sizes = [x.shape[-1] for x in inputs]
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        # LeCun initialization for the joint fan-in.
        init = nn.initializers.normal(sum(sizes) ** -0.5)
        kernel = self.param("kernel", init, (sum(sizes), self.features))
        bias, kernel, *columns = promote_dtype(bias, kernel, *inputs, dtype=self.dtype)
        leads = [x.shape[:-1] for x in columns]
        full = jnp.broadcast_shapes(*leads)

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            # One leading axis: a kernel's gradient over two of them copies what it multiplies.
            return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], self.features)

        def shared(kernel: jax.Array, *inputs: jax.Array) -> jax.Array:
            rows, parts = jnp.split(kernel, np.cumsum(sizes)[:-1]), []
            for lead in dict.fromkeys(leads):
                same = [i for i, other in enumerate(leads) if other == lead]
                x = _join([inputs[i] for i in same])
                parts.append(product(x, jnp.concatenate([rows[i] for i in same])))
            return functools.reduce(jnp.add, parts)

        def broadcast(kernel: jax.Array, *inputs: jax.Array) -> jax.Array:
            wide = [jnp.broadcast_to(x, (*full, x.shape[-1])) for x in inputs]
            return product(_join(wide), kernel)

        if len(set(leads)) == 1:
            return bias + product(_join(columns), kernel)  # in this order 3% faster on a CPU
        return bias + lax.platform_dependent(kernel, *columns, cpu=shared, default=broadcast)


def _join(inputs: Sequence[jax.Array]) -> jax.Array:
    """Concatenate columns; on a TPU as a sum, which it fuses: it concatenates piece by piece."""

    def padded(*inputs: jax.Array) -> jax.Array:
        size, start, parts = sum(x.shape[-1] for x in inputs), 0, []
        for x in inputs:
            stop = start + x.shape[-1]
            parts.append(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(start, size - stop)]))
            start = stop
        return functools.reduce(jnp.add, parts)

    def concatenated(*inputs: jax.Array) -> jax.Array:
        return jnp.concatenate(inputs, axis=-1)

    return lax.platform_dependent(*inputs, cpu=concatenated, default=padded)


class MLP(nn.Module):
    """Hidden layers ``hidden_dims`` and a linear output; the first layer joins the inputs."""

    hidden_dims: Sequence[int]
    out_dim: int
    activation: str = "silu"
    layer_norm: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, *inputs: Array) -> jax.Array:
        _check_options(self.hidden_dims, self.activation)
        lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        inputs = tuple(x.reshape((1,) * (len(lead) + 1 - x.ndim) + x.shape) for x in inputs)
        # Axes that an input shares come first: to broadcast along them moves whole rows.
        shared = [i for i in range(len(lead)) if any(x.shape[i] < lead[i] for x in inputs)]
        order = [*shared, *(i for i in range(len(lead)) if i not in shared)]
        inputs = tuple(jnp.transpose(x, (*order, len(lead))) for x in inputs)
        x = JointDense(self.hidden_dims[0], self.dtype)(*inputs)
        # One leading axis: a kernel's gradient over two of them copies what it multiplies.
        x = x.reshape(-1, x.shape[-1])
        for i, width in enumerate((*self.hidden_dims[1:], self.out_dim)):
            x = nn.LayerNorm(dtype=self.dtype)(x) if self.layer_norm else x
            x = ACTIVATIONS[self.activation](x)
            x = nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(x)
        x = x.reshape(*(lead[i] for i in order), self.out_dim)
        return jnp.transpose(x, (*np.argsort(order), len(lead)))


class MLPField(nn.Module):
    """Conditional field ``(x: [..., A], t: [...], condition: [..., S]) -> [..., A]``, a plain MLP.

    With ``input_skip`` the output is ``MLP(x, t) + gate(t) * x``.  The fields of a Gaussian are
    linear in x with a factor that depends on t, which narrow hidden layers pass on badly when x has
    many components.
    """

    hidden_dims: Sequence[int]
    activation: str = "silu"
    layer_norm: bool = False
    time_features: int = 12
    input_skip: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Points, t: Times, condition: States | None = None
    ) -> Float[jax.Array, "*batch d"]:
        features = fourier_features(t, self.time_features)
        inputs = [x, features] + ([] if condition is None else [condition])
        shape = self.hidden_dims, x.shape[-1]
        mlp = MLP(*shape, self.activation, self.layer_norm, self.dtype, name="mlp")
        out = mlp(*inputs).astype(x.dtype)
        if self.input_skip:
            gate = nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros_init(), name="gate")
            out += x * gate(features)
        return out


class _ResidualBlock(nn.Module):
    """Two dense layers around an added embedding, with a skip connection."""

    features: int
    activation: Callable[[jax.Array], jax.Array]
    layer_norm: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, self.features, dtype=self.dtype)
        h = nn.LayerNorm(dtype=self.dtype)(x) if self.layer_norm else x
        h = self.activation(dense()(h) + dense()(embedding))
        h = dense()(h)
        skip = x if x.shape[-1] == self.features else dense(use_bias=False)(x)
        return self.activation(h) + skip


class UNetField(nn.Module):
    """Conditional field: residual U-shaped MLP, ``hidden_dims`` down and up again with skips.

    QGPO (Lu et al. 2023, arXiv 2304.12824) uses such networks, of widths 512, 256, 128.
    """

    hidden_dims: Sequence[int] = (512, 256, 128)
    activation: str = "silu"
    layer_norm: bool = False
    time_features: int = 12
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Points, t: Times, condition: States | None = None
    ) -> Float[jax.Array, "*batch d"]:
        _check_options(self.hidden_dims, self.activation)
        activation = ACTIVATIONS[self.activation]
        features = fourier_features(t, self.time_features)
        inputs = [features] + ([] if condition is None else [condition])
        joint = JointDense(self.hidden_dims[-1], self.dtype, name="embedding")
        embedding = activation(joint(*inputs))
        h, skips = jnp.asarray(x), []
        for width in self.hidden_dims:
            h = _ResidualBlock(width, activation, self.layer_norm, self.dtype)(h, embedding)
            skips.append(h)
        for width, skip in zip(self.hidden_dims[-2::-1], skips[-2::-1], strict=True):
            h = nn.Dense(width, dtype=self.dtype)(h) + skip
            h = _ResidualBlock(width, activation, self.layer_norm, self.dtype)(h, embedding)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(h).astype(x.dtype)


class QEnsemble(nn.Module):
    """``num`` independent Q-networks, ``(observation, action: [..., A]) -> [num, ...]``."""

    hidden_dims: Sequence[int]
    num: int = 2
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(
        self, observation: States, action: Float[Array, "*#batch A"]
    ) -> Float[jax.Array, " num *batch"]:
        ensemble = _independent(MLP, self.num)
        q = ensemble(self.hidden_dims, 1, self.activation, self.layer_norm, name="q")
        return q(observation, action)[..., 0]


class Value(nn.Module):
    """State-value network, ``observation: [..., S] -> [...]``."""

    hidden_dims: Sequence[int]
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: Float[Array, "*batch S"]) -> Float[jax.Array, "*batch"]:
        value = MLP(self.hidden_dims, 1, self.activation, self.layer_norm, name="v")
        return value(observation)[..., 0]


class ValueEnsemble(nn.Module):
    """``num`` independent value networks, ``observation: [..., S] -> [num, ...]``."""

    hidden_dims: Sequence[int]
    num: int = 2
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: Float[Array, "*batch S"]) -> Float[jax.Array, " num *batch"]:
        ensemble = _independent(Value, self.num)
        value = ensemble(self.hidden_dims, self.activation, self.layer_norm, name="ensemble")
        return value(observation)


def _independent(module: type[nn.Module], num: int) -> Callable[..., Any]:
    """Make ``num`` copies with parameters of their own, on the same inputs, in one product."""
    axes: Any = None  # flax lets the inputs be the same for all, though its type does not say so
    params = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.vmap(module, **params, in_axes=axes, axis_size=num)


class GaussianActor(nn.Module):
    """Gaussian policy: a mean in [-1, 1], and a deviation that all states share."""

    hidden_dims: Sequence[int]
    action_size: int
    activation: str = "relu"
    layer_norm: bool = False

    # Bounds of log std: without a lower one a density of actions in [-1, 1] can grow without limit.
    log_std_min = -5.0
    log_std_max = 2.0

    @nn.compact
    def __call__(
        self, observation: Float[Array, "*batch S"]
    ) -> tuple[Float[jax.Array, "*batch A"], Float[jax.Array, " A"]]:
        shape = self.hidden_dims, self.action_size
        mean = MLP(*shape, self.activation, self.layer_norm, name="mean")
        log_std = self.param("log_std", nn.initializers.zeros_init(), (self.action_size,))
        std = jnp.exp(jnp.clip(log_std, self.log_std_min, self.log_std_max))
        return jnp.tanh(mean(observation)), std


class LogRatio(nn.Module):
    """Log-ratio ``(x: [..., A], t: [...], condition: [..., S]) -> [...]`` for CEP."""

    hidden_dims: Sequence[int]
    activation: str = "silu"
    layer_norm: bool = False
    time_features: int = 12

    @nn.compact
    def __call__(
        self, x: Points, t: Times, condition: States | None = None
    ) -> Float[jax.Array, "*batch"]:
        inputs = [x, fourier_features(t, self.time_features)]
        inputs += [] if condition is None else [condition]
        mlp = MLP(self.hidden_dims, 1, self.activation, self.layer_norm, name="mlp")
        return mlp(*inputs)[..., 0]


# The names of the configuration field `network`.
FIELDS = {"mlp": MLPField, "unet": UNetField}
