"""Links between two ends in one process, with and without a socket."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from cacheservice.replication.link import Link
from tests.kit.clocks import started_clock
from tests.kit.logs import Log


class _Wire:
    """The transport of one end: keeps what is written until it is delivered."""

    def __init__(self) -> None:
        self.unsent = bytearray()
        self.producer: Any = None
        self.is_paused = False
        self.is_closed = False
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.unsent += data
        if self.producer is not None and not self.is_paused and len(self.unsent) > 1 << 16:
            self.is_paused = True
            self.producer.pauseProducing()

    def registerProducer(self, producer: object, streaming: bool) -> None:
        assert streaming
        assert IPushProducer.providedBy(producer)
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def loseConnection(self) -> None:
        self.is_closed = True

    def abortConnection(self) -> None:
        self.is_closed = self.is_aborted = True

    def take(self) -> bytes:
        """Return what was written, as a socket sends it."""
        data = bytes(self.unsent)
        self.unsent.clear()
        if self.is_paused and self.producer is not None:
            self.is_paused = False
            self.producer.resumeProducing()
        return data


class LinkPair:
    """Two links whose bytes `deliver` moves. Their clock stands still until a test moves it."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = started_clock() if clock is None else clock
        self.log = Log()
        self.frames: list[bytes] = []
        self.lost: list[tuple[str, str]] = []
        self.wires = _Wire(), _Wire()
        self.main = Link(self.clock, self.log, on_lost=lambda reason: self.lost.append(("main", reason)))
        self.worker = Link(
            self.clock, self.log, self.frames.append, on_lost=lambda reason: self.lost.append(("worker", reason))
        )
        self.is_open = True
        self._connect(self.main, self.wires[0])
        self._connect(self.worker, self.wires[1])

    def join(self, main: Link) -> None:
        """Use `main` as the end of the main process from now on."""
        self.main = main
        self._connect(main, self.wires[0])

    def _connect(self, link: Link, wire: _Wire) -> None:
        link.makeConnection(wire)  # type: ignore[arg-type]

    @property
    def ends(self) -> tuple[Link, Link]:
        return self.main, self.worker

    def deliver(self) -> None:
        """Move all bytes until none is left, and report closed connections."""
        while any(wire.unsent for wire in self.wires):
            for link, wire in zip(self.ends[::-1], self.wires, strict=True):
                data = wire.take()
                if self.is_open and data:
                    link.dataReceived(data)
        if any(wire.is_closed for wire in self.wires):
            self.cut()

    def cut(self) -> None:
        """End the connection, as the end of one of the processes does."""
        if self.is_open:
            self.is_open = False
            for link in self.ends:
                link.connectionLost(Failure(connectionDone.value))
