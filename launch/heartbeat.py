"""A line a minute, where there is no terminal to draw progress bars on."""

import sys
import threading
from collections.abc import Callable

_SECONDS = 60.0


class Heartbeat:
    """Says how far a program is, once a minute, until it is closed.

    Args:
      say: prints a line.
      silent: whether to say nothing, by default on a terminal.
    """

    def __init__(self, say: Callable[[str], None], silent: bool | None = None):
        self.status = "preparing"  # what the next line says
        self._say, self._closed = say, threading.Event()
        if not (sys.stderr.isatty() if silent is None else silent):
            threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._closed.wait(_SECONDS):
            self._say(self.status)

    def close(self) -> None:
        """Say nothing more."""
        self._closed.set()
