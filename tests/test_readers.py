"""Laws of reading the clients of a port in one pass: none of them sees a difference."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.protocol import Protocol, ServerFactory, connectionDone
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from cacheservice.ports.listen import tcp
from tests.kit.descriptors import open_files


class Echo(Protocol):
    transport: Any
    lost: Failure | None = None
    raises = False

    def connectionMade(self) -> None:
        self.factory.clients.append(self)  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        if data == b"end the others":
            for other in self.factory.clients:  # type: ignore[union-attr]
                if other is not self:
                    other.transport.abortConnection()
        if data == b"raise":
            raise ZeroDivisionError
        self.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = reason
        if self.raises:
            raise ZeroDivisionError


def descriptors() -> int:
    """Open sockets and epoll sets; a reactor keeps some others of its own."""
    return sum(target.startswith(("socket:", "anon_inode:[eventpoll]")) for target in open_files())


class ReadersTestCase(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.descriptors = descriptors()
        self.factory = ServerFactory.forProtocol(Echo)  # type: ignore[arg-type]
        self.factory.clients = []  # type: ignore[attr-defined]
        self.port: Any = tcp(reactor, "127.0.0.1", 0, self.factory)()

    async def tearDown(self) -> None:
        await maybeDeferred(self.port.stopListening)
        for client in self.clients:
            client.transport.abortConnection()
        await self.turns()
        self.assertEqual(descriptors(), self.descriptors)

    @property
    def clients(self) -> list[Echo]:
        return self.factory.clients  # type: ignore[attr-defined,no-any-return]

    async def turns(self) -> None:
        await deferLater(reactor, 0.05)  # type: ignore[arg-type]

    async def connect(self) -> socket.socket:
        client = await deferToThread(socket.create_connection, ("127.0.0.1", self.port.getHost().port))
        client.settimeout(30)
        self.addCleanup(client.close)
        return client  # type: ignore[no-any-return]

    def ask(self, client: socket.socket, data: bytes) -> Deferred[bytes]:
        def exchange() -> bytes:
            client.sendall(data)
            return client.recv(100)

        return deferToThread(exchange)

    async def closed(self, *sockets: socket.socket) -> None:
        """Closed before the descriptors are counted."""
        for each in sockets:
            each.close()
        await self.turns()

    async def test_each_gets_its_own(self) -> None:
        """Of many clients each is read, and hears its own words."""
        sockets = [await self.connect() for _ in range(20)]
        for number, client in enumerate(sockets):
            client.sendall(b"%d" % number)
        self.assertEqual(
            [await deferToThread(client.recv, 100) for client in sockets], [b"%d" % number for number in range(20)]
        )
        await self.closed(*sockets)
        self.assertEqual([client.lost is not None for client in self.clients], [True] * 20)

    async def test_a_pause(self) -> None:
        """A paused client is not read, and is read once it is resumed; twice is the same as once."""
        client = await self.connect()
        await self.ask(client, b"1")
        transport = self.clients[0].transport
        transport.pauseProducing()
        transport.pauseProducing()
        client.sendall(b"2")
        client.setblocking(False)
        await self.turns()
        with self.assertRaises(BlockingIOError):
            client.recv(100)
        transport.resumeProducing()
        transport.resumeProducing()
        await self.turns()
        self.assertEqual(client.recv(100), b"2")
        await self.closed(client)

    async def test_one_ends_the_others(self) -> None:
        """Clients that are closed in the turn in which they sent something are not read any more, and nobody else is
        hurt."""
        sockets = [await self.connect() for _ in range(5)]
        await self.turns()
        for client in sockets:
            client.sendall(b"end the others")
        await self.turns()
        self.assertEqual(sum(client.lost is None for client in self.clients), 1)
        await self.closed(*sockets)

    async def test_rounds(self) -> None:
        """The factory hears of the begin and the end of each round, which nothing that a client does keeps back."""
        heard: list[str] = []
        self.factory.begin_round = lambda: heard.append("begin")  # type: ignore[attr-defined]
        self.factory.end_round = lambda: heard.append("end")  # type: ignore[attr-defined]
        await maybeDeferred(self.port.stopListening)
        self.port = tcp(reactor, "127.0.0.1", 0, self.factory)()
        one, other = await self.connect(), await self.connect()
        await self.turns()
        for client in self.clients:
            client.dataReceived = lambda data: heard.append(data.decode())  # type: ignore[method-assign]
        self.clients[0].dataReceived = lambda _: 1 // 0  # type: ignore[assignment,method-assign,return-value]
        heard.clear()
        one.sendall(b"1")
        other.sendall(b"2")
        await self.turns()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertIn("2", heard)
        words = [word for word in heard if word != "2"]
        self.assertEqual(words, ["begin", "end"] * (len(words) // 2))
        place = heard.index("2")
        self.assertEqual((heard[place - 1], heard[place + 1]), ("begin", "end"))
        await self.closed(one, other)

    async def test_a_round_that_cannot_be_ended(self) -> None:
        """An exception of the factory is logged, and the clients are read on."""
        broken = [True]
        self.factory.end_round = lambda: 1 // (not broken)  # type: ignore[attr-defined]
        await maybeDeferred(self.port.stopListening)
        self.port = tcp(reactor, "127.0.0.1", 0, self.factory)()
        client = await self.connect()
        for word in (b"1", b"2"):
            self.assertEqual(await self.ask(client, word), word)
        broken.clear()
        await self.closed(client)
        self.assertGreaterEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    async def test_a_bug(self) -> None:
        """An exception is logged and ends its own client alone."""
        one, other = await self.connect(), await self.connect()
        self.assertEqual(await self.ask(one, b"raise"), b"")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(await self.ask(other, b"1"), b"1")
        await self.closed(one, other)

    async def test_a_bug_at_the_end(self) -> None:
        """An exception while one is ended is logged, and the others are read on."""
        one, other = await self.connect(), await self.connect()
        await self.ask(one, b"1")
        self.clients[0].raises = True
        await self.closed(one)
        self.assertGreaterEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(await self.ask(other, b"2"), b"2")
        await self.closed(other)

    async def test_a_reset(self) -> None:
        """A connection that breaks is reported to its protocol, and its descriptor is released."""
        client = await self.connect()
        await self.ask(client, b"1")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await self.closed(client)
        self.assertIsNotNone(self.clients[0].lost)

    async def test_clients_outlive_the_port(self) -> None:
        """A client of a port that listens no more is still read."""
        client = await self.connect()
        await self.ask(client, b"1")
        await maybeDeferred(self.port.stopListening)
        self.assertEqual(await self.ask(client, b"2"), b"2")
        transport = self.clients[0].transport
        transport.pauseProducing()
        transport.resumeProducing()
        self.assertEqual(await self.ask(client, b"3"), b"3")
        await self.closed(client)
