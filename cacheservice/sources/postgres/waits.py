"""Waits of a session of the driver: for notifications, and for anything to read.

Each is in the reactor only while libpq's socket is certainly open, and ends in a turn of the reactor of its own, so
that a flood cannot monopolize the reactor.
"""

from __future__ import annotations

from typing import Protocol

import psycopg2
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.base.interfaces import Reactor
from cacheservice.sources.postgres.connector import AnySession

_NOTIFICATIONS_PER_TURN = 1000


class Notification(Protocol):
    """A notification that the driver received."""

    channel: str
    payload: str


@implementer(IReadDescriptor)
class Ear:
    """One wait for notifications between two statements, until some arrive or a time.

    `heard` fires with those that have arrived.
    """

    def __init__(self, reactor: Reactor, session: AnySession, until: float) -> None:
        self.heard: Deferred[list[Notification]] = Deferred()
        self._reactor = reactor
        self._session = session
        self._lost: Failure | None = None
        self._timer = reactor.callLater(max(0.0, until - reactor.seconds()), self._end)
        # Notifications that came with the last answer are in libpq's memory; the socket has no event for them.
        self.doRead()

    def doRead(self) -> None:
        self._reactor.removeReader(self)
        try:
            self._session.poll()
        except psycopg2.Error:
            self._lost = Failure()
        if self._lost or self._session.notifies:
            self.wake()
        else:
            self._reactor.addReader(self)

    def wake(self) -> None:
        """End the wait now."""
        if self._timer.active():
            self._timer.reset(0)

    def stop(self) -> None:
        """Leave the reactor; `heard` never fires."""
        self._reactor.removeReader(self)
        if self._timer.active():
            self._timer.cancel()

    def _end(self) -> None:
        self._reactor.removeReader(self)
        if self._lost is not None:
            self.heard.errback(self._lost)
            return
        notifies = self._session.notifies
        batch = notifies[:_NOTIFICATIONS_PER_TURN]
        del notifies[:_NOTIFICATIONS_PER_TURN]
        self.heard.callback(batch)

    def fileno(self) -> int:
        return -1 if self._session.closed else self._session.fileno()

    def connectionLost(self, reason: Failure) -> None:
        """Let libpq find the end of the socket, which the reactor saw first."""
        if self._timer.active() and self._lost is None:
            self.doRead()

    def logPrefix(self) -> str:
        return "notifications"


@implementer(IReadDescriptor)
class Readable:
    """One wait until the socket is readable, or until a moment of the reactor's clock. It reads nothing."""

    def __init__(self, reactor: Reactor, session: AnySession, until: float) -> None:
        self.heard: Deferred[None] = Deferred()
        self._reactor = reactor
        self._session = session
        self._timer = reactor.callLater(max(0.0, until - reactor.seconds()), self._end)
        reactor.addReader(self)

    def doRead(self) -> None:
        self._reactor.removeReader(self)
        self.wake()

    def connectionLost(self, reason: Failure) -> None:
        """Let libpq find the end of the socket, which the reactor saw first."""
        self.doRead()

    def wake(self) -> None:
        """End the wait now."""
        if self._timer.active():
            self._timer.reset(0)

    def stop(self) -> None:
        """Leave the reactor; `heard` never fires."""
        self._reactor.removeReader(self)
        if self._timer.active():
            self._timer.cancel()

    def fileno(self) -> int:
        return -1 if self._session.closed else self._session.fileno()

    def logPrefix(self) -> str:
        return "replication"

    def _end(self) -> None:
        self._reactor.removeReader(self)
        self.heard.callback(None)
