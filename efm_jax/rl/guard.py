"""The guard: a policy stands only if it does better in learned models of the environment.

A critic values an action by what the data's agents did next; a policy that acts otherwise lives in
other states, and weights prefer what the critic overestimates.  Models of the dynamics know nothing
of the critic: an ensemble is fitted to the data's transitions, both policies play from the data's
first states in every member, and the new one stays if the mean gain is above so many standard
errors over members.  Rollouts in learned models are among the better ways to evaluate policies
offline (Fu et al. 2021, arXiv 2103.16596; Zhang et al. 2021, arXiv 2104.13877).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from efm_jax.data.preprocess import first_rows
from efm_jax.networks import MLP, apply
from efm_jax.rl.agents.agent import Agent, AgentParams
from efm_jax.rl.config import QIPOConfig
from efm_jax.types import Normalizer, Params, Transitions

MEMBERS = 7
EPISODES = 64  # from as many of the data's first states, in every member
_RATE, _CHUNK = 1e-3, 250


class Models(NamedTuple):
    """Members that predict the change of state, the reward, and whether the episode terminates."""

    params: Params  # [MEMBERS, ...]
    mean: Array  # [S + 1], of what they predict
    std: Array  # [S + 1]
    low: Array  # [S], the range of the data's states: what is predicted stays in it
    high: Array  # [S]
    starts: Array  # [EPISODES, S], first states of episodes


def fit(
    config: QIPOConfig, data: Transitions, report: Callable[[int, int], None] | None = None
) -> Models:
    """Fit the models to a dataset, whatever the seeds of the run.

    Args:
      config: has ``guard_steps``, of each member, and its ``hidden_dims`` and ``batch_size``.
      data: normalized transitions.
      report: told of ``(done, steps)``; may raise to stop.
    """
    states, actions = jnp.asarray(data.observations), jnp.asarray(data.actions)
    changes = jnp.column_stack([data.next_observations - data.observations, data.rewards])
    mean, std = changes.mean(0), changes.std(0) + 1e-6
    rows = states, actions, (changes - mean) / std, jnp.asarray(data.terminated, states.dtype)
    steps = config.guard_steps
    keys = jax.random.split(jax.random.key(0), (MEMBERS, steps + 1))
    network, optimizer = _network(config, states.shape[1]), _optimizer(steps)
    carry = _init(network, optimizer, keys[:, 0], states[:1], actions[:1])
    for done in range(0, steps, _CHUNK):
        some = keys[:, 1 + done :][:, :_CHUNK]
        carry = _train(config.batch_size, network, optimizer, carry, some, rows)
        if report is not None:
            jax.block_until_ready(carry)
            report(min(done + _CHUNK, steps), steps)
    begins = first_rows(data)
    starts = states[begins[np.linspace(0, begins.size - 1, EPISODES).astype(int)]]
    return Models(carry[0], mean, std, states.min(0), states.max(0), starts)


def _init(
    network: MLP, optimizer: optax.GradientTransformation, keys: Array, *inputs: Array
) -> tuple[Params, optax.OptState]:
    """Parameters and moments of all members before their first step."""
    params = jax.vmap(lambda key: network.init(key, *inputs))(keys)
    return params, jax.vmap(optimizer.init)(params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _train(
    size: int,
    network: MLP,
    optimizer: optax.GradientTransformation,
    carry: tuple,
    keys: Array,
    rows: tuple[Array, ...],
) -> tuple:
    """Parameters and moments of all members after a step for each of their ``keys``."""

    def loss(params: Params, batch: tuple[Array, ...]) -> Array:
        states, actions, targets, ended = batch
        predicted = apply(network, params, states, actions)
        ends = optax.sigmoid_binary_cross_entropy(predicted[:, -1], ended).mean()
        return optax.huber_loss(predicted[:, :-1], targets).mean() + 0.1 * ends

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        params, state = carry
        index = jax.random.randint(key, (size,), 0, len(rows[0]))
        batch = tuple(row[index] for row in rows)
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.vmap(lambda carry, keys: lax.scan(step, carry, keys)[0])(carry, keys)


@functools.partial(jax.jit, static_argnums=0)
def returns(agent: Agent, models: Models, params: AgentParams, key: Array) -> Array:
    """Mean undiscounted return of the policy in every member, ``[MEMBERS]``.

    Args:
      agent: acts as in an evaluation; its configuration is that of the models, and has
        ``guard_length``, the steps of an episode.
      models: from :func:`fit`.
      params: of one seed.
      key: of the actions' noise; the same for policies that are compared.
    """
    episodes, size = models.starts.shape
    members = jax.tree.leaves(models.params)[0].shape[0]
    network, zeros = _network(agent.config, size), jnp.zeros(size)
    ones = jnp.ones(agent.action_size)
    plain = Normalizer(zeros, zeros + 1, -ones, ones)  # models live in normalized units

    def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        states, alive = carry  # [members, episodes, S], [members, episodes]
        keys = jax.random.split(key, members * episodes)
        actions = agent.act(params, plain, keys, states.reshape(-1, size))
        actions = actions.reshape(members, episodes, -1)
        predicted = jax.vmap(functools.partial(apply, network))(models.params, states, actions)
        changes = predicted[..., :-1] * models.std + models.mean
        states = jnp.clip(states + changes[..., :-1], models.low, models.high)
        rewards = alive * changes[..., -1]
        return (states, alive * (predicted[..., -1] < 0)), rewards

    starts = jnp.broadcast_to(models.starts, (members, episodes, size))
    carry = starts, jnp.ones((members, episodes))
    return lax.scan(step, carry, jax.random.split(key, agent.config.guard_length))[1].sum(0).mean(1)


def judge(
    agent: Agent, models: Models, new: AgentParams, old: AgentParams, key: Array
) -> dict[str, Array]:
    """Compare two policies of one seed.

    Returns:
      ``guard_gain`` and ``guard_error``, the mean gain over members and one standard error of it,
      and ``accepted``: whether the gain is above ``config.guard`` errors; ``[]`` each.
    """
    gains = returns(agent, models, new, key) - returns(agent, models, old, key)
    gain, error = gains.mean(), gains.std(ddof=1) / math.sqrt(gains.size)
    accepted = (gain > agent.config.guard * error).astype(gain.dtype)
    return {"guard_gain": gain, "guard_error": error, "accepted": accepted}


def programs(agent: Agent, num_rows: int) -> dict[str, tuple[int, Any, tuple]]:
    """What :func:`fit` and :func:`returns` compile, on one device.

    Returns:
      By name the number of steps, the jitted function, and its inputs as shapes.
    """
    config, size = agent.config, agent.observation_size
    network, optimizer = _network(config, size), _optimizer(config.guard_steps)
    number = jax.ShapeDtypeStruct((), jnp.float32)

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return number.update(shape=shape)

    def inputs(seed: int) -> tuple:
        key = jax.random.key(seed)
        return key, jax.random.split(key, (MEMBERS, _CHUNK)), agent.init(key).params()

    key, keys, params = jax.eval_shape(inputs, 0)
    init = functools.partial(_init, network, optimizer)
    carry = jax.eval_shape(
        init, keys.update(shape=(MEMBERS,)), of(1, size), of(1, agent.action_size)
    )
    columns = (size,), (agent.action_size,), (size + 1,), ()
    rows = tuple(of(num_rows, *column) for column in columns)
    statistics = of(size + 1), of(size + 1), of(size), of(size)
    models = Models._make((carry[0], *statistics, of(EPISODES, size)))
    steps = {min(config.guard_steps, _CHUNK), config.guard_steps % _CHUNK} - {0}
    fits = {
        f"guard, {n} steps": (
            n,
            _train,
            (config.batch_size, network, optimizer, carry, keys.update(shape=(MEMBERS, n)), rows),
        )
        for n in sorted(steps)
    }
    return fits | {"guard, a policy": (0, returns, (agent, models, params, key))}


def _network(config: QIPOConfig, observation_size: int) -> MLP:
    return MLP(tuple(config.hidden_dims), observation_size + 2)


@functools.lru_cache  # a program is compiled anew for another optimizer
def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(_RATE, steps))
