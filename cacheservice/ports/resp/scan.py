"""SCAN and HSCAN: what is there from the first call to the last is returned at least once, across publishes too.

A cursor is a place in an order that no publish changes and that is the same in every process, so that a scan may go on
at another replica, or after a restart: 21 bits for the number of the dataset, 32 for the key. Both are CRC-32: of a
name its last bits, of a key the last 8 bits, which choose its shard, before the other 24. 53 bits in all, because some
clients keep a cursor in a double.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from zlib import crc32

from cacheservice.cache.rows import SHARD_COUNT, Rows

MAX_COUNT = 10_000
"""The most that one call looks at, whatever COUNT says: it is only a hint, and the reactor is not to be held."""

_KEY_BITS = 24
"""Of a place within its shard."""
_PLACE_BITS = 32
END_OF_DATASET = 1 << _PLACE_BITS
_DATASET_NUMBERS = 1 << 21


def numbered(names: Iterable[bytes]) -> list[tuple[int, bytes]]:
    """The datasets with their numbers, in the order of these.

    A number depends on the dataset's name, and on other names only where two would have the same one: of these the
    later in the alphabet takes the next that is free. No number is 0, which no cursor but the first may be.
    """
    taken: dict[int, bytes] = {}
    for name in sorted(names):
        number = crc32(name) % _DATASET_NUMBERS
        while not number or number in taken:
            number = (number + 1) % _DATASET_NUMBERS
        taken[number] = name
    return sorted(taken.items())


def scan_rows(
    rows: Rows, start: int, count: int, sorted_shard: Callable[[Rows, int], Sequence[tuple[int, bytes]]]
) -> tuple[int, list[bytes]]:
    """At least `count` keys from place `start` on, if there are as many; and where to go on, or END_OF_DATASET.

    :param sorted_shard: gives (place within the shard, key) of one shard, sorted.
    """
    found: list[bytes] = []
    shard, place = start >> _KEY_BITS, start & ((1 << _KEY_BITS) - 1)
    while shard < SHARD_COUNT:
        entries = sorted_shard(rows, shard)
        index = bisect_left(entries, (place, b""))
        taken = index + count - len(found)
        # Keys of one checksum have one place: all of them, or the rest would never be seen.
        while 0 < taken < len(entries) and entries[taken][0] == entries[taken - 1][0]:
            taken += 1
        found.extend(key for _, key in entries[index:taken])
        if taken < len(entries):
            return shard << _KEY_BITS | entries[taken][0], found
        shard, place = shard + 1, 0
        if len(found) >= count:
            break
    return (shard << _KEY_BITS if shard < SHARD_COUNT else END_OF_DATASET), found


class SortedShards:
    """Remembers the shard sorted last, which a scan asks for many times; it keeps no generation alive."""

    def __init__(self) -> None:
        self._rows: weakref.ref[Rows] | None = None
        self._shard = 0
        self._entries: list[tuple[int, bytes]] = []

    def __call__(self, rows: Rows, shard: int) -> Sequence[tuple[int, bytes]]:
        if self._rows is None or self._rows() is not rows or self._shard != shard:
            self._rows, self._shard = weakref.ref(rows), shard
            self._entries = sorted((place_in_shard(key), key) for key in rows.keys_by_checksum(shard))
        return self._entries


def place_in_shard(key: bytes) -> int:
    """The bits of a key's CRC-32 above those that choose its shard."""
    return crc32(key) >> 8


def glob(pattern: bytes) -> Callable[[bytes], object] | None:
    """A matcher for a pattern of Redis's: ``*``, ``?``, ``[a-z]``, ``[^a]``, a backslash before what is meant itself.

    None stands for one that matches everything.
    """
    if pattern == b"*":
        return None
    segments = [b""]
    position = 0
    while position < len(pattern):
        character = pattern[position : position + 1]
        position += 1
        if character == b"*":
            segments.append(b"")
            continue
        part = b"." if character == b"?" else b""
        if character == b"[":
            part, position = _character_class(pattern, position)
        elif character == b"\\" and position < len(pattern):
            character = pattern[position : position + 1]
            position += 1
        segments[-1] += part or re.escape(character)
    first, *others = segments
    if not others:
        return re.compile(first, re.DOTALL).fullmatch
    # Each star takes as little as it can and never takes it back, so that no pattern needs more than linear time.
    middle = b"".join(b"(?>.*?%b)" % segment for segment in others[:-1] if segment)
    return re.compile(first + middle + b".*" + others[-1], re.DOTALL).fullmatch


def _character_class(pattern: bytes, position: int) -> tuple[bytes, int]:
    """The regular expression of the class that begins at `position`, after its bracket, and the position after it."""
    negated = pattern[position : position + 1] == b"^"
    position += negated
    members: set[int] = set()
    while position < len(pattern) and pattern[position : position + 1] != b"]":
        if pattern[position : position + 1] == b"\\" and position + 1 < len(pattern):
            position += 1
            members.add(pattern[position])
        elif pattern[position + 1 : position + 2] == b"-" and position + 2 < len(pattern):
            low, high = sorted((pattern[position], pattern[position + 2]))
            members.update(range(low, high + 1))
            position += 2
        else:
            members.add(pattern[position])
        position += 1
    position += 1
    if not members:
        return (b"." if negated else b"(?!)"), position
    inside = b"".join(re.escape(bytes([member])) for member in sorted(members))
    return (b"[^" if negated else b"[") + inside + b"]", position
