"""Laws of the cursors of SCAN and HSCAN."""

from __future__ import annotations

import gc
from random import Random
from typing import Any
from weakref import ref

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache
from cacheservice.ports.resp.scan import END_OF_DATASET, SortedShards, numbered, scan_rows
from tests.kit.datasets import declared, rows_of
from tests.kit.resp import Words
from tests.kit.resp_peer import publish
from tests.kit.resp_session import FakeLink, make_server

key_sets = st.sets(st.integers(0, 60), max_size=50)


class Scans(SynchronousTestCase):
    def setUp(self) -> None:
        clock = Clock()
        self.cache = Cache([declared(name) for name in ("one", "two", "three")], clock.seconds)
        self.server = make_server(self.cache, clock)
        self.client = FakeLink(self.server)

    def test_what_is_frozen_ends_with_its_reader(self) -> None:
        """What a transaction reads is let go when it ends, and not only when the garbage is collected."""
        gc.disable()
        self.addCleanup(gc.enable)
        frozen = ref(self.server.datasets.frozen())
        self.assertIsNone(frozen())

    def page(self, *words: bytes | str | int) -> tuple[bytes, list[bytes]]:
        ((cursor, found),) = self.client.ask_all(words)
        assert int(cursor) < 2**53, "some clients keep a cursor in a double"
        return cursor, found

    @settings(deadline=None)
    @given(st.lists(key_sets, min_size=1, max_size=12), st.integers(1, 30), st.booleans())
    def test_what_is_there_all_along(self, generations: list[set[int]], count: int, of_hash: bool) -> None:
        """SCAN and HSCAN return every element that is there from first to last, whatever is published between pages."""
        pending = [sorted(keys) for keys in generations]
        for name in ("one", "two"):
            publish(self.cache, name, (b"%d" % key for key in pending[0]))
        all_along = set.intersection(*map(set, generations))
        cursor, found, pages, left = b"0", [], 0, pending[1:]
        while True:
            words: Words = ("HSCAN", "two", cursor) if of_hash else ("SCAN", cursor)
            cursor, page = self.page(*words, "COUNT", count)
            found += page[::2] if of_hash else page
            pages += 1
            if cursor == b"0":
                break
            if left:
                publish(self.cache, "two", (b"%d" % key for key in left.pop(0)))
            assert pages < 1000
        prefix = b"" if of_hash else b"two:"
        self.assertLessEqual({prefix + b"%d" % key for key in all_along}, set(found))
        if not of_hash:
            self.assertLessEqual({b"one:%d" % key for key in pending[0]} | {b"one", b"two"}, set(found))
        if len(generations) == 1:
            self.assertEqual(len(found), len(set(found)), "nothing twice while nothing is published")

    @settings(deadline=None)
    @given(
        key_sets,
        st.integers(1, 40),
        st.sampled_from([None, b"string", b"hash", b"zset"]),
        st.sampled_from([b"*", b"one*", b"*1*"]),
    )
    def test_match_and_type(self, keys: set[int], count: int, kind: bytes | None, pattern: bytes) -> None:
        """MATCH and TYPE leave out what they do not mean, and nothing else."""
        publish(self.cache, "one", (b"%d" % key for key in sorted(keys)))
        cursor, found = b"0", []
        while True:
            options: Words = ("TYPE", kind) if kind else ()
            cursor, page = self.page("SCAN", cursor, "COUNT", count, "MATCH", pattern, *options)
            found += page
            if cursor == b"0":
                break
        kinds = {b"one": b"hash"} | {b"one:%d" % key: b"string" for key in keys}
        part = {b"*": b"", b"one*": b"one", b"*1*": b"1"}[pattern]
        hashes = {name.encode() for name in self.server.datasets.snapshots()}
        everything = kinds | dict.fromkeys(hashes, b"hash") | {b"two:%d" % k: b"string" for k in self.keys_of("two")}
        expected = {key for key, each in everything.items() if part in key and kind in (None, each)}
        self.assertEqual(set(found), expected)

    def keys_of(self, name: str) -> set[int]:
        snapshot = self.cache.dataset(name).snapshot
        return {int(key) for key, _ in snapshot.rows.items()} if snapshot else set()

    def test_keys_of_one_hash(self) -> None:
        """Keys whose place is the same come in one page, and the scan goes on after them."""
        rows = rows_of((b"%d" % number, b"x") for number in range(2000))
        sorted_shards = SortedShards()

        def colliding(of: Any, shard: int) -> list[tuple[int, bytes]]:
            return sorted((place & 1, key) for place, key in sorted_shards(of, shard))

        place, found = 0, []
        while place != END_OF_DATASET:
            place, keys = scan_rows(rows, place, 1, colliding)
            found += keys
        self.assertEqual(sorted(found), sorted(b"%d" % number for number in range(2000)))

    def test_a_cursor_outlives_other_datasets(self) -> None:
        """A cursor in one dataset goes on there, whatever other datasets come, go, or stand before it."""
        publish(self.cache, "three", range(100))
        full = self.all_from(b"0")
        self.assertEqual(len(full), 101)
        cursor, first = self.page("SCAN", 0, "COUNT", 30)
        for names in (("three",), ("new", "three", "other", "one"), ("three", "two", "one")):
            self.cache.declare([declared(name) for name in names])
            self.assertEqual(sorted(first + self.all_from(cursor)), sorted(full))

    def all_from(self, cursor: bytes) -> list[bytes]:
        found: list[bytes] = []
        while True:
            cursor, page = self.page("SCAN", cursor, "COUNT", 7)
            found += page
            if cursor == b"0":
                return found

    @settings(deadline=None)
    @given(st.sets(st.binary(min_size=1, max_size=4), max_size=50))
    def test_numbers_of_datasets(self, names: set[bytes]) -> None:
        """Each dataset has a number of its own, never 0, in whatever order they are declared."""
        numbers = numbered(names)
        self.assertEqual(numbers, numbered(sorted(names, reverse=True)))
        self.assertEqual({name for _, name in numbers}, names)
        self.assertEqual(len({number for number, _ in numbers} - {0}), len(names))

    def test_numbers_that_collide(self) -> None:
        """Of two names with one checksum the later one takes the next number, and the other keeps its own."""
        by_number: dict[int, list[bytes]] = {}
        choose = Random(1)
        for name in (choose.randbytes(8) for _ in range(10_000)):
            by_number.setdefault(numbered([name])[0][0], []).append(name)
        number, (first, second, *_) = next((key, each) for key, each in by_number.items() if len(each) > 1)
        self.assertEqual(numbered([second, first]), [(number, min(first, second)), (number + 1, max(first, second))])

    def test_any_cursor(self) -> None:
        """A cursor that was never returned is answered with a page or the end, never with an error."""
        publish(self.cache, "one", range(100))
        for cursor in (1, 2**40 - 1, 2**40, 2**41 + 5, 2**53, 2**63, 2**64 - 1):
            self.page("SCAN", cursor)
            self.page("HSCAN", "one", cursor)
