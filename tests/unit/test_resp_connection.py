"""Laws of the connections of the RESP port over transports in memory: when replies are sent, and what ends them."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.client_socket import Phase
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.resp.connection import RespConnection, RespFactory
from tests.kit.clocks import one_turn, started_clock
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.resp import encode
from tests.kit.resp_peer import document, filled_cache, publish
from tests.kit.resp_session import parsed
from tests.kit.wire import Wire

IDLE_S, SILENCE_S = 60.0, 600.0


class ConnectionTestCase(SynchronousTestCase):
    max_connections = 10
    silence_timeout_s = 0.0

    def setUp(self) -> None:
        self.clock = started_clock()
        self.cache = filled_cache(self.clock.seconds, 2000)
        self.factory = RespFactory(
            cache=self.cache,
            freshness=Freshness(FakeRefreshes(), self.cache.database, self.clock),
            limits=Limits(self.max_connections, IDLE_S, self.silence_timeout_s),
            clock=self.clock,
        )
        self.server = self.factory.server
        self.addCleanup(self.check_the_end)

    def check_the_end(self) -> None:
        """When the clients have gone nothing is left of them."""
        self.factory.close_clients()
        self.assertEqual(
            (self.factory.clients, self.server.sessions, self.server.subscriptions.channels), (set(), {}, {})
        )
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def connect(self, room_bytes: int | None = None) -> tuple[RespConnection, Wire]:
        client = self.factory.buildProtocol(None)
        return client, Wire(client, room_bytes)

    def turn(self) -> None:
        one_turn(self.clock)

    def answers(self, wire: Wire) -> list[Any]:
        """All that the client has got once nothing more comes."""
        while self.factory.turns._due or self.factory._unsent:
            self.turn()
        return parsed(wire.take())


class Replies(ConnectionTestCase):
    def test_at_the_end_of_a_round(self) -> None:
        """The replies to all that was read in a round are sent at its end, each client's in one write."""
        wires = [self.connect()[1] for _ in range(3)]
        self.factory.begin_round()
        for wire in wires:
            wire.receive(encode("PING"))
            wire.receive(encode("GET", "products:1"))
        self.assertEqual([wire.take() for wire in wires], [b""] * 3)
        self.factory.end_round()
        for wire in wires:
            self.assertEqual(parsed(wire.take()), [b"PONG", document(1, 1)])

    def test_at_the_end_of_a_turn(self) -> None:
        """Outside of a round they are sent in the next turn."""
        _, wire = self.connect()
        wire.receive(encode("PING"))
        self.assertEqual(wire.take(), b"")
        self.turn()
        self.assertEqual(wire.take(), b"+PONG\r\n")

    def test_order(self) -> None:
        """Replies that are kept, streamed or awaited stay in the order of their commands."""
        client, wire = self.connect()
        wire.receive(
            b"".join(
                encode(*words)
                for words in (
                    ("PING",),
                    ("HGETALL", "products"),
                    ("GET", "products:1"),
                    ("CACHE.WAIT", "products", 99, 100),
                    ("PING", "last"),
                )
            )
        )
        self.turn()
        while client.phase is not Phase.WAITING:
            self.turn()
        self.clock.advance(1)
        pong, rows, row, waited, last = self.answers(wire)
        self.assertEqual((pong, len(rows), row, waited, last), (b"PONG", 4000, document(1, 1), 0, b"last"))
        self.assertEqual(self.server.commands_processed, 5)

    def test_a_client_that_does_not_read(self) -> None:
        """Nothing runs for a client that is choked; when it reads all comes in order."""
        client, wire = self.connect(room_bytes=10)
        wire.receive(encode("GET", "products:1"))
        self.turn()
        self.assertTrue(client.is_choked)
        client.dataReceived(encode("GET", "products:2"))
        self.turn()
        self.assertEqual(self.server.commands_processed, 1)
        wire.client_reads()
        self.assertEqual(self.answers(wire), [document(1, 1), document(2, 1)])

    def test_violation(self) -> None:
        """Bytes that are not a request are answered after the replies before them, and end the connection."""
        _, wire = self.connect()
        wire.receive(encode("PING") + b"*1\r\n:1\r\n")
        self.turn()
        self.turn()
        self.assertEqual(wire.take(), b"+PONG\r\n-ERR Protocol error: expected '$', got ':'\r\n")
        self.assertEqual(wire.ended, "closed")

    def test_another_protocol(self) -> None:
        """An HTTP request ends the connection at once."""
        _, wire = self.connect()
        wire.receive(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual(wire.ended, "aborted")


class Messages(ConnectionTestCase):
    def test_after_a_streamed_reply(self) -> None:
        """A publish during a streamed reply is sent after it."""
        client, wire = self.connect()
        client.bytes_per_turn = 10_000
        wire.receive(encode("HELLO", 3) + encode("SUBSCRIBE", "cache:empty"))
        self.turn()
        wire.take()
        wire.receive(encode("HGETALL", "products"))
        self.assertIs(client.phase, Phase.STREAMING)
        publish(self.cache, "empty", range(0))
        rows, message = self.answers(wire)
        self.assertEqual((len(rows), message[1]), (2000, b"cache:empty"))

    def test_after_kept_replies(self) -> None:
        """A publish in the turn of a reply does not overtake it."""
        _, wire = self.connect()
        wire.receive(encode("SUBSCRIBE", "cache:empty"))
        publish(self.cache, "empty", range(0))
        subscribed, message = self.answers(wire)
        self.assertEqual((subscribed[0], message[0]), (b"subscribe", b"message"))


class Ends(ConnectionTestCase):
    def test_quit(self) -> None:
        """After QUIT the connection is closed when its replies are sent."""
        _, wire = self.connect(room_bytes=0)
        wire.receive(encode("PING") + encode("QUIT"))
        self.assertIsNone(wire.ended)
        wire.client_reads()
        self.assertEqual((wire.take(), wire.ended), (b"+PONG\r\n+OK\r\n", "closed"))

    def test_half_closed(self) -> None:
        """A client that closes its side gets its replies, unless one of them has to wait."""
        for words, received, ended in (
            (("PING",), 1, "closed"),
            (("HGETALL", "products"), 1, "closed"),
            (("CACHE.WAIT", "products", 99, 10_000), 0, "aborted"),
        ):
            _, wire = self.connect()
            wire.receive(encode(*words))
            wire.client_closes_its_side()
            self.assertEqual(len(self.answers(wire)), received)
            self.assertEqual(wire.ended, ended, words)

    def test_nothing_is_left(self) -> None:
        """The memory of a client that has left is free at once, not only when the garbage is collected."""
        gc.disable()
        self.addCleanup(gc.enable)
        client, wire = self.connect()
        wire.receive(encode("SUBSCRIBE", "cache:empty"))
        self.turn()
        wire.client_leaves()
        kept = ref(client)
        del client, wire
        self.assertIsNone(kept())


class Idle(ConnectionTestCase):
    def test_silent(self) -> None:
        """A client that is only silent is kept, a subscriber too; one that does not end its request is dropped."""
        (_, silent), (_, subscriber), (_, half) = (self.connect() for _ in range(3))
        subscriber.receive(encode("SUBSCRIBE", "cache:empty"))
        half.receive(b"*2\r\n$3\r\nGET\r\n")
        for _ in range(10):
            self.clock.advance(IDLE_S)
        self.assertEqual((silent.ended, subscriber.ended, half.ended), (None, None, "aborted"))
        self.assertEqual(self.factory.rejected["slow_client"], 0)

    def test_a_subscriber_that_begins_to_be_slow(self) -> None:
        """A subscriber that was silent for long has the idle time to read a message, from its queue on."""
        _, wire = self.connect()
        wire.receive(encode("SUBSCRIBE", "cache:empty"))
        for _ in range(21):  # to the middle between two looks at the time
            self.clock.advance(IDLE_S / 2)
        wire.room_bytes = 0
        publish(self.cache, "empty", range(0))
        self.clock.advance(IDLE_S - 1)
        self.assertIsNone(wire.ended)
        self.clock.advance(1)
        self.assertEqual((wire.ended, self.factory.rejected["slow_client"]), ("aborted", 1))


class Silence(ConnectionTestCase):
    silence_timeout_s = SILENCE_S

    def test_silent(self) -> None:
        """With resp.idle_timeout_s a client that asks nothing is dropped; each request restarts its time."""
        _, wire = self.connect()
        for _ in range(3):
            self.clock.advance(SILENCE_S - 1)
            wire.receive(encode("PING"))
        self.clock.advance(SILENCE_S + 1)
        self.assertEqual(wire.ended, "aborted")


class Full(ConnectionTestCase):
    max_connections = 1

    def test_one_too_many(self) -> None:
        """It gets one line and the end, and is counted."""
        self.connect()
        _, wire = self.connect()
        self.assertEqual((wire.take(), wire.ended), (b"-ERR max number of clients reached\r\n", "closed"))
        self.assertEqual(self.factory.rejected["too_many_connections"], 1)
        self.assertEqual((len(self.server.sessions), self.server.connections_received), (1, 2))
