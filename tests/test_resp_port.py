"""Laws of the RESP port, over real sockets; its clients are plain blocking ones in threads."""

from __future__ import annotations

import json
import resource
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import hiredis
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.cache.cache import Cache
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports import throttle
from cacheservice.ports.client_socket import Phase
from cacheservice.ports.clients import BYTES_PER_TURN
from cacheservice.ports.clients import Limits as ClientLimits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.listen import tcp
from cacheservice.ports.resp.commands import COMMANDS
from cacheservice.ports.resp.connection import RespConnection, RespFactory
from cacheservice.ports.resp.server import Command
from tests.kit.clocks import started_clock
from tests.kit.datasets import MOMENT, rows_builder
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.postgres import PRIMARY
from tests.kit.resp import Client, Words, encode
from tests.kit.resp_peer import ROWS, document, filled_cache, publish
from tests.kit.waiting import GIVE_UP_S, until

MANY_ROWS = 300_000


class PortTestCase(TestCase):
    timeout = 240
    max_connections = 50
    idle_timeout_s = 120.0
    silence_timeout_s = 0.0
    password = ""
    clock: Any = reactor

    async def setUp(self) -> None:
        self.now = started_clock()  # of the datasets' ages only
        self.cache = self.make_cache()
        self.refreshes = FakeRefreshes()
        self.factory = RespFactory(
            cache=self.cache,
            freshness=Freshness(self.refreshes, self.cache.database, reactor),
            limits=ClientLimits(self.max_connections, self.idle_timeout_s, self.silence_timeout_s),
            clock=self.clock,
            password=self.password,
        )
        self.server = self.factory.server
        self.port = tcp(reactor, "127.0.0.1", 0, self.factory)()
        self.addCleanup(self.close)

    def make_cache(self) -> Cache:
        return filled_cache(self.now.seconds)

    async def close(self) -> None:
        await self.port.stopListening()
        self.factory.close_clients()
        await until(lambda: not self.factory.clients)
        self.assertEqual(self.server.subscriptions.channels, {})

    def connect(self, receive_buffer_bytes: int = 0) -> Client:
        connection = socket.socket()
        if receive_buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.settimeout(GIVE_UP_S)
        connection.connect(("127.0.0.1", self.port.getHost().port))
        return Client(connection)

    def converse(self, conversation: Callable[[Client], Any], receive_buffer_bytes: int = 0) -> Deferred[Any]:
        def run() -> Any:
            client = self.connect(receive_buffer_bytes)
            with closing(client.socket):
                return conversation(client)

        return deferToThread(run)

    async def ask(self, *words: bytes | str | int, protocol: int = 2) -> Any:
        def conversation(client: Client) -> Any:
            if protocol == 3:
                client.ask("HELLO", 3)
            return client.ask(*words)

        return await self.converse(conversation)

    async def assert_asks(self, words: str, expected: Any, protocol: int = 2) -> None:
        self.assertEqual(await self.ask(*words.split(), protocol=protocol), expected, words)


class OneMoment(PortTestCase):
    async def test_reads_of_many(self) -> None:
        """MGET, HMGET, HVALS, EXISTS and MULTI blocks are each of one generation, while generations come and go."""
        publishing = True

        async def keep_publishing() -> None:
            while publishing:
                publish(self.cache, "products", range(ROWS))
                await deferLater(reactor, 0.005)

        keys = [f"products:{number}" for number in range(ROWS)]

        def generation(documents: list[bytes]) -> int:
            found = {json.loads(each)["generation"] for each in documents}
            self.assertEqual(len(found), 1)
            return int(found.pop())

        def conversation(client: Client) -> None:
            seen = set()
            for _ in range(10):
                seen.add(generation(client.ask("MGET", *keys)))
                seen.add(generation(client.ask("HMGET", "products", *range(ROWS))))
                seen.add(generation(client.ask("HVALS", "products")))
                told = [("MULTI",), ("HVALS", "products"), ("GET", keys[0]), ("HGET", "products", 1), ("MGET", *keys)]
                # Too much for one turn of the reactor, so that some is read later.
                told += [("HSCAN", "products", 0, "COUNT", 1000)] * 10 + [("GET", key) for key in keys] + [("EXEC",)]
                *_, results = client.ask_all(told)
                documents = [*results[0], results[1], results[2], *results[3], *results[14:]]
                for _, page in results[4:14]:
                    documents += page[1::2]
                seen.add(generation(documents))
            self.assertGreater(len(seen), 10)

        loop = Deferred.fromCoroutine(keep_publishing())
        try:
            await self.converse(conversation)
        finally:
            publishing = False
            await loop

    async def test_expiry_within_a_transaction(self) -> None:
        """What expires while a transaction is read is reported by each command for itself; the connection lives on."""

        def conversation(client: Client) -> list[Any]:
            client.socket.sendall(
                b"".join([encode("MULTI"), *[encode("HVALS", "products")] * 200, encode("GET", "strict:1")])
            )
            client.send("EXEC")
            return [client.read() for _ in range(203)]

        done = self.converse(conversation, receive_buffer_bytes=4096)
        await until(lambda: any(client.phase is Phase.STREAMING for client in self.factory.clients))
        self.now.advance(1000)
        publish(self.cache, "strict", range(0))
        *_, results = await done
        self.assertEqual(len(results), 201)
        self.assertEqual(str(results[-1]), "STALE strict is 1000 s old, limit 180 s")

    async def test_slow_reader_of_a_large_hash(self) -> None:
        """HGETALL of 300,000 rows, read slowly while generations come, is all of one, in bounded memory."""
        publish(self.cache, "products", range(MANY_ROWS))
        size_bytes = self.cache.dataset("products").snapshot.rows.size_bytes  # type: ignore[union-attr]
        begun, go_on = threading.Event(), threading.Event()

        def read_slowly(client: Client) -> dict[bytes, bytes]:
            client.ask("HELLO", 3)
            client.send("HGETALL", "products")
            begun.set()
            go_on.wait(GIVE_UP_S)
            return dict(client.read())

        before_bytes = peak_memory_bytes()
        reading = self.converse(read_slowly, receive_buffer_bytes=4096)
        await until(begun.is_set)
        await until(lambda: any(client.is_choked for client in self.factory.clients))
        for _ in range(3):
            publish(self.cache, "products", range(10))
            await self.assert_asks("HLEN products", 10)
        buffered = max(map(buffered_bytes, self.factory.clients))
        self.assertLess(buffered, 2 * BYTES_PER_TURN)
        self.assertLess(peak_memory_bytes() - before_bytes, size_bytes // 2 + 2**24)
        go_on.set()
        rows = await reading
        self.assertEqual(len(rows), MANY_ROWS)
        self.assertTrue(all(b'"generation":2,' in value for value in rows.values()))


def buffered_bytes(client: RespConnection) -> int:
    return len(client.transport.dataBuffer) + sum(map(len, client.transport._tempDataBuffer))


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Neighbours(PortTestCase):
    async def test_flood(self) -> None:
        """Of 100,000 GETs in one write each is answered, in their order, and a neighbour is answered among them."""
        count = 100_000
        flooding = threading.Event()

        def flood(client: Client) -> int:
            data = b"".join(encode("GET", f"products:{number % 10}") for number in range(count))
            writer = threading.Thread(target=client.socket.sendall, args=(data,))
            writer.start()
            wrong = 0
            for number in range(count):
                wrong += client.read() != document(number % 10, 1)
                if number == 10:
                    flooding.set()
            writer.join()
            return wrong

        answered = self.converse(flood)
        await until(flooding.is_set)
        before = self.server.commands_processed
        await self.assert_asks("PING", b"PONG")
        among = self.server.commands_processed
        self.assertEqual(await answered, 0)
        self.assertGreaterEqual(self.server.commands_processed - before, 1)
        self.assertLess(among, count + 2, "the neighbour was answered before the flood's end")

    async def test_replies_that_cannot_be_sent(self) -> None:
        """A failure to send is logged and ends its own client alone; the others of its round get their replies."""
        clients = [self.connect() for _ in range(3)]
        await until(lambda: len(self.factory.clients) == 3)
        broken = min(self.factory.clients, key=lambda each: each.session.id)
        broken.send_unsent = lambda: 1 // 0  # type: ignore[assignment,method-assign,return-value]
        for client in clients:
            client.send("GET", "products:1")
        await until(lambda: len(self.factory.clients) == 2)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

        def received() -> list[bytes]:
            return [client.read() for client in clients[1:]]

        self.assertEqual(await deferToThread(received), [document(1, 1)] * 2)
        for client in clients:
            client.socket.close()

    async def test_pipelines_of_all_sorts(self) -> None:
        """GETs in a pipeline are answered in their places, whatever stands between them and whichever clients ask."""
        asked: list[Words] = [
            ("GET", "products:1"),
            ("get", "products:2"),
            ("GeT", "products:3"),
            ("GET", "products:nope"),
            ("GET", "products:4"),
            ("PING",),
            ("GET", "nope:1"),
            ("GET", "products"),
            ("GET", "products:1", "2"),
            ("GET",),
            ("MGET", "products:5", "products:6"),
            ("GET", "products:5"),
        ]
        expected = [document(1, 1), document(2, 1), document(3, 1), None, document(4, 1), b"PONG"]
        expected += ["ERR unknown dataset 'nope'", "WRONGTYPE Operation against a key holding the wrong kind of value"]
        expected += ["ERR wrong number of arguments for 'get' command"] * 2
        expected += [[document(5, 1), document(6, 1)], document(5, 1)]

        def conversation(client: Client) -> list[Any]:
            return [client.ask_all(asked) for _ in range(200)]

        for answers in await gatherResults([self.converse(conversation) for _ in range(5)]):
            self.assertEqual(answers, [expected] * 200)

    async def test_the_last_words(self) -> None:
        """What was asked before QUIT, and before the end of the client's input, is answered."""

        def conversation(client: Client) -> list[Any]:
            return [*client.ask_all([("GET", "products:1"), ("QUIT",)]), client.is_closed()]

        self.assertEqual(await self.converse(conversation), [document(1, 1), b"OK", True])

    async def test_large_documents_take_turns(self) -> None:
        """However large the documents of a pipeline are, a turn sends a quarter of a megabyte and one of them."""
        size_bytes = 100_000
        rows = rows_builder()
        rows.add([(b"1", b"x" * size_bytes)])
        dataset = self.cache.dataset("products")
        dataset.publish(Snapshot(2, rows.finish(), MOMENT, self.now.seconds(), "1:1:"))
        client = self.connect(4096)
        self.addCleanup(client.socket.close)
        client.socket.sendall(encode("GET", "products:1") * 500)
        await until(lambda: self.server.commands_processed >= 3)
        self.assertLess(self.server.commands_processed, 100)

        def read(client: Client) -> set[int]:
            return {len(client.read()) for _ in range(500)}

        self.assertEqual(await deferToThread(read, client), {size_bytes})

    async def test_half_closed(self) -> None:
        """A client that ends its side after its questions gets all answers: printf … | nc -N."""

        def conversation(client: Client) -> int:
            client.socket.sendall(encode("HGETALL", "products") * 50 + b"PING\r\n")
            client.socket.shutdown(socket.SHUT_WR)
            answers = [client.read() for _ in range(51)]
            client.is_closed()
            return len(answers)

        self.assertEqual(await self.converse(conversation), 51)

    async def test_heavy_commands_take_turns(self) -> None:
        """EXISTS with many keys and pipelines of large scans leave their neighbours turns, and the right answers."""
        publish(self.cache, "products", range(20_000))
        commands: list[Words] = [("EXISTS", *(["products:1", "products:nope", "products"] * 30_000))]
        commands += [("HSCAN", "products", 0, "MATCH", "nope", "COUNT", 10_000)] * 30

        def conversation(client: Client) -> list[Any]:
            return client.ask_all(commands)

        counted, *pages = await self.converse(conversation)
        self.assertEqual(counted, 60_000)
        self.assertEqual({len(page) for _, page in pages}, {0})


class Idle(PortTestCase):
    idle_timeout_s = 2.0

    async def test_client_that_never_reads(self) -> None:
        """A client that asks and never reads is paused: what waits for it is bounded; then it is dropped."""
        client = self.connect(4096)
        self.addCleanup(client.socket.close)
        client.socket.setblocking(False)
        request = encode("HGETALL", "products") * 1000
        sent, most = 0, 0
        stalled = 0
        while (stalled < 20 and self.factory.clients) or not sent:
            try:
                sent += client.socket.send(request)
                stalled = 0
            except BlockingIOError:
                stalled += 1
            except ConnectionError:
                break
            for each in self.factory.clients:
                most = max(most, buffered_bytes(each))
            await deferLater(reactor, 0.01)
        self.assertLess(most, 3 * BYTES_PER_TURN)
        await until(lambda: not self.factory.clients)

    async def test_idle(self) -> None:
        """Clients that ask nothing are kept, subscribers too; one that does not end its request is dropped."""
        subscriber, idle, half = self.connect(), self.connect(), self.connect()
        for client in (subscriber, idle, half):
            self.addCleanup(client.socket.close)
        await deferToThread(subscriber.ask, "SUBSCRIBE", "cache:products")
        await deferToThread(idle.ask, "PING")
        half.socket.sendall(b"*2\r\n$3\r\nGET\r\n")
        await deferToThread(half.is_closed)
        await deferLater(reactor, 2 * self.idle_timeout_s)
        publish(self.cache, "products", range(1))
        self.assertEqual((await deferToThread(subscriber.read))[:2], [b"message", b"cache:products"])
        self.assertEqual(await deferToThread(idle.ask, "PING"), b"PONG")

    async def test_keepalive(self) -> None:
        """The system looks after the connections that are kept."""
        client = self.connect()
        self.addCleanup(client.socket.close)
        await until(lambda: self.factory.clients)
        (served,) = self.factory.clients
        sock = served.transport.socket
        self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)
        self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60)


class Silence(PortTestCase):
    idle_timeout_s = 2.0
    silence_timeout_s = 0.3

    async def test_idle(self) -> None:
        """With resp.idle_timeout_s one that asks nothing is dropped."""
        idle = self.connect()
        self.addCleanup(idle.socket.close)
        await deferToThread(idle.ask, "PING")
        await deferToThread(idle.is_closed)


class Limits(PortTestCase):
    max_connections = 3

    async def test_too_many(self) -> None:
        """One more than max_connections gets one line and the end; the others go on."""
        clients = [self.connect() for _ in range(3)]
        for client in clients:
            self.addCleanup(client.socket.close)
            self.assertEqual(await deferToThread(client.ask, "PING"), b"PONG")

        def refused(client: Client) -> str:
            said = client.read()
            client.is_closed()
            return str(said)

        self.assertEqual(await self.converse(refused), "ERR max number of clients reached")
        self.assertEqual(await deferToThread(clients[0].ask, "PING"), b"PONG")
        clients[1].socket.close()
        await until(lambda: len(self.factory.clients) == 2)
        await self.assert_asks("PING", b"PONG")

    async def test_queue(self) -> None:
        """A MULTI block has a limit; past it it is aborted."""

        def conversation(client: Client) -> tuple[Any, Any]:
            answers = client.ask_all([("MULTI",), *[("PING",)] * 10_001, ("EXEC",)])
            return answers[-2], answers[-1]

        refused, aborted = await self.converse(conversation)
        self.assertTrue(refused.startswith("ERR a transaction has at most"))
        self.assertTrue(aborted.startswith("EXECABORT"))


class Subscriptions(PortTestCase):
    async def test_messages(self) -> None:
        """Each publish is sent to its subscribers and to nobody else, as a message or, in protocol 3, as a push."""
        two, three, other = self.connect(), self.connect(), self.connect()
        for client in (two, three, other):
            self.addCleanup(client.socket.close)
        await deferToThread(three.ask, "HELLO", 3)
        for client in (two, three):
            answer = await deferToThread(client.ask, "SUBSCRIBE", "cache:products", "cache:empty")
            self.assertEqual(answer, [b"subscribe", b"cache:products", 1])
            self.assertEqual(await deferToThread(client.read), [b"subscribe", b"cache:empty", 2])
        await deferToThread(other.ask, "SUBSCRIBE", "cache:strict")
        publish(self.cache, "products", range(5))
        publish(self.cache, "strict", range(5))
        for client in (two, three):
            message = await deferToThread(client.read)
            self.assertEqual(isinstance(message, hiredis.PushNotification), client is three)
            self.assertEqual(message[:2], [b"message", b"cache:products"])
            told = json.loads(message[2])
            self.assertEqual(list(told), ["dataset", "generation", "as_of", "added", "changed", "removed"])
            self.assertEqual(
                (told["dataset"], told["generation"], told["as_of"]), ("products", 2, "2026-01-02T03:04:05Z")
            )
        self.assertEqual((await deferToThread(other.read))[1], b"cache:strict")
        # In protocol 3 a subscriber asks on.
        self.assertEqual(await deferToThread(three.ask, "HLEN", "products"), 5)
        answer = await deferToThread(two.ask, "UNSUBSCRIBE", "cache:products")
        self.assertEqual(answer, [b"unsubscribe", b"cache:products", 1])
        publish(self.cache, "products", range(6))
        publish(self.cache, "empty", range(6))
        self.assertEqual((await deferToThread(two.read))[1], b"cache:empty")
        self.assertEqual(await deferToThread(two.ask, "UNSUBSCRIBE"), [b"unsubscribe", b"cache:empty", 0])
        self.assertEqual(await deferToThread(two.ask, "HLEN", "products"), 6)

    async def test_unknown_channel(self) -> None:
        """A channel that will never have a message is an error."""
        for channel in ("cache:nope", "products", "cache:"):
            answer = await self.ask("SUBSCRIBE", channel)
            self.assertTrue(answer.startswith("ERR unknown channel"), answer)
        self.assertEqual(self.server.subscriptions.channels, {})

    async def test_publish_within_a_reply(self) -> None:
        """A publish during a large reply is sent after it, neither within it nor never."""
        client = self.connect(4096)
        self.addCleanup(client.socket.close)
        publish(self.cache, "products", range(50_000))
        await deferToThread(client.ask, "HELLO", 3)
        await deferToThread(client.ask, "SUBSCRIBE", "cache:products")
        client.send("HGETALL", "products")
        client.send("PING")
        await until(lambda: any(each.is_choked for each in self.factory.clients))
        for rows in (3, 4, 5):
            publish(self.cache, "products", range(rows))
        answers = [await deferToThread(client.read) for _ in range(5)]
        self.assertEqual(len(answers[0]), 50_000)
        self.assertEqual(
            [json.loads(answer[2])["generation"] for answer in answers if isinstance(answer, list)], [3, 4, 5]
        )
        self.assertIn(b"PONG", answers)

    async def test_subscriber_that_does_not_read(self) -> None:
        """It is dropped, and what waited for it until then is bounded."""
        client = self.connect(4096)
        self.addCleanup(client.socket.close)
        await deferToThread(client.ask, "SUBSCRIBE", "cache:empty")
        published = 0
        while self.factory.clients:
            for _ in range(500):
                publish(self.cache, "empty", range(0))
            published += 500
            self.assertLess(published, 500_000)
            await deferLater(reactor, 0)
        self.assertEqual(self.server.subscriptions.channels, {})


class Waiting(PortTestCase):
    def include(self, database_snapshot: str) -> None:
        """Publish a snapshot that was read now."""
        snapshot = self.cache.dataset("products").snapshot
        assert snapshot is not None
        self.cache.dataset("products").publish(
            Snapshot(
                snapshot.generation + 1, snapshot.rows, MOMENT, reactor.seconds(), database_snapshot, server=PRIMARY
            )
        )

    async def test_included_already(self) -> None:
        """What the served snapshot includes is answered at once, and asks for nothing."""
        self.include("100:110:105")
        for xid, expected in ((99, 1), (104, 1), (105, 0), (110, 0)):
            self.assertEqual(await self.ask("CACHE.WAIT", "products", xid, 0), expected)
        self.assertEqual(await self.ask("CACHE.WAIT", "products", 104, 60_000), 1)
        self.assertEqual(self.refreshes.asked, [])

    async def test_waits_for_the_refresh(self) -> None:
        """All waiting clients are answered by the first snapshot that includes their transaction, and not before."""
        self.include("100:100:")

        def wait(client: Client) -> list[Any]:
            return client.ask_all([("CACHE.WAIT", "products", 105, 60_000), ("HLEN", "products")])

        waiting = [self.converse(wait) for _ in range(5)]
        await until(lambda: len(self.refreshes.asked) == 5)
        self.assertEqual({name for name, _ in self.refreshes.asked}, {"products"})
        self.assertIn("blocked_clients:5", (await self.ask("INFO", "clients")).decode())
        self.include("104:107:105")  # not ended then
        await deferLater(reactor, 0.01)
        self.assertFalse(any(each.called for each in waiting))
        self.include("107:107:")
        for each in waiting:
            self.assertEqual(await each, [1, ROWS])
        # However many ask, `refresh_since` is handed moments that one refresh serves, and not one for each publish.
        self.assertLessEqual(len(self.refreshes.asked), 20)

    async def test_many_share_refreshes(self) -> None:
        """40 waiting clients cause a few refreshes in all, not one each."""
        begun: list[float] = []
        ended: list[float] = []
        wanted: list[float] = []

        def refresh() -> None:
            begun.append(reactor.seconds())
            reactor.callLater(0.2, end, begun[-1])

        def end(began: float) -> None:
            # Those that were asked for after it began have one more.
            again = any(moment > began for moment in wanted)
            wanted.clear()
            snapshot = self.cache.dataset("products").snapshot
            assert snapshot is not None
            database_snapshot = "200:200:" if len(begun) > 1 else "100:100:"
            self.cache.dataset("products").publish(
                Snapshot(snapshot.generation + 1, snapshot.rows, MOMENT, began, database_snapshot, server=PRIMARY)
            )
            if again or wanted:
                refresh()
            ended.append(began)

        def refresh_since(name: str, moment: float) -> None:
            if not begun:
                refresh()
            wanted.append(moment)

        self.patch(self.refreshes, "refresh_since", refresh_since)
        clients = [self.connect() for _ in range(40)]
        for client in clients:
            self.addCleanup(client.socket.close)
            client.send("CACHE.WAIT", "products", 150, 60_000)
        for client in clients:
            self.assertEqual(await deferToThread(client.read), 1)
        # The third is for clients that were notified of the first, which does not yet include their transaction.
        self.assertLessEqual(len(begun), 3)
        await until(lambda: len(ended) == len(begun))

    async def test_pipeline(self) -> None:
        """Any number in one write is answered, in their order."""
        self.include("100:100:")
        told: list[Words] = [("CACHE.WAIT", "products", 99 + number % 2, 0) for number in range(3000)]
        answers = await self.converse(lambda client: client.ask_all(told))
        self.assertEqual(answers, [1, 0] * 1500)

    async def test_timeout(self) -> None:
        """0 at the timeout, and the connection goes on."""

        def conversation(client: Client) -> list[Any]:
            return [
                client.ask("CACHE.WAIT", "products", 10**9, 50),
                client.ask("CACHE.WAIT", "prices", 1, 1),
                client.ask("PING"),
            ]

        self.assertEqual(await self.converse(conversation), [0, 0, b"PONG"])

    async def test_first_load(self) -> None:
        """A dataset that has not been loaded is waited for too."""
        waiting = self.converse(lambda client: client.ask("CACHE.WAIT", "prices", 5, 60_000))
        await until(lambda: self.refreshes.asked)
        publish(self.cache, "prices", range(1), "9:9:")
        self.assertEqual(await waiting, 1)

    async def test_a_generation(self) -> None:
        """CACHE.WAIT NAME g:N is 1 once the served generation is at least N, and starts no refresh."""
        generation = self.cache.dataset("products").last_generation
        for asked, expected in ((generation, 1), (0, 1), (generation + 1, 0)):
            for prefix in ("g:", "G:"):
                self.assertEqual(await self.ask("CACHE.WAIT", "products", f"{prefix}{asked}", 0), expected)
        self.assertEqual(await self.ask("CACHE.WAIT", "prices", "g:0", 0), 0)  # nothing is served yet
        waiting = self.converse(lambda client: client.ask("CACHE.WAIT", "products", f"g:{generation + 2}", 60_000))
        await until(lambda: any(each.is_waiting for each in self.factory.clients))
        publish(self.cache, "products", range(1), "9:9:")
        self.assertFalse(waiting.called)
        publish(self.cache, "products", range(1), "9:9:")
        self.assertEqual(await waiting, 1)
        self.assertEqual(self.refreshes.asked, [])

    async def test_a_generation_of_a_removed_dataset(self) -> None:
        """A wait for a generation ends with an error if the dataset is removed."""
        waiting = self.converse(lambda client: client.ask("CACHE.WAIT", "products", "g:1000", 60_000))
        await until(lambda: any(each.is_waiting for each in self.factory.clients))
        self.cache.declare([self.cache.dataset("prices").settings])
        self.assertEqual(await waiting, "ERR unknown dataset 'products'")

    async def test_client_goes_away(self) -> None:
        """A client that goes while it waits is gone at once, reset or closed, and leaves no timer and no watcher."""
        subscriptions = self.cache.events.subscription_count
        for reset in (True, False):
            client = self.connect()
            client.send("CACHE.WAIT", "products", 10**9, 86_400_000)
            await until(lambda: any(each.is_waiting for each in self.factory.clients))
            if reset:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()
            await until(lambda: not self.factory.clients)
            self.assertEqual(self.cache.events.subscription_count, subscriptions)

    async def test_sends_while_it_waits(self) -> None:
        """What is sent meanwhile is answered afterwards, however much it is, and is not all read before."""
        sent = [("ECHO", b"x" * 1000)] * 20_000

        def conversation(client: Client) -> int:
            client.send("CACHE.WAIT", "products", 500, 60_000)
            writer = threading.Thread(target=client.socket.sendall, args=(b"".join(encode(*each) for each in sent),))
            writer.start()
            self.assertEqual(client.read(), 1)
            answers = [client.read() for _ in sent]
            writer.join()
            return len(answers)

        waiting = self.converse(conversation)
        await until(lambda: any(each.read_ahead_bytes > 64 * 1024 for each in self.factory.clients))
        await deferLater(reactor, 0.05)
        self.assertLess(max(each.read_ahead_bytes for each in self.factory.clients), 2**18)
        self.include("501:501:")
        self.assertEqual(await waiting, len(sent))

    async def test_in_a_transaction(self) -> None:
        """Within MULTI it does not wait."""
        self.include("100:100:")

        def conversation(client: Client) -> Any:
            told: list[Words] = [
                ("MULTI",),
                ("CACHE.WAIT", "products", 99, 1000),
                ("CACHE.WAIT", "products", 100, 10**7),
                ("CACHE.WAIT", "products", "g:1", 1000),
                ("CACHE.WAIT", "products", "g:1000", 10**7),
                ("EXEC",),
            ]
            return client.ask_all(told)[-1]

        self.assertEqual(await self.converse(conversation), [1, 0, 1, 0])

    async def test_bad_arguments(self) -> None:
        """Numbers that are invalid or out of range are reported."""
        for words in (
            "products x 1",
            "products 1 x",
            "products -1 1",
            "products 1 -1",
            "products 1 99999999999",
            "products 1",
            "products g: 1",
            "products g:x 1",
            "products g:-1 1",
            "products g:1 -1",
            "products g:1 99999999999",
            "products h:1 1",
        ):
            self.assertTrue((await self.ask("CACHE.WAIT", *words.split())).startswith("ERR "), words)


class Password(PortTestCase):
    password = "open sesame"

    async def test_before_auth(self) -> None:
        """Before AUTH nothing is answered but AUTH, HELLO and QUIT."""

        def conversation(client: Client) -> list[Any]:
            names = {command.name for command in COMMANDS} - {"auth", "hello", "quit"} | {"foo", "set"}
            return client.ask_all([(name, "products:1", "1") for name in sorted(names)])

        self.assertEqual(set(await self.converse(conversation)), {"NOAUTH Authentication required."})
        self.assertTrue((await self.ask("HELLO", 3)).startswith("NOAUTH HELLO"))
        await self.assert_asks("QUIT", b"OK")

    async def test_ways_in(self) -> None:
        """AUTH with and without the user, and HELLO, let in; in a pipeline too, with large commands behind."""
        keys = [f"products:{number}" for number in range(ROWS)]
        for words in (
            ("AUTH", self.password),
            ("AUTH", "default", self.password),
            ("HELLO", 3, "AUTH", "default", self.password),
        ):

            def conversation(client: Client, words: Words = words) -> Any:
                return client.ask_all([words, ("MGET", *keys), ("GET", "products:1")])[1:]

            many, one = await self.converse(conversation)
            self.assertEqual((len(many), one), (ROWS, document(1, 1)))

    async def test_failures_are_slowed(self) -> None:
        """A wrong password waits for its answer, longer if there were many; a right one does not."""

        def conversation(client: Client) -> Any:
            return client.ask("AUTH", "wrong")

        began = reactor.seconds()
        for _ in range(2):
            self.assertTrue((await self.converse(conversation)).startswith("WRONGPASS invalid"))
        self.assertGreaterEqual(reactor.seconds() - began, 2 * throttle.SHORT_WAIT_S - 0.01)
        for _ in range(30):
            self.server.passwords.throttle.failed("127.0.0.1")
        began = reactor.seconds()
        self.assertEqual(await self.ask("AUTH", self.password), b"OK")
        self.assertLess(reactor.seconds() - began, throttle.LONG_WAIT_S)
        began = reactor.seconds()
        self.assertTrue((await self.converse(conversation)).startswith("WRONGPASS invalid"))
        self.assertGreaterEqual(reactor.seconds() - began, throttle.LONG_WAIT_S - 0.01)

    async def test_with_too_many_guesses_none_is_looked_at(self) -> None:
        """While many guesses of an address wait, even the right password is refused, in words of its own."""
        for words in (("AUTH", self.password), ("HELLO", 3, "AUTH", "default", self.password)):
            for _ in range(60):
                self.server.passwords.throttle.failed("127.0.0.1")
            self.assertRegex(await self.ask(*words), "^WRONGPASS too many wrong passwords from this address")

    async def test_guesses_from_a_shared_address(self) -> None:
        """Once the address has sent it, the right password is let in whatever others of that address guess.

        Theirs still wait for their answers.
        """
        now = Clock()
        self.server.passwords.throttle = shared = throttle.Throttle(now.seconds)
        self.assertEqual(await self.ask("AUTH", self.password), b"OK")
        for words in (("AUTH", self.password), ("AUTH", "default", self.password)):
            for _ in range(60):
                shared.failed("127.0.0.1")
            self.assertEqual(await self.ask(*words), b"OK")
        began = reactor.seconds()
        self.assertTrue((await self.ask("AUTH", "wrong")).startswith("WRONGPASS invalid"))
        self.assertGreaterEqual(reactor.seconds() - began, throttle.LONG_WAIT_S - 0.01)
        self.assertTrue((await self.ask("AUTH", "other", self.password)).startswith("WRONGPASS invalid"))
        self.assertEqual(self.factory.rejected["auth_failed"], 2)
        await until(lambda: not self.factory.clients)
        now.advance(3601)
        for _ in range(60):
            shared.failed("127.0.0.1")
        self.assertRegex(await self.ask("AUTH", self.password), "^WRONGPASS too many wrong passwords from this address")

    async def test_a_pool_that_connects_again(self) -> None:
        """An address is known for as long as a connection that sent the password is open, and an hour longer."""
        now = Clock()
        self.server.passwords.throttle = shared = throttle.Throttle(now.seconds)
        client, stranger = self.connect(), self.connect()
        self.addCleanup(client.socket.close)
        self.assertEqual(await deferToThread(client.ask, "AUTH", self.password), b"OK")
        now.advance(36_000)
        stranger.socket.close()
        await until(lambda: len(self.factory.clients) == 1)
        self.assertFalse(shared.is_proven("127.0.0.1", "resp.password"))
        client.socket.close()
        await until(lambda: not self.factory.clients)
        for _ in range(60):
            shared.failed("127.0.0.1")
        self.assertEqual(await self.ask("AUTH", self.password), b"OK")

    async def test_many_at_once(self) -> None:
        """A pipeline of guesses gets one answer a delay, not all at once."""
        client = self.connect()
        self.addCleanup(client.socket.close)
        client.socket.sendall(encode("AUTH", "wrong") * 100)
        self.assertTrue((await deferToThread(client.read)).startswith("WRONGPASS"))
        self.assertLessEqual(self.factory.rejected["auth_failed"], 3)
        client.socket.close()
        await until(lambda: not self.factory.clients)


class Server(PortTestCase):
    async def test_info(self) -> None:
        """INFO is sections of name:value lines with what redis_exporter and clients read; one can be asked for."""
        text = (await self.ask("INFO")).decode()
        fields = dict(line.split(":", 1) for line in text.split("\r\n") if line and not line.startswith("#"))
        wanted = {"redis_version", "redis_mode", "os", "process_id", "tcp_port", "uptime_in_seconds", "uptime_in_days"}
        wanted |= {
            "connected_clients",
            "blocked_clients",
            "maxclients",
            "used_memory",
            "used_memory_rss",
            "used_memory_peak",
        }
        wanted |= {"maxmemory", "maxmemory_policy", "loading", "rdb_bgsave_in_progress", "aof_enabled", "expired_keys"}
        wanted |= {"total_connections_received", "total_commands_processed", "rejected_connections", "evicted_keys"}
        wanted |= {"role", "connected_slaves", "used_cpu_sys", "used_cpu_user", "cluster_enabled", "db0"}
        self.assertLessEqual(wanted, set(fields))
        self.assertRegex(fields["db0"], rf"^keys={ROWS + 6},expires=\d+,avg_ttl=\d+$")
        self.assertEqual(fields["tcp_port"], str(self.port.getHost().port))
        sections = [line for line in text.split("\r\n") if line.startswith("#")]
        for section in sections:
            part = (await self.ask("INFO", section[2:].upper())).decode()
            self.assertEqual([line for line in part.split("\r\n") if line.startswith("#")], [section])
        self.assertEqual((await self.ask("INFO", "server", "clients")).decode().count("#"), 2)
        for word in ("all", "everything", "default"):
            self.assertEqual((await self.ask("INFO", word)).decode().count("#"), len(sections))

    async def test_counting(self) -> None:
        """Every command is counted once, streamed ones too."""

        def conversation(client: Client) -> None:
            client.ask_all([("PING",), ("HGETALL", "products"), ("GET", "products:1"), ("HVALS", "products")] * 3)

        await self.converse(conversation)
        self.assertEqual(self.server.commands_processed, 12)

    async def test_what_clients_send_first(self) -> None:
        """What redis-py, node-redis, ioredis, lettuce and go-redis send on connecting is answered as they expect."""

        def conversation(client: Client) -> None:
            greeting = client.ask("HELLO", 3)
            self.assertEqual(
                {name: greeting[name] for name in (b"server", b"proto", b"mode", b"role")},
                {b"server": b"redis", b"proto": 3, b"mode": b"standalone", b"role": b"master"},
            )
            for told in (
                ("CLIENT", "SETINFO", "LIB-NAME", "redis-py"),
                ("CLIENT", "SETINFO", "lib-ver", "5.2.0"),
                ("CLIENT", "SETNAME", "me"),
                ("CLIENT", "NO-EVICT", "on"),
                ("CLIENT", "NO-TOUCH", "ON"),
                ("SELECT", 0),
            ):
                self.assertEqual(client.ask(*told), b"OK", told)
            self.assertEqual(client.ask("CLIENT", "GETNAME"), b"me")
            number = client.ask("CLIENT", "ID")
            told = client.ask("CLIENT", "INFO").decode()
            fields = dict(part.split("=", 1) for part in told.split())
            expected = {"id": str(number), "name": "me", "lib-name": "redis-py", "lib-ver": "5.2.0", "resp": "3"}
            self.assertEqual({name: fields[name] for name in expected}, expected)
            self.assertIn(f"id={number} ", client.ask("CLIENT", "LIST").decode())
            for bad in (
                ("SETNAME", "a b"),
                ("SETINFO", "lib-name", "a b"),
                ("SETINFO", "nope", "x"),
                ("KILL", "x"),
                ("NO-EVICT", "x"),
            ):
                self.assertTrue(client.ask("CLIENT", *bad).startswith("ERR "), bad)

        await self.converse(conversation)

    async def test_command(self) -> None:
        """COMMAND lists every command there is and no other: arity, flags, where the keys are, and its docs."""
        entries = {entry[0].decode(): entry for entry in await self.ask("COMMAND")}
        self.assertEqual(await self.ask("COMMAND", "COUNT"), len(entries))
        self.assertEqual(set(entries), {command.name for command in COMMANDS})
        for entry in entries.values():
            self.assertEqual([type(part) for part in entry], [bytes, int, list, int, int, int, list, list, list, list])
        self.assertEqual(entries["get"][1:2] + entries["get"][3:6], [2, 1, 1, 1])
        info = await self.ask("COMMAND", "INFO", "GET", "nope")
        self.assertEqual((info[0][0], info[1]), (b"get", None))
        docs = await self.ask("COMMAND", "DOCS", protocol=3)
        self.assertEqual({name.decode() for name in docs}, set(entries))
        for each in docs.values():
            self.assertLessEqual({b"summary", b"since", b"group"}, set(each))
        self.assertEqual(list(await self.ask("COMMAND", "DOCS", "get", "nope", protocol=3)), [b"get"])
        self.assertEqual(set(await self.ask("COMMAND", "LIST")), {name.encode() for name in entries})

    async def test_reset(self) -> None:
        """RESET is a new connection: no subscription, no transaction, no name, protocol 2."""

        def conversation(client: Client) -> None:
            client.ask_all([("HELLO", 3, "SETNAME", "me"), ("SUBSCRIBE", "cache:products"), ("MULTI",), ("PING",)])
            self.assertEqual(client.ask("RESET"), b"RESET")
            self.assertEqual(client.ask_all([("CLIENT", "GETNAME"), ("GET", "products:1")]), [None, document(1, 1)])
            self.assertTrue(client.ask("EXEC").startswith("ERR EXEC without MULTI"))

        await self.converse(conversation)
        self.assertEqual(self.server.subscriptions.channels, {})

    async def test_a_bug_ends_nothing(self) -> None:
        """A command that raises is answered, logged once, and the connection goes on, within MULTI too."""
        table = self.server.table

        def broken(*_: Any) -> bytes:
            raise ZeroDivisionError

        self.patch(table, "by_name", {**table.by_name, b"echo": Command("echo", broken, 2)})
        self.patch(table, "by_word", {**table.by_word, b"ECHO": Command("echo", broken, 2)})

        def conversation(client: Client) -> list[Any]:
            return client.ask_all(
                [
                    ("ECHO", "a"),
                    ("MULTI",),
                    ("ECHO", "a"),
                    ("GET", "products:1"),
                    ("EXEC",),
                    ("CACHE.WAIT", "products", 0, 0),
                ]
            )

        answers = await self.converse(conversation)
        internal = "ERR internal error; its traceback is in the log"
        self.assertEqual(answers[0], internal)
        self.assertEqual([str(answers[4][0]), answers[4][1], answers[5]], [internal, document(1, 1), 1])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)
