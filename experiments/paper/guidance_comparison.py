"""How exact is each guidance method?  Table 1 and Figure 1 of the paper as measurements.

Methods x problems x guidance scales: train on samples of p, draw samples, and measure how far they
are from exact samples of q ∝ p exp(-beta E).  Every distance is reported as a ratio to its noise
floor, the same distance between two independent exact samples of that size; 1.0 cannot be told from
the truth.

    python -m experiments.paper.guidance_comparison --output=runs/guidance  # stopped, it continues
    python -m experiments.paper.guidance_comparison --smoke                 # one problem

One unit of work is a problem, a seed and a family of methods; each is written when it is done, and
processes with different --problems may share the folder.  The last step, also on its own as
--report, makes results.csv, table.md and the figures from the units.

Distances, on 1000 samples at a time, as means over repeats: sliced Wasserstein-2 (128 directions),
MMD (mean of Gaussian kernels with bandwidths sqrt(d) / 4, sqrt(d) / 2, sqrt(d)), and the error of
the mean energy.  Likelihood: the standard deviation over exact samples of q of
log q - log p + beta E, which exact guidance keeps constant, and for mixtures the error of log q
against the closed form.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import textwrap
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd

from efm_jax import sampling
from efm_jax.distances import mmd, sliced_wasserstein
from efm_jax.envs import mean_and_interval
from efm_jax.files import write_whole
from efm_jax.types import Array
from efm_jax.weights import effective_sample_size, energy_weights
from experiments import figures, results
from experiments.paper.guidance_methods import FAMILIES, Guided, Task, Training, oracles
from experiments.paper.toy2d import Problem, problems

ORACLE = "exact"
UNITS = "units"
SHOWN_SAMPLES = 2000
# Densities are integrated up to here from either end: the score of the linear VP path is singular
# at t = 0, and the OT path's does not give a velocity at t = 1.  The noise that is left is far
# below the data's.
_ENDS_MARGIN = 1e-3


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a comparison."""

    training: Training = dataclasses.field(default_factory=Training)
    betas: tuple[float, ...] = (0.0, 1.0, 3.0, 5.0, 10.0, 20.0)
    seeds: int = 3
    sample_size: int = 1000  # of each of the two samples that a distance compares
    repeats: int = 16  # pairs of samples for each model
    floor_repeats: int = 64  # pairs of exact samples for the noise floor
    sample_steps: int = 40  # of DPM-Solver++ of order 2
    oracle_points: int = 512  # finite data of the exact fields
    likelihood_points: int = 256
    likelihood_steps: int = 16  # of RK4
    cost_rounds: int = 4  # 0 measures no cost


SMOKE = Settings(
    Training(hidden_dims=(32, 32), batch_size=128, num_steps=100), betas=(0.0, 5.0), seeds=1,
    sample_size=250, repeats=4, floor_repeats=8, sample_steps=10, oracle_points=256,
    likelihood_points=64, likelihood_steps=8, cost_rounds=0,
)  # fmt: skip
SMOKE_PROBLEMS = ("mixture_2d",)

# The columns are what the paper's Table 1 says of each method.
_METHODS = pd.DataFrame(
    {
        "cg": ("classifier (CG)", "no", "no"),
        "cfg": ("classifier-free (CFG)", "no", "yes"),
        "cep": ("contrastive energy (CEP)", "yes", "no"),
        "ed": ("energy-weighted diffusion (ED)", "yes", "yes"),
        "efm_ot": ("energy-weighted flow, OT (EFM)", "yes", "yes"),
        "efm_cosine": ("energy-weighted flow, cosine (EFM)", "yes", "yes"),
        "monte_carlo": ("training-free Monte Carlo (MC)", "in the limit", "yes"),
        "exact_cg": ("exact field of CG (eq. 4.6)", "no", ""),
        "exact_ot": ("exact field, OT", "yes", ""),
        "exact_cosine": ("exact field, cosine", "yes", ""),
        "exact_vp": ("exact field, VP", "yes", ""),
    },
    index=["label", "exact for beta ≠ 1", "no auxiliary model"],
).T
_WEIGHTED, _EXACT = ("ed", "efm_ot", "efm_cosine"), ("exact_ot", "exact_cosine", "exact_vp")
_DISTANCES = {"sliced_w2": "sliced Wasserstein-2", "mmd": "MMD"}
_DISTANCES |= {"energy": "error of the mean energy"}
_LOG_Q_ERRORS = {"log_q_error": "error of log q"}
_LOG_Q_ERRORS |= {"log_q_error_hutchinson": "with Hutchinson's estimate"}
_GOAL_LEARNED, _GOAL_EXACT, _LEAST_ESS = 1.25, 1.05, 50.0

_TEXT = """## Over all problems

Ratio of the sliced Wasserstein-2 distance to its noise floor, mean over problems and {seeds} \
seeds (95% interval over seeds). The first two columns are the paper's Table 1.

{summary}

## Likelihood

Standard deviation, over exact samples of q, of log q - log p + beta E in nats (0: exactly \
guided), median over problems and seeds; and on the mixtures the mean absolute error of log q \
against the closed form, with the exact divergence and with Hutchinson's estimate of one probe.

{likelihood}

{cost}{problems}

## Goals

{goals}
"""
_COST = """## Cost

Parameters of all networks evaluated to sample and of those that only guide; times taken in turns \
in one process, to train what one scale needs and to draw samples, relative to ED.

"""


class Measure:
    """Distances to exact samples of one problem, and their noise floors."""

    def __init__(
        self, problem: Problem, settings: Settings, target: Callable[[Array, int, float], Array]
    ):
        self._problem, self._settings, self._target = problem, settings, target
        self.floor = functools.cache(self._floor)

    def distances(self, key: Array, samples: Array, beta: float) -> dict[str, float]:
        """Distances of ``samples [repeats * sample_size, d]`` to exact ones: means over repeats."""
        exact_key, measure_key = jax.random.split(key)
        return self._means(measure_key, samples, self._target(exact_key, len(samples), beta))

    def _floor(self, beta: float) -> dict[str, float]:
        """The same distances between exact samples."""
        *keys, measure_key = jax.random.split(jax.random.key(7), 3)
        size = self._settings.floor_repeats * self._settings.sample_size
        return self._means(measure_key, *(self._target(key, size, beta) for key in keys))

    def _means(self, key: Array, x: Array, y: Array) -> dict[str, float]:
        shape = (-1, self._settings.sample_size, self._problem.dim)
        x, y = x.reshape(shape), y.reshape(shape)
        found = _pair_distances(jax.random.split(key, len(x)), x, y)
        found["energy"] = abs(self._problem.energy(x).mean(1) - self._problem.energy(y).mean(1))
        return {name: float(values.mean()) for name, values in found.items()}


@jax.jit
def _pair_distances(keys: Array, x: Array, y: Array) -> dict[str, Array]:
    def one(pair: tuple[Array, Array, Array]) -> dict[str, Array]:
        return {"sliced_w2": sliced_wasserstein(*pair), "mmd": mmd(*pair[1:])}

    return jax.lax.map(one, (keys, x, y))


def run_unit(
    problem: Problem, family: str, seed: int, settings: Settings, measure: Measure
) -> tuple[list[dict], dict]:
    """Train, sample and measure one of :data:`FAMILIES`, or :data:`ORACLE`, on one problem.

    Returns:
      Rows, one for each method and scale, and some samples of each under ``method/beta``.
    """
    # The same key, so the same data and initial weights, for all families of a problem and seed.
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(problem.name.encode()))
    train_key, data_key, noise_key, measure_key, point_key = jax.random.split(root, 5)
    noise = jax.random.normal(noise_key, (settings.repeats * settings.sample_size, problem.dim))
    if family == ORACLE:
        models, target = oracles(problem, settings.betas, settings.oracle_points, data_key)
        if problem.mixture is None:
            measure = Measure(problem, settings, target)  # the finite data are the truth here
    else:
        models = FAMILIES[family](Task(problem, settings.betas, settings.training, train_key))
    plain = {model.method: model for model in models if model.beta == 0}
    rows, shown = [], {}
    for index, model in enumerate(models):
        samples = _sample(model, settings.sample_steps, noise)
        row = {"problem": problem.name, "method": model.method, "beta": model.beta, "seed": seed}
        floor = measure.floor(model.beta)
        distances = measure.distances(jax.random.fold_in(measure_key, index), samples, model.beta)
        for name, value in distances.items():
            row |= {name: value, f"{name}_floor": floor[name], f"{name}_ratio": value / floor[name]}
        row["batch_ess"] = _batch_ess(problem, model.beta, settings.training.batch_size)
        if family != ORACLE or problem.mixture is not None:  # finite data have no density
            row |= _likelihood(model, plain[model.method], problem, settings, point_key)
        rows.append(row)
        shown[f"{model.method}/{model.beta:g}"] = np.asarray(samples[:SHOWN_SAMPLES])
    return rows, shown


@functools.partial(jax.jit, static_argnums=1)
def _sample(model: Guided, num_steps: int, noise: Array) -> Array:
    return sampling.sample_dpmpp(model.score, model.path, noise, num_steps=num_steps)


def _batch_ess(problem: Problem, beta: float, batch_size: int) -> float:
    """Mean effective sample size of the weights of a training batch."""
    energy = problem.energy(problem.sample(jax.random.key(11), 64 * batch_size))
    return float(effective_sample_size(energy_weights(energy.reshape(64, -1), beta)).mean())


def _likelihood(
    model: Guided, plain: Guided, problem: Problem, settings: Settings, key: Array
) -> dict[str, float]:
    """How constant ``log q - log p + beta E`` is on samples of q; errors of a known log q."""
    point_key, probe_key = jax.random.split(key)
    x = problem.target(point_key, settings.likelihood_points, model.beta)
    steps = settings.likelihood_steps
    log_q = _log_density(model, steps, x)
    defect = log_q - _log_density(plain, steps, x) + model.beta * problem.energy(x)
    found = {"log_ratio_std": defect.std()}
    if problem.mixture is not None:
        exact = problem.mixture.guided(problem.energy, model.beta).log_density(x)
        estimate = _log_density(model, steps, x, probe_key)
        found["log_q_error"] = abs(log_q - exact).mean()
        found["log_q_error_hutchinson"] = abs(estimate - exact).mean()
    return {name: float(value) for name, value in found.items()}


@functools.partial(jax.jit, static_argnums=1)
def _log_density(model: Guided, num_steps: int, x: Array, key: Array | None = None) -> Array:
    def velocity(x: Array, t: Array) -> Array:
        return model.path.velocity_from_score(model.score(x, t), x, t)

    times = {"t_start": _ENDS_MARGIN, "t_end": 1 - _ENDS_MARGIN}
    return sampling.log_likelihood(velocity, x, key=key, num_steps=num_steps, solver="rk4", **times)


def run(
    output: pathlib.Path, settings: Settings, names: Sequence[str], families: Sequence[str]
) -> None:
    """Run the units that are not there yet."""
    wanted, path = json.loads(json.dumps(dataclasses.asdict(settings))), output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ValueError(f"{path}: holds other settings; expected {wanted}; choose another folder")
    write_whole(path, json.dumps(wanted, indent=1))
    units = list(itertools.product(range(settings.seeds), names, families))
    found = problems()
    measures = {name: Measure(found[name], settings, found[name].target) for name in names}
    for index, (seed, name, family) in enumerate(units):
        stem = output / UNITS / f"{name}-{family}-{seed}"
        if stem.with_suffix(".json").exists():
            continue
        start = time.perf_counter()
        rows, shown = run_unit(found[name], family, seed, settings, measures[name])
        if seed == 0:
            results.write_arrays(stem.with_suffix(".npz"), shown)
        # The rows come last, because a unit is done when they are there.
        write_whole(stem.with_suffix(".json"), json.dumps(rows, indent=1))
        seconds = time.perf_counter() - start
        print(f"{index + 1}/{len(units)} {stem.name}: {seconds:.0f} s", flush=True)
    cost = output / "cost.json"
    if settings.cost_rounds > 0 and set(families) >= set(FAMILIES) and not cost.exists():
        table = measure_cost(found[names[0]], settings)
        write_whole(cost, table.to_json(orient="records", indent=1))


def measure_cost(problem: Problem, settings: Settings) -> pd.DataFrame:
    """The least time of a method in rounds that all take in turns in one process.

    Training is of 300 steps of all that one guidance scale needs, sampling of one call.
    """
    steps = min(300, settings.training.num_steps)
    training = dataclasses.replace(settings.training, num_steps=steps)
    noise = jax.random.normal(jax.random.key(0), (settings.sample_size, problem.dim))
    rows = []
    for _, family in itertools.product(range(settings.cost_rounds), FAMILIES):
        for model in FAMILIES[family](Task(problem, (0.0,), training, jax.random.key(0))):
            sample = _sample.lower(model, settings.sample_steps, noise).compile()
            start = time.perf_counter()
            jax.block_until_ready(sample(model, noise))
            seconds = model.train_seconds, time.perf_counter() - start
            rows.append((model.method, model.num_params, model.num_auxiliary, *seconds))
    sizes, times = ["parameters", "auxiliary_parameters"], ["train_seconds", "sample_seconds"]
    table = pd.DataFrame(rows, columns=["method", *sizes, *times])
    return table.groupby("method", sort=False, as_index=False).min()


def _override(part: Any, arguments: argparse.Namespace) -> Any:
    """The dataclass with the fields that the command line gives."""
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(part)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v}
    return dataclasses.replace(part, **given)


def report(output: pathlib.Path) -> None:
    """Write ``results.csv``, ``table.md`` and the figures beside ``units/``, of what is done.

    Raises:
      ValueError: if no unit is done.
    """
    files = sorted((output / UNITS).glob("*-*.json"))
    rows = pd.DataFrame([row for file in files for row in json.loads(file.read_text())])
    if rows.empty:
        raise ValueError(f"{output}: no unit of the comparison is done yet")
    for name, order in (("problem", list(problems())), ("method", _METHODS.index)):
        rows[name] = pd.Categorical(rows[name], order, ordered=True)
    rows = rows.sort_values(["problem", "method", "beta", "seed"])
    write_whole(output / "results.csv", rows.to_csv(index=False, float_format="%.6g"))
    rows = rows.reindex(columns=rows.columns.union(["log_ratio_std", *_LOG_Q_ERRORS]))
    text = _TEXT.format(
        seeds=rows["seed"].nunique(),
        summary=_summary(rows),
        likelihood=_likelihoods(rows),
        cost=_cost(output / "cost.json"),
        problems="\n\n".join(_every_problem(rows, *each) for each in _DISTANCES.items()),
        goals=_goals(rows),
    )
    write_whole(output / "table.md", text)
    _draw_ratios(output / "ratios.png", rows)
    for name, here in rows.groupby("problem", observed=True):
        if problems()[name].dim == 2:
            _draw_samples(output, problems()[name], here)
    print(f"wrote {output}/results.csv, {output}/table.md and the figures ({len(files)} units)")


def _markdown(table: pd.DataFrame) -> str:
    """A row for each method; columns that are numbers are guidance scales."""
    table = table.rename(columns=lambda name: name if isinstance(name, str) else _scale(name))
    table.index = pd.Index([_METHODS["label"].get(m, m) for m in table.index], name="guidance")
    return table.fillna("").to_markdown(disable_numparse=True)


def _scale(beta: float) -> str:
    return f"beta = {beta:g}"


def _cells(rows: pd.DataFrame, column: str, form: Callable[..., str]) -> pd.DataFrame:
    """``form(mean, low, high)`` over seeds of the mean over problems: methods by scales."""
    seeds = rows.groupby(["method", "beta", "seed"], observed=True)[column].mean()
    cells = seeds.groupby(["method", "beta"], observed=True)
    return cells.apply(lambda values: form(*mean_and_interval(values))).unstack("beta")


def _summary(rows: pd.DataFrame) -> str:
    cells = _cells(rows, "sliced_w2_ratio", "{:.2f} ({:.2f} to {:.2f})".format)
    return _markdown(_METHODS.drop(columns="label").join(cells, how="inner"))


def _likelihoods(rows: pd.DataFrame) -> str:
    known = rows.dropna(subset="log_ratio_std")
    methods = known.groupby("method", observed=True)
    scales = known[known["beta"] > 0].groupby(["method", "beta"], observed=True)
    medians = scales["log_ratio_std"].median().unstack("beta")
    errors = methods[list(_LOG_Q_ERRORS)].median().rename(columns=_LOG_Q_ERRORS)
    table = errors.join(medians)[[*medians, *errors]]
    return _markdown(table.map("{:.3f}".format, na_action="ignore"))


def _cost(file: pathlib.Path) -> str:
    if not file.exists():
        return ""
    cost = pd.read_json(file).set_index("method")
    seconds = cost[["train_seconds", "sample_seconds"]]
    times = (seconds / seconds.loc["ed"]).map("{:.2f}".format)
    table = cost[["parameters", "auxiliary_parameters"]].astype(str).join(times)
    table.columns = ["parameters", "auxiliary", "training time", "sampling time"]
    return f"{_COST}{_markdown(table)}\n\n"


def _every_problem(rows: pd.DataFrame, distance: str, label: str) -> str:
    heading = f"{label}, ratio to its floor (half width of the 95% interval over seeds)"
    parts = [f"## Every problem: {heading}"]
    for name, here in rows.groupby("problem", observed=True):
        cells = _cells(here, f"{distance}_ratio", lambda m, _, high: f"{m:.2f} ± {high - m:.2f}")
        ess = here.groupby("beta")["batch_ess"].mean().map("{:.0f}".format)
        cells.index = cells.index.astype(str)
        cells.loc["ESS of a batch"] = ess
        parts += [f"**{name}**", _markdown(cells)]
    return "\n\n".join(parts)


def _goals(rows: pd.DataFrame) -> str:
    """Which cells of the exact fields and of the energy-weighted methods are beyond the goals."""
    cells = rows.groupby(["method", "problem", "beta"], observed=True)
    cells = cells[["sliced_w2_ratio", "batch_ess"]].mean().reset_index()
    exact = cells["method"].isin(_EXACT)
    learned = cells["method"].isin(_WEIGHTED)
    learned &= (cells["beta"] <= 10) | (cells["batch_ess"] > _LEAST_ESS)
    reached = cells["sliced_w2_ratio"] <= np.where(exact, _GOAL_EXACT, _GOAL_LEARNED)
    missed = [
        f"- {_METHODS['label'][c.method]}, {c.problem}, {_scale(c.beta)}: {c.sliced_w2_ratio:.2f}"
        for c in cells[(exact | learned) & ~reached].itertuples()
    ]
    return (
        f"Exact fields at most {_GOAL_EXACT} x the floor: {reached[exact].sum()} of {exact.sum()} "
        f"cells. Energy-weighted methods at most {_GOAL_LEARNED} x the floor (beta <= 10, and "
        f"beta = 20 where the effective sample size of a batch is over {_LEAST_ESS:.0f}): "
        f"{reached[learned].sum()} of {learned.sum()} cells.\n\nMissed:\n\n"
    ) + "\n".join(missed or ["- none"])


def _draw_ratios(path: pathlib.Path, rows: pd.DataFrame) -> None:
    """The ratio against beta, mean and range over seeds: a panel for each problem."""
    betas, of_problem = sorted(rows["beta"].unique()), rows.groupby("problem", observed=True)
    shape = len(of_problem), 3, (4, 2.6), 0.8
    with figures.panels(path, *shape, sharex=True, sharey=True) as (figure, panels):
        for axes, (name, here) in zip(panels, of_problem, strict=True):
            for method, line in here.groupby("method", observed=True):
                ratio = line.groupby("beta")["sliced_w2_ratio"].agg(["mean", "min", "max"])
                style = {"color": figures.METHODS[method], "label": _METHODS["label"][method]}
                style["linestyle"] = "--" if method.startswith("exact") else "-"
                figures.banded(axes, ratio.index, *ratio.to_numpy().T, **style, markersize=3)
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.axhline(_GOAL_LEARNED, color="black", linewidth=0.8, linestyle=":")
            axes.set(title=name, yscale="log")
            axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
            axes.minorticks_off()
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
        figure.supxlabel("guidance scale beta")
        figure.supylabel("sliced Wasserstein-2 / noise floor")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)


def _draw_samples(output: pathlib.Path, problem: Problem, rows: pd.DataFrame) -> None:
    """Samples of seed 0: a column for the truth and each method, a row for each guidance scale."""
    betas = sorted(rows["beta"].unique())
    methods = [m for m in rows["method"].unique() if m not in ("exact_cosine", "exact_vp")]
    samples: dict[str, np.ndarray] = {}
    for file in sorted((output / UNITS).glob(f"{problem.name}-*-0.npz")):
        samples |= results.read_arrays(file)
    limit = float(np.abs(problem.target(jax.random.key(1), 2000, 0.0)).max()) * 1.1
    window = {"xlim": (-limit, limit), "ylim": (-limit, limit), "xticks": [], "yticks": []}
    names = [textwrap.fill(_METHODS["label"][m].split(" (")[0], 19) for m in methods]
    size = 1.5 * (1 + len(methods)), 1.5 * len(betas) + 0.6
    with figures.drawn(output / f"samples_{problem.name}.png", *size) as figure:
        panels = figure.subplots(len(betas), 1 + len(methods), squeeze=False)
        for row, beta in zip(panels, betas, strict=True):
            samples[f"truth/{beta:g}"] = np.asarray(problem.target(jax.random.key(0), 2000, beta))
            columns = zip(row, ["truth", *methods], ["truth", *names], strict=True)
            for axes, method, name in columns:
                points = samples.get(f"{method}/{beta:g}", np.zeros((0, 2)))
                axes.plot(*points.T, ",", color=figures.COLORS["blue"], alpha=0.6)
                axes.set(**window, aspect="equal", title=name if beta == betas[0] else "")
            row[0].set_ylabel(_scale(beta))


def main() -> None:
    """Parse the command line, run what is left to do, report."""
    parser = results.make_parser(__doc__)
    parser.add_argument("--output", type=pathlib.Path, help="by default runs/guidance[-smoke]")
    parser.add_argument("--smoke", action="store_true", help="one problem, tiny networks")
    parser.add_argument("--problems", nargs="+", choices=list(problems()), metavar="NAME")
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES, ORACLE], metavar="NAME")
    parser.add_argument("--betas", nargs="+", type=float)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--hidden_dims", nargs="+", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--repeats", type=int, help="samples that each distance is a mean over")
    parser.add_argument("--report", action="store_true", help="only make the tables and figures")
    arguments = parser.parse_args()
    settings = _override(SMOKE if arguments.smoke else Settings(), arguments)
    training = _override(settings.training, arguments)
    settings = dataclasses.replace(settings, training=training)
    families = arguments.families or [*FAMILIES, ORACLE]
    names = arguments.problems or (SMOKE_PROBLEMS if arguments.smoke else list(problems()))
    folder = "guidance-smoke" if arguments.smoke else "guidance"
    output = arguments.output or pathlib.Path("runs", folder)
    if 0 not in settings.betas:
        parser.error("--betas: expected 0, the plain model, among the scales")
    try:
        if not arguments.report:
            run(output, settings, names, families)
        report(output)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
