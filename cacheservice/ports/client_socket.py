"""The socket of a client: admission, limits of time, output with back-pressure, and the end.

It is the lower half of `cacheservice.ports.connection`, which describes the phases.
"""

from __future__ import annotations

import enum
import socket
from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from twisted.internet import protocol
from twisted.internet.interfaces import IPullProducer
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.base.interfaces import DelayedCall
from cacheservice.base.timers import is_active
from cacheservice.ports.admission import RESERVE_S
from cacheservice.ports.clients import ClientFactory

LINGER_S = 2.0
"""The time that a client has to close the connection after the last reply. If the service closed first with unread
input, it would send a reset that overtakes the reply (RFC 1122, 4.2.2.13; RFC 9112, 9.6)."""


class Phase(enum.Enum):
    """The state of a connection; see `cacheservice.ports.connection`."""

    READING = enum.auto()
    YIELDED = enum.auto()
    WAITING = enum.auto()
    STREAMING = enum.auto()
    FINISHING = enum.auto()
    LINGERING = enum.auto()
    CLOSED = enum.auto()


READING, YIELDED, WAITING, STREAMING, FINISHING, LINGERING, CLOSED = Phase
"""The phases as globals of this module: a look-up in the class would take longer than the comparison."""
ENDING = (FINISHING, LINGERING, CLOSED)
"""The phases in which there are no more replies, and input is ignored."""


class Address(Protocol):
    """An address of Twisted; that of a TCP connection is an `IpAddress`."""


@runtime_checkable
class IpAddress(Protocol):
    """The address and the port of one end of a TCP connection."""

    host: str
    port: int


class Transport(Protocol):
    """A TCP or unix-socket connection of Twisted.

    A wrapper, such as one for TLS, does not fit: output is written directly to `socket`.
    """

    socket: socket.socket

    def write(self, data: bytes, /) -> object: ...

    def setTcpNoDelay(self, enabled: bool, /) -> object: ...

    def pauseProducing(self) -> object: ...

    def resumeProducing(self) -> object: ...

    def registerProducer(self, producer: object, streaming: bool, /) -> object: ...

    def unregisterProducer(self) -> object: ...

    def loseConnection(self) -> object: ...

    def loseWriteConnection(self) -> object: ...

    def abortConnection(self) -> object: ...

    def getPeer(self) -> Address: ...

    def getHost(self) -> Address: ...


def shown(address: Address) -> str:
    """Return an address as HOST:PORT, empty for a unix socket."""
    return f"{address.host}:{address.port}" if isinstance(address, IpAddress) else ""


@implementer(IPullProducer)
class ClientSocket(protocol.Protocol, ABC):
    """The socket of one client.

    Output is written directly to the socket while it accepts everything, because the transport's own path costs a turn
    of the reactor and two calls of epoll for each reply (measured: `benchmarks.resp`, `benchmarks.http`).
    """

    transport: Transport  # type: ignore[assignment]  # Twisted declares less than its transports have
    factory: ClientFactory[Any]
    _log = Logger()

    # Class attributes until they change: attributes of each instance would cost memory for ten thousand idle clients.
    phase = READING
    is_choked = False
    input_ended = False
    is_admitted = True
    heard_at = 0.0
    _timer: DelayedCall | None = None

    # The beginning

    def connectionMade(self) -> None:
        factory = self.factory
        factory.clients.add(self)
        if not factory.door.admit(self, factory.max_connections):
            self.is_admitted = False
        self.restart_limit()

    @abstractmethod
    def turn_away(self) -> None:
        """Report that there are too many connections, and close at once."""

    def note_refusal(self) -> None:
        """Count and log that this client was refused because there are too many."""
        factory = self.factory
        factory.rejected["too_many_connections"] += 1
        factory.door.note_refusal(factory.max_connections)

    # Time

    def patience_s(self) -> float:
        """Return the seconds that may pass after `heard_at` in the present state; infinite for no limit."""
        if self.phase is LINGERING:
            return LINGER_S
        return self.factory.idle_timeout_s if self.is_admitted else RESERVE_S

    def timed_out(self) -> None:
        """Act on the end of the client's patience. The default aborts the connection, or ends its lingering."""
        if self.phase is LINGERING:
            # The client may still be reading what the kernel has taken. An abort would discard that.
            self.transport.loseConnection()
            return
        self.factory.rejected["slow_client"] += self.is_choked
        self.abort()

    def restart_limit(self) -> None:
        """Count the client's patience from now. Must be called when it has become shorter.

        The timer is reused: to cancel and create one each time would cost more than a comparison.
        """
        clock = self.factory.clock
        self.heard_at = now = clock.seconds()
        limit_s = min(self.patience_s(), self.factory.idle_timeout_s)
        if self._timer is None:
            self._timer = clock.callLater(limit_s, self._check_time)
        elif self._timer.getTime() > now + limit_s:
            self._timer.reset(limit_s)

    def _check_time(self) -> None:
        self._timer = None
        left_s = self.heard_at + self.patience_s() - self.factory.clock.seconds()
        if left_s <= 0:
            self.timed_out()
        else:
            # The timer runs without a limit, too: the next phase may have one.
            self._timer = self.factory.clock.callLater(min(left_s, self.factory.idle_timeout_s), self._check_time)

    # Output

    def send(self, data: bytes) -> None:
        """Send `data`, directly if the socket accepts it."""
        if not self.is_choked:
            try:
                sent = self.transport.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.abort()
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._queue(data)

    def _queue(self, data: bytes) -> None:
        self.transport.write(data)
        if not self.is_choked and self.phase not in ENDING:
            self.transport.pauseProducing()
            # This calls `resumeProducing` at once, which ignores the call because the client is not choked yet.
            self.transport.registerProducer(self, False)
            self.is_choked = True
            # A client may have been silent for longer than the time that it has to read.
            self.restart_limit()

    def resumeProducing(self) -> None:
        """Continue, because the transport's queue is empty."""
        if self.is_choked:
            self.transport.unregisterProducer()
            self.is_choked = False
            self.heard_at = self.factory.clock.seconds()
            self.drained()

    @abstractmethod
    def drained(self) -> None:
        """Continue after the client has read all output."""

    def read_on(self) -> None:
        """Read input again, if the client has read all output and has not closed its side."""
        if not (self.is_choked or self.input_ended):
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Do nothing: the connection has gone, and connectionLost follows."""

    # The end

    def finish(self, *, linger: bool = True) -> None:
        """Send no more replies; close when all output has been sent. An end that has begun continues.

        :param linger: whether the client has to close first, within `LINGER_S`. One that has closed its side need not.
        """
        if self.phase in ENDING:
            return
        self.phase = FINISHING
        if self.is_choked:
            # The transport does not close while it has a producer.
            self.transport.unregisterProducer()
        if linger and not self.input_ended:
            self.restart_limit()
            self.transport.loseWriteConnection()
            self.transport.resumeProducing()
        else:
            self.transport.loseConnection()

    def close_now(self) -> None:
        """Close the connection because the port stops. The default aborts it."""
        self.abort()

    def abort(self) -> None:
        """Close the connection at once. Output that has not been sent is lost."""
        if self.phase is not CLOSED:
            self.phase = FINISHING
            self.transport.abortConnection()

    def drop_slow(self) -> str:
        """Abort a reply that is too slow and keeps superseded data in memory; return the client's address."""
        self.factory.rejected["slow_client"] += 1
        address = shown(self.transport.getPeer())
        self.abort()
        return address

    def writeConnectionLost(self) -> None:
        """Wait for the client to close, because all output has been sent."""
        self.phase = LINGERING
        self.is_choked = False
        self.restart_limit()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.phase = CLOSED
        self.factory.clients.discard(self)
        self.factory.door.left(self, was_admitted=self.is_admitted)
        if is_active(self._timer):
            self._timer.cancel()
        self._timer = None
