import _thread
import http.server
import re
import time

import pytest

from efm_jax.data import DataError
from efm_jax.data.download import HDF5_SIGNATURE, fetch
from tests.unit.data_fixtures import serving

CONTENT = HDF5_SIGNATURE + bytes(range(256)) * 20_000  # more than one chunk


class Handler(http.server.BaseHTTPRequestHandler):
    """/whole, /cut (fewer bytes than announced), /page (no dataset), /interrupt; else 404."""

    def do_GET(self):
        if self.path not in ("/whole", "/cut", "/page", "/interrupt"):
            self.send_error(404)
            return
        body = b"<html>sign in</html>" if self.path == "/page" else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.path in ("/whole", "/page") else body[:-10])
        if self.path == "/interrupt":  # as Control-C does, when most has come
            _thread.interrupt_main()
            time.sleep(0.2)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with serving(Handler) as url:
        yield url.rstrip("/")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fails(path, url, *words):
    with pytest.raises(DataError) as caught:
        fetch("some-name", url, path, HDF5_SIGNATURE)
    message = str(caught.value)
    assert message.startswith(f"some-name: no such file {path}, and {url} could not be downloaded")
    assert "\n" not in message
    for word in words:
        assert word in message


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloads_once_into_a_folder_that_it_makes(server, tmp_path, capsys):
    path = tmp_path / "a" / "b" / "file.hdf5"
    fetch("some-name", f"{server}/whole", path, HDF5_SIGNATURE)
    assert path.read_bytes() == CONTENT
    assert files(tmp_path) == ["file.hdf5"]
    (tmp_path / "any").touch()  # others may read it as any new file
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
    path.write_bytes(b"mine")
    fetch("some-name", f"{server}/absent", path, HDF5_SIGNATURE)  # it is there: nobody is asked
    assert path.read_bytes() == b"mine"
    assert capsys.readouterr().err == ""  # no progress where nobody looks


def test_shows_progress(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch("some-name", f"{server}/whole", tmp_path / "file.hdf5", HDF5_SIGNATURE)
    assert re.search(r"100%.*5\.12M/5\.12M", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("place", "words"),
    [("absent", ("404",)), ("cut", (str(len(CONTENT) - 10),)), ("page", ("begins with", "<html>"))],
)
def test_failures_leave_nothing_behind(server, tmp_path, place, words):
    fails(tmp_path / "file.hdf5", f"{server}/{place}", *words)
    assert files(tmp_path) == []


def test_places_that_cannot_be_reached_or_made(server, tmp_path):
    fails(tmp_path / "file.hdf5", "http://example.invalid/x", "example.invalid")
    fails(tmp_path / "file.hdf5", "http://127.0.0.1:9/x", "refused")
    fails(tmp_path / "file.hdf5", "nonsense", "Invalid URL")
    (tmp_path / "taken").touch()
    fails(tmp_path / "taken" / "file.hdf5", f"{server}/whole", "Error")


def test_interrupted_download_leaves_nothing_behind(server, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fetch("some-name", f"{server}/interrupt", tmp_path / "file.hdf5", HDF5_SIGNATURE)
    assert files(tmp_path) == []
