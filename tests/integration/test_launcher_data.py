"""Data that `launch.train` refuses."""

import http.server
import threading

import numpy as np
import pytest

from tests.integration.helpers import fresh, refused
from tests.integration.runs import ROWS, arrays, train_flags
from tests.unit.data_fixtures import write_d4rl


def broken(name, index=None, value=None):
    def change(data):
        data[name][index] = value

    return change


def shorter(name):
    def change(data):
        data[name] = data[name][:-1]

    return change


def discrete(data):
    data["actions"] = np.zeros((ROWS, 1), np.int64)


def images(data):
    data["observations"] = np.zeros((ROWS, 4, 4, 3), np.uint8)


def empty(data):
    for name in data:
        data[name] = data[name][:0]


def wide(data):
    for name in ("observations", "next_observations"):
        data[name] = np.concatenate([data[name]] * 2, axis=1)


BAD_DATA = {
    "nan observation": (broken("observations", (7, 2), np.nan), ["observations[7][2]"]),
    "infinite next observation": (
        broken("next_observations", (5, 1), np.inf),
        ["next_observations[5][1]"],
    ),
    "nan action": (broken("actions", (11, 0), np.nan), ["actions[11]"]),
    "infinite reward": (broken("rewards", 13, -np.inf), ["rewards[13]"]),
    "action outside": (broken("actions", (17, 0), 2.5), ["actions[17]", "2.5"]),
    "lengths": (shorter("rewards"), ["rewards", "299", "300"]),
    "discrete": (discrete, ["discrete"]),
    "images": (images, ["images"]),
    "empty": (empty, ["empty"]),
    "another environment": (wide, ["Pendulum-v1", "6"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(launcher, tmp_path, case):
    change, words = BAD_DATA[case]
    data = arrays()
    change(data)
    path = write_d4rl(tmp_path / "bad.hdf5", data, env_id="Pendulum-v1")
    refused(launcher.run("train", *train_flags(path, tmp_path / "run")), "bad.hdf5", *words)
    assert not (tmp_path / "run").exists()


def test_datasets_that_are_not_there(launcher, tmp_path):
    text = tmp_path / "text.hdf5"
    text.write_text("not HDF5")
    for name in (tmp_path / "nosuch.hdf5", text, tmp_path, "nosuch", "nosuch/thing-v0"):
        # Offline, so that the Minari id fails at once whatever the network.
        env = {"HF_HUB_OFFLINE": "1"}
        refused(launcher.run("train", *train_flags(name, tmp_path / "run"), env=env), str(name))
    assert not (tmp_path / "run").exists()


def test_minari_id_that_the_server_does_not_know(tmp_path):
    """In a fresh process, where the client's import comes with the download."""

    class Server(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            # The client logs and repeats a request that fails so, then ends at one that fails for
            # good.
            Server.asked += self.path.startswith("/api/datasets")
            self.send_response(503 if Server.asked == 1 else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_VERBOSITY": "",
            "HF_HOME": str(tmp_path / "hub"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "MINARI_DATASETS_PATH": str(tmp_path / "minari"),
            "MINARI_REMOTE": "hf://farama-minari",
        }
        flags = train_flags("nosuch/thing-v0", tmp_path / "run")
        refused(fresh("train", *flags, env=env), "nosuch/thing-v0: no such dataset", "404")
        server.shutdown()
    assert Server.asked == 2


def test_attribute_that_is_no_text(launcher, tmp_path):
    path = write_d4rl(tmp_path / "bad.hdf5", arrays(), env_id=np.array([b"Pendulum-v1"]))
    refused(
        launcher.run("train", *train_flags(path, tmp_path / "run")), "bad.hdf5", "env_id", "text"
    )
