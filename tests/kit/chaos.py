"""The faulty network: a TCP proxy between the service and the real server, in the reactor of the test.

Faults may be set before or while connections are open. Bytes are counted as the client gets
them, from the server, per connection: from its start, or from when the fault was set if the
connection was open by then. `after=0` strikes open connections at once and new ones when they
have connected.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any, Literal

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import IPullProducer, IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

PIECE_BYTES = 65_536
HELD_LIMIT_BYTES = 1_048_576  # per connection; then the server is not read until some of it went on

Ending = Literal["silence", "reset", "truncate"]


class FaultyNetwork:
    """Listens on 127.0.0.1 at `port`, which stays the same, and connects each client to the target.

    :param host: another address to listen on.
    """

    def __init__(self, target_port: int, target_host: str = "127.0.0.1", host: str = "127.0.0.1") -> None:
        self._host = host
        self.target = TCP4ClientEndpoint(reactor, target_host, target_port)
        self.port = 0
        self.delay_s = 0.0
        self.piece_bytes = PIECE_BYTES
        self.ending: tuple[Ending, int] | None = None
        self.serverless = False
        self.links: set[_Link] = set()
        self.ends: set[_Link | _ServerSide] = set()
        self._listening: Any = None
        self._reserved: socket.socket | None = None
        self._factory = Factory.forProtocol(lambda: _Link(self))
        self._factory.noisy = False

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self.links)

    async def start(self) -> None:
        self.accept()

    async def stop(self) -> None:
        """Close everything; afterwards nothing of it is in the reactor."""
        await self.refuse()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        while self.ends:
            end = next(iter(self.ends))
            end.transport.abortConnection()
            await end.closed

    def accept(self) -> None:
        """Listen, again at the same port after `refuse`."""
        if self._listening is not None:
            return
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        self._listening = reactor.listenTCP(self.port, self._factory, backlog=511, interface=self._host)
        self.port = self._listening.getHost().port

    async def refuse(self) -> None:
        """Refuse new connections; the open ones stay."""
        if self._listening is None:
            return
        listening, self._listening = self._listening, None
        await listening.stopListening()
        # Bound but not listening: refuses, and nobody else can get the port, a client's own end least of all.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((self._host, self.port))

    def delay(self, seconds: float) -> None:
        """Let what the server sends arrive `seconds` later."""
        self.delay_s = seconds

    def slice(self, n: int) -> None:
        """Let what the server sends arrive `n` bytes at a time, each handed to the kernel by itself."""
        self.piece_bytes = n

    def silence(self, after: int = 0) -> None:
        """After `after` bytes swallow all that either side sends, and the server's end of the connection.

        Connections are accepted. One that became silent stays so until its client closes it,
        after `heal` too: it has lost bytes.
        """
        self._end_with("silence", after)

    def reset(self, after: int = 0) -> None:
        """After `after` bytes send the client a RST, and drop the server's side."""
        self._end_with("reset", after)

    def truncate(self, after: int = 0) -> None:
        """After `after` bytes send the client a FIN, swallow what it still sends, and drop the server's side."""
        self._end_with("truncate", after)

    def half_open(self) -> None:
        """Drop the server's side of each connection without a sign to the client; new connections get no server."""
        self.serverless = True
        for link in self.links:
            link.be_silent()
            link.drop_server()

    def heal(self) -> None:
        """No fault any more: held bytes go on at once and connections are accepted."""
        self.delay_s = 0.0
        self.piece_bytes = PIECE_BYTES
        self.ending = None
        self.serverless = False
        for link in self.links:
            link.heal()
        self.accept()

    def _end_with(self, ending: Ending, after: int) -> None:
        self.ending = (ending, after)
        for link in list(self.links):
            link.end_with(ending, after)


@implementer(IPullProducer)
class _Link(Protocol):
    """A client's connection, and through `server` its other half.

    It feeds the client as a pull producer: `resumeProducing` means that the kernel has taken
    all that it got, so that each piece is a write of its own and an ending strikes after
    the bytes before it.
    """

    def __init__(self, network: FaultyNetwork) -> None:
        self.network = network
        self.server: _ServerSide | None = None
        self.connecting: Deferred[Any] | None = None
        self.closed: Deferred[None] = Deferred()
        self.held: deque[tuple[float, memoryview]] = deque()  # when due, what
        self.held_bytes = 0
        self.sent_bytes = 0
        self.ending: tuple[Ending, int] | None = None  # the int: when sent_bytes is this
        self.client_ready = False
        self.silent = False
        self.server_ended = False
        self.timer: Any = None

    # The client's side.

    def connectionMade(self) -> None:
        self.network.links.add(self)
        self.network.ends.add(self)
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, False)
        if self.network.ending is not None:
            self.end_with(*self.network.ending)
        if self.network.serverless:
            self.be_silent()
        if self.silent:
            return
        self.transport.pauseProducing()
        self.connecting = connectProtocol(self.network.target, _ServerSide(self))
        self.connecting.addCallbacks(self.server_connected, self.server_unreachable)

    def dataReceived(self, data: bytes) -> None:
        if self.server is not None and not self.silent:
            self.server.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.network.links.discard(self)
        self.network.ends.discard(self)
        if self.silent or self.server is None:
            self.drop_server()
        else:
            self.server.transport.unregisterProducer()
            self.server.transport.loseConnection()  # after what the client sent last
        self.silent = True
        self.forget_held()
        self.closed.callback(None)

    def resumeProducing(self) -> None:
        self.client_ready = True
        self.pump()

    def stopProducing(self) -> None:
        """The client is gone: `connectionLost` follows."""

    # The server's side.

    def server_connected(self, server: _ServerSide) -> None:
        self.connecting = None
        self.server = server
        self.transport.resumeProducing()

    def server_unreachable(self, failure: Failure) -> None:
        self.connecting = None
        if not failure.check(CancelledError):
            self.transport.abortConnection()

    def server_sent(self, data: bytes) -> None:
        if self.silent:
            return
        self.held.append((reactor.seconds() + self.network.delay_s, memoryview(data)))
        self.held_bytes += len(data)
        if self.held_bytes > HELD_LIMIT_BYTES and self.server is not None:
            self.server.transport.pauseProducing()
        self.pump()

    def server_lost(self) -> None:
        self.server = None
        self.server_ended = True
        self.pump()

    def drop_server(self) -> None:
        if self.connecting is not None:
            self.connecting.cancel()
        if self.server is not None:
            self.server.transport.abortConnection()

    # Faults.

    def end_with(self, ending: Ending, after: int) -> None:
        if after == 0:
            self.strike(ending)
            return
        self.ending = (ending, self.sent_bytes + after)

    def be_silent(self) -> None:
        self.silent = True
        self.forget_held()
        self.transport.resumeProducing()  # both are read, to be swallowed
        if self.server is not None:
            self.server.transport.resumeProducing()

    def heal(self) -> None:
        self.ending = None
        self.held = deque((0.0, data) for _, data in self.held)
        self.pump()

    def forget_held(self) -> None:
        self.held.clear()
        self.held_bytes = 0
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def pump(self) -> None:
        """Send the client its next piece, or its end, if both are due and the kernel took the last one."""
        if self.silent or not self.client_ready:
            return
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        allowed = self.network.piece_bytes
        if self.ending is not None:
            allowed = min(allowed, self.ending[1] - self.sent_bytes)
            if allowed <= 0:
                self.strike(self.ending[0])
                return
        if self.held:
            self.send_held(allowed)
        elif self.server_ended:
            self.silent = True
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def send_held(self, allowed: int) -> None:
        due, data = self.held[0]
        wait_s = due - reactor.seconds()
        if wait_s > 0:
            self.timer = reactor.callLater(wait_s, self.timed)
            return
        piece, rest = data[:allowed], data[allowed:]
        if rest:
            self.held[0] = (due, rest)
        else:
            self.held.popleft()
        self.held_bytes -= len(piece)
        self.sent_bytes += len(piece)
        self.client_ready = False
        self.transport.write(bytes(piece))
        if self.held_bytes <= HELD_LIMIT_BYTES and self.server is not None:
            self.server.transport.resumeProducing()

    def timed(self) -> None:
        self.timer = None
        self.pump()

    def strike(self, ending: Ending) -> None:
        self.be_silent()
        if ending == "reset":
            self.transport.abortConnection()
        elif ending == "truncate":
            self.transport.unregisterProducer()
            self.transport.loseWriteConnection()
            self.drop_server()


@implementer(IPushProducer)
class _ServerSide(Protocol):
    """The server's connection; paused when the server takes no more, it pauses the client."""

    def __init__(self, link: _Link) -> None:
        self.link = link
        self.closed: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.link.network.ends.add(self)
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, True)

    def pauseProducing(self) -> None:
        self.link.transport.pauseProducing()

    def resumeProducing(self) -> None:
        self.link.transport.resumeProducing()

    def stopProducing(self) -> None:
        """The server is gone: `connectionLost` follows. The client may have bytes to come, or hear nothing."""

    def dataReceived(self, data: bytes) -> None:
        self.link.server_sent(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.link.network.ends.discard(self)
        self.link.server_lost()
        self.closed.callback(None)
