"""From a dataset's name to the dataset."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from efm_jax import checks
from efm_jax.data import builtin, d4rl_files, ogbench
from efm_jax.data.d4rl import load_d4rl
from efm_jax.data.dataset import Dataset
from efm_jax.data.minari import is_id, load_minari, local_path
from efm_jax.errors import DataError
from efm_jax.types import Rows, all_rows

DATASET_SOURCES = f"""\
{builtin.BUILTIN_DATASET}: built in, scripted controllers on Pendulum-v1, recorded at first use;
a Minari id such as D4RL/pointmaze/umaze-v2: read from Minari's local folder, else downloaded;
a classic name of D4RL such as hopper-medium-v2: read from D4RL's local folder, else downloaded;
an OGBench task such as cube-single-play-singletask-v0: read from OGBench's folder, else downloaded;
a path ending in .hdf5 or .h5: a file in D4RL's layout, local or gs://;
a path ending in .npz: a file in OGBench's layout, local or gs://."""

# Ids on Minari's server: tasks, and the data that each of them has.
_MINARI = {
    "mujoco/ant mujoco/halfcheetah mujoco/hopper mujoco/walker2d mujoco/humanoid mujoco/swimmer "
    "mujoco/reacher mujoco/pusher": "simple-v0 medium-v0 expert-v0",
    "D4RL/pen D4RL/door D4RL/hammer D4RL/relocate": "human-v2 cloned-v2 expert-v2",
    "D4RL/kitchen": "complete-v2 partial-v2 mixed-v2",
    "D4RL/pointmaze": "open-v2 umaze-v2 medium-v2 large-v2 open-dense-v2 umaze-dense-v2 "
    "medium-dense-v2 large-dense-v2",
    "D4RL/antmaze": "umaze-v1 umaze-diverse-v1 medium-play-v1 medium-diverse-v1 large-play-v1 "
    "large-diverse-v1",
}


class Folders(NamedTuple):
    """Places of the files that are asked for by name, found or downloaded: each project's own."""

    d4rl: str = d4rl_files.DEFAULT_FOLDER
    ogbench: str = ogbench.DEFAULT_FOLDER


def load_dataset(
    name: str,
    *,
    env: str | None = None,
    rows: Rows = all_rows,
    folders: Folders | None = None,
    max_episode_steps: int | None = None,
) -> Dataset:
    """Read and validate a dataset of the ``DATASET_SOURCES``, in the environment's own units.

    Args:
      name: the built-in id, a Minari id, a name of D4RL or OGBench, or the path of an HDF5 or npz
        file. A name that D4RL and Minari could both have, such as ``door-human-v1``, is D4RL's.
      env: a Gymnasium id to evaluate in, instead of the environment that the source names. For an
        OGBench file it also names the task that rewards are computed for.
      rows: given the number of transitions that the source has, the slice of them to read. Of the
        rest, little more than the rewards is read; what it raises is raised.
      folders: where D4RL's and OGBench's files are; by default ``~/.d4rl/datasets`` and
        ``~/.ogbench/data``. Minari finds its own (``MINARI_DATASETS_PATH``).
      max_episode_steps: of an evaluated episode, instead of the data's own limit or the
        environment's; the reference scores of another limit are dropped.

    Raises:
      DataError: an unknown name, a failed download, or data that cannot be used; one line, what and
        where.
    """
    dataset = _load(name, env, rows, folders or Folders())
    if max_episode_steps is None or dataset.env_spec is None:
        return dataset
    checks.check_integer("max_episode_steps", max_episode_steps, 1)
    spec = json.loads(dataset.env_spec)
    if spec["max_episode_steps"] == max_episode_steps:
        return dataset
    return dataset._replace(
        env_spec=json.dumps(spec | {"max_episode_steps": max_episode_steps}),
        reference_scores=None,
        notes=tuple(note for note in dataset.notes if "--max_episode_steps" not in note),
    )


def _load(name: str, env: str | None, rows: Rows, folders: Folders) -> Dataset:
    if name.lower().endswith(".npz"):
        return ogbench.load_ogbench(name, env=env, rows=rows)
    if name.lower().endswith((".hdf5", ".h5")):
        return load_d4rl(name, env=env, rows=rows)
    if name.startswith(("/", "./", "../", "~")) or "://" in name:
        raise DataError(f"{name}: unknown dataset: expected a path ending in .hdf5, .h5 or .npz")
    if name in d4rl_files.D4RL_FILES:
        return load_d4rl(d4rl_files.ensure_file(name, folders.d4rl), name=name, env=env, rows=rows)
    if ogbench.is_ogbench(name):
        return ogbench.load_ogbench_name(name, folder=folders.ogbench, env=env, rows=rows)
    if name == builtin.BUILTIN_DATASET:
        builtin.ensure_recorded()
    problem = d4rl_files.misspelled(name)
    if problem is not None and not local_path(name).exists():
        raise DataError(problem)
    try:
        return load_minari(name, env=env, rows=rows)
    except DataError as error:
        if is_id(name) and local_path(name).exists():
            raise
        raise DataError(f"{error}{checks.did_you_mean(name, _names())}") from error


def _names() -> Iterator[str]:
    """Names that a misspelled one may have meant; Minari's server has more."""
    yield builtin.BUILTIN_DATASET
    yield from d4rl_files.D4RL_FILES
    root = local_path("")
    yield from (
        str(file.parents[1].relative_to(root)) for file in root.glob("**/data/metadata.json")
    )
    for tasks, kinds in _MINARI.items():
        yield from (f"{task}/{kind}" for task in tasks.split() for kind in kinds.split())
