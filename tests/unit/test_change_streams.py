"""Laws of change streams, without a socket: pieces are taken as a client reads them."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache
from cacheservice.cache.change_log import Position
from cacheservice.cache.changes import ChangeCount
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.held import HeldSnapshots, Kept
from cacheservice.ports.http.bodies import PIECE_BYTES
from cacheservice.ports.http.change_events import FORMS, NDJSON_TYPE, SSE_TYPE, Form
from cacheservice.ports.http.changes import HEARTBEAT_S, ChangeStreams
from tests.kit.clocks import started_clock
from tests.kit.datasets import Table, declared, rows_of, snapshot_of
from tests.kit.logs import Log
from tests.kit.mirror import Mirror, Parser

KEYS = ["1", "2", "a/b", 'quo"te\\', "é\n", ""]
TABLE = st.dictionaries(
    st.sampled_from(KEYS).map(str.encode), st.sampled_from([b"1", b'{"a":\r\n[2]}', b'"\xc3\xa9"']), max_size=6
)
STEPS = st.one_of(
    st.tuples(st.just("publish"), TABLE),
    st.tuples(st.just("publish without a delta"), TABLE),
    st.tuples(st.sampled_from(["renew", "withdraw", "beat", "reconnect", "read", "read", "stall"]), st.just({})),
)


class Client:
    """Reads a stream piece by piece, and mirrors it."""

    def __init__(self, world: World, form: Form, at: Position | None = None, mirror: Mirror | None = None) -> None:
        self.mirror = mirror or Mirror()
        self.mirror.connected()
        self.parser = Parser(form.content_type.decode())
        self.kept = Kept({})
        self.pieces: list[bytes] = []
        self.is_over = False
        self._form = form
        self._world = world
        self._stream = world.streams.follow(world.dataset, at, form, self.kept)
        self._waits: Deferred[None] | None = None

    def read(self, pieces: int | None = None) -> None:
        """Take so many pieces, or all that there are now."""
        while pieces is None or pieces > 0:
            if self._waits is not None and not self._waits.called:
                return
            piece = next(self._stream, None)
            if piece is None:
                self.is_over = True
                return
            if isinstance(piece, Deferred):
                self._waits = piece
                continue
            self.pieces.append(piece)
            for event in self.parser.feed(piece):
                self.mirror.apply(event)
            if pieces is not None:
                pieces -= 1

    def close(self) -> None:
        self._stream.close()  # type: ignore[attr-defined]  # it is a generator
        self.kept.end()

    def again(self) -> Client:
        """Reconnect as a browser does, with the last position."""
        self.close()
        return Client(self._world, self._form, Position.parse(self.mirror.position), self.mirror)


class World:
    """A dataset and its streams; `tables` has the rows of each generation."""

    def __init__(self, **settings: Any) -> None:
        self.clock = started_clock()
        self.cache = Cache([declared("products", **settings), declared("prices")], self.clock.seconds)
        self.streams = ChangeStreams(self.cache, self.clock)
        self.dataset = self.cache.dataset("products")
        self.tables: dict[int, Table] = {}

    def publish(self, table: Table, *, with_delta: bool = True) -> Snapshot:
        before = self.dataset.snapshot
        snapshot = snapshot_of(rows_of(table), self.dataset.last_generation + 1, self.clock.seconds())
        delta = None
        if before is not None and with_delta:
            count = ChangeCount(before.rows, snapshot.rows)
            for _ in count:
                pass
            delta = count.delta
        self.tables[snapshot.generation] = table
        self.dataset.publish(snapshot, delta)
        return snapshot

    def renew(self) -> None:
        self.clock.advance(1.0)
        assert self.dataset.snapshot is not None
        self.dataset.renew(replace(self.dataset.snapshot, read_at=self.clock.seconds()))

    def expected(self, generation: int) -> dict[str, Any]:
        return {key.decode(): json.loads(document) for key, document in self.tables[generation].items()}


def numbered(count: int, document: bytes = b"1") -> Table:
    return {b"%d" % number: document for number in range(count)}


class Laws(SynchronousTestCase):
    @given(TABLE, st.lists(STEPS, max_size=25), st.sampled_from(list(FORMS.values())))
    def test_every_generation_is_whole(self, first: Table, steps: list[tuple[str, Table]], form: Form) -> None:
        """Each time that a client's rows are complete, they are exactly those of that generation, which never goes
        back; in the end they are those of the served one. So it is for slow clients, and across reconnects."""
        world = World()
        world.publish(first)
        client = Client(world, form)
        for step, table in steps:
            if step.startswith("publish"):
                world.clock.advance(0.1)
                world.publish(table, with_delta=step == "publish")
            elif step == "renew" and world.dataset.snapshot is not None:
                world.renew()
            elif step == "withdraw":
                world.dataset.withdraw()
            elif step == "beat":
                world.clock.advance(HEARTBEAT_S)
            elif step == "reconnect":
                client = client.again()
            elif step == "read":
                client.read(2)
        if world.dataset.snapshot is None:
            world.publish(first)
        client.read()
        mirror = client.mirror
        for generation, rows in mirror.states:
            self.assertEqual(rows, world.expected(generation))
        generations = [generation for generation, _ in mirror.states]
        self.assertEqual(generations, sorted(generations))
        self.assertEqual(mirror.generation, world.dataset.last_generation)
        world.cache.declare([declared("prices")])
        client.read()
        self.assertTrue(client.is_over and mirror.is_ended and client.parser.is_between_events)
        client.close()
        self.assertEqual((world.streams.count, world.clock.getDelayedCalls()), (0, []))


class Streams(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = World()
        self.world.publish(numbered(3))
        self.form = FORMS[NDJSON_TYPE]

    def client(self, at: Position | None = None, form: Form | None = None) -> Client:
        mirror = Mirror()
        if at is not None and at.generation in self.world.tables:
            mirror.rows = self.world.expected(at.generation)
        client = Client(self.world, form or self.form, at, mirror)
        self.addCleanup(client.close)
        return client

    def test_the_default_is_sse(self) -> None:
        """Without an Accept header, a client gets server-sent events, with a pause of its own before it reconnects."""
        self.assertEqual(list(FORMS), [SSE_TYPE, NDJSON_TYPE])
        pauses = set()
        for _ in range(50):
            client = self.client(form=FORMS[SSE_TYPE])
            client.read()
            pauses.add(client.parser.retry_ms)
        self.assertGreater(len(pauses), 25)
        self.assertLessEqual(pauses, set(range(1000, 4001)))

    def test_snapshot_then_changes(self) -> None:
        """A new client gets the snapshot, then each publish as its delta, and a renewal as its age."""
        client = self.client()
        client.read()
        self.assertEqual(client.mirror.kinds(), ["snapshot", "rows", "generation"])
        self.world.publish({b"0": b"1", b"1": b"2", b"9": b"3"})
        client.read()
        self.assertEqual(client.mirror.events[3:5], [
            {"event": "rows", "put": {"1": 2, "9": 3}, "removed": []},
            {"event": "rows", "put": {}, "removed": ["2"]},
        ])  # fmt: skip
        self.assertEqual((client.mirror.generation, client.mirror.rows), (2, {"0": 1, "1": 2, "9": 3}))
        self.world.renew()
        self.world.clock.advance(0.5)
        client.read()
        self.assertEqual(
            client.mirror.events[-1],
            {"event": "renewed", "dataset": "products", "generation": 2, "position": client.mirror.position,
             "rows": 3, "as_of": "2026-01-02T03:04:05Z", "age_s": 0.5},
        )  # fmt: skip
        client.read()
        self.assertEqual(len(client.mirror.events), 7)

    def test_resume(self) -> None:
        """A client with a kept generation gets what has changed since; one with the served one gets its age."""
        first = Position.of(self.world.publish(numbered(4)))
        self.world.publish(numbered(5))
        self.world.publish(numbered(6))
        for at in (first, Position(2)):
            client = self.client(at)
            client.read()
            self.assertEqual(client.mirror.kinds(), ["rows", "generation"])
            self.assertEqual(client.mirror.events[0]["put"], {"4": 1, "5": 1})
        client = self.client(Position(4))
        client.read()
        self.assertEqual(client.mirror.kinds(), ["renewed"])

    def test_what_is_not_known_gets_a_snapshot(self) -> None:
        """Generation 0, one that never was, one of another life of the service, and one before an unknown change."""
        self.world.publish(numbered(4))
        unknown = [Position(0), Position(4), Position(10**18), Position(1, 1), Position(2, 1)]
        self.world.publish(numbered(5), with_delta=False)
        for at in (*unknown, Position(2), None):
            client = self.client(at)
            client.read()
            self.assertEqual(client.mirror.kinds(), ["snapshot", "rows", "generation"], at)
            self.assertEqual(client.mirror.rows, self.world.expected(3))

    def test_a_slow_client(self) -> None:
        """It gets all changes since its last generation at once, each key once."""
        client = self.client()
        client.read()
        for number in range(20):
            self.world.publish({b"0": b"%d" % number, b"x%d" % number: b"1"})
        client.read()
        self.assertEqual(client.mirror.kinds()[3:], ["rows", "rows", "generation"])
        _, _, _, put, removed, done = client.mirror.events
        self.assertEqual(put["put"], {"0": 19, "x19": 1})
        self.assertEqual(done["generation"], 21)
        self.assertEqual(client.mirror.rows, self.world.expected(21))
        self.assertLessEqual({"1", "2", "x0"}, set(removed["removed"]))

    def test_publish_during_the_snapshot(self) -> None:
        """A snapshot is completed as it began; what was published meanwhile follows."""
        self.world.publish(numbered(5000))
        client = self.client()
        client.read(4)
        self.world.publish(numbered(5001))
        client.read()
        self.assertEqual([generation for generation, _ in client.mirror.states], [2, 3])
        self.assertEqual(client.mirror.kinds().count("snapshot"), 1)

    def test_the_snapshot_is_kept_only_while_it_is_sent(self) -> None:
        """It counts among those that readers hold while it is sent, and is free afterwards, also for a merged delta."""
        held = HeldSnapshots(self.world.cache, self.world.clock, Log(), 2, 60.0)

        class Reader:
            def drop_slow(self) -> str:
                raise AssertionError("it is not slow")

        self.world.publish(numbered(5000))
        client = self.client()
        client.kept.begin(held, Reader())
        client.read(3)
        assert self.world.dataset.snapshot is not None
        rows = weakref.ref(self.world.dataset.snapshot.rows)
        self.world.clock.advance(30.0)  # its time begins with the snapshot, not with the stream
        self.world.publish(numbered(5001), with_delta=False)
        self.assertEqual(list(held.superseded()), [("products", 2)])
        client.read()
        self.assertEqual(held.superseded(), {})
        gc.collect()
        self.assertIsNone(rows())
        for number in range(5002, 5005):
            self.world.publish(numbered(number))
        rows = weakref.ref(self.world.dataset.snapshot.rows)
        client.read()
        self.world.publish(numbered(1))
        gc.collect()
        self.assertIsNone(rows(), "a client that waits keeps nothing")

    def test_pieces(self) -> None:
        """No piece is much larger than 64 KiB, also for large documents and many or long keys; no generation is
        complete before its last event."""
        large = b'"%b"' % (b"x" * 1_000_000)
        table = numbered(3000, b'"%b"' % (b"y" * 200)) | {b"large": large, b"lines": b"[1,\r\n%b]" % large}
        for form in FORMS.values():
            world = World()
            world.publish({b"%d" % number + b"k" * 10_000: b"1" for number in range(100)})
            client = Client(world, form)
            client.read()
            world.publish(table)
            client.read()
            self.assertLess(max(map(len, client.pieces)), 3 * PIECE_BYTES)
            self.assertEqual([generation for generation, _ in client.mirror.states], [1, 2])
            self.assertEqual(len(client.mirror.rows), 3002)
            self.assertEqual(client.mirror.rows["large"], "x" * 1_000_000)
            client.close()

    def test_a_change_that_is_not_kept_any_more(self) -> None:
        """A large change that the log drops is freed slice by slice, but not under a client that still reads it."""
        table = numbered(30_000)
        self.world.publish(table)
        reading, waiting = self.client(), self.client()
        for client in (reading, waiting):
            client.read()
        changed = table | numbered(3000, b"2")
        self.world.publish(changed)
        reading.read(2)
        self.world.publish(changed | {b"x": b"1"}, with_delta=False)
        for _ in range(100):
            self.world.clock.advance(0.001)
        for client in (reading, waiting):
            client.read()
            self.assertEqual(client.mirror.rows, self.world.expected(4))
        self.assertEqual([generation for generation, _ in reading.mirror.states], [2, 3, 4])
        self.assertEqual(reading.mirror.states[1][1], self.world.expected(3))
        for number in (5, 6):  # that nobody reads
            self.world.publish(changed | numbered(3000, b"%d" % number), with_delta=number == 5)
        for _ in range(100):
            self.world.clock.advance(0.001)
        self.assertLessEqual(len(self.world.clock.getDelayedCalls()), 1)

    def test_heartbeats(self) -> None:
        """A client that gets nothing else gets a sign of life at least every 10 s, also one without data."""
        clients = [self.client(), self.client(form=FORMS[SSE_TYPE])]
        self.world.dataset.withdraw()
        for number in range(1, 4):
            for client in clients:
                client.read()
            self.assertEqual(clients[0].mirror.kinds(), ["alive"] * (number - 1))
            self.assertEqual(clients[1].parser.comments, number - 1)
            self.world.clock.advance(HEARTBEAT_S)

    def test_expired(self) -> None:
        """With on_expired = "refuse", nothing that is too old is sent; the next publish or renewal is."""
        self.world = World(on_expired="refuse", max_age_s=100.0)
        self.world.publish(numbered(1))
        client = self.client()
        client.read()
        old = snapshot_of(rows_of(numbered(2)), 2, self.world.clock.seconds() - 1000.0)
        self.world.dataset.publish(old)
        client.read()
        self.assertEqual(client.mirror.generation, 1)
        self.world.publish(numbered(3))
        client.read()
        self.assertEqual(client.mirror.generation, 3)

    def test_operators(self) -> None:
        """A pin changes nothing; unpin and rollback are publishes, whose changes are not known."""
        client = self.client()
        client.read()
        self.world.dataset.pin()
        self.world.dataset.keep(snapshot_of(rows_of(numbered(9)), 2, self.world.clock.seconds()))
        client.read()
        self.assertEqual(client.mirror.kinds(), ["snapshot", "rows", "generation"])
        saved = self.world.dataset.snapshot
        assert saved is not None
        self.world.dataset.unpin()
        client.read()
        self.assertEqual((client.mirror.generation, len(client.mirror.rows)), (2, 9))
        self.world.dataset.roll_back(saved)
        client.read()
        self.assertEqual((client.mirror.generation, len(client.mirror.rows)), (3, 3))
        self.assertEqual(client.mirror.kinds().count("snapshot"), 3)

    def test_removed_and_declared_again(self) -> None:
        """A removed dataset ends its streams; a new one with its name is another, whose generations go on."""
        client = self.client()
        client.read()
        position = Position.parse(client.mirror.position)
        prices, products = (self.world.cache.dataset(name).settings for name in ("prices", "products"))
        self.world.cache.declare([prices])
        self.world.cache.declare([prices, products])
        client.read()
        self.assertTrue(client.is_over and client.mirror.is_ended)
        self.world.dataset = self.world.cache.dataset("products")
        self.world.publish(numbered(2))
        client = self.client(position)
        client.read()
        self.assertEqual((client.mirror.kinds()[0], client.mirror.generation), ("snapshot", 2))

    def test_redefined(self) -> None:
        """A changed query keeps its streams: its first result is compared with the rows that are served."""
        client = self.client()
        client.read()
        self.world.cache.declare([declared("products", query="SELECT 2 AS id"), declared("prices")])
        self.world.publish(numbered(4))
        client.read()
        self.assertEqual(client.mirror.kinds()[3:], ["rows", "generation"])

    def test_a_group(self) -> None:
        """Each dataset of a group has its own stream, which is not woken by the other."""
        prices = self.world.cache.dataset("prices")
        prices.publish(snapshot_of(rows_of({b"p": b"1"}), 1, self.world.clock.seconds()))
        products = self.client()
        self.world.dataset = prices
        other = self.client()
        for client in (products, other):
            client.read()
        prices.publish(snapshot_of(rows_of({b"p": b"2"}), 2, self.world.clock.seconds()))
        for client in (products, other):
            client.read()
        self.assertEqual((products.mirror.generation, other.mirror.generation), (1, 2))
        self.assertEqual(other.mirror.rows, {"p": 2})

    def test_the_stop(self) -> None:
        """It ends every stream after a whole event, also during a snapshot, and does not complete the generation."""
        self.world.publish(numbered(5000) | {b"large": b'"%b"' % (b"x" * 1_000_000)})
        waiting, fresh = self.client(), self.client(form=FORMS[SSE_TYPE])
        waiting.read()
        during = []
        for pieces in range(1, 30):
            client = self.client()
            client.read(pieces)
            during.append(client)
        self.world.streams.stop()
        for client in (waiting, fresh, *during):
            client.read()
            self.assertTrue(client.is_over and client.parser.is_between_events)
        self.assertEqual(waiting.mirror.kinds().count("generation"), 1)
        self.assertEqual((self.world.streams.count, self.world.clock.getDelayedCalls()), (0, []))

    def test_a_snapshot_before_the_streams(self) -> None:
        """What was loaded before the port began is known."""
        self.world.streams = ChangeStreams(self.world.cache, self.world.clock)
        client = self.client(Position(1))
        client.read()
        self.assertEqual(client.mirror.kinds(), ["renewed"])
        self.world.publish(numbered(4))
        client.read()
        self.assertEqual(client.mirror.kinds()[1:], ["rows", "generation"])
