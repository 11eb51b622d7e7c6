"""What is in a dataset, in numbers, and what looks wrong with it."""

import json
from typing import Any

import numpy as np

from efm_jax.data.dataset import Dataset
from efm_jax.data.preprocess import CONSTANT_TOLERANCE, fit_normalizer, named
from efm_jax.types import Transitions

# Numbers beyond these limits are unusual, not wrong; recordings of MuJoCo's locomotion tasks stay
# within.
_AT_BOUND = 1e-3  # distance from a bound, relative to that of the bounds, that counts as at it
_MANY_AT_BOUND = 0.5  # share of an action dimension
_NARROW = 0.1  # share of the interval between the bounds that an action dimension uses
_MANY_COPIES = 0.01  # share of the transitions
_MANY_SHORT = 0.01  # share of the episodes
_OUTLIER = 100.0  # standard deviations
_JUMP = 20.0  # times the 99th percentile of a dimension's steps
_SAMPLE = 100_000  # rows that percentiles of steps are taken of
_SPARSE = 3  # so many different rewards, or fewer


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Describe a whole dataset in numbers, all of them JSON values.

    ``min, q25, median, q75, max, mean`` are the keys of statistics over values.

    Returns:
      A dict of

      - ``dataset``, ``environment`` (an id or None), ``transitions``, ``episodes``;
      - ``lengths``, ``returns``: statistics over episodes, as the source counts them;
      - ``ends``: ``trajectories`` (runs of transitions each of which starts where the one before
        led), how many of them end ``terminated`` or ``truncated`` (all others: timeouts, and
        recordings that stop), ``terminated_steps`` and ``terminated_share``, the share of
        trajectories with a terminated step anywhere: the success rate where the environment ends
        at its goal;
      - ``rewards``: statistics over transitions, ``zero_share``, and ``values``, the list of all
        different rewards if they are few, else None;
      - ``observations``: ``size``, lists ``[S]`` of ``min, max, mean, std``, and the list
        ``constant`` of dimensions that never change;
      - ``actions``: ``size``, lists ``[A]`` of ``low, high`` (bounds), ``min, max, mean, std,
        at_bounds`` (share of the actions), and ``any_at_bounds``, the share of actions with a
        dimension at a bound;
      - ``copies``: transitions that are equal to an earlier one in all of their numbers;
      - ``problems``: one line each; empty where nothing was found.
    """
    data = dataset.transitions
    starts = _trajectory_starts(data)
    ends = np.append(starts[1:] - 1, data.size - 1)
    terminated = data.terminated > 0
    summary: dict[str, Any] = {
        "dataset": dataset.name,
        "environment": None if dataset.env_spec is None else json.loads(dataset.env_spec)["id"],
        "transitions": data.size,
        "episodes": len(dataset.episode_returns),
        "lengths": _stats(dataset.episode_lengths),
        "returns": _stats(dataset.episode_returns),
        "ends": {
            "trajectories": len(starts),
            "terminated": int(terminated[ends].sum()),
            "truncated": int((~terminated[ends]).sum()),
            "terminated_steps": int(terminated.sum()),
            "terminated_share": float(np.mean(np.logical_or.reduceat(terminated, starts))),
        },
        "rewards": _rewards(data.rewards),
        "observations": _observations(data.observations),
        "actions": _actions(dataset),
        "copies": _copies(data),
    }
    return summary | {"problems": _problems(dataset, summary, starts)}


def _stats(values: np.ndarray) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    low, q25, median, q75, high = np.quantile(values, (0.0, 0.25, 0.5, 0.75, 1.0)).tolist()
    mean = float(values.mean())
    return {"min": low, "q25": q25, "median": median, "q75": q75, "max": high, "mean": mean}


def _trajectory_starts(data: Transitions) -> np.ndarray:
    """Indices of transitions that do not start where the one before led, the first one included."""
    breaks = np.any(data.next_observations[:-1] != data.observations[1:], axis=1)
    return np.concatenate([[0], np.flatnonzero(breaks) + 1])


def _rewards(rewards: np.ndarray) -> dict[str, Any]:
    values = np.unique(rewards)
    few = [float(value) for value in values] if len(values) <= _SPARSE else None
    return _stats(rewards) | {"zero_share": float(np.mean(rewards == 0)), "values": few}


def _observations(observations: np.ndarray) -> dict[str, Any]:
    columns = _columns(observations)
    spread = np.array(columns["max"]) - np.array(columns["min"])
    constant = spread <= CONSTANT_TOLERANCE * np.maximum(1.0, np.abs(columns["mean"]))
    return {"size": observations.shape[1], **columns, "constant": np.flatnonzero(constant).tolist()}


def _actions(dataset: Dataset) -> dict[str, Any]:
    actions = dataset.transitions.actions
    low, high = dataset.action_low, dataset.action_high
    slack = _AT_BOUND * (high - low)
    at_bounds = (actions <= low + slack) | (actions >= high - slack)
    return {
        "size": actions.shape[1],
        "low": low.tolist(),
        "high": high.tolist(),
        **_columns(actions),
        "at_bounds": at_bounds.mean(axis=0).tolist(),
        "any_at_bounds": float(at_bounds.any(axis=1).mean()),
    }


def _columns(array: np.ndarray) -> dict[str, list[float]]:
    """Statistics of every column of ``[N, D]``."""
    return {
        "min": array.min(axis=0).tolist(),
        "max": array.max(axis=0).tolist(),
        "mean": array.mean(axis=0, dtype=np.float64).tolist(),
        "std": array.std(axis=0, dtype=np.float64).tolist(),
    }


def _copies(data: Transitions) -> int:
    """How many transitions equal an earlier one, by a hash of 64 bits of all their numbers."""
    rows = np.concatenate([array.reshape(data.size, -1) for array in data], axis=1)
    rows += 0.0  # because -0.0 + 0.0 is 0.0, so that equal numbers have equal bits
    return data.size - len({hash(row.tobytes()) for row in rows})


def _problems(dataset: Dataset, summary: dict[str, Any], starts: np.ndarray) -> list[str]:
    episodes, copies = summary["episodes"], summary["copies"]
    returns, rewards = summary["returns"], summary["rewards"]
    # One more trajectory than episodes is a recording that stops in the middle of an episode.
    unmarked = len(starts) - episodes - 1
    # An episode of one step that timed out may have no transition, and so no trajectory.
    continued = int(np.sum(dataset.episode_lengths > 1)) - len(starts)
    # An episode ends at its goal, also where the recording goes on after it.
    goes_on = np.diff(starts, append=dataset.transitions.size) > 1
    at_goal = int(np.sum((dataset.transitions.terminated[starts] > 0) & goes_on))
    short = int(np.sum(dataset.episode_lengths == 1)) - at_goal
    same_returns = episodes > 1 and returns["min"] == returns["max"]
    same_rewards = rewards["min"] == rewards["max"]

    columns = summary["observations"]
    least, most, mean, std = (np.array(columns[key]) for key in ("min", "max", "mean", "std"))
    outliers = np.maximum(most - mean, mean - least) > _OUTLIER * std
    constant = np.zeros(len(std), bool)
    constant[columns["constant"]] = True
    outliers &= ~constant
    jumps = _jumps(dataset.transitions, std, starts)
    scaling: list[str] = []
    fit_normalizer(dataset, notes=scaling)

    def dimensions(chosen: np.ndarray) -> str:
        return f"dimensions {named(chosen)}"

    actions = summary["actions"]
    least, most, low, high = (np.array(actions[key]) for key in ("min", "max", "low", "high"))
    used = (most - least) / (high - low)
    still = used <= CONSTANT_TOLERANCE
    narrow = (used < _NARROW) & ~still
    # A dimension that never changes may well be at its bound, which is said already.
    full = (np.array(actions["at_bounds"]) > _MANY_AT_BOUND) & ~still

    # What may be wrong, and whether it is.
    found = {
        "names no environment: training needs one to evaluate in": dataset.env_spec is None,
        f"{unmarked} ends of trajectories are not marked: returns and lengths there are of several "
        "episodes together": unmarked > 0,
        f"{continued} episodes begin where the one before led: ends are marked where the data goes "
        "on": continued > 0,
        f"{short} of {episodes} episodes have a single step": short > _MANY_SHORT * episodes,
        f"every episode returned {returns['max']:g}": same_returns,
        f"every reward is {rewards['max']:g}: there is nothing to learn from": same_rewards,
        f"observation {dimensions(constant)} never change": constant.any(),
        f"observation {dimensions(outliers)} have values farther than "
        f"{_OUTLIER:g} standard deviations from their mean": outliers.any(),
        f"{jumps} transitions lead {_JUMP:g} times as far as nearly all others: ends of "
        "trajectories may not be marked there": jumps > 0,
        f"action {dimensions(still)} never change": still.any(),
        f"action {dimensions(narrow)} use less than {_NARROW:.0%} of their interval": narrow.any(),
        f"action {dimensions(full)} are at a bound in more than "
        f"{_MANY_AT_BOUND:.0%} of steps": full.any(),
        f"{copies} transitions ({copies / summary['transitions']:.1%}) are exact copies of earlier "
        "ones": copies > _MANY_COPIES * summary["transitions"],
    }
    return [*(text for text, is_so in found.items() if is_so), *scaling]


def _jumps(data: Transitions, std: np.ndarray, starts: np.ndarray) -> int:
    """Transitions with a step in some dimension that no other step of that dimension comes near.

    Where ends are marked, a jump is as far, over all dimensions, as half of the ways from an end to
    the next start: not that of a teleport, or of a rotation that changes its sign.
    """
    jumped = np.zeros(data.size, bool)
    every = max(1, data.size // _SAMPLE)
    for column, following, spread in zip(
        data.observations.T, data.next_observations.T, std, strict=True
    ):
        steps = np.abs(following - column)
        usual = float(np.quantile(steps[::every], 0.99))
        # Where hardly any step is not 0 (a switch, a goal), a step is an event and no jump.
        if usual > 0.0:
            jumped |= steps > max(_JUMP * usual, float(spread))
    scale = np.where(std > 0, std, np.inf)

    def far(here: np.ndarray, there: np.ndarray) -> np.ndarray:
        # Limited, because a dimension that hardly varies would count for all.
        return np.linalg.norm(np.minimum(np.abs(there - here) / scale, 3.0), axis=1)

    rows = np.flatnonzero(jumped)
    ends = starts[1:][~jumped[starts[1:] - 1]]
    ways = far(data.next_observations[ends - 1], data.observations[ends])
    if len(rows) and len(ways):
        rows = rows[far(data.observations[rows], data.next_observations[rows]) >= np.median(ways)]
    return len(rows)
