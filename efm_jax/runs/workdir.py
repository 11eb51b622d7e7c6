"""A work directory as the library sees it: what ``config.json`` says of its run, and its checkpoints."""

import dataclasses
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from efm_jax import __version__
from efm_jax.rl.algorithm import Algorithm, State
from efm_jax.rl.config import QIPOConfig
from efm_jax.runs.checkpoint import Checkpointer
from efm_jax.files import write_whole
from efm_jax.types import Array, Dataset, Normalizer

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Everything that identifies a run and is needed to evaluate it without its dataset."""

    config: QIPOConfig
    seed: int
    num_seeds: int
    dataset: str
    fingerprint: str
    transitions: int
    dataset_return: float
    observation_size: int
    action_size: int
    env_spec: str
    reference_scores: tuple[float, float] | None

    @classmethod
    def describe(
        cls,
        config: QIPOConfig,
        dataset: Dataset,
        transitions: int,
        fingerprint: str,
        references: tuple[float, float] | None,
        seed: int,
        num_seeds: int,
    ) -> "RunInfo":
        """The record of a run about to start; ``dataset`` may hold this host's part of the transitions."""
        return cls(
            config=config,
            seed=seed,
            num_seeds=num_seeds,
            dataset=dataset.name,
            fingerprint=fingerprint,
            transitions=transitions,
            dataset_return=float(dataset.episode_returns.mean()),
            observation_size=dataset.observation_size,
            action_size=dataset.action_size,
            env_spec=dataset.env_spec,
            reference_scores=references,
        )

    @property
    def seeds(self) -> list[int]:
        """The root seed of every training run."""
        return list(range(self.seed, self.seed + self.num_seeds))

    def save(self, workdir: epath.Path) -> None:
        """Write ``config.json``, whole or not at all."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["config"] = self.config.to_dict()
        write_whole(workdir / CONFIG_FILE, json.dumps({"version": __version__, **values}, indent=2) + "\n")

    @classmethod
    def load(cls, workdir: epath.Path) -> "RunInfo | None":
        """The record of a run started before; None where there is none.

        Raises:
          ValueError: if the file cannot be understood, or is missing beside checkpoints: they could
            be of any run.
        """
        path = workdir / CONFIG_FILE
        if not path.exists():
            checkpoints = workdir / CHECKPOINTS
            if checkpoints.is_dir() and any(child.name.isdigit() for child in checkpoints.iterdir()):
                raise ValueError(
                    f"workdir {workdir}: checkpoints are there, but {CONFIG_FILE} is missing; "
                    "put it back or give another --workdir"
                )
            return None
        try:
            values = json.loads(path.read_text())
            values.pop("version")
            values["config"] = QIPOConfig.from_dict(values["config"])
            if values["reference_scores"] is not None:
                values["reference_scores"] = tuple(values["reference_scores"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"workdir {workdir}: {CONFIG_FILE} cannot be read: {error}") from error

    def check_same(self, other: "RunInfo", workdir: epath.Path) -> None:
        """Refuse to continue a run of another configuration, dataset or seed."""
        mine, theirs = self.config.to_dict(), other.config.to_dict()
        pairs = [(f"config.{name}", theirs[name], mine[name]) for name in mine]
        # One file has several paths: the fingerprint tells datasets apart, the name only says it
        # better.
        data = "dataset" if self.fingerprint != other.fingerprint and self.dataset != other.dataset else None
        for name in (data or "fingerprint", "seed", "num_seeds", "env_spec"):
            pairs.append((name, getattr(other, name), getattr(self, name)))
        for name, before, now in pairs:
            if before != now:
                raise ValueError(
                    f"workdir {workdir}: holds a run with {name} = {before!r}, asked for {now!r}; "
                    "give another --workdir"
                )


class Restored(NamedTuple):
    """A run as its newest readable checkpoint has it."""

    step: int  # of all phases
    state: State  # with a leading seed axis
    normalizer: Normalizer
    keys: Array  # [K] root keys of the seeds


def restore(
    workdir: epath.Path, info: RunInfo, algorithm: Algorithm, report: Callable[[str], None]
) -> Restored:
    """The newest readable checkpoint of a run whose policy has been trained, or is being trained.

    Args:
      workdir: where ``info`` was read.
      info: what the run is.
      algorithm: of the same configuration.
      report: told of checkpoints that cannot be read.

    Raises:
      ValueError: no checkpoint, or none of the policy phase.
    """
    keys = jnp.stack([jax.random.key(seed) for seed in info.seeds])
    sizes = (info.observation_size,) * 2 + (info.action_size,) * 2
    template = {
        "state": jax.vmap(algorithm.init)(keys),
        "normalizer": Normalizer(*(jnp.zeros(size) for size in sizes)),
    }
    found = None
    if (workdir / CHECKPOINTS).exists():  # a checkpointer would make it
        checkpointer = Checkpointer(workdir / CHECKPOINTS, report=report)
        try:
            found = checkpointer.restore(template)
        finally:
            checkpointer.close()
    if found is None:
        raise ValueError(f"workdir {workdir}: no checkpoint has been saved yet")
    step, tree = found
    state = tree["state"]
    last = "policy" if info.config.phase_steps["policy"] else "critic"
    if int(getattr(state, last).step[0]) == 0:
        raise ValueError(f"workdir {workdir}: training stopped before the {last} phase; nothing to evaluate")
    return Restored(step, state, Normalizer(*tree["normalizer"]), keys)
