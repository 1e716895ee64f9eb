"""Opens the sessions of the listener, and ends them when refreshes need their connections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from cacheservice.base.errors import NoSessionLeft
from cacheservice.base.interfaces import Reactor
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.sources.postgres.connector import AnySession, Connector, Session
from cacheservice.sources.postgres.guard import KEEPALIVES, GuardedConnection
from cacheservice.sources.postgres.target import Target


@dataclass(frozen=True, slots=True)
class Access:
    """How sessions are opened.

    :param connector: ``cacheservice.sources.postgres.database.Database.connector``.
    :param connect_timeout_s: for one session to open, name look-ups included.
    """

    target: Target
    connector: Connector
    connect_timeout_s: float


class ListenerSessions:
    """The sessions of the listener, from the start of their login to their end.

    :param status: counts the open sessions.
    :param answer_within_s: for the first statement of a new session.
    """

    def __init__(self, reactor: Reactor, access: Access, status: DatabaseStatus, answer_within_s: float) -> None:
        self._reactor = reactor
        self._access = access
        self._status = status
        self._answer_within_s = answer_within_s
        self._guards: list[GuardedConnection] = []

    @property
    def connect_timeout_s(self) -> float:
        """Return the time within which a session opens, or fails."""
        return self._access.connect_timeout_s

    def configure(self, target: Target, connect_timeout_s: float) -> bool:
        """Open sessions with these settings from now on; return whether the database is another one."""
        moved = target != self._access.target
        self._access = replace(self._access, target=target, connect_timeout_s=connect_timeout_s)
        return moved

    async def use(
        self,
        purpose: str,
        use: Callable[[GuardedConnection], Awaitable[object]],
        factory: type[AnySession] = Session,
    ) -> None:
        """Open a session, call `use` with it, and close it.

        :param factory: the kind of session.
        :raises RefreshFailed: if it cannot be opened, or is lost.
        """
        access = self._access
        guard = GuardedConnection(self._reactor, access.target, self._reactor.seconds() + access.connect_timeout_s)
        self._status.session_opened()
        self._guards.append(guard)
        try:
            await guard.connect(access.connector, purpose, access.connect_timeout_s, KEEPALIVES, factory)
            guard.renew(self._reactor.seconds() + self._answer_within_s)
            await use(guard)
        finally:
            guard.close_and_passthrough(None)
            self._status.session_closed()
            self._guards.remove(guard)

    def give_up(self) -> bool:
        """End the sessions, because a refresh needs a connection; return False if there was none to end.

        A session that is still logging in holds a connection, too.
        """
        guards = list(self._guards)
        for guard in guards:
            guard.abort(NoSessionLeft("a refresh needed the connection"))
        return bool(guards)
