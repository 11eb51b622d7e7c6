import http.server
import re
import threading
import urllib.request

import pytest

from efm_jax.data import DataError
from efm_jax.data.download import HDF5_SIGNATURE, fetch

CONTENT = HDF5_SIGNATURE + bytes(range(256)) * 20_000  # more than one chunk


class Handler(http.server.BaseHTTPRequestHandler):
    """/whole, /cut (fewer bytes than announced), /page (an answer that is no dataset); else 404."""

    def do_GET(self):
        if self.path not in ("/whole", "/cut", "/page"):
            self.send_error(404)
            return
        body = b"<html>sign in</html>" if self.path == "/page" else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-10] if self.path == "/cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


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
    return message


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloads_once_into_a_folder_that_it_makes(server, tmp_path):
    path = tmp_path / "a" / "b" / "file.hdf5"
    fetch("some-name", f"{server}/whole", path, HDF5_SIGNATURE)
    assert path.read_bytes() == CONTENT
    assert files(tmp_path) == ["file.hdf5"]
    path.write_bytes(b"mine")
    fetch("some-name", f"{server}/absent", path, HDF5_SIGNATURE)  # it is there: nobody is asked
    assert path.read_bytes() == b"mine"


def test_shows_progress(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch("some-name", f"{server}/whole", tmp_path / "file.hdf5", HDF5_SIGNATURE)
    assert re.search(r"file\.hdf5: 100%.*4\.88M/4\.88M", capsys.readouterr().err)


def test_file_url(tmp_path):
    (tmp_path / "source").write_bytes(CONTENT)
    fetch("some-name", (tmp_path / "source").as_uri(), tmp_path / "copy", HDF5_SIGNATURE)
    assert (tmp_path / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("absent", ("404",)),
        ("cut", ("broke off", str(len(CONTENT) - 10), str(len(CONTENT)))),
        ("page", ("begins with", "<html>")),
    ],
)
def test_failures_leave_nothing_behind(server, tmp_path, place, words):
    fails(tmp_path / "file.hdf5", f"{server}/{place}", *words)
    assert files(tmp_path) == []


def test_offline(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    fails(tmp_path / "file.hdf5", "http://example.invalid/x", "Name or service not known")


def test_nobody_listens_and_odd_urls(tmp_path):
    fails(tmp_path / "file.hdf5", "http://127.0.0.1:9/x", "refused")
    fails(tmp_path / "file.hdf5", "nonsense", "ValueError")


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "taken").touch()
    fails(tmp_path / "taken" / "file.hdf5", f"{server}/whole", "Error")


def test_interrupted_download_leaves_nothing_behind(server, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("efm_jax.data.download._check_signature", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("some-name", f"{server}/whole", tmp_path / "file.hdf5", HDF5_SIGNATURE)
    assert files(tmp_path) == []
