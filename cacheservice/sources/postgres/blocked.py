"""Runs statements that take locks, and finds the sessions that block them."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from cacheservice.base.errors import Blocker, CacheServiceError, LockTimeout
from cacheservice.base.interfaces import Cursor, Reactor
from cacheservice.sources.postgres.blockers import find_blockers
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.sessions import Sessions

_ASK_SHARE = 0.75
"""Blockers are asked for before the wait for a lock ends; afterwards the server no longer knows them."""
_ASK_TIMEOUT_S = 5.0


class BlockedStatements:
    """Executes statements, and adds the blocking sessions to the error of a lock timeout."""

    def __init__(self, reactor: Reactor, sessions: Sessions) -> None:
        self._reactor = reactor
        self._sessions = sessions

    async def execute(self, guard: GuardedConnection, sql: str, name: str, pid: int, deadline_at: float) -> Cursor:
        """Execute a statement; if it waits for most of its time, ask which sessions block it.

        :param name: of the dataset or group, for the application_name of the session that asks.
        :param pid: the server process that runs the statement.
        :raises LockTimeout: with the blocking sessions, if they were found.
        """
        asked: list[Deferred[tuple[Blocker, ...]]] = []
        ask_timer = self._reactor.callLater(
            guard.remaining_s() * _ASK_SHARE, lambda: asked.append(self._ask(name, pid, deadline_at))
        )
        try:
            return await guard.execute(sql)
        except LockTimeout as error:
            blockers = await asked.pop() if asked else ()
            raise LockTimeout(str(error), error.sqlstate, blockers) from error
        finally:
            if ask_timer.active():
                ask_timer.cancel()
            for d in asked:
                d.cancel()

    def _ask(self, name: str, pid: int, deadline_at: float) -> Deferred[tuple[Blocker, ...]]:
        ask_by = min(deadline_at, self._reactor.seconds() + _ASK_TIMEOUT_S)
        d: Deferred[tuple[Blocker, ...]] = self._sessions.use(
            f"{name} (who blocks it)", ask_by, lambda guard: find_blockers(guard, pid)
        )

        def none_found(failure: Failure) -> tuple[Blocker, ...]:
            # Only the failure of the refresh is reported; a failure to find blockers is not a second one.
            failure.trap(CacheServiceError, CancelledError)
            return ()

        return d.addErrback(none_found)
