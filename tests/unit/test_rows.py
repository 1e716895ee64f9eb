"""Laws of the rows of a snapshot."""

from __future__ import annotations

from itertools import chain
from random import Random
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import BadResult, ResultTooLarge
from cacheservice.cache.framing import bulk, unframed
from cacheservice.cache.keys import MAX_KEY_BYTES
from cacheservice.cache.rows import SHARD_COUNT, Groups, RowsBuilder

Chunk = list[tuple[bytes | None, bytes]]

keys = st.binary(max_size=12)
tables = st.dictionaries(keys, st.binary(max_size=20), max_size=200)


class Released:
    """The receiver of the groups; remembers what was in them."""

    def __init__(self) -> None:
        self.tables: list[dict[bytes, bytes]] = []

    def __call__(self, groups: Groups) -> None:
        shards = chain.from_iterable(groups)
        self.tables.append({key: unframed(ready) for shard in shards for key, ready in shard.items()})


def chunked(table: dict[bytes, bytes], size: int) -> list[Chunk]:
    rows: Chunk = list(table.items())
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class Lookup(SynchronousTestCase):
    @settings(deadline=None)
    @given(tables, st.integers(1, 50), st.lists(keys))
    def test_a_lookup_is_a_dicts(self, table: dict[bytes, bytes], chunk_rows: int, strangers: list[bytes]) -> None:
        """Whatever the rows and however they came, get, in, items, len and the sizes are those of a dict of them."""
        builder = RowsBuilder(Released())
        for chunk in chunked(table, chunk_rows):
            builder.add(chunk)
        rows = builder.finish()
        for key in [*table, *strangers]:
            self.assertEqual(rows.get(key), table.get(key))
            self.assertEqual(key in rows, key in table)
        self.assertEqual(dict(rows.items()), table)
        self.assertEqual((len(rows), rows.count), (len(table), len(table)))
        self.assertEqual(rows.size_bytes, sum(len(key) + len(document) for key, document in table.items()))

    def test_documents_are_ready_to_send(self) -> None:
        """Of every length up to where the prepared headers end, and past it: framed as Redis does, and out again."""
        for length in [*range(4200), 10_000, 99_999, 100_000]:
            document = b"x" * length
            ready = bulk(document)
            self.assertEqual(ready, b"$%d\r\n%b\r\n" % (length, document))
            self.assertEqual(unframed(ready), document)

    @settings(deadline=None)
    @given(tables, st.integers(1, 50))
    def test_slices_are_the_rows(self, table: dict[bytes, bytes], most: int) -> None:
        """Slice by slice every row comes once, its bulk string at its key's place, and never more than were wanted."""
        builder = RowsBuilder(Released())
        builder.add(list(table.items()))
        rows = builder.finish()
        found: list[tuple[bytes, bytes]] = []
        for keys_, documents in rows.slices(most):
            self.assertLessEqual(len(keys_), most)
            found += zip(keys_, documents, strict=True)
        self.assertEqual(sorted(found), sorted((key, bulk(document)) for key, document in table.items()))
        self.assertEqual([(key, rows.bulk(key)) for key, _ in found], found)

    def test_the_order_of_items_stays(self) -> None:
        """Two walks over the same rows return them in the same order."""
        builder = RowsBuilder(Released())
        builder.add([(b"%d" % n, b"{}") for n in range(1000)])
        rows = builder.finish()
        self.assertEqual(list(rows.items()), list(rows.items()))

    def test_shards_are_balanced(self) -> None:
        """Keys as databases have them spread over the shards, over many as well: a patch copies one for each key."""
        choose = Random(1)
        for pattern in (
            (b"%d" % n for n in range(60_000)),
            (b"%d" % (n * 1000) for n in range(60_000)),
            (b"%012d" % n for n in range(60_000)),
            (b"%d:%b" % (n // 4, (b"EUR", b"USD", b"GBP", b"CHF")[n % 4]) for n in range(60_000)),
            (b"2026-%02d-%02d:%d" % (n % 12 + 1, n // 12 % 28 + 1, n // 336) for n in range(60_000)),
            (b"%b%b" % (bytes([65 + n // 26 % 26, 65 + n % 26]), b"%06d" % (n // 676)) for n in range(60_000)),
            (str(UUID(int=choose.getrandbits(128), version=4)).encode() for _ in range(60_000)),
            (b"%x" % (n << 16) for n in range(60_000)),
        ):
            some = [(key, b"") for key in pattern]
            for patched in (False, True):
                builder = RowsBuilder(Released(), patched=patched)
                builder.expect(60_000)
                builder.add(some)
                rows = builder.finish()
                mean = rows.count / (rows.mask + 1)
                self.assertLess(max(map(len, rows.shards())), mean + 8 * mean**0.5)

    def test_no_row_at_all(self) -> None:
        """A result without rows is a result."""
        builder = RowsBuilder(Released())
        builder.add([])
        rows = builder.finish()
        self.assertEqual((len(rows), rows.size_bytes, rows.get(b"1"), list(rows.items())), (0, 0, None, []))


class BadKeys(SynchronousTestCase):
    def refused(self, *chunks: Chunk) -> str:
        builder = RowsBuilder(Released())
        with self.assertRaises(BadResult) as caught:
            for chunk in chunks:
                builder.add(chunk)
        message = str(caught.exception)
        self.assertEqual(message.splitlines(), [message])
        return message

    @settings(deadline=None)
    @given(tables, st.binary(max_size=20), st.integers(1, 50), st.data())
    def test_a_duplicate_is_found(
        self, table: dict[bytes, bytes], document: bytes, chunk_rows: int, data: st.DataObject
    ) -> None:
        """A key that occurs a second time is refused wherever it stands, even with the same document."""
        rows: Chunk = list(table.items())
        key = data.draw(st.sampled_from(sorted(table)) if table else keys)
        if not table:
            rows = [(key, document)]
        rows.insert(data.draw(st.integers(0, len(rows))), (key, document))
        message = self.refused(*(rows[start : start + chunk_rows] for start in range(0, len(rows), chunk_rows)))
        self.assertIn("occurs twice", message)

    def test_a_duplicate_is_named(self) -> None:
        """The error of a duplicate names the key, within a chunk and across chunks."""
        expected = 'the key "7" occurs twice; a key must be unique'
        self.assertEqual(self.refused([(b"7", b"{}"), (b"7", b"{}")]), expected)
        self.assertEqual(self.refused([(b"7", b"{}")], [(b"8", b"{}"), (b"7", b'{"a":1}')]), expected)

    def test_a_null_key_is_named_by_its_row(self) -> None:
        """A NULL key has no name, so the error counts the rows, from 1 and over chunks."""
        message = "the key of row 4 is NULL; every row needs a key"
        self.assertEqual(self.refused([(b"1", b"{}"), (b"2", b"{}")], [(b"3", b"{}"), (None, b"{}")]), message)

    def test_the_longest_key(self) -> None:
        """A key of 64 KiB is taken, one byte more is refused with its length."""
        builder = RowsBuilder(Released())
        builder.add([(b"k" * MAX_KEY_BYTES, b"{}")])
        self.assertEqual(builder.finish().get(b"k" * 65_536), b"{}")
        message = self.refused([(b"a", b"{}"), (b"k" * 65_537, b"{}")])
        self.assertEqual(message, f'the key "{"k" * 100}…" is 65537 bytes long; at most 64 KiB are allowed')

    def test_a_key_is_shown_in_one_line(self) -> None:
        """A key of line ends, terminal controls or no UTF-8 at all is named in printable characters on one line."""
        for key, shown in (
            (b"a\nb\r\tc", r"a\nb\r\tc"),
            (b"\x1b[2J", r"\x1b[2J"),
            ("ä€ \u2028\x85".encode(), r"ä€ \u2028\x85"),
            (b"\xff\x00", r"�\x00"),
        ):
            self.assertEqual(
                self.refused([(key, b"1"), (key, b"2")]), f'the key "{shown}" occurs twice; a key must be unique'
            )


class Limits(SynchronousTestCase):
    def test_max_rows(self) -> None:
        """As many rows as max_rows are taken; one more fails the read, in whatever chunk it comes."""
        for sizes in ([3, 1], [4], [1, 1, 1, 1]):
            builder = RowsBuilder(Released(), max_rows=3)
            with self.assertRaisesRegex(ResultTooLarge, "^the result has more than max_rows = 3 rows$"):
                for number, size in enumerate(sizes):
                    builder.add([(b"%d:%d" % (number, row), b"{}") for row in range(size)])
        builder = RowsBuilder(Released(), max_rows=3)
        builder.add([(b"%d" % row, b"{}") for row in range(3)])
        self.assertEqual(len(builder.finish()), 3)

    def test_max_bytes(self) -> None:
        """Keys and documents together may be as long as max_bytes, and not a byte longer."""
        builder = RowsBuilder(Released(), max_bytes=10)
        builder.add([(b"12", b"345"), (b"67", b"890")])
        self.assertEqual(builder.finish().size_bytes, 10)
        builder = RowsBuilder(Released(), max_bytes=10)
        builder.add([(b"12", b"345")])
        with self.assertRaisesRegex(ResultTooLarge, "^the result has more than max_bytes = 10 bytes$"):
            builder.add([(b"67", b"8901")])


class Release(SynchronousTestCase):
    def setUp(self) -> None:
        self.released = Released()

    def test_with_the_last_reference(self) -> None:
        """The groups go to `release` once, when nobody holds the rows any more, and not before."""
        builder = RowsBuilder(self.released)
        builder.add([(b"1", b"one"), (b"2", b"two")])
        rows = builder.finish()
        other = rows
        builder.discard()
        del rows
        self.assertEqual((self.released.tables, len(other)), ([], 2))
        del other
        self.assertEqual(self.released.tables, [{b"1": b"one", b"2": b"two"}])

    def test_of_a_read_that_failed(self) -> None:
        """What a failed read took goes to `release` at the discard, with the rows of the failing chunk, and once."""
        builder = RowsBuilder(self.released)
        builder.add([(b"1", b"one")])
        with self.assertRaises(BadResult):
            builder.add([(b"2", b"two"), (None, b"three")])
        builder.discard()
        builder.discard()
        del builder
        self.assertEqual(self.released.tables, [{b"1": b"one", b"2": b"two"}])

    def test_in_shards(self) -> None:
        """Rows lie in many dicts of about the same size, so that none is long to free."""
        sizes: list[int] = []
        builder = RowsBuilder(lambda groups: sizes.extend(map(len, chain.from_iterable(groups))))
        builder.add([(b"%d" % n, b"") for n in range(SHARD_COUNT * 100)])
        builder.discard()
        self.assertEqual((len(sizes), sum(sizes)), (SHARD_COUNT, SHARD_COUNT * 100))
        self.assertLess(max(sizes), 200)
