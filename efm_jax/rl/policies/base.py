"""What every policy is: something that may be trained after behavior model and critic, and that acts."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from efm_jax.losses import Aux
from efm_jax.rl.critics import Critic
from efm_jax.rl.model import GenerativeModel
from efm_jax.rl.samples import Samples
from efm_jax.rl.support import draw_noise
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:  # the configuration imports the registry of policies
    from efm_jax.rl.config import QIPOConfig


class Acting(NamedTuple):
    """All parameters that a policy may act with: the averages of the three stages."""

    behavior: Params
    critic: Params
    policy: Params


class Batch(NamedTuple):
    """What a policy's loss sees."""

    samples: Samples  # of b states
    rows: Any  # those states' rows of the policy's table


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """A way from a behavior model and a critic to actions.

    A policy that trains (``trains``) may keep a table with a row for every sample, computed before
    its first step and, if it ``renews``, again every ``renew_every`` steps from what it is by then.
    """

    config: QIPOConfig
    model: GenerativeModel
    critic: Critic
    observation_size: int
    action_size: int

    trains = True
    renews = False
    # Whether loss and metrics of a batch are the means of those of its parts, and the loss takes a
    # key for each sample: then a step may compute a large batch in parts
    # (:func:`efm_jax.training.step.make_step`).
    separable = False

    @classmethod
    def name(cls, config: QIPOConfig) -> str:
        """What results call this configuration."""
        return f"{config.policy}_{config.path_name}"

    @property
    def actions_per_state(self) -> int:
        """Actions for which a step evaluates the network in each state of its batch."""
        return 1

    def init(self, key: Array) -> Params:
        """Parameters of the right shapes, from which :meth:`start` may begin."""
        return self.model.init(key, self.observation_size, self.action_size)

    def start(self, behavior: Params, params: Params) -> Params:
        """The parameters before the first step: by default those of the behavior model."""
        return behavior

    def rows(
        self, acting: Acting, key: Array, renewal: Array, samples: Samples, indices: Array
    ) -> Any:
        """Rows of the table, or None for a policy without one.

        Args:
          acting: ``policy`` holds the parameters at the last renewal.
          key: of this purpose and seed.
          renewal: number of the renewal, 0 for the first.
          samples: those of the rows, ``[b, ...]``.
          indices: their places in the dataset, ``[b]``.
        """
        return None

    def prepare(self, rows: Any, axis_name: AxisName) -> tuple[Any, dict[str, Array]]:
        """The finished table of this device, from all its rows, and what is logged of it."""
        return rows, {}

    def gather(self, key: Array, table: Any, indices: Array, axis_name: AxisName) -> Any:
        """The rows of a batch."""
        return jax.tree.map(lambda leaf: leaf[indices], table)

    @abc.abstractmethod
    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        """This device's share of the loss over the global batch."""

    @abc.abstractmethod
    def sample(self, acting: Acting, observations: Array, noise: Array) -> Array:
        """Actions in [-1, 1] from standard normal ``noise [..., A]``, states ``[..., S]`` broadcast to it."""

    def mean(self, acting: Acting, observations: Array, noise: Array) -> Array:
        """The mean action ``[E, A]`` for ``observations [E, 1, S]``, from ``noise [E, n, A]``."""
        return self.sample(acting, observations, noise).mean(-2)

    def advantages(self, acting: Acting, key: Array, samples: Samples, indices: Array) -> Array:
        """``Q(s, a) - V(s)`` of data actions, ``[b]``.

        Where the critic has no value network, V is the mean of Q over ``support_size`` actions of
        the behavior model.
        """
        observations = samples.observations
        q = self.critic.q_values(acting.critic, observations, samples.actions)
        values = self.critic.values(acting.critic, observations)
        if values is not None:
            return q - values
        noise = draw_noise(key, indices, (self.config.support_size, self.action_size))
        actions = self.model.sample(acting.behavior, observations[:, None], noise)
        return q - self.critic.q_values(acting.critic, observations[:, None], actions).mean(-1)
