"""Several hosts running one program: how they find each other, agree, and stop together."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from efm_jax.training import hosts

from . import cli, stop_at

# A host that says nothing for so long is taken for dead, and the others stop.
_HEARTBEAT_SECONDS = 30

FLAGS = cli.Flags()
_HOSTS = "One of several hosts that run this command; found by themselves on TPU, GKE, Slurm."
_ELSE = "where hosts are not found."
_MULTIHOST = FLAGS.bool("multihost", False, _HOSTS)
_ADDRESS = FLAGS.string("coordinator_address", None, f"HOST:PORT of process 0, {_ELSE}")
_COUNT = FLAGS.integer("num_processes", None, f"Number of hosts, {_ELSE}", 1)
_INDEX = FLAGS.integer("process_id", None, f"Number of this host, from 0, {_ELSE}", 0)
_EXPLICIT = (_ADDRESS, _COUNT, _INDEX)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other hosts, if the flags say that there are any, and work with them.

    If one of them dies or never comes, say so and exit at once.

    JAX raises the same error for what only this host has, such as too little memory: the reason
    tells. Where the coordinator dies, JAX itself ends the process, with a message of its own.
    """
    try:
        with cli.usage_errors():
            _join()
            cli.check_backend()
        yield
    except RuntimeError as error:
        if not _MULTIHOST.value and _ADDRESS.value is None:
            raise
        reason = " ".join(str(error).split())[:300]
        cause = "another host stopped or cannot be reached, or this one cannot go on"
        cli.say(f"failed: {cause}: {reason}")
        # A normal exit would wait for the lost host.
        os._exit(cli.EXIT_FAILED)


def _join() -> None:
    explicit: dict[str, Any] = {flag.name: flag.value for flag in _EXPLICIT}
    missing = [name for name, value in explicit.items() if value is None]
    if len(missing) == len(explicit):
        if not _MULTIHOST.value:
            return
        explicit = {}
    elif missing:
        raise ValueError(
            f"--{missing[0]}: needed with the others of {', '.join(f'--{n}' for n in explicit)}"
        )
    elif explicit["process_id"] >= explicit["num_processes"]:
        raise ValueError(
            f"--process_id: expected less than the {explicit['num_processes']} of --num_processes; "
            f"got {explicit['process_id']}"
        )
    try:
        jax.distributed.initialize(
            **explicit,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * _HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(f"--multihost: no cluster was found: {error}") from error


@contextlib.contextmanager
def agreed_errors() -> Iterator[None]:
    """Stop all hosts where one of them fails a check, so that none waits for it."""
    problem = None
    try:
        with cli.usage_errors():
            yield
    except cli.UsageError as error:
        problem = error
    failed = hosts.hosts_where(problem is not None)
    if problem is not None:
        raise problem
    if failed:
        raise cli.UsageError(f"host {failed[0]} cannot run this; its own output says why")


class StopSignal:
    """A signal to stop; on several hosts JAX's preemption notice to any, which all see together.

    JAX notices SIGTERM, so there the others become one.
    """

    def __init__(self) -> None:
        self._received, self._asked = False, 0
        self.number: int = signal.SIGTERM  # what was received
        if hosts.count() == 1:
            stop_at(self._on_signal)
        else:
            others = (signal.SIGINT, signal.SIGHUP)
            stop_at(lambda *_: os.kill(os.getpid(), signal.SIGTERM), others)

    def _on_signal(self, number: int, _: Any) -> None:
        # The first counts: schedulers and terminals send several.
        if not self._received:
            self._received, self.number = True, number

    def requested(self) -> bool:
        """Tell whether to stop now; every host must ask at the same points."""
        if hosts.count() > 1:
            self._asked += 1
            self._received = self._received or multihost_utils.reached_preemption_sync_point(
                self._asked
            )
        return self._received

    def received_alone(self) -> bool:
        """Tell whether to stop now; False on several hosts, which may be at different points."""
        return self._received and hosts.count() == 1
