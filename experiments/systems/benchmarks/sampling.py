"""Quality against cost of sampling: every solver, from 4 evaluations of the field to 40 and beyond.

Problems are smooth, so that fields are finite at both ends of time: two of the plane's sets, of
which a finite sample is blurred by a kernel, and a Gaussian mixture in 8 dimensions, all guided at
one beta.  Fields: the exact guided one, on the OT and the linear VP path, where only the solver's
error is seen; and a network that was trained by energy-weighted flow matching, where a smaller
error of the solver may not pay, and the same trained and evaluated in bfloat16.

Quality is the sliced Wasserstein-2 distance to exact samples as a ratio to its noise floor, the
distance between two independent exact samples of that size.  All solvers begin at the same noise
and are compared with the same exact samples: what chance adds to one ratio it adds to all of a
problem, and ratios differ by less than their own error.
"""

import dataclasses
import functools
import itertools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pandas as pd

from efm_jax import exact, paths, sampling
from efm_jax.distances import sliced_wasserstein
from efm_jax.networks import MLPField
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.model import GenerativeModel
from efm_jax.solvers import SOLVERS
from efm_jax.types import Array, Field
from experiments.paper.guidance_methods import FAMILIES, Task, Training
from experiments.paper.toy2d import Problem, problems
from experiments.systems.benchmarks.timing import Rows, Tables
from experiments.systems.benchmarks.workload import stages

PATHS = {"ot": paths.conditional_ot(), "vp": paths.vp_linear()}
BETA = 3.0
# A ratio within this factor of the best one is as good.
_AS_GOOD = 1.05
# Of the kernel that turns a finite sample of a set into a smooth density: about the sets' noise.
_BLUR = 0.1


class Sizes(NamedTuple):
    """How much is computed."""

    training: Training = Training(hidden_dims=(128, 128, 128), batch_size=1024, num_steps=2000)
    problems: tuple[str, ...] = ("eight_gaussians", "swiss_roll", "mixture_8d")
    evaluations: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20, 40)
    tolerances: tuple[float, ...] = (1e-5,)  # of dopri5, relative and absolute
    components: int = 128  # points of a set that are blurred
    sample_size: int = 1000  # of each of the two samples that a distance compares
    repeats: int = 8  # pairs of samples
    floor_repeats: int = 64
    dtypes: tuple[str | None, ...] = (None, "bfloat16")  # of the trained network
    exact_paths: tuple[str, ...] = tuple(PATHS)  # of the exact fields


QUICK = Sizes(
    Training(hidden_dims=(16, 16), batch_size=64, num_steps=50), ("mixture_8d",), (8,), (),
    sample_size=200, repeats=2, floor_repeats=8, dtypes=("bfloat16",), exact_paths=("vp",),
)  # fmt: skip
SIZES = {"full": Sizes(), "quick": QUICK}


class Case(NamedTuple):
    """A problem at the one beta, and its exact answer, a mixture with fields in closed form."""

    problem: Problem
    guided: exact.GaussianMixture


class Setting(NamedTuple):
    """One way to integrate; hashable, as a static argument of ``jit`` must be."""

    solver: str  # of efm_jax.sampling.sample, or dpmpp1, dpmpp2
    evaluations: int | None  # None: dopri5 chooses
    tolerance: float | None = None

    @property
    def name(self) -> str:
        return self.solver if self.tolerance is None else f"{self.solver}, {self.tolerance:g}"


class Kind(NamedTuple):
    """A kind of field on a path; its parameters are data, so that programs are shared."""

    name: str
    path_name: str
    network: MLPField | None = None  # None: parameters are a guided mixture, and the field is exact

    @property
    def path(self) -> paths.GaussianPath:
        return PATHS[self.path_name]

    def velocity(self, params: Any) -> Field:
        if self.network is not None:
            return functools.partial(self.network.apply, params)
        return functools.partial(params.velocity, self.path)

    def score(self, params: Any) -> Field:
        if self.network is None:
            return functools.partial(params.score, self.path)
        return lambda x, t: self.path.score_from_velocity(self.velocity(params)(x, t), x, t)


def make_case(name: str, components: int) -> Case:
    """A problem of ``experiments.paper.toy2d`` in a form whose guided field is exact and smooth.

    A mixture stays as it is.  Of a set in the plane, points are drawn and blurred: weighing the
    k-th kernel by ``exp(-beta E(point k))`` guides the blurred density p exactly, to a q whose
    energy is ``-log(q / p) / beta`` but for a constant.
    """
    problem = problems()[name]
    if problem.mixture is not None:
        return Case(problem, problem.mixture.guided(problem.energy, BETA))
    points = problem.sample(jax.random.key(0), components)
    log_weights, variances = -BETA * problem.energy(points), jnp.full(components, _BLUR**2)
    plain = exact.GaussianMixture(jnp.zeros(components), points, variances)
    guided = exact.GaussianMixture(log_weights, points, variances)
    # Weights of a mixture are normalized: the mean of exp(-beta E) over the points takes that back.
    log_mean = jax.nn.logsumexp(log_weights) - math.log(components)

    def energy(x: Array) -> Array:
        return (plain.log_density(x) - guided.log_density(x) - log_mean) / BETA

    return Case(Problem(name, problem.dim, plain.sample, energy), guided)


def train(case: Case, training: Training) -> tuple[Kind, Any]:
    """The EFM network of the OT path, and its parameters."""
    model = FAMILIES["ot"](Task(case.problem, (BETA,), training, jax.random.key(1)))[0]
    network = MLPField(training.hidden_dims, input_skip=True, dtype=training.dtype)
    return Kind(f"network, {training.dtype or 'float32'}", "ot", network), model.params


def settings(sizes: Sizes) -> list[Setting]:
    """Every solver at all numbers of evaluations that it can make, and dopri5 at its tolerances."""
    pairs = itertools.product((*SOLVERS, "dpmpp1", "dpmpp2"), sizes.evaluations)
    fixed = [Setting(solver, count) for solver, count in pairs if count % stages(solver) == 0]
    return fixed + [Setting("dopri5", None, tolerance) for tolerance in sizes.tolerances]


_evaluated = []  # grows by one at every evaluation of a counted field


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(kind: Kind, setting: Setting, params: Any, noise: Array) -> Array:
    """Samples ``[B, d]`` from noise ``[B, d]``."""
    if setting.solver.startswith("dpmpp"):
        how = {"num_steps": setting.evaluations, "order": int(setting.solver[-1])}
        return sampling.sample_dpmpp(kind.score(params), kind.path, noise, **how)
    velocity = kind.velocity(params)
    if setting.tolerance is not None:

        def counted(x: Array, t: Array) -> Array:
            # sample() does not report the steps that diffrax took; this sees the evaluations
            # themselves, at some 20 us each in dopri5's time.
            jax.debug.callback(lambda: _evaluated.append(None))
            return velocity(x, t)

        tolerance = {"rtol": setting.tolerance, "atol": setting.tolerance}
        return sampling.sample(counted, noise, solver=setting.solver, **tolerance)
    steps = setting.evaluations // stages(setting.solver)
    return sampling.sample(velocity, noise, solver=setting.solver, num_steps=steps)


@jax.jit
def distance(keys: Array, x: Array, y: Array) -> Array:
    """Mean over pairs of sliced Wasserstein-2 distances of ``[repeats, n, d]``."""
    few = 16 * x.shape[-1]  # directions; in the plane few are as good as many
    found = jax.lax.map(lambda pair: sliced_wasserstein(*pair, num_projections=few), (keys, x, y))
    return found.mean()


def exact_samples(case: Case, sizes: Sizes, seed: int, repeats: int) -> Array:
    """Independent exact samples ``[repeats, n, d]``."""
    found = case.guided.sample(jax.random.key(seed), repeats * sizes.sample_size)
    return found.reshape(repeats, sizes.sample_size, -1)


def measure(case: Case, kind: Kind, params: Any, floor: float, sizes: Sizes) -> Rows:
    """Every solver on one field: a row each.  The calls that are timed, in turns, also count."""
    shape = sizes.repeats, sizes.sample_size, case.problem.dim
    noise, todo = jax.random.normal(jax.random.key(6), shape), settings(sizes)
    target = exact_samples(case, sizes, 7, sizes.repeats)
    samples: dict[Setting, list[Array]] = {setting: [] for setting in todo}
    seconds, counts = dict.fromkeys(todo, math.inf), dict.fromkeys(todo, 0)
    for setting in todo:
        jax.block_until_ready(draw(kind, setting, params, noise[0]))  # compiles
    for part, setting in itertools.product(noise, todo):
        jax.effects_barrier()
        before, start = len(_evaluated), time.perf_counter()
        samples[setting].append(jax.block_until_ready(draw(kind, setting, params, part)))
        seconds[setting] = min(seconds[setting], time.perf_counter() - start)
        jax.effects_barrier()
        counts[setting] += len(_evaluated) - before
    keys = jax.random.split(jax.random.key(8), sizes.repeats)
    return [{
        "problem": case.problem.name, "path": kind.path_name, "field": kind.name,
        "solver": setting.name,
        "evaluations": setting.evaluations or round(counts[setting] / sizes.repeats),
        "ratio to floor": float(distance(keys, jnp.stack(samples[setting]), target)) / floor,
        "ms": 1e3 * seconds[setting],
    } for setting in todo]  # fmt: skip


def cheapest(rows: Rows) -> Rows:
    """The fewest evaluations that suffice for each field: in each problem, and in all at once."""
    table, found = pd.DataFrame(rows), []
    least = table.groupby(["path", "field", "problem"])["ratio to floor"].transform("min")
    table["excess"] = table["ratio to floor"] / least
    for (path, field), group in table.groupby(["path", "field"], sort=False):
        excess = group.pivot_table("excess", ["evaluations", "solver"], "problem", sort=False)
        if len(excess.columns) > 1:
            # dopri5's evaluations differ from problem to problem: no setting of it is in all.
            excess["all of them"] = excess.max(axis=1, skipna=False)
        # What QIPO draws actions with if nothing is said.
        model = GenerativeModel.from_config(QIPOConfig(path=path))
        solver = "dpmpp2" if model.solver == "dpmpp" else model.solver
        evaluations = model.sample_steps * stages(solver)
        for problem, ratios in excess.items():
            enough = ratios[ratios <= _AS_GOOD].reset_index(name="ratio")
            least = enough.sort_values(["evaluations", "ratio"]).head(1).to_dict("records")
            best = least[0] if least else {}
            found.append({
                "problem": problem, "path": path, "field": field,
                "evaluations": best.get("evaluations"), "solver": best.get("solver"),
                "its ratio to the best": best.get("ratio"), "default": f"{solver}, {evaluations}",
                "default's ratio to the best": ratios.get((evaluations, solver)),
            })  # fmt: skip
    return found


def run(sizes: Sizes) -> Tables:
    """Both tables."""
    rows = []
    title = f"Sampling: distance to exact samples over the noise floor, beta = {BETA:g}"
    title += f"; ms of {sizes.sample_size:,} samples"
    for name in sizes.problems:
        case = make_case(name, sizes.components)
        fields = [(Kind("exact", path_name), case.guided) for path_name in sizes.exact_paths]
        pair = (exact_samples(case, sizes, seed, sizes.floor_repeats) for seed in (3, 4))
        keys = jax.random.split(jax.random.key(5), sizes.floor_repeats)
        floor = float(distance(keys, *pair))
        for dtype in sizes.dtypes:
            fields.append(train(case, dataclasses.replace(sizes.training, dtype=dtype)))
        for kind, params in fields:
            found = measure(case, kind, params, floor, sizes)
            yield title, found
            rows += found
    best = f"Fewest evaluations within {_AS_GOOD:g} of the best ratio that any solver reaches"
    yield best, cheapest(rows)
