"""When the datasets are saved. No clock and no timer: times are passed in."""

from __future__ import annotations

import math

from cacheservice.sources.disk.generations import Names

LEAST_RETRY_S = 1.0


class Schedule:
    """The groups that wait for a save of their rows or for a renewal of their files, and when these may begin.

    A group may wait for both. Whichever begins first, the save that it becomes covers both.

    :param min_interval_s: the minimum time from the start of one save of a group to the start of its next save, and
        from one renewal to the next.
    """

    def __init__(self, min_interval_s: float) -> None:
        self._min_interval_s = min_interval_s
        self._to_save: set[Names] = set()
        self._to_renew: set[Names] = set()
        self._save_due_at: dict[Names, float] = {}
        self._renewal_due_at: dict[Names, float] = {}

    def want(self, names: Names, *, renews: bool) -> None:
        """Add a group, whose rows are on disk already if it `renews`."""
        (self._to_renew if renews else self._to_save).add(names)

    def first(self) -> tuple[float, Names] | None:
        """Return the group that is due first, and when; None if none waits."""
        due = [(self._save_due_at.get(names, -math.inf), names) for names in self._to_save]
        due += [(self._renewal_due_at.get(names, -math.inf), names) for names in self._to_renew]
        return min(due) if due else None

    def begin(self, names: Names) -> None:
        """Note that a group does not wait any more."""
        self._to_save.discard(names)
        self._to_renew.discard(names)

    def began(self, names: Names, at: float, *, renews: bool) -> None:
        """Note that a save has begun to write; one that only `renews` does not delay the next save of rows."""
        self._renewal_due_at[names] = at + self._min_interval_s
        if not renews:
            self._save_due_at[names] = at + self._min_interval_s

    def failed(self, names: Names, at: float) -> float:
        """Note that a save has failed; return after how many seconds it may be tried again."""
        retry_in_s = max(LEAST_RETRY_S, self._min_interval_s)
        self._save_due_at[names] = self._renewal_due_at[names] = at + retry_in_s
        return retry_in_s

    def clear(self) -> None:
        """Forget the groups that wait."""
        self._to_save.clear()
        self._to_renew.clear()
