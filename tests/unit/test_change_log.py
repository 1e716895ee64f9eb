"""Laws of the log of a dataset's changes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.change_log import ChangeLog, Merge, Position
from cacheservice.cache.changes import ChangeCount
from cacheservice.cache.delta import Delta
from cacheservice.cache.framing import bulk, unframed
from cacheservice.cache.snapshot import Snapshot
from tests.kit.datasets import MOMENT, Table, rows_of, snapshot_of, table_of

KEY = st.integers(0, 30).map(lambda number: b"%d" % number)
TABLE = st.dictionaries(KEY, st.sampled_from([b"1", b"2", b"3"]), max_size=30)
PUBLISHES = st.lists(
    st.tuples(TABLE, st.integers(1, 3), st.sampled_from(["delta"] * 5 + ["unknown", "gap"])), max_size=8
)
MANY = 1_000_000


def between(old: Snapshot, new: Snapshot) -> Delta | None:
    count = ChangeCount(old.rows, new.rows)
    for _ in count:
        pass
    return count.delta


def merged(deltas: list[Delta]) -> Delta:
    merge = Merge(deltas)
    for _ in merge:
        pass
    return merge.delta


def applied(table: Table, delta: Delta) -> Table:
    kept = {key: document for key, document in table.items() if key not in delta.removed}
    return kept | {key: unframed(ready) for key, ready in delta.put.items()}


def numbered(first: int, count: int) -> Delta:
    return Delta({b"%d" % number: bulk(b"x" * 100) for number in range(first, first + count)}, frozenset())


def at(generation: int, seconds: int = 0, rows: int = 0) -> Snapshot:
    made = snapshot_of(rows_of((b"%d" % number, b"x" * 100) for number in range(rows)), generation)
    return replace(made, as_of=MOMENT + timedelta(seconds=seconds))


class Log(SynchronousTestCase):
    @given(TABLE, PUBLISHES, st.sampled_from([0, 20, MANY]), st.sampled_from([0, 20_000, MANY]))
    def test_what_it_returns(
        self, first: Table, publishes: list[tuple[Table, int, str]], most_rows: int, most_bytes: int
    ) -> None:
        """The changes since an earlier generation, applied to its rows, make exactly the rows of the newest; a
        generation before an unknown change is not known. Within the bounds, all others are."""
        log = ChangeLog(most_rows, most_bytes)
        snapshots = [snapshot_of(rows_of(first), 1)]
        log.add(snapshots[0], 0, None)
        known = 0
        for table, step, how in publishes:
            before = snapshots[-1]
            snapshot = snapshot_of(rows_of(table), before.generation + step)
            previous = before.generation - (how == "gap")
            held = len(log)
            dropped = log.add(snapshot, previous, None if how == "unknown" else between(before, snapshot))
            self.assertEqual(len(log) + len(dropped), held + (how == "delta"))
            snapshots.append(snapshot)
            if how != "delta":
                known = len(snapshots) - 1
        newest = snapshots[-1]
        self.assertLessEqual(log.rows, most_rows)
        for number, snapshot in enumerate(snapshots):
            for position in (Position.of(snapshot), Position(snapshot.generation)):
                deltas = log.since(position)
                if deltas is not None:
                    self.assertEqual(applied(table_of(snapshot.rows), merged(list(deltas))), table_of(newest.rows))
                self.assertLessEqual(number < known, deltas is None)
                if most_rows == most_bytes == MANY and number >= known:
                    self.assertIsNotNone(deltas)
        self.assertEqual(log.since(Position.of(newest)), ())

    @given(TABLE, st.lists(st.tuples(st.dictionaries(KEY, st.just(b"9")), st.frozensets(KEY)), max_size=6))
    def test_merged(self, table: Table, changes: list[tuple[Table, frozenset[bytes]]]) -> None:
        """A merged delta has the effect of all, and no key twice."""
        deltas = [
            Delta({key: bulk(value) for key, value in put.items() if key not in removed}, removed)
            for put, removed in changes
        ]
        expected = table
        for delta in deltas:
            expected = applied(expected, delta)
        together = merged(deltas)
        self.assertEqual(applied(table, together), expected)
        self.assertTrue(together.removed.isdisjoint(together.put))
        if len(deltas) == 2:
            self.assertEqual(together, deltas[0].then(deltas[1]))

    def test_steps(self) -> None:
        """A merge of many rows takes several turns; a single delta takes none."""
        self.assertEqual(len(list(Merge([numbered(0, 10_000), numbered(5_000, 10_000)]))), 10)
        self.assertEqual(list(Merge([numbered(0, 10_000)])), [])
        gone = Delta({}, frozenset(numbered(0, 10_000).put))
        self.assertEqual(len(list(Merge([numbered(0, 10_000), gone]))), 10)

    def test_positions(self) -> None:
        """A generation of another life of the service has another moment, and is not known; a bare number is taken."""
        log = ChangeLog()
        log.add(at(1), 0, None)
        log.add(at(2, seconds=1), 1, numbered(0, 1))
        for number, moment in enumerate((MOMENT, MOMENT + timedelta(seconds=1)), 1):
            right = Position(number, int(moment.timestamp()) * 1_000_000)
            self.assertIsNotNone(log.since(right))
            self.assertIsNotNone(log.since(Position(number)))
            self.assertIsNone(log.since(Position(number, right.content_us + 1)))  # type: ignore[operator]  # it has one
        for number in (0, 3, 10**18):
            self.assertIsNone(log.since(Position(number)))

    def test_text(self) -> None:
        """A position can be sent and read again; anything else is no position."""
        for position in (Position(0), Position(7), Position(7, 0), Position.of(at(12))):
            self.assertEqual(Position.parse(str(position)), position)
        self.assertEqual(str(Position.of(at(12))), "12-1767323045000000")
        for text in ("", "-1", "x", "1.5", "1-", "-", "1-2-3", "٣", " 1", "1\n", "9" * 20, "1-" + "9" * 20, "0x1"):
            self.assertIsNone(Position.parse(text), text)

    def test_bounds(self) -> None:
        """The changes use at most a share of the dataset's memory, or 256 KiB; the oldest go first."""
        log, generation = ChangeLog(), 1
        log.add(at(1, rows=1000), 0, None)
        for _ in range(50):
            generation += 1
            log.add(at(generation, rows=1000), generation - 1, numbered(0, 50))
        self.assertEqual((len(log), log.rows), (17, 850))
        self.assertLessEqual(log.size_bytes, 256 * 1024)
        self.assertIsNotNone(log.since(Position(generation - 17)))
        self.assertIsNone(log.since(Position(generation - 18)))
        log.add(at(generation + 1, rows=1000), generation, numbered(0, 5000))
        self.assertEqual((len(log), log.rows, log.size_bytes), (0, 0, 0))
        self.assertEqual(log.since(Position(generation + 1)), ())

    def test_a_large_dataset(self) -> None:
        """The share is of the newest snapshot. The largest delta that a publish carries fits."""
        log = ChangeLog()
        log.add(at(1, rows=100_000), 0, None)
        log.add(at(2, rows=100_000), 1, numbered(0, 10_000))
        self.assertIsNotNone(log.since(Position(1)))
        log = ChangeLog()
        log.add(at(1, rows=100_000), 0, None)
        log.add(at(2, rows=100_000), 1, numbered(0, 3000))
        self.assertEqual(len(log), 1)
        log.add(at(3, rows=1000), 2, numbered(0, 1))
        self.assertEqual(len(log), 1)
        self.assertIsNone(log.since(Position(1)))
