"""Shared parts of studies of offline RL: a folder of results, presets, trained stages, evaluation.

A study runs methods, each a configuration with a name, on datasets.  Behavior models and critics
are trained once for all methods that may share them, and kept under ``stages/``; what is finished
in returns.csv is not computed again.
"""

import argparse
import dataclasses
import fcntl
import importlib
import io
import pathlib
import time
from collections.abc import Container
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from etils import epath
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import BUILTIN_DATASET, fit_normalizer, load_dataset, preprocess
from efm_jax.envs import dataset_references, evaluate, normalized_score
from efm_jax.files import write_whole
from efm_jax.rl.agents import AgentParams, State, player
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.trainer import Hooks, Trainer
from efm_jax.runs.evaluation import episode_seeds
from efm_jax.types import Dataset, Normalizer, Transitions

# Beginning of an environment's id -> preset.
FAMILIES = {"Pendulum": "qipo_ot", "PointMaze": "pointmaze"}
FAMILIES |= dict.fromkeys(("Hopper", "HalfCheetah", "Walker2d", "Ant-"), "mujoco")
SMOKE = {"hidden_dims": (16,), "critic_hidden_dims": (16,), "batch_size": 32, "support_size": 2}
SMOKE |= {"behavior_steps": 50, "critic_steps": 50, "policy_steps": 50, "renew_every": 25}
SMOKE |= {"log_every": 25, "checkpoint_every": 50, "eval_every": 25, "eval_episodes": 2}
SMOKE |= {"sample_steps": 2, "num_critics": 2, "num_candidates": 2}
_KEYS = ["dataset", "method", "seed", "step"]
FIELDS = [*_KEYS, "final", "episode_seed", "return", "length", "score", "seconds"]
RENEWAL_FIELDS = [*_KEYS, "name", "value"]


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    """Make a parser with the flags that all studies have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out))
    parser.add_argument("--stages", type=pathlib.Path, help="trained behavior models and critics")
    parser.add_argument("--smoke", action="store_true", help="every part, in a minute or two")
    parser.add_argument("--report", action="store_true", help="only make tables and figures")
    return parser


def parse_names(
    parser: argparse.ArgumentParser, flag: str, text: str, known: Container[str]
) -> list[str]:
    """Split names at commas; one that is not known ends the program."""
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{flag}: unknown {name!r}; expected {', '.join(known)}")
    return names


def parse_datasets(text: str) -> dict[str, str]:
    """Parse ``name=ID_OR_FILE,...``; a bare ``pendulum`` is the built-in dataset."""
    datasets = {}
    for part in text.split(","):
        name, _, source = part.partition("=")
        datasets[name] = source or {"pendulum": BUILTIN_DATASET}.get(name, name)
    return datasets


def total_beta(config: QIPOConfig) -> float:
    """Sum QIPO's guidance scale up to its last renewal: (l + 1) beta."""
    return config.beta * -(-config.policy_steps // config.renew_every)


def preset(env_id: str) -> QIPOConfig:
    """Find the preset of an environment's family."""
    for start, name in FAMILIES.items():
        if env_id.startswith(start):
            return importlib.import_module(f"experiments.configs.{name}").get_config()
    raise ValueError(f"no family has the environment {env_id}; known: {', '.join(FAMILIES)}")


def read_rows(path: pathlib.Path, fields: list[str]) -> pd.DataFrame:
    """Read a CSV file; no rows where there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=fields)
    names = dict.fromkeys(("dataset", "method", "problem", "arm"), str)
    return pd.read_csv(path, dtype=names, float_precision="round_trip")


def append_rows(path: pathlib.Path, rows: pd.DataFrame) -> None:
    """Append rows to a CSV file, one process at a time."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows.to_csv(file, header=path.stat().st_size == 0, index=False)


class Problem(NamedTuple):
    """Data to train on, and the configuration that methods change."""

    name: str  # in results and files
    config: QIPOConfig
    data: Transitions  # preprocessed
    # What policies are played with; None where they are not.
    dataset: Dataset | None = None
    normalizer: Normalizer | None = None


@dataclasses.dataclass
class Study:
    """One folder of results: returns.csv, and renewals.csv with what every renewal logs."""

    out: pathlib.Path
    num_seeds: int  # training seeds, all in one program
    changes: dict[str, Any]  # fields changed in every preset
    # Trained behavior models and critics; studies of the same presets and seeds may share them.
    stages: pathlib.Path | None = None

    def __post_init__(self) -> None:
        self.stages = self.stages or self.out / "stages"
        for folder in (self.out, self.stages):
            folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Study":
        """Make the study that the flags of :func:`make_parser` describe."""
        return cls(args.out, args.seeds, SMOKE if args.smoke else {}, args.stages)

    def load(self, name: str, source: str) -> Problem:
        """Read a dataset, with the preset of its environment's family and this study's changes.

        Raises:
          ValueError: for a dataset that cannot be read, or of an environment without a preset.
        """
        dataset = load_dataset(source)
        config = dataclasses.replace(preset(EnvSpec.from_json(dataset.env_spec).id), **self.changes)
        normalizer = fit_normalizer(dataset)
        data = preprocess(dataset, normalizer, config.reward_transform)
        return Problem(name, config, data, dataset, normalizer)

    def rows(self) -> pd.DataFrame:
        """Read every episode so far."""
        return read_rows(self.out / "returns.csv", FIELDS)

    def trainer(self, config: QIPOConfig, problem: Problem) -> Trainer:
        """Make a trainer of all seeds."""
        return Trainer(config, problem.data, range(self.num_seeds))

    def run(
        self,
        problem: Problem,
        method: str,
        config: QIPOConfig,
        stages: QIPOConfig | None = None,
        part: str = "",
    ) -> None:
        """Train and evaluate one method, unless it is finished.

        Args:
          problem: the data.
          method: the method's name in results.
          config: its configuration, validated.
          stages, part: configuration and part of :meth:`trained`, by default of ``config``.
        """
        done = self.rows().query("final == 1 and dataset == @problem.name and method == @method")
        if done.empty:
            trainer = self.trainer(config, problem)
            hooks = Evaluation(self.out, problem, method, trainer)
            stages = self.trained(problem, stages or config, hooks, part)
            params = self.improve(trainer, stages, hooks)
            hooks.evaluate(trainer.agent.phase_steps["policy"], params, final=True)

    def improve(self, trainer: Trainer, stages: State, hooks: Hooks) -> AgentParams:
        """Train the policy on the behavior model and critic of :meth:`trained`."""
        state = trainer.init_state().replace(behavior=stages.behavior, critic=stages.critic)
        return trainer.run(state, hooks).params()

    def trained(
        self,
        problem: Problem,
        config: QIPOConfig,
        hooks: Hooks,
        part: str = "",
        after: str | None = None,
    ) -> State:
        """Train behavior model and critic, or read them where they are in the folder.

        Args:
          problem: the data.
          config: which behavior model and critic, and for how many steps.
          hooks: told of the training.
          part: names a critic that is trained for other than the usual steps.
          after: the part that this one continues, if it is there.

        Returns:
          A state, of which only behavior model and critic are to be used.
        """
        # Without a policy phase a run ends when both are trained.
        config = dataclasses.replace(config, policy="bc", action_selection="sample")
        trainer = self.trainer(config, problem)
        like = jax.eval_shape(trainer.init_state)  # the structure: what is read needs no program
        critic = f"{problem.name}-{config.critic}"
        if trainer.agent.critic.uses_next_actions:
            critic += f"-{config.path}"
        stems = {"behavior": f"{problem.name}-{config.path}", "critic": critic + part}
        files = {phase: self._file(stem) for phase, stem in stems.items()}
        sources = {phase: file for phase, file in files.items() if file.exists()}
        missing = files.keys() - sources.keys()
        if after is not None and self._file(critic + after).exists():
            sources.setdefault("critic", self._file(critic + after))
        found = {phase: _load(file, getattr(like, phase)) for phase, file in sources.items()}
        if not missing:
            return like.replace(**found)
        state = trainer.run(trainer.init_state().replace(**found), hooks)
        for phase in missing:
            _save(files[phase], getattr(state, phase))
        return state

    def _file(self, stem: str) -> pathlib.Path:
        return self.stages / f"{stem}-x{self.num_seeds}.npz"


def _save(file: pathlib.Path, tree: Any) -> None:
    """Write the leaves of a pytree; a process that is killed leaves no half of a file."""
    np.savez(buffer := io.BytesIO(), *jax.tree.leaves(tree))
    write_whole(epath.Path(file), buffer.getvalue())


def _load(file: pathlib.Path, like: Any) -> Any:
    """Read the pytree that :func:`_save` wrote, of the structure of ``like``."""
    with np.load(file, allow_pickle=False) as arrays:
        leaves = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    found, expected = ([(a.shape, a.dtype) for a in s] for s in (leaves, jax.tree.leaves(like)))
    if found != expected:
        raise ValueError(f"{file}: was trained with another configuration; choose another folder")
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


class Progress(Hooks):
    """One line for each phase of one method on one dataset."""

    def __init__(self, dataset: str, method: str):
        self.dataset, self.method = dataset, method

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"{self.dataset:<12} {self.method:<14} {text}", flush=True)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        self.say(f"{phase}: {total - done} steps")


class Evaluation(Progress):
    """Returns and what renewals log, of one method on one dataset, in the files of a study."""

    def __init__(self, out: pathlib.Path, problem: Problem, method: str, trainer: Trainer):
        super().__init__(problem.name, method)
        self._out, self._trainer, dataset = out, trainer, problem.dataset
        self._env_spec, self._normalizer = dataset.env_spec, problem.normalizer
        references = dataset.reference_scores, dataset.name, dataset.env_spec
        self._references = dataset_references(*references)
        if self._references is None:
            self.say(f"{dataset.name} has no reference scores: scores are raw returns")
        self._episodes = episode_seeds(trainer.config.eval_episodes)
        self._started = time.perf_counter()

    def on_evaluate(self, step: int, params: AgentParams) -> None:
        self.evaluate(step, params)

    def evaluate(self, step: int, params: AgentParams, final: bool = False) -> None:
        """Play the episodes and write every return."""
        agent, keys, episodes = self._trainer.agent, self._trainer.keys, self._episodes
        act = player(agent, "policy", params, self._normalizer, keys, episodes)
        returns, lengths = evaluate(
            act, self._env_spec, num_policies=len(keys), episode_seeds=episodes
        )
        scores = returns
        if self._references is not None:
            scores = normalized_score(returns, self._references)
        seconds = round(time.perf_counter() - self._started, 1)
        columns = {"dataset": self.dataset, "method": self.method}
        columns |= {"seed": np.repeat(range(len(keys)), len(episodes)), "step": step}
        columns |= {"final": int(final), "episode_seed": np.tile(episodes, len(keys))}
        columns |= {"return": returns.ravel(), "length": lengths.ravel(), "score": scores.ravel()}
        append_rows(self._out / "returns.csv", pd.DataFrame(columns | {"seconds": seconds}))
        means = " ".join(f"{mean:.1f}" for mean in scores.mean(axis=1))
        self.say(f"step {step}{' (last)' if final else ''}: scores {means}, {seconds} s")

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        means = ", ".join(f"{name} {values.mean():.4g}" for name, values in summary.items())
        self.say(f"table at {step}: {means}")
        rows = pd.DataFrame(summary, dtype=float).rename_axis("seed").reset_index()
        rows = rows.melt("seed", var_name="name")
        rows = rows.assign(dataset=self.dataset, method=self.method, step=step)[RENEWAL_FIELDS]
        append_rows(self._out / "renewals.csv", rows)
