"""Laws of reads that are compared, row by row, with the rows before."""

from __future__ import annotations

import weakref
from random import Random
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import BadResult
from cacheservice.cache.changes import ChangeCount
from cacheservice.cache.delta import Delta
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import SHARD_COUNT, Rows, RowsBuilder
from tests.kit.datasets import rows_of, table_of
from tests.kit.refreshes import RefreshTestCase

Table = dict[bytes, bytes]

tables = st.dictionaries(st.binary(max_size=2), st.sampled_from([b"", b"1", b"2"]), max_size=60)


def empty_rows(shards: int, count: int = 0) -> Rows:
    return Rows([[{} for _ in range(shards)]], count, 0, lambda _: None)


def laid_out(expected: int, before: Rows | None = None) -> Rows:
    builder = RowsBuilder(lambda _: None)
    builder.expect(expected, before)
    return builder.finish()


def compared(before: Rows, table: Table, *, patched: bool = False) -> tuple[Rows, list[bytes] | None]:
    """The rows of a read that is compared with those before, and the keys that differ."""
    builder = RowsBuilder(lambda _: None, patched=patched)
    builder.expect(len(table), before)
    rows = list(table.items())
    for first in range(0, len(rows), 64):
        builder.add(rows[first : first + 64])
    return builder.finish(), builder.differing


def counted(count: ChangeCount) -> tuple[object, ...]:
    for _ in count:
        pass
    delta: Delta | None = count.delta
    # Of many unexpected keys, the list has any ten.
    unexpected = sorted(count.unexpected) if count.unexpected_count <= 10 else len(count.unexpected)
    return count.change, delta, count.digest, count.unexpected_count, unexpected


class Layout(SynchronousTestCase):
    def test_large_results_have_more_shards(self) -> None:
        """No shard of any result has many thousand rows, and all shards are in one group, as the hot path expects."""
        for rows, shards in ((0, 256), (1_000_000, 256), (1_048_576, 256), (1_048_577, 512), (10_000_000, 4096)):
            found = laid_out(rows)
            self.assertEqual((found.mask + 1, len(found.groups)), (shards, 1))

    def test_the_number_of_shards_stays(self) -> None:
        """A result near a boundary is not laid out differently each time, and never in larger shards."""
        for rows, before, shards in (
            (1_048_577, 512, 512),
            (1_048_576, 512, 512),
            (1_000_000, 1024, 1024),
            (1_000_000, 2048, 256),
            (1_048_577, 256, 512),
        ):
            self.assertEqual(laid_out(rows, empty_rows(before)).mask + 1, shards)


def shuffled_in_part(table: Table, moved: int, random: Random) -> Table:
    """The same rows; at most so many are at other places."""
    keys = list(table)
    places = random.sample(range(len(keys)), min(moved, len(keys)))
    for place, key in zip(places, [keys[place] for place in sorted(places)], strict=True):
        keys[place] = key
    return {key: table[key] for key in keys}


class Compared(SynchronousTestCase):
    @settings(deadline=None)
    @given(tables, tables, st.booleans(), st.sets(st.binary(max_size=2), max_size=20) | st.none())
    def test_a_comparison_during_the_read_is_one_after_it(
        self, old: Table, new: Table, digested: bool, expected: set[bytes] | None
    ) -> None:
        """The rows, the changes, the delta and the digest are the same, whenever the results are compared."""
        before = rows_of(old)
        if digested:
            for _ in before.digesting():
                pass
        rows, differing = compared(before, new)
        self.assertEqual(table_of(rows), new)
        self.assertEqual(rows.size_bytes, sum(len(key) + len(document) for key, document in new.items()))
        self.assertEqual(differing, [key for key in new if old.get(key) != new[key]])
        self.assertEqual(
            counted(ChangeCount(before, rows, expected, differing)),
            counted(ChangeCount(before, rows_of(new), expected)),
        )

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 2**32), st.sampled_from([600, 3000]), st.sampled_from(range(0, 3001, 50)), st.booleans())
    def test_any_order(self, seed: int, count: int, moved: int, patched: bool) -> None:
        """Rows may come in any order, and others may be added, changed and removed anywhere."""
        random = Random(seed)
        old = {b"%d" % number: b"old" for number in range(count)}
        before, _ = compared(rows_of({}), old, patched=patched)
        new = shuffled_in_part(old, moved, random)
        for key in random.sample(list(old), moved // 20):
            if random.random() < 0.5:
                del new[key]
            else:
                new[key] = b"new"
        for number in range(moved // 20):
            new[b"new %d" % number] = b"new"
        new = shuffled_in_part(new, moved // 10, random)
        rows, differing = compared(before, new, patched=patched)
        self.assertEqual((table_of(rows), rows.count), (new, len(new)))
        self.assertEqual(differing, [key for key in new if old.get(key) != new[key]])
        self.assertEqual(table_of(before), old)

    def test_equal_shards_are_shared(self) -> None:
        """What is equal and comes in the same order takes no memory: neither for documents, nor for keys and dicts."""
        old = {b"%d" % number: b"document %d" % number for number in range(9000)}
        for patched in (False, True):
            before, _ = compared(rows_of({}), old, patched=patched)
            rows, _ = compared(before, {**old, b"7": b"another"}, patched=patched)
            differ = [place for place in range(rows.mask + 1) if rows.shard(place) is not before.shard(place)]
            self.assertEqual(differ, [crc32(b"7") & rows.mask])
            self.assertEqual(
                [new is not old for old, new in zip(before.groups, rows.groups, strict=True)].count(True), 1
            )

    def test_settling(self) -> None:
        """What differs in a large result is put together in many turns, a few shards in each."""
        old = {b"%d" % number: b"old" for number in range(40_000)}
        before = rows_of(old)
        builder = RowsBuilder(lambda _: None)
        builder.expect(40_000, before)
        new = {**old, **dict.fromkeys(Random(1).sample(list(old), 2000), b"new")}
        rows = list(new.items())
        for first in range(0, len(rows), 64):
            builder.add(rows[first : first + 64])
        # 256 shards of 156 rows, and nearly each has some that differ.
        self.assertGreaterEqual(sum(1 for _ in builder.settling), 7)
        self.assertEqual(table_of(builder.finish()), new)

    def test_a_result_in_another_order(self) -> None:
        """After a thousand rows that come unexpectedly each row is looked up, which costs less; nothing is lost."""
        old = {b"%d" % number: b"%d" % number for number in range(5000)}
        new = dict(reversed(old.items()))
        before = rows_of(old)
        rows, differing = compared(before, new)
        self.assertEqual((table_of(rows), differing), (new, []))
        self.assertIsNot(rows.groups[0][0], before.groups[0][0])
        self.assertIs(rows.bulk(b"4711"), before.bulk(b"4711"))

    def test_equal_rows_keep_their_documents(self) -> None:
        """A second generation takes memory for the documents that differ, in ordinary rows and in patched ones."""
        old = {b"%d" % number: b"document %d" % number for number in range(2000)}
        new = {**old, b"7": b"another"}
        for patched in (False, True):
            builder = RowsBuilder(lambda _: None, patched=patched)
            builder.add(list(old.items()))
            before = builder.finish()
            rows, _ = compared(before, new, patched=patched)
            self.assertEqual([key for key in new if rows.bulk(key) is not before.bulk(key)], [b"7"])

    def test_documents_of_any_length(self) -> None:
        """Documents are compared to the last byte, whatever their headers look like."""
        for size in (0, 1, 9, 10, 99, 100, 4095, 4096, 9999, 10_000):
            for other in (b"x" * size + b"y", b"x" * max(0, size - 1) + b"y", b"x" * size):
                old, new = {b"1": b"x" * size, b"2": b""}, {b"1": other, b"2": b""}
                rows, differing = compared(rows_of(old), new)
                self.assertEqual((table_of(rows), differing), (new, [b"1"] if other != old[b"1"] else []))

    def test_bad_keys(self) -> None:
        """A repeated key and a NULL are refused as in any read, with equal documents and with others."""
        before = rows_of({b"1": b"one", b"2": b"two"})
        for rows, message in (
            ([(b"1", b"one"), (b"1", b"one")], 'the key "1" occurs twice; a key must be unique'),
            ([(b"1", b"one"), (b"1", b"other")], 'the key "1" occurs twice; a key must be unique'),
            ([(b"1", b"other"), (b"1", b"one")], 'the key "1" occurs twice; a key must be unique'),
            ([(b"3", b""), (b"3", b"")], 'the key "3" occurs twice; a key must be unique'),
            ([(b"2", b"two"), (b"1", b"one"), (b"2", b"two")], 'the key "2" occurs twice; a key must be unique'),
            ([(b"513", b"two"), (b"1", b"one"), (b"513", b"two")], 'the key "513" occurs twice; a key must be unique'),
            ([(b"1", b"one"), (None, b"two")], "the key of row 2 is NULL; every row needs a key"),
        ):
            builder = RowsBuilder(lambda _: None)
            builder.expect(2, before)
            with self.assertRaises(BadResult) as caught:
                builder.add(rows)
            self.assertEqual(str(caught.exception), message)

    def test_many_differing_rows(self) -> None:
        """If more than a thousand rows and an eighth of all differ, the rest of the read is not compared."""
        old = {b"%d" % number: b"old" for number in range(16_000)}
        for changed, is_compared in ((1999, True), (2000, True), (2001, False)):
            new = {**old, **{b"%d" % number: b"new" for number in range(changed)}}
            rows, differing = compared(rows_of(old), new)
            self.assertEqual((differing is not None, table_of(rows) == new), (is_compared, True))

    def test_the_rows_before_are_released(self) -> None:
        """Neither a finished nor a discarded builder keeps the rows before."""
        for end in (RowsBuilder.finish, RowsBuilder.discard):
            before = rows_of({b"1": b"one"})
            alive = weakref.ref(before)
            builder = RowsBuilder(lambda _: None)
            builder.expect(1, before)
            builder.add([(b"1", b"one")])
            del before
            self.assertIsNotNone(alive())
            end(builder)
            self.assertIsNone(alive())

    def test_a_result_that_has_shrunk(self) -> None:
        """After a result has shrunk by a quarter, new documents replace the scattered ones once."""
        old = {b"%d" % number: b"document" for number in range(1000)}
        small = dict(list(old.items())[:700])
        patch = RowsPatch(rows_of(old))
        for key in old.keys() - small.keys():
            patch.remove(key)
        for shrunk in (compared(rows_of(old), small)[0], patch.finish()):
            again, differing = compared(shrunk, small)
            self.assertIsNone(differing)
            self.assertEqual(compared(again, small)[1], [])

    def test_another_number_of_shards(self) -> None:
        """Rows that are spread differently are compared after the read."""
        _, differing = compared(empty_rows(4 * SHARD_COUNT * 2), {b"1": b"one"})
        self.assertIsNone(differing)


class Refreshes(RefreshTestCase):
    def test_a_refresh_is_compared_with_what_is_served(self) -> None:
        """The second read takes over the equal documents of the first, and publishes what differs."""
        world = self.started()
        world.database.last.into.add([(b"%d" % number, b"{}") for number in range(5)])
        world.database.last.complete(rows=0)
        served = world.dataset.snapshot.rows
        self.assertEqual(len(served), 5)
        world.advance(60)
        into = world.database.last.into
        into.add([(b"%d" % number, b"{}") for number in range(3)])
        world.database.last.complete(rows=0)
        self.assertEqual(into.differing, [])
        self.assertEqual(tuple(world.dataset.snapshot.change), (0, 0, 2))
