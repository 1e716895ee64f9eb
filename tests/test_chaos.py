"""Laws of the faulty network, seen by a plain socket client, and by psycopg2 through it to the real server."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.chaos import FaultyNetwork
from tests.kit.http import read_to_the_end
from tests.kit.postgres import fresh_database, sessions_left
from tests.kit.waiting import until

QUIET_S = 0.3  # how long to listen to what should be silent


class Echo(Protocol):
    """Echoes what it hears, and remembers its connections."""

    def connectionMade(self) -> None:
        self.factory.there.add(self)

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.there.discard(self)


@implementer(IPushProducer)
class Stream(Echo):
    """Sends `total_bytes` bytes as fast as they are taken, then ends."""

    total_bytes = 256 * 1024 * 1024
    said_bytes = 0
    paused = True

    def connectionMade(self) -> None:
        super().connectionMade()
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def pauseProducing(self) -> None:
        self.paused = True

    def stopProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False
        while not self.paused and self.said_bytes < self.total_bytes:
            self.transport.write(bytes(65_536))
            self.said_bytes += 65_536
        if self.said_bytes == self.total_bytes:
            self.transport.unregisterProducer()
            self.transport.loseConnection()


class Reads(Protocol):
    """Keeps each read apart."""

    def __init__(self, wanted_bytes: int) -> None:
        self.wanted_bytes = wanted_bytes
        self.reads: list[bytes] = []
        self.done: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.reads.append(data)
        if sum(map(len, self.reads)) == self.wanted_bytes:
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.done.callback(None)


def read_exactly(client: socket.socket, size_bytes: int) -> bytes:
    heard = b""
    while len(heard) < size_bytes:
        part = client.recv(size_bytes - len(heard))
        assert part, "the connection ended"
        heard += part
    return heard


class FaultTestCase(TestCase):
    """A server, the faulty network before it, and blocking clients in threads."""

    server_protocol: type[Echo] = Echo

    async def setUp(self) -> None:
        self.target = Factory.forProtocol(self.server_protocol)
        self.target.there = set()
        listening = reactor.listenTCP(0, self.target, interface="127.0.0.1")
        self.addCleanup(listening.stopListening)
        self.network = FaultyNetwork(listening.getHost().port)
        await self.network.start()
        self.addCleanup(until, lambda: not self.target.there)
        self.addCleanup(self.network.stop)

    async def dial(self) -> socket.socket:
        """A client that has been accepted, and is closed by the end of the test."""
        before = self.network.connections
        client = await deferToThread(socket.create_connection, ("127.0.0.1", self.network.port))
        self.addCleanup(client.close)
        await until(lambda: self.network.connections > before)
        return client

    async def dial_and_greet(self) -> socket.socket:
        client = await self.dial()
        self.assertEqual(await self.exchange(client, b"hello"), b"hello")
        return client

    async def exchange(self, client: socket.socket, text: bytes) -> bytes:
        client.sendall(text)
        return await deferToThread(read_exactly, client, len(text))

    async def assert_silent(self, client: socket.socket) -> None:
        client.settimeout(QUIET_S)
        with self.assertRaises(TimeoutError):
            await deferToThread(client.recv, 1)
        client.settimeout(None)

    async def assert_reset(self, client: socket.socket) -> None:
        with self.assertRaises(ConnectionResetError):
            await deferToThread(client.recv, 1)


class Faults(FaultTestCase):
    async def test_without_faults_all_passes(self) -> None:
        """What either side sends arrives unchanged, and each side's end ends the other."""
        text = bytes(range(256)) * 4096
        client = await self.dial()
        reader = deferToThread(read_exactly, client, len(text))
        await deferToThread(client.sendall, text)
        self.assertEqual(await reader, text)
        self.assertEqual((self.network.connections, len(self.target.there)), (1, 1))
        client.close()
        await until(lambda: not self.network.connections and not self.target.there)

        client = await self.dial_and_greet()
        for server in self.target.there:
            server.transport.write(b"bye")
            server.transport.loseConnection()
        self.assertEqual(await deferToThread(read_to_the_end, client), b"bye")

    async def test_delay(self) -> None:
        """No byte arrives earlier than the delay after the server sent it, and none is lost or late in order."""
        client = await self.dial_and_greet()
        self.network.delay(0.2)
        began = time.monotonic()
        self.assertEqual(await self.exchange(client, b"one"), b"one")
        self.assertGreater(time.monotonic() - began, 0.19)

        self.network.delay(3600)
        client.sendall(b"two")
        await self.assert_silent(client)
        self.network.heal()
        self.assertEqual(await deferToThread(read_exactly, client, 3), b"two")
        self.assertEqual(await self.exchange(client, b"three"), b"three")

    async def test_slice(self) -> None:
        """In slices of n bytes, a client in the same reactor never sees more than two of them in a read."""
        text = bytes(range(256)) * 4
        self.network.slice(7)
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", self.network.port)
        client = await connectProtocol(endpoint, Reads(len(text)))
        client.transport.write(text)
        await client.done
        self.assertEqual(b"".join(client.reads), text)
        self.assertLessEqual(max(map(len, client.reads)), 14)

    async def test_silence(self) -> None:
        """In silence open and new connections stay open and hear nothing, whatever they send; also after `heal`."""
        client = await self.dial_and_greet()
        self.network.silence()
        late = await self.dial()
        for each in (client, late):
            each.sendall(b"anybody?")
            await self.assert_silent(each)
        for server in self.target.there:
            server.transport.loseConnection()
        await until(lambda: not self.target.there)
        await self.assert_silent(client)
        self.network.heal()
        client.sendall(b"anybody?")
        await self.assert_silent(client)
        await self.dial_and_greet()

    async def test_silence_within_a_result(self) -> None:
        """Silence after N bytes lets N through, counted from when it was set, and no more; a new client gets N too."""
        client = await self.dial_and_greet()
        self.network.silence(after=4)
        for each in (client, await self.dial()):
            each.sendall(b"0123456789")
            self.assertEqual(await deferToThread(read_exactly, each, 4), b"0123")
            await self.assert_silent(each)

    async def test_reset(self) -> None:
        """After N bytes there is a RST; open connections and new ones get their N bytes first."""
        client = await self.dial_and_greet()
        self.network.reset(after=4)
        for each in (client, await self.dial()):
            each.sendall(b"0123456789")
            self.assertEqual(await deferToThread(read_exactly, each, 4), b"0123")
            await self.assert_reset(each)
        await until(lambda: not self.target.there)

    async def test_reset_at_once(self) -> None:
        """Without N open connections are reset at once, though neither side sends anything, and new ones on arrival."""
        client = await self.dial_and_greet()
        self.network.reset()
        late = await deferToThread(socket.create_connection, ("127.0.0.1", self.network.port))
        self.addCleanup(late.close)
        for each in (client, late):
            await self.assert_reset(each)

    async def test_truncate(self) -> None:
        """After N bytes there is an orderly end, and the server has lost its client."""
        client = await self.dial_and_greet()
        self.network.truncate(after=4)
        for each in (client, await self.dial()):
            each.sendall(b"0123456789")
            self.assertEqual(await deferToThread(read_to_the_end, each), b"0123")
        await until(lambda: not self.target.there)

    async def test_half_open(self) -> None:
        """The server's side is gone, the client's is open and hears nothing; a new client gets no server."""
        client = await self.dial_and_greet()
        self.network.half_open()
        await until(lambda: not self.target.there)
        for each in (client, await self.dial()):
            each.sendall(b"anybody?")
            await self.assert_silent(each)
        self.assertEqual((self.network.connections, len(self.target.there)), (2, 0))
        self.network.heal()
        await self.dial_and_greet()

    async def test_refuse(self) -> None:
        """Refusing, new clients are refused and open ones stay; then the same port accepts again."""
        client = await self.dial_and_greet()
        port = self.network.port
        await self.network.refuse()
        with self.assertRaises(ConnectionRefusedError):
            await deferToThread(socket.create_connection, ("127.0.0.1", port))
        self.assertEqual(await self.exchange(client, b"still here"), b"still here")
        self.network.accept()
        self.assertEqual(self.network.port, port)
        await self.dial_and_greet()
        await self.network.refuse()
        self.network.heal()
        await self.dial_and_greet()

    async def test_a_target_that_refuses(self) -> None:
        """Where the server itself refuses, the client is reset."""
        orphan = FaultyNetwork(target_port=1)
        await orphan.start()
        self.addCleanup(orphan.stop)
        client = await deferToThread(socket.create_connection, ("127.0.0.1", orphan.port))
        self.addCleanup(client.close)
        await self.assert_reset(client)

    async def test_stop_ends_all(self) -> None:
        """Stop, in the midst of any fault and repeated, ends each connection and leaves nothing in the reactor."""
        clients = [await self.dial_and_greet() for _ in range(3)]
        self.network.delay(3600)
        clients[0].sendall(b"held")
        await self.assert_silent(clients[0])
        self.network.half_open()
        await self.network.stop()
        await self.network.stop()
        self.assertEqual(self.network.connections, 0)
        for client in clients:
            await self.assert_reset(client)


class BackPressure(FaultTestCase):
    server_protocol = Stream

    async def test_a_client_that_does_not_read_stops_the_server(self) -> None:
        """The network holds little: the server is stopped until the client reads, then all arrives."""
        client = await self.dial()
        await until(lambda: self.target.there)
        [server] = self.target.there
        said_bytes = -1
        while said_bytes < server.said_bytes:
            said_bytes = server.said_bytes
            await deferLater(reactor, QUIET_S)
        self.assertLess(said_bytes, server.total_bytes // 4)
        heard = await deferToThread(read_to_the_end, client)
        self.assertEqual(len(heard), server.total_bytes)

    async def test_faults_while_the_client_does_not_read(self) -> None:
        """Healed of a delay, what was held arrives whole and in order; a reset strikes a client that does not read."""
        self.network.delay(3600)
        client = await self.dial()
        await self.assert_silent(client)
        self.network.heal()
        self.assertEqual(len(await deferToThread(read_to_the_end, client)), Stream.total_bytes)
        await self.dial()
        self.network.reset()
        await until(lambda: not self.target.there)


@pytest.mark.usefixtures("server")
class RealServer(TestCase):
    server: EmbeddedPostgres

    async def setUp(self) -> None:
        self.database = fresh_database(self.server, self.addCleanup)
        self.network = FaultyNetwork(self.server.port)
        await self.network.start()
        self.addCleanup(self.network.stop)

    def select(self, statement: str) -> list[tuple[Any, ...]]:
        dsn = self.server.dsn(database=self.database, port=self.network.port)
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall()

    async def test_a_million_rows(self) -> None:
        """A million rows pass, and afterwards no session is left."""
        statement = "SELECT n, repeat('x', 50) FROM generate_series(1, 1000000) n"
        rows = await deferToThread(self.select, statement)
        self.assertEqual((len(rows), rows[0][0], rows[-1][0]), (1_000_000, 1, 1_000_000))
        self.assertEqual(await sessions_left(self.server, self.database), [])

    async def test_healed(self) -> None:
        """A fault is psycopg2's OperationalError, the same once healed connects; no session is left of either."""
        for fault in (self.network.reset, self.network.truncate):
            for after in (0, 1, 100):
                fault(after)
                with self.assertRaises(psycopg2.OperationalError):
                    await deferToThread(self.select, "SELECT 1")
        self.network.heal()
        self.network.slice(1)
        self.assertEqual(await deferToThread(self.select, "SELECT 1"), [(1,)])
        self.assertEqual(await sessions_left(self.server, self.database), [])
