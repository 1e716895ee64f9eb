"""The program of a worker: ``python -m cacheservice.app.workers``, started by the main process only."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, cast

from twisted.internet import reactor as twisted_reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.logger import globalLogBeginner

from cacheservice.app.workers import descriptors
from cacheservice.app.workers.link_log import LinkLog, LogSender
from cacheservice.app.workers.worker import Worker
from cacheservice.base import clock, scheduling
from cacheservice.base.interfaces import Reactor
from cacheservice.ops.logs import TwistedEvents
from cacheservice.replication.link import Link
from cacheservice.replication.sockets import adopt

_LAST_MOMENT_S = 1.0
_PR_SET_PDEATHSIG = 1
_OF_MAIN = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals to a whole process group, such as a terminal sends them. The main process handles them for all."""


class _Program:
    """Runs the reactor until the worker ends."""

    def __init__(self) -> None:
        self._reactor: Any = twisted_reactor
        self._ended: Deferred[None] = Deferred()
        self._exit_code = 0
        reactor = cast("Reactor", twisted_reactor)
        sender = LogSender()
        log = LinkLog(sender)
        observer: Any = TwistedEvents(log)
        globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False, discardBuffer=True)
        link = Link(reactor, log, self._received, self._lost)
        sender.send_over(link)
        self._worker = Worker(reactor, link, log, self._end)
        adopt(reactor, socket.socket(fileno=descriptors.LINK), link)

    def run(self) -> int:
        """Serve until the end; return the exit code."""
        self._reactor.addSystemEventTrigger("before", "shutdown", self._stop)
        self._worker.start()
        self._reactor.run()
        return self._exit_code

    def _received(self, data: bytes) -> None:
        self._worker.received(data)

    def _lost(self, reason: str) -> None:
        # If anything hangs from here on, this thread ends the process.
        threading.Thread(target=_end_soon, daemon=True).start()
        self._worker.lost(reason)

    def _end(self, exit_code: int) -> None:
        if not self._ended.called:
            self._exit_code = exit_code
            self._ended.callback(None)
            with suppress(ReactorNotRunning):
                self._reactor.stop()

    def _stop(self) -> Deferred[None]:
        """Stop in order after SIGTERM."""
        self._worker.stop()
        return self._ended


def _end_soon() -> None:
    time.sleep(_LAST_MOMENT_S)
    os._exit(1)


def main() -> None:
    """Serve until the main process ends, or asks this one to."""
    for number in _OF_MAIN:
        signal.signal(number, signal.SIG_IGN)
    # When the main process is killed, the kernel ends a worker even if it hangs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    scheduling.ask_for_slices(scheduling.SHORTEST_S)
    twisted_reactor.seconds = clock.seconds  # type: ignore[method-assign, misc]  # as in tac/cacheservice.tac
    exit_code = _Program().run()
    sys.stderr.flush()
    # Without the end of the interpreter, which would free millions of rows one by one.
    os._exit(exit_code)


if __name__ == "__main__":
    main()
