"""Small datasets made by hand, for the tests of `efm_jax.data`."""

import contextlib
import functools
import http.server
import threading
import warnings
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from efm_jax.data import DataError, load_dataset

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


def fails(source, *words, **options):
    """`load_dataset` refuses the source in one line that begins with it and has the words."""
    with pytest.raises(DataError) as caught:
        load_dataset(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(source)
    for word in words:
        assert word in message, message


@contextlib.contextmanager
def serving(handler):
    """The address of a server on this machine whose requests go to a handler of `http.server`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serving_files(folder):
    """The same for the files of a folder."""
    return serving(functools.partial(_Files, directory=folder))


def d4rl_arrays(terminals, timeouts=None, *, observation_size=3, action_size=2, seed=0):
    """Rows with observations that name themselves: `observations[i] = i + 0.1 * column`."""
    n = len(terminals)
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": np.arange(n)[:, None] + 0.1 * np.arange(observation_size),
        "actions": rng.uniform(-1, 1, (n, action_size)),
        "rewards": 2.0 ** (np.arange(n) % 16),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays["terminals"] = np.array(terminals, bool)
    if timeouts is not None:
        arrays["timeouts"] = np.array(timeouts, bool)
    return arrays


def write_d4rl(path, arrays, **attributes):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file.attrs.update(attributes)
    return str(path)


def box(size, bound=1.0, dtype=np.float32):
    return spaces.Box(-bound, bound, (size,), dtype)


def episode(steps, observations, *, terminated=False, actions=None, rewards=None):
    """A Minari episode; `observations` any nesting of arrays `[steps + 1, ...]`."""
    ends = np.zeros(steps, bool)
    ends[-1:] = True
    if actions is None:
        actions = np.linspace(-0.5, 0.5, 2 * steps, dtype=np.float32).reshape(steps, 2)
    if rewards is None:
        rewards = np.arange(steps, dtype=np.float64)
    return EpisodeBuffer(
        observations=observations,
        actions=actions,
        rewards=list(rewards),
        terminations=list(ends & terminated),
        truncations=list(ends & (not terminated)),
        infos={},
    )


def write_minari(name, episodes, observation_space=None, action_space=None, **metadata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(
            name,
            buffer=episodes,
            observation_space=observation_space or box(3, np.inf),
            action_space=action_space or box(2),
            **metadata,
        )
