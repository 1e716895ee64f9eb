"""How the rows of a result differ from those of an earlier one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_LEAST_ROWS = 1000
_MOST_ROWS = 50_000
_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Delta:
    """The rows that differ.

    :param put: the added and changed rows: keys to documents, as bulk strings (see `cacheservice.cache.rows`).
    :param removed: the keys of the removed rows.
    """

    put: Mapping[bytes, bytes]
    removed: frozenset[bytes]

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return not self.put and not self.removed

    def then(self, later: Delta) -> Delta | None:
        """Return the delta of both changes, `later` after this one; None if it would be too large.

        It may remove rows that do not exist before it: those that this delta puts and `later` removes.
        """
        if self.is_empty or later.is_empty:
            return later if self.is_empty else self  # without a copy: all receivers of a publish share its delta
        if len(self.put) + len(self.removed) + len(later.put) + len(later.removed) > _MOST_ROWS:
            return None
        put = {key: ready for key, ready in self.put.items() if key not in later.removed}
        return Delta({**put, **later.put}, (self.removed - later.put.keys()) | later.removed)


NO_CHANGE = Delta({}, frozenset())


class DeltaBuilder:
    """Collects the rows that differ, and gives up if they are many.

    A large delta would take memory and time, and observers would gain nothing from it.

    :param rows: the number of rows of the earlier result.
    """

    __slots__ = ("_most", "_put", "_removed")

    def __init__(self, rows: int) -> None:
        self._most = min(max(_LEAST_ROWS, int(rows * _SHARE)), _MOST_ROWS)
        self._put: dict[bytes, bytes] | None = {}
        self._removed: set[bytes] = set()

    @property
    def gave_up(self) -> bool:
        return self._put is None

    def put(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Note added or changed rows, as bulk strings."""
        if self._put is not None:
            self._put.update(rows)
            if self._removed:
                self._removed.difference_update(key for key, _ in rows)
            self._check()

    def remove(self, keys: Iterable[bytes]) -> None:
        """Note removed rows."""
        if self._put is not None:
            for key in keys:
                self._put.pop(key, None)
                self._removed.add(key)
            self._check()

    def _check(self) -> None:
        if self._put is not None and len(self._put) + len(self._removed) > self._most:
            self._put = None
            self._removed = set()

    def finish(self) -> Delta | None:
        """Return the delta; None if it would be too large."""
        return None if self._put is None else Delta(self._put, frozenset(self._removed))
