import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax.data.preprocess import n_step
from efm_jax.networks import QEnsemble, Value, ValueEnsemble
from efm_jax.rl import critics
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import IQL, EnsembleLCB, SoftmaxQ, make_critic
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk, make_step
from efm_jax.types import Transitions

S, A, B, M = 3, 2, 8, 5


def batch(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    discounts = np.float32(0.9 * (np.arange(B) % 2))  # 0: terminated
    rows = draw(B, S), draw(B, A), draw(B), draw(B, S)
    return Batch(*rows, discounts, next_actions=draw(B, M, A))


def parameters(critic):
    """Parameters and, different from them, targets."""
    params, target = (
        jax.jit(critic.init, static_argnums=(1, 2))(jax.random.key(k), S, A) for k in (0, 1)
    )
    return params, target


def apply(network, params, *inputs):
    """A network's values in float64."""
    return np.asarray(jax.jit(network.apply)(params, *inputs), np.float64)


Q, V = QEnsemble((8,)), Value((8,))
ENSEMBLE = EnsembleLCB(QEnsemble((8,), 3), ValueEnsemble((8,), 3), 0.7, 0.5)


@pytest.mark.parametrize("beta_q", [0.0, 2.0, 1e4])
def test_softmax_q_loss(beta_q):
    critic, samples = SoftmaxQ(Q, beta_q), batch()
    params, target = parameters(critic)
    observations = np.repeat(samples.next_observations[:, None], M, axis=1)
    next_q = apply(Q, target["q"], observations, samples.next_actions).min(
        0
    )  # the twins' minimum, per action
    weights = np.exp(beta_q * (next_q - next_q.max(1, keepdims=True)))
    next_value = (weights * next_q).sum(1) / weights.sum(1)
    y = samples.rewards + samples.discounts * next_value
    q = apply(Q, params["q"], samples.observations, samples.actions)
    expected = ((q - y) ** 2).sum(0).mean()
    loss, aux = jax.jit(critic.loss)(params, target, None, batch())
    assert loss == pytest.approx(expected, rel=1e-4)
    assert aux["q_mean"] == pytest.approx(q.mean(), rel=1e-4)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_iql_loss(expectile):
    critic, samples = IQL(Q, V, expectile), batch()
    params, target = parameters(critic)
    value = apply(V, params["v"], samples.observations)
    next_value = apply(V, params["v"], samples.next_observations)
    target_q = apply(Q, target["q"], samples.observations, samples.actions).min(0)
    advantage = target_q - value
    assert (advantage > 0).any()
    assert (advantage < 0).any()
    v_loss = (np.where(advantage > 0, expectile, 1 - expectile) * advantage**2).mean()
    y = samples.rewards + samples.discounts * next_value
    q = apply(Q, params["q"], samples.observations, samples.actions)
    loss, aux = jax.jit(critic.loss)(params, target, None, batch())
    assert loss == pytest.approx(v_loss + ((q - y) ** 2).sum(0).mean(), rel=1e-4)
    assert aux["v_mean"] == pytest.approx(value.mean(), rel=1e-4)


@pytest.mark.parametrize("critic", [SoftmaxQ(Q, 1.0), IQL(Q, V, 0.7), ENSEMBLE])
def test_ends_and_device_shares(critic):
    """Without discount what follows does not count; shares sum to the global loss."""
    params, target = parameters(critic)
    loss = jax.jit(critic.loss)
    for discounts in (np.zeros(B, np.float32), np.full(B, 0.9, np.float32)):
        here = batch()._replace(discounts=discounts)
        elsewhere = here._replace(next_observations=np.ones((B, S), np.float32))
        values = [loss(params, target, None, samples)[0] for samples in (here, elsewhere)]
        assert (values[0] == values[1]) == (discounts == 0).all()

    split = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), batch())
    share = jax.vmap(lambda part: critic.loss(params, target, None, part, "i"), axis_name="i")
    losses, aux = jax.jit(share)(split)
    whole, expected = loss(params, target, None, batch())
    assert losses.sum() == pytest.approx(float(whole), rel=1e-5)
    expected = jax.tree.map(lambda value: np.full(4, value), expected)
    chex.assert_trees_all_close(aux, expected, rtol=1e-4, atol=1e-6)


def test_iql_is_semi_gradient_descent():
    """The Q loss moves Q alone, toward a constant; V's loss moves V alone."""
    critic, data = IQL(Q, V, 0.7), batch()
    params, target = parameters(critic)
    gap = apply(Q, target["q"], data.observations, data.actions).min(0) - apply(
        V, params["v"], data.observations
    )
    y = data.rewards + data.discounts * apply(V, params["v"], data.next_observations)
    error = apply(Q, params["q"], data.observations, data.actions) - y

    v_slope, q_slope = -2 * np.where(gap > 0, 0.7, 0.3) * gap / B, 2 * error / B

    def surrogate(p):  # linear in the networks, with the slopes of the squared errors
        value = V.apply(p["v"], data.observations) @ np.float32(v_slope)
        return value + jnp.sum(Q.apply(p["q"], data.observations, data.actions) * q_slope)

    found = jax.jit(jax.grad(lambda p: critic.loss(p, target, None, data)[0]))(params)
    expected = jax.jit(jax.grad(surrogate))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


def test_q_values_are_the_least_of_the_ensemble():
    critic = SoftmaxQ(QEnsemble((8,), num=3), 1.0)
    params, _ = parameters(critic)
    b = batch()
    q = jax.jit(critic.q_values)(params, b.observations[:, None], b.next_actions)
    every = apply(critic.q_network, params["q"], b.observations[:, None], b.next_actions)
    assert q.shape == (B, M)
    assert_allclose(q, every.min(0), rtol=1e-6)
    assert len(set(every.argmin(0).ravel())) == 3


# A chain of 3 states: +1 moves right, -1 left (state 0 stays). Right of state 2 is the end, worth
# 1; every other step costs 0.1.  One more row tells a time limit from an end: it is not terminal,
# so it bootstraps.
DISCOUNT = 0.9
ACTIONS = np.float32([-1, 1])


def chain():
    state, action = np.repeat(np.arange(3), 2), np.tile(ACTIONS, 3)
    following = np.maximum(state + action, 0).astype(int)
    ended, one_hot = np.float32(following == 3), np.eye(3, dtype=np.float32)
    rewards, following = (
        np.where(ended, 1, -0.1).astype(np.float32),
        one_hot[np.minimum(following, 2)],
    )
    return Transitions(one_hot[state], action[:, None], rewards, following, ended)


def as_batch(data, n, discount):
    return Batch(data.observations, data.actions, *n_step(data, n, discount))


def solve(share_of_best):
    """Q `[3, 2]` where a state is worth `share * max Q + (1 - share) * min Q`.

    Always right is best: 1, then 0.9 - 0.1, then 0.9 * 0.8 - 0.1.
    """
    q = np.zeros((3, 2))
    for _ in range(500):
        v = share_of_best * q.max(1) + (1 - share_of_best) * q.min(1)
        left, right = np.array([v[0], v[0], v[1]]), np.array([v[1], v[2]])
        q[:, 0] = -0.1 + DISCOUNT * left
        q[:, 1] = [*(-0.1 + DISCOUNT * right), 1.0]
    return q


@pytest.mark.parametrize(
    ("options", "share_of_best"),
    [
        # The values of the behavior, uniform over both, and of the best policy in support; of two
        # equally likely values, the expectile by hand.
        ({"critic": "softmax_q", "beta_q": 0.0}, 0.5),
        ({"critic": "softmax_q", "beta_q": 1e3}, 1.0),
        ({"critic": "ensemble", "expectile": 0.9, "num_critics": 3, "pessimism": 0.0}, 0.9),
        ({"critic": "iql", "expectile": 0.9}, 0.9),
    ],
)
def test_critic_solves_the_chain(options, share_of_best):
    config = QIPOConfig(
        **options, critic_hidden_dims=(32,), critic_layer_norm=False, discount=DISCOUNT, polyak=0.05
    ).validate()
    critic, data = make_critic(config), as_batch(chain(), 1, DISCOUNT)
    next_actions = np.tile(ACTIONS[:, None], (6, 1, 1)) if critic.uses_next_actions else None
    optimizer = optax.adam(optax.linear_schedule(5e-3, 1e-4, 4000))
    step = make_step(critic.loss, optimizer, average_rate=config.polyak)
    chunk = jax.jit(make_chunk(step, lambda key, tables: tables, 4000))
    state = TrainState.create(critic.init(jax.random.key(0), 3, 1), optimizer)
    state, _ = chunk(state, jax.random.key(0), data._replace(next_actions=next_actions))
    q = critic.q_values(state.average, data.observations, data.actions)
    assert_allclose(np.reshape(q, (3, 2)), solve(share_of_best), atol=0.02)
    assert_allclose(solve(1.0).max(1), [0.62, 0.8, 1.0], atol=1e-12)


def test_next_actions_a_few_at_a_time_give_the_same_loss(monkeypatch):
    critic = make_critic(QIPOConfig(critic="softmax_q", critic_hidden_dims=(8, 6)).validate())
    params, batch = critic.init(jax.random.key(0), 3, 1), as_batch(chain(), 1, DISCOUNT)
    actions = np.random.default_rng(0).standard_normal((batch.size, 12, 1)).astype(np.float32)
    batch = batch._replace(next_actions=actions)

    def loss(params):
        return critic.loss(params, params, jax.random.key(1), batch)[0]

    whole = jax.value_and_grad(loss)(params)
    sizes, q_values = [], critics.SoftmaxQ.q_values

    def spy(self, params, observations, actions):
        sizes.append(actions.shape[1])
        return q_values(self, params, observations, actions)

    monkeypatch.setattr(critics.SoftmaxQ, "q_values", spy)
    monkeypatch.setattr(critics, "_LAYER_NUMBERS", 5 * batch.size * 8 * 2)  # at most 5: a divisor
    chex.assert_trees_all_close(jax.value_and_grad(loss)(params), whole, rtol=1e-5)
    assert set(sizes) == {4}


def test_critics_are_made_from_a_configuration():
    config = QIPOConfig(critic="iql", expectile=0.8, critic_hidden_dims=(4,), num_critics=3)
    critic = make_critic(config)
    assert isinstance(critic, IQL)
    assert (critic.expectile, critic.q_network.num, critic.uses_next_actions) == (0.8, 3, False)
    critic = make_critic(QIPOConfig(beta_q=3.0))
    assert isinstance(critic, SoftmaxQ)
    assert (critic.beta_q, critic.uses_next_actions, critic.values(None, None)) == (3.0, True, None)
    critic = make_critic(QIPOConfig(critic="ensemble", num_critics=5, pessimism=2.0))
    assert (critic.q_network.num, critic.v_network.num, critic.pessimism) == (5, 5, 2.0)


def test_ensemble_loss_keeps_members_apart():
    samples = batch()
    params, target = parameters(ENSEMBLE)
    value = apply(ENSEMBLE.v_network, params["v"], samples.observations)  # [3, B]
    next_value = apply(ENSEMBLE.v_network, params["v"], samples.next_observations)
    gap = apply(ENSEMBLE.q_network, target["q"], samples.observations, samples.actions) - value
    y = samples.rewards + samples.discounts * next_value
    q = apply(ENSEMBLE.q_network, params["q"], samples.observations, samples.actions)
    expected = ((q - y) ** 2 + np.where(gap > 0, 0.7, 0.3) * gap**2).sum(0).mean()
    loss, aux = jax.jit(ENSEMBLE.loss)(params, target, None, batch())
    assert loss == pytest.approx(expected, rel=1e-4)
    assert aux["advantage_std"] == pytest.approx((q - value).std(0).mean(), rel=1e-4)


def test_lower_confidence_bound_of_the_advantage():
    samples = batch()
    next_actions = samples.next_actions
    params, _ = parameters(ENSEMBLE)
    states = samples.observations[:, None]
    found = jax.jit(ENSEMBLE.q_values)(params, states, next_actions)
    q = apply(ENSEMBLE.q_network, params["q"], np.repeat(states, M, 1), next_actions)
    v = apply(ENSEMBLE.v_network, params["v"], samples.observations)
    expected = q.mean(0) - 0.5 * (q - v[:, :, None]).std(0)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert_allclose(ENSEMBLE.values(params, samples.observations), v.mean(0), rtol=1e-4, atol=1e-5)


# ---- n-step samples ----


def trajectory():
    """Rows 0 to 3 end terminal, where row 4 begins; 4 to 6 are truncated; row 7 is alone."""
    observations = np.float32([[0], [1], [2], [3], [10], [11], [12], [20]])
    following = np.float32([[1], [2], [3], [10], [11], [12], [13], [21]])
    terminated = np.float32([0, 0, 0, 1, 0, 0, 0, 0])
    rewards = np.float32([1, 2, 4, 8, 16, 32, 64, 128])
    return Transitions(observations, observations, rewards, following, terminated)


def test_steps_add_up_to_an_end_and_no_further():
    g, data = 0.5, trajectory()
    found = as_batch(data, 3, g)
    # Sums of up to three rewards, never over an end.
    expected = [1 + 1 + 1, 2 + 2 + 2, 4 + 4, 8, 16 + 16 + 16, 32 + 32, 64, 128]
    assert_array_equal(found.rewards, np.float32(expected))
    assert_array_equal(found.next_observations[:, 0], [3, 10, 10, 10, 13, 13, 13, 21])
    assert_array_equal(found.discounts, np.float32([g**3, 0, 0, 0, g**3, g**2, g, g]))
    assert_array_equal(found.observations, data.observations)
    one = as_batch(data, 1, 0.9)  # the transition itself
    assert_array_equal(one.rewards, data.rewards)
    assert_array_equal(one.next_observations, data.next_observations)
    assert_allclose(one.discounts, 0.9 * (1 - data.terminated))
    whole = as_batch(data, 100, 1.0)  # the return
    assert_array_equal(whole.rewards[:4], [15, 14, 12, 8])
    assert_array_equal(whole.discounts, [0, 0, 0, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"^n_step: "):
        n_step(data, 0, 1.0)
