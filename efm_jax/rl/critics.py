"""Offline critics, all of them; a new one is a class and an entry of ``CRITICS``."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from efm_jax import checks
from efm_jax.losses import Aux
from efm_jax.networks import QEnsemble, Value, ValueEnsemble, apply
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.types import Params
from efm_jax.weights import AxisName

# 32 MiB of float32, of the 100 that a TPU's fast memory has.
_LAYER_NUMBERS = 1 << 23


class Critic(abc.ABC):
    """A critic: a frozen dataclass of networks and numbers, trained as a policy is."""

    uses_next_actions = False  # whether the loss needs behavior actions at the next states

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: QIPOConfig) -> "Critic":
        """The critic that a validated configuration describes."""

    @abc.abstractmethod
    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        """Fresh parameters."""

    @abc.abstractmethod
    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        """The values that policies maximize.

        States ``[..., S]`` broadcast against actions ``[..., A]``; the result has their leading
        axes.
        """

    def values(self, params: Params, observations: Array) -> Array | None:
        """``V(s)`` of a value network, ``[..., S] -> [...]``; None where there is none."""
        return None

    @abc.abstractmethod
    def loss(
        self, params: Params, target: Params, key: Array, batch: Batch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        """This device's share of the mean loss over the global batch; ``aux`` has means over it.

        ``target`` holds the target networks, a Polyak average of ``params``.  ``key`` may hold a
        key for each sample (:func:`efm_jax.losses.sample_keys`), because a large batch may be
        computed in parts.
        """


@dataclasses.dataclass(frozen=True)
class SoftmaxQ(Critic):
    """In-support softmax Q-learning (Lu et al. 2023, arXiv 2304.12824, eq. 18).

    ``y = r + discount (1 - terminated) sum_j softmax_j(beta_q Q'(s', a'_j)) Q'(s', a'_j)`` with
    actions ``a'_j`` of the behavior model at s' and Q' the minimum of the target networks.
    """

    q_network: QEnsemble
    beta_q: float

    uses_next_actions = True

    @classmethod
    def from_config(cls, config: QIPOConfig) -> "SoftmaxQ":
        return cls(_q_network(config), config.beta_q)

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        return {"q": _init_q(self.q_network, key, observation_size, action_size)}

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        """``min_k Q_k(s, a)``."""
        return apply(self.q_network, params["q"], observations, actions).min(0)

    def loss(
        self, params: Params, target: Params, key: Array, batch: Batch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        if batch.next_actions is None:
            raise ValueError("batch.next_actions: expected behavior actions [B, M, A]; got None")
        next_q = self._next_q(target, batch.next_observations, batch.next_actions)
        next_value = jnp.sum(jax.nn.softmax(self.beta_q * next_q, axis=-1) * next_q, axis=-1)
        errors, q = _temporal_differences(self.q_network, params, batch, next_value)
        return share_of_mean(errors.sum(0), axis_name), {"q_mean": global_mean(q, axis_name)}

    def _next_q(self, target: Params, observations: Array, actions: Array) -> Array:
        """Q-values ``[B, M]``, for some of the M actions at a time: layers of all would be huge."""
        size, count, _ = actions.shape
        numbers = size * max(self.q_network.hidden_dims) * self.q_network.num
        most = max(_LAYER_NUMBERS // numbers, 1)
        block = max(n for n in range(1, count + 1) if count % n == 0 and n <= most)
        if block == count:
            return self.q_values(target, observations[:, None], actions)
        blocks = jnp.moveaxis(actions.reshape(size, count // block, block, -1), 1, 0)
        values = lax.map(lambda a: self.q_values(target, observations[:, None], a), blocks)
        return jnp.moveaxis(values, 0, 1).reshape(size, count)


@dataclasses.dataclass(frozen=True)
class IQL(Critic):
    """Implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169, eqs. 5 and 6).

    V is the expectile of Q' over the data's actions; Q regresses on
    ``r + discount (1 - terminated) V(s')``.
    """

    q_network: QEnsemble
    v_network: Value
    expectile: float

    @classmethod
    def from_config(cls, config: QIPOConfig) -> "IQL":
        dims, layer_norm = config.critic_hidden_dims, config.critic_layer_norm
        return cls(_q_network(config), Value(dims, layer_norm=layer_norm), config.expectile)

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        return _init_q_and_v(self, key, observation_size, action_size)

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        """``min_k Q_k(s, a)``."""
        return apply(self.q_network, params["q"], observations, actions).min(0)

    def values(self, params: Params, observations: Array) -> Array:
        return apply(self.v_network, params["v"], observations)

    def loss(
        self, params: Params, target: Params, key: Array, batch: Batch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        value = self.values(params, batch.observations)
        advantage = self.q_values(target, batch.observations, batch.actions) - value
        next_value = self.values(params, batch.next_observations)
        errors, q = _temporal_differences(self.q_network, params, batch, next_value)
        errors = errors.sum(0)
        aux = {"q_mean": global_mean(q, axis_name), "v_mean": global_mean(value, axis_name)}
        return share_of_mean(errors + _expectile_loss(advantage, self.expectile), axis_name), aux


@dataclasses.dataclass(frozen=True)
class EnsembleLCB(Critic):
    """Members that share nothing, each with an in-sample target of its own; their lower bound.

    Member k is implicit Q-learning with a Q-network, a target network and a value network of its
    own.  Where targets are shared, members agree about actions that none of them has seen;
    independent ones do not, and their spread measures it (Ghasemipour et al. 2022, "Why so
    pessimistic?", arXiv 2205.13703, Sec. 4).  Policies maximize the bound of the advantage,
    ``mean_k A_k - pessimism std_k A_k`` with ``A_k = Q_k(s, a) - V_k(s)``, plus ``mean_k V_k(s)``:
    the spread of Q itself would also count the members' disagreement about the state, whatever the
    action.
    """

    q_network: QEnsemble
    v_network: ValueEnsemble
    expectile: float
    pessimism: float

    @classmethod
    def from_config(cls, config: QIPOConfig) -> "EnsembleLCB":
        dims, layer_norm = config.critic_hidden_dims, config.critic_layer_norm
        v_network = ValueEnsemble(dims, config.num_critics, layer_norm=layer_norm)
        return cls(_q_network(config), v_network, config.expectile, config.pessimism)

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        return _init_q_and_v(self, key, observation_size, action_size)

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        """The lower confidence bound of ``Q(s, a)``."""
        values = apply(self.v_network, params["v"], observations)
        advantages = apply(self.q_network, params["q"], observations, actions) - values
        return values.mean(0) + advantages.mean(0) - self.pessimism * advantages.std(0)

    def values(self, params: Params, observations: Array) -> Array:
        return apply(self.v_network, params["v"], observations).mean(0)

    def loss(
        self, params: Params, target: Params, key: Array, batch: Batch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        value = apply(self.v_network, params["v"], batch.observations)
        target_q = apply(self.q_network, target["q"], batch.observations, batch.actions)
        next_value = apply(self.v_network, params["v"], batch.next_observations)
        errors, q = _temporal_differences(self.q_network, params, batch, next_value)
        errors += _expectile_loss(target_q - value, self.expectile)
        aux = {
            "q_mean": global_mean(q, axis_name),
            "v_mean": global_mean(value, axis_name),
            "advantage_std": global_mean((q - value).std(0), axis_name),
        }
        return share_of_mean(errors.sum(0), axis_name), aux


# The names of the configuration field `critic`.
CRITICS: dict[str, type[Critic]] = {"softmax_q": SoftmaxQ, "iql": IQL, "ensemble": EnsembleLCB}


def make_critic(config: QIPOConfig) -> Critic:
    """The critic of a configuration; a ``ValueError`` for a name that is not in ``CRITICS``."""
    checks.check_choice("critic", config.critic, CRITICS)
    return CRITICS[config.critic].from_config(config)


def share_of_mean(values: Array, axis_name: AxisName) -> Array:
    """This device's share of the mean over the global batch."""
    return values.mean() / (1 if axis_name is None else lax.axis_size(axis_name))


def global_mean(values: Array, axis_name: AxisName) -> Array:
    """The mean over the global batch."""
    return values.mean() if axis_name is None else lax.pmean(values.mean(), axis_name)


def _q_network(config: QIPOConfig) -> QEnsemble:
    return QEnsemble(
        config.critic_hidden_dims, config.num_critics, layer_norm=config.critic_layer_norm
    )


def _init_q(network: QEnsemble, key: Array, observation_size: int, action_size: int) -> Params:
    return network.init(key, jnp.zeros((1, observation_size)), jnp.zeros((1, action_size)))


def _init_q_and_v(
    critic: IQL | EnsembleLCB, key: Array, observation_size: int, action_size: int
) -> Params:
    q_key, v_key = jax.random.split(key)
    return {
        "q": _init_q(critic.q_network, q_key, observation_size, action_size),
        "v": critic.v_network.init(v_key, jnp.zeros((1, observation_size))),
    }


def _temporal_differences(
    network: QEnsemble, params: Params, batch: Batch, next_value: Array
) -> tuple[Array, Array]:
    """Squared errors ``[num, B]`` of an ensemble and its Q-values ``[num, B]``.

    ``next_value`` is ``[B]``, or ``[num, B]`` where every member has a target of its own.
    """
    target = batch.rewards + batch.discounts * next_value
    q = apply(network, params["q"], batch.observations, batch.actions)
    return (q - lax.stop_gradient(target)) ** 2, q


def _expectile_loss(difference: Array, expectile: float) -> Array:
    """``|expectile - 1(difference < 0)| difference^2`` (Kostrikov et al. 2021, eq. 4)."""
    return jnp.where(difference > 0, expectile, 1 - expectile) * difference**2
