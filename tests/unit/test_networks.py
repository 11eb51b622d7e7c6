import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax import networks
from efm_jax.networks import (
    ACTIVATIONS,
    FIELDS,
    MLP,
    JointDense,
    LogRatio,
    MLPField,
    QEnsemble,
    UNetField,
    Value,
    fourier_features,
)

S, A = 5, 2


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def init(network, *inputs):
    return jax.jit(network.init)(jax.random.key(3), *inputs)


apply = jax.jit(networks.apply, static_argnums=0)


def randomized(params):
    """Parameters with nothing left at zero, so that no term is hidden by its initial value."""
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), jax.device_get(params)
    )


def test_fourier_features_are_octaves_of_a_quarter_turn():
    t = np.linspace(0, 1, 101, dtype=np.float32)
    features = fourier_features(jnp.asarray(t), 12)
    angles = np.pi * t.astype(np.float64)[:, None] / 2 * 2.0 ** np.arange(6)
    expected = np.stack([np.cos(angles), np.sin(angles)], -1).reshape(101, 12)
    assert features.dtype == jnp.float32
    assert_allclose(features, expected, atol=1e-4)
    chex.assert_shape(fourier_features(jnp.ones((3, 4)), 6), (3, 4, 6))


def test_fourier_features_of_odd_size_are_refused():
    with pytest.raises(ValueError, match=r"size: expected an even number; got 5"):
        fourier_features(jnp.ones(3), 5)


def test_joint_dense_equals_dense_on_the_concatenation():
    inputs = normal(0, 7, A), normal(1, 7, 4), normal(2, 7, S)
    layer = JointDense(6)
    params = randomized(init(layer, *inputs))
    kernel, bias = (np.asarray(params["params"][name]) for name in ("kernel", "bias"))
    expected = np.concatenate(inputs, axis=-1) @ kernel + bias
    assert_allclose(apply(layer, params, *inputs), expected, rtol=1e-5, atol=1e-6)


def test_joint_dense_is_initialised_for_the_joint_fan_in():
    params = init(JointDense(400), jnp.zeros((1, 20)), jnp.zeros((1, 80)))["params"]
    assert np.std(params["kernel"]) == pytest.approx(0.1, rel=0.05)
    assert not params["bias"].any()


@pytest.mark.parametrize("field", [MLPField((16, 8)), UNetField((16, 8)), MLPField((8,), "gelu")])
@pytest.mark.parametrize("condition", [(5, 1, S), (5, 3, S), (1, 1, S), (S,)])
def test_what_accelerators_compute_is_what_processors_do(x64, monkeypatch, field, condition):
    """States shared by the actions of a state, time features and joint columns; with gradients."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((5, 3, A)), random.uniform(size=(5, 3))
    states = random.standard_normal(condition)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape),
        field.init(jax.random.key(0), *inputs, states),
    )

    def run():
        value = lambda params: jnp.sum(field.apply(params, *inputs, states) ** 2)  # noqa: E731
        return jax.value_and_grad(value)(params)

    here = run()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    chex.assert_trees_all_close(run(), here, rtol=1e-10, atol=1e-10)
    full = np.broadcast_to(states, (5, 3, S))
    value = jnp.sum(field.apply(params, *inputs, full) ** 2)
    assert_allclose(value, here[0], rtol=1e-10)


X, T, STATES = (
    normal(0, 3, 4, A),
    np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    normal(2, 3, 4, S),
)
each_field = pytest.mark.parametrize("name", FIELDS)


@each_field
@pytest.mark.parametrize(("layer_norm", "states"), [(False, (STATES,)), (True, ())])
def test_fields_depend_on_every_input_of_a_sample_alone(name, layer_norm, states):
    network, inputs = FIELDS[name]((8, 6, 4), "silu", layer_norm, 6), (X, T, *states)
    params = randomized(init(network, *inputs))
    out = apply(network, params, *inputs)
    assert out.shape == X.shape
    single = apply(network, params, *(leaf[2, 3] for leaf in inputs))
    assert_allclose(out[2, 3], single, rtol=2e-4, atol=2e-5)
    for i, step in enumerate((1.0, 0.3, 1.0)[: len(inputs)]):
        other = apply(network, params, *inputs[:i], inputs[i] + step, *inputs[i + 1 :])
        assert np.abs(other - out).max(axis=-1).min() > 1e-5
    # Both ends of time are told apart.
    ends = [apply(network, params, X, np.full_like(T, end), *states) for end in (0.0, 1.0)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-3


@each_field
def test_a_shared_state_equals_the_repeated_state(name):
    network, shared = FIELDS[name]((16, 8)), STATES[:, :1]
    params = randomized(init(network, X, T, shared))
    repeated = np.broadcast_to(shared, (3, 4, S))
    found, expected = (apply(network, params, X, T, s) for s in (shared, repeated))
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Parameters of 64 bits compute in 64 bits.
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), (params, X, T, shared))
    with jax.enable_x64(True):
        assert jax.eval_shape(network.apply, *wide).dtype == jnp.float64


def dense(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_mlp_equals_numpy(layer_norm):
    """Layer norm comes before the activation."""
    x, s = normal(0, 3, A), normal(1, 3, S)
    network = MLP((6, 7), 4, "silu", layer_norm)
    params = randomized(init(network, x, s))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    joint = p["JointDense_0"]

    def normalized(h, i):
        if not layer_norm:
            return h
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        return h * p[f"LayerNorm_{i}"]["scale"] + p[f"LayerNorm_{i}"]["bias"]

    h = x @ joint["kernel"][:A] + s @ joint["kernel"][A:] + joint["bias"]
    h = silu(normalized(dense(p["dense_0"], silu(normalized(h, 0))), 1))
    found = apply(network, params, x, s)
    assert_allclose(found, dense(p["dense_1"], h), rtol=1e-3, atol=1e-4)


def test_activations_are_different_functions():
    x = normal(0, 3, S)
    params = randomized(init(MLP((6,), 2), x))
    outputs = [np.asarray(apply(MLP((6,), 2, name), params, x)) for name in ACTIVATIONS]
    for i, first in enumerate(outputs):
        for second in outputs[i + 1 :]:
            assert np.abs(first - second).max() > 1e-4


def test_ensemble_members_are_separate_networks_of_a_state_and_its_actions():
    s, a = normal(0, 3, 1, S), normal(1, 3, 4, A)
    network = QEnsemble((8, 8), num=3, layer_norm=True)
    params = init(network, s, a)
    q = apply(network, params, s, a)
    chex.assert_shape(q, (3, 3, 4))
    member, repeated = MLP((8, 8), 1, "relu", True), np.broadcast_to(s, (3, 4, S))
    for k in range(3):
        own = {"params": jax.tree.map(lambda leaf, k=k: leaf[k], params["params"]["q"])}
        assert_allclose(q[k], apply(member, own, repeated, a)[..., 0], rtol=1e-5, atol=1e-5)
    assert min(np.abs(q[i] - q[j]).min() for i, j in ((0, 1), (1, 2), (0, 2))) > 1e-5


def test_value_and_log_ratio_are_scalars_per_sample():
    s, x, t = normal(0, 3, 4, S), normal(1, 3, 4, A), np.full((3, 4), 0.5, np.float32)
    value = Value((8,))
    chex.assert_shape(apply(value, init(value, s), s), (3, 4))
    ratio = LogRatio((8,))
    for inputs in ((x, t, s), (x, t)):
        chex.assert_shape(apply(ratio, init(ratio, *inputs), *inputs), (3, 4))


@pytest.mark.parametrize(
    "network", [MLPField((8,), "swish"), UNetField((8,), "swish"), MLP((8,), 1, "swish")]
)
def test_unknown_activation_is_refused(network):
    inputs = (jnp.ones((3, A)), jnp.ones(3))[: 1 if isinstance(network, MLP) else 2]
    with pytest.raises(ValueError, match=r"activation: expected one of relu, .*; got 'swish'"):
        init(network, *inputs)


@pytest.mark.parametrize("network", [MLPField(()), UNetField(())])
def test_no_hidden_layer_is_refused(network):
    with pytest.raises(ValueError, match=r"hidden_dims: expected at least one .*; got none"):
        init(network, jnp.ones((3, A)), jnp.ones(3))


@each_field
def test_bfloat16_is_what_products_compute_in_and_nothing_else_is(name):
    x, t, s = normal(0, 64, A), np.linspace(0, 1, 64, dtype=np.float32), normal(1, 64, S)
    network = FIELDS[name]((32, 16), layer_norm=True, dtype="bfloat16")
    params = randomized(init(network, x, t, s))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    products = [
        operand.aval.dtype
        for equation in jax.make_jaxpr(network.apply)(params, x, t, s).eqns
        for operand in equation.invars
        if equation.primitive.name == "dot_general"
    ]
    assert products
    assert set(products) == {jnp.dtype(jnp.bfloat16)}
    found, expected = (
        apply(FIELDS[name]((32, 16), layer_norm=True, dtype=d), params, x, t, s)
        for d in ("bfloat16", None)
    )
    assert found.dtype == jnp.float32
    # Eight bits, through four layers.
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.05
