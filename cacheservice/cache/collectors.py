"""Collects the rows of one read into shards, with or without comparing them with the rows before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol
from zlib import crc32

from cacheservice.cache.framing import HEADERS, PREPARED
from cacheservice.cache.keys import refuse_null, refuse_repeated

Shards = list[dict[bytes, bytes]]
"""Keys to bulk strings. A key is in the shard whose place is its CRC-32 modulo their number, a power of two."""
Chunk = Sequence[tuple[bytes | None, bytes]]

_LEAST_DIFFERING = 1000
_DIFFERING = 8
"""If more than an eighth of the rows differ, comparing each row costs more than it saves."""


class Collector(Protocol):
    """Takes the rows of one read.

    `differing` lists the keys of the rows that the rows before do not have with the same document; None if that is not
    known. `settling` are the steps that complete the shards after the last row, for one turn each.
    """

    differing: list[bytes] | None
    settling: Iterator[None]

    def add(self, first: int, chunk: Chunk) -> tuple[int, int]:
        """Take the next rows; return the length of the longest key, and the bytes of keys and documents.

        :param first: the number of the first of these rows, counted from 1.
        :raises BadResult: for a repeated key or a NULL; the message names it.
        """

    def shards(self) -> Shards:
        """Return the shards; the collector is empty afterwards."""

    def own(self) -> Shards:
        """Return, after a read that failed, the rows that nobody else has; the collector is empty afterwards."""


def most_differing(count: int) -> int:
    """Return how many rows may differ from `count` rows before until they are no longer listed."""
    return max(_LEAST_DIFFERING, count // _DIFFERING)


class NewRows:
    """Rows that are compared with none.

    :param count: the number of shards.
    """

    def __init__(self, count: int) -> None:
        self.differing: list[bytes] | None = None
        self.settling: Iterator[None] = iter(())
        self._count = count
        self._shards: Shards = []

    # The loops run a million times in a refresh, so `bulk` and `max` are written out: the calls cost more than the
    # work.

    def add(self, first: int, chunk: Chunk) -> tuple[int, int]:
        """See `Collector`."""
        shards, headers, checksum, mask = self._begun(), HEADERS, crc32, self._count - 1
        size_bytes = longest = 0
        for key, document in chunk:
            if key is None:
                refuse_null(first, chunk)
            size = len(document)
            ready = (headers[size] if size < PREPARED else b"$%d\r\n" % size) + document + b"\r\n"
            if shards[checksum(key) & mask].setdefault(key, ready) is not ready:
                refuse_repeated(key)
            length = len(key)
            if length > longest:  # noqa: PLR1730
                longest = length
            size_bytes += length + size
        return longest, size_bytes

    def _begun(self) -> Shards:
        if not self._shards:
            self._shards = [{} for _ in range(self._count)]
        return self._shards

    def shards(self) -> Shards:
        """See `Collector`."""
        shards, self._shards = self._begun(), []
        return shards

    def own(self) -> Shards:
        """See `Collector`."""
        shards, self._shards = self._shards, []
        return shards


class ComparedRows(NewRows):
    """Rows that are looked up among the rows before, one by one; equal ones keep their documents.

    :param before: the shards of the rows before. They are never changed.
    :param count: the number of their rows.
    """

    def __init__(self, before: Shards, count: int) -> None:
        super().__init__(len(before))
        self.differing: list[bytes] | None = []
        self._before = before
        self._most_differing = most_differing(count)

    def add(self, first: int, chunk: Chunk) -> tuple[int, int]:
        """See `Collector`."""
        if self.differing is None:
            return super().add(first, chunk)
        # The new document is in the processor's cache now. A comparison after the read would have to fetch both, and
        # both generations would need memory for their documents.
        shards, headers, checksum, mask = self._begun(), HEADERS, crc32, self._count - 1
        before, differing = self._before, self.differing
        size_bytes = longest = 0
        for key, document in chunk:
            if key is None:
                refuse_null(first, chunk)
            size = len(document)
            ready = (headers[size] if size < PREPARED else b"$%d\r\n" % size) + document + b"\r\n"
            place = checksum(key) & mask
            shard = shards[place]
            if key in shard:
                refuse_repeated(key)
            old = before[place].get(key)
            if old == ready:
                shard[key] = old
            else:
                shard[key] = ready
                differing.append(key)
            length = len(key)
            if length > longest:  # noqa: PLR1730
                longest = length
            size_bytes += length + size
        if len(differing) > self._most_differing:
            self.differing, self._before = None, []
        return longest, size_bytes

    def shards(self) -> Shards:
        """See `Collector`."""
        self._before = []
        return super().shards()

    def own(self) -> Shards:
        """See `Collector`."""
        self._before = []
        return super().own()
