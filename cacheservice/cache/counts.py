"""What is counted of a dataset, for the metrics: numbers that only go up as long as the process lives."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

REFRESH_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""From a delta of a few rows to a read of millions."""


class Histogram:
    """Values, counted by bucket: `counts[i]` are those greater than `bounds[i - 1]` and at most `bounds[i]`, the last
    one those greater than all bounds. `total` is the sum of the values.

    :param bounds: ascending.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Reads:
    """Documents, or whole datasets, that clients of one port asked for, by what they got.

    `hits` were there; `misses` are no row of the dataset; `loading` was refused because nothing was loaded yet, and
    `stale` because what was loaded was too old.
    """

    __slots__ = ("hits", "loading", "misses", "stale")

    def __init__(self) -> None:
        self.hits = self.misses = self.loading = self.stale = 0


class Counts:
    """Of one dataset, from the first time that its name was declared.

    `rows_read` came from the database, in whatever became of them; `added`, `changed` and `removed` are those of
    publishes. `missed_ticks` are starts of an interval that were skipped, because a refresh was running;
    `differences` rows that a full read found to differ from what deltas had made of them: there must be none.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.durations = Histogram(REFRESH_BOUNDS_S)
        self.rows_read = 0
        self.added = self.changed = self.removed = 0
        self.missed_ticks = 0
        self.differences = 0
        self.save_failures = 0
        self.resp = Reads()
        self.http = Reads()
