"""Detects a process that does not answer."""

from __future__ import annotations

from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import looping
from cacheservice.replication.link import Link, LinkLost
from cacheservice.replication.messages import Plain

_NEVER_S = 86_400.0


SILENT_AFTER = 2
"""Intervals without an answer after which the other end is silent, so that others take over its work."""


class Observer(Protocol):
    """Is notified of what a heartbeat finds."""

    def answering(self, answers: bool, /) -> None:
        """Note that the other end does not answer any more, or does again."""

    def hung(self) -> None:
        """Note that the other end has not answered for too long. There are no more calls."""


class Heartbeat:
    """Calls `ping` of the other end at an interval, one call at a time.

    It counts the intervals without an answer, not the seconds: if this process or the whole machine was suspended, the
    answers have arrived but are not read yet, and only one interval is counted.

    :param most_missed: intervals without an answer after which the other end hangs.
    """

    def __init__(self, link: Link, clock: Clock, interval_s: float, most_missed: int, observer: Observer) -> None:
        self._link = link
        self._interval_s = interval_s
        self._most_missed = most_missed
        self._observer = observer
        self._missed = 0
        self._asked: Deferred[Plain] | None = None
        self._loop = looping(clock, self._tick)

    def start(self) -> None:
        self._loop.start(self._interval_s)

    def stop(self) -> None:
        if self._loop.running:
            self._loop.stop()
        if self._asked is not None:
            self._asked.cancel()

    def _tick(self) -> None:
        if self._asked is None:
            self._missed = 0
            self._asked = asked = self._link.call("ping", _NEVER_S)
            asked.addBoth(self._answered)
            return
        self._missed += 1
        if self._missed == SILENT_AFTER:
            self._observer.answering(False)
        if self._missed >= self._most_missed:
            self.stop()
            self._observer.hung()

    def _answered(self, result: object) -> None:
        self._asked = None
        if isinstance(result, Failure) and result.trap(CacheServiceError, CancelledError) in (LinkLost, CancelledError):
            return  # the link reports its end
        if self._missed >= SILENT_AFTER:
            self._observer.answering(True)
