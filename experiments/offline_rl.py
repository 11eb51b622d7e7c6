"""QIPO beside the policies it will be compared with, on the same behaviour models and critics.

    python -m experiments.offline_rl [--datasets=pendulum,hopper=ID_OR_FILE,...] [--methods=...] [--seeds=3]
                                     [--shard=I/N] [--out=runs/offline_rl] [--smoke] [--report]

Every dataset is of a family (its environment's), and every family has one preset; a method is that preset
with a few fields changed (``METHODS``).  For every dataset the behaviour model of each path and each critic are
trained once, for all seeds in one program, and shared by the methods, which differ in their policy phase alone.
Behaviour and policies are evaluated on the same episodes, during the policy phase and at its end.

``--out`` gets returns.csv (every episode of every evaluation), stages/ (trained behaviour models and critics)
and, from ``--report`` or at the end, table.md, summary.json and figures.  What is in returns.csv is not computed
again; N processes with --shard=0/N ... share one folder.  Aggregates are rliable's (``pip install -e .[study]``):
interquartile mean with stratified bootstrap intervals, performance profiles, probability of improvement
(Agarwal et al. 2021, arXiv 2108.13264).
"""

import argparse
import csv
import dataclasses
import fcntl
import importlib
import pathlib
import pickle
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import BUILTIN_DATASET, fit_normalizer, load_dataset, preprocess
from efm_jax.evaluation import evaluate, normalized_score, reference_scores
from efm_jax.rl.algorithm import State
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.policies import Acting
from efm_jax.rl.trainer import Trainer
from efm_jax.types import Dataset, Normalizer, Transitions
from launch.evaluation import episode_seeds

# Beginning of an environment's id -> preset.
FAMILIES = {
    "Pendulum": "qipo_ot", "Hopper": "mujoco", "HalfCheetah": "mujoco", "Walker2d": "mujoco",
    "Ant-": "mujoco", "PointMaze": "pointmaze",
}  # fmt: skip

_VP = {"path": "vp", "solver": "dpmpp", "sample_steps": 10}
# Fields that a method changes in its family's preset.
METHODS: dict[str, dict[str, Any]] = {
    "bc": {"policy": "bc"},
    "bc-diff": {"policy": "bc", **_VP},
    "best-of-n": {"policy": "bc", "action_selection": "best"},
    "gaussian": {"policy": "gaussian"},
    "reweight": {"policy": "reweight"},
    "qgpo": {"policy": "qgpo", **_VP},
    "qipo-ot": {},
    "qipo-ot-full": {"estimator": "full"},
    "qipo-ot-beta": {"target_ess": 0.0},
    "qipo-diff": dict(_VP),
}
SMOKE = {
    "hidden_dims": (16,), "critic_hidden_dims": (16,), "behavior_steps": 50, "critic_steps": 50,
    "policy_steps": 50, "renew_every": 25, "log_every": 25, "checkpoint_every": 50, "eval_every": 25,
    "eval_episodes": 2, "support_size": 2, "sample_steps": 2, "batch_size": 32, "num_critics": 2,
    "num_candidates": 2,
}  # fmt: skip
FIELDS = (
    "dataset",
    "method",
    "seed",
    "step",
    "final",
    "episode_seed",
    "return",
    "length",
    "score",
    "seconds",
)


class Study:
    """One folder of results."""

    def __init__(self, out: pathlib.Path, num_seeds: int, changes: dict[str, Any]):
        self.out, self.num_seeds, self.changes = out, num_seeds, changes
        (out / "stages").mkdir(parents=True, exist_ok=True)
        self.returns = out / "returns.csv"

    def done(self) -> set[tuple[str, str]]:
        """(dataset, method) pairs that are finished."""
        return {(row["dataset"], row["method"]) for row in self.rows() if row["final"] == "1"}

    def rows(self) -> list[dict[str, str]]:
        """Every episode so far."""
        if not self.returns.exists():
            return []
        with self.returns.open(newline="") as file:
            return list(csv.DictReader(file))

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, one process at a time."""
        with self.returns.open("a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = csv.DictWriter(file, FIELDS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)

    def run_dataset(self, name: str, dataset: Dataset, methods: dict[str, dict[str, Any]]) -> None:
        """All methods on one dataset."""
        env_id = EnvSpec.from_json(dataset.env_spec).id
        references = dataset.reference_scores or reference_scores(env_id)
        normalizer = fit_normalizer(dataset)
        for method, changed in methods.items():
            if (name, method) in self.done():
                continue
            config = preset(env_id, {**changed, **self.changes})
            data = preprocess(dataset, normalizer, config.reward_transform)
            hooks = _Hooks(self, name, method, dataset.env_spec, references, normalizer, config)
            trainer = Trainer(config, data, range(self.num_seeds))
            state = self._stages(name, trainer, data, hooks)
            hooks.act_fn = trainer.act_fn
            state = trainer.run(state, hooks)
            hooks.evaluate(config.phase_steps["policy"], state.acting(), final=True)

    def _stages(self, name: str, trainer: Trainer, data: Transitions, hooks: "_Hooks") -> State:
        """A state whose behaviour model and critic are trained, read from the folder where they are there."""
        config = trainer.config
        state = trainer.init_state()
        keys = {"behavior": f"{name}-{config.path}", "critic": f"{name}-{config.critic}"}
        if trainer.algorithm.critic.uses_next_actions:
            keys["critic"] += f"-{config.path}"
        files = {phase: self.out / "stages" / f"{key}-x{self.num_seeds}.pkl" for phase, key in keys.items()}
        for phase, file in files.items():
            if file.exists():
                trained = jax.tree.unflatten(
                    jax.tree.structure(getattr(state, phase)), pickle.loads(file.read_bytes())
                )
                state = state.replace(**{phase: trained})
        missing = [phase for phase, file in files.items() if not file.exists()]
        if missing:
            # Without a policy phase the run ends when both are trained.
            stages = Trainer(dataclasses.replace(config, policy="bc"), data, range(self.num_seeds))
            fresh = stages.init_state().replace(behavior=state.behavior, critic=state.critic)
            trained = stages.run(fresh, hooks)
            for phase in missing:
                leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(getattr(trained, phase))]
                files[phase].write_bytes(pickle.dumps(leaves))
            state = state.replace(behavior=trained.behavior, critic=trained.critic)
        return state


def preset(env_id: str, changed: dict[str, Any]) -> QIPOConfig:
    """The family's preset with a method's fields."""
    names = [name for start, name in FAMILIES.items() if env_id.startswith(start)]
    if not names:
        raise ValueError(f"datasets: no family has the environment {env_id}; known: {', '.join(FAMILIES)}")
    module = importlib.import_module(f"experiments.configs.{names[0]}")
    return dataclasses.replace(module.get_config(), **changed).validate()


class _Hooks:
    """Progress on one line a phase, and evaluation, of one method on one dataset."""

    def __init__(
        self,
        study: Study,
        dataset: str,
        method: str,
        env_spec: str,
        references: tuple[float, float] | None,
        normalizer: Normalizer,
        config: QIPOConfig,
    ):
        self.act_fn: Any = None
        self._study, self._dataset, self._method = study, dataset, method
        self._env_spec, self._references, self._normalizer = env_spec, references, normalizer
        self._seeds = episode_seeds(config.eval_episodes)
        self._started = time.perf_counter()

    def on_evaluate(self, step: int, acting: Acting) -> None:
        self.evaluate(step, acting)

    def evaluate(self, step: int, acting: Acting, final: bool = False) -> None:
        """Play the episodes and write every return."""
        act = self.act_fn("policy", acting, self._normalizer, self._seeds)
        returns, lengths = evaluate(
            act, self._env_spec, num_policies=self._study.num_seeds, episode_seeds=self._seeds
        )
        scores = normalized_score(returns, self._references)
        seconds = round(time.perf_counter() - self._started, 1)
        self._study.write(
            dict(
                zip(
                    FIELDS,
                    (self._dataset, self._method, seed, step, int(final), episode, returns[seed, i],
                     lengths[seed, i], scores[seed, i], seconds),
                    strict=True,
                )
            )
            for seed in range(returns.shape[0])
            for i, episode in enumerate(self._seeds)
        )  # fmt: skip
        means = " ".join(f"{mean:.1f}" for mean in scores.mean(axis=1))
        self.say(f"step {step}{' (last)' if final else ''}: scores {means}, {seconds} s")

    def say(self, text: str) -> None:
        """One line."""
        print(f"{self._dataset:<12} {self._method:<14} {text}", flush=True)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        self.say(f"{phase}: {total - done} steps")

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self.say(f"table at {step}: " + ", ".join(f"{k} {v.mean():.4g}" for k, v in summary.items()))

    def on_table(self, name: str, done: int, total: int) -> None:
        pass

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        pass

    def on_checkpoint(self, state: State) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


def parse_datasets(text: str) -> dict[str, str]:
    """``name=ID_OR_FILE,...``; a bare ``pendulum`` is the built-in dataset."""
    datasets = {}
    for part in text.split(","):
        name, _, source = part.partition("=")
        datasets[name] = source or {"pendulum": BUILTIN_DATASET}.get(name, name)
    return datasets


def main() -> int:
    """Run what is missing of this shard, then the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", default="pendulum", help="name=ID_OR_FILE,...")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shard", default="0/1", help="I/N: this process takes every N-th dataset")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/offline_rl"))
    parser.add_argument("--smoke", action="store_true", help="every part, in about a minute")
    parser.add_argument("--report", action="store_true", help="only make tables and figures")
    args = parser.parse_args()
    names = args.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"--methods: unknown {unknown[0]!r}; expected {', '.join(METHODS)}")
    study = Study(args.out, args.seeds, SMOKE if args.smoke else {})
    if not args.report:
        index, count = (int(part) for part in args.shard.split("/"))
        for number, (name, source) in enumerate(parse_datasets(args.datasets).items()):
            if number % count == index:
                try:
                    dataset = load_dataset(source)
                except ValueError as error:
                    parser.error(f"--datasets: {error}")
                study.run_dataset(name, dataset, {name: METHODS[name] for name in names})
    from experiments import offline_rl_report  # rliable only here: it takes seconds to import

    offline_rl_report.write(study.rows(), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
