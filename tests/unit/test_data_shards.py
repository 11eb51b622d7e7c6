"""Datasets read in parts, one for each host, are together the dataset read whole."""

import threading
from concurrent.futures import ThreadPoolExecutor

import chex
import h5py
import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax.data import DataError, fit_normalizer, gather_episodes, load_dataset
from efm_jax.data.dataset import Dataset
from tests.unit.data_fixtures import d4rl_arrays, episode, write_d4rl, write_minari

# An unfinished last episode, terminal and timed out ones.
TERMINALS = [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]
TIMEOUTS = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.fixture(params=["minari", "d4rl", "d4rl with next observations"])
def name(request, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    if request.param == "minari":
        observations = [rng.standard_normal((n + 1, 3)).astype(np.float32) for n in (3, 1, 5, 3)]
        write_minari(
            "test/shards-v0", [episode(len(o) - 1, o, terminated=True) for o in observations]
        )
        return "test/shards-v0"
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    arrays["observations"] = rng.standard_normal(arrays["observations"].shape).astype(np.float32)
    if "next" in request.param:
        arrays["next_observations"] = arrays["observations"] + np.float32(1)
    return write_d4rl(tmp_path / "data.hdf5", arrays)


def parts(name, hosts, size=None):
    def share(host):
        def rows(count):
            count = count if size is None else size
            return slice(host * count // hosts, (host + 1) * count // hosts)

        return rows

    return [load_dataset(name, rows=share(host)) for host in range(hosts)]


def on_every_host(function, shards):
    """``function(shard, gather)`` of all hosts at once, threads that wait for each other."""
    barrier, sent = threading.Barrier(len(shards), timeout=30), [None] * len(shards)

    def run(host):
        def gather(array):
            sent[host] = array
            barrier.wait()
            everything = list(sent)
            barrier.wait()  # before the next one overwrites it
            return everything

        return function(shards[host], gather)

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(run, range(len(shards))))


EPISODES = ("episode_returns", "episode_lengths")


@pytest.mark.parametrize("hosts", [1, 2, 3, 5])
def test_parts_make_the_whole(name, hosts):
    whole, shards = load_dataset(name), parts(name, hosts)
    transitions = [shard.transitions for shard in shards]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *transitions)
    chex.assert_trees_all_equal(joined, whole.transitions)
    starts = np.cumsum([0, *(each.size for each in transitions)])[:-1]
    assert [shard.first_row for shard in shards] == list(starts)
    for field in EPISODES:
        joined = np.concatenate([getattr(shard, field) for shard in shards])
        assert_array_equal(joined, getattr(whole, field))
    for merged in on_every_host(gather_episodes, shards):
        for field in EPISODES:
            assert_array_equal(getattr(merged, field), getattr(whole, field))
    # Fingerprint and statistics do not depend on the parts.
    assert set(on_every_host(Dataset.fingerprint, shards)) == {whole.fingerprint()}
    expected = fit_normalizer(whole)
    observations = whole.transitions.observations.astype(np.float64)
    assert_allclose(expected.observation_mean, observations.mean(0), rtol=1e-6)
    assert_allclose(expected.observation_std, observations.std(0), rtol=1e-6)
    for found in on_every_host(fit_normalizer, shards):
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_fingerprint_sees_every_number_and_its_place(name):
    whole = load_dataset(name)

    def fingerprint(**changes):
        return whole._replace(transitions=whole.transitions._replace(**changes)).fingerprint()

    seen = [whole.fingerprint(), whole._replace(first_row=1).fingerprint()]
    seen.append(fingerprint(observations=whole.transitions.observations[:, ::-1]))
    for field, array in whole.transitions._asdict().items():
        rolled = np.roll(array, 1, axis=0)
        assert np.abs(array - rolled).max() > 0
        seen += [fingerprint(**{field: change}) for change in (array + np.float32(1), rolled)]
    assert len(set(seen)) == len(seen) == 13


def test_the_first_rows_alone(name):
    whole, (part,) = load_dataset(name), parts(name, 1, size=5)
    assert part.transitions.size == 5
    assert_array_equal(part.transitions.observations, whole.transitions.observations[:5])
    assert 1 <= len(part.episode_returns) < len(whole.episode_returns)


def test_other_parts_of_a_file_are_not_read(tmp_path):
    """What is bad there is another host's to find, under its row in the file."""
    arrays = d4rl_arrays([0] * 12, [0] * 11 + [1])
    arrays["next_observations"] = arrays["observations"] + 1
    path = write_d4rl(tmp_path / "data.hdf5", arrays)
    with h5py.File(path, "a") as file:
        file["observations"][9, 1] = np.nan
        file["actions"][10, 0] = 7
    load_dataset(path, rows=lambda n: slice(0, 6))
    with pytest.raises(DataError, match=r"actions\[10\]\[0\] is outside its bounds .*: 7"):
        load_dataset(path, rows=lambda n: slice(10, 12))
    with pytest.raises(DataError, match=r"observations\[9\]\[1\] is not finite: nan"):
        load_dataset(path, rows=lambda n: slice(9, 10))


def test_bad_minari_rows_keep_their_place(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    observations = np.zeros((4, 3), np.float32)
    write_minari("test/bad-v0", [episode(3, observations) for _ in range(4)])
    with h5py.File(tmp_path / "test/bad-v0/data/main_data.hdf5", "a") as file:
        file["episode_3"]["rewards"][1] = np.inf
    load_dataset("test/bad-v0", rows=lambda n: slice(0, 9))
    with pytest.raises(DataError, match=r"rewards\[10\] is not finite: inf \(episode 3, step 1\)"):
        load_dataset("test/bad-v0", rows=lambda n: slice(7, 12))


def test_what_the_choice_of_rows_raises_is_raised(name):
    def refuse(count):
        raise ValueError(f"no part of {count}")

    with pytest.raises(ValueError, match="no part of"):
        load_dataset(name, rows=refuse)
