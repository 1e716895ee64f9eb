"""The differences between two results: their number, and the rows themselves if they are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import islice
from typing import NamedTuple
from zlib import crc32

from cacheservice.cache.delta import Delta, DeltaBuilder
from cacheservice.cache.digest import reduced, row_digest
from cacheservice.cache.rows import Rows

_SLICE_ROWS = 250
_STEP_ROWS = 4000
"""The number of rows that are compared in half a millisecond."""
_SHARD_ROWS = 5000
"""A shard of ordinary size, which has at most 4096 rows on average, is compared in one step."""
_ROW_BY_ROW = 4
"""How many times longer a single row takes than a row of an unchanged shard."""
_DIGESTED = 12
"""How many times longer the digests of a changed row take than its comparison."""
_MOST_DIGESTED_SHARE = 0.05
_MOST_DIGESTED_ROWS = 1000
"""If more rows differ, computing the digest of all rows costs less, and it may never be needed."""
_NAMED = 10


class Change(NamedTuple):
    """How many rows a publish added, changed and removed."""

    added: int
    changed: int
    removed: int


class ChangeCount:
    """The difference of two results: iterate to the end, one step in each turn of the reactor, then read it.

    A step takes less than a millisecond. `digest` is the digest of the new rows if that of the old rows is known and
    few rows differ; None otherwise. `delta` has the differing rows if they are few; None otherwise.

    :param expected: the keys whose rows may differ. `unexpected` lists up to ten other keys whose rows differ, and
        `unexpected_count` counts them.
    :param differing: the keys of the new rows that the old rows do not have with the same document, if they are known;
        both have the same number of shards then.
    """

    def __init__(
        self,
        old: Rows,
        new: Rows,
        expected: Set[bytes] | None = None,
        differing: Sequence[bytes] | None = None,
    ) -> None:
        self.unexpected: list[bytes] = []
        self.unexpected_count = 0
        self._old = old
        self._new = new
        self._expected = expected
        self._differing = differing
        self._added = 0
        self._changed = 0
        self._digest = old.digest if old.mask == new.mask else None
        self._delta = DeltaBuilder(old.count)
        self._digests_left = max(_MOST_DIGESTED_ROWS, int(old.count * _MOST_DIGESTED_SHARE))

    def __iter__(self) -> Iterator[None]:
        return self._all() if self._differing is None else self._known(self._differing)

    def _known(self, differing: Sequence[bytes]) -> Iterator[None]:
        """Count the rows that are known to differ, and look for removed ones if there are any."""
        bulk, mask, added, work = self._new.bulk, self._new.mask, Counter[int](), 0
        for first in range(0, len(differing), _SLICE_ROWS):
            some = differing[first : first + _SLICE_ROWS]
            added.update(crc32(key) & mask for key in some if key not in self._old)
            self._count([(key, ready) for key in some if (ready := bulk(key)) is not None])
            work += _DIGESTED * len(some)
            if work >= _STEP_ROWS:
                yield
                work = 0
        if not self.change.removed:
            return
        for place, (old, new) in enumerate(zip(self._old.shards(), self._new.shards(), strict=True)):
            work += 1
            if len(old) + added[place] > len(new):
                work += len(old) + _DIGESTED * self._count_removed(old, new)
            if work >= _STEP_ROWS:
                yield
                work = 0

    def _all(self) -> Iterator[None]:
        work = 0
        alike = self._old.mask == self._new.mask
        for place, new in enumerate(self._new.shards()):
            old = self._old.shard(place) if alike else None
            if work and work + len(new) > _STEP_ROWS:
                yield
                work = 0
            # Most often nothing has changed, and comparing the dicts finds that at C speed.
            if old is not None and (old is new or (len(new) <= _SHARD_ROWS and old == new)):
                work += len(new)
            else:
                rows, added_before = iter(new.items()), self._added
                while some := list(islice(rows, _SLICE_ROWS)):
                    differing = self._count(some)
                    work += _ROW_BY_ROW * len(some) + (_DIGESTED * differing if self._digest is not None else 0)
                    if work >= _STEP_ROWS:
                        yield
                        work = 0
                if old is not None and len(old) + self._added - added_before > len(new):
                    work += _DIGESTED * self._count_removed(old, new)
            if work >= _STEP_ROWS:
                yield
                work = 0
        if self.change.removed and not alike and (self._expected is not None or not self._delta.gave_up):
            yield from self._removed_ones()

    @property
    def digest(self) -> int | None:
        return None if self._digest is None else reduced(self._digest)

    @property
    def delta(self) -> Delta | None:
        return self._delta.finish()

    def _count_removed(self, old: dict[bytes, bytes], new: dict[bytes, bytes]) -> int:
        """Note the rows that are missing in the new shard; return their number."""
        gone = old.keys() - new.keys()
        self._digest_those([(key, old[key]) for key in gone], [])
        self._delta.remove(gone)
        for key in gone:
            self._note(key)
        return len(gone)

    def _digest_those(self, gone: list[tuple[bytes, bytes]], come: list[tuple[bytes, bytes]]) -> None:
        self._digests_left -= len(gone) + len(come)
        if self._digests_left < 0:
            self._digest = None
        elif self._digest is not None:
            self._digest += sum(row_digest(*row) for row in come) - sum(row_digest(*row) for row in gone)

    def _count(self, some: list[tuple[bytes, bytes]]) -> int:
        """Count the rows that differ; return their number."""
        old = self._old.bulk
        differing = self._added + self._changed
        gone, come = [], []
        for key, document in some:
            before = old(key)
            if before == document:
                continue
            come.append((key, document))
            if before is None:
                self._added += 1
            else:
                self._changed += 1
                gone.append((key, before))
            self._note(key)
        if self._digest is not None:
            self._digest_those(gone, come)
        if come:
            self._delta.put(come)
        return self._added + self._changed - differing

    def _removed_ones(self) -> Iterator[None]:
        """Find the removed rows of results that are laid out differently."""
        left = self.change.removed
        for keys, _ in self._old.slices(_SLICE_ROWS):
            gone = [key for key in keys if key not in self._new]
            self._delta.remove(gone)
            for key in gone:
                self._note(key)
            left -= len(gone)
            if not left:
                return
            yield

    def _note(self, key: bytes) -> None:
        if self._expected is not None and key not in self._expected:
            self.unexpected_count += 1
            if len(self.unexpected) < _NAMED:
                self.unexpected.append(key)

    @property
    def change(self) -> Change:
        return Change(self._added, self._changed, self._old.count + self._added - self._new.count)
