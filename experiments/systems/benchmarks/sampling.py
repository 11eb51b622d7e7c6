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
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efm_jax import exact, paths, sampling
from efm_jax.distances import sliced_wasserstein
from efm_jax.networks import MLPField
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.model import GenerativeModel
from efm_jax.solvers import SOLVERS
from efm_jax.types import Array, Field
from experiments.paper.guidance_methods import Training, train_family
from experiments.paper.toy2d import Problem, problems

Rows = list[dict[str, Any]]

PATHS = {"ot": paths.conditional_ot(), "vp": paths.vp_linear()}
BETA = 3.0
# Of the kernel that turns a finite sample of a set into a smooth density: about the sets' own
# noise.
_BLUR = 0.1
_TRAINING = Training(hidden_dims=(128, 128, 128), batch_size=1024, num_steps=2000)
# A ratio within this factor of the best one is as good.
_AS_GOOD = 1.05


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    training: Training = _TRAINING
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
    Training(hidden_dims=(16, 16), batch_size=64, num_steps=50),
    problems=("mixture_8d",),
    evaluations=(8,),
    tolerances=(),
    sample_size=200,
    repeats=2,
    floor_repeats=8,
    dtypes=("bfloat16",),
    exact_paths=("vp",),
)


class Case(NamedTuple):
    """A problem at the one beta, and its exact answer as a mixture, whose fields are closed forms."""

    problem: Problem
    guided: exact.GaussianMixture


class Setting(NamedTuple):
    """One way to integrate; hashable, as a static argument of ``jit`` must be."""

    solver: str  # of efm_jax.sampling.sample, or dpmpp1, dpmpp2
    evaluations: int | None  # None: dopri5 chooses
    tolerance: float | None = None

    @property
    def name(self) -> str:
        """What the tables call the solver."""
        return self.solver if self.tolerance is None else f"{self.solver}, {self.tolerance:g}"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of field, exact or learned, on a path; its parameters are data, so that programs are shared."""

    name: str
    path_name: str
    network: MLPField | None = None  # None: parameters are a guided mixture, and the field is exact

    def velocity(self, params: Any) -> Field:
        if self.network is not None:
            return functools.partial(self.network.apply, params)
        return functools.partial(params.velocity, PATHS[self.path_name])

    def score(self, params: Any) -> Field:
        path = PATHS[self.path_name]
        if self.network is None:
            return functools.partial(params.score, path)
        return lambda x, t: path.score_from_velocity(self.network.apply(params, x, t), x, t)


def make_case(name: str, components: int) -> Case:
    """A problem of ``experiments.paper.toy2d`` in a form whose guided field is exact and smooth.

    A mixture stays as it is.  Of a set in the plane, points are drawn and blurred: weighing the
    k-th kernel by ``exp(-beta E(point k))`` guides the blurred density p exactly, to a q whose
    energy, ``-log(q / p) / beta`` but for a constant, lies between the least and the largest of the
    points' energies.
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
    model = train_family("ot", case.problem, (BETA,), training, jax.random.key(1))[0]
    network = MLPField(training.hidden_dims, input_skip=True, dtype=training.dtype)
    return Kind(f"network, {training.dtype or 'float32'}", "ot", network), model.params


def stages(solver: str) -> int:
    """Evaluations of the field in one step of a solver in equal steps; DPM-Solver++ makes one."""
    return len(SOLVERS[solver].nodes) if solver in SOLVERS else 1


def settings(sizes: Sizes) -> list[Setting]:
    """Every solver at all numbers of evaluations that it can make, and dopri5 at its tolerances."""
    fixed = [
        Setting(solver, count)
        for solver, count in itertools.product((*SOLVERS, "dpmpp1", "dpmpp2"), sizes.evaluations)
        if count % stages(solver) == 0
    ]
    return fixed + [Setting("dopri5", None, tolerance) for tolerance in sizes.tolerances]


_evaluated = 0


def _count() -> None:
    global _evaluated
    _evaluated += 1


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(kind: Kind, setting: Setting, params: Any, noise: Array) -> Array:
    """Samples ``[B, d]`` from noise ``[B, d]``."""
    if setting.solver.startswith("dpmpp"):
        how = {"num_steps": setting.evaluations, "order": int(setting.solver[-1])}
        return sampling.sample_dpmpp(kind.score(params), PATHS[kind.path_name], noise, **how)
    velocity = kind.velocity(params)
    if setting.tolerance is not None:

        def counted(x: Array, t: Array) -> Array:
            # sample() does not report the steps that diffrax took; this sees the evaluations
            # themselves, at some 20 us each in dopri5's time.
            jax.debug.callback(_count)
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


def exact_pairs(case: Case, sizes: Sizes, seed: int, repeats: int) -> Array:
    """Independent exact samples ``[repeats, n, d]``."""
    found = case.guided.sample(jax.random.key(seed), repeats * sizes.sample_size)
    return found.reshape(repeats, sizes.sample_size, -1)


def noise_floor(case: Case, sizes: Sizes) -> float:
    """The distance between independent exact samples."""
    pair = (exact_pairs(case, sizes, seed, sizes.floor_repeats) for seed in (3, 4))
    return float(distance(jax.random.split(jax.random.key(5), sizes.floor_repeats), *pair))


def _run_all(kind: Kind, params: Any, noise: Array, sizes: Sizes) -> dict[Setting, tuple]:
    """By setting: samples ``[repeats, n, d]``, the least seconds of a call, evaluations of the
    field.

    Calls that are measured are the calls that are timed, in turns: a round gives every setting one
    sample.
    """
    todo, samples, seconds, counts = settings(sizes), {}, {}, {}
    for setting in todo:
        jax.block_until_ready(draw(kind, setting, params, noise[0]))  # compiles
        samples[setting], seconds[setting], counts[setting] = [], math.inf, 0
    for part, setting in itertools.product(noise, todo):
        jax.effects_barrier()
        before, start = _evaluated, time.perf_counter()
        samples[setting].append(jax.block_until_ready(draw(kind, setting, params, part)))
        seconds[setting] = min(seconds[setting], time.perf_counter() - start)
        jax.effects_barrier()
        counts[setting] += _evaluated - before
    return {
        setting: (
            jnp.stack(samples[setting]),
            seconds[setting],
            setting.evaluations or round(counts[setting] / len(noise)),
        )
        for setting in todo
    }


def measure(case: Case, kind: Kind, params: Any, floor: float, sizes: Sizes) -> Rows:
    """The rows of one problem and field."""
    shape = (sizes.repeats, sizes.sample_size, case.problem.dim)
    noise, target = (
        jax.random.normal(jax.random.key(6), shape),
        exact_pairs(case, sizes, 7, sizes.repeats),
    )
    keys, rows = jax.random.split(jax.random.key(8), sizes.repeats), []
    for setting, (samples, seconds, evaluations) in _run_all(kind, params, noise, sizes).items():
        rows.append(
            {
                "problem": case.problem.name,
                "path": kind.path_name,
                "field": kind.name,
                "solver": setting.name,
                "evaluations": evaluations,
                "ratio to floor": float(distance(keys, samples, target)) / floor,
                "ms": 1e3 * seconds,
            }
        )
    return rows


def default(path_name: str) -> tuple[str, int]:
    """Solver and evaluations that QIPO draws actions with if nothing is said."""
    model = GenerativeModel.from_config(QIPOConfig(path=path_name))
    solver = "dpmpp2" if model.solver == "dpmpp" else model.solver
    return solver, model.sample_steps * stages(solver)


def _group(rows: Rows, *columns: str) -> dict[tuple, Rows]:
    found: dict[tuple, Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def _excess(rows: Rows) -> dict[tuple[str, int], float]:
    """By solver and evaluations: the ratio over the best one of a problem, where that is largest."""
    worst: dict[tuple[str, int], list[float]] = {}
    groups = _group(rows, "problem")
    for group in groups.values():
        best = min(row["ratio to floor"] for row in group)
        for row in group:
            how = row["solver"], row["evaluations"]
            worst.setdefault(how, []).append(row["ratio to floor"] / best)
    # dopri5's evaluations differ from problem to problem: no setting of it is in all of them.
    return {how: max(found) for how, found in worst.items() if len(found) == len(groups)}


def cheapest(rows: Rows) -> Rows:
    """For each problem, path and field, and for all problems at once: the fewest evaluations that suffice."""
    found = []
    for (path_name, field), group in _group(rows, "path", "field").items():
        parts = {name: part for (name,), part in _group(group, "problem").items()}
        if len(parts) > 1:
            parts["all of them"] = group
        for name, part in parts.items():
            excess = _excess(part)
            enough = [how for how, value in excess.items() if value <= _AS_GOOD]
            row = {
                "problem": name,
                "path": path_name,
                "field": field,
                "evaluations": None,
                "solver": None,
            }
            if enough:
                fewest = min(evaluations for _, evaluations in enough)
                solver, _ = min((how for how in enough if how[1] == fewest), key=excess.__getitem__)
                row |= {
                    "evaluations": fewest,
                    "solver": solver,
                    "its ratio to the best": excess[solver, fewest],
                }
            solver, evaluations = default(path_name)
            row["default"] = f"{solver}, {evaluations}"
            found.append(row | {"default's ratio to the best": excess.get((solver, evaluations))})
    return found


def run(quick: bool) -> dict[str, Rows]:
    """Both tables."""
    sizes, rows = QUICK if quick else Sizes(), []
    for name in sizes.problems:
        case = make_case(name, sizes.components)
        fields = [(Kind("exact", path_name), case.guided) for path_name in sizes.exact_paths]
        floor = noise_floor(case, sizes)
        for dtype in sizes.dtypes:
            fields.append(train(case, dataclasses.replace(sizes.training, dtype=dtype)))
        for kind, params in fields:
            rows += measure(case, kind, params, floor, sizes)
            print(f"sampling: {name}, {kind.path_name}, {kind.name}", file=sys.stderr, flush=True)
    return {
        f"Sampling: distance to exact samples over the noise floor, beta = {BETA:g}; "
        f"ms of {sizes.sample_size:,} samples": rows,
        f"Fewest evaluations within {_AS_GOOD:g} of the best ratio that any solver reaches": cheapest(
            rows
        ),
    }
