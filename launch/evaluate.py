"""Evaluate a trained run: python -m launch.evaluate --workdir=DIR [--episodes=N]

Reads the newest readable checkpoint, plays the same episodes with the behaviour model and the policy,
adds every raw return to returns.csv, and prints a table and a line of JSON.  The dataset is not needed.
Exit status: 0 done, 2 bad flags or no usable checkpoint.
"""

import sys
import time

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from efm_jax.evaluation import evaluate
from efm_jax.rl.qipo import QIPO
from efm_jax.rl.trainer import make_act
from efm_jax.training.checkpoint import Checkpointer
from efm_jax.training.metrics import return_rows, write_returns
from efm_jax.types import Normalizer
from launch import cli, evaluation
from launch.workdir import CHECKPOINTS, RunInfo, resolve

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of launch.train.")
_EPISODES = flags.DEFINE_integer("episodes", None, "Episodes per seed; by default as in training.", 1)


def main(_: list[str]) -> int:
    """Restore, play, report."""
    start = time.perf_counter()
    with cli.usage_errors():
        if not _WORKDIR.value:
            raise ValueError("--workdir: expected the work directory of a training run; got none")
        workdir = resolve(_WORKDIR.value)
        info = RunInfo.load(workdir)
        if info is None:
            raise ValueError(f"workdir {workdir}: holds no run (no config.json)")
        evaluation.check_environment(info.env_spec, info.observation_size, info.action_size)
        algorithm = QIPO(info.config, info.observation_size, info.action_size)
        keys = jnp.stack([jax.random.key(seed) for seed in info.seeds])
        step, tree = _restore(workdir, info, algorithm, keys)
    state, normalizer = tree["state"], Normalizer(*tree["normalizer"])
    seeds = evaluation.episode_seeds(_EPISODES.value or info.config.eval_episodes)
    rollouts = {}
    behavior_step = int(state.behavior.step[0])
    for name, total_step in (("behavior", behavior_step), ("policy", step)):
        act = make_act(algorithm, keys, getattr(state, name).average, normalizer, seeds)
        rollouts[name] = evaluate(act, info.env_spec, num_policies=info.num_seeds, episode_seeds=seeds)
        write_returns(workdir, return_rows(total_step, name, *rollouts[name], seeds))
    summary = evaluation.summarize(info, rollouts)
    line = {
        "dataset": info.dataset,
        "algorithm": info.config.algorithm,
        "seeds": info.num_seeds,
        "steps": step,
        "episodes": len(seeds),
        "dataset_return": info.dataset_return,
        **summary,
        "seconds": round(time.perf_counter() - start, 1),
        "workdir": str(workdir),
    }
    evaluation.print_report(info, summary, line)
    return 0


def _restore(workdir: epath.Path, info: RunInfo, algorithm: QIPO, keys: jax.Array) -> tuple[int, dict]:
    state = jax.vmap(algorithm.init)(keys)
    sizes = (info.observation_size,) * 2 + (info.action_size,) * 2
    template = {"state": state, "normalizer": Normalizer(*(jnp.zeros(size) for size in sizes))}
    found = None
    if (workdir / CHECKPOINTS).exists():  # a checkpointer would make it
        checkpointer = Checkpointer(workdir / CHECKPOINTS, report=lambda text: print(text, file=sys.stderr))
        try:
            found = checkpointer.restore(template)
        finally:
            checkpointer.close()
    if found is None:
        raise ValueError(f"workdir {workdir}: no checkpoint has been saved yet")
    if int(found[1]["state"].policy.step[0]) == 0:
        raise ValueError(f"workdir {workdir}: training stopped before the policy phase; nothing to evaluate")
    return found


if __name__ == "__main__":
    cli.run(main)
