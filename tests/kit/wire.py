"""The transport of a connection in memory: it accepts as much output as a test lets it."""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure


class WireSocket:
    """The socket of a wire: output is written to it directly."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def send(self, data: bytes) -> int:
        if self._wire.is_broken:
            raise ConnectionResetError
        accepted = self._wire.accept(data)
        if data and not accepted:
            raise BlockingIOError
        return accepted


class Wire:
    """A transport like that of TCP, without a reactor.

    `room_bytes` is how much more output the client accepts, None for any amount; `client_reads` makes more room.
    With `aborts_late`, `connectionLost` follows an abort as late as `abort_arrives`, as in a later turn of a reactor.
    """

    def __init__(self, protocol: Protocol, room_bytes: int | None = None) -> None:
        self.socket = WireSocket(self)
        self.room_bytes = room_bytes
        self.sent = b""
        self.queue = b""
        self.is_reading = True
        self.is_broken = False
        self.is_write_closed = False
        self.aborts_late = False
        self.ended: str | None = None
        self.producer: Any = None
        self._is_closing = self._is_half_closing = False
        self.protocol = protocol
        protocol.makeConnection(self)  # type: ignore[arg-type]  # it has what the connections use

    @property
    def is_open(self) -> bool:
        return self.ended is None

    # What a test does

    def receive(self, data: bytes) -> None:
        """Deliver input, which a paused transport would not read."""
        assert self.is_reading, "the connection reads nothing now"
        self.protocol.dataReceived(data)

    def client_closes_its_side(self) -> None:
        self.protocol.readConnectionLost()  # type: ignore[attr-defined]  # of IHalfCloseableProtocol

    def client_leaves(self) -> None:
        self._end("lost")

    def abort_arrives(self) -> None:
        """Report an abort to the connection, if `aborts_late`."""
        self._lose("aborted")

    def client_reads(self, size_bytes: int | None = None) -> None:
        """Let the client read so much more output; None for all."""
        self.room_bytes = size_bytes
        data, self.queue = self.queue, b""
        self.queue = data[self.accept(data) :]
        if self.queue:
            return
        if self.producer is not None:
            self.producer.resumeProducing()
        self._close_if_sent()

    def take(self) -> bytes:
        """Return what was sent since the last call."""
        sent, self.sent = self.sent, b""
        return sent

    # What the connection does

    def accept(self, data: bytes) -> int:
        accepted = len(data) if self.room_bytes is None else min(len(data), self.room_bytes)
        if self.room_bytes is not None:
            self.room_bytes -= accepted
        self.sent += data[:accepted]
        return accepted

    def write(self, data: bytes) -> None:
        self.queue += data

    def setTcpNoDelay(self, enabled: bool) -> None:
        """Do nothing: nothing is delayed here."""

    def pauseProducing(self) -> None:
        self.is_reading = False

    def resumeProducing(self) -> None:
        self.is_reading = self.ended is None

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert self.producer is None, "there is one already"
        assert not streaming
        self.producer = producer
        producer.resumeProducing()  # as Twisted does

    def unregisterProducer(self) -> None:
        self.producer = None

    def loseConnection(self) -> None:
        self._is_closing = True
        self._close_if_sent()

    def loseWriteConnection(self) -> None:
        self._is_half_closing = True
        self._close_if_sent()

    def abortConnection(self) -> None:
        self._end("aborted")

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.1", 50_000)

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.2", 6379)

    def _close_if_sent(self) -> None:
        if self.queue or self.producer is not None:
            return
        if self._is_closing:
            self._end("closed")
        elif self._is_half_closing and not self.is_write_closed:
            self.is_write_closed = True
            self.protocol.writeConnectionLost()  # type: ignore[attr-defined]  # of IHalfCloseableProtocol

    def _end(self, how: str) -> None:
        if self.ended is None:
            self.ended, self.is_reading, self.queue = how, False, b""
            if not (how == "aborted" and self.aborts_late):
                self._lose(how)

    def _lose(self, how: str) -> None:
        if hasattr(self, "protocol"):
            protocol = self.protocol
            del self.protocol  # as Twisted does
            protocol.connectionLost(Failure(ConnectionLost() if how == "aborted" else ConnectionDone()))
