"""Evaluate a trained run: python -m launch.evaluate --workdir=DIR [--episodes=N]

Reads the newest readable checkpoint, plays the same episodes with the behavior model and the
policy, and prints a table and a line of JSON.  The dataset is not needed. How actions are sampled
and chosen may differ from training: --solver, --sample_steps, --action_selection, --num_candidates.
--video=FILE.mp4 also records the first training seed's policy on the first episode.

Each policy's evaluation gets a name of its own, evaluate-1-policy and so on: a row of
evaluations.csv that says how it was played, and every raw return in returns.csv.  What training
measured stays.  In a folder that cannot be written, or that another process writes in, it says so
first, plays and prints.
Exit status: 0 done, 1 an evaluation failed, 2 bad flags or no usable checkpoint.
"""

import dataclasses
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from efm_jax.envs import EvaluationError, Rollouts, dataset_references, specs
from efm_jax.envs.video import record_video
from efm_jax.rl.config import ACTION_SELECTIONS
from efm_jax.rl.model import SOLVERS
from efm_jax.runs.evaluation import (
    POLICIES,
    Evaluator,
    check_environment,
    episode_seeds,
    horizon,
    result_line,
)
from efm_jax.runs.loading import restore
from efm_jax.runs.lock import Lock, LockedError
from efm_jax.runs.metrics import write_evaluation
from efm_jax.runs.reader import Run, read_evaluations
from efm_jax.runs.workdir import RunInfo, resolve

from . import cli, datasets
from .evaluation import print_report

FLAGS = cli.Flags(cli.FLAGS, datasets.FLAGS)
_WORKDIR = FLAGS.string("workdir", None, "The work directory of launch.train.")
_SAME = "by default as in training."
_EPISODES = FLAGS.integer("episodes", None, f"Episodes per seed; {_SAME}", 1)
_SOLVER = FLAGS.enum("solver", None, SOLVERS, f"Solver of the sampler; {_SAME}")
_SAMPLE_STEPS = FLAGS.integer("sample_steps", None, f"Its steps; {_SAME}", 1)
_SELECTION_HELP = f"Which sampled action is played; {_SAME}"
_SELECTION = FLAGS.enum("action_selection", None, ACTION_SELECTIONS, _SELECTION_HELP)
_CANDIDATES_HELP = f"Actions that best and mean sample; {_SAME}"
_CANDIDATES = FLAGS.integer("num_candidates", None, _CANDIDATES_HELP, 1)
_VIDEO = FLAGS.string("video", None, "An .mp4 or .gif to record (needs the extra video).")


def main(_: list[str]) -> int:
    """Restore, play, report."""
    start = time.perf_counter()
    if _VIDEO.value and not os.environ.get("DISPLAY"):
        # MuJoCo and SDL (Pendulum) render without a display; both read this when they are imported.
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    with cli.usage_errors():
        datasets.allow_environments()
        if not _WORKDIR.value:
            raise ValueError("--workdir: expected the work directory of a training run; got none")
        workdir = resolve(_WORKDIR.value)
        cli.check_backend()
        Run.read(workdir)  # before playing, because what cannot be read could not be added to
        options = {
            "eval_solver": _SOLVER.value,
            "eval_sample_steps": _SAMPLE_STEPS.value,
            "action_selection": _SELECTION.value,
            "num_candidates": _CANDIDATES.value,
        }
        restored = restore(
            workdir,
            cli.say,
            **{name: value for name, value in options.items() if value is not None},
        )
        info, params = _in_environment(restored.info), restored.state.params()
        low, high = (np.asarray(bound) for bound in restored.normalizer[2:])
        env = info.environment()
        check_environment(env, info.observation_size, info.action_size, (low, high))
        print(f"note: {horizon(env)}")
        episodes = episode_seeds(_EPISODES.value or info.config.eval_episodes)
        evaluator = Evaluator(info, restored.agent, restored.normalizer)
        for name in POLICIES:
            evaluator.check_finite(name, params)
        try:
            Lock(workdir, cli.say).close()
            writable = True
        except (LockedError, OSError) as error:
            cli.say(f"{error}; the evaluation will be printed, not written")
            writable = False
    steps = {"behavior": int(restored.state.behavior.step[0]), "policy": restored.step}
    if _VIDEO.value:
        act = evaluator.act("policy", params, episodes[:1], seeds=slice(1))
        with cli.usage_errors():
            path = epath.Path(_VIDEO.value).expanduser()
            record_video(act, env, path, seed=episodes[0])
    rollouts, played, failed = {}, [], []
    for name, step in steps.items():
        of, problem = ("evaluate", name, step, episodes), None
        try:
            rollouts[name] = evaluator.play(name, params, episodes)
        except EvaluationError as error:
            problem = error
            failed.append(f"{name}: {error}")
        played.append((evaluator.record("", *of, problem), rollouts.get(name)))
    with cli.usage_errors():
        names = _write(workdir, info, played, episodes) if writable else {}
    if failed:
        cli.say(f"failed: {'; '.join(failed)}")
        return cli.EXIT_FAILED
    seconds = time.perf_counter() - start
    line = result_line(info, workdir, restored.step, rollouts, names, seconds)
    print_report(info, line | {"episodes": len(episodes)})
    return 0


def _in_environment(info: RunInfo) -> RunInfo:
    """The run in the environment, and with the limit, that the flags give; scores are of those."""
    env, limit = datasets.ENV.value, datasets.MAX_EPISODE_STEPS.value
    if env is None and limit is None:
        return info
    spec = specs.named("--env", env) if env else specs.stated("config.json", info.environment())
    spec.max_episode_steps = limit or spec.max_episode_steps
    env_spec = specs.to_json("--env", spec)
    if env_spec == info.env_spec:
        return info
    references = dataset_references(None, "", env_spec)
    return dataclasses.replace(info, env_spec=env_spec, reference_scores=references)


def _write(
    workdir: epath.Path,
    info: RunInfo,
    played: Sequence[tuple[dict[str, Any], Rollouts | None]],
    episodes: Sequence[int],
) -> dict[str, str]:
    """Give evaluations names that are free, and write them; returns the names by policy."""
    try:
        lock = Lock(workdir, cli.say)
    except LockedError as error:
        cli.say(f"{error}; the evaluation is not written")
        return {}
    try:
        earlier = [
            int(number)
            for row in read_evaluations(workdir)
            for number in re.findall(r"^evaluate-(\d{1,9})-", row["evaluation"])
        ]
        number, names = 1 + max(earlier, default=0), {}
        for record, rollouts in played:
            names[record["policy"]] = f"evaluate-{number}-{record['policy']}"
            record["evaluation"] = names[record["policy"]]
            write_evaluation(workdir, record, rollouts, info.seeds, episodes)
        return names
    finally:
        lock.close()


command = cli.command(main, FLAGS)

if __name__ == "__main__":
    command()
