"""Calls of the observer of a listener, whose failures are logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twisted.python.failure import Failure

from cacheservice.base.interfaces import Log
from cacheservice.base.internal_errors import log_internal_error


@dataclass(slots=True)
class Observer:
    """The functions that a listener calls, in the reactor's thread. Both must be quick.

    :param heard: called with the channel and the payload of each notification.
    :param missed: called when notifications may have been missed: after each proof that a new session listens,
        including the first, and when channels were added.
    """

    heard: Callable[[str, str], object]
    missed: Callable[[], object]


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
