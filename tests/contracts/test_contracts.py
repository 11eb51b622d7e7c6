"""Every path, loss and solver through one suite: what any member of a family must do.

A new path, loss or solver needs one line in the tables below.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from numpy.testing import assert_allclose

from efm_jax import exact, losses, paths
from efm_jax.sampling import log_likelihood, sample, sample_dpmpp

B, M, D = 8, 3, 2

PATHS = {
    "ot": paths.conditional_ot(),
    "vp_linear": paths.vp_linear(),
    "vp_cosine": paths.vp_cosine(),
}


def field(params, x, t):
    """A small field that fits a velocity, a score and any leading axes."""
    return jnp.tanh(x @ params["kernel"] + params["time"] * t[..., None]) + params["bias"]


def bound(params):
    return functools.partial(field, params)


def log_ratio(params):
    return lambda x, t: field(params, x, t).sum(-1)


# name -> loss(params, path, key, batch, beta, axis_name); CEP and the support losses take no axis
# name
LOSSES = {
    "cfm": lambda p, path, key, b, beta, a=None: losses.cfm(
        bound(p), path, key, b["x0"], axis_name=a
    ),
    "cefm": lambda p, path, key, b, beta, a=None: losses.cefm(
        bound(p), path, key, b["x0"], b["energy"], beta, axis_name=a
    ),
    "dsm": lambda p, path, key, b, beta, a=None: losses.dsm(
        bound(p), path, key, b["x0"], axis_name=a
    ),
    "ced": lambda p, path, key, b, beta, a=None: losses.ced(
        bound(p), path, key, b["x0"], b["energy"], beta, axis_name=a
    ),
    "cefm_log_normalizer": lambda p, path, key, b, beta, a=None: losses.cefm(
        bound(p), path, key, b["x0"], b["energy"], beta, log_normalizer=0.4, axis_name=a
    ),
    "cep": lambda p, path, key, b, beta: losses.cep(
        log_ratio(p), path, key, b["x0"], b["energy"], beta
    ),
    "support_cefm": lambda p, path, key, b, beta: losses.support_cefm(
        bound(p), path, key, b["actions"], b["q_values"], beta
    ),
    "support_ced": lambda p, path, key, b, beta: losses.support_ced(
        bound(p), path, key, b["actions"], b["q_values"], beta
    ),
}
OVER_DEVICES = ["cfm", "cefm", "dsm", "ced", "cefm_log_normalizer"]
WEIGHTED = ["cefm", "ced", "cefm_log_normalizer", "support_cefm", "support_ced"]
UNBOUNDED = ["cefm_log_normalizer"]  # weights may overflow, and must then say so

# name -> sampler(params, path, noise)
SAMPLERS = {
    **{
        solver: lambda p, path, noise, solver=solver: sample(
            bound(p), noise, solver=solver, num_steps=2
        )
        for solver in ("euler", "midpoint", "heun", "rk4", "dopri5")
    },
    **{
        f"dpmpp{order}": lambda p, path, noise, order=order: sample_dpmpp(
            bound(p), path, noise, num_steps=3, order=order
        )
        for order in (1, 2)
    },
}

each_path = pytest.mark.parametrize("path", PATHS)


def make_params(dtype, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {
        "kernel": rng.normal(size=(D, D)),
        "time": rng.normal(size=D),
        "bias": 0.1 * rng.normal(size=D),
    }
    return {name: jnp.asarray(leaf, dtype) for name, leaf in leaves.items()}


def make_batch(dtype, size=B, seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"x0": (size, D), "energy": (size,), "actions": (size, M, D), "q_values": (size, M)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


@functools.cache
def gradient_of(path, loss):
    """Jitted ``(params, key, batch, beta) -> ((loss, aux), gradient)``, shared by tests."""
    function = LOSSES[loss]

    def value(params, key, batch, beta):
        return function(params, PATHS[path], key, batch, beta)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@functools.cache
def sampler_of(path, sampler):
    return jax.jit(lambda params, noise: SAMPLERS[sampler](params, PATHS[path], noise))


def shared_sampler(path, sampler):
    """A velocity solver knows no path: one compilation serves all."""
    return sampler_of(path if sampler.startswith("dpmpp") else "ot", sampler)


# Module scope makes pytest run the tests of one pair after each other, mostly on one worker.
@pytest.fixture(scope="module", params=[(p, n) for p in PATHS for n in LOSSES], ids="-".join)
def pair(request):
    """Name of a path and of a loss."""
    return request.param


@pytest.fixture(
    scope="module",
    params=[(p, n) for p in PATHS for n in SAMPLERS if n.startswith("dpmpp") or p == "ot"],
    ids="-".join,
)
def sampling_pair(request):
    """Name of a path and of a sampler; solvers of a velocity, which know no path, come once."""
    return request.param


ON_DEVICES = [(p, n, "pmap") for p in PATHS for n in OVER_DEVICES]
ON_DEVICES += [
    ("ot", n, "shard_map") for n in OVER_DEVICES
]  # how an axis is mapped does not touch the path


@pytest.fixture(scope="module", params=ON_DEVICES, ids="-".join)
def on_devices(request):
    """Names of a path, of a loss that takes an axis name, and of what maps the axis."""
    return request.param


@pytest.fixture(autouse=True)
def _wide_types(x64):
    """64-bit types are on: float32 stays float32 by the code's care, not by JAX's limits."""


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


# --- losses ---


@functools.cache
def two_seeds_of(path, loss):
    """The same for two training seeds at once, each with its own parameters, key and batch."""
    return jax.jit(jax.vmap(gradient_of(path, loss), in_axes=(0, 0, 0, None)))


def stack(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def check_loss_and_gradient(loss, params, value, aux, gradient, dtype):
    assert value.dtype == dtype
    assert isinstance(aux, dict)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
    assert_finite((value, aux, gradient))
    assert all(
        np.abs(leaf).max() > 0 for name, leaf in gradient.items() if (loss, name) != ("cep", "bias")
    )
    if loss in WEIGHTED:
        assert aux["ess"].dtype == dtype


def test_loss_shape_dtype_finite_gradient_and_no_recompilation(pair):
    """New keys, data and guidance scales are data: they must not compile again."""
    params, batch, run = make_params("float64"), make_batch("float64"), gradient_of(*pair)
    (value, aux), gradient = run(params, jax.random.key(0), batch, 2.0)
    assert value.shape == ()
    check_loss_and_gradient(pair[1], params, value, aux, gradient, "float64")
    compiled = run._cache_size()
    (other, _), _ = run(
        make_params("float64", 3), jax.random.key(1), make_batch("float64", seed=4), 3.0
    )
    assert other != value
    assert run._cache_size() == compiled


def test_loss_in_float32_under_vmap(pair):
    """Seeds stay apart: changing one and the order of both leaves the other's numbers alone."""
    run, keys = two_seeds_of(*pair), jax.random.split(jax.random.key(0), 3)
    seeds = [
        (make_params("float32", i), keys[i], make_batch("float32", seed=10 + i)) for i in range(3)
    ]

    def both(first, second):
        params, batches = (
            stack(seeds[first][0], seeds[second][0]),
            stack(seeds[first][2], seeds[second][2]),
        )
        (value, aux), gradient = run(params, keys[np.array([first, second])], batches, 2.0)
        check_loss_and_gradient(pair[1], params, value, aux, gradient, "float32")
        return value, gradient

    here, there = both(0, 1), both(2, 0)
    assert here[0].shape == (2,)
    first, second = (
        jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i, tree in ((0, here), (1, there))
    )
    chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-6)
    assert here[0][1] != there[0][0]


def test_loss_survives_extreme_energies(pair):
    """Energies of 1e6 for one seed, infinite ones for the other, in float32."""
    params, batch = make_params("float32"), make_batch("float32")
    huge = batch | {"energy": 1e6 * batch["energy"], "q_values": 1e6 * batch["q_values"]}
    infinite = batch | {
        "energy": batch["energy"].at[0].set(jnp.inf).at[1].set(-jnp.inf),
        "q_values": batch["q_values"].at[:, 0].set(jnp.inf).at[0, 1].set(-jnp.inf),
    }
    keys = jax.random.split(jax.random.key(0))
    result = two_seeds_of(*pair)(stack(params, params), keys, stack(huge, infinite), 10.0)
    if pair[1] in UNBOUNDED:
        assert not np.isfinite(result[0][0]).any()
    else:
        assert_finite(result)


def test_loss_on_four_devices_sums_to_one(devices, on_devices):
    path, loss, how = on_devices
    params, batch, key = make_params("float64"), make_batch("float64"), jax.random.key(3)
    (expected, _), expected_gradient = gradient_of(path, loss)(params, key, batch, 2.0)

    def share(params, key, shard):
        def value(params):
            return LOSSES[loss](params, PATHS[path], key, shard, 2.0, "devices")[0]

        return jax.lax.psum(jax.value_and_grad(value)(params), "devices")

    if how == "pmap":
        shards = jax.tree.map(lambda leaf: np.reshape(leaf, (4, B // 4, *leaf.shape[1:])), batch)
        mapped = jax.pmap(share, axis_name="devices", in_axes=(None, None, 0), devices=devices)
        value, gradient = jax.tree.map(
            lambda leaf: np.asarray(leaf)[0], mapped(params, key, shards)
        )
    else:
        mesh, same, split = (
            Mesh(np.array(devices), ("devices",)),
            PartitionSpec(),
            PartitionSpec("devices"),
        )
        mapped = jax.shard_map(
            share, mesh=mesh, in_specs=(same, same, split), out_specs=same, check_vma=False
        )
        value, gradient = jax.jit(mapped)(params, key, batch)
    assert_allclose(value, expected, rtol=1e-10)
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_promotes_no_type_by_accident(loss, dtype):
    params, batch = make_params(dtype), make_batch(dtype)
    with jax.numpy_dtype_promotion("strict"):
        value, _ = LOSSES[loss](params, PATHS["ot"], jax.random.key(0), batch, 2.0)
    assert value.dtype == dtype


# --- path x loss x solver ---


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_of_training_then_sampling(pair, sampler):
    """The whole chain: gradient, step, noise to samples; the step changes the samples."""
    path, loss = pair
    params, noise = make_params("float32"), make_batch("float32")["x0"]
    _, gradient = gradient_of(path, loss)(
        make_params("float64"), jax.random.key(0), make_batch("float64"), 2.0
    )
    stepped = {
        name: np.asarray(leaf - 1e-2 * np.tanh(gradient[name]), np.float32)
        for name, leaf in params.items()
    }
    before, after = (shared_sampler(path, sampler)(p, noise) for p in (params, stepped))
    assert after.shape == (B, D)
    assert_finite(after)
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-6


# --- samplers ---


def test_sampler_in_float32_and_no_recompilation(sampling_pair):
    params, noise, run = (
        make_params("float32"),
        make_batch("float32")["x0"],
        sampler_of(*sampling_pair),
    )
    samples = run(params, noise)
    assert samples.shape == noise.shape
    assert samples.dtype == jnp.float32
    assert_finite(samples)
    assert np.abs(np.asarray(samples) - np.asarray(noise)).max() > 1e-3
    compiled = run._cache_size()
    run(make_params("float32", 9), -noise)
    assert run._cache_size() == compiled


def test_sampler_in_float64_with_its_gradient(sampling_pair):
    sampler, noise = sampler_of(*sampling_pair), make_batch("float64")["x0"]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params):
        samples = sampler(params, noise)
        return (samples**2).sum(), samples

    gradient, samples = run(make_params("float64"))
    assert samples.dtype == jnp.float64
    narrow = sampler(make_params("float32"), make_batch("float32")["x0"])
    assert_allclose(samples, narrow, rtol=1e-2, atol=1e-2)
    assert_finite(gradient)
    assert np.abs(gradient["bias"]).max() > 0


def test_sampler_under_pmap_of_vmap(devices, sampling_pair):
    run, params = sampler_of(*sampling_pair), make_params("float32")
    batches = make_batch("float32", 8 * B)["x0"].reshape(4, 2, B, D)
    alone = np.stack([[run(params, batch) for batch in pair] for pair in batches])
    mapped = jax.pmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(None, 0), devices=devices)(
        params, batches
    )
    tolerance = 1e-2 if sampling_pair[1] == "dopri5" else 1e-4
    assert_allclose(mapped, alone, rtol=tolerance, atol=tolerance)


# name -> function(x, t, other) of three arrays that a mesh splits along their first axis
SHARDED = {
    **{
        # Noise that all devices share, and a field that closes over what they do not: a policy
        # call.
        name: lambda x, t, other, draw=draw: draw(
            make_params("float32") | {"bias": other[0]},
            PATHS["vp_linear"],
            jnp.ones((2, D), jnp.float32),
        )
        for name, draw in SAMPLERS.items()
        if name != "dopri5"  # diffrax's loop needs check_vma=False
    },
    **{
        f"log_likelihood_{key is None}": lambda x, t, other, key=key: log_likelihood(
            lambda y, t: y * other, x, key=None if key is None else jax.random.key(key), num_steps=2
        )
        for key in (None, 0)
    },
    **{
        f"exact_{name}": lambda x, t, other, name=name: getattr(exact, name)(
            PATHS["ot"], x, t, POINTS
        )
        for name in ("posterior", "velocity", "score", "x0")
    },
    "intermediate_energy": lambda x, t, other: exact.intermediate_energy(
        PATHS["ot"], x, t, POINTS, POINTS[:, 0], 2.0
    ),
    "own_weights": lambda x, t, other: exact.velocity(
        PATHS["ot"], x, t, POINTS, other[0, 0] * POINTS[:, 0]
    ),
    "own_data": lambda x, t, other: exact.velocity(PATHS["ot"], POINTS[: len(x)], t, other),
}
POINTS = np.random.default_rng(5).normal(size=(5, D)).astype(np.float32)


@pytest.mark.parametrize("name", SHARDED)
def test_shard_map_with_its_checks(devices, name):
    """In its default mode shard_map types every value by the axes it varies over."""
    run, spec = SHARDED[name], PartitionSpec("devices")
    x, t = make_batch("float32")["x0"], jnp.linspace(0.2, 0.9, B, dtype="float32")
    mesh = Mesh(np.array(devices), ("devices",))
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(x, t, x[::-1])
    shares = [slice(i, i + B // 4) for i in range(0, B, B // 4)]
    expected = np.concatenate([run(x[i], t[i], x[::-1][i]) for i in shares])
    assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# --- paths ---


@each_path
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_path_keeps_dtype_and_round_trips(path, dtype):
    """Truth to any prediction and back, under jit and vmap, in both precisions."""
    path, batch = PATHS[path], make_batch(dtype)
    noise, t = batch["x0"][::-1], jnp.linspace(0.1, 0.9, B, dtype=dtype)

    def predictions(x0, noise, t):
        x, u, s = path.sample(x0, noise, t), path.velocity(x0, noise, t), path.score(noise, t)
        truth = {"x0": x0, "noise": noise, "velocity": u, "score": s}
        names = (
            "velocity_score",
            "score_velocity",
            "velocity_noise",
            "noise_velocity",
            "velocity_x0",
        )
        names += ("x0_velocity", "x0_score", "score_x0")
        got = {}
        for target, source in (name.split("_") for name in names):
            got[f"{target} from {source}"] = (
                getattr(path, f"{target}_from_{source}")(truth[source], x, t),
                truth[target],
            )
        return got

    for run in (predictions, jax.vmap(predictions)):
        for name, (got, expected) in jax.jit(run)(batch["x0"], noise, t).items():
            assert got.dtype == dtype
            tolerance = 2e-3 if dtype == "float32" else 1e-9
            assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=name)
