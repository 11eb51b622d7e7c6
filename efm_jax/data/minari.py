"""Minari datasets: local ones, and others by download."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from efm_jax.data import validation
from efm_jax.envs import environments
from efm_jax.envs.flatten import flatten_observation
from efm_jax.errors import DataError, reason
from efm_jax.types import Dataset, Rows, Transitions, all_rows

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
    metadata = source.storage.metadata

    lengths = _lengths(name, source)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    selected = rows(int(ends[-1]))
    wanted = np.flatnonzero((ends > selected.start) & (starts < selected.stop))
    episodes = _read_episodes(name, source, wanted, lengths)

    def locate(row: int) -> str:
        episode = int(np.searchsorted(ends, row, side="right"))
        return f" (episode {episode}, step {row - int(starts[episode])})"

    first = int(starts[wanted[0]])
    fields = zip(Transitions._fields, zip(*episodes, strict=True), strict=True)
    columns = {field: np.concatenate(parts) for field, parts in fields}
    for field, column in columns.items():
        validation.check_finite(name, field, column, locate, first)
    columns["actions"] = validation.clip_actions(name, columns["actions"], low, high, locate, first)
    stated = env or metadata.get("eval_env_spec") or metadata.get("env_spec")
    spec = None if stated is None else environments.read_spec(name, stated)
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
        env_spec=environments.spec_json(name, spec),
        reference_scores=_reference_scores(metadata),
        first_row=selected.start,
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


@contextlib.contextmanager
def _problems_of(what: str) -> Iterator[None]:
    """Say ``what`` failed in one line, whatever Minari raised.

    Everything is caught, because Minari asserts and indexes its way through the metadata, and its
    file formats and clients (h5py, Pillow, Arrow, storage clouds) have no exception in common.
    """
    try:
        yield
    except Exception as error:
        raise DataError(f"{what} ({reason(error)})") from error


def _open(name: str) -> Any:
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
            with _problems_of(f"{name}: no such dataset at {path}, and it could not be downloaded"):
                minari.download_dataset(name)
        finally:
            hub_logging.set_verbosity(verbosity)
    with _problems_of(f"{name}: cannot read the Minari dataset at {path}"):
        return minari.load_dataset(name)


def _lengths(name: str, source: Any) -> np.ndarray:
    """Steps of every episode, from the metadata that Minari keeps of each."""
    with _problems_of(f"{name}: the lengths of its episodes cannot be read"):
        metadata = source.storage.get_episode_metadata(range(source.total_episodes))
        lengths = np.array([int(episode["total_steps"]) for episode in metadata], np.int64)
    if lengths.sum() == 0:
        raise DataError(f"{name}: the dataset is empty: {len(lengths)} episodes, 0 transitions")
    return lengths


def _read_episodes(
    name: str, source: Any, wanted: np.ndarray, lengths: np.ndarray
) -> list[Transitions]:
    """The transitions of the ``wanted`` episodes, as many as their metadata says."""
    episodes = []
    iterator = iter(source.iterate_episodes(wanted.tolist()))
    for index in wanted:
        label = f"{name}: episode {index}"
        with _problems_of(f"{label} cannot be read"):
            episode = next(iterator)
        episodes.append(_transitions(label, source.observation_space, episode))
        if episodes[-1].size != lengths[index]:
            raise DataError(
                f"{label}: lengths disagree: expected the {lengths[index]} steps of its metadata; "
                f"got {episodes[-1].size}"
            )
    return episodes


def _transitions(label: str, space: gymnasium.Space, episode: Any) -> Transitions:
    """One episode of ``T`` steps as transitions ``[T, ...]``, lengths checked."""
    try:
        observations = flatten_observation(space, episode.observations, 1)
    except DataError as error:
        raise DataError(f"{label}: {error}") from error
    arrays = {
        name: validation.as_float32(label, name, getattr(episode, name)) for name in _EPISODE_RANKS
    }
    validation.check_lengths(label, arrays, _EPISODE_RANKS)
    steps = len(arrays["rewards"])
    if len(observations) != steps + 1:
        raise DataError(
            f"{label}: lengths disagree: expected {steps + 1} observations, one more than its "
            f"actions; got {len(observations)}"
        )
    return Transitions(
        observations=observations[:-1],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        next_observations=observations[1:],
        terminated=arrays["terminations"],
    )


def _reference_scores(metadata: dict[str, Any]) -> tuple[float, float] | None:
    worst, best = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if worst is None or best is None else (float(worst), float(best))
