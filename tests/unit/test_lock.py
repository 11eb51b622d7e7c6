"""One process writes in a work directory; a dead one is not in the way."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from efm_jax.runs import lock
from efm_jax.runs.lock import Lock, LockedError
from tests.unit import test_remote_workdir

bucket = test_remote_workdir.workdir
# Takes the lock, says so, and lets go of it at its end or not.
HOLDER = """
import os, sys
from etils import epath
from efm_jax.runs.lock import Lock
lock = Lock(epath.Path(sys.argv[1]), print)
print("held", flush=True)
sys.stdin.read(1)
os._exit(9)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("BEAT", "PATIENCE", "SETTLE", "SHORT"):
        monkeypatch.setattr(lock, f"_{name}_SECONDS", {"PATIENCE": 0.5}.get(name, 0.05))


def silent(text):
    raise AssertionError(text)


def test_the_second_is_refused_and_a_dead_first_is_not_in_the_way(tmp_path):
    folder = epath.Path(tmp_path) / "run"
    arguments = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} on .* writes in it; wait"):
            Lock(folder, silent)
        holder.stdin.write(b"\n")
    assert holder.returncode == 9
    first = Lock(folder, silent)  # the file of the dead one is there, and nobody waits for it
    with pytest.raises(LockedError, match=f"process {os.getpid()} "):
        Lock(folder, silent)
    first.close()
    assert list(folder.iterdir()) == []
    Lock(folder, silent).close()


def write(folder, **changes):
    me = {"host": "there", "pid": os.getpid(), **lock._machine(), "token": "t", "count": 1}
    (folder / "lock").write_text(json.dumps(me | changes))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 10_000, '{"pid": 1}', "\0\0", "null"])
def test_what_no_holder_has_written_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    Lock(epath.Path(tmp_path), silent).close()


@pytest.mark.parametrize("flock", [True, False])
def test_a_holder_elsewhere_is_watched(tmp_path, monkeypatch, flock):
    folder, said = epath.Path(tmp_path), []
    if not flock:
        monkeypatch.setattr(lock.fcntl, "flock", lambda *_: os.open("/nosuch/folder", 0))
    write(folder, system="another")
    Lock(folder, said.append).close()  # dead: no beat came
    assert "process" in said[0]
    assert "there has not let go" in said[0]
    write(folder, system="another")
    with pytest.raises(LockedError, match="on there writes in it"):
        Lock(folder, lambda _: write(folder, system="another", count=2))
    write(folder, system="another")
    Lock(folder, lambda _: (folder / "lock").unlink()).close()  # it has let go meanwhile
    # Without flock a process of this machine is asked for by its number.
    write(folder, pid=2**22 + 1)
    Lock(folder, silent).close()


def test_a_bucket(bucket):
    first = Lock(bucket, silent)
    with pytest.raises(LockedError, match=f"process {os.getpid()} "):
        Lock(bucket, lambda _: None)
    write(bucket, system="another")  # who takes this one for dead
    with pytest.raises(LockedError, match="on there"):
        first.check()
    first.close()
    assert json.loads((bucket / "lock").read_text())["host"] == "there"
