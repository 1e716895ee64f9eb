"""The sessions that reads use: opened when needed, and one of them kept for the next read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.cache.cache import DatabaseStatus
from cacheservice.errors import DatabaseUnavailable, DeadlineExceeded
from cacheservice.postgres.connector import Connector
from cacheservice.postgres.guard import GuardedConnection
from cacheservice.postgres.resolve import Resolver
from cacheservice.postgres.target import Resolve, Target

T = TypeVar("T")
Use = Callable[[GuardedConnection], Awaitable[T]]

_IDLE_LIMIT_S = 60.0
"""How long a session is kept for the next delta. To open one takes longer than the delta itself."""


class Sessions:
    """Opens sessions, and keeps one between reads.

    :param connect_timeout_s: for one session to open, name look-ups included.
    :param status: counts the sessions that are open.
    """

    def __init__(self, reactor: Any, target: Target, connect_timeout_s: float, status: DatabaseStatus) -> None:
        self._reactor = reactor
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._resolver = Resolver(reactor)
        self._connector = Connector(reactor, self._resolver.resolve)
        self._status = status
        self._idle: GuardedConnection | None = None
        self._stopped = False

    @property
    def target(self) -> Target:
        """Where sessions are opened now."""
        return self._target

    @property
    def resolve(self) -> Resolve:
        """Name look-ups for other parts of the service."""
        return self._resolver.resolve

    @property
    def connector(self) -> Connector:
        """For sessions that are opened elsewhere: it knows which addresses answer."""
        return self._connector

    def configure(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions so from now on."""
        if target != self._target:
            self._end_idle()
        self._target = target
        self._connect_timeout_s = connect_timeout_s

    def stop(self) -> None:
        """Let the name look-ups and the kept session go; the others end with the reads that hold them."""
        self._stopped = True
        self._end_idle()
        self._resolver.stop()

    def use(self, purpose: str, deadline_at: float, use: Use[T], *, keep: bool = False) -> Deferred[T]:
        """`use` a session, the kept one if there is one. If it succeeds, `keep` it for the next."""
        guard = None
        if keep:
            guard, self._idle = self._idle, None
        if guard is not None:
            guard.renew(deadline_at)
            d: Deferred[T] = Deferred.fromCoroutine(_used(use, guard))
            d.addBoth(self._keep_or_close, guard, keep)
            d.addErrback(self._again_if_lost, purpose, deadline_at, use, keep)
            return d
        return self._use_new(purpose, deadline_at, use, keep)

    def _use_new(self, purpose: str, deadline_at: float, use: Use[T], keep: bool) -> Deferred[T]:
        guard = GuardedConnection(self._reactor, self._target, deadline_at)
        self._status.connections += 1
        d: Deferred[Any]
        d = Deferred.fromCoroutine(guard.connect(self._connector, purpose, self._connect_timeout_s))
        d.addCallback(lambda _: Deferred.fromCoroutine(_used(use, guard)))
        d.addBoth(self._keep_or_close, guard, keep)
        return d

    def _keep_or_close(self, result: Any, guard: GuardedConnection, keep: bool) -> Any:
        if keep and self._idle is None and not self._stopped and not isinstance(result, Failure):
            # Never after a failure: nobody knows what it left behind.
            guard.renew(self._reactor.seconds() + _IDLE_LIMIT_S)
            guard.on_end(self._forget)
            self._idle = guard
            return result
        self._status.connections -= 1
        return guard.close_and_passthrough(result)

    def _forget(self) -> None:
        """The kept session came to its deadline."""
        self._idle = None
        self._status.connections -= 1

    def _end_idle(self) -> None:
        guard, self._idle = self._idle, None
        if guard is not None:
            self._status.connections -= 1
            guard.close_and_passthrough(None)

    def _again_if_lost(self, failure: Failure, purpose: str, deadline_at: float, use: Use[T], keep: bool) -> Any:
        """Repeat all of `use` in a new session if the kept one was lost: that is not a failure of the read.

        The session may be lost at any statement, so `use` must begin with nothing of what it did before.
        """
        if not failure.check(DatabaseUnavailable) or failure.check(DeadlineExceeded):
            return failure
        return self.use(purpose, deadline_at, use, keep=keep)


async def _used(use: Use[T], guard: GuardedConnection) -> T:
    return await use(guard)
