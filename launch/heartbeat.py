"""A line a minute, where there is no terminal to draw progress bars on."""

import sys
import threading
from collections.abc import Callable

_SECONDS = 60.0


class Heartbeat:
    """Says how far a program is, once a minute, until it is closed.

    Args:
      say: prints a line, such as "after 3 min: policy: step 5 of 10".
      silent: whether to say nothing, by default on a terminal.
    """

    def __init__(self, say: Callable[[str], None], silent: bool | None = None):
        self.status = "preparing"  # what the next line says
        self._say, self._closed = say, threading.Event()
        self.thread: threading.Thread | None = None
        if not (sys.stderr.isatty() if silent is None else silent):
            self.thread = threading.Thread(target=self._beat, daemon=True)
            self.thread.start()

    def _beat(self) -> None:
        minutes = 0
        while not self._closed.wait(_SECONDS):
            minutes += 1
            self._say(f"after {minutes} min: {self.status}")

    def close(self) -> None:
        """Say nothing more."""
        self._closed.set()
