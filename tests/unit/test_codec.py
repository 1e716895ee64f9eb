"""The frames of a publish: what comes out of them, however they are cut, and what is refused."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import SnapshotRejected
from cacheservice.cache.changes import Change
from cacheservice.cache.delta import NO_CHANGE, Delta
from cacheservice.cache.framing import bulk
from cacheservice.cache.lag import Lag
from cacheservice.cache.rows import Rows
from cacheservice.replication.codec import MAGIC, Decoder, End, Head, Item, Put, Removed, encoded
from cacheservice.sources.frames.age import ReadOn
from tests.kit.datasets import Table, numbered_rows, rows_of
from tests.kit.saved_files import header_of

KEY = st.binary(max_size=20)
TABLE = st.dictionaries(KEY, st.binary(max_size=300), max_size=30)


def head_of_snapshot(rows: Rows, **more: object) -> Head:
    header = header_of(rows, read_on=ReadOn(1, "boot", 2, "machine"))
    return replace(Head(header, 0, rows.count, 0, 1500), **more)  # type: ignore[arg-type]


def delta_of(put: Table, removed: Iterable[bytes]) -> Delta:
    return Delta({key: bulk(document) for key, document in put.items()}, frozenset(removed))


def head_of_delta(delta: Delta) -> Head:
    return Head(header_of(numbered_rows(10_000)), 6, len(delta.put), len(delta.removed), 0)


def decoded(data: bytes, cuts: Sequence[int] = ()) -> list[Item]:
    """The items of frames that arrive cut at these places."""
    decoder = Decoder("the sender")
    items: list[Item] = []
    start = 0
    for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        items += decoder.feed(data[start:end])
        start = end
    return items


def put_rows(items: Iterable[Item]) -> Table:
    return {key: document for item in items if isinstance(item, Put) for key, document in item.rows}


def removed_keys(items: Iterable[Item]) -> set[bytes]:
    return {key for item in items if isinstance(item, Removed) for key in item.keys}


class Frames(SynchronousTestCase):
    @settings(deadline=None)
    @given(TABLE, st.booleans(), st.lists(st.integers(0, 1 << 20), max_size=8))
    def test_a_snapshot(self, table: Table, compress: bool, cuts: list[int]) -> None:
        """All of a snapshot arrives, however the bytes are cut."""
        rows = rows_of(table)
        head = head_of_snapshot(
            rows,
            origin="disk",
            change=Change(1, 2, 3),
            lag=Lag(1.5, False, "behind"),
            rolled_back_to=4,
            age_uncertain="another machine",
        )
        first, *items, last = decoded(b"".join(encoded(head, rows, compress=compress)), cuts)
        self.assertEqual((first, put_rows(items), last), (head, table, End()))

    @settings(deadline=None)
    @given(TABLE, st.frozensets(KEY), st.booleans(), st.lists(st.integers(0, 1 << 20), max_size=8))
    def test_deltas_in_a_row(self, put: Table, removed: frozenset[bytes], compress: bool, cuts: list[int]) -> None:
        """Publishes follow each other without a gap."""
        delta = delta_of(put, removed)
        head, nothing = head_of_delta(delta), head_of_delta(NO_CHANGE)
        data = b"".join((*encoded(head, delta, compress=compress), *encoded(nothing, NO_CHANGE, compress=compress)))
        first, *items, end, empty, last = decoded(data, cuts)
        self.assertEqual((first, put_rows(items), removed_keys(items)), (head, put, set(removed)))
        self.assertEqual((end, empty, last), (End(), nothing, End()))

    def test_many_rows_and_large_ones(self) -> None:
        """Rows are cut into slices, and large documents into blocks."""
        table = {b"%d" % number: b"x" * 100 for number in range(5000)} | {b"large": b"y" * 1_000_000}
        rows = rows_of(table)
        pieces = list(encoded(head_of_snapshot(rows), rows, compress=False))
        self.assertGreater(len(pieces), 5)
        items = decoded(b"".join(pieces))
        self.assertEqual(put_rows(items), table)
        self.assertLessEqual(max(len(item.rows) for item in items if isinstance(item, Put)), 512)

    def test_many_removed_keys(self) -> None:
        keys = {b"%d" % number for number in range(30_000)}
        delta = delta_of({}, keys)
        items = decoded(b"".join(encoded(head_of_delta(delta), delta, compress=False)))
        self.assertEqual(removed_keys(items), keys)

    @settings(deadline=None)
    @given(st.data(), st.booleans())
    def test_damage(self, data: st.DataObject, compress: bool) -> None:
        """A changed byte is refused, or the publish is never complete; what was yielded before is not used."""
        rows = numbered_rows(20)
        whole = b"".join(encoded(head_of_snapshot(rows), rows, compress=compress))
        place = data.draw(st.integers(0, len(whole) - 1))
        changed = bytearray(whole)
        changed[place] ^= data.draw(st.integers(1, 255))
        try:
            items = decoded(bytes(changed))
        except SnapshotRejected as error:
            self.assertIn("the sender: ", str(error))
        else:
            self.assertNotIn(End(), items)

    def test_refused(self) -> None:
        """What it does not know is refused, with a reason."""
        rows = numbered_rows(3)
        whole = b"".join(encoded(head_of_snapshot(rows), rows, compress=False))
        for data, problem in (
            (b"GET / HTTP/1.1\r\n", "these are not frames of a publish"),
            (struct.pack(">6sHB", MAGIC, 2, 0) + whole[9:], "version 2 of the frames is unknown; this one reads 1"),
            (struct.pack(">6sHB", MAGIC, 1, 2) + whole[9:], "these are not frames of a publish"),
            (whole[:9] + b"X" + whole[10:], "no part begins at byte 9"),
        ):
            with self.assertRaises(SnapshotRejected) as caught:
                decoded(data)
            self.assertIn(problem, str(caught.exception))

    def test_wrong_numbers(self) -> None:
        """A head that declares other numbers of rows than follow is refused at the end."""
        rows = numbered_rows(3)
        for head in (head_of_snapshot(rows, put=4), head_of_snapshot(rows, removed=1)):
            with self.assertRaisesRegex(SnapshotRejected, "declares other numbers of rows"):
                decoded(b"".join(encoded(head, rows, compress=False)))

    def test_impossible_heads(self) -> None:
        rows = numbered_rows(3)
        for head in (
            head_of_snapshot(rows, base=-1),
            head_of_snapshot(rows, origin="elsewhere"),
            head_of_snapshot(rows, age_us=-5),
        ):
            with self.assertRaisesRegex(SnapshotRejected, "impossible values"):
                decoded(b"".join(encoded(head, rows, compress=False)))
