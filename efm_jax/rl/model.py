"""The generative model of actions: a conditional field, its loss and its sampler.

A network may predict velocity, noise, score or data on any path.  By default it predicts the
velocity on the OT and cosine paths and is trained by flow matching (QIPO-OT), and on the linear VP
path the noise, by denoising score matching (QIPO-Diff).
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from efm_jax import checks, sampling
from efm_jax.losses import LOSSES, Aux, LossEntry
from efm_jax.networks import FIELDS, apply
from efm_jax.paths import PATHS, PREDICTIONS, GaussianPath
from efm_jax.rl.config import QIPOConfig
from efm_jax.types import Field, Params
from efm_jax.weights import AxisName

SOLVERS = ("auto", *sampling.SAMPLE_SOLVERS, "dpmpp")

# Where sampling begins on a path with mu_1 = 0, if the data must be found from a score or noise: an
# error of the network is divided by mu, which is 0.05 here on the OT path.
_T_START = 0.95
# Where sampling ends if a prediction cannot be converted to a velocity at t = 0.
_T_END = 1e-3


@dataclasses.dataclass(frozen=True)
class GenerativeModel:
    """Behavior model and improved policies are parameter sets of one model."""

    network: nn.Module
    path: GaussianPath
    prediction: str  # of the network
    loss_entry: LossEntry
    solver: str
    sample_steps: int

    @classmethod
    def from_config(cls, config: QIPOConfig, *, acting: bool = False) -> "GenerativeModel":
        """The model that a configuration describes, with the sampler of training or of acting.

        Raises:
          ValueError: a name that is in no registry, with the field and the names that are.
        """
        for name, choices in (
            ("path", PATHS),
            ("prediction", ("auto", *PREDICTIONS)),
            ("loss", ("auto", *LOSSES)),
            ("network", FIELDS),
            ("solver", SOLVERS),
            ("eval_solver", ("same", *SOLVERS)),
        ):
            checks.check_choice(name, getattr(config, name), choices)
        network = FIELDS[config.network](
            config.hidden_dims,
            config.activation,
            config.layer_norm,
            config.time_features,
            # Not by name where it is the default: 64-bit inputs stay 64-bit.
            dtype=None if config.dtype == "float32" else config.dtype,
        )
        entry = PATHS[config.path]
        prediction = entry.prediction if config.prediction == "auto" else config.prediction
        if config.loss == "auto":
            loss = next(loss for loss in LOSSES.values() if loss.prediction == prediction)
        else:
            loss = LOSSES[config.loss]
        solver, steps = config.solver, config.sample_steps
        if acting:
            solver = solver if config.eval_solver == "same" else config.eval_solver
            steps = config.eval_sample_steps or steps
        if solver == "auto":
            solver = "midpoint" if prediction == "velocity" else "dpmpp"
        return cls(network, entry.make(), prediction, loss, solver, steps)

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        """Fresh parameters."""
        inputs = jnp.zeros((1, action_size)), jnp.zeros(1), jnp.zeros((1, observation_size))
        return self.network.init(key, *inputs)

    def field(self, params: Params, observations: Array, prediction: str | None = None) -> Field:
        """The network at states ``[..., S]``, its output converted to one of ``PREDICTIONS``."""

        def field(x: Array, t: Array) -> Array:
            value = apply(self.network, params, x, t, observations)
            return self.path.convert(value, x, t, self.prediction, prediction or self.prediction)

        return field

    def loss(
        self,
        params: Params,
        key: Array,
        observations: Array,
        actions: Array,
        *,
        weights: Array | None = None,
        axis_name: AxisName = None,
    ) -> tuple[Array, Aux]:
        """The matching loss, ``mean(weights * errors)``.

        Args:
          params: of the network.
          key: as in :func:`efm_jax.losses.matching`.
          observations: ``[B, S]``, or ``[B, 1, S]`` with several actions a state.
          actions: ``[B, A]``, or ``[B, M, A]``.
          weights: importance weights of mean one, ``[B]`` or ``[B, M]``.
          axis_name: mapped axis over which the global batch is split.
        """
        loss, prediction = self.loss_entry
        field = self.field(params, observations, prediction)
        return loss(field, self.path, key, actions, weights=weights, axis_name=axis_name)

    def sample(self, params: Params, observations: Array, noise: Array) -> Array:
        """Actions in [-1, 1] from standard normal ``noise [..., A]``; states broadcast to it."""
        return self.integrate(self.field(params, observations), noise, self.prediction)

    def start_time(self, prediction: str) -> float:
        """The time of the first evaluation of a field of one of ``PREDICTIONS``."""
        singular = prediction in ("noise", "score") and sampling.latest_time(self.path) < 1
        return _T_START if singular else 1.0

    def integrate(self, field: Field, noise: Array, prediction: str) -> Array:
        """Actions in [-1, 1] from ``noise [..., A]`` and a field of one of ``PREDICTIONS``."""
        start = self.start_time(prediction)
        if start < 1:
            noise = noise * self.path.std(jnp.asarray(start, noise.dtype))
        if self.solver == "dpmpp":
            actions = sampling.sample_dpmpp(
                field,
                self.path,
                noise,
                num_steps=self.sample_steps,
                prediction=prediction,
                t_start=start if start < 1 else None,
                event_ndim=1,
            )
            return jnp.clip(actions, -1, 1)

        def velocity(x: Array, t: Array) -> Array:
            return self.path.convert(field(x, t), x, t, prediction, "velocity")

        actions = sampling.sample(
            velocity,
            noise,
            solver=self.solver,
            num_steps=self.sample_steps,
            t_start=start,
            t_end=0.0 if prediction == "velocity" else _T_END,
            event_ndim=1,
        )
        return jnp.clip(actions, -1, 1)
