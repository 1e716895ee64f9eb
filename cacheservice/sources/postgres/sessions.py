"""Opens sessions for reads, and keeps them while their next use is near.

A session is opened, then in use, and after each use idle or closed; see `IdleSessions`. `commit` resets session state
that a query may have changed; our own statements never change it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.base.errors import DatabaseUnavailable, DeadlineExceeded, NoSessionLeft, let_go
from cacheservice.base.interfaces import Cursor, Reactor
from cacheservice.base.timers import pause
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.sources.postgres.connector import Connector
from cacheservice.sources.postgres.guard import KEEPALIVES, GuardedConnection
from cacheservice.sources.postgres.idle_sessions import IdleSessions, PooledSession, Returns
from cacheservice.sources.postgres.keeping import has_room
from cacheservice.sources.postgres.resolve import Resolver
from cacheservice.sources.postgres.target import Resolve, Target

T = TypeVar("T")
Use = Callable[[GuardedConnection], Awaitable[T]]

_ROOM_COMES_WITHIN_S = 3.0
_ROOM_POLL_S = 0.05
"""The server frees the connection of a session shortly after its end; a busy server may need seconds."""
_COLLISION_WAITS_S = (0.1, 0.2, 0.4)
"""The server counts logins as sessions, so two concurrent logins may both be refused although there is room for one."""

# The role's idle_session_timeout would end a kept session. These settings are for the session, so they are never sent
# through a proxy.
_RESET = """
COMMIT;
RESET SESSION AUTHORIZATION;
RESET ALL;
SET idle_session_timeout = 0;
SELECT pg_advisory_unlock_all()
"""
_ROOM = """;
SELECT r.rolconnlimit, (SELECT count(*) FROM pg_catalog.pg_stat_activity AS a WHERE a.usesysid = r.oid)
FROM pg_catalog.pg_roles AS r WHERE r.rolname = session_user
"""


class Sessions:
    """Opens sessions, and keeps them between reads.

    :param connect_timeout_s: for one session to open, name look-ups included.
    :param status: counts the open sessions.
    """

    def __init__(self, reactor: Reactor, target: Target, connect_timeout_s: float, status: DatabaseStatus) -> None:
        self._reactor = reactor
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._resolver = Resolver(reactor)
        self._connector = Connector(reactor, self._resolver.resolve)
        self._status = status
        self._idle = IdleSessions(reactor, self._close)
        self._returns = Returns(reactor)
        self._busy: dict[GuardedConnection, PooledSession] = {}
        self._opening = 0  # the number of logins in progress
        self._make_room: Callable[[], bool] = lambda: False
        self._stopped = False

    @property
    def target(self) -> Target:
        """Return the target where sessions are opened now."""
        return self._target

    @property
    def resolve(self) -> Resolve:
        """Return the name look-ups, for other parts of the service."""
        return self._resolver.resolve

    @property
    def connector(self) -> Connector:
        """Return the connector, for sessions opened elsewhere.

        It knows the addresses that answer.
        """
        return self._connector

    def make_room_by(self, make_room: Callable[[], bool]) -> None:
        """Call `make_room` if the server has no connection left.

        It returns whether it gave up a connection.
        """
        self._make_room = make_room

    def configure(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions with these settings from now on.

        Sessions of another target end now, or after their current use.
        """
        if target != self._target:
            self.end_kept()
        self._target = target
        self._connect_timeout_s = connect_timeout_s

    def stop(self) -> None:
        """End the name look-ups and the kept sessions.

        The other sessions end with the reads that hold them.
        """
        self._stopped = True
        self.end_kept()
        self._resolver.stop()

    def use(self, purpose: str, deadline_at: float, use: Use[T], *, again_in_s: float | None = None) -> Deferred[T]:
        """Call `use` with a session, and keep the session if its next use is near.

        A kept session is used if there is one. If it turns out to be lost, that is not a failure: `use` is called again
        with a new session, so it must not keep results of its first call.

        :param again_in_s: seconds until `purpose` will use a session again; 0 for any moment, None for never.
        """
        if again_in_s is not None:
            self._idle.plan(purpose, again_in_s)
        kept = self._idle.take()
        if kept is None:
            return self._use_new(purpose, deadline_at, use)
        kept.guard.renew(deadline_at)
        d = self._use(kept, use)
        d.addErrback(self._again_if_lost, purpose, deadline_at, use)
        return d

    async def commit(self, guard: GuardedConnection, backend_pid: int, ask: str = "") -> Cursor | None:
        """End the transaction, and prepare the session for its next use.

        :param backend_pid: the server process of the transaction. If it differs from the session's own, it belongs to a
            proxy, whose server session goes to its next client and must not be changed.
        :param ask: a query to run afterwards, as the role of the transaction.
        :returns: its answer; None without a query.
        """
        pooled = self._busy[guard]
        if backend_pid != guard.pid:
            pooled.note_room(True)  # the proxy's limits apply, not the role's
            # Both statements are one transaction of their own: another client may have left another role.
            end = "COMMIT; SET LOCAL role TO DEFAULT" if ask else "COMMIT"
        elif pooled.has_room is not None:
            end = _RESET
        else:
            cursor = await guard.execute(_RESET + _ROOM)
            pooled.note_room(all(has_room(limit, used) for limit, used in cursor.fetchall()))
            return await guard.execute(ask) if ask else None
        answer = await guard.execute(f"{end}; {ask}" if ask else end)
        return answer if ask else None

    def _use_new(self, purpose: str, deadline_at: float, use: Use[T]) -> Deferred[T]:
        return Deferred.fromCoroutine(self._opened(purpose, deadline_at)).addCallback(self._use, use)

    def _use(self, pooled: PooledSession, use: Use[T]) -> Deferred[T]:
        self._busy[pooled.guard] = pooled
        d: Deferred[T] = Deferred.fromCoroutine(_used(use, pooled.guard))
        d.addBoth(self._keep_or_close, pooled)
        return d

    async def _opened(self, purpose: str, deadline_at: float) -> PooledSession:
        """Return a new session, or a returned one if no connection is left."""
        room_by, may_wait_for_logins, waits_s = -math.inf, True, iter(_COLLISION_WAITS_S)
        while True:
            try:
                return await self._open(purpose, deadline_at)
            except NoSessionLeft:
                now = self._reactor.seconds()
                if self._busy:
                    back = await self._one_comes_back((now + deadline_at) / 2)
                    if not back and not self._make_room() and not await self._one_comes_back(deadline_at):
                        raise
                    room_by = self._reactor.seconds() + _ROOM_COMES_WITHIN_S
                elif now < min(room_by, deadline_at):
                    await pause(self._reactor, _ROOM_POLL_S)
                elif self._make_room():
                    room_by = now + _ROOM_COMES_WITHIN_S
                elif self._opening and may_wait_for_logins:
                    # A login of ours may have the last connection, before its session is in use.
                    room_by, may_wait_for_logins = now + _ROOM_COMES_WITHIN_S, False
                elif (wait_s := next(waits_s, math.inf)) < deadline_at - now:
                    await pause(self._reactor, wait_s)
                else:
                    raise
            kept = self._idle.take()
            if kept is not None:
                kept.guard.renew(deadline_at)
                return kept

    async def _open(self, purpose: str, deadline_at: float) -> PooledSession:
        target = self._target
        guard = GuardedConnection(self._reactor, target, deadline_at)
        self._status.session_opened()
        self._opening += 1
        try:
            await guard.connect(self._connector, purpose, self._connect_timeout_s, KEEPALIVES)
        except BaseException:
            self._close(guard)
            raise
        finally:
            self._opening -= 1
        return PooledSession(guard, target, self._reactor.seconds())

    async def _one_comes_back(self, until: float) -> bool:
        """Wait until a session of ours is returned.

        False if no session is in use, or none is returned in time.
        """
        return bool(self._busy) and await self._returns.wait(until)

    def _keep_or_close(self, result: T | Failure, pooled: PooledSession) -> T | Failure:
        del self._busy[pooled.guard]
        if not isinstance(result, Failure) and self._is_wanted(pooled):
            self._idle.add(pooled)
        else:
            self._close(pooled.guard)
        self._returns.returned()
        return result

    def _is_wanted(self, pooled: PooledSession) -> bool:
        if self._stopped or pooled.target != self._target or not self._idle.is_young(pooled):
            return False
        # A use waits for the session, or the role has room for an idle session and a use is near.
        return bool(self._returns) or (bool(pooled.has_room) and self._idle.is_use_near())

    def end_kept(self) -> None:
        """End the kept sessions; none is kept until the next use."""
        self._idle.end()

    def _close(self, guard: GuardedConnection) -> None:
        self._status.session_closed()
        guard.close_and_passthrough(None)

    def _again_if_lost(self, failure: Failure, purpose: str, deadline_at: float, use: Use[T]) -> Deferred[T] | Failure:
        if not failure.check(DatabaseUnavailable) or failure.check(DeadlineExceeded):
            return failure
        let_go(failure.value)
        return self._use_new(purpose, deadline_at, use)


async def _used(use: Use[T], guard: GuardedConnection) -> T:
    return await use(guard)
