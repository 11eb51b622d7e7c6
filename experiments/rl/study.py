"""What studies of offline RL share: a folder of results, presets, trained stages, evaluation.

A study runs methods, each a configuration with a name, on datasets.  Behavior models and critics
are trained once for all methods that may share them, and kept under ``stages/``; what is finished
in returns.csv is not computed again.
"""

import csv
import dataclasses
import fcntl
import importlib
import os
import pathlib
import pickle
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from efm_jax.rl.algorithm import State
from efm_jax.rl.policies import Acting
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import BUILTIN_DATASET, fit_normalizer, preprocess
from efm_jax.envs import evaluate, normalized_score, reference_scores
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.trainer import Trainer
from efm_jax.runs.evaluation import episode_seeds
from efm_jax.types import Dataset, Normalizer, Transitions

# Beginning of an environment's id -> preset.
FAMILIES = {
    "Pendulum": "qipo_ot", "Hopper": "mujoco", "HalfCheetah": "mujoco", "Walker2d": "mujoco",
    "Ant-": "mujoco", "PointMaze": "pointmaze",
}  # fmt: skip
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
RENEWAL_FIELDS = ("dataset", "method", "seed", "step", "name", "value")


def preset(env_id: str) -> QIPOConfig:
    """The preset of an environment's family."""
    names = [name for start, name in FAMILIES.items() if env_id.startswith(start)]
    if not names:
        raise ValueError(
            f"datasets: no family has the environment {env_id}; known: {', '.join(FAMILIES)}"
        )
    return importlib.import_module(f"experiments.configs.{names[0]}").get_config()


def parse_datasets(text: str) -> dict[str, str]:
    """``name=ID_OR_FILE,...``; a bare ``pendulum`` is the built-in dataset."""
    datasets = {}
    for part in text.split(","):
        name, _, source = part.partition("=")
        datasets[name] = source or {"pendulum": BUILTIN_DATASET}.get(name, name)
    return datasets


def total_beta(config: QIPOConfig) -> float:
    """What QIPO's guidance scale has become at its last renewal: (l + 1) beta."""
    return config.beta * -(-config.policy_steps // config.renew_every)


class Study:
    """One folder of results.

    Args:
      out: the folder; gets returns.csv and renewals.csv (what every renewal logs).
      num_seeds: training seeds, all in one program.
      changes: fields changed in every preset.
      stages: folder of trained behavior models and critics, by default ``out / "stages"``; studies
        of the same presets and seeds may share one.
    """

    def __init__(
        self,
        out: pathlib.Path,
        num_seeds: int,
        changes: dict[str, Any],
        stages: pathlib.Path | None = None,
    ):
        self.out, self.num_seeds, self.changes = out, num_seeds, changes
        self.stages = out / "stages" if stages is None else stages
        out.mkdir(parents=True, exist_ok=True)
        self.stages.mkdir(parents=True, exist_ok=True)
        self.returns, self.renewals = out / "returns.csv", out / "renewals.csv"

    def config(self, dataset: Dataset) -> QIPOConfig:
        """The dataset's preset with this study's changes."""
        return dataclasses.replace(preset(EnvSpec.from_json(dataset.env_spec).id), **self.changes)

    def done(self) -> set[tuple[str, str]]:
        """(dataset, method) pairs that are finished."""
        return {(row["dataset"], row["method"]) for row in self.rows() if row["final"] == "1"}

    def rows(self) -> list[dict[str, str]]:
        """Every episode so far."""
        return read_rows(self.returns)

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append episodes."""
        append_rows(self.returns, FIELDS, rows)

    def run(
        self,
        name: str,
        dataset: Dataset,
        method: str,
        config: QIPOConfig,
        stages: QIPOConfig | None = None,
        part: str = "",
    ) -> None:
        """Train and evaluate one method, unless it is finished.

        Args:
          name: the dataset's, in results and files.
          dataset: as read from its source.
          method: the method's name in results.
          config: its configuration, validated.
          stages: the configuration that behavior model and critic are trained with; by default
            ``config``.
          part: as in :meth:`trained`.
        """
        if (name, method) in self.done():
            return
        normalizer = fit_normalizer(dataset)
        data = preprocess(dataset, normalizer, config.reward_transform)
        hooks = Hooks(self, name, method, dataset, normalizer, config)
        trainer = Trainer(config, data, range(self.num_seeds))
        state = self.trained(name, config if stages is None else stages, data, hooks, part)
        state = trainer.init_state().replace(behavior=state.behavior, critic=state.critic)
        hooks.act_fn = trainer.act_fn
        state = trainer.run(state, hooks)
        hooks.evaluate(config.phase_steps["policy"], state.acting(), final=True)

    def trained(
        self,
        name: str,
        config: QIPOConfig,
        data: Transitions,
        hooks: "Hooks",
        part: str = "",
        after: str | None = None,
    ) -> State:
        """A state whose behavior model and critic are trained, read from the folder where they are
        there.

        The rest of it is not to be used.

        Args:
          name: the dataset's.
          config: which behavior model and critic, and for how many steps.
          data: preprocessed.
          hooks: told of the training.
          part: names a critic that is trained for other than the usual steps.
          after: the part that this one continues, if it is there.
        """
        # Without a policy phase a run ends when both are trained.
        trainer = Trainer(
            dataclasses.replace(config, policy="bc", action_selection="sample"),
            data,
            range(self.num_seeds),
        )
        like = jax.eval_shape(trainer.init_state)  # the structure: what is read needs no program
        critic = f"{name}-{config.critic}"
        if trainer.algorithm.critic.uses_next_actions:
            critic += f"-{config.path}"
        files = {
            phase: self.stages / f"{stem}-x{self.num_seeds}.pkl"
            for phase, stem in (("behavior", f"{name}-{config.path}"), ("critic", critic + part))
        }
        missing = [phase for phase, file in files.items() if not file.exists()]
        found = {
            phase: _load(files[phase], getattr(like, phase))
            for phase in files
            if phase not in missing
        }
        if not missing:
            return like.replace(**found)
        if "critic" in missing and after is not None:
            earlier = self.stages / f"{critic}{after}-x{self.num_seeds}.pkl"
            if earlier.exists():
                found["critic"] = _load(earlier, like.critic)
        state = trainer.run(trainer.init_state().replace(**found), hooks)
        for phase in missing:
            _save(files[phase], getattr(state, phase))
        return state


def _save(file: pathlib.Path, tree: Any) -> None:
    """The leaves of a pytree; a process that is killed leaves no half of a file."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(pickle.dumps([np.asarray(leaf) for leaf in jax.tree.leaves(tree)]))
    partial.replace(file)


def _load(file: pathlib.Path, like: Any) -> Any:
    """The pytree that :func:`_save` wrote, of the structure of ``like``."""
    leaves = pickle.loads(file.read_bytes())
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in jax.tree.leaves(like)]:
        raise ValueError(f"{file}: was trained with another configuration; choose another folder")
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: pathlib.Path, fields: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a CSV file, one process at a time."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, fields)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


class Hooks:
    """Progress on one line a phase, and evaluation, of one method on one dataset."""

    def __init__(
        self,
        study: Study,
        name: str,
        method: str,
        dataset: Dataset,
        normalizer: Normalizer,
        config: QIPOConfig,
    ):
        self.act_fn: Any = None
        self._study, self._dataset, self._method = study, name, method
        self._env_spec, self._normalizer = dataset.env_spec, normalizer
        env_id = EnvSpec.from_json(dataset.env_spec).id
        self._references = dataset.reference_scores or reference_scores(env_id)
        if self._references is None:
            self.say(f"{env_id} has no reference scores: scores are raw returns")
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
        if scores is None:
            scores = returns
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
        self.say(
            f"table at {step}: " + ", ".join(f"{k} {v.mean():.4g}" for k, v in summary.items())
        )
        append_rows(
            self._study.renewals,
            RENEWAL_FIELDS,
            (
                dict(
                    zip(
                        RENEWAL_FIELDS,
                        (self._dataset, self._method, seed, step, key, value),
                        strict=True,
                    )
                )
                for key, values in summary.items()
                for seed, value in enumerate(
                    np.broadcast_to(values, self._study.num_seeds).tolist()
                )
            ),
        )

    def on_table(self, name: str, done: int, total: int) -> None:
        pass

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        pass

    def on_checkpoint(self, state: State) -> None:
        pass

    def stop_requested(self) -> bool:
        return False
