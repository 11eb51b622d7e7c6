"""Every public function in all of JAX's modes and with any arguments: one number, or a refusal."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from efm_jax import distances, exact, guidance, losses, networks, paths, sampling, weights

B, M, D = 8, 3, 4
OT, VP = paths.conditional_ot(), paths.vp_linear()
KEY = jax.random.key(3)


def field(w):
    return lambda x, t: jnp.tanh(x @ w.astype(x.dtype)) + t.reshape(*t.shape, 1).astype(x.dtype)


def scalar(w):
    return lambda x, t: field(w)(x, t).sum(-1)


# name -> function(w, batch, axis_name) of the losses, whose batch a mapped axis may split
LOSSES = {
    "cfm": lambda w, b, a: losses.cfm(field(w), OT, KEY, b["x"], axis_name=a),
    "masked": lambda w, b, a: losses.cfm(
        field(w), OT, KEY, b["x"], weights=b["energy"] > 1, axis_name=a
    ),
    "dsm": lambda w, b, a: losses.dsm(field(w), VP, KEY, b["x"], axis_name=a),
    "cefm": lambda w, b, a: losses.cefm(field(w), OT, KEY, b["x"], b["energy"], 0.7, axis_name=a),
    "thm 4.3": lambda w, b, a: losses.cefm(
        field(w), OT, KEY, b["x"], b["energy"], 0.7, log_normalizer=0.4, axis_name=a
    ),
    "ced": lambda w, b, a: losses.ced(field(w), VP, KEY, b["x"], b["energy"], 0.7, axis_name=a),
    "support_cefm": lambda w, b, a: losses.support_cefm(
        field(w), OT, KEY, b["actions"], b["q"], 0.7, axis_name=a
    ),
    "support_ced": lambda w, b, a: losses.support_ced(
        field(w), VP, KEY, b["actions"], b["q"], 0.7, axis_name=a
    ),
    "grouped cep": lambda w, b, a: losses.contrastive(
        scalar(w), OT, KEY, b["actions"], M * weights.energy_weights(b["q"], 0.7), axis_name=a
    ),
    "classifier": lambda w, b, a: guidance.classifier_loss(
        scalar(w), OT, KEY, b["x"], b["energy"] / 4, axis_name=a
    ),
}
# name -> function(w, batch) of the rest
FUNCTIONS = {
    "cep": lambda w, b: losses.cep(scalar(w), OT, KEY, b["x"], b["energy"], 0.7)[0],
    "energy_weights": lambda w, b: weights.energy_weights(b["energy"], 0.7),
    "log_normalizer": lambda w, b: weights.log_normalizer(b["energy"], 0.7),
    "effective_sample_size": lambda w, b: weights.effective_sample_size(b["energy"]),
    "beta_for_ess": lambda w, b: weights.beta_for_ess(b["energy"], 0.5),
    **{
        solver: lambda w, b, solver=solver: sampling.sample(
            field(w), b["x"], solver=solver, num_steps=3
        )
        for solver in ("euler", "heun", "dopri5")
    },
    "dpmpp": lambda w, b: sampling.sample_dpmpp(field(w), OT, b["x"], num_steps=4),
    "ancestral": lambda w, b: sampling.sample_ancestral(
        field(w), OT, KEY, b["x"], num_steps=4, prediction="data"
    ),
    "sde": lambda w, b: sampling.sample_sde(field(w), OT, KEY, b["x"], num_steps=4),
    "trajectory": lambda w, b: sampling.sample_trajectory(field(w), b["x"], num_steps=3).points,
    "log_likelihood": lambda w, b: sampling.log_likelihood(field(w), b["x"], num_steps=3),
    "hutchinson": lambda w, b: sampling.log_likelihood(field(w), b["x"], key=KEY, num_steps=3),
    "posterior": lambda w, b: exact.posterior(OT, b["x"] @ w, b["t"], b["x"][::-1]),
    "velocity": lambda w, b: exact.velocity(VP, b["x"] @ w, b["t"], b["x"][::-1]),
    "score": lambda w, b: exact.score(OT, b["x"] @ w, b["t"], b["x"][::-1]),
    "intermediate_energy": lambda w, b: exact.intermediate_energy(
        OT, b["x"] @ w, b["t"], b["x"][::-1], b["energy"], 0.7
    ),
    "cg_score": lambda w, b: exact.cg_score(
        OT, b["x"] @ w, b["t"], b["x"][::-1], (1 + b["energy"]) / 8, 2.0
    ),
    "mixture": lambda w, b: mixture(b, "velocity")(OT, b["x"] @ w, b["t"]),
    "mixture energy": lambda w, b: mixture(b, "intermediate_energy")(
        OT, b["x"] @ w, b["t"], exact.QuadraticEnergy(batch()["x"][0], 1.0), 0.7
    ),
    "network": lambda w, b: networks.MLPField((8,)).apply(
        PARAMS, b["x"], b["t"].astype(b["x"].dtype), b["x"]
    ),
    "classifier guidance": lambda w, b: guidance.classifier_guided(
        field(w), scalar(w), 2.0, prediction="velocity", path=OT
    )(b["x"], b["t"]),
    "monte carlo": lambda w, b: guidance.monte_carlo_guided(
        field(w), OT, b["x"][::-1], b["energy"], 0.7
    )(b["x"], b["t"]),
    "sliced_wasserstein": lambda w, b: distances.sliced_wasserstein(KEY, b["x"], b["x"] @ w),
    "mmd": lambda w, b: distances.mmd(b["x"], b["x"] @ w),
}
ALL = FUNCTIONS | {
    name: lambda w, b, loss=loss: loss(w, b, None)[0] for name, loss in LOSSES.items()
}
PARAMS = networks.MLPField((8,)).init(KEY, *map(jnp.zeros, ((1, D), (1,), (1, D))))


def mixture(like, name):
    dtype, own = like["x"].dtype, batch()
    parts = own["energy"][:3], own["x"][:3], jnp.full(3, 0.5)
    return getattr(exact.GaussianMixture(*(part.astype(dtype) for part in parts)), name)


def sixteen(numbers):
    """Numbers that sixteen bits hold, so that every type computes from the same."""
    return jnp.asarray(numbers, jnp.bfloat16)


def batch(dtype=jnp.float32, energy_dtype=None):
    rng = np.random.default_rng(0)
    shapes = {"x": (B, D), "actions": (B, M, D)}
    made = {name: sixteen(rng.normal(size=s)).astype(dtype) for name, s in shapes.items()}
    made["t"] = jnp.linspace(0.2, 0.9, B, dtype=jnp.float32)
    energies = {"energy": rng.integers(0, 5, B), "q": rng.integers(0, 5, (B, M))}
    return made | {n: jnp.asarray(e, energy_dtype or dtype) for n, e in energies.items()}


def kernel(dtype=jnp.float32):
    return sixteen(np.random.default_rng(1).normal(size=(D, D)) / 2).astype(dtype)


@functools.cache
def expected(name):
    """A function's values, and their sum with its gradient, on one device in float32."""
    return jax.jit(gradient(name))(kernel(), batch())


def gradient(name):
    def run(w, b):
        def total(w):
            values = ALL[name](w, b)
            return jnp.sum(values), values

        (sum_of_all, values), slope = jax.value_and_grad(total, has_aux=True)(w)
        return values, (sum_of_all, slope)

    return run


# Functions that see no energy.
FIELDS_ALONE = ("euler", "heun", "dopri5", "dpmpp", "ancestral", "sde", "trajectory")
FIELDS_ALONE += ("log_likelihood",)
FIELDS_ALONE += ("hutchinson", "network", "mixture", "sliced_wasserstein", "mmd", "cfm", "dsm")

each = pytest.mark.parametrize("name", ALL)


def mesh(axis_type):
    return jax.make_mesh((4,), ("i",), axis_types=(axis_type,), devices=jax.devices()[:4])


@pytest.mark.parametrize("mode", ["pmap", "checked", "unchecked"])
@pytest.mark.parametrize("name", LOSSES)
def test_shares_and_their_gradients_sum_to_one_devices_numbers(devices, name, mode):
    def step(w, b):
        return jax.lax.psum(jax.value_and_grad(lambda w: LOSSES[name](w, b, "i")[0])(w), "i")

    if mode == "pmap":
        split = jax.tree.map(lambda x: x.reshape(4, B // 4, *x.shape[1:]), batch())
        mapped = jax.pmap(step, axis_name="i", in_axes=(None, 0), devices=devices)
        got = jax.tree.map(lambda x: x[0], mapped(kernel(), split))
    else:
        specs = {"in_specs": (P(), P("i")), "out_specs": P(), "check_vma": mode == "checked"}
        got = jax.jit(jax.shard_map(step, mesh=mesh(AxisType.Auto), **specs))(kernel(), batch())
    chex.assert_trees_all_close(got, expected(name)[1], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_gradients_from_outside_and_of_parameters_that_vary(devices, checked):
    def mapped(function, in_specs, out_specs):
        specs = {"in_specs": in_specs, "out_specs": out_specs, "check_vma": checked}
        return jax.jit(jax.shard_map(function, mesh=mesh(AxisType.Auto), **specs))

    # Compiled inside, too: nothing tells which of a field's arrays will be differentiated.
    loss = jax.jit(lambda w, b: LOSSES["cefm"](w, b, "i")[0])
    total = mapped(lambda w, b: jax.lax.psum(loss(w, b), "i"), (P(), P("i")), P())
    got = jax.value_and_grad(total)(kernel(), batch())
    chex.assert_trees_all_close(got, expected("cefm")[1], rtol=2e-5, atol=1e-6)
    own = mapped(lambda w, b: jax.grad(loss)(w[0], b)[None], P("i"), P("i"))
    shares = own(jnp.stack([kernel()] * 4), batch())
    chex.assert_trees_all_close(shares.sum(0), expected("cefm")[1][1], rtol=2e-5, atol=1e-6)


# On Auto axes the compiler alone is at work: some of each kind.
AUTO = ("cefm", "grouped cep", "dopri5", "hutchinson", "velocity", "beta_for_ess")
MESHES = [(n, AxisType.Explicit) for n in ALL] + [(n, AxisType.Auto) for n in AUTO]


@pytest.mark.parametrize(("name", "axis_type"), MESHES)
def test_sharded_arrays_give_one_devices_numbers(devices, name, axis_type):
    """No axis name: the user shards the batch and compiles."""
    on = mesh(axis_type)
    with jax.set_mesh(on):
        split = jax.device_put(batch(), NamedSharding(on, P("i")))
        got = jax.jit(gradient(name))(kernel(), split)
    chex.assert_trees_all_close(got, expected(name), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ALL if name not in FIELDS_ALONE])
def test_integer_energies_count_as_their_float_equals(name):
    got = jax.jit(gradient(name))(kernel(), batch(energy_dtype=jnp.uint8))
    chex.assert_trees_all_close(got, expected(name), rtol=1e-5, atol=1e-6)


SIXTEEN = [(n, jnp.bfloat16) for n in ALL] + [(n, jnp.float16) for n in ("cefm", "dsm", "dpmpp")]


@pytest.mark.parametrize(("name", "dtype"), SIXTEEN)
def test_sixteen_bits_give_the_same_up_to_their_rounding(name, dtype):
    got, want = jax.jit(ALL[name])(kernel(dtype), batch(dtype)), expected(name)[0]
    points = got.shape[-1:] == (D,)
    assert got.dtype == (dtype if points or name in KEPT else jnp.float32)
    scale = np.abs(want).max()
    np.testing.assert_allclose(got.astype(jnp.float32) / scale, want / scale, atol=0.05)


KEPT = ("posterior", "intermediate_energy", "mixture energy")  # of the points' type, too


@each
def test_strict_modes_and_plain_evaluation(name):
    """No implicit promotion of ranks and types, and no NaN on the way, which JAX would report."""
    want = expected(name)[1][0]
    strict = name not in ("dopri5", "network")  # diffrax and flax promote
    with (
        jax.numpy_rank_promotion("raise" if strict else "allow"),
        jax.numpy_dtype_promotion("strict" if strict else "standard"),
        jax.debug_nans(True),
        jax.disable_jit(name not in ("dopri5", "beta_for_ess")),  # loops that take minutes
    ):
        got = ALL[name](kernel(), batch()).sum()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [0.3, np.float64(0.3), np.asarray(0.3)])
def test_a_time_widens_nothing(x64, value):
    x = batch()["x"]
    for result in (OT.sample(x, -x, value), VP.velocity_from_score(x, -x, value)):
        assert result.dtype == jnp.float32
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert OT.score(x, 1).dtype == jnp.float32


def test_noise_from_outside_shard_map(devices):
    noise, w = batch()["x"], jnp.stack([kernel()] * 4)
    for run in (sampling.sample, functools.partial(sampling.sample_dpmpp, path=OT)):
        mapped = jax.shard_map(
            lambda w, run=run: run(field(w[0]), noise=noise)[None],
            mesh=mesh(AxisType.Auto),
            in_specs=P("i"),
            out_specs=P("i"),
        )
        want = run(field(kernel()), noise=noise)
        np.testing.assert_allclose(jax.jit(mapped)(w)[2], want, rtol=1e-5, atol=1e-6)


# --- points of any shape ---


def flat_field(w):
    return lambda x, t: jnp.tanh(x @ w) * t[:, None]


def reshaped(w, split):
    """The same field on images ``[B, 2, 2, 1]`` or on a pytree of two parts."""

    def image(x, t):
        assert t.shape == x.shape[:1]
        return flat_field(w)(x.reshape(len(x), D), t).reshape(x.shape)

    def parts(x, t):
        joined = flat_field(w)(jnp.concatenate([x["a"], x["b"][:, None]], 1), t)
        return {"a": joined[:, :-1], "b": joined[:, -1]}

    return parts if split else image


def to_parts(x):
    return {"a": x[:, :-1], "b": x[:, -1]}


def test_images_and_pytrees_are_as_good_as_vectors():
    b, w = batch(), kernel()
    x, noise, t = b["x"], b["x"][::-1], b["t"]
    image = lambda x: x.reshape(B, 2, 2, 1)  # noqa: E731
    calls = {
        "cefm": lambda f, x, n: losses.cefm(f, OT, None, x, b["energy"], 0.7, noise=n, t=t)[0],
        "dsm": lambda f, x, n: losses.dsm(f, VP, None, x, noise=n, t=t)[0],
        "errors": lambda f, x, n: losses.errors(f, OT, None, x, noise=n, t=t),
        "sample": lambda f, x, n: sampling.sample(f, n, solver="heun"),
        "dopri5": lambda f, x, n: sampling.sample(f, n, solver="dopri5"),
        "dpmpp": lambda f, x, n: sampling.sample_dpmpp(f, OT, n),
        "score": lambda f, x, n: OT.score_from_velocity(f(x, t), x, t),
        "guided": lambda f, x, n: guidance.classifier_free_guided(f, lambda x, t: x, t)(x, t),
    }
    for name, call in calls.items():
        want = jax.jit(functools.partial(call, flat_field(w)))(x, noise)
        for f, shape in ((reshaped(w, False), image), (reshaped(w, True), to_parts)):
            got = jax.jit(functools.partial(call, f))(shape(x), shape(noise))
            like = shape(want) if want.shape == x.shape else want
            chex.assert_trees_all_close(got, like, rtol=1e-4, atol=1e-5, custom_message=name)
    got = sampling.log_likelihood(reshaped(w, False), image(x), num_steps=4)
    np.testing.assert_allclose(
        got, sampling.log_likelihood(flat_field(w), x, num_steps=4), rtol=1e-5
    )
    # Without noise and times of its own an image draws its own, one time for each.
    assert losses.cfm(reshaped(w, False), OT, KEY, image(x))[0] > 0
    assert losses.cfm(reshaped(w, True), OT, KEY, to_parts(x))[0] > 0


def test_event_axes_may_be_said():
    shapes = []
    field = lambda x, t: shapes.append(t.shape) or x  # noqa: E731
    sampling.sample(field, jnp.ones((B, M, D)), event_ndim=1, num_steps=1)
    losses.cfm(field, OT, KEY, jnp.ones((B, M, D)), event_ndim=1)
    losses.cfm(field, OT, KEY, jnp.ones((B, M, D)), event_ndim=2)
    losses.cfm(field, OT, KEY, jnp.ones((B, M, D)), weights=jnp.ones((B, M)))
    assert shapes == [(B, M), (B, M), (B,), (B, M)]


# --- what is refused ---

ONES = jnp.ones((B, D))
REFUSED = {
    "field(x, t)": [
        lambda f=f, run=run: run(f)
        for f in (lambda x, t: x[:, :1], lambda x, t: x[:, 0], lambda x, t: jnp.zeros(()))
        for run in (
            lambda f: losses.cfm(f, OT, KEY, ONES),
            lambda f: sampling.sample(f, ONES),
            lambda f: sampling.sample(f, ONES, solver="dopri5"),
            lambda f: sampling.sample_dpmpp(f, VP, ONES),
            lambda f: sampling.log_likelihood(f, ONES),
        )
    ],
    "time_weight": [
        lambda: losses.cfm(lambda x, t: x, OT, KEY, ONES, time_weight=lambda t: t[:, None])
    ],
    "beta": [
        lambda: guidance.classifier_guided(lambda x, t: x, scalar(kernel()), jnp.ones((B, 1)))(
            ONES, ONES[:, 0]
        ),
        lambda: guidance.classifier_free_guided(lambda x, t: x, lambda x, t: x, jnp.ones(D))(
            ONES, ONES[:, 0]
        ),
    ],
    "at least one": [
        lambda: losses.cfm(lambda x, t: x, OT, KEY, ONES[:0]),
        lambda: losses.cep(lambda x, t: x[:, 0], OT, KEY, ONES[:0], ONES[:0, 0], 1.0),
        lambda: guidance.classifier_loss(lambda x, t: x[:, 0], OT, KEY, ONES[:0], ONES[:0, 0]),
        lambda: weights.energy_weights(ONES[:0, 0], 1.0),
        lambda: weights.log_normalizer(ONES[:0, 0], 1.0),
        lambda: weights.effective_sample_size(ONES[:0, 0]),
        lambda: weights.beta_for_ess(ONES[:0, 0], 0.5),
        lambda: exact.posterior(OT, ONES, ONES[:, 0], ONES[:0]),
        lambda: distances.mmd(ONES[:0], ONES),
        lambda: distances.sliced_wasserstein(KEY, ONES[:0], ONES[:0]),
    ],
    "t_start": [lambda: sampling.sample(lambda x, t: x, ONES, t_start=float("nan"))],
    "times": [lambda: sampling.sample(lambda x, t: x, ONES, times=jnp.array([1.0, 0.5, 0.7]))],
    "path": [lambda: guidance.contrastive_guided(lambda x, t: x, scalar(ONES), prediction="noise")],
    "event_ndim": [lambda: losses.cfm(lambda x, t: x, OT, KEY, ONES, event_ndim=2)],
    "weights": [
        lambda shape=shape: losses.cfm(lambda x, t: x, OT, KEY, ONES, weights=jnp.ones(shape))
        for shape in ((), (B, 1), (B, D), (B - 1,))
    ],
    "key": [lambda: losses.cfm(lambda x, t: x, OT, None, ONES)],
    "noise": [lambda: losses.cfm(lambda x, t: x, OT, KEY, ONES, noise=ONES[:, :1])],
}


@pytest.mark.parametrize(
    ("words", "number"), [(w, i) for w in REFUSED for i in range(len(REFUSED[w]))]
)
def test_what_cannot_be_meant_is_refused(words, number):
    with pytest.raises(ValueError, match=words.replace("(", "[(]").replace(")", "[)]")):
        REFUSED[words][number]()
