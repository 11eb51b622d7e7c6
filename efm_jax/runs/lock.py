"""The lock of a work directory: one process writes in it, any may read."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from efm_jax.files import write_whole

LOCK_FILE = "lock"
_BEAT_SECONDS = 10.0
# So long a holder elsewhere may say nothing before it is taken for dead.
_PATIENCE_SECONDS = 45.0
_SETTLE_SECONDS = 1.0
_SHORT_SECONDS = 1.0  # how long launch.evaluate may hold it
_WIDTH = 400  # bytes of the file: one length, so that one write replaces it


class LockedError(ValueError):
    """Another process writes in the work directory."""


class Lock:
    """The right to write in a work directory, from when this is made until it is closed.

    The system's ``flock`` decides where it is to be had, which is on local folders and on network
    folders that pass it on (NFS, if mounted so): a process that died holds nothing.  The file also
    says who holds it, with a number that goes up every 10 seconds, for where ``flock`` is not
    there (``gs://``) or is not passed on.  A holder on this machine whose process is gone is dead.
    Any other gets 45 seconds: it may let go, being stopped and saving; it is dead if the number
    stands still; else this process is refused.  Of two processes that begin on ``gs://`` within the
    same second, the one that wrote last goes on.

    Args:
      workdir: local or ``gs://``; made if it is not there.
      report: called with one line before a holder is watched.
      beat: called with every beat.

    Raises:
      LockedError: another process holds it.
      OSError: the folder cannot be written.
    """

    def __init__(
        self,
        workdir: epath.Path,
        report: Callable[[str], None],
        beat: Callable[[], None] = lambda: None,
    ):
        self._workdir, self._path, self._beat = workdir, workdir / LOCK_FILE, beat
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **_machine(),
            "token": uuid.uuid4().hex,
        }
        self._count, self._lost, self._closed = 0, False, threading.Event()
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = None if "://" in os.fspath(workdir) else self._flock()
        try:
            self._watch(report)
            self._write()
            if self._file is None:
                time.sleep(_SETTLE_SECONDS)  # because another may have found the same dead holder
                self.check()
        except BaseException:
            self._unlock()
            raise
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse to go on where another process has taken this one for dead."""
        text = self._read()
        self._lost |= bool(text) and _parse(text).get("token") != self._me["token"]
        if self._lost:
            raise LockedError(self._refusal(text))

    def close(self) -> None:
        """Let others write."""
        self._closed.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._unlock()

    def _flock(self) -> int | None:
        """Open and lock the file; None where the file system has no locks."""
        end = time.monotonic() + _SHORT_SECONDS
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                os.close(file)
                if time.monotonic() > end:
                    raise LockedError(self._refusal(self._read())) from error
                time.sleep(0.05)
                continue
            except OSError:
                os.close(file)
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    return file
            os.close(file)  # because its holder has removed it meanwhile

    def _watch(self, report: Callable[[str], None]) -> None:
        """Wait for a sign of life of a holder that the system does not know of."""
        text = first = self._read()
        holder = _parse(text)
        # The system knows of every holder of a flock, and of processes that it numbers itself.
        known = ("system",) if self._file is not None else ("system", "processes")
        here = all(holder.get(name) == self._me[name] for name in known)
        dead = self._file is not None or not _alive(holder.get("pid"))
        if "token" not in holder or (here and dead):  # or what no holder has written
            return
        end = time.monotonic() + _PATIENCE_SECONDS
        seconds = f"waiting {_PATIENCE_SECONDS:.0f} s for it"
        report(f"workdir {self._workdir}: {_name(holder)} has not let go of it; {seconds}")
        while text and time.monotonic() < end:
            time.sleep(min(1.0, _PATIENCE_SECONDS / 10))
            text = self._read()
        if text not in ("", first):
            raise LockedError(self._refusal(text))

    def _keep(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            # A full disk or a lost network is for those to tell who write what is needed.
            with contextlib.suppress(OSError, LockedError):
                self.check()
                self._write()
                self._beat()

    def _write(self) -> None:
        self._count += 1
        text = json.dumps(self._me | {"count": self._count}).ljust(_WIDTH)
        if self._file is None:
            write_whole(self._path, text)
        else:
            os.ftruncate(self._file, _WIDTH)
            os.pwrite(self._file, text.encode(), 0)
            os.fsync(self._file)  # for other machines

    def _read(self) -> str:
        try:
            return self._path.read_bytes().decode(errors="replace").strip("\0 ")
        except FileNotFoundError:
            return ""

    def _unlock(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def _refusal(self, text: str) -> str:
        holder = _name(_parse(text))
        return f"workdir {self._workdir}: {holder} writes in it; wait, or give another --workdir"


def _parse(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    return {}


def _name(holder: dict[str, Any]) -> str:
    if "pid" not in holder or "host" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}"


def _machine() -> dict[str, str]:
    """Tell running systems apart, and containers of one of them, whose process numbers differ."""
    names = {"system": socket.gethostname(), "processes": ""}
    with contextlib.suppress(OSError):
        names["system"] = epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        names["processes"] = os.readlink("/proc/self/ns/pid")
    return names


def _alive(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
