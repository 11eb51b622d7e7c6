"""Datasets and environments for the entry points: where files are, what the user allows."""

import os

from efm_jax.data import Folders
from efm_jax.envs import specs

from .cli import Flags

FLAGS = Flags()
ENV = FLAGS.string(
    "env",
    None,
    "Gymnasium id to evaluate in, as for gymnasium.make (module:Name-v0 imports the module), "
    "instead of the one that the dataset or the run names.",
)
MAX_EPISODE_STEPS = FLAGS.integer(
    "max_episode_steps",
    None,
    "Steps of an evaluated episode, instead of the dataset's or the environment's.",
    1,
)
_ALLOW_ENV = FLAGS.list(
    "allow_env",
    [],
    "Packages whose environments a dataset or a run may name, beside Gymnasium's, Gymnasium "
    "Robotics' and OGBench's; imported first.",
)


def allow_environments() -> None:
    """Let files name the environments of --allow_env; a ``ValueError`` if it is no package."""
    specs.allow(_ALLOW_ENV.value)


def dataset_folders() -> Folders:
    """Say where named datasets are; ``D4RL_DATASET_DIR`` moves D4RL's, as it does for ``d4rl``.

    ``OGBENCH_DATASET_DIR`` moves OGBench's.
    """
    given = {name: os.environ.get(f"{name.upper()}_DATASET_DIR") for name in Folders._fields}
    return Folders(**{name: folder for name, folder in given.items() if folder})
