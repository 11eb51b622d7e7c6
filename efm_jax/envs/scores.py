"""Normalized scores: 0 is a random policy, 100 the reference expert."""

import json
import re
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

# jax itself requires scipy, so this adds no run-time dependency.
from scipy import stats

from efm_jax import checks
from efm_jax.errors import DataError

# Mean returns of (random, expert), from `d4rl/infos.py` of Farama-Foundation/D4RL (Fu et al. 2020,
# arXiv 2004.07219). The same pair holds for every dataset of a task, except in Maze2D.
_TASKS: dict[str, tuple[float, float]] = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
}
# Steps of the episodes that they were measured on.  In mazes of ants and in kitchens a return is
# what was reached at all, so that it matters less.
_TASK_STEPS = {
    **{"pen": 100, "door": 200, "hammer": 200, "relocate": 200},
    **{"hopper": 1000, "halfcheetah": 1000, "walker2d": 1000, "ant": 1000},
}
# Maze2D pays for every step at the goal, so each maze has references of its own (the same source).
_MAZE2D: dict[str, tuple[float, float]] = {
    "maze2d-open-v0": (0.01, 20.66),
    "maze2d-umaze-v1": (23.85, 161.86),
    "maze2d-medium-v1": (13.13, 277.39),
    "maze2d-large-v1": (6.7, 273.99),
    "maze2d-open-dense-v0": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense-v1": (68.537689, 193.66285642381482),
    "maze2d-medium-dense-v1": (44.264742, 297.4552547777125),
    "maze2d-large-dense-v1": (30.569041, 303.4857382709002),
}
# Whole ids in lower case, D4RL's, Gymnasium's and Minari's; group 1 is the task. Whole, so that
# those with another reward (`AdroitHandPenSparse-v1`, `AntMaze_UMazeDense-v5`,
# `HopperBulletEnv-v0`) get no reference.
_ID_PATTERNS = (
    r"(hopper|halfcheetah|walker2d|ant)"
    r"(?:-(?:random|medium|expert|medium-replay|full-replay|medium-expert))?-v\d+",
    r"(antmaze)-(?:umaze|umaze-diverse|(?:medium|large)-(?:play|diverse))-v\d+",
    r"(antmaze)_(?:umaze|medium|large)(?:_diverse(?:_g|_gr|_r)?)?-v\d+",
    r"(kitchen)-(?:complete|partial|mixed)-v\d+",
    r"franka(kitchen)-v\d+",
    r"(pen|door|hammer|relocate)-(?:human|cloned|expert)-v\d+",
    r"adroithand(pen|door|hammer|relocate)-v\d+",
    # Minari's `mujoco/*` have no references of their own (Farama-Foundation/Minari issue 323);
    # those of the other MuJoCo tasks (humanoid, swimmer, ...) exist nowhere.
    r"mujoco/(hopper|halfcheetah|walker2d|ant)/[a-z]+(?:-[a-z]+)*-v\d+",
    # Minari's recordings of D4RL's tasks. Its `pen` runs for 200 steps where D4RL's ran for 100, so
    # that scores are about twice as high (Farama-Foundation/Minari issue 303).
    r"d4rl/(antmaze)/(?:umaze|umaze-diverse|(?:medium|large)-(?:play|diverse))-v\d+",
    r"d4rl/(kitchen)/(?:complete|partial|mixed)-v\d+",
    r"d4rl/(pen|door|hammer|relocate)/(?:human|cloned|expert)-v\d+",
)
# Minari's PointMaze has the mazes, rewards and step limits of D4RL's Maze2D, whose references are
# used where Minari's metadata has none; not for `open`, which runs for 300 steps there and for 150
# in D4RL.
_POINTMAZE_PATTERN = r"d4rl/pointmaze/((?:umaze|medium|large)(?:-dense)?)-v\d+"
# Goal-conditioned environments and datasets of OGBench (Park et al. 2025, arXiv 2410.20092; its
# README): reward 1 at the goal, where the episode ends, so a return is a success. Its single tasks
# pay -1 or less for every step until the goal: the success rate, which OGBench reports, is no
# function of such a return, so that they have no reference, and :func:`score` takes the rate.
_OGBENCH_PATTERNS = (
    r"(?:point|ant|humanoid)maze-(?:medium|large|giant|teleport)(?:-(?:navigate|stitch|explore))?-v0",
    r"antsoccer-(?:arena|medium)(?:-(?:navigate|stitch))?-v0",
    r"cube-(?:single|double|triple|quadruple|octuple)(?:-(?:play|noisy))?-v0",
    r"(?:scene|puzzle-(?:3x3|4x4|4x5|4x6))(?:-(?:play|noisy))?-v0",
)
_SINGLE_TASK = r"[a-z0-9-]+-singletask(?:-task[1-5])?-v\d+"


def reference_scores(env_id: str) -> tuple[float, float] | None:
    """Mean returns of a random policy and of the expert, for an environment or a dataset of it.

    They are D4RL's, and for OGBench a success. D4RL measured its own on its versions of the
    environments; using them for later versions of the same task (``Hopper-v5``) is the custom, not
    an equality. Gymnasium Robotics' mazes continue after a success by default, so that a return
    there may exceed the reference 1 of AntMaze. Minari datasets carry references of their own in
    their metadata: prefer those.

    Args:
      env_id: a Gymnasium id (``Hopper-v5``, ``AntMaze_UMaze-v5``, ``FrankaKitchen-v1``,
        ``AdroitHandPen-v1``), a D4RL name (``hopper-medium-v2``), a Minari id
        (``mujoco/hopper/medium-v0``, ``D4RL/pointmaze/umaze-v2``) or an OGBench name
        (``antmaze-large-navigate-v0``).

    Returns:
      ``(minimum, maximum)``, the returns of scores 0 and 100; None where nobody has measured them.
    """
    name = env_id.lower().removeprefix("ogbench:")
    if name in _MAZE2D:
        return _MAZE2D[name]
    match = re.fullmatch(_POINTMAZE_PATTERN, name)
    if match is not None:
        return _MAZE2D[f"maze2d-{match.group(1)}-v1"]
    if any(re.fullmatch(pattern, name) for pattern in _OGBENCH_PATTERNS):
        return (0.0, 1.0)
    return _TASKS.get(_task(name))


def _task(name: str) -> str:
    """D4RL's task of an id or name; empty if it is none."""
    for pattern in _ID_PATTERNS:
        match = re.fullmatch(pattern, name.lower())
        if match is not None:
            return match.group(1)
    return ""


def dataset_references(
    own: tuple[float, float] | None, name: str, env: str | None
) -> tuple[float, float] | None:
    """Returns of scores 0 and 100 for a dataset: its own, else its name's, else its environment's.

    Args:
      own: what the dataset's metadata says, ``Dataset.reference_scores``.
      name: what the dataset is called; a path has no references.
      env: a Gymnasium ``EnvSpec`` as JSON, or an id, or None where no environment is named.

    Returns:
      ``(minimum, maximum)``; None where all three are silent, and where D4RL measured them on
      episodes of another length than those of ``env``.

    Raises:
      DataError: ``own`` is not two finite numbers, the first lower than the second.
    """
    steps = None
    if env is not None and env.lstrip().startswith("{"):
        spec = json.loads(env)
        env, steps = spec["id"], spec.get("max_episode_steps")
    if own is not None:
        return check_references("reference_scores", own)
    for key in filter(None, (name, env)):
        if (found := reference_scores(key)) is not None:
            measured = _TASK_STEPS.get(_task(key))
            return found if None in (steps, measured) or steps == measured else None
    return None


def check_references(what: str, references: Any) -> tuple[float, float]:
    """Refuse returns of scores 0 and 100 that are not two finite numbers, the first the lower."""
    try:
        low, high = (float(x) for x in references if not isinstance(x, (bool, str)))
    except (TypeError, ValueError, OverflowError):
        low, high = np.nan, np.nan
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise DataError(
            f"{what}: expected finite numbers, the first lower than the second; got {references!r}"
        )
    return low, high


@overload
def normalized_score(returns: float, references: tuple[float, float] | None) -> float | None: ...
@overload
def normalized_score(
    returns: np.ndarray, references: tuple[float, float] | None
) -> np.ndarray | None: ...
def normalized_score(
    returns: float | np.ndarray, references: tuple[float, float] | None
) -> float | np.ndarray | None:
    """``100 (returns - minimum) / (maximum - minimum)``.

    Args:
      returns: a return, or an array of them of any shape.
      references: ``(minimum, maximum)`` as from :func:`reference_scores`, or None.

    Returns:
      A float for a scalar, else an array of the same shape; None when ``references`` is None.

    Raises:
      ValueError: references that are not finite or not increasing.
    """
    if references is None:
        return None
    minimum, maximum = references
    checks.check_number("references[0]", minimum)
    checks.check_number("references[1]", maximum, minimum=minimum, open_minimum=True)
    scores = 100.0 * (np.asarray(returns, np.float64) - minimum) / (maximum - minimum)
    return float(scores) if scores.ndim == 0 else scores


def score(
    value: float, success: float, references: tuple[float, float] | None, env: str
) -> float | None:
    """Score of a mean return: in OGBench's single tasks its success in percent, else normalized.

    Args:
      value: the mean return.
      success: the share of episodes with a success; NaN where nothing is known of it.
      references: as for :func:`normalized_score`.
      env: the environment's id.
    """
    if np.isfinite(success) and re.fullmatch(_SINGLE_TASK, env):
        return 100.0 * success
    return normalized_score(value, references)


def mean_and_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean and Student's t confidence interval of the mean, of independent values.

    Pass one value per training seed (the mean over its episodes), not all episodes together:
    episodes of one policy share its training noise, and the interval would come out too narrow.

    Args:
      values: ``[n]``, at least one.
      confidence: probability that the interval covers the mean, in (0, 1).

    Returns:
      ``(mean, low, high)``. A single value says nothing about spread: low and high then equal it.

    Raises:
      ValueError: no values, more than one axis, or a confidence outside (0, 1).
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values: expected shape [n] with n >= 1; got {array.shape}")
    checks.check_number("confidence", confidence, minimum=0.0, maximum=1.0, open_minimum=True)
    if confidence == 1.0:
        raise ValueError("confidence: expected a number below 1; got 1")
    mean = float(array.mean())
    if array.size == 1:
        return mean, mean, mean
    standard_error = array.std(ddof=1) / np.sqrt(array.size)
    margin = float(stats.t.ppf(0.5 * (1.0 + confidence), array.size - 1) * standard_error)
    return mean, mean - margin, mean + margin
