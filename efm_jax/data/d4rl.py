"""Files in D4RL's HDF5 layout.

Rows are steps, episode after episode: ``observations [N, S]``, ``actions [N, A]``, ``rewards [N]``,
``terminals [N]``, and usually ``timeouts [N]`` and ``next_observations [N, S]``; the root attribute
``env_id`` may name the environment.

- With ``next_observations`` every row becomes a transition.
- Without, the next row's observation is the next observation.  A timeout's is not in the file (the next row
  is the first of another episode), so that row is dropped, and so is a last row that is not terminal.  A
  terminal row is kept with its own observation in that place: what follows a terminal step is never used.
- A row marked both terminal and timeout is terminal.
- Without ``timeouts``, an episode ends at a terminal or after the environment's ``max_episode_steps``.
- Returns and lengths are those of whole episodes, before rows are dropped.  Steps after the last end of an
  episode are an unfinished one: they are transitions, but count as an episode only if there is no other.

Action bounds are the environment's.  Where its simulator is not installed (MuJoCo, for the four locomotion
families below) or the file names no environment, they are [-1, 1], to which D4RL normalises every action.
"""

import contextlib
import warnings

import h5py
import numpy as np
from etils import epath
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import environments, validation
from efm_jax.data.errors import DataError, reason
from efm_jax.types import Dataset, Transitions

# First word of a D4RL file's name -> today's version of its environment.
CLASSIC_ENVIRONMENTS = {
    "halfcheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v5",
    "ant": "Ant-v5",
}

_RANKS = {
    "observations": 2,
    "actions": 2,
    "rewards": 1,
    "terminals": 1,
    "timeouts": 1,
    "next_observations": 2,
}
_OPTIONAL = ("timeouts", "next_observations")


def load_d4rl(path: str, *, env: str | None = None) -> Dataset:
    """Read a D4RL file, as the module's docstring says.

    The environment is ``env``, else the file's ``env_id``, else the one its name begins with
    (``CLASSIC_ENVIRONMENTS``), else none.  One that only the name suggests is passed over, with a warning,
    when its sizes are not the data's (D4RL's Ant has 111 observation dimensions, Ant-v5 has 105).

    Raises:
      DataError: no such file, not HDF5, a dataset missing, an environment that Gymnasium does not know or
        whose sizes differ, no way to tell where episodes end, or data that :mod:`.validation` refuses.
        Indices in messages are rows of the file.
    """
    arrays, env_id = _read(path)
    validation.check_action_dtype(path, arrays["actions"])
    validation.check_lengths(path, arrays, _RANKS)
    terminals = _flags(path, "terminals", arrays["terminals"])

    numbers = {
        name: validation.as_float32(path, name, arrays[name])
        for name in ("observations", "actions", "rewards", "next_observations")
        if name in arrays
    }
    if "next_observations" in numbers:
        shapes = numbers["observations"].shape, numbers["next_observations"].shape
        if shapes[0] != shapes[1]:
            raise DataError(f"{path}: observations have shape {shapes[0]}, next_observations {shapes[1]}")
    for name, array in numbers.items():
        validation.check_finite(path, name, array)

    sizes = numbers["observations"].shape[1], numbers["actions"].shape[1]
    # With an environment given, the file's own is not asked for.
    stated = env or _text_attribute(path, "env_id", env_id)
    spec, low, high = _environment(path, stated, *sizes)
    validation.check_bounds(path, low, high)
    numbers["actions"] = validation.clip_actions(path, numbers["actions"], low, high)

    if "timeouts" in arrays:
        timeouts = _flags(path, "timeouts", arrays["timeouts"])
    else:
        timeouts = _timeouts(path, terminals, spec)
    returns, lengths = _episodes(numbers["rewards"], terminals | timeouts)
    return Dataset(
        name=path,
        transitions=_transitions(path, numbers, terminals, timeouts),
        episode_returns=returns,
        episode_lengths=lengths,
        action_low=low,
        action_high=high,
        env_spec=None if spec is None else environments.spec_json(path, spec),
        reference_scores=None,
    )


def _read(path: str) -> tuple[dict[str, np.ndarray], object]:
    """Every dataset of the layout that the file has, and its ``env_id`` as it is stored."""
    file_path = epath.Path(path).expanduser()
    try:
        if not file_path.exists():
            raise DataError(f"{path}: no such file")
        if file_path.is_dir():
            raise DataError(f"{path}: expected an HDF5 file; got a folder")
        with file_path.open("rb") as handle, h5py.File(handle, "r") as file:
            arrays = {name: _read_array(path, file, name) for name in _RANKS if name in file}
            env_id = file.attrs.get("env_id")
    except (OSError, RuntimeError, KeyError, ImportError) as error:
        # h5py: OSError, RuntimeError and KeyError for damage; ImportError: no client for this kind of path.
        raise DataError(f"{path}: cannot be read as an HDF5 file ({reason(error)})") from error
    missing = [name for name in _RANKS if name not in arrays and name not in _OPTIONAL]
    if missing:
        raise DataError(f"{path}: the file has no dataset {', '.join(map(repr, missing))}")
    return arrays, env_id


def _text_attribute(path: str, name: str, value: object) -> str | None:
    """An attribute that is text, stored as such or as UTF-8 bytes, or is not there."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    raise DataError(f"{path}: attribute {name!r}: expected text; got {value!r:.100}")


def _read_array(path: str, file: h5py.File, name: str) -> np.ndarray:
    if not isinstance(file[name], h5py.Dataset):
        raise DataError(f"{path}: {name!r} is a group; expected a dataset")
    return np.asarray(file[name][()])


def _flags(path: str, name: str, array: np.ndarray) -> np.ndarray:
    """Flags stored as booleans or as the numbers 0 and 1, ``[N]`` bool."""
    bad = ~np.isin(array, (0, 1))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{path}: {name}[{row}]: expected 0 or 1; got {array[row]}")
    return array.astype(bool)


def _environment(
    path: str, stated: str | None, observation_size: int, action_size: int
) -> tuple[EnvSpec | None, np.ndarray, np.ndarray]:
    """The environment's spec (or None) and the action bounds ``[A]`` float32; ``stated`` may be its id."""
    unit = np.ones(action_size, np.float32)
    family = epath.Path(path).name.lower().replace("-", "_").split("_")[0]
    chosen = stated or CLASSIC_ENVIRONMENTS.get(family)
    if chosen is None:
        return None, -unit, unit
    spec = environments.registered_spec(path, chosen)
    spaces = environments.make_spaces(spec)
    if spaces is None:
        if spec.id not in CLASSIC_ENVIRONMENTS.values():
            raise DataError(
                f"{path}: environment {spec.id} cannot be made here, so its action bounds are unknown"
            )
        return spec, -unit, unit
    try:
        validation.check_action_space(path, spaces[1])
        environments.check_sizes(path, spec, observation_size, action_size)
    except DataError as error:
        if stated:
            raise
        warnings.warn(f"{error}; the environment suggested by the file's name is not used", stacklevel=4)
        return None, -unit, unit
    return spec, np.asarray(spaces[1].low, np.float32), np.asarray(spaces[1].high, np.float32)


def _timeouts(path: str, terminals: np.ndarray, spec: EnvSpec | None) -> np.ndarray:
    """Timeouts of a file that does not have them: every ``max_episode_steps``-th step of an episode."""
    if spec is None or spec.max_episode_steps is None:
        raise DataError(
            f"{path}: the file has no dataset 'timeouts' and names no environment with a step limit, "
            "so the ends of its episodes are unknown; give the environment's id"
        )
    rows = np.arange(len(terminals))
    starts = np.concatenate([[0], np.flatnonzero(terminals[:-1]) + 1])
    step = rows - starts[np.searchsorted(starts, rows, side="right") - 1]
    return (step + 1) % spec.max_episode_steps == 0


def _episodes(rewards: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return and length of each episode, from ``rewards [N]`` and ``ends [N]`` bool."""
    last = np.flatnonzero(ends)
    if len(last) == 0:
        last = np.array([len(rewards) - 1])
    starts = np.concatenate([[0], last[:-1] + 1])
    returns = np.array([rewards[i : j + 1].sum(dtype=np.float64) for i, j in zip(starts, last, strict=True)])
    return returns, (last - starts + 1).astype(np.int64)


def _transitions(
    path: str, numbers: dict[str, np.ndarray], terminals: np.ndarray, timeouts: np.ndarray
) -> Transitions:
    observations = numbers["observations"]
    if "next_observations" in numbers:
        keep = np.ones(len(terminals), bool)
        next_observations = numbers["next_observations"]
    else:
        keep = terminals | ~timeouts
        keep[-1] = terminals[-1]
        following = np.concatenate([observations[1:], observations[-1:]])
        next_observations = np.where(terminals[:, None], observations, following)
    if not keep.any():
        raise DataError(f"{path}: the dataset is empty: no row of {len(keep)} has a next observation")
    return Transitions(
        observations=observations[keep],
        actions=numbers["actions"][keep],
        rewards=numbers["rewards"][keep],
        next_observations=next_observations[keep],
        terminated=terminals[keep].astype(np.float32),
    )
