"""The order of SCAN and HSCAN.

A scan returns each key at least once that exists from its first call to its last, also across publishes. A cursor is a
place in an order that no publish changes and that is the same in every process, so that a scan may continue at another
replica or after a restart. It has 21 bits for the number of the dataset and 32 for the key. Both are CRC-32: the last
bits for a name; for a key, the last 8 bits, which choose its shard, come before the other 24. It has 53 bits in total,
because some clients keep a cursor in a double.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from zlib import crc32

from cacheservice.cache.rows import SHARD_COUNT, Rows

MAX_COUNT = 10_000
"""The most keys of one call. COUNT is only a hint, and a larger one must not block the reactor."""

_KEY_BITS = 24
"""The bits of a place within its shard."""
_PLACE_BITS = 32
END_OF_DATASET = 1 << _PLACE_BITS
_DATASET_NUMBERS = 1 << 21


def numbered(names: Iterable[bytes]) -> list[tuple[int, bytes]]:
    """Return the numbers and names of the datasets, sorted by number.

    A number depends only on the dataset's name, except if two names collide: the later one in the alphabet takes the
    next free number. Number 0 is not used, because cursor 0 starts a scan.
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
    """Return at least `count` keys from place `start` on, and the next place.

    It returns fewer keys only at the end, where the next place is END_OF_DATASET.

    :param sorted_shard: returns (place within the shard, key) of one shard, sorted.
    """
    found: list[bytes] = []
    shard, place = start >> _KEY_BITS, start & ((1 << _KEY_BITS) - 1)
    while shard < SHARD_COUNT:
        entries = sorted_shard(rows, shard)
        index = bisect_left(entries, (place, b""))
        taken = index + count - len(found)
        # Keys with the same checksum share a place: return all of them, or the rest would never be returned.
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
    """Caches the shard sorted last, which a scan needs many times.

    It does not keep a generation in memory.
    """

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
    """Return the bits of a key's CRC-32 above those that choose its shard."""
    return crc32(key) >> 8


def glob(pattern: bytes) -> Callable[[bytes], object] | None:
    """Return a matcher for a pattern of Redis; None if it matches everything.

    Patterns have ``*``, ``?``, ``[a-z]``, ``[^a]``, and a backslash to escape a character.
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
    # Each star takes the shortest match and never backtracks, so that every pattern needs linear time.
    middle = b"".join(b"(?>.*?%b)" % segment for segment in others[:-1] if segment)
    return re.compile(first + middle + b".*" + others[-1], re.DOTALL).fullmatch


def _character_class(pattern: bytes, position: int) -> tuple[bytes, int]:
    """Return the regular expression of a character class, and its end.

    :param position: after the opening bracket.
    """
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
