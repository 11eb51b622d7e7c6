"""How each choice of QIPO's policy phase changes its returns, on the same behavior and critic.

    python -m experiments.rl.ablations [--dataset=pendulum|NAME=ID_OR_FILE]
        [--only=m,renewals,...] [--seeds=3] [--out=runs/ablations] [--stages=FOLDER] [--smoke]
        [--report]

m           actions in a support set
renewals    how often they are redrawn, at equal policy steps: at equal beta, and at equal total
            (l + 1) beta
beta        the guidance scale of one renewal (of presets with ``target_ess``: that)
estimator   the full weighted sum of a state's actions, or one of them drawn by its weight
sampler     solver and steps that draw the support sets; every policy acts with the preset's
critic      the critic after 1%, 10% and 30% of its steps: checkpoints of one run
copies      as how many actions of a support set the data action counts
normalizer  what divides exp(beta Q): the sum over the state's actions, the batch's, the dataset's
            mean; and the same of the data's own actions alone (``reweight``)

An arm is its family's preset with the fields of one choice changed; what equals the preset is run
once, as ``base``.  Arms share seeds, behavior model, critic and episodes, so one is compared with
the base seed by seed.  ``--out`` gets table.md, ablations.csv, ablations.png and a study's files
(experiments/rl/study.py; ``--stages`` takes those of another with the same presets and seeds).
What is in returns.csv is not computed again; once the base is in it, processes with different
``--only`` may share the folder.
"""

import dataclasses
import itertools
import pathlib
import sys
from typing import Any

import pandas as pd

from efm_jax.envs import mean_and_interval
from efm_jax.files import write_whole
from efm_jax.rl.config import QIPOConfig
from experiments import figures
from experiments.results import parse_names
from experiments.rl import ablations_normalizers as normalizers
from experiments.rl.offline_rl import collect
from experiments.rl.study import Problem, Progress, Study, make_parser, parse_datasets, total_beta

BASE = "base"
DIFFERENCE = ["difference", "difference_low", "difference_high"]  # mean with its 95% interval
FIELDS = ["ablation", "arm", "score", "std", "best", *DIFFERENCE, "seconds"]
CRITIC_FRACTIONS = (0.01, 0.1, 0.3)
Arms = dict[str, dict[str, Any]]
Labels = list[tuple[str, str, str]]  # ablation, arm, method


def all_arms(c: QIPOConfig) -> dict[str, Arms]:
    """Make the arms of every ablation, in the order of tables and figures."""
    renewals: Arms = {}
    for periods in (1, 2, 4, 8):
        period = {"renew_every": -(-c.policy_steps // periods)}
        renewals[f"{periods}"] = period
        # A beta that follows the effective sample size has no total to keep.
        if not c.target_ess:
            renewals[f"{periods}, same total"] = {**period, "beta": total_beta(c) / periods}
    if c.target_ess:
        betas = {f"ESS {share:g}": {"target_ess": share} for share in (0.9, 0.7, 0.5, 0.3)}
    else:
        scales = [c.beta * factor for factor in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)]
        betas = {f"{beta:g}": {"beta": beta} for beta in scales}
    # How a policy acts is not what samplers are compared by.
    acting = {"eval_solver": c.solver if c.eval_solver == "same" else c.eval_solver}
    acting |= {"eval_sample_steps": c.eval_sample_steps or c.sample_steps}
    pairs = ("euler", 5), ("euler", 10), ("euler", 40), ("midpoint", 5)
    samplers = {f"{name} {n}": {"solver": name, "sample_steps": n, **acting} for name, n in pairs}
    stops = {share: max(round(share * c.critic_steps), 1) for share in CRITIC_FRACTIONS}
    early = {f"{share:.0%}": {"critic_steps": steps} for share, steps in stops.items()}
    # Sums over states need every action; in expectation the drawn one has the same gradient.
    full, once = {"estimator": "full"}, {"beta": total_beta(c)}
    return {
        "m": {f"{m}": {"support_size": m} for m in (1, 4, 16, 64)},
        "renewals": renewals,
        "beta": betas,
        "estimator": {name: {"estimator": name} for name in ("full", "resample")},
        "sampler": {f"preset: {c.solver} {c.sample_steps}": {}, **samplers},
        "critic": {**early, "100%": {}},
        "copies": {f"{copies:g}": {"data_copies": float(copies)} for copies in (0.01, 1, 4, 16)},
        "normalizer": {
            "state": full,
            "batch": {"policy": normalizers.QIPO_BATCH, **full},
            "dataset": {"policy": normalizers.QIPO_DATASET, **full},
            "reweight, batch": {"policy": normalizers.REWEIGHT_BATCH, **once},
            "reweight, dataset": {"policy": "reweight", **once},
        },
    }


ABLATIONS = tuple(all_arms(QIPOConfig()))


def plan(
    base: QIPOConfig, names: list[str], limit: int | None = None
) -> tuple[dict[str, QIPOConfig], Labels]:
    """Find ``{method: configuration}``, the preset first, and the method of every arm.

    With a ``limit`` these are only so many arms of each of the ablations ``names``.
    """
    configs, labels, arms = {BASE: base.validate()}, [], all_arms(base)
    for name in names:
        for arm, changed in itertools.islice(arms[name].items(), limit):
            config = dataclasses.replace(base, **changed).validate()
            same = (known for known, other in configs.items() if other == config)
            method = next(same, f"{name}={arm}")
            configs[method] = config
            labels.append((name, arm, method))
    return configs, labels


def run(study: Study, problem: Problem, configs: dict[str, QIPOConfig]) -> None:
    """Run every configuration on the base's behavior model, and its critic or an early one."""
    base, previous, progress = configs[BASE], None, Progress(problem.name, "stages")
    study.trained(problem, base, progress)
    for method, config in configs.items():
        stages, part = dataclasses.replace(base, critic_steps=config.critic_steps), ""
        if config.critic_steps != base.critic_steps:
            part = f"-{config.critic_steps}"
            study.trained(problem, stages, progress, part, after=previous)
            previous = part
        study.run(problem, method, config, stages, part)


def arms(rows: pd.DataFrame, dataset: str, labels: Labels) -> pd.DataFrame:
    """Find ``FIELDS`` of the finished arms, and ``method`` and ``last``, the scores of all seeds.

    Scores are means over seeds of the last and of the best evaluation, the difference is from the
    base, seed by seed, with its 95% interval, and seconds go to the end of the policy phase.
    """
    rows = rows[rows["dataset"] == dataset]
    last, best = (scores.droplevel("dataset").unstack("seed") for scores in collect(rows))
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
    is_base, several = found["method"] == BASE, found["last"].str.len() > 1
    score, spread = found["score"].map("{:.1f}".format), found["std"].map(" ± {:.1f}".format)
    less = found["difference"].map("{:+.1f}".format)
    low, high = (found[f"difference_{end}"].map("{:.1f}".format) for end in ("low", "high"))
    interval = " [" + low + ", " + high + "]"
    text = pd.DataFrame({
        "": found["ablation"].mask(found["ablation"] == found["ablation"].shift(), ""),
        "arm": found["arm"].mask(is_base, "**" + found["arm"] + "**"),
        "score": score + spread.where(several, ""),  # one seed has neither spread nor interval
        "best checkpoint": found["best"].map("{:.1f}".format),
        "less the base, 95% interval": (less + interval.where(several, "")).mask(is_base, ""),
        "seconds": found["seconds"].map("{:.0f}".format),
    })  # fmt: skip
    return text.to_markdown(index=False, disable_numparse=True)


def plot(found: pd.DataFrame, path: pathlib.Path) -> None:
    """Draw a panel for each ablation: scores of all seeds, their mean, and a line at the base's."""
    names = found["ablation"].unique()
    base = found.loc[found["method"] == BASE, "score"]
    with figures.panels(path, len(names), 4, (3.4, 3.1), sharey=True) as (figure, panels):
        for name, axes in zip(names, panels, strict=True):
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
        figure.supylabel("normalized score")


def report(rows: pd.DataFrame, dataset: str, labels: Labels, out: pathlib.Path) -> None:
    """Write table.md, ablations.csv and ablations.png of what is finished."""
    found = arms(rows, dataset, labels)
    if found.empty:
        print("no arm is finished yet")
        return
    text = f"{dataset}: mean score of {len(found['last'][0])} seeds (± standard deviation) "
    text += f"at the end; the preset is bold.\n\n{table(found)}\n"
    write_whole(out / "table.md", text)
    write_whole(out / "ablations.csv", found[FIELDS].to_csv(index=False))
    plot(found, out / "ablations.png")
    print(text, end="")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then the report."""
    parser = make_parser(__doc__, "runs/ablations")
    help_text = "NAME=ID_OR_FILE; pendulum is the built-in one"
    parser.add_argument("--dataset", default="pendulum", help=help_text)
    parser.add_argument("--only", default=",".join(ABLATIONS))
    args = parser.parse_args(argv)
    names = parse_names(parser, "--only", args.only, ABLATIONS)
    (name, source), *more = parse_datasets(args.dataset).items()
    if more:
        parser.error(f"--dataset: expected one; got {args.dataset!r}")
    study = Study.from_args(args)
    try:
        problem = study.load(name, source)
        configs, labels = plan(problem.config, names, 2 if args.smoke else None)
    except ValueError as error:
        parser.error(f"--dataset: {error}")
    if not args.report:
        run(study, problem, configs)
    report(study.rows(), name, labels, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
