"""What differs between two results, counted little by little."""

from __future__ import annotations

from collections.abc import Iterator, Set
from itertools import islice
from typing import NamedTuple

from cacheservice.cache.rows import Rows

_SLICE_ROWS = 1000
_STEP_ROWS = 4000
"""So many rows are compared in half a millisecond."""
_ROW_BY_ROW = 4
"""How much longer a row takes on its own than among those of a shard that did not change."""
_NAMED = 10


class Change(NamedTuple):
    """How many rows a publish added, changed and removed."""

    added: int
    changed: int
    removed: int


class ChangeCount:
    """The difference of two results; iterate over it to its end, a turn of the reactor for each step, then ask it.

    A step takes less than a millisecond.

    :param expected: the keys whose rows may differ; with it, `unexpected` gets those that differ all the same, up to
        ten of them, and `unexpected_count` how many they are.
    """

    def __init__(self, old: Rows, new: Rows, expected: Set[bytes] | None = None) -> None:
        self.unexpected: list[bytes] = []
        self.unexpected_count = 0
        self._old = old
        self._new = new
        self._expected = expected
        self._added = 0
        self._changed = 0

    def __iter__(self) -> Iterator[None]:
        work = 0
        alike = self._old.mask == self._new.mask
        for place, new in enumerate(self._new.shards()):
            # Most often nothing has changed, and the dicts themselves tell that at C speed.
            if alike and len(new) <= _STEP_ROWS and self._old.shard(place) == new:
                work += len(new)
            else:
                rows = iter(new.items())
                while some := list(islice(rows, _SLICE_ROWS)):
                    self._count(some)
                    work += _ROW_BY_ROW * len(some)
                    if work >= _STEP_ROWS:
                        yield
                        work = 0
            if work >= _STEP_ROWS:
                yield
                work = 0
        if self._expected is not None and self.change.removed:
            yield from self._removed_ones()

    def _count(self, some: list[tuple[bytes, bytes]]) -> None:
        old = self._old.bulk
        for key, document in some:
            before = old(key)
            if before == document:
                continue
            if before is None:
                self._added += 1
            else:
                self._changed += 1
            self._note(key)

    def _removed_ones(self) -> Iterator[None]:
        for keys, _ in self._old.slices(_SLICE_ROWS):
            for key in keys:
                if key not in self._new:
                    self._note(key)
            yield

    def _note(self, key: bytes) -> None:
        if self._expected is not None and key not in self._expected:
            self.unexpected_count += 1
            if len(self.unexpected) < _NAMED:
                self.unexpected.append(key)

    @property
    def change(self) -> Change:
        return Change(self._added, self._changed, self._old.count + self._added - self._new.count)
