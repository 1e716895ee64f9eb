"""New rows from old ones and changes."""

from __future__ import annotations

from zlib import crc32

from cacheservice.base.errors import ResultTooLarge
from cacheservice.cache.delta import Delta, DeltaBuilder
from cacheservice.cache.digest import reduced, row_digest
from cacheservice.cache.framing import bulk, unframed
from cacheservice.cache.keys import MAX_KEY_BYTES, refuse_length
from cacheservice.cache.rows import Rows


class RowsPatch:
    """Builds new rows from old ones and changes: `put` and `remove`, then `finish`.

    It keeps the old rows, and shares the unchanged parts with the new ones. Each key takes a microsecond or two.
    """

    def __init__(self, old: Rows, *, max_rows: int = 0, max_bytes: int = 0) -> None:
        self.old = old
        self.added = self.changed = self.removed = 0
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._size_bytes = old.size_bytes
        self._digest = old.digest
        self._copied: dict[int, dict[bytes, bytes]] = {}
        self._delta = DeltaBuilder(old.count)

    @property
    def delta(self) -> Delta | None:
        """How the new rows differ; None if it would be too large."""
        return self._delta.finish()

    def put(self, key: bytes, document: bytes) -> None:
        """Set the row `key` to `document`.

        :raises BadResult: for a key over 64 KiB.
        """
        if len(key) > MAX_KEY_BYTES:
            refuse_length(key)
        ready, place = bulk(document), crc32(key) & self.old.mask
        own = self._copied.get(place)
        before = (self.old.shard(place) if own is None else own).get(key)
        if before == ready:
            return
        if before is None:
            self.added += 1
            self._size_bytes += len(key) + len(document)
        else:
            self.changed += 1
            self._size_bytes += len(document) - len(unframed(before))
        if self._digest is not None:
            self._digest += row_digest(key, ready) - (0 if before is None else row_digest(key, before))
        if own is None:
            own = self._copied[place] = self.old.shard(place).copy()
        own[key] = ready
        self._delta.put(((key, ready),))

    def remove(self, key: bytes) -> None:
        """Remove the row `key` if it exists."""
        place = crc32(key) & self.old.mask
        own = self._copied.get(place)
        before = (self.old.shard(place) if own is None else own).get(key)
        if before is None:
            return
        self.removed += 1
        self._size_bytes -= len(key) + len(unframed(before))
        if self._digest is not None:
            self._digest -= row_digest(key, before)
        if own is None:
            own = self._copied[place] = self.old.shard(place).copy()
        del own[key]
        self._delta.remove((key,))

    @property
    def count(self) -> int:
        return self.old.count + self.added - self.removed

    def finish(self) -> Rows:
        """Return the new rows.

        :raises ResultTooLarge: past `max_rows` or `max_bytes`.
        """
        if 0 < self._max_rows < self.count:
            raise ResultTooLarge(f"the result has more than max_rows = {self._max_rows} rows")
        if 0 < self._max_bytes < self._size_bytes:
            raise ResultTooLarge(f"the result has more than max_bytes = {self._max_bytes} bytes")
        groups, bits = self.old.groups.copy(), self.old.bits
        for place, shard in self._copied.items():
            number = place >> bits
            if groups[number] is self.old.groups[number]:
                groups[number] = groups[number].copy()
            groups[number][place & ((1 << bits) - 1)] = shard
        digest = None if self._digest is None else reduced(self._digest)
        return Rows(groups, self.count, self._size_bytes, self.old.release, digest, self.old.most)
