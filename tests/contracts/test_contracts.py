"""Every path, loss and sampler through one suite: what any member of a family must do.

A new path needs one line in `tests.problems`, a new loss or solver one in the tables below.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from numpy.testing import assert_allclose

from efm_jax import exact, losses
from efm_jax.sampling import log_likelihood, sample, sample_dpmpp
from tests.problems import PATHS, normal

B, M, D = 8, 3, 2


def field(params, x, t):
    """A small field that fits a velocity, a score and any leading axes."""
    return jnp.tanh(x @ params["kernel"] + params["time"] * t[..., None]) + params["bias"]


def log_ratio(params, x, t):
    return field(params, x, t).sum(-1)


# name -> (loss, what it takes of a batch)
LOSSES = {
    "cfm": (losses.cfm, ["x0"]),
    "cefm": (losses.cefm, ["x0", "energy"]),
    "dsm": (losses.dsm, ["x0"]),
    "ced": (losses.ced, ["x0", "energy"]),
    "cefm_log_normalizer": (functools.partial(losses.cefm, log_normalizer=0.4), ["x0", "energy"]),
    "cep": (losses.cep, ["x0", "energy"]),
    "support_cefm": (losses.support_cefm, ["actions", "q_values"]),
    "support_ced": (losses.support_ced, ["actions", "q_values"]),
}
UNWEIGHTED = ["cfm", "dsm"]
UNBOUNDED = ["cefm_log_normalizer"]  # weights may overflow, and must then say so
# Paths come in by their coefficients alone: all losses on one, and one of each error on the others.
PAIRS = [(p, n) for p in PATHS for n in LOSSES if p == "vp_linear" or n in ("cefm", "ced")]

# name -> (path, sampler(field, noise)); a solver of a velocity knows no path
SAMPLERS = {
    name: (None, functools.partial(sample, solver=name, num_steps=2))
    for name in ("euler", "midpoint", "heun", "rk4", "dopri5")
}
for name, order in (("vp_linear", 1), *((name, 2) for name in PATHS)):
    multistep = functools.partial(sample_dpmpp, num_steps=3, order=order)
    SAMPLERS[f"dpmpp{order}-{name}"] = PATHS[name][0], multistep


def make_params(dtype, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {
        "kernel": rng.normal(size=(D, D)),
        "time": rng.normal(size=D),
        "bias": 0.1 * rng.normal(size=D),
    }
    return {name: leaf.astype(dtype) for name, leaf in leaves.items()}


def make_batch(dtype, size=B, seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"x0": (size, D), "energy": (size,), "actions": (size, M, D), "q_values": (size, M)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def value(path, name, params, key, batch, beta):
    """A loss of the table on its inputs, with the field that it wants."""
    loss, inputs = LOSSES[name]
    fit = functools.partial(log_ratio if name == "cep" else field, params)
    more = [] if name in UNWEIGHTED else [beta]
    return loss(fit, PATHS[path][0], key, *(batch[i] for i in inputs), *more)


@functools.cache
def gradient_of(path, loss):
    """Jitted ``(params, key, batch, beta) -> ((loss, aux), gradient)``, shared by tests."""
    return jax.jit(jax.value_and_grad(functools.partial(value, path, loss), has_aux=True))


@functools.cache
def two_seeds_of(path, loss):
    """The same for two training seeds at once, each with its own parameters, key and batch."""
    return jax.jit(jax.vmap(gradient_of(path, loss), in_axes=(0, 0, 0, None)))


@functools.cache
def sampler_of(name):
    path, sampler = SAMPLERS[name]
    paths = () if path is None else (path,)
    return jax.jit(lambda params, noise: sampler(functools.partial(field, params), *paths, noise))


# Module scope makes pytest run the tests of one member after each other, mostly on one worker.
@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request):
    """Name of a path and of a loss."""
    return request.param


@pytest.fixture(scope="module", params=SAMPLERS)
def sampler(request):
    return request.param


@pytest.fixture(autouse=True)
def _wide_types(x64):
    """64-bit types are on: float32 stays float32 by the code's care, not by JAX's limits."""


# --- losses ---


def stack(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def check_loss_and_gradient(loss, params, value, aux, gradient, dtype):
    assert value.dtype == dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
    chex.assert_tree_all_finite((value, aux, gradient))
    for name, leaf in gradient.items():
        assert (loss, name) == ("cep", "bias") or np.abs(leaf).max() > 0
    assert loss in UNWEIGHTED or aux["ess"].dtype == dtype


def test_loss_shape_dtype_finite_gradient_and_no_recompilation(pair):
    """New keys, data and guidance scales are data: they must not compile again."""
    params, batch, run = make_params("float64"), make_batch("float64"), gradient_of(*pair)
    (value, aux), gradient = run(params, jax.random.key(0), batch, 2.0)
    assert value.shape == ()
    check_loss_and_gradient(pair[1], params, value, aux, gradient, "float64")
    compiled = run._cache_size()
    others = make_params("float64", 3), jax.random.key(1), make_batch("float64", seed=4), 3.0
    assert run(*others)[0][0] != value
    assert run._cache_size() == compiled


def test_loss_in_float32_under_vmap(pair):
    """Seeds stay apart: changing one and the order of both leaves the other's numbers alone."""
    run, keys = two_seeds_of(*pair), jax.random.split(jax.random.key(0), 3)
    params = [make_params("float32", i) for i in range(3)]
    batches = [make_batch("float32", seed=10 + i) for i in range(3)]

    def both(*seeds):
        inputs = (stack(*(trees[i] for i in seeds)) for trees in (params, batches))
        own, data = inputs
        (value, aux), gradient = run(own, keys[np.array(seeds)], data, 2.0)
        check_loss_and_gradient(pair[1], own, value, aux, gradient, "float32")
        return jax.device_get((value, gradient))

    here, there = both(0, 1), both(2, 0)
    assert here[0].shape == (2,)
    first, second = jax.tree.map(lambda leaf: leaf[0], here), jax.tree.map(lambda a: a[1], there)
    chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-6)
    assert here[0][1] != there[0][0]


def test_loss_survives_extreme_energies(pair):
    """Energies of 1e6 for one seed, infinite ones for the other, in float32."""
    params, batch = make_params("float32"), make_batch("float32")
    huge, infinite = ({name: leaf.copy() for name, leaf in batch.items()} for _ in range(2))
    for name in ("energy", "q_values"):
        huge[name] *= 1e6
        infinite[name].flat[:2] = np.inf, -np.inf
    keys = jax.random.split(jax.random.key(0))
    result = two_seeds_of(*pair)(stack(params, params), keys, stack(huge, infinite), 10.0)
    if pair[1] in UNBOUNDED:
        assert not np.isfinite(result[0][0]).any()
    else:
        chex.assert_tree_all_finite(result)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_promotes_no_type_by_accident(loss, dtype):
    params, batch = jax.tree.map(jnp.asarray, (make_params(dtype), make_batch(dtype)))
    with jax.numpy_dtype_promotion("strict"):
        found, _ = value("ot", loss, params, jax.random.key(0), batch, 2.0)
    assert found.dtype == dtype


# --- samplers ---


def test_sampler_in_float32_and_no_recompilation(sampler):
    params, noise, run = make_params("float32"), make_batch("float32")["x0"], sampler_of(sampler)
    samples = run(params, noise)
    assert (samples.shape, samples.dtype) == (noise.shape, jnp.float32)
    chex.assert_tree_all_finite(samples)
    assert np.abs(samples - noise).max() > 1e-3
    compiled = run._cache_size()
    run(make_params("float32", 9), -noise)
    assert run._cache_size() == compiled


def test_sampler_in_float64_with_its_gradient(sampler):
    run, noise = sampler_of(sampler), make_batch("float64")["x0"]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_samples(params):
        samples = run(params, noise)
        return (samples**2).sum(), samples

    gradient, samples = gradient_and_samples(make_params("float64"))
    assert samples.dtype == jnp.float64
    narrow = run(make_params("float32"), noise.astype("float32"))
    assert_allclose(samples, narrow, rtol=1e-2, atol=1e-2)
    chex.assert_tree_all_finite(gradient)
    assert all(np.abs(leaf).max() > 0 for leaf in gradient.values())


def test_sampler_under_pmap_of_vmap(devices, sampler):
    run, params = sampler_of(sampler), make_params("float32")
    batches = make_batch("float32", 8 * B)["x0"].reshape(4, 2, B, D)
    alone = np.stack([[run(params, batch) for batch in pair] for pair in batches])
    over_samples = jax.vmap(run, in_axes=(None, 0))
    mapped = jax.pmap(over_samples, in_axes=(None, 0), devices=devices)(params, batches)
    tolerance = 1e-2 if sampler == "dopri5" else 1e-4
    assert_allclose(mapped, alone, rtol=tolerance, atol=tolerance)


POINTS = normal(5, 5, D).astype(np.float32)
OT = PATHS["ot"][0]


def policy_call(name):
    """Noise that all devices share, and a field that closes over what they do not."""
    return lambda x, t, other: sampler_of.__wrapped__(name)(
        make_params("float32") | {"bias": other[0]}, jnp.ones((2, D), jnp.float32)
    )


# name -> function(x, t, other) of three arrays that a mesh splits along their first axis
SHARDED = {
    # diffrax's loop needs check_vma=False
    **{name: policy_call(name) for name in ("euler", "rk4", "dpmpp1-vp_linear", "dpmpp2-ot")},
    "log_likelihood": lambda x, t, other: log_likelihood(lambda y, t: y * other, x, num_steps=2),
    "hutchinson": lambda x, t, other: log_likelihood(
        lambda y, t: y * other, x, key=jax.random.key(0), num_steps=2
    ),
    "posterior": lambda x, t, other: exact.posterior(OT, x, t, POINTS),
    "velocity": lambda x, t, other: exact.velocity(OT, x, t, POINTS),
    "energy": lambda x, t, other: exact.intermediate_energy(OT, x, t, POINTS, POINTS[:, 0], 2.0),
    "own_weights": lambda x, t, other: exact.velocity(OT, x, t, POINTS, other[0, 0] * POINTS[:, 0]),
    "own_data": lambda x, t, other: exact.velocity(OT, POINTS[: len(x)], t, other),
}


@pytest.mark.parametrize("name", SHARDED)
def test_shard_map_with_its_checks(devices, name):
    """In its default mode shard_map types every value by the axes it varies over."""
    run, spec = SHARDED[name], PartitionSpec("devices")
    x, t = make_batch("float32")["x0"], np.linspace(0.2, 0.9, B, dtype="float32")
    mesh = Mesh(np.array(devices), ("devices",))
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(x, t, x[::-1])
    shares = [slice(i, i + B // 4) for i in range(0, B, B // 4)]
    alone = jax.jit(run)
    expected = np.concatenate([alone(x[i], t[i], x[::-1][i]) for i in shares])
    assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
