"""What differs between two results, counted little by little."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from cacheservice.cache.rows import Rows

_SLICE_ROWS = 1000
_STEP_ROWS = 4000
"""So many rows are compared in half a millisecond."""
_ROW_BY_ROW = 4
"""How much longer a row takes on its own than among those of a shard that did not change."""

_Shard = dict[bytes, bytes]


class Change(NamedTuple):
    """How many rows a publish added, changed and removed."""

    added: int
    changed: int
    removed: int


class ChangeCount:
    """The difference of two results; iterate over it to its end, a turn of the reactor for each step, then ask it.

    A step takes less than a millisecond.
    """

    def __init__(self, old: Rows, new: Rows) -> None:
        self._old = old
        self._new = new
        self._added = 0
        self._changed = 0

    def __iter__(self) -> Iterator[None]:
        work = 0
        for old, new in zip(self._old.shards, self._new.shards, strict=True):
            # Most often nothing has changed, and the dicts themselves tell that at C speed.
            if len(new) <= _STEP_ROWS and old == new:
                work += len(new)
            else:
                rows = iter(new.items())
                while some := list(islice(rows, _SLICE_ROWS)):
                    self._count(old, some)
                    work += _ROW_BY_ROW * len(some)
                    if work >= _STEP_ROWS:
                        yield
                        work = 0
            if work >= _STEP_ROWS:
                yield
                work = 0

    def _count(self, old: _Shard, some: list[tuple[bytes, bytes]]) -> None:
        for key, document in some:
            before = old.get(key)
            if before is None:
                self._added += 1
            elif before != document:
                self._changed += 1

    @property
    def change(self) -> Change:
        return Change(self._added, self._changed, self._old.count + self._added - self._new.count)
