"""Flax Linen networks: conditional fields; Q, value, log-ratio and Gaussian policy networks.  No
losses.

All work on any leading axes.  Inputs of different kinds (action, time, state) have first-layer
kernels of their own, whose products are added; a state that is shared by M support actions is given
as ``[B, 1, S]`` against ``[B, M, A]`` and is multiplied once.

Fields have ``dtype``, the type that their layers compute in, by default that of inputs and
parameters promoted; parameters and the output keep their types, and time features are float32 at
least.  Q and value networks have none: actions of a state differ in Q by less than bfloat16
resolves at the level of Q.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from efm_jax import checks
from efm_jax.types import Array


def silu(x: Array) -> Array:
    """``x sigmoid(x)`` by the hyperbolic tangent, which on a CPU takes half the time of an exponential."""
    return 0.5 * x * (1 + jnp.tanh(0.5 * x))


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
}


def fourier_features(t: Array, size: int) -> Array:
    """``[...] -> [..., size]``: cosines and sines of ``pi t / 2``, and of its octaves above.

    The lowest frequency alone separates all of [0, 1].  Octaves follow by the double-angle
    formulas: on a CPU a sine costs as much as a row of a small layer.
    """
    if size % 2:
        raise ValueError(f"size: expected an even number; got {size}")
    cosine, sine = jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t)
    features = []
    for _ in range(size // 2):
        features += [cosine, sine]
        cosine, sine = 2 * cosine**2 - 1, 2 * sine * cosine
    return jnp.stack(features, axis=-1)


def _check_options(hidden_dims: Sequence[int], activation: str) -> None:
    checks.check_choice("activation", activation, ACTIVATIONS)
    if not hidden_dims:
        raise ValueError("hidden_dims: expected at least one hidden layer; got none")


class JointDense(nn.Module):
    """A dense layer on the concatenation of its inputs, without broadcasting their leading axes."""

    features: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        # LeCun initialization for the joint fan-in.
        fan_in = sum(x.shape[-1] for x in inputs)
        init = nn.initializers.normal(fan_in**-0.5)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        kernels = [
            self.param(f"kernel_{i}", init, (x.shape[-1], self.features))
            for i, x in enumerate(inputs)
        ]
        bias, *rest = promote_dtype(bias, *inputs, *kernels, dtype=self.dtype)
        inputs, kernels = rest[: len(inputs)], rest[len(inputs) :]
        total = bias
        # One product for all inputs with the same leading axes: few columns leave a processor
        # waiting.
        for lead in dict.fromkeys(x.shape[:-1] for x in inputs):
            same = [
                (x, kernel)
                for x, kernel in zip(inputs, kernels, strict=True)
                if x.shape[:-1] == lead
            ]
            x = jnp.concatenate([x for x, _ in same], axis=-1)
            kernel = jnp.concatenate([kernel for _, kernel in same])
            total = total + (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*lead, self.features)
        return total


class MLP(nn.Module):
    """Hidden layers ``hidden_dims`` and a linear output; several inputs are joined in the first layer."""

    hidden_dims: Sequence[int]
    out_dim: int
    activation: str = "silu"
    layer_norm: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        _check_options(self.hidden_dims, self.activation)
        x = JointDense(self.hidden_dims[0], self.dtype)(*inputs)
        lead = x.shape[:-1]
        # One leading axis: a kernel's gradient over two of them copies what it multiplies.
        x = x.reshape(-1, x.shape[-1])
        for i, width in enumerate((*self.hidden_dims[1:], self.out_dim)):
            x = nn.LayerNorm(dtype=self.dtype)(x) if self.layer_norm else x
            x = nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(
                ACTIVATIONS[self.activation](x)
            )
        return x.reshape(*lead, self.out_dim)


class MLPField(nn.Module):
    """A conditional field ``(x: [..., A], t: [...], condition: [..., S]) -> [..., A]``: a plain
    MLP.

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
    def __call__(self, x: Array, t: Array, condition: Array | None = None) -> Array:
        features = fourier_features(t, self.time_features)
        inputs = [x, features] + ([] if condition is None else [condition])
        mlp = MLP(
            self.hidden_dims, x.shape[-1], self.activation, self.layer_norm, self.dtype, name="mlp"
        )
        out = mlp(*inputs).astype(x.dtype)
        if self.input_skip:
            out += x * nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros_init(), name="gate")(
                features
            )
        return out


class _ResidualBlock(nn.Module):
    """Two dense layers around an added embedding, with a skip connection."""

    features: int
    activation: Callable[[Array], Array]
    layer_norm: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        dense = functools.partial(nn.Dense, self.features, dtype=self.dtype)
        h = nn.LayerNorm(dtype=self.dtype)(x) if self.layer_norm else x
        h = self.activation(dense()(h) + dense()(embedding))
        h = dense()(h)
        skip = x if x.shape[-1] == self.features else dense(use_bias=False)(x)
        return self.activation(h) + skip


class UNetField(nn.Module):
    """A conditional field: residual U-shaped MLP, ``hidden_dims`` down and up again with skips.

    Of the kind that QGPO uses (Lu et al. 2023, arXiv 2304.12824), with 512, 256, 128 there.
    """

    hidden_dims: Sequence[int] = (512, 256, 128)
    activation: str = "silu"
    layer_norm: bool = False
    time_features: int = 12
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, condition: Array | None = None) -> Array:
        _check_options(self.hidden_dims, self.activation)
        activation = ACTIVATIONS[self.activation]
        inputs = [fourier_features(t, self.time_features)] + (
            [] if condition is None else [condition]
        )
        embedding = activation(
            JointDense(self.hidden_dims[-1], self.dtype, name="embedding")(*inputs)
        )
        h, skips = x, []
        for width in self.hidden_dims:
            h = _ResidualBlock(width, activation, self.layer_norm, self.dtype)(h, embedding)
            skips.append(h)
        for width, skip in zip(self.hidden_dims[-2::-1], skips[-2::-1], strict=True):
            h = nn.Dense(width, dtype=self.dtype)(h) + skip
            h = _ResidualBlock(width, activation, self.layer_norm, self.dtype)(h, embedding)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(h).astype(x.dtype)


class QEnsemble(nn.Module):
    """``(observation: [..., S], action: [..., A]) -> [num, ...]``: ``num`` independent Q-networks."""

    hidden_dims: Sequence[int]
    num: int = 2
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: Array, action: Array) -> Array:
        ensemble = _independent(MLP, self.num)
        q = ensemble(self.hidden_dims, 1, self.activation, self.layer_norm, name="q")(
            observation, action
        )
        return q[..., 0]


class Value(nn.Module):
    """``observation: [..., S] -> [...]``."""

    hidden_dims: Sequence[int]
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        return MLP(self.hidden_dims, 1, self.activation, self.layer_norm, name="v")(observation)[
            ..., 0
        ]


class ValueEnsemble(nn.Module):
    """``observation: [..., S] -> [num, ...]``: ``num`` independent value networks."""

    hidden_dims: Sequence[int]
    num: int = 2
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        ensemble = _independent(Value, self.num)
        return ensemble(self.hidden_dims, self.activation, self.layer_norm, name="ensemble")(
            observation
        )


def _independent(module: type[nn.Module], num: int) -> Callable[..., nn.Module]:
    """``num`` copies with parameters of their own, on the same inputs, in one product of matrices."""
    return nn.vmap(
        module,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=num,
    )


class GaussianActor(nn.Module):
    """``[..., S] -> (mean [..., A], std [A])``: a mean in [-1, 1], and a deviation that all states share."""

    hidden_dims: Sequence[int]
    action_size: int
    activation: str = "relu"
    layer_norm: bool = False

    # Bounds of log std: actions are in [-1, 1], and a density without a lower one can grow without
    # limit.
    log_std_min = -5.0
    log_std_max = 2.0

    @nn.compact
    def __call__(self, observation: Array) -> tuple[Array, Array]:
        mean = MLP(
            self.hidden_dims, self.action_size, self.activation, self.layer_norm, name="mean"
        )
        log_std = self.param("log_std", nn.initializers.zeros_init(), (self.action_size,))
        return jnp.tanh(mean(observation)), jnp.exp(
            jnp.clip(log_std, self.log_std_min, self.log_std_max)
        )


class LogRatio(nn.Module):
    """``(x: [..., A], t: [...], condition: [..., S]) -> [...]``, for contrastive energy prediction."""

    hidden_dims: Sequence[int]
    activation: str = "silu"
    layer_norm: bool = False
    time_features: int = 12

    @nn.compact
    def __call__(self, x: Array, t: Array, condition: Array | None = None) -> Array:
        inputs = [x, fourier_features(t, self.time_features)] + (
            [] if condition is None else [condition]
        )
        return MLP(self.hidden_dims, 1, self.activation, self.layer_norm, name="mlp")(*inputs)[
            ..., 0
        ]


# The names of the configuration field `network`.
FIELDS = {"mlp": MLPField, "unet": UNetField}
