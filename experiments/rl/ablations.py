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
once, as ``base``.  All seeds train in one program and arms share seeds, behavior model, critic and
episodes, so an arm is compared with the base seed by seed.  ``--out`` gets returns.csv,
renewals.csv and stages/ (see experiments/rl/study.py; ``--stages`` takes those of a study with the
same presets and seeds) and table.md, ablations.csv and ablations.png.  What is in returns.csv is
not computed again; once the base is in it, processes with different ``--only`` may share the
folder.
"""

import dataclasses
import itertools
import sys
from typing import Any

from efm_jax.rl.config import QIPOConfig
from experiments.rl import ablations_normalizers, ablations_report
from experiments.rl.ablations_report import BASE
from experiments.rl.study import (
    Problem,
    Progress,
    Study,
    make_parser,
    parse_datasets,
    parse_names,
    total_beta,
)

CRITIC_FRACTIONS = (0.01, 0.1, 0.3)
Arms = dict[str, dict[str, Any]]


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
    samplers = {
        f"{solver} {steps}": {"solver": solver, "sample_steps": steps, **acting}
        for solver, steps in (("euler", 5), ("euler", 10), ("euler", 40), ("midpoint", 5))
    }
    early = {
        f"{share:.0%}": {"critic_steps": max(round(share * c.critic_steps), 1)}
        for share in CRITIC_FRACTIONS
    }
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
            "batch": {"policy": ablations_normalizers.QIPO_BATCH, **full},
            "dataset": {"policy": ablations_normalizers.QIPO_DATASET, **full},
            "reweight, batch": {"policy": ablations_normalizers.REWEIGHT_BATCH, **once},
            "reweight, dataset": {"policy": "reweight", **once},
        },
    }


ABLATIONS = tuple(all_arms(QIPOConfig()))


def plan(
    base: QIPOConfig, names: list[str], limit: int | None = None
) -> tuple[dict[str, QIPOConfig], list[tuple[str, str, str]]]:
    """Find the configurations that are run, and the one of every arm.

    Args:
      base: the preset.
      names: of the ablations.
      limit: arms of each ablation, by default all.

    Returns:
      ``{method: configuration}``, the preset first, and ``(ablation, arm, method)`` of every arm.
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


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then the report."""
    parser = make_parser(__doc__, "runs/ablations")
    parser.add_argument(
        "--dataset", default="pendulum", help="NAME=ID_OR_FILE; pendulum is the built-in one"
    )
    parser.add_argument("--only", default=",".join(ABLATIONS))
    args = parser.parse_args(argv)
    names = parse_names(parser, "--only", args.only, ABLATIONS)
    datasets = parse_datasets(args.dataset)
    if len(datasets) > 1:
        parser.error(f"--dataset: expected one; got {len(datasets)}")
    ((name, source),) = datasets.items()
    study = Study.from_args(args)
    try:
        problem = study.load(name, source)
        configs, labels = plan(problem.config, names, 2 if args.smoke else None)
    except ValueError as error:
        parser.error(f"--dataset: {error}")
    if not args.report:
        run(study, problem, configs)
    ablations_report.write(study.rows(), name, labels, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
