"""Coroutines that are started for their effect, and that have one owner."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from cacheservice.base.interfaces import Log
from cacheservice.base.internal_errors import log_internal_error

T = TypeVar("T")


def abandon(running: Deferred[T]) -> None:
    """Cancel what is not needed any more, and ignore how it ends."""
    running.addErrback(lambda _: None)
    running.cancel()


class Tasks:
    """Runs coroutines until they end or are cancelled; a failure is a bug, and is logged."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._under_way: set[Deferred[None]] = set()

    def run(self, work: Coroutine[Deferred[object], object, None]) -> Deferred[None]:
        """Run `work` until it ends or `cancel` is called. The Deferred fires then, and never fails."""
        running = Deferred.fromCoroutine(work)
        self._under_way.add(running)
        return running.addBoth(self._ran, running)

    def cancel(self) -> None:
        """Cancel what runs."""
        for running in list(self._under_way):
            running.cancel()

    def _ran(self, result: object, running: Deferred[None]) -> None:
        self._under_way.discard(running)
        if isinstance(result, Failure) and not result.check(CancelledError):
            log_internal_error(self._log, result)
