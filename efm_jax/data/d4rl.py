"""Files in D4RL's HDF5 layout.

Rows are steps, episode after episode: ``observations [N, S]``, ``actions [N, A]``, ``rewards [N]``,
``terminals [N]``, and usually ``timeouts [N]`` and ``next_observations [N, S]``; the root attribute
``env_id`` may name the environment.  Columns stored as ``[N, 1]`` are read as ``[N]``, as D4RL
does.

- With ``next_observations`` every row becomes a transition.
- Without, the next row's observation is the next observation.  A timeout's is not in the file (the
  next row is the first of another episode), so that row is dropped, and so is a last row that is
  not terminal.  A terminal row is kept with its own observation in that place: what follows a
  terminal step is never used.
- A row marked both terminal and timeout is terminal.
- Without ``timeouts``, an episode ends at a terminal or after the environment's
  ``max_episode_steps``.
- Returns and lengths are those of whole episodes, before rows are dropped.  Steps after the last
  end of an episode are an unfinished one: they are transitions, but count as an episode only if
  there is no other.

What differs for D4RL's own files, such as AntMaze's terminals inside episodes, is in
:mod:`.d4rl_files`; a file is known by the name that D4RL gave it.

Action bounds are the environment's.  Where its simulator is not installed or the file names no
environment, they are [-1, 1], to which D4RL normalizes every action.

Evaluated episodes are as long as the data's: as D4RL's are where the name is D4RL's (its Pen ends
after 100 steps, today's after 200), else as long as every episode that ``timeouts`` ended, else as
the environment says.
"""

import contextlib

import numpy as np
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import d4rl_files, validation
from efm_jax.data.dataset import Dataset
from efm_jax.data.hdf5 import StoredArray, open_hdf5
from efm_jax.data.rows import Columns, read_steps
from efm_jax.envs import dataset_references, environments, specs
from efm_jax.errors import DataError
from efm_jax.types import Rows, all_rows

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_OPTIONAL = ("timeouts", "next_observations")


def load_d4rl(
    path: str, *, name: str | None = None, env: str | None = None, rows: Rows = all_rows
) -> Dataset:
    """Read a D4RL file, as the module's docstring says.

    ``name`` is what to call the dataset, such as D4RL's classic name of it; by default its path.

    The environment is ``env``, else the file's ``env_id``, else the one that its name suggests
    (:func:`.d4rl_files.environment_of`), else none.  One that only the name suggests is passed
    over, with a note, when its sizes are not the data's (D4RL's Ant has 111 observation dimensions,
    Ant-v5 has 105).

    ``rows`` selects transitions, given their number: of observations and actions only those rows
    are read from the file and checked.

    Raises:
      DataError: no such file, not HDF5, a dataset missing, an environment that Gymnasium does not
        know or whose sizes differ, no way to tell where episodes end, or data that
        :mod:`.validation` refuses. Indices in messages are rows of the file.
    """
    task = d4rl_files.task_of_file(path)
    family = d4rl_files.family_of(task)
    notes: list[str] = []
    with open_hdf5(path) as file:
        stored = {name: file.array(name) for name in (*_REQUIRED, *_OPTIONAL) if name in file}
        columns = Columns(path, stored, _REQUIRED)
        sizes = columns["observations"].shape[1], columns["actions"].shape[1]
        # With an environment given, the file's own is not asked for.
        stated = None if env else _text(path, "env_id", file.attribute("env_id"))
        spec, low, high = _environment(path, task, env, stated, *sizes, notes)
        validation.check_bounds(path, low, high)

        terminals = columns.flags("terminals")
        if "timeouts" in columns:
            timeouts = columns.flags("timeouts")
        else:
            timeouts = _timeouts(path, terminals, spec, family)
        if family.jumps_end:
            timeouts |= _jumps(columns["observations"])
        ends = timeouts if family.terminals_pass else terminals | timeouts
        if spec is not None:
            _set_horizon(spec, task, family, timeouts & ~terminals, ends, notes)
        steps = read_steps(path, columns, low, high, terminals, timeouts, ends, rows)
        reach = float(np.abs(steps.transitions.actions).max(initial=0.0))
        if spec is not None and 0.99 < reach <= 1.0 and np.abs([low, high]).min() > 1.0:
            notes.append(
                f"actions reach {reach:g}, as those do that were normalized to [-1, 1], and "
                f"{spec.id} has bounds up to {high.max():g}: they are taken as they are"
            )

    env_spec = None if spec is None else specs.to_json(path, spec)
    return Dataset(
        name=name or path,
        **steps._asdict(),
        action_low=low,
        action_high=high,
        env_spec=env_spec,
        reference_scores=dataset_references(None, task, env_spec),
        notes=tuple(notes),
    )


def _text(path: str, name: str, value: object) -> str | None:
    """An attribute that is text, stored as such or as UTF-8 bytes, or is not there."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    raise DataError(f"{path}: attribute {name!r}: expected text; got {value!r:.100}")


def _environment(
    path: str,
    task: str,
    env: str | None,
    stated: str | None,
    observation_size: int,
    action_size: int,
    notes: list[str],
) -> tuple[EnvSpec | None, np.ndarray, np.ndarray]:
    """The environment's spec or None, and action bounds ``[A]`` float32.

    ``env`` is the user's id, ``stated`` the file's.
    """
    unit = np.ones(action_size, np.float32)
    suggested = None if env or stated else d4rl_files.environment_of(task)
    if not (env or stated or suggested):
        return None, -unit, unit
    try:
        user = env or suggested
        spec = specs.named(path, user) if user else specs.stated(path, stated or "")
        spaces = environments.make_spaces(spec)
        if spaces is None:
            if spec.id not in d4rl_files.ENVIRONMENTS.values():
                raise DataError(
                    f"{path}: environment {spec.id} cannot be made here: its action bounds are "
                    "unknown"
                )
            return spec, -unit, unit
        box = validation.check_action_space(path, spaces[1])
        low, high = np.asarray(box.low, np.float32), np.asarray(box.high, np.float32)
        environments.check_sizes(path, spec, observation_size, action_size)
    except DataError as error:
        if not suggested:
            raise
        notes.append(f"{error}; the environment suggested by the file's name is not used")
        return None, -unit, unit
    return spec, low, high


def _set_horizon(
    spec: EnvSpec,
    task: str,
    family: d4rl_files.Family,
    timeouts: np.ndarray,
    ends: np.ndarray,
    notes: list[str],
) -> None:
    """Limit evaluated episodes to the steps of the data's, where that is known."""
    last = np.flatnonzero(ends)
    lengths = np.diff(last, prepend=-1)
    timed = lengths[timeouts[last]]
    limit, reason = d4rl_files.own_limit(task), f"D4RL's {task}"
    # More than one, because a single one may be where a recording was stopped.
    if limit is None and len(timed) > 1 and timed.min() == lengths.max():
        limit, reason = int(timed[0]), "its timeouts say"
        if abs(limit - (spec.max_episode_steps or 0)) <= 1:  # files of D4RL differ by one
            return
    limit = limit or family.step_limit
    if limit is not None and limit != spec.max_episode_steps:
        notes.append(d4rl_files.cut(spec, limit, reason))


def _timeouts(
    path: str, terminals: np.ndarray, spec: EnvSpec | None, family: d4rl_files.Family
) -> np.ndarray:
    """Timeouts of a file without them: the last step that the limit allows to an episode."""
    if family.terminals_end_all:
        return np.zeros_like(terminals)
    limit = family.step_limit or (spec.max_episode_steps if spec is not None else None)
    if limit is None:
        raise DataError(
            f"{path}: the file has no array 'timeouts' and names no environment with a step limit, "
            "so the ends of its episodes are unknown; give the environment's id"
        )
    rows = np.arange(len(terminals))
    starts = np.concatenate([[0], np.flatnonzero(terminals[:-1]) + 1])
    step = rows - starts[np.searchsorted(starts, rows, side="right") - 1]
    return (step + 1) % limit == 0


def _jumps(observations: StoredArray) -> np.ndarray:
    """Rows ``[N]`` bool after which the ant is elsewhere: the next row is of another trajectory."""
    position = observations[:, :2].astype(np.float64)
    jumps = np.zeros(len(position), bool)
    jumps[:-1] = np.linalg.norm(np.diff(position, axis=0), axis=1) > d4rl_files.ANT_JUMP
    return jumps
