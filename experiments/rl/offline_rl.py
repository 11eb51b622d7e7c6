"""QIPO beside the policies it will be compared with, on the same behavior models and critics.

    python -m experiments.rl.offline_rl [--datasets=pendulum,hopper=ID_OR_FILE,...] [--methods=...]
        [--seeds=3] [--shard=I/N] [--out=runs/offline_rl] [--stages=FOLDER] [--smoke] [--report]

Every dataset is of a family (its environment's), and every family has one preset; a method is that
preset with a few fields changed (``METHODS``).  For every dataset the behavior model of each path
and each critic are trained once, for all seeds in one program, and shared by the methods, which
differ in their policy phase alone.  All are evaluated on the same episodes, during the policy phase
and at its end.

``--out`` gets returns.csv (every episode of every evaluation), renewals.csv (what every renewal
logs), stages/ (trained behavior models and critics) and, from ``--report`` or at the end, table.md,
summary.json and figures.  What is in returns.csv is not computed again; N processes with
--shard=0/N ... share one folder.  Aggregates are rliable's (the extra ``study``): interquartile
mean with stratified bootstrap intervals, performance profiles, probability of improvement (Agarwal
et al. 2021, arXiv 2108.13264).
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from efm_jax.rl.config import QIPOConfig
from experiments.rl import offline_rl_report
from experiments.rl.study import Study, make_parser, parse_datasets, parse_names, total_beta

_VP = {"path": "vp", "solver": "dpmpp", "sample_steps": 20}  # docs/performance.md: 10 are too few
# Fields that a method changes in its family's preset.  Those that tilt once do it as far as QIPO in
# the end.
METHODS: dict[str, Callable[[QIPOConfig], dict[str, Any]]] = {
    "bc": lambda c: {"policy": "bc"},
    "bc-diff": lambda c: {"policy": "bc", **_VP},
    "best-of-n": lambda c: {"policy": "bc", "action_selection": "best"},
    "gaussian": lambda c: {"policy": "gaussian", "beta": 3.0},  # the temperature of IQL's authors
    "reweight": lambda c: {"policy": "reweight", "beta": total_beta(c)},
    "qgpo": lambda c: {"policy": "qgpo", "beta": total_beta(c), **_VP},
    "qipo-ot": lambda c: {},
    "qipo-diff": lambda c: dict(_VP),
}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing of this shard, then the report."""
    parser = make_parser(__doc__, "runs/offline_rl")
    parser.add_argument("--datasets", default="pendulum", help="name=ID_OR_FILE,...")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--shard", default="0/1", help="I/N: this process takes every N-th dataset")
    args = parser.parse_args(argv)
    methods = parse_names(parser, "--methods", args.methods, METHODS)
    study = Study.from_args(args)
    index, count = map(int, args.shard.split("/"))
    datasets = [] if args.report else list(parse_datasets(args.datasets).items())[index::count]
    for name, source in datasets:
        try:
            problem = study.load(name, source)
        except ValueError as error:
            parser.error(f"--datasets: {error}")
        for method in methods:
            changed = METHODS[method](problem.config)
            study.run(problem, method, dataclasses.replace(problem.config, **changed).validate())
    offline_rl_report.write(study.rows(), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
