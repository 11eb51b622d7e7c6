"""Minari datasets: local ones, and others by download.

Read here and not by Minari, because its metadata and HDF5 file are a stranger's: Minari makes the
environment that they name, follows links out of the file, and reads all that an episode has.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import d4rl_files, validation
from efm_jax.data.dataset import Dataset
from efm_jax.data.hdf5 import Group, open_hdf5
from efm_jax.data.rows import problems_of
from efm_jax.envs import environments, scores, specs
from efm_jax.envs.flatten import flat_size, flatten_observation
from efm_jax.errors import DataError, reason
from efm_jax.types import Rows, Transitions, all_rows

_FILE = "main_data.hdf5"
# Arrays of an episode -> their axes; observations, which may nest, aside.
_EPISODE_RANKS = {"actions": 2, "rewards": 1, "terminations": 1, "truncations": 1}


def load_minari(name: str, *, env: str | None = None, rows: Rows = all_rows) -> Dataset:
    """Read the Minari dataset ``name``, downloading it when it is not local.

    Minari keeps ``T + 1`` observations for ``T`` steps, so each step has its real next observation,
    the last of a truncated episode too.  ``terminated`` is Minari's ``terminations`` alone.  Dict
    observations are flattened as :mod:`efm_jax.envs.flatten` says.  The environment is ``env``,
    else the dataset's evaluation environment, else the one it was recorded in.  Reference scores
    are the metadata's ``ref_min_score`` and ``ref_max_score``, None unless both are there.

    ``rows`` selects transitions, given their number: only the episodes that they are in are read.

    Raises:
      DataError: unknown id, failed download, damaged files, an ``env`` that Gymnasium does not know
        or whose sizes differ, or data that :mod:`.validation` refuses.
    """
    source = _open(name)
    validation.check_observation_space(name, source.observation_space)
    box = validation.check_action_space(name, source.action_space)
    low, high = (np.asarray(bound, np.float32) for bound in (box.low, box.high))
    notes: list[str] = []
    spec = _environment(name, source, env, notes)

    with open_hdf5(str(source.path / _FILE), name) as file:
        lengths = _lengths(name, file, source.metadata.get("total_episodes"))
        ends = np.cumsum(lengths)
        starts = ends - lengths
        selected = rows(int(ends[-1]))
        wanted = np.flatnonzero((ends > selected.start) & (starts < selected.stop))
        width = 2 * flat_size(source.observation_space) + len(low) + 2
        validation.check_memory(name, (int(lengths[wanted].sum()), width), np.dtype(np.float32))
        episodes = [_transitions(name, file, int(i), source, int(lengths[i])) for i in wanted]

    def locate(row: int) -> str:
        episode = int(np.searchsorted(ends, row, side="right"))
        return f" (episode {episode}, step {row - int(starts[episode])})"

    first = int(starts[wanted[0]])
    fields = zip(Transitions._fields, zip(*episodes, strict=True), strict=True)
    columns = {field: np.concatenate(parts) for field, parts in fields}
    for field, column in columns.items():
        validation.check_finite(name, field, column, locate, first)
    columns["actions"] = validation.clip_actions(name, columns["actions"], low, high, locate, first)
    if env is not None and spec is not None:
        environments.check_sizes(name, spec, columns["observations"].shape[1], len(low))

    part = slice(selected.start - first, selected.stop - first)
    begun = starts[wanted] >= selected.start
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in episodes])
    return Dataset(
        name=name,
        transitions=Transitions(**{field: column[part] for field, column in columns.items()}),
        episode_returns=returns[begun],
        episode_lengths=lengths[wanted][begun],
        action_low=low,
        action_high=high,
        env_spec=None if spec is None else specs.to_json(name, spec),
        reference_scores=_reference_scores(name, source.metadata),
        first_row=selected.start,
        notes=tuple(notes),
    )


def is_id(name: str) -> bool:
    """Whether ``name`` has the form of a Minari id with a version."""
    # Imported where it is needed, because a D4RL file needs no Minari, and its import is slow.
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):  # TypeError: Minari's int(None) for an id without a version
        return False
    return True


def local_path(name: str) -> Path:
    """Where Minari keeps the dataset ``name``, there or not."""
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        return get_dataset_path(name)  # makes Minari's folder if need be
    except OSError as error:
        raise DataError(
            f"{name}: Minari's folder of datasets cannot be made ({reason(error)})"
        ) from error


class _Source(NamedTuple):
    """A local dataset, whose file is not opened yet."""

    path: Path
    metadata: dict[str, Any]
    observation_space: gymnasium.Space
    action_space: gymnasium.Space


def _open(name: str) -> _Source:
    """The local dataset, or a download of it."""
    import minari

    if not is_id(name):
        raise DataError(
            f"{name}: unknown dataset: not a Minari id (namespace/name-v0), no name of D4RL or "
            "OGBench, and not a path ending in .hdf5, .h5 or .npz"
        )
    path = local_path(name)
    if not path.joinpath("data").exists():
        # Imported here, because Minari imports it only for a download, and the import sets the
        # level that is overridden.
        from huggingface_hub.utils import logging as hub_logging

        # Silenced, because its client logs every retry, and the error says how it ended.
        verbosity = hub_logging.get_verbosity()
        hub_logging.set_verbosity(logging.CRITICAL)
        try:
            with problems_of(f"{name}: no such dataset at {path}, and it could not be downloaded"):
                minari.download_dataset(name)
        finally:
            hub_logging.set_verbosity(verbosity)
    data = path / "data"
    with problems_of(f"{name}: cannot read the Minari dataset at {path}"):
        metadata = json.loads((data / "metadata.json").read_text(encoding="utf-8"))
        if not isinstance(metadata, dict) or metadata.get("data_format") != "hdf5":
            raise ValueError("metadata.json: expected an object with the data_format 'hdf5'")
        texts = [metadata.get(key) for key in ("observation_space", "action_space")]
        made: tuple[Any, Any] = (None, None)
        if None in texts:
            made = _spaces_of_environment(name, metadata.get("env_spec"))
        spaces = [
            other if text is None else _space(name, text)
            for text, other in zip(texts, made, strict=True)
        ]
    return _Source(data, metadata, *spaces)


def _space(name: str, text: str) -> Any:
    """A space from the JSON that Minari writes of it, whose arrays are as large as it says."""
    from minari.serialization import deserialize_space

    fields = json.loads(text)
    left = [fields]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            validation.check_memory(
                f"{name}: a space", tuple(part.get("shape", ())), np.dtype("f8")
            )
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
    return deserialize_space(fields)


def _spaces_of_environment(name: str, text: str | None) -> tuple[Any, Any]:
    """The spaces of the environment that the metadata names, where it has none itself."""
    if text is None:
        raise ValueError("metadata.json: neither spaces nor an environment")
    spaces = environments.make_spaces(spec := specs.stated(name, text))
    if spaces is None:
        raise ValueError(f"metadata.json: no spaces, and {spec.id} cannot be made here")
    return spaces


def _environment(name: str, source: _Source, env: str | None, notes: list[str]) -> EnvSpec | None:
    """The environment to evaluate in: ``env``, else what the metadata names, else none."""
    text: Any = source.metadata.get("eval_env_spec") or source.metadata.get("env_spec")
    if env is not None:
        spec = specs.named(name, env)
    elif isinstance(text, str):
        spec = specs.stated(name, text)
    elif text is None:
        return None
    else:
        raise DataError(f"{name}: env_spec: expected text; got {text!r:.100}")
    limit = d4rl_files.own_limit(name)
    if limit is not None and limit != spec.max_episode_steps:
        notes.append(d4rl_files.cut(spec, limit, f"D4RL's {name}"))
    return spec


def _lengths(name: str, file: Group, count: Any) -> np.ndarray:
    """Steps of every episode, from the metadata that Minari keeps of each."""
    stored = len(file.keys())
    if not isinstance(count, int) or not 0 <= count <= stored:
        raise DataError(
            f"{name}: total_episodes: expected those of the file, {stored}; got {count!r}"
        )
    lengths = np.zeros(count, np.int64)
    for i in range(count):
        label = f"{name}: episode {i}"
        with problems_of(f"{label}: its length cannot be read"):
            lengths[i] = steps = int(file.group(f"episode_{i}", label).attribute("total_steps"))
        if not 0 <= steps < 2**31:
            raise DataError(f"{label}: total_steps: expected a number of steps; got {steps}")
    if lengths.sum() == 0:
        raise DataError(f"{name}: the dataset is empty: {count} episodes, 0 transitions")
    return lengths


def _transitions(name: str, file: Group, index: int, source: _Source, length: int) -> Transitions:
    """One episode of ``length`` steps as transitions ``[T, ...]``, lengths checked."""
    label = f"{name}: episode {index}"
    group = file.group(f"episode_{index}", label)
    space = source.observation_space
    try:
        nested = _nested(group, "observations", space)
        observations = flatten_observation(space, nested, 1)
        for leaf in jax.tree.leaves(nested):
            validation.check_rounding(label, "observations", leaf)
    except DataError as error:
        raise DataError(
            str(error) if str(error).startswith(name) else f"{label}: {error}"
        ) from error
    arrays = {key: validation.as_float32(label, key, group.array(key)[:]) for key in _EPISODE_RANKS}
    validation.check_lengths(label, arrays, _EPISODE_RANKS)
    steps = len(arrays["rewards"])
    if len(observations) != steps + 1:
        raise DataError(
            f"{label}: lengths disagree: expected {steps + 1} observations, one more than its "
            f"actions; got {len(observations)}"
        )
    if steps != length:
        raise DataError(
            f"{label}: lengths disagree: expected the {length} steps of its metadata; got {steps}"
        )
    terminated = validation.as_flags(label, "terminations", arrays["terminations"])
    return Transitions(
        observations=observations[:-1],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        next_observations=observations[1:],
        terminated=terminated.astype(np.float32),
    )


def _nested(group: Group, name: str, space: gymnasium.Space) -> Any:
    """Arrays ``[T + 1, ...]`` nested as the space, as Minari stores them."""
    if isinstance(space, gymnasium.spaces.Dict):
        inner = group.group(name)
        return {key: _nested(inner, key, space[key]) for key in space if key in inner}
    if isinstance(space, gymnasium.spaces.Tuple):
        inner = group.group(name)
        return tuple(_nested(inner, f"_index_{i}", part) for i, part in enumerate(space))
    return group.array(name)[:]


def _reference_scores(name: str, metadata: dict[str, Any]) -> tuple[float, float] | None:
    pair = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None in pair:
        return None
    return scores.check_references(f"{name}: ref_min_score, ref_max_score", pair)
