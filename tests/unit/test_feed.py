"""A sender and a follower, with a connection in memory: what the follower publishes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.clock import Host
from cacheservice.cache.cache import Cache
from cacheservice.cache.changes import Change
from cacheservice.cache.delta import NO_CHANGE
from cacheservice.cache.events import Event, Published, Renewed
from cacheservice.cache.framing import unframed
from cacheservice.cache.lag import Lag
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Rows
from cacheservice.replication.encoder import Encoder
from cacheservice.replication.follower import Follower
from cacheservice.replication.outbox import Outbox, Update
from cacheservice.replication.sender import Sender
from cacheservice.sources.frames.clocks import Clocks
from tests.kit.datasets import Table, declared, numbered_rows, rows_of, snapshot_of, table_of
from tests.kit.logs import Log

NAMES = ("products", "prices")
KEY = st.integers(0, 30).map(lambda number: b"%d" % number)
CHANGES = st.dictionaries(KEY, st.none() | st.sampled_from([b"1", b"2"]), max_size=12)


class Connection:
    """An ordered connection; `deliver` hands over its oldest messages."""

    def __init__(self) -> None:
        self.messages: deque[tuple[str, object]] = deque()
        self.lost = False
        self.frames_bytes = 0
        self.sent: list[str] = []

    def send(self, name: str, /, **fields: str | int) -> None:
        self.messages.append((name, fields))
        self.sent.append(name)

    def send_frames(self, data: bytes, /) -> None:
        self.frames_bytes += len(data)
        self.messages.append(("", data))

    def lose(self) -> None:
        self.lost = True


class Pair:
    """A cache, and another one that follows it."""

    def __init__(self, group: str = "shop") -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.log = Log()
        settings = [declared(name, group=group) for name in NAMES]
        self.leader = Cache(settings, self.clock.seconds)
        self.replica = Cache(settings, self.clock.seconds)
        self.down, self.up = Connection(), Connection()
        clocks = Clocks(self.clock, lambda: 2e9 + self.clock.seconds(), Host("boot", "machine"), self.clock.seconds)
        self.sender = Sender(self.leader, self.down, Encoder(clocks), self.clock, self.log)
        self.follower = Follower(
            self.replica, self.up, lambda _: None, lambda head: clocks.read_at(head.header), self.clock, self.log
        )
        self.is_live = False

    def deliver(self, count: int = 1_000_000) -> None:
        """Deliver at most so many messages of each direction."""
        self.deliver_down(count)
        for _ in range(min(count, len(self.up.messages))):
            name, content = self.up.messages.popleft()
            assert isinstance(content, dict)
            {"taken": self.sender.taken, "resend": self.sender.resend}[name](**content)

    def deliver_down(self, count: int = 1_000_000) -> None:
        """Deliver at most so many messages of the sender."""
        for _ in range(min(count, len(self.down.messages))):
            name, content = self.down.messages.popleft()
            if isinstance(content, bytes):
                self.follower.received(content)
            elif name == "commit":
                self.follower.then(self.follower.commit)
            elif name == "withdraw":
                assert isinstance(content, dict)
                self.follower.then(lambda dataset=content["name"]: self.follower.withdraw(dataset))
            else:
                self.is_live = True

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.advance(0)

    def settle(self) -> None:
        """Deliver everything, until nothing more happens."""
        for _ in range(10_000):
            self.deliver()
            self.turn()
            if not (self.down.messages or self.up.messages or self.clock.getDelayedCalls()):
                return
        raise AssertionError("it does not settle")

    def publish(self, name: str, rows: Rows, *, patch: RowsPatch | None = None) -> None:
        dataset = self.leader.dataset(name)
        snapshot = snapshot_of(rows, dataset.last_generation + 1, self.clock.seconds() - 0.25)
        dataset.publish(snapshot, None if patch is None else patch.delta)

    def change(self, name: str, changes: dict[bytes, bytes | None]) -> None:
        """Publish a delta."""
        served = self.leader.dataset(name).snapshot
        assert served is not None
        patch = RowsPatch(served.rows)
        for key, document in changes.items():
            if document is None:
                patch.remove(key)
            else:
                patch.put(key, document)
        self.publish(name, patch.finish(), patch=patch)


def rows_in(cache: Cache, name: str) -> Rows:
    snapshot = cache.dataset(name).snapshot
    assert snapshot is not None
    return snapshot.rows


class Feeds(SynchronousTestCase):
    def test_a_snapshot_with_all_that_readers_see(self) -> None:
        pair = Pair()
        snapshot = replace(
            snapshot_of(numbered_rows(2000), 7, 999.5, columns=("id",), change=Change(1, 2, 3)),
            lag=Lag(0.5, True, "behind"),
            rolled_back_to=3,
            watch_state="state",
            probe="5",
            source="disk",
            age_uncertain="it was saved by an older version",
        )
        pair.leader.dataset("products").publish(snapshot)
        pair.sender.start()
        self.assertFalse(pair.is_live)
        pair.settle()
        self.assertTrue(pair.is_live)
        received = pair.replica.dataset("products").snapshot
        assert received is not None
        self.assertEqual(replace(received, rows=snapshot.rows), snapshot)
        self.assertEqual(table_of(received.rows), table_of(snapshot.rows))
        self.assertIsNone(pair.replica.dataset("prices").snapshot)
        self.assertEqual(pair.replica.dataset("products").age_s(), 0.5)

    def test_an_empty_cache_is_live_at_once(self) -> None:
        pair = Pair()
        pair.sender.start()
        pair.settle()
        self.assertTrue(pair.is_live)
        pair.publish("products", numbered_rows(3))
        pair.settle()
        self.assertEqual(table_of(rows_in(pair.replica, "products")), table_of(numbered_rows(3)))

    def test_a_delta_costs_its_rows_only(self) -> None:
        """A delta of one row is a few hundred bytes, and its event carries the row."""
        pair = Pair()
        pair.publish("products", numbered_rows(5000))
        pair.sender.start()
        pair.settle()
        seen: list[Event] = []
        pair.replica.events.subscribe(seen.append, Published)
        pair.down.frames_bytes = 0
        pair.change("products", {b"17": b"new", b"18": None})
        pair.settle()
        self.assertLess(pair.down.frames_bytes, 1500)
        self.assertEqual(rows_in(pair.replica, "products").get(b"17"), b"new")
        self.assertEqual(rows_in(pair.replica, "products").count, 4999)
        (event,) = seen
        assert isinstance(event, Published)
        assert event.delta is not None
        self.assertEqual((set(event.delta.put), event.delta.removed), ({b"17"}, {b"18"}))
        self.assertEqual((event.previous, event.generation), (1, 2))

    def test_a_renewal(self) -> None:
        """A renewal carries no row; the rows stay the same object."""
        pair = Pair()
        pair.publish("products", numbered_rows(50))
        pair.sender.start()
        pair.settle()
        before: Rows = rows_in(pair.replica, "products")
        seen: list[Event] = []
        pair.replica.events.subscribe(seen.append, Published, Renewed)
        dataset = pair.leader.dataset("products")
        assert dataset.snapshot is not None
        pair.clock.advance(10)
        dataset.renew(replace(dataset.snapshot, read_at=pair.clock.seconds()))
        pair.settle()
        self.assertIs(rows_in(pair.replica, "products"), before)
        self.assertEqual([type(event) for event in seen], [Renewed])
        self.assertEqual(pair.replica.dataset("products").age_s(), 0.0)

    def test_a_slow_receiver_is_not_sent_more_than_it_takes(self) -> None:
        """The sender stops at its window; what is published meanwhile is merged into one batch."""
        pair = Pair()
        large = rows_of({b"%d" % number: b"x" * 10_000 for number in range(1000)})
        pair.publish("products", large)
        pair.sender.start()
        pair.turn(2000)
        self.assertLess(pair.down.frames_bytes, 3_000_000)
        for number in range(50):
            pair.change("products", {b"%d" % number: b"new"})
        pair.settle()
        self.assertEqual(table_of(rows_in(pair.replica, "products")), table_of(rows_in(pair.leader, "products")))
        self.assertEqual(pair.down.sent.count("commit"), 2)
        self.assertLess(pair.down.frames_bytes, 11_000_000)

    def test_withdrawn(self) -> None:
        pair = Pair()
        pair.publish("products", numbered_rows(5))
        pair.sender.start()
        pair.settle()
        pair.leader.dataset("products").withdraw()
        pair.settle()
        self.assertIsNone(pair.replica.dataset("products").snapshot)
        pair.publish("products", numbered_rows(6))
        pair.settle()
        self.assertEqual(rows_in(pair.replica, "products").count, 6)

    def test_a_group_waits_for_a_dataset_that_is_lacking(self) -> None:
        """A delta that cannot be applied is requested again, and the rest of its group waits for it."""
        pair = Pair()
        for name in NAMES:
            pair.publish(name, numbered_rows(50))
        pair.sender.start()
        pair.settle()
        seen: list[Event] = []
        pair.replica.dataset("products").withdraw()
        pair.replica.events.subscribe(seen.append, Published)
        for name in NAMES:
            pair.change(name, {b"1": b"new"})
        pair.turn(20)
        while pair.down.messages:  # everything is delivered but the request
            pair.deliver_down()
            pair.turn(20)
        self.assertEqual(seen, [])
        self.assertIn("resend", pair.up.sent)
        pair.settle()
        self.assertEqual([event.dataset for event in seen], ["prices", "products"])
        self.assertEqual([rows_in(pair.replica, name).get(b"1") for name in NAMES], [b"new", b"new"])
        self.assertEqual(pair.log.events, [])

    def test_damaged_frames_end_the_connection(self) -> None:
        """The follower publishes nothing of damaged frames, and begins again."""
        pair = Pair()
        pair.publish("products", numbered_rows(5))
        pair.sender.start()
        pair.turn(3)
        name, content = pair.down.messages[0]
        assert isinstance(content, bytes)
        pair.down.messages[0] = name, content[:-3] + b"xyz"
        pair.settle()
        self.assertTrue(pair.up.lost)
        self.assertIsNone(pair.replica.dataset("products").snapshot)
        self.assertEqual([event for event, _ in pair.log.events][:1], ["feed_broken"])

    def test_a_stop_ends_everything(self) -> None:
        pair = Pair()
        pair.publish("products", numbered_rows(50_000))
        pair.sender.start()
        pair.turn(5)
        pair.deliver()
        pair.sender.stop()
        pair.follower.stop()
        pair.turn(5)
        self.assertEqual(pair.clock.getDelayedCalls(), [])
        self.assertFalse(pair.down.lost or pair.up.lost)

    @settings(deadline=None, max_examples=150)
    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("delta"), CHANGES, CHANGES),
                st.tuples(st.just("full"), CHANGES, CHANGES),
                st.tuples(st.just("renew"), st.just({}), st.just({})),
                st.tuples(st.just("deliver"), st.integers(0, 5), st.integers(0, 5)),
                st.tuples(st.just("lose"), st.sampled_from(NAMES), st.none()),
            ),
            max_size=30,
        )
    )
    def test_any_order(self, steps: Sequence[tuple[str, object, object]]) -> None:
        """Whatever is published and delivered when, the follower publishes what the leader served, and groups whole.

        Each of its events has the rows that differ; at the end it has everything.
        """
        pair = Pair()
        served: dict[tuple[str, int], Table] = {}
        moments: set[tuple[int, ...]] = {(0, 0)}
        tables: dict[str, Table] = {name: {} for name in NAMES}

        def published(event: object) -> None:
            assert isinstance(event, Published)
            rows = table_of(event.snapshot.rows)
            self.assertEqual(rows, served[event.dataset, event.generation])
            if event.delta is not None:
                kept = {key: row for key, row in tables[event.dataset].items() if key not in event.delta.removed}
                changed = {key: unframed(ready) for key, ready in event.delta.put.items()}
                self.assertEqual(kept | changed, rows)
            tables[event.dataset] = rows

        pair.replica.events.subscribe(published, Published)
        for name in NAMES:
            pair.publish(name, rows_of({}))
            served[name, 1] = {}
        moments.add((1, 1))
        pair.sender.start()
        for kind, first, second in steps:
            if kind in ("delta", "full"):
                for name, changes in zip(NAMES, (first, second), strict=True):
                    assert isinstance(changes, dict)
                    if kind == "delta":
                        pair.change(name, changes)
                    else:
                        pair.publish(name, rows_of({key: row for key, row in changes.items() if row is not None}))
                    generation = pair.leader.dataset(name).last_generation
                    served[name, generation] = table_of(rows_in(pair.leader, name))
                moments.add(tuple(pair.leader.dataset(name).last_generation for name in NAMES))
            elif kind == "renew":
                for name in NAMES:
                    dataset = pair.leader.dataset(name)
                    assert dataset.snapshot is not None
                    dataset.renew(replace(dataset.snapshot, read_at=pair.clock.seconds()))
            elif kind == "lose":
                assert isinstance(first, str)
                pair.sender.resend(first)
            else:
                assert isinstance(first, int)
                assert isinstance(second, int)
                pair.deliver(first)
                pair.turn(second)
            self.assertIn(tuple(pair.replica.dataset(name).last_generation for name in NAMES), moments)
        pair.settle()
        for name in NAMES:
            self.assertEqual(table_of(rows_in(pair.replica, name)), table_of(rows_in(pair.leader, name)))
            self.assertEqual(pair.replica.dataset(name).last_generation, pair.leader.dataset(name).last_generation)
        self.assertEqual(pair.log.events, [])


class Outboxes(SynchronousTestCase):
    def test_a_gap_needs_all_rows(self) -> None:
        """A delta on another generation than the receiver has is of no use to it."""
        outbox = Outbox()
        outbox.resend("products", 1)
        self.assertEqual(outbox.take(), {"products": Update(0, None, 1)})
        outbox.published(Published("products", snapshot_of(numbered_rows(1), 3), 2, NO_CHANGE))
        self.assertEqual(outbox.take(), {"products": Update(0, None, 3)})

    def test_renewals_of_the_unknown(self) -> None:
        outbox = Outbox()
        outbox.renewed("products")
        self.assertTrue(outbox.is_empty)
