"""Laws of counting what a publish changes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.changes import Change, ChangeCount
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Rows
from tests.kit.datasets import rows_of

tables = st.dictionaries(st.binary(max_size=2), st.sampled_from([b"", b"1", b"2"]), max_size=60)


def counted(old: Rows, new: Rows) -> tuple[Change, int]:
    """The change, and in how many steps it was found."""
    count = ChangeCount(old, new)
    steps = sum(1 for _ in count)
    return count.change, steps


class Counting(SynchronousTestCase):
    @settings(deadline=None)
    @given(tables, tables)
    def test_what_differs(self, old: dict[bytes, bytes], new: dict[bytes, bytes]) -> None:
        """Whatever the results: a row is added, changed, removed or the same, by its key and document."""
        change, _ = counted(rows_of(old), rows_of(new))
        self.assertEqual(
            change,
            (
                len(new.keys() - old.keys()),
                sum(old[key] != new[key] for key in old.keys() & new.keys()),
                len(old.keys() - new.keys()),
            ),
        )

    def test_small_ones_at_once(self) -> None:
        """Small results need no step of their own."""
        table = {b"%d" % number: b"{}" for number in range(500)}
        self.assertEqual(counted(rows_of(table), rows_of(table)), ((0, 0, 0), 0))

    def test_large_ones_step_by_step(self) -> None:
        """No step looks at more than some thousand rows, changed or not, whatever the size of a shard."""
        count = 300_000
        old = rows_of({b"%d" % number: b"old" for number in range(count)})
        same = rows_of({b"%d" % number: b"old" for number in range(count)})
        new = rows_of({b"%d" % number: b"new" for number in range(10, count + 5)})
        for other, expected in ((same, (0, 0, 0)), (new, (5, count - 10, 10))):
            change, steps = counted(old, other)
            self.assertEqual(change, expected)
            self.assertGreaterEqual(steps, count // 6000)

    def test_a_shard_of_ordinary_size(self) -> None:
        """Equal shards with some rows more than the average of the largest results are compared in one step each."""
        shards = [{b"%d:%d" % (number, row): b"$0\r\n\r\n" for row in range(4600)} for number in range(4)]
        rows, other = (Rows([[dict(shard) for shard in shards]], 4 * 4600, 0, lambda _: None) for _ in range(2))
        self.assertEqual(counted(rows, other), ((0, 0, 0), 4))

    def test_one_large_shard(self) -> None:
        """Rows that all fall into one shard are counted in steps as well."""
        shard = {b"%d" % number: b"$1\r\n1\r\n" for number in range(50_000)}
        rows = Rows([[shard]], len(shard), 0, lambda _: None)
        other = Rows([[dict(shard)]], len(shard), 0, lambda _: None)
        change, steps = counted(rows, other)
        self.assertEqual(change, (0, 0, 0))
        self.assertGreaterEqual(steps, 40)


def digest_of(rows: Rows) -> int | None:
    for _ in rows.digesting():
        pass
    return rows.digest


class Digests(SynchronousTestCase):
    @settings(deadline=None)
    @given(tables, tables)
    def test_it_is_kept_up(self, old: dict[bytes, bytes], new: dict[bytes, bytes]) -> None:
        """A full read and a delta update a known digest to that of all new rows, in whatever order."""
        expected = digest_of(rows_of(dict(reversed(new.items()))))
        before, after = rows_of(old), rows_of(new)
        digest = digest_of(before)
        count = ChangeCount(before, after)
        for _ in count:
            pass
        self.assertEqual(count.digest, expected)
        patch = RowsPatch(before)
        for key in old.keys() - new.keys():
            patch.remove(key)
        for row in new.items():
            patch.put(*row)
        self.assertEqual(patch.finish().digest, expected)
        self.assertEqual(digest == expected, old == new)

    def test_unknown_ones_cost_nothing(self) -> None:
        """It stays unknown where it is unknown, and after more changes than pay."""
        old, new = ({b"%d" % number: document for number in range(5000)} for document in (b"1", b"2"))
        for before, known in ((rows_of(old), False), (rows_of(old), True)):
            if known:
                digest_of(before)
            count = ChangeCount(before, rows_of(new))
            for _ in count:
                pass
            self.assertIsNone(count.digest)
        self.assertIsNone(RowsPatch(rows_of(old)).finish().digest)

    def test_what_it_tells_apart(self) -> None:
        """Rows whose keys or documents are swapped, or cut at another place, differ; no row at all is 0."""
        some = [
            {b"a": b"1", b"b": b"2"},
            {b"a": b"2", b"b": b"1"},
            {b"a1": b"", b"b": b"2"},
            {b"a": b"1"},
            {b"": b"1a"},
        ]
        self.assertEqual(len({digest_of(rows_of(table)) for table in some}), len(some))
        self.assertEqual(digest_of(rows_of({})), 0)

    def test_it_never_changes(self) -> None:
        """Files and caches keep it, and replicas of other releases compare it."""
        digest = digest_of(rows_of({b"1": b'{"id":1}', b"2": b'{"id":2}'}))
        self.assertEqual(f"{digest:032x}", "c2fa595cb08c28e2afc1e2addb01d263")

    def test_large_documents_step_by_step(self) -> None:
        """No step digests more than 256 KiB, or one document if that is larger."""
        rows = rows_of({b"%d" % number: bytes(100_000) for number in range(30)})
        self.assertGreaterEqual(sum(1 for _ in rows.digesting()), 10)
