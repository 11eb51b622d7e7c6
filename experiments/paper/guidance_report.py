"""The tables and figures of experiments/paper/guidance_comparison.py, made from its units."""

import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pandas as pd

from efm_jax.envs import mean_and_interval
from efm_jax.files import write_whole
from experiments import figures
from experiments.paper.toy2d import Problem, problems

# The columns are what the paper's Table 1 says of each method.
_METHODS = pd.DataFrame(
    {
        "cg": ("classifier (CG)", "no", "no"),
        "cfg": ("classifier-free (CFG)", "no", "yes"),
        "cep": ("contrastive energy (CEP)", "yes", "no"),
        "ed": ("energy-weighted diffusion (ED)", "yes", "yes"),
        "efm_ot": ("energy-weighted flow, OT (EFM)", "yes", "yes"),
        "efm_cosine": ("energy-weighted flow, cosine (EFM)", "yes", "yes"),
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


def write(output: pathlib.Path) -> None:
    """Write ``results.csv``, ``table.md`` and the figures beside ``units/``.

    Args:
      output: the folder of the comparison; units that are missing are left out.

    Raises:
      ValueError: if no unit is done.
    """
    files = sorted((output / "units").glob("*-*.json"))
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
        likelihood=_likelihood(rows),
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


def _likelihood(rows: pd.DataFrame) -> str:
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
    parts = [
        f"## Every problem: {label}, ratio to its floor (half width of the 95% interval over seeds)"
    ]
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
    columns = min(3, len(of_problem))
    lines = -(-len(of_problem) // columns)
    with figures.drawn(path, 4 * columns, 2.6 * lines + 0.8) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (name, here) in zip(panels.flat, of_problem, strict=False):
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
        for axes in panels.flat[len(of_problem) :]:
            axes.set_visible(False)
        figure.supxlabel("guidance scale beta")
        figure.supylabel("sliced Wasserstein-2 / noise floor")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)


def _draw_samples(output: pathlib.Path, problem: Problem, rows: pd.DataFrame) -> None:
    """Samples of seed 0: a column for the truth and each method, a row for each guidance scale."""
    betas = sorted(rows["beta"].unique())
    methods = [m for m in rows["method"].unique() if m not in ("exact_cosine", "exact_vp")]
    samples: dict[str, np.ndarray] = {}
    for file in sorted((output / "units").glob(f"{problem.name}-*-0.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            samples |= dict(arrays)
    limit = float(np.abs(problem.target(jax.random.key(1), 2000, 0.0)).max()) * 1.1
    window = {"xlim": (-limit, limit), "ylim": (-limit, limit), "xticks": [], "yticks": []}
    size = 1.5 * (1 + len(methods)), 1.5 * len(betas) + 0.4
    with figures.drawn(output / f"samples_{problem.name}.png", *size) as figure:
        panels = figure.subplots(len(betas), 1 + len(methods), squeeze=False)
        for row, beta in zip(panels, betas, strict=True):
            samples[f"truth/{beta:g}"] = np.asarray(problem.target(jax.random.key(0), 2000, beta))
            for axes, method in zip(row, ["truth", *methods], strict=True):
                points = samples.get(f"{method}/{beta:g}", np.zeros((0, 2)))
                axes.plot(*points.T, ",", color=figures.COLORS["blue"], alpha=0.6)
                axes.set(**window, aspect="equal", title=method if beta == betas[0] else "")
            row[0].set_ylabel(_scale(beta))
