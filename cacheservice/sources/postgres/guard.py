"""One PostgreSQL session with one deadline, which never blocks and leaks nothing.

txpostgres alone is not enough (all measured): cancelling a query there ends in libpq's synchronous cancel, which has no
time limit; a connect that hangs cannot be timed out; a broken connection keeps its descriptor. Therefore this module
never cancels. It aborts: it removes the descriptors from the reactor, closes them, and fails every wait at once. The
server notices within a second (client_connection_check_interval).
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import psycopg2
from psycopg2 import extensions
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.python.failure import Failure
from txpostgres import txpostgres

from cacheservice.base.errors import DatabaseUnavailable, DeadlineExceeded, ServerTooOld
from cacheservice.base.interfaces import Cursor, Reactor
from cacheservice.sources.postgres.connector import AnySession, Connector, Session
from cacheservice.sources.postgres.oldest import too_old
from cacheservice.sources.postgres.target import Target
from cacheservice.sources.postgres.translate import translate
from cacheservice.sources.postgres.waits import Ear, Notification, Readable

T = TypeVar("T")

_OTHER_TEXT = extensions.new_type((18, 19, 1042, 1043), "OTHER_TEXT", extensions.UNICODE)
"""char, name, bpchar, varchar. BYTES itself covers these and text. A type made from BYTES with `new_type` would decode
each value first, which costs as much again and fails for bytes that are not UTF-8."""


# A connection that dies without a FIN is detected while idle (keepalives) and while sending (tcp_user_timeout).
KEEPALIVES: Mapping[str, object] = MappingProxyType(
    {
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }
)
_LAST_SHARE = 0.05
_LAST_MOST_S = 0.25
"""The search for an address ends this long before its own limit, so that its error can name every address tried."""


class ReplicationMessage(Protocol):
    """A message of logical replication."""

    payload: bytes


class _ReplicationCursor(Protocol):
    """The driver's cursor of a session that streams."""

    wal_end: int

    def read_message(self) -> ReplicationMessage | None:
        """Return the next message that has arrived; None if there is none."""

    def send_feedback(self, *, flush_lsn: int = 0, reply: bool = False, force: bool = False) -> None:
        """Report what is not needed any more, and ask for a keepalive."""


class Replication:
    """The stream of a session, after START_REPLICATION.

    :param ended: returns why the session has ended, None if it has not.
    """

    def __init__(self, cursor: _ReplicationCursor, target: Target, ended: Callable[[], Exception | None]) -> None:
        self._cursor = cursor
        self._read = cursor.read_message  # looked up once, because it is called for each changed row
        self._target = target
        self._ended = ended

    @property
    def wal_end(self) -> int:
        """How far the server has decoded the log, by the last message or keepalive that was read."""
        return self._cursor.wal_end

    def message(self) -> ReplicationMessage | None:
        """Return the next message that has arrived; None if there is none.

        :raises RefreshFailed: if the session is lost.
        """
        if (ended := self._ended()) is not None:
            raise ended
        try:
            return self._read()
        except psycopg2.Error as error:
            raise translate(error, self._target) from error

    def feedback(self, flush_lsn: int, *, reply: bool) -> None:
        """Report what is not needed any more, and ask for a keepalive with `reply`. A loss is found by `message`."""
        if self._ended() is None:
            with suppress(psycopg2.Error):
                self._cursor.send_feedback(flush_lsn=flush_lsn, reply=reply, force=True)


class _Cursor(txpostgres.Cursor):  # type: ignore[misc]  # txpostgres has no types
    def _handleCancellation(self, failure: Failure) -> Failure:
        return failure  # the stock class replaces the server's message by a bare CancelledError


class _Connection(txpostgres.Connection):  # type: ignore[misc]
    """Is in the reactor only while libpq waits.

    libpq may close its socket in any call. A descriptor that is still in the reactor then would be taken for the next
    socket that is opened with the same number, perhaps a client's. The stock class stays in the reactor between
    statements, for notifications, and while it connects. Here the loss of a session between two statements is reported
    by the next statement.
    """

    cursorFactory = _Cursor

    def connectionFactory(self, session: AnySession, **_: Any) -> AnySession:
        """Return the session, which `Handshake` has already logged in."""
        return session

    def continuePolling(self, swallowErrors: bool = False) -> None:
        super().continuePolling(swallowErrors=True)

    def doRead(self) -> None:
        txpostgres._PollingMixin.doRead(self)

    def cursorFinished(self, cursor: _Cursor) -> None:
        self._cursors.remove(cursor)


class GuardedConnection:
    """A session that ends at its deadline, when closed, or when a wait is cancelled.

    The creator closes it: ``d.addBoth(guard.close_and_passthrough)``.

    :param reactor: its clock must be monotonic.
    :param deadline_at: on the reactor's clock, in seconds.
    """

    def __init__(self, reactor: Reactor, target: Target, deadline_at: float) -> None:
        self._reactor = reactor
        self._target = target
        self._deadline_at = deadline_at
        self._began_at: float = reactor.seconds()
        self._connection = _Connection(reactor)
        self._cursor: _Cursor | None = None
        self._ear: Ear | Readable | None = None
        self._opening: Deferred[AnySession] | None = None
        self._pending: Deferred[Any] | None = None
        self._ended: Exception | None = None
        self._on_end: Callable[[], None] | None = None
        self._phase = "did not accept a session"
        self._timer = reactor.callLater(max(0.0, deadline_at - self._began_at), self._expire)

    def remaining_s(self) -> float:
        """Return the seconds to the deadline, never negative."""
        now: float = self._reactor.seconds()
        return max(0.0, self._deadline_at - now)

    def renew(self, deadline_at: float) -> None:
        """Set another deadline, on the reactor's clock.

        A session that has ended stays ended.
        """
        self._on_end = None
        self._deadline_at = deadline_at
        self._began_at = self._reactor.seconds()
        if self._timer.active():
            self._timer.reset(self.remaining_s())

    async def connect(
        self,
        connector: Connector,
        purpose: str,
        timeout_s: float,
        defaults: Mapping[str, object] = MappingProxyType({}),
        factory: type[AnySession] = Session,
    ) -> None:
        """Open the session within `timeout_s` and the deadline, name look-ups included.

        :param defaults: libpq's parameters that apply if the connection string does not set them.
        :param factory: the kind of session.
        :raises DatabaseUnavailable: if no session can be opened, or its server is too old.
        """
        limit_s = min(timeout_s, self.remaining_s())
        self._timer.reset(limit_s)
        by = self._reactor.seconds() + limit_s - min(limit_s * _LAST_SHARE, _LAST_MOST_S)

        def opening() -> Deferred[AnySession]:
            self._opening = connector.open(self._target, purpose, by, defaults, factory)
            return self._opening

        try:
            session = await self._wait(opening)
        except DatabaseUnavailable as error:
            self.abort(error)
            raise
        self._opening = None
        await self._wait(lambda: self._connection.connect(session), connecting=True)
        self._reactor.removeReader(self._connection)
        if (refusal := too_old(self.server_version)) is not None:
            self.abort(ServerTooOld(refusal))
            raise ServerTooOld(refusal)
        for type_of_text in (extensions.BYTES, _OTHER_TEXT):
            extensions.register_type(type_of_text, self._connection.pollable())
        self._phase = "did not answer"
        self._timer.reset(self.remaining_s())

    def on_end(self, ended: Callable[[], None]) -> None:
        """Call `ended` if the session reaches its deadline while idle.

        That applies until the next `renew`.
        """
        self._on_end = ended

    @property
    def pid(self) -> int:
        """Return the id of the server process, as reported when the session opened."""
        number: int = self._connection.pollable().get_backend_pid()
        return number

    @property
    def server_version(self) -> int:
        """Return the server's version as reported when the session opened, e.g. 170004."""
        number: int = self._connection.pollable().server_version
        return number

    def parameter(self, name: str) -> str:
        """Return a parameter that the server reports, e.g. its server_encoding.

        Empty if it does not report the parameter.
        """
        return self._connection.pollable().get_parameter_status(name) or ""

    def is_quiet(self) -> bool:
        """Return whether the session is open and silent since its last answer.

        The kernel is asked, not the server. Data that arrives between two statements is the end of the session, or the
        reason why the server ended it.
        """
        if self._ended is not None or self._connection.pollable().closed:
            return False
        socket_state = select.poll()
        socket_state.register(self._connection.pollable().fileno(), select.POLLIN | select.POLLRDHUP)
        return not socket_state.poll(0)

    def execute(self, sql: str) -> Deferred[Cursor]:
        """Send one statement; fires with its cursor once the whole answer has arrived.

        Only one statement may run at a time. text columns come as bytes.

        :raises RefreshFailed: one of its subclasses, for any failure of the server or the network.
        """

        def start() -> Deferred[Cursor]:
            self._cursor = self._connection.cursor()
            return self._cursor.execute(sql)  # type: ignore[no-any-return]

        return self._wait(start)

    def notifications(self, until: float) -> Deferred[list[Notification]]:
        """Wait for notifications; fires with up to 1000 in their order.

        Each has its `channel` and its `payload`. The list is empty at the moment `until` on the reactor's clock, or
        after `wake`. The session's deadline still applies.

        :raises DatabaseUnavailable: when the session is lost.
        """

        def start() -> Deferred[list[Notification]]:
            self._ear = Ear(self._reactor, self._connection.pollable(), until)
            return self._ear.heard

        return self._wait(start)

    async def start_replication(self, sql: str) -> Replication:
        """Send START_REPLICATION; return the stream. Afterwards the session runs no statements.

        :raises RefreshFailed: one of its subclasses, for any failure of the server or the network.
        """

        def start() -> Deferred[_ReplicationCursor]:
            self._cursor = self._connection.cursor()
            return self._cursor._doit("start_replication_expert", sql, decode=False)  # type: ignore[no-any-return]

        return Replication(await self._wait(start), self._target, lambda: self._ended)

    def readable(self, until: float) -> Deferred[None]:
        """Wait until something arrives, until `wake`, or until a moment of the reactor's clock.

        :raises DatabaseUnavailable: when the session is lost.
        """

        def start() -> Deferred[None]:
            self._ear = Readable(self._reactor, self._connection.pollable(), until)
            return self._ear.heard

        return self._wait(start)

    def wake(self) -> None:
        """End a wait for notifications, or for messages, now, if there is one."""
        if self._ear is not None:
            self._ear.wake()

    def abort(self, reason: Exception) -> None:
        """End the session now.

        The current wait and all later ones fail with `reason`.
        """
        if self._ended is None:
            self._ended = reason
        pending, self._pending = self._pending, None
        self._release()
        if pending is not None:
            pending.errback(self._ended)

    def close_and_passthrough(self, result: T) -> T:
        """End the session; for `addBoth`.

        The result of a running statement is no longer awaited, so the statement is abandoned.
        """
        self._pending = None
        self.abort(DatabaseUnavailable("the session was closed"))
        return result

    def _wait(self, start: Callable[[], Deferred[T]], *, connecting: bool = False) -> Deferred[T]:
        """Return the result of `start`, or the end of the session if that comes first."""
        if self._ended is not None:
            return fail(self._ended)
        assert self._pending is None, "one statement at a time"
        pending: Deferred[T] = Deferred(lambda _: self.abort(CancelledError()))
        self._pending = pending

        def settle(result: T | Failure) -> None:
            if self._pending is not pending:
                return  # ended meanwhile, and the wait has already failed
            self._pending = None
            if not isinstance(result, Failure):
                pending.callback(result)
            elif isinstance(result.value, psycopg2.Error):
                ours = translate(result.value, self._target, connecting=connecting)
                ours.__cause__ = result.value
                pending.errback(ours)
            else:
                pending.errback(result)

        try:
            started = start()
        except Exception:
            # psycopg2 raises here if it already knows that the session is lost.
            started = fail()
        started.addBoth(settle)
        return pending

    def _expire(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()
        waited_s = self._reactor.seconds() - self._began_at
        self.abort(DeadlineExceeded(f"PostgreSQL {self._phase} within {waited_s:.3g} s"))

    def _release(self) -> None:
        """Release the timer, the reactor's readers and writers, and the descriptor.

        May be called twice.
        """
        if self._timer.active():
            self._timer.cancel()
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
        raw = self._connection.pollable()
        if raw is None:
            return  # never connected
        if self._ear is not None:
            self._ear.stop()
        for selectable in (self._connection, self._cursor):
            if selectable is not None:
                self._reactor.removeReader(selectable)
                self._reactor.removeWriter(selectable)
        # Only the raw close ends a broken connection (closed == 2); the stock one leaks it.
        raw.close()
