"""Summarize a dataset: python -m launch.inspect --dataset=NAME_OR_FILE [--env=ID] [--plot=FILE.png]

Prints episodes, returns, scores, rewards, observations, the use of actions and what looks wrong,
then a line of JSON with all of the numbers.  --plot saves a picture of the distributions.
Exit status: 0 done, 2 bad flags or data.
"""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from efm_jax.data import BUILTIN_DATASET, DATASET_SOURCES, load_dataset, summarize
from efm_jax.data.summary_plot import draw_summary
from efm_jax.envs import dataset_references, normalized_score
from efm_jax.files import write_whole

from . import cli, datasets

FLAGS = cli.Flags(datasets.FLAGS)
_DATASET = FLAGS.string("dataset", BUILTIN_DATASET, f"One of\n{DATASET_SOURCES}")
_PLOT = FLAGS.string("plot", None, "A .png file for the picture, local or gs://.")

_STATS = ("min", "q25", "median", "mean", "q75", "max")
_MOST_DIMENSIONS = 12  # rows of a table on the screen; the JSON has all


def main(_: list[str]) -> int:
    """Read, summarize, draw."""
    with cli.usage_errors():
        if _PLOT.value is not None and not _PLOT.value.lower().endswith(".png"):
            raise ValueError(f"--plot: expected a path ending in .png; got {_PLOT.value!r}")
        datasets.allow_environments()
        dataset = load_dataset(
            _DATASET.value,
            env=datasets.ENV.value,
            folders=datasets.dataset_folders(),
            max_episode_steps=datasets.MAX_EPISODE_STEPS.value,
        )
        summary = summarize(dataset)
        references = dataset_references(dataset.reference_scores, dataset.name, dataset.env_spec)
        returns = summary["returns"]
        scores = {key: normalized_score(value, references) for key, value in returns.items()}
        summary["problems"] += dataset.notes
        summary |= {"references": references, "scores": None if references is None else scores}
        if _PLOT.value is not None:
            plot = epath.Path(_PLOT.value).expanduser()
            write_whole(plot, draw_summary(dataset, summary, references))
            summary["plot"] = str(plot)
    _print(summary)
    print("\n" + json.dumps(summary))
    return 0


def _print(summary: dict[str, Any]) -> None:
    ends, rewards, actions = summary["ends"], summary["rewards"], summary["actions"]
    print(f"dataset       {summary['dataset']}")
    print(f"environment   {summary['environment'] or 'none named'}")
    print(f"transitions   {summary['transitions']:,}")
    print(
        f"episodes      {summary['episodes']:,}; trajectories {ends['trajectories']:,}: "
        f"{ends['terminated']:,} end terminated, {ends['truncated']:,} truncated; "
        f"{ends['terminated_share']:.1%} have a terminated step"
    )
    if rewards["values"] is None:
        print(f"rewards       {rewards['zero_share']:.1%} are 0")
    else:
        print(f"rewards       only {', '.join(f'{value:g}' for value in rewards['values'])}")
    print(f"copies        {summary['copies']:,} transitions equal an earlier one")
    print(f"actions       {actions['any_at_bounds']:.1%} have a dimension at a bound")

    print("\n" + _row("", _STATS))
    for name in ("lengths", "returns", "scores", "rewards"):
        if summary[name] is not None:
            print(_row(name, [_short(summary[name][key]) for key in _STATS]))
    if summary["scores"] is None:
        print(f"{'scores':<14}  no reference returns are known")

    _print_columns("action", actions, ("low", "high", "min", "max", "mean", "std", "at_bounds"))
    _print_columns("observation", summary["observations"], ("min", "max", "mean", "std"))

    print(f"\nproblems      {'none found' if not summary['problems'] else ''}")
    for problem in summary["problems"]:
        print(f"  - {problem}")
    if "plot" in summary:
        print(f"\nplot          {summary['plot']}")


def _print_columns(title: str, columns: dict[str, Any], names: tuple[str, ...]) -> None:
    """Print a row for each dimension."""
    print("\n" + _row(title, [name.replace("_", " ") for name in names]))
    for i in range(min(columns["size"], _MOST_DIMENSIONS)):
        print(_row(str(i), [_short(columns[name][i]) for name in names]))
    if columns["size"] > _MOST_DIMENSIONS:
        print(f"  and {columns['size'] - _MOST_DIMENSIONS} more dimensions")


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:<14}" + "".join(f"{cell:>11}" for cell in cells)


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


command = cli.command(main, FLAGS)

if __name__ == "__main__":
    command()
