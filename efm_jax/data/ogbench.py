"""OGBench's datasets as single tasks, from its ``npz`` files.

Facts of ``ogbench/utils.py`` and ``relabel_utils.py`` in seohongpark/ogbench (Park et al. 2025,
arXiv 2410.20092).

*Rows.*  A file as OGBench publishes it has ``observations [N, S]``, ``actions [N, A]`` and
``terminals [N]``; its rows are states: a trajectory of ``T`` steps has ``T + 1`` rows, and
``terminals`` is 1 at the last, whose action leads nowhere.  Each other row is a transition to the
next row.  The two forms that ``ogbench.load_dataset`` returns are read too: with ``valids`` (its
``compact_dataset``), rows with 0 there are such last states; with ``next_observations``, every row
is a transition and ``terminals`` marks a trajectory's last.

*Ends.*  ``terminals`` says that a trajectory is over, never that a task is done, so it is a
truncation here.  ``masks`` is 0 where the task is done: those rows are ``terminated``, though the
recording, which knew of no task, goes on after them.  An episode's return and length are counted up
to its first such row.

*Rewards.*  Published files have none: OGBench computes ``rewards`` and ``masks`` for one of five
goals from ``qpos`` and ``button_states``.  So does this module, with OGBench's own function, where
the task is named; a file that already has both needs nothing.  A reward is minus the number of
parts of the task that are not done yet: -1 until the goal in mazes.  OGBench reports success rates,
which here are the share of episodes with a terminated row, not a function of the return.

*Names.*  ``cube-single-play-singletask-task2-v0`` (``task2`` may be left out for OGBench's default
task), with or without ``ogbench:`` before it, is the file ``cube-single-play-v0.npz`` in OGBench's
own folder, downloaded if need be, with the rewards and the environment
``cube-single-singletask-task2-v0``.  For a path, ``env`` names the task, as that id does.  Both
need ``pip install ogbench``; a path with rewards and no ``env`` does not.

Actions are in [-1, 1], as in all of OGBench's environments that have continuous ones.
"""

import contextlib
import importlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from efm_jax.data import validation
from efm_jax.data.download import NPZ_SIGNATURE, fetch
from efm_jax.data.episodes import episodes
from efm_jax.envs import environments
from efm_jax.errors import DataError, reason
from efm_jax.types import Dataset, Rows, Transitions, all_rows

PREFIX = "ogbench:"
DEFAULT_FOLDER = "~/.ogbench/data"
URL = "https://rail.eecs.berkeley.edu/datasets/ogbench/"

_NAME = re.compile(
    r"(?P<maze>.+)-(?P<kind>[a-z]+)-singletask(?P<task>-task[1-5])?-(?P<version>v\d+)"
)
_FLAGS = ("terminals", "masks", "valids")
_RANKS = {
    "observations": 2,
    "actions": 2,
    "terminals": 1,
    "rewards": 1,
    "masks": 1,
    "valids": 1,
    "next_observations": 2,
}
_REQUIRED = ("observations", "actions", "terminals")
_STATE = ("qpos", "button_states")  # what rewards are computed from


class Task(NamedTuple):
    """What the name of a single-task dataset says."""

    file: str
    env: str


def is_ogbench(name: str) -> bool:
    """Whether a name, not a path, is meant as one of OGBench's."""
    return name.startswith(PREFIX) or "-singletask" in name


def parse_name(name: str) -> Task:
    """The file and the environment of a single-task dataset.

    Raises:
      DataError: a goal-conditioned dataset, images, discrete actions, or no name of OGBench's at
        all.
    """
    bare = name.removeprefix(PREFIX)
    if bare.startswith(("visual-", "powderworld-")):
        raise DataError(f"{name}: observations are images; only vectors are supported")
    match = _NAME.fullmatch(bare)
    if match is None:
        example = re.sub(r"-(v\d+)$", r"-singletask-\1", bare)
        example = example if "-singletask-" in example else "cube-single-play-singletask-task2-v0"
        raise DataError(
            f"{name}: unknown dataset: expected a single task of OGBench, with rewards, such as "
            f"{example}"
        )
    maze, version = match["maze"], match["version"]
    return Task(
        file=f"{maze}-{match['kind']}-{version}.npz",
        env=f"{maze}-singletask{match['task'] or ''}-{version}",
    )


def load_ogbench_name(
    name: str, *, folder: str = DEFAULT_FOLDER, env: str | None = None, rows: Rows = all_rows
) -> Dataset:
    """Read a dataset by its OGBench name; rewards are those of the task in the name.

    Raises:
      DataError: as :func:`parse_name`, :func:`.download.fetch` and :func:`load_ogbench` do;
        ``ogbench`` is asked for before anything is downloaded.
    """
    task = parse_name(name)
    _import_ogbench(name)
    path = Path(folder).expanduser() / task.file
    fetch(name, URL + task.file, path, NPZ_SIGNATURE)
    dataset = load_ogbench(str(path), env=task.env, rows=rows)
    if env is not None:
        spec = environments.registered_spec(name, env)
        environments.check_sizes(name, spec, dataset.observation_size, dataset.action_size)
        dataset = dataset._replace(env_spec=environments.spec_json(name, spec))
    return dataset._replace(name=name)


def load_ogbench(path: str, *, env: str | None = None, rows: Rows = all_rows) -> Dataset:
    """Read an ``npz`` file of OGBench, local or gs://, as the module's docstring says.

    ``rows`` selects transitions, given their number; the compressed file is read whole.

    Raises:
      DataError: no such file, not ``npz``, an array missing, no rewards and no task to compute them
        for, an environment that is not known or whose sizes differ, or data that :mod:`.validation`
        refuses. Indices in messages are rows of the file.
    """
    arrays = _read(path)
    validation.check_action_dtype(path, arrays["actions"])
    validation.check_lengths(path, {k: v for k, v in arrays.items() if k in _RANKS}, _RANKS)
    observations = _numbers(path, "observations", arrays["observations"])
    flags = {k: validation.as_flags(path, k, arrays[k]) for k in _FLAGS if k in arrays}
    kept, next_observations, last = _layout(path, arrays, observations, flags)

    size, action_size = observations.shape[1], arrays["actions"].shape[1]
    bound = np.ones(action_size, np.float32)
    spec = None
    if env is not None:
        if "-singletask" in env:
            _import_ogbench(path)
        spec = environments.registered_spec(path, env)
        environments.check_sizes(path, spec, size, action_size)
    if "rewards" in arrays:
        if "masks" not in flags:
            raise DataError(
                f"{path}: the file has 'rewards' but no 'masks', which say where the task is done"
            )
        rewards, terminated = _numbers(path, "rewards", arrays["rewards"]), ~flags["masks"]
    else:
        rewards, terminated = _relabel(path, env, arrays)

    selected = rows(len(kept))
    # Trajectories as rows of transitions, so that an episode begins in exactly one host's part of
    # them.
    firsts, returns, lengths = episodes(rewards[kept], last[kept], terminated[kept])
    begun = (firsts >= selected.start) & (firsts < selected.stop)
    # The action of a last state was never played: whatever it is, it is not looked at.
    actions = np.zeros_like(arrays["actions"])
    actions[kept] = arrays["actions"][kept]
    actions = validation.clip_actions(path, _numbers(path, "actions", actions), -bound, bound)
    kept = kept[selected]
    return Dataset(
        name=path,
        transitions=Transitions(
            observations=observations[kept],
            actions=actions[kept],
            rewards=rewards[kept],
            next_observations=next_observations[kept],
            terminated=terminated[kept].astype(np.float32),
        ),
        episode_returns=returns[begun],
        episode_lengths=lengths[begun],
        action_low=-bound,
        action_high=bound,
        env_spec=None if spec is None else environments.spec_json(path, spec),
        reference_scores=None,
        first_row=selected.start,
    )


def _read(path: str) -> dict[str, np.ndarray]:
    with _open(path) as file:
        arrays = {name: file[name] for name in (*_RANKS, *_STATE) if name in file}
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise DataError(f"{path}: the file has no array {', '.join(map(repr, missing))}")
    return arrays


@contextlib.contextmanager
def _open(path: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The file, for reading; what NumPy raises inside is a :class:`DataError`."""
    file_path = epath.Path(path).expanduser()
    try:
        if not file_path.exists():
            raise DataError(f"{path}: no such file")
        if file_path.is_dir():
            raise DataError(f"{path}: expected an npz file; got a folder")
        with file_path.open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: expected an npz file; got a single array")
            with file:
                yield file
    except DataError:
        raise
    # ValueError: pickled objects, or a damaged header; ImportError: no client for this kind of
    # path.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, ImportError) as error:
        raise DataError(f"{path}: cannot be read as an npz file ({reason(error)})") from error


def _layout(
    path: str, arrays: dict[str, np.ndarray], observations: np.ndarray, flags: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are transitions, next observations ``[N, S]``, and the rows ``[N]`` that end a trajectory."""
    terminals = flags["terminals"]
    if "next_observations" in arrays:
        following = _numbers(path, "next_observations", arrays["next_observations"])
        if following.shape != observations.shape:
            shapes = observations.shape, following.shape
            raise DataError(
                f"{path}: observations have shape {shapes[0]}, next_observations {shapes[1]}"
            )
        return np.arange(len(terminals)), following, terminals
    states_only = ~flags["valids"] if "valids" in flags else terminals
    following = np.concatenate([observations[1:], observations[-1:]])
    if not states_only[-1]:
        row = len(terminals) - 1
        raise DataError(f"{path}: the last row, {row}, is not marked as the end of a trajectory")
    kept = np.flatnonzero(~states_only)
    if len(kept) == 0:
        raise DataError(
            f"{path}: the dataset is empty: no row of {len(terminals)} has a next observation"
        )
    return kept, following, np.append(states_only[1:], True)


def _relabel(
    path: str, env: str | None, arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards ``[N]`` and where the task is done ``[N]`` bool, by OGBench's function."""
    if env is None or "-singletask" not in env:
        given = "" if env is None else f", not {env}"
        raise DataError(
            f"{path}: the file has no 'rewards': give the environment of a single task, such as "
            f"cube-single-singletask-task2-v0{given}, or load the dataset by its name, such as "
            "cube-single-play-singletask-task2-v0; both need pip install ogbench"
        )
    if "qpos" not in arrays:
        raise DataError(
            f"{path}: the file has neither 'rewards' nor 'qpos', from which they are computed"
        )
    try:
        relabel = importlib.import_module("ogbench.relabel_utils").relabel_dataset
    except ImportError as error:
        raise DataError(f"{path}: rewards need ogbench >= 1.1 ({reason(error)})") from error
    dataset: dict[str, Any] = {name: arrays[name] for name in _STATE if name in arrays}
    environment = environments.make(environments.registered_spec(path, env))
    try:
        relabel(env, environment, dataset)
    except (AssertionError, AttributeError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path}: rewards of {env} cannot be computed ({reason(error)})") from error
    finally:
        environment.close()
    return _numbers(path, "rewards", dataset["rewards"]), dataset["masks"] == 0


def _numbers(path: str, name: str, array: np.ndarray) -> np.ndarray:
    array = validation.as_float32(path, name, array)
    validation.check_finite(path, name, array)
    return array


def _import_ogbench(source: str) -> None:
    """Register OGBench's environments."""
    try:
        importlib.import_module("ogbench")
    except ImportError as error:
        raise DataError(
            f"{source}: OGBench's environments and rewards need pip install ogbench "
            f"({reason(error)})"
        ) from error
