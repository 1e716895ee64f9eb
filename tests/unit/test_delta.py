"""Laws of the changes that a publish carries."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.changes import ChangeCount
from cacheservice.cache.delta import NO_CHANGE, Delta
from cacheservice.cache.events import Event, Published
from cacheservice.cache.framing import unframed
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Rows, RowsBuilder
from tests.kit.datasets import Table, rows_of, table_of
from tests.kit.refreshes import RefreshTestCase

KEY = st.integers(0, 40).map(lambda number: b"%d" % number)
DOCUMENT = st.sampled_from([b"", b"1", b"2"])
TABLE = st.dictionaries(KEY, DOCUMENT, max_size=60)


def patchable(table: Table, expected: int) -> Rows:
    """Rows that are laid out for so many."""
    builder = RowsBuilder(lambda _: None, patched=True)
    builder.expect(expected)
    builder.add(list(table.items()))
    return builder.finish()


def counted(old: Rows, new: Rows) -> Delta | None:
    """The delta that a full read finds."""
    count = ChangeCount(old, new)
    for _ in count:
        pass
    return count.delta


def applied(table: Table, delta: Delta | None) -> Table:
    """The table after a delta."""
    assert delta is not None
    kept = {key: document for key, document in table.items() if key not in delta.removed}
    return kept | {key: unframed(ready) for key, ready in delta.put.items()}


class Deltas(SynchronousTestCase):
    @settings(deadline=None)
    @given(TABLE, TABLE, st.booleans())
    def test_a_full_read(self, old: Table, new: Table, alike: bool) -> None:
        """A full read finds exactly the rows that differ, however both results are laid out."""
        delta = counted(patchable(old, 0), patchable(new, 0 if alike else 100_000))
        self.assertEqual(applied(old, delta), new)
        assert delta is not None
        self.assertEqual(delta.removed, old.keys() - new.keys())
        self.assertEqual(delta.put.keys(), {key for key in new if old.get(key) != new[key]})

    @settings(deadline=None)
    @given(TABLE, st.lists(st.tuples(KEY, st.none() | DOCUMENT)))
    def test_a_patch(self, old: Table, changes: list[tuple[bytes, bytes | None]]) -> None:
        """A patch knows what it has changed."""
        patch = RowsPatch(rows_of(old))
        for key, document in changes:
            if document is None:
                patch.remove(key)
            else:
                patch.put(key, document)
        self.assertEqual(applied(old, patch.delta), table_of(patch.finish()))

    def test_before_and_after_nothing(self) -> None:
        """A delta before or after no change is not copied, so that all receivers of a publish are sent the same one."""
        delta = Delta({b"1": b"$1\r\n1\r\n"}, frozenset({b"2"}))
        self.assertIs(NO_CHANGE.then(delta), delta)
        self.assertIs(delta.then(NO_CHANGE), delta)

    def test_a_large_one_is_not_kept(self) -> None:
        """A delta of a tenth of the rows or of 1000 is kept; a larger one is unknown, whatever differs."""
        old = rows_of({b"%d" % number: b"old" for number in range(20_000)})
        for changed in (2_000, 2_001):
            new = rows_of({b"%d" % number: b"new" if number < changed else b"old" for number in range(20_000)})
            fewer = rows_of({b"%d" % number: b"old" for number in range(changed, 20_000)})
            for result in (new, fewer):
                self.assertEqual(counted(old, result) is None, changed > 2_000)


class Publishes(RefreshTestCase):
    def test_what_it_carries(self) -> None:
        """The first publish carries no delta; those after it carry the rows that differ from the generation before."""
        world = self.started()
        events: list[Event] = []
        world.cache.events.subscribe(events.append, Published)
        world.database.last.complete(rows=3)
        world.advance(60)
        world.database.last.complete(rows=2)
        first, second = events
        assert isinstance(first, Published)
        assert isinstance(second, Published)
        self.assertEqual((first.generation, first.previous, first.delta), (1, 0, None))
        self.assertEqual((second.generation, second.previous), (2, 1))
        self.assertEqual(second.delta, Delta({}, frozenset({b"2"})))
        self.assertIs(second.snapshot, world.dataset.snapshot)
