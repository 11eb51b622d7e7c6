"""Evaluate a trained run: python -m launch.evaluate --workdir=DIR [--episodes=N]

Reads the newest readable checkpoint, plays the same episodes with the behavior model and the
policy, adds every raw return to returns.csv, and prints a table and a line of JSON.  The dataset is
not needed. How actions are sampled and chosen may differ from training: --solver, --sample_steps,
--action_selection,
--num_candidates.  --video=FILE.mp4 also records the first training seed's policy on the first episode.
Exit status: 0 done, 2 bad flags or no usable checkpoint.
"""

import os
import sys
import time

import jax
from absl import flags
from etils import epath

from efm_jax.envs import evaluate
from efm_jax.envs.video import record_video
from efm_jax.rl.algorithm import Algorithm
from efm_jax.rl.config import SOLVERS
from efm_jax.rl.selection import ACTION_SELECTIONS
from efm_jax.rl.trainer import make_act
from efm_jax.runs.loading import acting_config, restore
from efm_jax.runs.metrics import return_rows, write_returns
from efm_jax.runs.workdir import RunInfo
from launch import cli, evaluation
from launch.workdir import resolve

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of launch.train.")
_EPISODES = flags.DEFINE_integer(
    "episodes", None, "Episodes per seed; by default as in training.", 1
)
_SOLVER = flags.DEFINE_enum(
    "solver", None, SOLVERS, "Solver of the sampler; by default as in training."
)
_SAMPLE_STEPS = flags.DEFINE_integer(
    "sample_steps", None, "Its steps; by default as in training.", 1
)
_SELECTION = flags.DEFINE_enum(
    "action_selection",
    None,
    ACTION_SELECTIONS,
    "Which sampled action is played; by default as in training.",
)
_CANDIDATES = flags.DEFINE_integer(
    "num_candidates", None, "Actions that best and mean sample; by default as in training.", 1
)
_VIDEO = flags.DEFINE_string(
    "video", None, "An .mp4 (needs the extra video) or .gif file to record."
)


def main(_: list[str]) -> int:
    """Restore, play, report."""
    start = time.perf_counter()
    if _VIDEO.value and not os.environ.get("DISPLAY"):
        # MuJoCo and SDL (Pendulum) render without a display; both read this when they are imported.
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    with cli.usage_errors():
        if not _WORKDIR.value:
            raise ValueError("--workdir: expected the work directory of a training run; got none")
        workdir = resolve(_WORKDIR.value)
        info = RunInfo.load(workdir)
        if info is None:
            raise ValueError(f"workdir {workdir}: holds no run (no config.json)")
        options = {
            "eval_solver": _SOLVER.value,
            "eval_sample_steps": _SAMPLE_STEPS.value,
            "action_selection": _SELECTION.value,
            "num_candidates": _CANDIDATES.value,
        }
        config = acting_config(
            info.config, **{name: value for name, value in options.items() if value is not None}
        )
        evaluation.check_environment(info.env_spec, info.observation_size, info.action_size)
        algorithm = Algorithm(config, info.observation_size, info.action_size)
        restored = restore(workdir, info, algorithm, lambda text: print(text, file=sys.stderr))
    state = restored.state
    seeds = evaluation.episode_seeds(_EPISODES.value or config.eval_episodes)
    if _VIDEO.value:
        first = jax.tree.map(lambda leaf: leaf[:1], (restored.keys, state.acting()))
        act = make_act(algorithm, "policy", first[0], first[1], restored.normalizer, seeds[:1])
        with cli.usage_errors():
            record_video(act, info.env_spec, epath.Path(_VIDEO.value).expanduser(), seed=seeds[0])
    rollouts = {}
    behavior_step = int(state.behavior.step[0])
    for name, total_step in (("behavior", behavior_step), ("policy", restored.step)):
        act = make_act(algorithm, name, restored.keys, state.acting(), restored.normalizer, seeds)
        rollouts[name] = evaluate(
            act, info.env_spec, num_policies=info.num_seeds, episode_seeds=seeds
        )
        write_returns(workdir, return_rows(total_step, name, *rollouts[name], seeds))
    summary = evaluation.summarize(info, rollouts)
    line = {
        "dataset": info.dataset,
        "algorithm": config.algorithm,
        "seeds": info.num_seeds,
        "steps": restored.step,
        "episodes": len(seeds),
        "dataset_return": info.dataset_return,
        **summary,
        "seconds": round(time.perf_counter() - start, 1),
        "workdir": str(workdir),
    }
    evaluation.print_report(info, summary, line)
    return 0


if __name__ == "__main__":
    cli.run(main)
