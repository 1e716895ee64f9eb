"""The last changes of a dataset: how a reader of an earlier generation gets to the served one.

A generation number alone does not identify a generation. A service that starts without its saved snapshots counts from
1 again, and generation 5 is then another one than before the restart. So a position also has the moment of the content,
by the database's clock, which is the same in every process and after a warm start.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import NamedTuple

from cacheservice.cache.delta import NO_CHANGE, Delta
from cacheservice.cache.snapshot import Snapshot

MOST_ROWS = 50_000
"""The rows of all changes that are kept: as many as those of the largest delta."""
MOST_BYTES = 16 * 1024 * 1024
_LEAST_BYTES = 256 * 1024
_SHARE = 0.15
"""The share of the dataset's memory that its changes may use: the largest delta, of a tenth of the rows, and some more.
If more has changed, a reader is as well served with a snapshot."""
_ROW_BYTES = 170
"""The memory of a row besides its key and document: two objects and its place in a dict."""
_CHANGE_BYTES = 800
"""The memory of a change besides its rows. With both, the memory that is counted is 1.4 times the true one if each
change is of one row, and 4 times if it is of 2000 rows, because their documents are mostly those of the snapshot
(measured)."""
_SAMPLE_ROWS = 2000
"""The rows of a delta that are measured, which takes 0.3 ms."""
_MERGED_ROWS = 2000
"""The rows that are merged in half a millisecond (measured)."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_POSITION = re.compile(r"([0-9]{1,19})(?:-([0-9]{1,19}))?")


class Position(NamedTuple):
    """A generation of a dataset.

    :param content_us: the moment of its content, in microseconds since 1970; None if a reader does not know it.
    """

    generation: int
    content_us: int | None = None

    @classmethod
    def of(cls, snapshot: Snapshot) -> Position:
        """Return the position of a reader that has the rows of a snapshot."""
        return cls(snapshot.generation, (snapshot.modified_as_of - _EPOCH) // timedelta(microseconds=1))

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """Return the position that a reader sends, ``GENERATION`` or ``GENERATION-MICROSECONDS``; None if invalid."""
        match = _POSITION.fullmatch(text)
        return match and cls(int(match[1]), None if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return str(self.generation) if self.content_us is None else f"{self.generation}-{self.content_us}"

    def may_be(self, other: Position) -> bool:
        """Return whether both are the same generation, as far as they are known."""
        return self.generation == other.generation and (
            self.content_us is None or other.content_us is None or self.content_us == other.content_us
        )


class _Change(NamedTuple):
    """The delta that follows a generation."""

    after: Position
    delta: Delta
    rows: int
    size_bytes: int


class ChangeLog:
    """The deltas that lead to the newest generation, the oldest first.

    They are kept up to a number of rows, and up to a share of the dataset's memory. The documents of rows that have not
    changed again are those of the snapshot, so the true memory is less than what is counted.

    `newest` is the position of the newest generation; None before the first.

    :param most_rows: of all deltas that are kept.
    :param most_bytes: of all deltas that are kept.
    """

    __slots__ = ("_changes", "_most_bytes", "_most_rows", "newest", "rows", "size_bytes")

    def __init__(self, most_rows: int = MOST_ROWS, most_bytes: int = MOST_BYTES) -> None:
        self.newest: Position | None = None
        self.rows = self.size_bytes = 0
        self._changes: deque[_Change] = deque()
        self._most_rows = most_rows
        self._most_bytes = most_bytes

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, snapshot: Snapshot, previous: int, delta: Delta | None) -> list[Delta]:
        """Note a publish; return the deltas that are not kept any more.

        The caller frees them, because freeing a large one takes some milliseconds.

        :param previous: the generation that `delta` applies to.
        :param delta: None if it is not known; then nothing leads to the newest generation.
        """
        before, self.newest = self.newest, Position.of(snapshot)
        if delta is None or before is None or before.generation != previous:
            return self._drop(0, 0)
        rows = len(delta.put) + len(delta.removed)
        size_bytes = _size_bytes(delta, rows)
        self._changes.append(_Change(before, delta, rows, size_bytes))
        self.rows += rows
        self.size_bytes += size_bytes
        share_bytes = int((snapshot.rows.size_bytes + snapshot.rows.count * _ROW_BYTES) * _SHARE)
        most_bytes = min(self._most_bytes, max(_LEAST_BYTES, share_bytes))
        return self._drop(self._most_rows, most_bytes)

    def since(self, position: Position) -> Sequence[Delta] | None:
        """Return the deltas that lead from `position` to the newest generation; None if they are not known."""
        if self.newest is not None and position.may_be(self.newest):
            return ()
        for number, change in enumerate(self._changes):
            if position.may_be(change.after):
                return [each.delta for each in islice(self._changes, number, None)]
        return None

    def _drop(self, most_rows: int, most_bytes: int) -> list[Delta]:
        dropped: list[Delta] = []
        while self._changes and (self.rows > most_rows or self.size_bytes > most_bytes):
            oldest = self._changes.popleft()
            self.rows -= oldest.rows
            self.size_bytes -= oldest.size_bytes
            dropped.append(oldest.delta)
        return dropped


class Merge:
    """Merges deltas into one with the same effect: iterate to the end, one step in each turn, then read `delta`.

    A step takes half a millisecond. `Delta.then` has the same result for two deltas, but for a thousand of them it
    would copy the rows of the first a thousand times, in one turn.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self._deltas = deltas
        self.delta = deltas[0] if len(deltas) == 1 else NO_CHANGE

    def __iter__(self) -> Iterator[None]:
        if len(self._deltas) == 1:
            return
        put: dict[bytes, bytes] = {}
        removed: set[bytes] = set()
        work = 0
        for delta in self._deltas:
            keys = iter(delta.removed)
            while gone := list(islice(keys, _MERGED_ROWS)):
                for key in gone:
                    put.pop(key, None)
                removed.update(gone)
                work += len(gone)
                if work >= _MERGED_ROWS:
                    yield
                    work = 0
            rows = iter(delta.put.items())
            while some := dict(islice(rows, _MERGED_ROWS)):
                put.update(some)
                removed.difference_update(some)
                work += len(some)
                if work >= _MERGED_ROWS:
                    yield
                    work = 0
        self.delta = Delta(put, frozenset(removed))


def _size_bytes(delta: Delta, rows: int) -> int:
    """Return about how much memory a delta takes. The rows of a large one are sampled."""
    put = list(islice(delta.put.items(), _SAMPLE_ROWS))
    removed = list(islice(delta.removed, _SAMPLE_ROWS))
    put_bytes = sum(len(key) + len(ready) for key, ready in put) * len(delta.put) // max(1, len(put))
    removed_bytes = sum(map(len, removed)) * len(delta.removed) // max(1, len(removed))
    return put_bytes + removed_bytes + rows * _ROW_BYTES + _CHANGE_BYTES
