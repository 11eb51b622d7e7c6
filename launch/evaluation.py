"""Evaluation as both entry points do it: the same episodes for behavior model and policy."""

import json
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

from efm_jax.envs import Rollouts, evaluate, mean_and_interval, normalized_score
from efm_jax.runs.workdir import RunInfo

# Far from the seeds that recordings use.
_FIRST_EPISODE_SEED = 1_000_000


def episode_seeds(count: int) -> list[int]:
    """Environment seeds of evaluation episodes; a longer list begins with the shorter one."""
    return list(range(_FIRST_EPISODE_SEED, _FIRST_EPISODE_SEED + count))


def check_environment(env_spec: str, observation_size: int, action_size: int) -> None:
    """Play one step, so that what is missing shows before hours of training.

    Raises:
      ValueError: if the environment cannot be made or does not fit the data.
    """

    def act(observations: np.ndarray, _: int) -> np.ndarray:
        if observations.shape[-1] != observation_size:
            raise ValueError(
                f"environment {env_id(env_spec)}: expected observations of size "
                f"{observation_size}, "
                f"as in the dataset; got {observations.shape[-1]}"
            )
        return np.zeros((1, 1, action_size), np.float32)

    evaluate(act, env_spec, episode_seeds=[0], max_steps=1)


def env_id(env_spec: str) -> str:
    """The id in an ``EnvSpec``'s JSON."""
    return EnvSpec.from_json(env_spec).id


def summarize(info: RunInfo, rollouts: dict[str, Rollouts]) -> dict[str, Any]:
    """Means over seeds of each policy's mean return, their intervals and scores, as JSON values.

    An interval is over training seeds where there are several, otherwise over episodes.
    """
    summary: dict[str, Any] = {}
    for name, rollout in rollouts.items():
        samples = rollout.returns.mean(axis=1) if info.num_seeds > 1 else rollout.returns[0]
        mean, low, high = mean_and_interval(samples)
        summary[f"{name}_return"] = mean
        summary[f"{name}_interval"] = [low, high]
        summary[f"{name}_score"] = score(info, mean)
    return summary


def score(info: RunInfo, value: float) -> float | None:
    """A return as a normalized score, None where no reference exists."""
    result = normalized_score(value, info.reference_scores)
    return None if result is None else float(result)


def print_report(info: RunInfo, summary: dict[str, Any], line: dict[str, Any]) -> None:
    """A small table for people, then one line of JSON for programs."""
    over = f"{info.num_seeds} seeds" if info.num_seeds > 1 else "episodes"
    print(f"\n{'':<10} {'return':>10}  {'95% interval over ' + over:>30}  {'score':>7}")
    rows = [("dataset", info.dataset_return, None, score(info, info.dataset_return))]
    for name in ("behavior", "policy"):
        rows.append(
            (name, *(summary[f"{name}_{part}"] for part in ("return", "interval", "score")))
        )
    for name, value, interval, points in rows:
        between = "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
        shown = "" if points is None else f"{points:.1f}"
        print(f"{name:<10} {value:>10.1f}  {between:>30}  {shown:>7}")
    print("\n" + json.dumps(line))
