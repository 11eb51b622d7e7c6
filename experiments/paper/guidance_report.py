"""The tables and figures of experiments/paper/guidance_comparison.py, made from its units."""

import csv
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from efm_jax.envs import mean_and_interval
from experiments.paper.toy2d import Problem, problems

Rows = list[dict]

# What the paper's Table 1 says of each method: exact for beta other than 1, no auxiliary model.
_METHODS = {
    "cg": ("classifier (CG)", "no", "no", "#ee6677"),
    "cfg": ("classifier-free (CFG)", "no", "yes", "#ccbb44"),
    "cep": ("contrastive energy (CEP)", "yes", "no", "#228833"),
    "ed": ("energy-weighted diffusion (ED)", "yes", "yes", "#aa3377"),
    "efm_ot": ("energy-weighted flow, OT (EFM)", "yes", "yes", "#4477aa"),
    "efm_cosine": ("energy-weighted flow, cosine (EFM)", "yes", "yes", "#66ccee"),
    "exact_cg": ("exact field of CG (eq. 4.6)", "no", "", "#ee6677"),
    "exact_ot": ("exact field, OT", "yes", "", "#999999"),
    "exact_cosine": ("exact field, cosine", "yes", "", "#999999"),
    "exact_vp": ("exact field, VP", "yes", "", "#999999"),
}
_DISTANCES = {
    "sliced_w2": "sliced Wasserstein-2",
    "mmd": "MMD",
    "energy": "error of the mean energy",
}
_GOAL_LEARNED, _GOAL_EXACT, _LEAST_ESS = 1.25, 1.05, 50.0


def write(output: pathlib.Path) -> None:
    """Write ``results.csv``, ``table.md`` and the figures beside ``units/``.

    Args:
      output: the folder of the comparison; units that are missing are left out.

    Raises:
      ValueError: if no unit is done.
    """
    files = sorted((output / "units").glob("*-*.json"))
    rows = [
        row
        for file in files
        if not file.name.startswith("tmp-")
        for row in json.loads(file.read_text())
    ]
    if not rows:
        raise ValueError(f"{output}: no unit of the comparison is done yet")
    order = list(_METHODS)
    names = [name for name in problems() if any(row["problem"] == name for row in rows)]
    rows.sort(
        key=lambda row: (
            names.index(row["problem"]),
            order.index(row["method"]),
            row["beta"],
            row["seed"],
        )
    )
    _write_csv(output / "results.csv", rows)
    cost_file = output / "cost.json"
    cost = json.loads(cost_file.read_text()) if cost_file.exists() else None
    (output / "table.md").write_text(_tables(rows, names, cost))
    _ratio_figure(rows, names).savefig(output / "ratios.png")
    for name in names:
        if problems()[name].dim == 2:
            _sample_figure(output, problems()[name], rows).savefig(output / f"samples_{name}.png")
    print(
        f"wrote {output / 'results.csv'}, {output / 'table.md'} and the figures ({len(files)} "
        "units)"
    )


def _write_csv(path: pathlib.Path, rows: Rows) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def _tables(rows: Rows, names: Sequence[str], cost: Rows | None) -> str:
    betas = sorted({row["beta"] for row in rows})
    seeds = len({row["seed"] for row in rows})
    parts = [
        "## Over all problems",
        "Ratio of the sliced Wasserstein-2 distance to its noise floor, mean over problems and "
        f"{seeds} seeds (95% interval over seeds). The first two columns are the paper's Table 1.",
        _summary_table(rows, betas),
        "## Likelihood",
        "Standard deviation, over exact samples of q, of log q - log p + beta E in nats (0: "
        "exactly guided), "
        "median over problems and seeds; and on the mixtures the mean absolute error of log q "
        "against the "
        "closed form, with the exact divergence and with Hutchinson's estimate of one probe.",
        _likelihood_table(rows, betas),
    ]
    if cost is not None:
        parts += [
            "## Cost",
            "Parameters of all networks evaluated to sample and of those that only guide; times "
            "taken in "
            "turns in one process, to train what one scale needs and to draw samples, relative to "
            "ED.",
            _cost_table(cost),
        ]
    for key, label in _DISTANCES.items():
        parts += [
            f"## Every problem: {label}, ratio to its floor (half width of the 95% interval over "
            "seeds)"
        ]
        for name in names:
            parts += [
                f"**{name}**",
                _problem_table([r for r in rows if r["problem"] == name], betas, key),
            ]
    parts += ["## Goals", _goals(rows)]
    return "\n\n".join(parts) + "\n"


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _methods(rows: Rows) -> list[str]:
    return [method for method in _METHODS if any(row["method"] == method for row in rows)]


def _values(rows: Rows, key: str, **wanted: str | float) -> list[float]:
    return [row[key] for row in rows if key in row and all(row[k] == v for k, v in wanted.items())]


def _by_seed(rows: Rows, key: str, **wanted: str | float) -> list[float]:
    """The mean of each seed's rows."""
    seeds = sorted({row["seed"] for row in rows})
    found = [_values(rows, key, seed=seed, **wanted) for seed in seeds]
    return [float(np.mean(values)) for values in found if values]


def _summary_table(rows: Rows, betas: Sequence[float]) -> str:
    def cell(method: str, beta: float) -> str:
        mean, low, high = mean_and_interval(
            _by_seed(rows, "sliced_w2_ratio", method=method, beta=beta)
        )
        return f"{mean:.2f} ({low:.2f} to {high:.2f})"

    header = [
        "guidance",
        "exact for beta ≠ 1",
        "no auxiliary model",
        *(f"beta = {beta:g}" for beta in betas),
    ]
    lines = (
        [*_METHODS[method][:3], *(cell(method, beta) for beta in betas)]
        for method in _methods(rows)
    )
    return _markdown(header, lines)


def _cost_table(cost: Rows) -> str:
    base = next(row for row in cost if row["method"] == "ed")
    lines = [
        [
            _METHODS[row["method"]][0],
            str(row["parameters"]),
            str(row["auxiliary_parameters"]),
            *(f"{row[key] / base[key]:.2f}" for key in ("train_seconds", "sample_seconds")),
        ]
        for row in cost
    ]
    return _markdown(
        ["guidance", "parameters", "auxiliary", "training time", "sampling time"], lines
    )


def _likelihood_table(rows: Rows, betas: Sequence[float]) -> str:
    lines = []
    for method in _methods(rows):
        if not _values(rows, "log_ratio_std", method=method):
            continue
        cells = [_values(rows, "log_ratio_std", method=method, beta=beta) for beta in betas if beta]
        cells += [
            _values(rows, key, method=method) for key in ("log_q_error", "log_q_error_hutchinson")
        ]
        lines.append(
            [_METHODS[method][0], *(f"{np.median(cell):.3f}" if cell else "" for cell in cells)]
        )
    scales = (f"beta = {beta:g}" for beta in betas if beta)
    return _markdown(["guidance", *scales, "error of log q", "with Hutchinson's estimate"], lines)


def _problem_table(rows: Rows, betas: Sequence[float], distance: str) -> str:
    def cell(method: str, beta: float) -> str:
        mean, _, high = mean_and_interval(
            _by_seed(rows, f"{distance}_ratio", method=method, beta=beta)
        )
        return f"{mean:.2f} ± {high - mean:.2f}"

    lines = [
        [_METHODS[method][0], *(cell(method, beta) for beta in betas)] for method in _methods(rows)
    ]
    ess = [f"{np.mean(_values(rows, 'batch_ess', beta=beta)):.0f}" for beta in betas]
    return _markdown(
        ["guidance", *(f"beta = {beta:g}" for beta in betas)], [*lines, ["ESS of a batch", *ess]]
    )


def _goals(rows: Rows) -> str:
    """Which cells of the exact fields and of the energy-weighted methods are beyond the goals."""
    cells = sorted({(row["method"], row["problem"], row["beta"]) for row in rows})
    missed, counted = [], {"learned": [0, 0], "exact": [0, 0]}
    for method, problem, beta in cells:
        kind = "exact" if method.startswith("exact") else "learned"
        if method not in ("exact_ot", "exact_cosine", "exact_vp", "ed", "efm_ot", "efm_cosine"):
            continue
        where = {"method": method, "problem": problem, "beta": beta}
        if (
            kind == "learned"
            and beta > 10
            and np.mean(_values(rows, "batch_ess", **where)) <= _LEAST_ESS
        ):
            continue
        ratio = np.mean(_values(rows, "sliced_w2_ratio", **where))
        goal = _GOAL_EXACT if kind == "exact" else _GOAL_LEARNED
        counted[kind][0] += ratio <= goal
        counted[kind][1] += 1
        if ratio > goal:
            missed.append(f"- {_METHODS[method][0]}, {problem}, beta = {beta:g}: {ratio:.2f}")
    reached = [
        f"Exact fields at most {_GOAL_EXACT} x the floor: "
        f"{counted['exact'][0]} of {counted['exact'][1]} cells. "
        f"Energy-weighted methods at most {_GOAL_LEARNED} x the floor (beta <= 10, and beta = 20 "
        "where the "
        f"effective sample size of a batch is over {_LEAST_ESS:.0f}): "
        f"{counted['learned'][0]} of {counted['learned'][1]} cells."
    ]
    return "\n".join([*reached, "", "Missed:", "", *(missed or ["- none"])])


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _ratio_figure(rows: Rows, names: Sequence[str]) -> Figure:
    """The ratio against beta: a panel for each problem, a line for each method."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = _figure(4 * columns, 2.6 * lines + 0.8)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, names, strict=False):
        _draw_ratios(axes, [row for row in rows if row["problem"] == name])
        axes.set_title(name, fontsize=10)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("guidance scale beta", fontsize=10)
    figure.supylabel("sliced Wasserstein-2 / noise floor", fontsize=10)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8
    )
    return figure


def _draw_ratios(axes: Axes, rows: Rows) -> None:
    betas = sorted({row["beta"] for row in rows})
    for method in _methods(rows):
        seeds = np.array(
            [_by_seed(rows, "sliced_w2_ratio", method=method, beta=beta) for beta in betas]
        )
        label, _, _, color = _METHODS[method]
        style = "--" if method.startswith("exact") else "-"
        axes.plot(
            betas,
            seeds.mean(1),
            style,
            color=color,
            marker="o",
            markersize=3,
            linewidth=1.3,
            label=label,
        )
        axes.fill_between(betas, seeds.min(1), seeds.max(1), color=color, alpha=0.2, linewidth=0)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axhline(_GOAL_LEARNED, color="black", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.grid(alpha=0.25, linewidth=0.6)


def _sample_figure(output: pathlib.Path, problem: Problem, rows: Rows) -> Figure:
    """Samples of seed 0: a column for the truth and each method, a row for each guidance scale."""
    rows = [row for row in rows if row["problem"] == problem.name]
    betas = sorted({row["beta"] for row in rows})
    samples: dict[str, np.ndarray] = {}
    for file in sorted((output / "units").glob(f"{problem.name}-*-0.npz")):
        with np.load(file) as arrays:
            samples |= dict(arrays)
    methods = [m for m in _methods(rows) if m not in ("exact_cosine", "exact_vp")]
    columns: list[tuple[str, Callable[[float], np.ndarray]]] = [
        ("truth", lambda beta: problem.target(jax.random.key(0), 2000, beta)),
        *(
            (method, lambda beta, m=method: samples.get(f"{m}/{beta:g}", np.zeros((0, 2))))
            for method in methods
        ),
    ]
    figure = _figure(1.5 * len(columns), 1.5 * len(betas) + 0.4)
    panels = figure.subplots(len(betas), len(columns), squeeze=False)
    limit = float(np.abs(problem.target(jax.random.key(1), 2000, 0.0)).max()) * 1.1
    for row, beta in zip(panels, betas, strict=True):
        for axes, (_, draw) in zip(row, columns, strict=True):
            points = np.asarray(draw(beta))
            axes.plot(points[:, 0], points[:, 1], ",", color="#4477aa", alpha=0.6, rasterized=True)
            axes.set(
                xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal"
            )
        row[0].set_ylabel(f"beta = {beta:g}", fontsize=9)
    for axes, (title, _) in zip(panels[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    return figure
