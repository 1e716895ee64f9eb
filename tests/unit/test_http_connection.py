"""Laws of the connections of the HTTP port, over a transport in memory and on a clock that a test moves."""

from __future__ import annotations

import json

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports import clients
from cacheservice.ports.admission import RESERVE_S
from cacheservice.ports.client_socket import LINGER_S, Phase
from cacheservice.ports.clients import Limits
from cacheservice.ports.connection import READ_AHEAD_BYTES
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http import AccessSettings, HttpFactory, Served, connection
from cacheservice.ports.http.events import HEARTBEAT_S, PERIOD_S
from cacheservice.ports.http.exchange import LAST_CHUNK, chunked
from tests.kit.clocks import one_turn, started_clock
from tests.kit.datasets import MOMENT_WITH_MS, declared, rows_of
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.http import statuses
from tests.kit.waiting import GIVE_UP_S
from tests.kit.wire import Wire

IDLE_S, HEAD_S = 60.0, 10.0
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
ROW = b"GET /v1/datasets/products/rows/1 HTTP/1.1\r\nHost: a\r\n\r\n"
WHOLE = b"GET /v1/datasets/products HTTP/1.1\r\nHost: a\r\n\r\n"
FRESH = b"GET /v1/datasets/products/rows/1?max_age=0 HTTP/1.1\r\nHost: a\r\n\r\n"
EVENTS = b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n"
ROWS = 2000


def chunks(body: bytes) -> list[bytes]:
    """The contents of the chunks of a body. A chunk that is not whole fails."""
    contents = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        contents.append(body[:length])
        assert body[length : length + 2] == b"\r\n", "the last chunk is not whole"
        body = body[length + 2 :]
    return contents


class ConnectionTestCase(SynchronousTestCase):
    max_connections = 10

    def setUp(self) -> None:
        # A machine that is busy must not end a turn early.
        self.patch(connection, "_PIPELINE_TURN_S", GIVE_UP_S)
        self.patch(clients, "TURN_S", GIVE_UP_S)
        self.clock = started_clock()
        self.cache = Cache([declared("products")], self.clock.seconds)
        self.publish(1)
        self.clock.advance(1.0)
        served = Served(self.cache, Freshness(FakeRefreshes(), self.cache.database, self.clock), FakeRefreshes())  # type: ignore[arg-type]
        self.factory = HttpFactory(
            served,
            AccessSettings(),
            Limits(self.max_connections, IDLE_S),
            self.clock,  # type: ignore[arg-type]  # no test here needs threads
            HEAD_S,
            wall_s=lambda: 1_800_000_000.0,
        )
        self.addCleanup(self.check_clean)

    def check_clean(self) -> None:
        """Nothing is left of connections that have ended."""
        self.factory.close_clients()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.factory.feed._listeners, 0)

    def publish(self, generation: int) -> None:
        document = b'"%b"' % (b"x" * 100)
        rows = rows_of((b"%d" % number, document) for number in range(ROWS))
        for _ in rows.digesting():
            pass
        self.cache.dataset("products").publish(Snapshot(generation, rows, MOMENT_WITH_MS, self.clock.seconds(), "1:1:"))

    def connect(self, room_bytes: int | None = None) -> Wire:
        return Wire(self.factory.buildProtocol(None), room_bytes)  # type: ignore[arg-type]  # it has what is used

    def phase(self, wire: Wire) -> Phase:
        return wire.protocol.phase  # type: ignore[attr-defined]  # of a connection

    def settle(self, wire: Wire) -> None:
        """Let all requests be answered; a pipeline takes turns by the time that passes."""
        while self.phase(wire) is not Phase.READING:
            self.turns(1)

    def turns(self, count: int = 10) -> None:
        for _ in range(count):
            one_turn(self.clock)


class Requests(ConnectionTestCase):
    def test_pipelined(self) -> None:
        """Requests that arrive together are answered in order, each with all of its response."""
        wire = self.connect()
        wire.receive(LIVEZ + ROW + WHOLE + LIVEZ[:10])
        self.settle(wire)
        self.assertEqual(statuses(wire.sent), [200] * 3)
        wire.receive(LIVEZ[10:])
        self.assertEqual(statuses(wire.take()), [200] * 4)
        self.assertEqual(self.phase(wire), Phase.READING)

    def test_the_last_request(self) -> None:
        """After Connection: close, and HTTP/1.0, what follows is not answered, and the client closes first."""
        for last in (LIVEZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), b"GET /livez HTTP/1.0\r\n\r\n"):
            wire = self.connect()
            wire.receive(last + LIVEZ)
            self.assertEqual(statuses(wire.sent), [200])
            self.assertIn(b"\r\nConnection: close\r\n", wire.sent)
            self.assertEqual((self.phase(wire), wire.is_write_closed), (Phase.LINGERING, True))
            wire.receive(LIVEZ)
            self.assertEqual(statuses(wire.sent), [200])
            self.clock.advance(LINGER_S)
            self.assertEqual(wire.ended, "closed")

    def test_an_invalid_request(self) -> None:
        """It is refused and counted, without a body for HEAD; what follows is not parsed."""
        for request, has_body in ((b"GET / HTTP/1.1\r\n\r\n", True), (b"HEAD / HTTP/1.1\r\n\r\n", False)):
            wire = self.connect()
            wire.receive(request + LIVEZ)
            head, _, body = wire.sent.partition(b"\r\n\r\n")
            self.assertEqual((statuses(wire.sent), bool(body)), ([400], has_body))
            self.assertIn(b"\r\nConnection: close", head)
        self.assertEqual(self.factory.rejected["protocol_error"], 2)

    def test_a_whole_dataset(self) -> None:
        """It is sent in chunks, and is complete."""
        wire = self.connect()
        wire.receive(WHOLE)
        self.turns()
        head, _, body = wire.sent.partition(b"\r\n\r\n")
        self.assertIn(b"Transfer-Encoding: chunked", head)
        self.assertEqual(len(json.loads(b"".join(chunks(body)))), ROWS)

    def test_turns_of_chunks(self) -> None:
        """A turn ends after a whole chunk, however little a turn may send; an empty piece is not a chunk."""
        wire = self.connect()
        wire.protocol.bytes_per_turn = 1  # type: ignore[attr-defined]  # of a connection
        wire.receive(EVENTS)
        turns = wire.take().partition(b"\r\n\r\n")[2]
        for _ in range(10):
            chunks(turns)
            self.turns(1)
            turns = wire.take()
        self.assertEqual(list(chunked(iter([b"a", b"", b"bc"]))), [b"1\r\na\r\n", b"", b"2\r\nbc\r\n", LAST_CHUNK])

    def test_input_during_an_endless_reply(self) -> None:
        """It is bounded, however many events are sent; the connection is read on before that, to detect its end."""
        wire = self.connect()
        wire.receive(EVENTS)
        self.turns()
        received = 0
        for _ in range(100):
            if not wire.is_reading:
                break
            wire.receive(b"x" * (READ_AHEAD_BYTES // 4))
            received += READ_AHEAD_BYTES // 4
            self.clock.advance(HEARTBEAT_S + 1)
            self.turns()
        self.assertEqual((wire.is_reading, received), (False, READ_AHEAD_BYTES // 4 * 5))

    def test_a_reply_that_waits(self) -> None:
        """Requests behind one that waits are answered after it, and input that comes too early is bounded."""
        wire = self.connect()
        wire.receive(FRESH + LIVEZ)
        self.assertEqual((wire.sent, self.phase(wire)), (b"", Phase.WAITING))
        wire.receive(LIVEZ * (READ_AHEAD_BYTES // len(LIVEZ) + 1))
        self.assertFalse(wire.is_reading)
        self.publish(2)
        self.assertEqual(statuses(wire.take()), [200])
        self.settle(wire)
        self.assertEqual(len(statuses(wire.take())), READ_AHEAD_BYTES // len(LIVEZ) + 2)
        self.assertTrue(wire.is_reading)


class Ends(ConnectionTestCase):
    def test_a_client_that_closes_its_side(self) -> None:
        """It gets responses that come without an event, and then the end."""
        wire = self.connect(room_bytes=1000)
        wire.receive(WHOLE + LIVEZ)
        wire.client_closes_its_side()
        self.assertIsNone(wire.ended)
        while wire.ended is None:
            wire.client_reads()
            self.turns(1)
        self.assertEqual((statuses(wire.sent), wire.ended), ([200, 200], "closed"))
        self.assertTrue(wire.sent.endswith(b'{"status": "alive"}\n'))

    def test_between_two_requests(self) -> None:
        """Without a request in progress, the connection closes at once, also after half a head."""
        for request, answered in ((b"", []), (LIVEZ, [200]), (LIVEZ + b"GET /", [200])):
            wire = self.connect()
            if request:
                wire.receive(request)
                self.settle(wire)
            wire.client_closes_its_side()
            self.assertEqual((statuses(wire.sent), wire.ended), (answered, "closed"))

    def test_a_client_that_does_not_wait(self) -> None:
        """A reply that waits for a refresh, or never ends, ends with the client's side; a stream is complete then."""
        waiting, listening = self.connect(), self.connect()
        waiting.receive(FRESH)
        listening.receive(EVENTS)
        self.turns()
        self.assertIn(b"event: state", listening.sent)
        for wire in (waiting, listening):
            wire.client_closes_its_side()
            self.assertEqual(wire.ended, "closed")
        self.assertEqual(waiting.sent, b"")
        self.assertTrue(listening.sent.endswith(b"\r\n0\r\n\r\n"))
        self.publish(2)
        self.assertEqual(waiting.sent, b"")

    def test_a_client_that_leaves(self) -> None:
        """Nothing is left of it, whatever it was waiting for."""
        subscriptions = self.cache.events.subscription_count
        for request in (LIVEZ, WHOLE, FRESH, EVENTS, LIVEZ[:5]):
            wire = self.connect(room_bytes=5000)
            wire.receive(request)
            self.turns(3)
            wire.client_leaves()
            self.assertEqual(self.factory.clients, set())
        self.assertEqual(self.cache.events.subscription_count, subscriptions)

    def test_the_port_stops(self) -> None:
        """An event stream ends as complete, unless its client does not read; other replies in progress are aborted."""
        listening, slow, waiting, reading = wires = [self.connect() for _ in range(4)]
        listening.receive(EVENTS)
        slow.receive(EVENTS)
        self.turns()
        slow.room_bytes = 5
        self.publish(2)
        self.clock.advance(PERIOD_S)
        self.turns()
        waiting.receive(FRESH)
        reading.receive(WHOLE)
        reading.protocol.factory.close_clients()  # type: ignore[attr-defined]  # of a connection
        self.assertEqual([wire.ended for wire in wires], ["closed", "aborted", "aborted", "aborted"])
        self.assertEqual(chunks(listening.sent.partition(b"\r\n\r\n")[2])[-1], b"")
        for wire in (slow, reading):
            self.assertFalse(wire.sent.endswith(LAST_CHUNK))


class Times(ConnectionTestCase):
    def test_idle(self) -> None:
        """A silent client is disconnected after the idle timeout, which begins again with each response."""
        wire = self.connect()
        for _ in range(3):
            self.clock.advance(IDLE_S - 1)
            wire.receive(LIVEZ)
        self.clock.advance(IDLE_S - 1)
        self.assertEqual(self.phase(wire), Phase.READING)
        self.clock.advance(1)
        self.assertEqual((statuses(wire.sent), self.phase(wire)), ([200] * 3, Phase.LINGERING))

    def test_a_slow_head(self) -> None:
        """A head has one deadline from its first byte on, also behind a request, and however steadily bytes come."""
        for before in (b"", LIVEZ):
            wire = self.connect()
            self.clock.advance(IDLE_S / 2)
            wire.receive(before + LIVEZ[:1])
            self.settle(wire)
            for at in range(1, 10):
                self.clock.advance(HEAD_S / 10)
                wire.receive(LIVEZ[at : at + 1])
            self.assertEqual(len(statuses(wire.sent)), bool(before))
            self.clock.advance(HEAD_S / 10)
            self.assertEqual(statuses(wire.sent)[-1], 408)
        self.assertEqual(self.factory.rejected["slow_client"], 2)

    def test_waiting_has_no_limit(self) -> None:
        """Neither a reply that waits nor a stream that the client reads is limited."""
        listening = self.connect()
        listening.receive(EVENTS)
        for _ in range(10):
            self.clock.advance(IDLE_S)
        self.assertIsNone(listening.ended)

    def test_a_client_that_does_not_read(self) -> None:
        """It is dropped after the idle timeout, in the middle of a stream as well as of a pipeline."""
        for request in (WHOLE, ROW * 100):
            wire = self.connect(room_bytes=5000)
            self.clock.advance(IDLE_S / 2)
            wire.receive(request)
            while not wire.queue:  # a pipeline takes turns by the time that passes
                self.turns(1)
            self.assertFalse(wire.is_reading)
            self.clock.advance(IDLE_S - 1)
            self.assertIsNone(wire.ended)
            self.clock.advance(1)
            self.assertEqual(wire.ended, "aborted")
        self.assertEqual(self.factory.rejected["slow_client"], 2)


class OverTheLimit(ConnectionTestCase):
    max_connections = 0

    def test_only_probes(self) -> None:
        """A client over the limit gets one response: of a probe, or 503; then its place is free."""
        for request, status in ((LIVEZ, 200), (ROW, 503), (b"GET  /\r\n", 400)):
            wire = self.connect()
            wire.receive(request + LIVEZ)
            self.assertEqual((statuses(wire.sent), wire.ended), ([status], "closed"))
            self.assertIn(b"\r\nConnection: close\r\n", wire.sent)
        self.assertEqual(self.factory.rejected["too_many_connections"], 1)

    def test_a_silent_one(self) -> None:
        """One that sends no whole request has little time, and gets the reason when it is closed."""
        for data in (b"", LIVEZ[:9]):
            wire = self.connect()
            if data:
                wire.receive(data)
            self.clock.advance(RESERVE_S)
            self.assertEqual((statuses(wire.sent), wire.ended), ([503], "closed"))

    def test_the_oldest_is_turned_away(self) -> None:
        """If all places are taken, the oldest connection is refused for a newer one."""
        wires = [self.connect() for _ in range(17)]
        self.assertEqual([wire.ended for wire in wires], ["closed", *[None] * 16])
        self.assertEqual(statuses(wires[0].sent), [503])
