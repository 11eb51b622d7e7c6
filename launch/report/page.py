"""The page of a report: one HTML document that needs nothing else."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from efm_jax import __version__
from launch.report import plots as report_plots
from launch.report.html import Child, Html, join, table, tag
from launch.report.runs import VIDEO_SUFFIXES, Evaluation, Run
from launch.report.style import CSS

# What the names in metrics.csv mean; others are shown without.
_METRICS = {
    "loss": "Training loss of the phase.",
    "steps_per_second": "Gradient steps per second since the last logged point.",
    "grad_norm": "Norm of the gradient before clipping.",
    "q_mean": "Mean Q-value of the batch's data actions.",
    "v_mean": "Mean state value of the batch.",
    "q_data": "Mean Q-value of the data's actions.",
    "q_support": "Mean Q-value of the sampled support actions.",
    "q_weighted": "Mean Q-value under the support weights.",
    "q_spread": "Standard deviation of Q over a state's sampled actions, mean over states.",
    "ess": "Effective sample size of a state's support weights, mean over states.",
    "ess_low": "Effective sample size that a tenth of the states are below.",
    "top_weight": "Largest support weight of a state, mean over states.",
}
_WEIGHT_METRICS = ("ess", "ess_low", "top_weight")
# A file is a third larger inside the page; beyond this, browsers get slow.
_MAX_VIDEO_BYTES = 50_000_000
# Nothing is loaded and no script runs, whatever a file of a run may hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
_DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_DIFFERS = "\N{NOT EQUAL TO}"


def build_page(runs: Sequence[Run], date: str) -> str:
    """The document.

    Args:
      runs: in the order of their colors.
      date: when it was made, as the reader is to see it.
    """
    sections = [
        ("results", "Results", _results(runs)),
        ("comparison", "Comparison of runs", _comparison(runs)),
        ("returns", "Returns", _returns(runs)),
        ("videos", "Videos", _videos(runs)),
        ("weights", "Effective sample sizes", _weights(runs)),
        *(
            (f"phase-{i}", f"Curves: {phase}", _curves(runs, phase))
            for i, phase in enumerate(_phases(runs))
        ),
        ("data", "Data", _data(runs)),
        ("configuration", "Configuration", _configuration(runs)),
    ]
    shown = [(anchor, title, body) for anchor, title, body in sections if body is not None]
    count = f"{len(runs)} runs" if len(runs) > 1 else "one run"
    title = f"{', '.join(run.name for run in runs[:3])}{', ...' if len(runs) > 3 else ''}: report"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", f"Report of {count}"),
            tag("p", f"Made {date} by efm_jax {__version__}, launch.report.", class_="soft"),
            tag("nav", [tag("a", text, href=f"#{anchor}") for anchor, text, _ in shown],
                aria_label="Sections"),
        ),
        tag(
            "main",
            [
                tag("section", tag("h2", title, id=f"{anchor}-title"), body, id=anchor,
                    aria_labeledby=f"{anchor}-title")
                for anchor, title, body in shown
            ],
        ),
    )  # fmt: skip
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _results(runs: Sequence[Run]) -> Html:
    return join(
        tag(
            "article",
            tag("h3", _label(index, run)),
            tag("p", _progress(run)),
            tag("p", _outcome(run)),
            tag("p", f"Work directory {run.workdir}", class_="soft"),
            class_="run",
            style=f"--tone: {report_plots.run_color(index)}",
        )
        for index, run in enumerate(runs)
    )


def _progress(run: Run) -> Child:
    """What was trained on what, and how far."""
    first, count = run.info["seed"], run.info["num_seeds"]
    seeds = f"seed {first}" if count == 1 else f"{count} seeds ({first} to {first + count - 1})"
    start = f"{run.algorithm} on {run.info['dataset']}, {seeds}, "
    if run.result is not None:
        seconds = _took(run)
        took = "" if seconds is None else f"; its last start took {_seconds(seconds)}"
        return f"{start}{_count(run.steps)} gradient steps{took}."
    if run.progress is None:
        return [
            start,
            tag("strong", "unfinished", class_="warning"),
            ": nothing has been logged yet.",
        ]
    phase, step, total = run.progress
    planned = run.config.get(f"{phase}_steps")
    of = f" of {_count(planned)}" if isinstance(planned, int) else ""
    where = f": step {_count(step)}{of} of phase {phase} is logged, {_count(total)} gradient steps in all."
    return [start, tag("strong", "unfinished", class_="warning"), where]


def _outcome(run: Run) -> Child:
    """What the policies reach, in a sentence or two."""
    found = [run.last(policy) for policy in _policies([run])]
    if not found:
        return "No policy has been evaluated yet."
    parts = [f"{_policy_name(each.policy)}: mean return {_mean_in_words(each)}." for each in found]
    text = " ".join(parts)
    dataset = run.info.get("dataset_return")
    if dataset is not None:
        score = run.score(dataset)
        points = "" if score is None else f" (score {_number(score)})"
        text += f" The dataset's mean return is {_number(dataset)}{points}."
    return text


def _mean_in_words(evaluation: Evaluation) -> str:
    mean, low, high = evaluation.interval
    over = evaluation.interval_of
    interval = "one episode, no interval" if over is None else (
        f"95% interval {_number(low)} to {_number(high)} {over}"
    )  # fmt: skip
    episodes = "" if over is None or over == f"over {evaluation.episodes} episodes" else (
        f", {evaluation.episodes} episodes"
    )  # fmt: skip
    score = "" if evaluation.score is None else f", score {_number(evaluation.score)}"
    return f"{_number(mean)}{score} ({interval}{episodes})"


def _comparison(runs: Sequence[Run]) -> Html:
    policies = _policies(runs)
    head = ["run", "dataset", "algorithm", "seeds", "steps"]
    fixed = len(head)
    for policy in policies:
        head += [f"{policy} return", "score"]
    head.append("seconds")
    best = _best(runs, policies)
    rows = []
    for index, run in enumerate(runs):
        cells: list[Child] = [
            _label(index, run),
            run.info["dataset"],
            run.algorithm,
            str(run.info["num_seeds"]),
        ]
        unfinished = tag("div", "unfinished", class_="soft") if run.result is None else None
        cells.append([_count(run.steps), unfinished])
        for policy in policies:
            evaluation = run.last(policy)
            if evaluation is None:
                cells += [_DASH] * 2
                continue
            mean, low, high = evaluation.interval
            number = _number(mean)
            below = [f"{evaluation.episodes} episode{'s' if evaluation.episodes > 1 else ''}"]
            if evaluation.interval_of is not None:
                below.insert(0, f"{_number(low)} to {_number(high)}")
            highest = tag("strong", number) if (index, policy) in best else number
            cells.append([highest, [tag("div", line, class_="soft") for line in below]])
            cells.append(_number(evaluation.score))
        cells.append(_number(_took(run)))
        rows.append((None, cells))
    caption = (
        "Last evaluation of every policy: mean return, below it the 95% interval, over training "
        "seeds where "
        "a run has several, otherwise over episodes."
    )
    if best:
        caption += " Bold: the highest mean on the same data; runs whose intervals overlap are not told apart by it."
    numbers = [3, 4, *range(fixed, len(head))]
    return join([table(head, rows, caption=caption, numbers=numbers), _differences(runs)])


def _best(runs: Sequence[Run], policies: Iterable[str]) -> set[tuple[int, str]]:
    """Run and policy of the highest mean return where several runs have the same data and environment."""
    best = set()
    for policy in policies:
        means: dict[tuple, list[tuple[float, int]]] = {}
        for index, run in enumerate(runs):
            evaluation = run.last(policy)
            if evaluation is not None:
                means.setdefault(_data_key(run), []).append((evaluation.interval[0], index))
        best |= {(max(found)[1], policy) for found in means.values() if len(found) > 1}
    return best


def _returns(runs: Sequence[Run]) -> Html:
    """Figures for each environment, whose returns can be compared, and all numbers."""
    if not any(run.evaluations for run in runs):
        return tag("p", "No policy has been evaluated yet.")
    parts: list[Child] = [
        _legend({index: run for index, run in enumerate(runs) if run.evaluations})
    ]
    environments = list(dict.fromkeys(run.environment for run in runs if run.evaluations))
    for environment in environments:
        here = {
            i: run
            for i, run in enumerate(runs)
            if run.environment == environment and run.evaluations
        }
        datasets = {
            run.info["dataset_return"]: run.info["dataset"]
            for run in here.values()
            if run.info.get("dataset_return") is not None
        }
        lines = "; ".join(f"{name} {_number(value)}" for value, name in datasets.items())
        dotted = f" Dotted: mean return of the data ({lines})." if lines else ""
        if len(environments) > 1:
            parts.append(tag("h3", environment))
        parts.append(
            tag(
                "figure",
                tag("h4", "Evaluations"),
                report_plots.returns_over_steps(here, list(datasets)),
                tag(
                    "figcaption",
                    "Mean return with its 95% interval at every evaluation; squares: "
                    f"behavior.{dotted}",
                ),
                class_="broad",
            )
        )
        last = [
            (index, run, evaluation)
            for index, run in here.items()
            for policy in _policies([run])
            for evaluation in [run.last(policy)]
        ]
        parts.append(
            tag(
                "figure",
                tag("h4", "Every episode of the last evaluation"),
                report_plots.return_distribution(last, list(datasets)),
                tag(
                    "figcaption",
                    "A point is an episode, its shape the training seed; the box holds the middle "
                    "half, "
                    f"its line is the median. Diamond: mean with 95% interval.{dotted}",
                ),
                class_="broad",
            )
        )
    rows = []
    for index, run in enumerate(runs):
        for each in run.evaluations:
            mean, low, high = each.interval
            interval = _DASH if each.interval_of is None else f"{_number(low)} to {_number(high)}"
            cells = [
                _label(index, run), each.policy, _count(each.total_step), _number(mean), interval,
                each.interval_of or _DASH, _number(each.score), str(each.episodes), _number(each.mean_length),
            ]  # fmt: skip
            rows.append((None, cells))
    head = [
        "run", "policy", "step", "return", "95% interval", "interval", "score", "episodes", "mean length",
    ]  # fmt: skip
    parts.append(table(head, rows, caption="All evaluations.", numbers=[2, 3, 4, 6, 7, 8]))
    return join(parts)


def _videos(runs: Sequence[Run]) -> Html | None:
    figures = []
    for index, run in enumerate(runs):
        for name, content in run.videos.items():
            kind = next(kind for suffix, kind in VIDEO_SUFFIXES.items() if name.endswith(suffix))
            if len(content) > _MAX_VIDEO_BYTES:
                megabytes = len(content) / 1e6
                media = tag(
                    "p", f"{megabytes:.0f} MB: too large to be part of this page.", class_="warning"
                )
            else:
                source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
                alt = f"{name}: an episode of run {run.name} in {run.environment}"
                if kind.startswith("video"):
                    media = tag(
                        "video", alt, src=source, controls=True, loop=True, muted=True, playsinline=True,
                        preload="metadata", aria_label=alt,
                    )  # fmt: skip
                else:
                    media = tag("img", src=source, alt=alt)
            figures.append(
                tag(
                    "figure",
                    tag("h4", _label(index, run)),
                    media,
                    tag("figcaption", f"{name}, {run.environment}"),
                )
            )
    return tag("div", figures, class_="grid") if figures else None


def _weights(runs: Sequence[Run]) -> Html | None:
    parts: list[Child] = []
    shown: dict[int, Run] = {}
    for phase in _phases(runs):
        found = {
            index: (run, metrics)
            for index, run in enumerate(runs)
            if set(metrics := run.phases.get(phase, {})) & set(_WEIGHT_METRICS)
        }
        figure = report_plots.ess(found, f"{phase} step")
        if figure is None:
            continue
        shown |= {index: run for index, (run, _) in found.items()}
        facts = []
        for run, _ in found.values():
            support, renew = run.config.get("support_size"), run.config.get("renew_every")
            if support is not None and renew is not None:
                facts.append(
                    f"{run.name}: {support} sampled actions and the data's, renewed every {renew} "
                    "steps"
                )
        caption = (
            "Left, thick: mean over states of the effective sample size; thin: the value that a "
            "tenth of the "
            "states are below (ess_low). One means that a single action carries all the weight. "
            "Right: mean "
            f"of the largest weight. Values change at renewals. {'; '.join(facts)}."
        )
        parts.append(
            tag(
                "figure",
                tag("h4", f"phase {phase}"),
                figure,
                tag("figcaption", caption),
                class_="broad",
            )
        )
    return join([_legend(dict(sorted(shown.items()))), parts]) if parts else None


def _curves(runs: Sequence[Run], phase: str) -> Html:
    """A figure for every metric that a run has logged in a phase."""
    here = {index: run for index, run in enumerate(runs) if phase in run.phases}
    cards = []
    for name in dict.fromkeys(name for run in here.values() for name in run.phases[phase]):
        found = {
            index: (run, run.phases[phase][name])
            for index, run in here.items()
            if name in run.phases[phase]
        }
        notes: list[Child] = [_METRICS.get(name)]
        missing = [run.name for index, run in here.items() if index not in found]
        if missing:
            notes.append(f" Not logged by {', '.join(missing)}.")
        for run, curve in found.values():
            if curve.non_finite:
                text = f"{run.name}: {curve.non_finite} values that are not finite are not drawn."
                notes += [" ", tag("span", text, class_="warning")]
        figure = report_plots.curves(name, found, f"{phase} step")
        cards.append(
            tag(
                "figure",
                tag("h4", name),
                tag("p", "No finite value.") if figure is None else figure,
                tag("figcaption", notes),
            )
        )
    several = max(run.info["num_seeds"] for run in here.values()) > 1
    intro = (
        tag("p", "Thick: mean over training seeds; thin: single seeds.", class_="soft")
        if several
        else None
    )
    return join([_legend(here), intro, tag("div", cards, class_="grid")])


def _data(runs: Sequence[Run]) -> Html:
    groups: dict[tuple, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(_data_key(run), []).append(index)
    columns = []
    for indices in groups.values():
        run = runs[indices[0]]
        info = run.info
        mean, references = info.get("dataset_return"), info.get("reference_scores")
        columns.append(
            {
                "used by": join([tag("div", _label(index, runs[index])) for index in indices]),
                # One file has several paths.
                "dataset": ", ".join(
                    dict.fromkeys(runs[index].info["dataset"] for index in indices)
                ),
                "fingerprint": tag("code", info["fingerprint"])
                if info.get("fingerprint")
                else None,
                "transitions": _count(info.get("transitions")),
                "mean return of its episodes": _number(mean),
                "score of its mean return": _number(None if mean is None else run.score(mean)),
                "return of score 0 (random)": _number(references[0])
                if references
                else "no reference",
                "return of score 100 (expert)": _number(references[1])
                if references
                else "no reference",
                "environment": run.environment,
                "observation size": _count(info.get("observation_size")),
                "action size": _count(info.get("action_size")),
            }
        )
    rows = [(None, [name, *(column[name] or _DASH for column in columns)]) for name in columns[0]]
    head = [
        "",
        *(
            f"dataset {number}" if len(columns) > 1 else "value"
            for number in range(1, len(columns) + 1)
        ),
    ]
    return table(
        head, rows, caption="The data as the runs found it, after the limit max_transitions."
    )


def _fields(runs: Sequence[Run]) -> tuple[list[dict[str, str]], list[str], set[str]]:
    """Each run's configuration as texts, the names of all fields, and those that differ between runs."""
    fields = [
        dict(
            _flatten(
                {k: run.info[k] for k in ("version", "seed", "num_seeds") if k in run.info}
                | run.config
            )
        )
        for run in runs
    ]
    names = list(dict.fromkeys(name for each in fields for name in each))
    return fields, names, {name for name in names if len({each.get(name) for each in fields}) > 1}


def _differences(runs: Sequence[Run]) -> Html | None:
    if len(runs) < 2:
        return None
    fields, names, differing = _fields(runs)
    if not differing:
        return tag("p", "The configurations are equal.")
    rows = [
        (None, [name, *(each.get(name, _DASH) for each in fields)])
        for name in names
        if name in differing
    ]
    head = ["field", *(_label(index, run) for index, run in enumerate(runs))]
    found = table(head, rows, caption="Fields of the configuration that differ.")
    return tag("div", tag("h3", "What differs"), found, class_="config")


def _configuration(runs: Sequence[Run]) -> Html:
    fields, names, differing = _fields(runs)
    rows = [
        (
            "differs" if name in differing else None,
            [
                f"{name} {_DIFFERS}" if name in differing else name,
                *(each.get(name, _DASH) for each in fields),
            ],
        )
        for name in names
    ]
    head = ["field", *(_label(index, run) for index, run in enumerate(runs))]
    caption = (
        f"All fields; those that differ are marked {_DIFFERS}." if differing else "All fields."
    )
    return tag("div", table(head, rows, caption=caption), class_="config")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _phases(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(phase for run in runs for phase in run.phases))


def _policies(runs: Sequence[Run]) -> list[str]:
    """Names of evaluated policies."""
    return list(dict.fromkeys(each.policy for run in runs for each in run.evaluations))


def _took(run: Run) -> float | None:
    """Seconds of the process that ended the run: earlier ones that were interrupted are not in it."""
    seconds = None if run.result is None else run.result.get("seconds")
    return seconds if isinstance(seconds, (int, float)) else None


def _policy_name(policy: str) -> str:
    return {"behavior": "Behavior model", "policy": "Improved policy"}.get(policy, policy)


def _data_key(run: Run) -> tuple:
    """Equal for runs whose returns and data are the same."""
    return (
        run.info.get("fingerprint") or run.info["dataset"],
        run.info.get("transitions"),
        run.environment,
    )


def _label(index: int, run: Run) -> Html:
    return join([report_plots.swatch(index), run.name])


def _legend(runs: Mapping[int, Run]) -> Html:
    """Of the runs that a section shows, by their index."""
    return tag("ul", [tag("li", _label(i, run)) for i, run in runs.items()], class_="legend")


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.1f}".replace("-", _MINUS)


def _count(value: int | None) -> str:
    return _DASH if value is None else f"{value:,}"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} minutes" if value < 7200 else f"{value / 3600:.1f} hours"
