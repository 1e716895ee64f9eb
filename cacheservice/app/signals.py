"""The process's interface to its supervisor.

It consists of the signals, and of twistd's arguments about the log.
"""

from __future__ import annotations

import getopt
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.scripts import twistd

from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Reloaded

_Handler = Callable[[int, FrameType | None], object]
_TWISTD_LOG = "twistd.log"
"""The file that twistd logs to by default as a daemon."""


def log_file(arguments: Sequence[str]) -> str | None:
    """Return the log file in the arguments of `twistd`; None for standard output.

    :param arguments: those of the command line, starting with the name of the program.
    """
    if not arguments or not Path(arguments[0]).name.startswith("twistd"):
        return None
    known: Any = twistd.ServerOptions()  # type: ignore[attr-defined]  # its class depends on the platform
    try:
        # twistd's own parser would install the reactor a second time.
        given = dict(getopt.getopt(list(arguments[1:]), known.shortOpt, known.longOpt)[0])
    except getopt.GetoptError:
        return None
    path = given.get("--logfile", given.get("-l"))
    is_daemon = not {"-n", "--nodaemon", "-b", "--debug"} & given.keys()
    if path == "-" or (path is None and not is_daemon):
        return None
    return str(Path(path or _TWISTD_LOG).absolute())


class Signals(Service):
    """Handles SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2.

    The first SIGTERM or SIGINT stops the service in order, a second one ends it at once. SIGHUP reloads the
    configuration. Twisted ignores a second SIGTERM, so that only SIGKILL would end a stop that hangs. SIGUSR1 reopens
    the log file, as with twistd's own. SIGUSR2, and SIGUSR1 without a log file, are logged and ignored, because their
    default action is to end the process.

    :param reopen_log: reopens the log file and returns its path; None without a log file.
    """

    name = "signals"

    def __init__(
        self, reactor: Reactor, reload: Callable[[], Deferred[Reloaded]], reopen_log: Callable[[], str | None], log: Log
    ) -> None:
        self._reopen_log = reopen_log
        self._log = log
        self._reactor = reactor
        self._reload = reload
        self._came_early = False

    def startService(self) -> None:
        super().startService()
        signal.signal(signal.SIGHUP, self._hang_up)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._user_signal)
        signal.signal(signal.SIGTERM, self._remember)
        # Twisted installs its own handlers of these signals later, when the reactor starts to run.
        self._reactor.callWhenRunning(self._install)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Record a signal that arrives before an ordered stop is possible."""
        if self._came_early:
            _end_at_once(number, frame)
        self._came_early = True

    def _install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._once(cast("_Handler", signal.getsignal(number))))
        if self._came_early:
            os.kill(os.getpid(), signal.SIGTERM)

    def _once(self, stop: _Handler) -> _Handler:
        def first(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, _end_at_once)
            signal.signal(signal.SIGINT, _end_at_once)
            stop(number, frame)

        return first

    def _hang_up(self, _: int, __: FrameType | None) -> None:
        self._reactor.callFromThread(self._reload_now)

    def _user_signal(self, number: int, _: FrameType | None) -> None:
        self._reactor.callFromThread(self._user_signalled, signal.Signals(number))

    def _user_signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGUSR2:
            self._log.info("signal_ignored", signal=number.name, reason="it has no meaning here")
            return
        try:
            path = self._reopen_log()
        except OSError as error:
            self._log.error("log_not_reopened", error=str(error))
            return
        if path is None:
            self._log.info("signal_ignored", signal=number.name, reason="the log goes to standard output")
        else:
            self._log.info("log_reopened", file=path)

    def _reload_now(self) -> None:
        # The refusal has been logged and is in the status.
        self._reload().addErrback(lambda failure: failure.trap(CacheServiceError))


def _end_at_once(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # PID 1 is not killed by a signal that it does not handle
