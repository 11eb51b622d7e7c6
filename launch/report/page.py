"""The page of a report: one HTML document that needs nothing else."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from efm_jax import __version__

from . import plots
from .runs import ReportRun

_DASH, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def build_page(runs: Sequence[ReportRun], date: str) -> str:
    """Write the document.

    Args:
      runs: in the order of their colors.
      date: when it was made, as the reader is to see it.
    """
    environment = jinja2.Environment(
        # Template and style sheet are files of this package, also where it is installed.
        loader=jinja2.PackageLoader(__name__.removesuffix(".page"), ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "count": _count, "duration": _duration}
    # Metrics by phase, each with the runs that have logged it.
    phases: dict[str, dict[str, plots.FoundCurves]] = {}
    # Runs on the same data in the same environment.
    groups: dict[tuple, list[ReportRun]] = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
        for (phase, metric), curve in run.curves.items():
            phases.setdefault(phase, {}).setdefault(metric, []).append((run, curve))
    weighted = {
        phase: {metric: metrics[metric] for metric in plots.WEIGHTS if metric in metrics}
        for phase, metrics in phases.items()
    }
    return environment.get_template("report.html.j2").render(
        runs=runs,
        date=date,
        version=__version__,
        plots=plots,
        policies=list(dict.fromkeys(policy for run in runs for policy in run.last)),
        best=_best(runs),
        phases=phases,
        weighted={phase: found for phase, found in weighted.items() if found},
        runs_of=_runs_of,
        groups=list(groups.values()),
        fields=_fields(runs),
    )


def _best(runs: Sequence[ReportRun]) -> set[tuple[int, str]]:
    """Find run and policy of the highest mean return where several runs can be compared."""
    means = collections.defaultdict(list)
    for run in runs:
        for policy, evaluation in run.last.items():
            means[run.data, policy].append((evaluation.interval[0], run.index))
    return {(max(found)[1], policy) for (_, policy), found in means.items() if len(found) > 1}


def _runs_of(phases: Iterable[Mapping[str, plots.FoundCurves]]) -> list[ReportRun]:
    """List the runs that have logged a metric of some phases."""
    found = {run for metrics in phases for curves in metrics.values() for run, _ in curves}
    return sorted(found, key=lambda run: run.index)


def _fields(runs: Sequence[ReportRun]) -> list[dict[str, Any]]:
    """List every field of the configuration with its value in each run."""
    columns = [run.fields for run in runs]
    fields = []
    # A run without a plugin lacks its options.
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, _DASH) for column in columns]
        fields.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return fields


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.1f}".replace("-", _MINUS)


def _count(value: int | None) -> str:
    return _DASH if value is None else f"{value:,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
