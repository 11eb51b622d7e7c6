"""The end of training and evaluation, as a user sees it."""

from typing import Any

from efm_jax.envs import normalized_score
from efm_jax.files import to_json
from efm_jax.runs.evaluation import POLICIES
from efm_jax.runs.workdir import RunInfo


def print_report(info: RunInfo, line: dict[str, Any]) -> None:
    """Print a small table for people, then the line of JSON for programs."""
    over = f"{info.num_seeds} seeds" if info.num_seeds > 1 else "episodes"
    known = any(line[f"{name}_success"] is not None for name in POLICIES)
    title = f"\n{'':<10} {'return':>10}  {'95% interval over ' + over:>30}  {'score':>7}"
    print(title + ("  success" if known else ""))
    dataset_score = normalized_score(info.dataset_return, info.reference_scores)
    rows = [("dataset", info.dataset_return, None, dataset_score, None)]
    parts = ("return", "interval", "score", "success")
    for name in POLICIES:
        rows.append((name, *(line[f"{name}_{part}"] for part in parts)))
    one = max(info.num_seeds, line.get("episodes", info.config.eval_episodes)) == 1
    for name, value, interval, score, success in rows:
        # A single episode tells nothing of how far the mean may be from it.
        between = "" if one or interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
        shown = "" if score is None else f"{score:.1f}"
        rate = "" if success is None else f"  {success:>7.1%}"
        print(f"{name:<10} {value:>10.1f}  {between:>30}  {shown:>7}{rate}")
    print("\n" + to_json(line))
