"""The rows of one snapshot: an immutable mapping of keys to JSON documents, both bytes.

The rows are spread over 256 dicts by the CRC-32 of their keys, because a single dict of a million entries holds the
reactor for 29 ms each time it grows, and again when it is freed (measured). More than a million rows are spread over
more dicts. Python's own hash differs from process to process, but the cursors of SCAN, which follow these dicts, must
not; a CRC takes no longer (measured). Rows that are patched are spread over more dicts, and these are gathered in
groups. A patch shares the groups and dicts that it does not change with the rows before it, and copies the others: a
group and one of its dicts for each key.

Documents are stored as they are framed for most clients; see `cacheservice.cache.framing`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import chain, islice
from operator import is_
from zlib import crc32

from cacheservice.base.errors import ResultTooLarge
from cacheservice.cache.collectors import Chunk, Collector, ComparedRows, NewRows, Shards
from cacheservice.cache.digest import reduced, row_digest
from cacheservice.cache.framing import unframed
from cacheservice.cache.in_order import RowsInOrder
from cacheservice.cache.keys import MAX_KEY_BYTES, refuse_length

Groups = list[Shards]
"""All of the same length, a power of two."""

SHARD_COUNT = 256
"""The number of shards of ordinary rows, and the minimum for others: always a power of two."""
_MOST_SHARDS = 65_536
_SHARD_ROWS = 4096
"""A larger shard takes long to grow, and to compare in one step."""
_KEPT = 4
_SPARSE = 3 / 4
_FIRST_ROWS = 1024
"""So many rows show whether the result comes in the order of the one before."""
_PATCHED_SHARD_ROWS = 32
"""A copy spends its time on the reference counts of the entries, each in a cache line that is not cached."""
PATCHED_GROUP_BITS = 5
PATCHED_GROUP_MASK = (1 << PATCHED_GROUP_BITS) - 1
_DIGESTED_ROWS = 512
"""Takes a third of a millisecond, if the documents are short."""
_DIGESTED_BYTES = 256 * 1024


class Rows:
    """An immutable mapping of `count` keys to documents, `size_bytes` long in all (keys and documents).

    With `place = crc32(key) & mask`, `groups[place >> bits]` holds `key`, in its shard of the number that the last
    `bits` bits of `place` give; ordinary rows have one group. That is for the hot path that cannot afford a call of
    `bulk`. A holder of the groups must drop them in the turn in which this object is replaced, because they are emptied
    afterwards.

    When the last reference is dropped, `release` takes over the groups and frees them slice by slice.

    `digest` is the digest of the content (see `cacheservice.cache.digest`), None until it is needed. `most` is the
    largest number of rows of all that have shared documents with these, one after the other.
    """

    __slots__ = ("__weakref__", "bits", "count", "digest", "groups", "mask", "most", "release", "size_bytes")

    def __init__(
        self,
        groups: Groups,
        count: int,
        size_bytes: int,
        release: Callable[[Groups], None],
        digest: int | None = None,
        most: int = 0,
    ) -> None:
        self.groups = groups
        self.bits = len(groups[0]).bit_length() - 1
        self.mask = (len(groups) << self.bits) - 1
        self.count = count
        self.size_bytes = size_bytes
        self.release = release
        self.digest = digest
        self.most = max(count, most)
        # At exit the process frees everything by itself.
        weakref.finalize(self, release, groups).atexit = False

    def __len__(self) -> int:
        return self.count

    def get(self, key: bytes) -> bytes | None:
        """Return the document of `key`, or None."""
        ready = self.shard(crc32(key) & self.mask).get(key)
        return None if ready is None else unframed(ready)

    def bulk(self, key: bytes) -> bytes | None:
        """Return the document of `key` as a bulk string, or None."""
        return self.shard(crc32(key) & self.mask).get(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self.shard(crc32(key) & self.mask)

    def shard(self, place: int) -> dict[bytes, bytes]:
        """Return the shard at a place from 0 to `mask`."""
        return self.groups[place >> self.bits][place & ((1 << self.bits) - 1)]

    def shards(self) -> Iterator[dict[bytes, bytes]]:
        """Return all shards in the order of their places."""
        return chain.from_iterable(self.groups)

    def keys_by_checksum(self, low_bits: int) -> Iterator[bytes]:
        """Return the keys whose CRC-32 ends in `low_bits`, a number less than SHARD_COUNT."""
        return chain.from_iterable(map(self.shard, range(low_bits, self.mask + 1, SHARD_COUNT)))

    def slices(self, most: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Yield keys and their bulk strings, at most `most` at a time, so that no turn takes them all."""
        keys = chain.from_iterable(self.shards())
        documents = chain.from_iterable(map(dict.values, self.shards()))
        while some := list(islice(keys, most)):
            yield some, list(islice(documents, most))

    def digesting(self) -> Iterator[None]:
        """Compute `digest` in steps of a third of a millisecond; it is known when the iterator ends."""
        total = 0
        for keys, documents in self.slices(_DIGESTED_ROWS):
            size_bytes = 0
            if sum(map(len, documents)) <= _DIGESTED_BYTES:
                total += sum(map(row_digest, keys, documents))
            else:
                for key, ready in zip(keys, documents, strict=True):
                    total += row_digest(key, ready)
                    size_bytes += len(ready)
                    if size_bytes >= _DIGESTED_BYTES:
                        yield
                        size_bytes = 0
            yield
        self.digest = reduced(total)

    def note_digest(self, digest: int | None) -> None:
        """Take the digest of exactly these rows, which was computed elsewhere."""
        self.digest = digest

    @property
    def is_sparse(self) -> bool:
        """Return whether the documents occupy much more memory than they need.

        Each of them may keep a page that it shared with removed ones.
        """
        return self.count < self.most * _SPARSE

    def is_laid_out_as(self, other: Rows) -> bool:
        """Return whether both have the same number of shards and groups, so that patches cost the same."""
        return (self.mask, self.bits) == (other.mask, other.bits)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield every key with its document, in an order that never changes for this object."""
        for shard in self.shards():
            for key, ready in shard.items():
                yield key, unframed(ready)


class RowsBuilder:
    """Collects the rows of one read; `finish` turns them into a `Rows`.

    :param max_rows: the most rows it takes, 0 for no limit.
    :param max_bytes: the most bytes of keys and documents it takes, 0 for no limit.
    :param patched: whether the rows will be patched.
    """

    def __init__(
        self, release: Callable[[Groups], None], *, max_rows: int = 0, max_bytes: int = 0, patched: bool = False
    ) -> None:
        self.count = 0
        self.size_bytes = 0
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._patched = patched
        self._collector: Collector = NewRows(SHARD_COUNT)
        self._in_order: RowsInOrder | None = None
        self._first: list[Chunk] = []
        self._before: Rows | None = None
        self._release = release

    @property
    def differing(self) -> list[bytes] | None:
        """The keys of the rows that the rows before do not have with the same document.

        None if that is not known: there are no rows before, they are spread over another number of shards, or many rows
        differ.
        """
        return self._collector.differing

    @property
    def settling(self) -> Iterator[None]:
        """The steps that complete the rows after the last one, for one turn each; `finish` takes those left."""
        return self._collector.settling

    def expect(self, rows: int, before: Rows | None = None) -> None:
        """Expect about this many rows; call it before the first.

        :param before: the rows that these will be compared with. Their documents and shards are used again for equal
            rows, and their number of shards if it is a few times as large as needed.
        """
        most = _PATCHED_SHARD_ROWS if self._patched else _SHARD_ROWS
        count = min(max(1 << (max(0, rows - 1) // most).bit_length(), SHARD_COUNT), _MOST_SHARDS)
        kept = 0 if before is None else before.mask + 1
        if before is not None and count <= kept <= _KEPT * count:
            count = kept
        if before is not None and count == kept and not before.is_sparse:
            self._before = before
            self._collector = self._in_order = RowsInOrder(list(before.shards()), before.count)
        else:
            self._collector = NewRows(count)

    def add(self, chunk: Chunk) -> None:
        """Take the next rows.

        :raises BadResult: for a NULL key, a repeated key, or a key over 64 KiB; the message names it.
        :raises ResultTooLarge: past `max_rows` or `max_bytes`.
        """
        longest, size_bytes = self._collector.add(self.count + 1, chunk)
        if longest > MAX_KEY_BYTES:
            refuse_length(next(key for key, _ in chunk if key is not None and len(key) == longest))
        self.count += len(chunk)
        self.size_bytes += size_bytes
        if 0 < self._max_rows < self.count:
            raise ResultTooLarge(f"the result has more than max_rows = {self._max_rows} rows")
        if 0 < self._max_bytes < self.size_bytes:
            raise ResultTooLarge(f"the result has more than max_bytes = {self._max_bytes} bytes")
        if self._in_order is not None:
            self._first.append(chunk)
            if self.count >= _FIRST_ROWS:
                self._choose(self._in_order)

    def _choose(self, in_order: RowsInOrder) -> None:
        """Go on in the order of the rows before if the first rows came so, and otherwise look up each row."""
        first, self._first, self._in_order = self._first, [], None
        if in_order.is_worthwhile(self.count) or self._before is None:
            return
        in_order.own()
        self._collector = ComparedRows(list(self._before.shards()), self._before.count)
        for chunk in first:
            self._collector.add(1, chunk)

    def finish(self) -> Rows:
        """Return the rows taken so far; the builder is empty afterwards."""
        shards, before = self._collector.shards(), self._before
        self._forget()
        size = 1 << PATCHED_GROUP_BITS if self._patched else len(shards)
        groups = [shards[first : first + size] for first in range(0, len(shards), size)]
        if before is None:
            return Rows(groups, self.count, self.size_bytes, self._release)
        if len(groups) == len(before.groups):
            groups = [old if all(map(is_, old, new)) else new for old, new in zip(before.groups, groups, strict=True)]
        return Rows(groups, self.count, self.size_bytes, self._release, most=before.most)

    def discard(self) -> None:
        """Free the rows taken so far slice by slice, after a read that failed."""
        self._forget()
        if own := self._collector.own():
            self._release([own])

    def _forget(self) -> None:
        self._first, self._before, self._in_order = [], None, None
