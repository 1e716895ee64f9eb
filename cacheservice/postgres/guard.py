"""One PostgreSQL session under one deadline, which never blocks and leaves nothing behind.

Why not txpostgres alone (measured, all of it): cancelling a query there ends in libpq's synchronous
cancel, which has no time limit; a connect that hangs cannot be timed out; a broken connection keeps its
descriptor. So this never cancels, it aborts: take the descriptors out of the reactor, close, and answer
whoever waits at once. The server notices within a second (client_connection_check_interval).
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import psycopg2
from psycopg2 import extensions
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from txpostgres import txpostgres
from zope.interface import implementer

from cacheservice.errors import DatabaseUnavailable, DeadlineExceeded, ServerTooOld
from cacheservice.postgres.connector import Connector, Session
from cacheservice.postgres.oldest import too_old
from cacheservice.postgres.target import Target
from cacheservice.postgres.translate import translate

T = TypeVar("T")

_OTHER_TEXT = extensions.new_type((18, 19, 1042, 1043), "OTHER_TEXT", extensions.UNICODE)
"""char, name, bpchar, varchar. BYTES itself is of them and of text. A type made of it with `new_type` would decode each
value first, which costs as much again and fails for bytes that are not UTF-8."""


_NOTIFICATIONS_PER_TURN = 1000

# A path that goes silent without a FIN is noticed while nothing is sent (keepalives) and while something is.
KEEPALIVES: Mapping[str, Any] = MappingProxyType(
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
"""Before its own limit the search for an address ends, so that its error can name all that was tried."""


class _Cursor(txpostgres.Cursor):  # type: ignore[misc]  # txpostgres has no types
    def _handleCancellation(self, failure: Failure) -> Failure:
        return failure  # the stock one replaces the server's message by a bare CancelledError


class _Connection(txpostgres.Connection):  # type: ignore[misc]
    """Is in the reactor only while libpq waits.

    libpq may close its socket in any call: a descriptor still in the reactor then would be taken
    for that of whoever opens the next socket, a client of ours perhaps. The stock class stays in the
    reactor between statements, to hear notifications, and while it connects. Here whoever is lost between
    two statements is told so by the next one.
    """

    cursorFactory = _Cursor

    def connectionFactory(self, session: Session, **_: Any) -> Session:
        """The session that has logged in already: see `Handshake`."""
        return session

    def continuePolling(self, swallowErrors: bool = False) -> None:
        super().continuePolling(swallowErrors=True)

    def doRead(self) -> None:
        txpostgres._PollingMixin.doRead(self)

    def cursorFinished(self, cursor: _Cursor) -> None:
        self._cursors.remove(cursor)


@implementer(IReadDescriptor)
class _Ear:
    """One wait for notifications, between two statements of a session: until some are there, or until a moment.

    In the reactor only while libpq's socket is surely open, as `_Connection` is. `heard` fires in a turn of the
    reactor of its own, so that whoever floods us with notifications never holds it.
    """

    def __init__(self, reactor: Any, session: Session, until: float) -> None:
        self.heard: Deferred[list[Any]] = Deferred()
        self._reactor = reactor
        self._session = session
        self._lost: Failure | None = None
        self._timer = reactor.callLater(max(0.0, until - reactor.seconds()), self._end)
        # What came with the last answer is in libpq's memory; no event of the socket would tell of it.
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
        """Let the wait end now."""
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
        """The reactor saw the socket's end before libpq did."""
        if self._timer.active() and self._lost is None:
            self.doRead()

    def logPrefix(self) -> str:
        return "notifications"


class GuardedConnection:
    """A session that ends at its deadline, when it is closed, or when a wait for it is cancelled.

    Whoever creates one closes it: ``d.addBoth(guard.close_and_passthrough)``.

    :param reactor: its clock must be monotonic.
    :param deadline_at: on the reactor's clock, in seconds.
    """

    def __init__(self, reactor: Any, target: Target, deadline_at: float) -> None:
        self._reactor = reactor
        self._target = target
        self._deadline_at = deadline_at
        self._began_at: float = reactor.seconds()
        self._connection = _Connection(reactor)
        self._cursor: _Cursor | None = None
        self._ear: _Ear | None = None
        self._opening: Deferred[Session] | None = None
        self._pending: Deferred[Any] | None = None
        self._ended: Exception | None = None
        self._on_end: Callable[[], None] | None = None
        self._phase = "did not accept a session"
        self._timer = reactor.callLater(max(0.0, deadline_at - self._began_at), self._expire)

    def remaining_s(self) -> float:
        """Seconds to the deadline, never negative."""
        now: float = self._reactor.seconds()
        return max(0.0, self._deadline_at - now)

    def renew(self, deadline_at: float) -> None:
        """From now on the session ends at this moment, on the reactor's clock; one that has ended stays so."""
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
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Open the session, name look-ups included, within `timeout_s` and the deadline.

        :param defaults: libpq's parameters for where the connection string does not set them.
        :raises DatabaseUnavailable: if there is none to be had, or its server is too old.
        """
        limit_s = min(timeout_s, self.remaining_s())
        self._timer.reset(limit_s)
        by = self._reactor.seconds() + limit_s - min(limit_s * _LAST_SHARE, _LAST_MOST_S)

        def opening() -> Deferred[Session]:
            self._opening = connector.open(self._target, purpose, by, defaults)
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
        """Call `ended` if the session comes to its deadline while nobody waits for it; until the next `renew`."""
        self._on_end = ended

    @property
    def pid(self) -> int:
        """Of the server process, as the server told when the session opened."""
        number: int = self._connection.pollable().get_backend_pid()
        return number

    @property
    def server_version(self) -> int:
        """As the server told when the session opened, e.g. 170004."""
        number: int = self._connection.pollable().server_version
        return number

    def parameter(self, name: str) -> str:
        """What the server reports of itself, e.g. its server_encoding; empty if it does not."""
        return self._connection.pollable().get_parameter_status(name) or ""

    def is_quiet(self) -> bool:
        """Whether the session is open and nothing has arrived since its last answer: asks the kernel, not the server.

        What arrives between two statements is its end, or why the server ended it.
        """
        if self._ended is not None or self._connection.pollable().closed:
            return False
        socket_state = select.poll()
        socket_state.register(self._connection.pollable().fileno(), select.POLLIN | select.POLLRDHUP)
        return not socket_state.poll(0)

    def execute(self, sql: str) -> Deferred[Any]:
        """Send one statement; fires with its cursor once the whole answer is here. One at a time.

        text columns come as bytes.

        :raises RefreshFailed: one of its subclasses, for whatever the server or the network did.
        """

        def start() -> Deferred[Any]:
            self._cursor = self._connection.cursor()
            return self._cursor.execute(sql)  # type: ignore[no-any-return]

        return self._wait(start)

    def notifications(self, until: float) -> Deferred[list[Any]]:
        """Wait for notifications; fires with up to 1000 in their order, each with its `channel` and its `payload`.

        With none at the moment `until` on the reactor's clock, or after `wake`. The session's deadline goes on.

        :raises DatabaseUnavailable: when the session is lost.
        """

        def start() -> Deferred[list[Any]]:
            self._ear = _Ear(self._reactor, self._connection.pollable(), until)
            return self._ear.heard

        return self._wait(start)

    def wake(self) -> None:
        """End a wait for notifications now, if there is one."""
        if self._ear is not None:
            self._ear.wake()

    def abort(self, reason: Exception) -> None:
        """End the session now; whoever waits gets `reason`, and so does whoever asks later."""
        if self._ended is None:
            self._ended = reason
        pending, self._pending = self._pending, None
        self._release()
        if pending is not None:
            pending.errback(self._ended)

    def close_and_passthrough(self, result: T) -> T:
        """End the session; for `addBoth`. Nobody waits by now, so a statement still under way is abandoned."""
        self._pending = None
        self.abort(DatabaseUnavailable("the session was closed"))
        return result

    def _wait(self, start: Callable[[], Deferred[T]], *, connecting: bool = False) -> Deferred[T]:
        """What `start` gives, or why the session was ended, whichever comes first."""
        if self._ended is not None:
            return fail(self._ended)
        assert self._pending is None, "one statement at a time"
        pending: Deferred[T] = Deferred(lambda _: self.abort(CancelledError()))
        self._pending = pending

        def settle(result: T | Failure) -> None:
            if self._pending is not pending:
                return  # ended meanwhile, and whoever waited has been told
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
            # psycopg2 raises here when the session is already known to be lost.
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
        """Give back the timer, the reactor's readers and writers, and the descriptor. May be called twice."""
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
        # The raw close, too, ends a connection that is broken (closed == 2); the stock one leaks it.
        raw.close()
