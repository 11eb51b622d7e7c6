"""Table and figure of :mod:`experiments.rl.ablations`, from every episode's return."""

import pathlib

import pandas as pd

from efm_jax.envs import mean_and_interval
from efm_jax.files import write_whole
from experiments import figures
from experiments.rl.offline_rl_report import collect

BASE = "base"
DIFFERENCE = ["difference", "difference_low", "difference_high"]  # mean with its 95% interval
FIELDS = ["ablation", "arm", "score", "std", "best", *DIFFERENCE, "seconds"]


def arms(rows: pd.DataFrame, dataset: str, labels: list[tuple[str, str, str]]) -> pd.DataFrame:
    """Compare the finished arms, of ``(ablation, arm, method)`` in ``labels``, with the base.

    Returns:
      ``FIELDS``, where scores are means over seeds of the last and of the best evaluation, the
      difference is from the base, seed by seed, with its 95% interval, and seconds go to the end of
      the policy phase; and ``method`` and ``last``, the scores of all seeds.
    """
    rows = rows[rows["dataset"] == dataset]
    last, best, _ = collect(rows)
    last, best = (scores.droplevel("dataset").unstack("seed") for scores in (last, best))
    seconds = rows[rows["final"] == 1].groupby("method")["seconds"].max()
    found = []
    for ablation, arm, method in labels:
        if method in last.index and BASE in last.index:
            scores, differences = last.loc[method].dropna(), last.loc[method] - last.loc[BASE]
            std = scores.std() if len(scores) > 1 else 0.0
            values = ablation, arm, scores.mean(), std, best.loc[method].mean()
            values += *mean_and_interval(differences.dropna()), seconds[method]
            found.append([*values, method, scores.to_numpy()])
    return pd.DataFrame(found, columns=[*FIELDS, "method", "last"])


def table(found: pd.DataFrame) -> str:
    """Lay out a row for each arm; the preset's own in bold."""

    def cells(arm: pd.Series) -> list[str]:
        is_base, several = arm["method"] == BASE, len(arm["last"]) > 1
        name, difference = (f"**{arm['arm']}**", "") if is_base else (arm["arm"], "{:+.1f}")
        # One seed has no interval.
        interval = " [{:.1f}, {:.1f}]" if several and not is_base else ""
        score = "{score:.1f} ± {std:.1f}" if several else "{score:.1f}"
        return [
            name,
            score.format(**arm),
            f"{arm['best']:.1f}",
            (difference + interval).format(*arm[DIFFERENCE]),
            f"{arm['seconds']:.0f}",
        ]

    names = ["arm", "score", "best checkpoint", "less the base, 95% interval", "seconds"]
    text = found.apply(cells, axis=1, result_type="expand").set_axis(names, axis=1)
    text.insert(0, "", found["ablation"].mask(found["ablation"] == found["ablation"].shift(), ""))
    return text.to_markdown(index=False, disable_numparse=True)


def plot(found: pd.DataFrame, path: pathlib.Path) -> None:
    """Draw a panel for each ablation: scores of all seeds, their mean, and a line at the base's."""
    names = found["ablation"].unique()
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    base = found.loc[found["method"] == BASE, "score"]
    with figures.drawn(path, 3.4 * columns, 3.1 * lines) as figure:
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for name, axes in zip(names, panels.flat, strict=False):
            here = found[found["ablation"] == name]
            for i, arm in enumerate(here.itertuples()):
                color = figures.COLORS["red" if arm.method == BASE else "blue"]
                axes.plot([i] * len(arm.last), arm.last, ".", color=color, alpha=0.5)
                axes.plot(i, arm.score, "_", color=color, markersize=18, markeredgewidth=2.5)
            for score in base[:1]:
                axes.axhline(score, **figures.REFERENCE)
            long = here["arm"].str.len().max() > 4
            style = {"rotation": 40, "ha": "right"} if long else {}
            axes.set_xticks(range(len(here)), here["arm"], **style)
            axes.set(title=name, xlim=(-0.6, len(here) - 0.4))
        for axes in panels.flat[len(names) :]:
            axes.set_axis_off()
        figure.supylabel("normalized score")


def write(
    rows: pd.DataFrame, dataset: str, labels: list[tuple[str, str, str]], out: pathlib.Path
) -> None:
    """Write table.md, ablations.csv and ablations.png of what is finished."""
    found = arms(rows, dataset, labels)
    if found.empty:
        print("no arm is finished yet")
        return
    text = (
        f"{dataset}: mean score of {len(found['last'][0])} seeds (± standard deviation) at the "
        f"end; the preset is bold.\n\n{table(found)}\n"
    )
    write_whole(out / "table.md", text)
    write_whole(out / "ablations.csv", found[FIELDS].to_csv(index=False))
    plot(found, out / "ablations.png")
    print(text, end="")
