"""The bytes that a link has still to send, with back-pressure for their sender."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from cacheservice.base.errors import CacheServiceError

ENOUGH_UNSENT_BYTES = 1 << 20
"""The number of unsent bytes from which on a sender has to wait."""
_PIECE_BYTES = 1 << 16


class LinkLost(CacheServiceError):
    """The connection to the other process ended before it answered."""


class Transport(Protocol):
    """The methods of a stream connection of Twisted that a link uses."""

    def write(self, data: bytes, /) -> object: ...

    def registerProducer(self, producer: object, streaming: bool, /) -> object: ...

    def unregisterProducer(self) -> object: ...

    def loseConnection(self) -> object: ...

    def abortConnection(self) -> object: ...


@implementer(IPushProducer)
class Outgoing:
    """Hands bytes to a transport as fast as it sends them, and counts those that wait.

    A transport copies what it keeps each time it sends a part of it, so it gets little at a time.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport: Transport | None = transport
        self._queue: deque[bytes | memoryview] = deque()
        self._queued_bytes = 0
        self._is_paused = False
        self._is_finishing = False
        self._waiting: list[Deferred[None]] = []
        transport.registerProducer(self, True)

    @property
    def unsent_bytes(self) -> int:
        """The bytes that the transport has not taken yet. It keeps up to 128 KiB more itself."""
        return self._queued_bytes

    def write(self, data: bytes) -> None:
        """Send `data` after all that was written before. Once the connection is lost, drop it."""
        if self._transport is None or self._is_finishing:
            return
        if len(data) > _PIECE_BYTES:
            whole = memoryview(data)
            self._queue.extend(whole[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES))
        else:
            self._queue.append(data)
        self._queued_bytes += len(data)
        self._send()

    def wait_until_sent(self) -> Deferred[None]:
        """Fire when less than 1 MiB is unsent.

        :raises LinkLost: if the connection is lost before, or was.
        """
        if self._transport is not None and self.unsent_bytes < ENOUGH_UNSENT_BYTES:
            return succeed(None)
        waiting: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiting)
        if self._transport is None:
            self.lost()
        return waiting

    def finish(self) -> None:
        """Send the rest, then close the connection."""
        self._is_finishing = True
        self._send()

    def lost(self) -> None:
        """Drop everything: the connection is lost."""
        self._transport = None
        self._queue.clear()
        self._queued_bytes = 0
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.errback(LinkLost("the connection to the other process is lost"))

    def pauseProducing(self) -> None:
        self._is_paused = True

    def resumeProducing(self) -> None:
        """Continue: the transport has sent all that it had."""
        self._is_paused = False
        self._send()
        if self.unsent_bytes < ENOUGH_UNSENT_BYTES:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.callback(None)

    def stopProducing(self) -> None:
        """Do nothing: the transport reports the lost connection, too."""

    def _send(self) -> None:
        transport = self._transport
        while self._queue and not self._is_paused and transport is not None:
            piece = self._queue.popleft()
            self._queued_bytes -= len(piece)
            transport.write(bytes(piece))
        if self._is_finishing and not self._queue and transport is not None:
            self._transport = None
            transport.unregisterProducer()
            transport.loseConnection()
