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
need ``pip install 'efm-jax[ogbench]'``; a path with rewards and no ``env`` does not.

Actions are in [-1, 1], as in all of OGBench's environments that have continuous ones.
"""

import contextlib
import importlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efm_jax.data import validation
from efm_jax.data.dataset import Dataset
from efm_jax.data.download import NPZ_SIGNATURE, fetch
from efm_jax.data.rows import Columns, episodes, problems_of, read_npz
from efm_jax.envs import environments, specs
from efm_jax.errors import DataError, install, reason
from efm_jax.types import Rows, Transitions, all_rows

PREFIX = "ogbench:"
DEFAULT_FOLDER = "~/.ogbench/data"
URL = "https://rail.eecs.berkeley.edu/datasets/ogbench/"

_NAME = re.compile(
    r"(?P<maze>.+)-(?P<kind>[a-z]+)-singletask(?P<task>-task[1-5])?-(?P<version>v\d+)"
)
_REQUIRED = ("observations", "actions", "terminals")
_OPTIONAL = ("rewards", "masks", "valids", "next_observations")
_STATE = ("qpos", "button_states")  # what rewards are computed from
_ORIGIN = "regenerated"  # JSON as bytes, of :mod:`.ogbench_experts`
_ARRAYS = (*_REQUIRED, *_OPTIONAL, *_STATE, _ORIGIN)


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
    import_ogbench(name)
    path = Path(folder).expanduser() / task.file
    fetch(name, URL + task.file, path, NPZ_SIGNATURE)
    dataset = load_ogbench(str(path), env=task.env, rows=rows, name=name)
    if env is not None:
        spec = specs.named(name, env)
        environments.check_sizes(name, spec, dataset.observation_size, dataset.action_size)
        dataset = dataset._replace(env_spec=specs.to_json(name, spec))
    return dataset


def load_ogbench(
    path: str, *, name: str | None = None, env: str | None = None, rows: Rows = all_rows
) -> Dataset:
    """Read an ``npz`` file of OGBench, local or gs://, as the module's docstring says.

    ``rows`` selects transitions, given their number; the compressed file is read whole.  The
    dataset is called ``name``, or ``path``, and regenerated where the file says that it is.

    Raises:
      DataError: no such file, not ``npz``, an array missing, no rewards and no task to compute them
        for, an environment that is not known or whose sizes differ, or data that :mod:`.validation`
        refuses. Indices in messages are rows of the file.
    """
    arrays = read_npz(path, _ARRAYS)
    columns = Columns(path, arrays, _REQUIRED)
    kept, observations, next_observations, last = _layout(path, columns)
    spec = None
    if env is not None:
        if "-singletask" in env:
            import_ogbench(path)
        spec = specs.named(path, env)
        sizes = observations.shape[1], columns["actions"].shape[1]
        environments.check_sizes(path, spec, *sizes)
    if "rewards" not in columns:
        columns = Columns(path, arrays | _relabel(path, env, arrays), _REQUIRED)
    if "masks" not in columns:
        raise DataError(
            f"{path}: the file has 'rewards' but no 'masks', which say where the task is done"
        )
    rewards, terminated = columns.numbers("rewards"), ~columns.flags("masks")

    selected = rows(len(kept))
    # Trajectories as rows of transitions, so that an episode begins in exactly one host's part.
    firsts, returns, lengths = episodes(rewards[kept], last[kept], terminated[kept])
    begun = (firsts >= selected.start) & (firsts < selected.stop)
    # Whatever the action of a last state is, it was never played, so it is not looked at.
    columns["actions"][np.setdiff1d(np.arange(len(columns)), kept)] = 0.0
    actions = columns.numbers("actions")
    high = np.ones(actions.shape[1], np.float32)
    actions = validation.clip_actions(path, actions, -high, high)
    kept = kept[selected]
    origin = _origin(path, arrays)
    return Dataset(
        name=(name or path) + ("" if origin is None else f" ({say_origin(origin)})"),
        transitions=Transitions(
            observations=observations[kept],
            actions=actions[kept],
            rewards=rewards[kept],
            next_observations=next_observations[kept],
            terminated=terminated[kept].astype(np.float32),
        ),
        episode_returns=returns[begun],
        episode_lengths=lengths[begun],
        action_low=-high,
        action_high=high,
        env_spec=None if spec is None else specs.to_json(path, spec),
        reference_scores=None,
        first_row=selected.start,
    )


def origin_of(path: str) -> dict[str, Any] | None:
    """Seed and versions that a file was regenerated with; None of any other."""
    return _origin(path, read_npz(path, (_ORIGIN,)))


def say_origin(origin: dict[str, Any]) -> str:
    """Words for what :func:`origin_of` returns."""
    return "regenerated: " + ", ".join(f"{name} {value}" for name, value in origin.items())


def _origin(path: str, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    if _ORIGIN not in arrays:
        return None
    with problems_of(f"{path}: {_ORIGIN!r}: expected a JSON object"):
        return dict(json.loads(arrays[_ORIGIN].tobytes()))


def _layout(path: str, columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are transitions, observations and next ones, and the last rows of trajectories."""
    observations, terminals = columns.numbers("observations"), columns.flags("terminals")
    if "next_observations" in columns:
        every_row = np.arange(len(terminals))
        return every_row, observations, columns.numbers("next_observations"), terminals
    states_only = ~columns.flags("valids") if "valids" in columns else terminals
    if not states_only[-1]:
        row = len(terminals) - 1
        raise DataError(f"{path}: the last row, {row}, is not marked as the end of a trajectory")
    kept = np.flatnonzero(~states_only)
    if len(kept) == 0:
        raise DataError(
            f"{path}: the dataset is empty: no row of {len(terminals)} has a next observation"
        )
    following = np.concatenate([observations[1:], observations[-1:]])
    return kept, observations, following, np.append(states_only[1:], True)


def _relabel(path: str, env: str | None, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rewards and masks ``[N]``, which are 0 where the task is done, by OGBench's function."""
    if env is None or "-singletask" not in env:
        given = "" if env is None else f", not {env}"
        raise DataError(
            f"{path}: the file has no 'rewards': give the environment of a single task, such as "
            f"cube-single-singletask-task2-v0{given}, or load the dataset by its name, such as "
            f"cube-single-play-singletask-task2-v0; both need {install('ogbench')}"
        )
    if "qpos" not in arrays:
        raise DataError(
            f"{path}: the file has neither 'rewards' nor 'qpos', from which they are computed"
        )
    try:
        relabel = importlib.import_module("ogbench.relabel_utils").relabel_dataset
    except ImportError as error:
        raise DataError(f"{path}: rewards need ogbench >= 1.1 ({reason(error)})") from error
    dataset = {name: arrays[name] for name in _STATE if name in arrays}
    environment = environments.make(specs.named(path, env))
    with contextlib.closing(environment):
        try:
            relabel(env, environment, dataset)
        except (AssertionError, AttributeError, KeyError, ValueError, IndexError) as error:
            raise DataError(
                f"{path}: rewards of {env} cannot be computed ({reason(error)})"
            ) from error
    return {name: dataset[name] for name in ("rewards", "masks")}


def import_ogbench(source: str) -> None:
    """Register OGBench's environments."""
    try:
        importlib.import_module("ogbench")
    except ImportError as error:
        raise DataError(
            f"{source}: OGBench's environments and rewards need {install('ogbench')} "
            f"({reason(error)})"
        ) from error
