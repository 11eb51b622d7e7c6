"""Record a Minari dataset: python -m launch.collect --env=ID --policy=NAME [--dataset=ID]

Plays whole episodes in a Gymnasium environment, also of Gymnasium Robotics (the extra
``robotics``): with --policy=random, uniformly random actions; with --policy=waypoints, a controller
that walks through a PointMaze between goals of its own, data as D4RL's Maze2D has; with
--policy=WORKDIR, the policy of a training run, by default in the run's environment.  In every
PointMaze the evaluated goal lies in D4RL's cell.  The same flags give the same bytes.

With --policy=ogbench --dataset=FOLDER/cube-single-play-v0.npz, OGBench's scripted experts make that
dataset again (the extra ``ogbench``; also scene and puzzle, play and noisy; pointmaze, navigate and
stitch).  It goes on where it was stopped.  With OGBENCH_DATASET_DIR=FOLDER, launch.train
--dataset=cube-single-play-singletask-task2-v0 reads it, and calls it regenerated.

The dataset is local: launch.train --dataset=ID reads it, and evaluates in the environment that it
was recorded in.  The last line printed is JSON.  Exit status: 0 done, 2 bad flags, environment or
policy, or a dataset that is there already.
"""

import json
import re
import time

import gymnasium
import numpy as np
from etils import epath
from gymnasium.envs.registration import EnvSpec

from efm_jax import checks, load_policy
from efm_jax.data import BUILTIN_DATASET, DataError, ogbench_experts, recording
from efm_jax.envs import (
    dataset_references,
    environments,
    normalized_score,
    pendulum,
    play,
    pointmaze,
    specs,
)
from efm_jax.runs.workdir import RunInfo, resolve

from . import cli, datasets

FLAGS = cli.Flags(cli.FLAGS, datasets.FLAGS)
_POLICY = FLAGS.string("policy", None, "random, waypoints, ogbench, or a run's work directory.")
_DATASET_HELP = "Minari id, by default efm/ENV/POLICY-v0; ogbench: FOLDER/NAME.npz."
_DATASET = FLAGS.string("dataset", None, _DATASET_HELP)
_EPISODES = FLAGS.integer("episodes", None, "How many episodes to record.", 1)
_STEPS = FLAGS.integer("steps", None, "Least steps; default: 100,000, or OGBench's.", 1)
_SEED = FLAGS.integer("seed", 0, "Of starts, goals and noise.", 0, 2**32 - 1)
_NOISE_HELP = """Standard deviation of Gaussian noise on actions, in units of half their range;
waypoints: its mean over episodes, by default 0.5; a work directory: by default 0."""
_NOISE = FLAGS.float("noise", None, _NOISE_HELP)

_DEFAULT_STEPS = 100_000
_DEFAULT_NOISE = 0.5  # of waypoints; D4RL's
_SCRIPTED = ("random", "waypoints")
# Purpose of the scripted policies' random numbers, folded into the seed; no purpose of a recording.
_ACTIONS = 0


def main(_: list[str]) -> int:
    """Check, play, report."""
    start = time.perf_counter()
    if _POLICY.value == "ogbench":
        return _regenerate(start)
    with cli.usage_errors():
        spec = _environment_spec()
        dataset_id = _DATASET.value or _default_id(spec)
        _check_flags(spec, dataset_id)
        env = environments.make(specs.by_name(spec))
        recording.check_environment(env)
        begin, description = _policy(env)
    steps = None if _EPISODES.value else _STEPS.value or _DEFAULT_STEPS
    try:
        recorded = recording.record(
            dataset_id,
            env,
            begin,
            seed=_SEED.value,
            episodes=_EPISODES.value,
            steps=steps,
            expert=_expert(env),
            algorithm_name=description,
            code_permalink="launch/collect.py",
            description=f"{spec.id}, recorded locally with seed {_SEED.value}",
        )
    except DataError as error:
        raise cli.UsageError(str(error)) from error
    if not recorded.published:
        raise cli.UsageError(f"dataset {dataset_id}: another process has recorded it meanwhile")
    references = dataset_references(
        recorded.reference_scores, dataset_id, specs.to_json("--env", spec)
    )
    mean = float(recorded.returns.mean())
    line = {
        "dataset": dataset_id,
        "env": spec.id,
        "episodes": len(recorded.returns),
        "steps": int(recorded.lengths.sum()),
        "dataset_return": mean,
        "dataset_score": normalized_score(mean, references),
        "reference_scores": references,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(line))
    return 0


def _regenerate(start: float) -> int:
    with cli.usage_errors():
        path = _DATASET.value or ""
        if not path.endswith(".npz"):
            raise ValueError(
                f"--dataset={path}: expected FOLDER/NAME.npz for --policy=ogbench, such as "
                "data/cube-single-play-v0.npz"
            )
        given = {"episodes": _EPISODES, "noise": _NOISE, "env": datasets.ENV}
        for name, flag in given.items():
            if flag.value is not None:
                raise ValueError(f"--{name}: expected none for --policy=ogbench; got {flag.value}")
        made = ogbench_experts.regenerate(
            epath.Path(path).expanduser(), seed=_SEED.value, steps=_STEPS.value
        )
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"dataset": path, **made, "seconds": seconds}))
    return 0


def _environment_spec() -> EnvSpec:
    """The spec of ``--env``, else of the training run, with the limit of --max_episode_steps."""
    datasets.allow_environments()
    spec = _named_spec()
    spec.max_episode_steps = datasets.MAX_EPISODE_STEPS.value or spec.max_episode_steps
    return spec


def _named_spec() -> EnvSpec:
    expected = "expected random, waypoints, ogbench or a work directory"
    if not _POLICY.value:
        raise ValueError(f"--policy: {expected}; got none")
    flag = f"--policy={_POLICY.value}"
    if _POLICY.value in _SCRIPTED:
        if not datasets.ENV.value:
            raise ValueError(f"--env: expected a Gymnasium id for {flag}; got none")
    elif not resolve(_POLICY.value).exists():
        raise ValueError(f"{flag}: {expected}; there is no such folder")
    elif not datasets.ENV.value:
        info = RunInfo.load(resolve(_POLICY.value))
        if info is None:
            raise ValueError(f"{flag}: holds no run (no config.json)")
        return specs.stated(flag, info.environment())
    spec = specs.named("--env", datasets.ENV.value)
    return pointmaze.task(spec) if pointmaze.is_point_maze(spec) else spec


def _default_id(spec: EnvSpec) -> str:
    name = re.sub(r"-v\d+$", "", spec.id).lower()
    policy = _POLICY.value if _POLICY.value in _SCRIPTED else "policy"
    return f"efm/{re.sub(r'[^a-z0-9_-]', '_', name)}/{policy}-v0"


def _check_flags(spec: EnvSpec, dataset_id: str) -> None:
    """Refuse what can be refused before anything is made."""
    if _POLICY.value == "waypoints" and not pointmaze.is_point_maze(spec):
        raise ValueError(f"--policy=waypoints: expected a PointMaze environment; got {spec.id}")
    if _EPISODES.value and _STEPS.value:
        raise ValueError("--episodes, --steps: expected one of them; got both")
    if _NOISE.value is not None:
        checks.check_number("--noise", _NOISE.value, minimum=0.0)
        if _POLICY.value == "random":
            problem = "expected another policy than random, whose actions are noise already"
            raise ValueError(f"--noise: {problem}")
    if dataset_id == BUILTIN_DATASET:
        raise ValueError(
            f"--dataset={dataset_id}: expected another id; this is the built-in dataset's"
        )
    recording.check_new(dataset_id)


def _policy(env: gymnasium.Env) -> tuple[play.Begin, str]:
    """The policy of each episode, and the algorithm's name in the metadata."""

    def rng(episode: int) -> np.random.Generator:
        return np.random.default_rng([_SEED.value, _ACTIONS, episode])

    if _POLICY.value == "random":
        return (
            lambda i: play.random_actions(play.action_box(env), rng(i)),
            "uniformly random actions",
        )
    if _POLICY.value == "waypoints":
        maze = pointmaze.Maze.of(env)
        noise = _DEFAULT_NOISE if _NOISE.value is None else _NOISE.value
        return lambda i: pointmaze.wanderer(maze, rng(i), noise), (
            "waypoint controller between goals of its own, random gains, "
            f"noise of mean deviation {noise:g}"
        )
    noise = _NOISE.value or 0.0
    try:
        begin = play.batched(env, load_policy(_POLICY.value, report=cli.say), _SEED.value, noise)
        # Refused here, if it is a policy of another environment.
        play.check_action(env, begin(0)(env.reset(seed=0)[0]))
    except ValueError as error:
        raise ValueError(f"--policy={_POLICY.value}: {error}") from error
    return begin, f"efm_jax policy, noise of deviation {noise:g}"


def _expert(env: gymnasium.Env) -> play.Act | None:
    """What scores 100, where there is a script for the environment."""
    spec = environments.spec_of(env)
    if pointmaze.is_point_maze(spec):
        return pointmaze.expert(pointmaze.Maze.of(env))
    return pendulum.expert if spec.id == pendulum.ENVIRONMENT else None


command = cli.command(main, FLAGS)

if __name__ == "__main__":
    command()
