"""One login to one address, computed beside the reactor.

psycopg2 calls PQconnectPoll with the GIL held, and SCRAM with a million iterations computes there for seconds. ctypes
releases the GIL around the same function. Therefore each step of libpq runs in a thread of its own, and the reactor
waits for the socket between two steps. Afterwards psycopg2 finds the session open.

States: WAITING for the socket, in the reactor; COMPUTING in a thread, and only that thread may touch the session; LEFT
while a thread still computes for an abandoned login, which is closed when the thread returns; OVER.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from enum import Enum, auto
from threading import Thread
from typing import Generic, Literal, Protocol, TypeVar

import psycopg2
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.base.interfaces import Reactor

_libpq = ctypes.CDLL(psycopg2._psycopg.__file__)  # the driver's own libpq, found through the driver's library
_libpq.PQconnectPoll.argtypes = [ctypes.c_void_p]
_libpq.PQconnectPoll.restype = ctypes.c_int
_libpq.PQerrorMessage.argtypes = [ctypes.c_void_p]
_libpq.PQerrorMessage.restype = ctypes.c_char_p
_libpq.PQsetErrorVerbosity.argtypes = [ctypes.c_void_p, ctypes.c_int]
_libpq.PQsetErrorVerbosity.restype = ctypes.c_int

_FAILED, _READING, _WRITING = 0, 1, 2
"""PostgresPollingStatusType of libpq-fe.h."""
_DEFAULT, _VERBOSE = 1, 2
"""PGVerbosity of libpq-fe.h. A verbose error contains its SQLSTATE, which the driver drops for a refused login."""


class RawSession(Protocol):
    """A session of the driver that may not be logged in yet."""

    closed: int
    pgconn_ptr: int

    def fileno(self) -> int:
        """Return the descriptor of its socket."""

    def close(self) -> object:
        """Close it."""


S = TypeVar("S", bound=RawSession)


class _State(Enum):
    WAITING = auto()
    COMPUTING = auto()
    LEFT = auto()
    OVER = auto()


@implementer(IReadWriteDescriptor)
class Handshake(Generic[S]):
    """Runs one login; `opened` fires with the driver's session or a `psycopg2.Error`.

    Cancelling `opened` ends the login.

    :param connect: makes an asynchronous session of the driver that has begun to connect.
    """

    def __init__(self, reactor: Reactor, connect: Callable[[], S]) -> None:
        self.opened: Deferred[S] = Deferred(lambda _: self._abandon())
        self._reactor = reactor
        self._state = _State.WAITING
        self._session = connect()
        self._pgconn: int = self._session.pgconn_ptr
        _libpq.PQsetErrorVerbosity(self._pgconn, _VERBOSE)
        reactor.addWriter(self)

    def doRead(self) -> None:
        self._compute()

    def doWrite(self) -> None:
        self._compute()

    def connectionLost(self, reason: Failure) -> None:
        """Let libpq find the cause of the socket's end, which the reactor saw first."""
        if self._state is _State.WAITING:
            self._compute()

    def fileno(self) -> int:
        return -1 if self._session.closed else int(self._session.fileno())

    def logPrefix(self) -> str:
        return "login"

    def _compute(self) -> None:
        self._leave_reactor()  # libpq may close its socket and open another one
        self._state = _State.COMPUTING
        Thread(target=self._step, name="login", daemon=True).start()

    def _step(self) -> None:
        """Run one step of libpq, in the thread."""
        state = _libpq.PQconnectPoll(self._pgconn)
        self._reactor.callFromThread(self._stepped, state)

    def _stepped(self, state: Literal[0, 1, 2, 3]) -> None:
        if self._state is _State.LEFT:
            self._state = _State.OVER
            self._session.close()
            return
        self._state = _State.WAITING
        if state == _READING:
            self._reactor.addReader(self)
        elif state == _WRITING:
            self._reactor.addWriter(self)
        elif state == _FAILED:
            self._state = _State.OVER
            message = _libpq.PQerrorMessage(self._pgconn).decode(errors="replace")
            self._session.close()
            self.opened.errback(psycopg2.OperationalError(message))
        else:
            self._state = _State.OVER
            _libpq.PQsetErrorVerbosity(self._pgconn, _DEFAULT)
            self.opened.callback(self._session)

    def _leave_reactor(self) -> None:
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)

    def _abandon(self) -> None:
        if self._state is _State.COMPUTING:
            self._state = _State.LEFT  # closed by `_stepped`, because the thread is still using it
        elif self._state is _State.WAITING:
            self._state = _State.OVER
            self._leave_reactor()
            self._session.close()


def asynchronous(factory: type[S], arguments: Mapping[str, object]) -> Callable[[], S]:
    """Return the `connect` of a `Handshake`.

    It begins to connect with the driver's `arguments`, and neither waits nor computes.
    """
    return lambda: psycopg2.connect(connection_factory=factory, async_=True, **arguments)
