"""Entry points with absl flags; the only place that reads flags, signals and the command line."""

import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

# Ctrl-C, a closed terminal, and what a scheduler sends.
STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def stop_at(handler: Any, numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """Let ``handler(number, frame)`` see signals that end a process.

    A SIGHUP that is ignored stays so, because ``nohup`` means it.
    """
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def leave(number: int, _: Any) -> None:
    """Say why and leave with the status that a shell would report; at once if asked again."""
    stop_at(lambda again, _: os._exit(128 + again))
    os.write(2, f"launch: stopped by {signal.Signals(number).name}\n".encode())
    sys.exit(128 + number)


# Python has not found the entry point yet, or a console script loads it: its imports take seconds.
if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("efm-"):
    stop_at(leave)
