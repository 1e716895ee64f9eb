"""Starts the process of a worker."""

from __future__ import annotations

import os
import signal
import site
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

import cacheservice
from cacheservice.app.workers import descriptors
from cacheservice.base.interfaces import Reactor

_INHERITED = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "GLIBC_TUNABLES")
_INHERITED_PREFIXES = ("PYTHON", "LC_", "LD_", "MALLOC_")


class Ending(NamedTuple):
    """How a process ended: its exit code, or the name of the signal that ended it."""

    exit_code: int | None
    signal: str | None


class Process(Protocol):
    """A running process."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """End it at once with SIGKILL, if it still runs."""


Spawn = Callable[[socket.socket, Callable[[Ending], None]], Process]
"""Starts a worker with one end of its link, which the caller closes, and calls back once when it has ended. It raises
OSError if the system has no process left."""


class Spawner:
    """Starts workers with the sockets of the ports.

    :param sockets: returns the descriptors of the listening sockets by those that they have in a worker.
    """

    def __init__(self, reactor: Reactor, sockets: Callable[[], Mapping[int, int]]) -> None:
        self._reactor = reactor
        self._sockets = sockets

    def __call__(self, link: socket.socket, ended: Callable[[Ending], None]) -> Process:
        """Start a worker: a `Spawn`."""
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            streams = {0: nothing, 1: _standard(sys.__stdout__, nothing), 2: _standard(sys.__stderr__, nothing)}
            process = self._reactor.spawnProcess(
                _Protocol(lambda ending: self._reactor.callLater(0, ended, ending)),
                sys.executable,
                # -P: nothing in the working directory is imported.
                args=(sys.executable, "-P", "-m", __package__ or ""),
                env=environment(os.environ),
                childFDs={**streams, descriptors.LINK: link.fileno(), **self._sockets()},
            )
        finally:
            os.close(nothing)
        return _Running(process)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the part of an environment that a worker needs to start; it contains no secret."""
    kept = {
        name: value for name, value in environ.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    folder = str(Path(cacheservice.__file__).parents[1])
    if folder in (*site.getsitepackages(), site.getusersitepackages()):
        return kept
    # It runs from a checkout that is not installed, such as the one in the working directory.
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, (folder, environ.get("PYTHONPATH"))))}


def _standard(stream: TextIO | None, otherwise: int) -> int:
    """Return the descriptor of a standard stream, which may be closed in a daemon."""
    if stream is None:
        return otherwise
    try:
        descriptor = stream.fileno()
        os.fstat(descriptor)
    except (OSError, ValueError):
        return otherwise
    return descriptor


class _Protocol(ProcessProtocol):
    def __init__(self, ended: Callable[[Ending], object]) -> None:
        self._ended = ended

    def processEnded(self, reason: Failure) -> None:
        number: int | None = getattr(reason.value, "signal", None)
        name = None if number is None else signal.Signals(number).name
        self._ended(Ending(getattr(reason.value, "exitCode", None), name))


class _Transport(Protocol):
    """`IProcessTransport`."""

    pid: int

    def signalProcess(self, name: str, /) -> object: ...


class _Running:
    def __init__(self, process: _Transport) -> None:
        self._process = process
        self.pid = process.pid

    def kill(self) -> None:
        with suppress(ProcessExitedAlready):
            self._process.signalProcess("KILL")
