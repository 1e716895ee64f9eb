"""Laws of patched rows, and of keys as SQL writes them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.collectors import Shards
from cacheservice.cache.drain import Drain
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Rows, RowsBuilder
from cacheservice.sources.postgres.quoting import literal
from tests.kit.datasets import Table, table_of


def patchable(table: Table, release: Callable[[Shards], None] = lambda _: None, **options: Any) -> Rows:
    builder = RowsBuilder(release, patched=True, **options)
    builder.expect(len(table))
    builder.add(list(table.items()))
    return builder.finish()


KEY = st.integers(0, 30).map(lambda number: b"%d" % number)
DOCUMENT = st.sampled_from([b"{}", b'{"a":1}', b'{"a":2}', b"x" * 5000])


class Patches(SynchronousTestCase):
    @given(st.dictionaries(KEY, DOCUMENT), st.lists(st.tuples(KEY, st.none() | DOCUMENT)))
    def test_as_a_dict_would(self, table: Table, changes: list[tuple[bytes, bytes | None]]) -> None:
        """A patch changes what a dict would, counts it, and leaves the rows before it as they were."""
        old = patchable(table)
        patch = RowsPatch(old)
        expected = dict(table)
        for key, document in changes:
            if document is None:
                patch.remove(key)
                expected.pop(key, None)
            else:
                patch.put(key, document)
                expected[key] = document
        new = patch.finish()
        self.assertEqual((table_of(old), table_of(new)), (table, expected))
        self.assertEqual(new.count, len(expected))
        self.assertEqual(new.size_bytes, sum(len(key) + len(document) for key, document in expected.items()))
        self.assertEqual(patch.count, new.count)

    def test_what_is_not_touched_is_shared(self) -> None:
        """Rows after a patch are the same dicts except for those of its keys, and so are most of their groups."""
        for count in (1000, 100_000):
            old = patchable({b"%d" % number: b"{}" for number in range(count)})
            patch = RowsPatch(old)
            for number in range(10):
                patch.put(b"%d" % number, b"[]")
            new = patch.finish()
            copied = [shard for shard, before in zip(new.shards(), old.shards(), strict=True) if shard is not before]
            self.assertLessEqual(len(copied), 10)
            self.assertLessEqual(max(map(len, copied)), 200)
            groups = [group for group, before in zip(new.groups, old.groups, strict=True) if group is not before]
            self.assertLessEqual(len(groups), 10)

    def test_readers_keep_what_they_read(self) -> None:
        """However many patches follow and however rows are dropped and drained, each generation stays whole."""

        class Later:
            def __init__(self) -> None:
                self.calls: list[Any] = []

            def callLater(self, _: float, call: Any, *arguments: Any) -> Any:
                self.calls.append((call, arguments))

            def run(self) -> None:
                while self.calls:
                    call, arguments = self.calls.pop(0)
                    call(*arguments)

        clock, choose = Later(), random.Random(1)
        drain = Drain(clock)
        table = {b"%d" % number: b"0" for number in range(20_000)}
        kept: list[tuple[Rows, Table]] = [(patchable(table, drain.add), table)]
        for generation in range(1, 60):
            rows, table = kept[-1]
            patch, table = RowsPatch(rows), dict(table)
            for _ in range(choose.choice([1, 10, 3000])):
                key = b"%d" % choose.randrange(25_000)
                if choose.random() < 0.3:
                    patch.remove(key)
                    table.pop(key, None)
                else:
                    patch.put(key, b"%d" % generation)
                    table[key] = b"%d" % generation
            kept.append((patch.finish(), table))
            del rows, patch
            while len(kept) > 4:
                del kept[choose.randrange(len(kept) - 1)]
            clock.run()
        for rows, table in kept:
            self.assertEqual(table_of(rows), table)


class Literals(SynchronousTestCase):
    def test_shape(self) -> None:
        """Quotes are doubled; a backslash makes it an escape string, in which it is doubled as well."""
        self.assertEqual(literal("it's"), "'it''s'")
        self.assertEqual(literal("a\\'b"), " E'a\\\\''b'")
