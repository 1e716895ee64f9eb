"""Calls of the observer of a listener, whose failures are logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from twisted.python.failure import Failure

from cacheservice.base.interfaces import Log


class Observer(Protocol):
    """The receiver of notifications. It is called in the reactor's thread, and must be quick."""

    def heard(self, channel: str, payload: str) -> object:
        """Note a notification."""

    def missed(self) -> object:
        """Note that notifications may have been missed.

        It is called after each proof that a new session listens, including the first, and when channels were added.
        """


class Calls:
    """Calls the observer. `running` while it is called."""

    def __init__(self, observer: Observer, log: Log) -> None:
        self._observer = observer
        self._log = log
        self.running = False

    def heard(self, channel: str, payload: str) -> None:
        """Call the observer with a notification."""
        self._call(lambda: self._observer.heard(channel, payload))

    def missed(self) -> None:
        """Call the observer because notifications may have been missed."""
        self._call(self._observer.missed)

    def _call(self, call: Callable[[], object]) -> None:
        self.running = True
        try:
            call()
        except Exception:
            log_internal_error(self._log, Failure())
        finally:
            self.running = False


def log_internal_error(log: Log, failure: Failure) -> None:
    """Log a bug with its traceback."""
    log.error("internal_error", error=failure.getErrorMessage(), traceback=failure.getTraceback())
