"""Counters of a dataset for the metrics: numbers that only increase while the process lives."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

REFRESH_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""The bounds range from a delta of a few rows to a read of millions."""


class Histogram:
    """A histogram of values.

    `counts[i]` is the number of values greater than `bounds[i - 1]` and at most `bounds[i]`; the last one is the number
    of values greater than all bounds. `total` is the sum of the values.

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

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add the values that another histogram with the same bounds has counted."""
        self.counts = [own + more for own, more in zip(self.counts, counts, strict=True)]
        self.total += total


class Reads:
    """Reads of documents or whole datasets by the clients of one port.

    - `hits`: the document was found.
    - `misses`: the dataset has no such row.
    - `loading`: refused, because the dataset has not been loaded.
    - `stale`: refused, because the dataset is too old.
    """

    __slots__ = ("hits", "loading", "misses", "stale")

    def __init__(self) -> None:
        self.hits = self.misses = self.loading = self.stale = 0

    def hit(self, count: int = 1) -> None:
        """Count documents that were found; a negative number takes some back."""
        self.hits += count

    def miss(self, count: int = 1) -> None:
        """Count rows that do not exist."""
        self.misses += count

    def refuse_loading(self) -> None:
        """Count a refusal because the dataset has not been loaded."""
        self.loading += 1

    def refuse_stale(self) -> None:
        """Count a refusal because the dataset is too old."""
        self.stale += 1

    def add(self, hits: int, misses: int, loading: int, stale: int) -> None:
        """Count reads that another process has answered."""
        self.hits += hits
        self.misses += misses
        self.loading += loading
        self.stale += stale

    def values(self) -> tuple[int, int, int, int]:
        """Return the counts in the order of `add`."""
        return self.hits, self.misses, self.loading, self.stale


class Counts:
    """The counters of one dataset, since its name was first declared.

    - `rows_read`: rows that came from the database, whether they were published or not.
    - `added`, `changed`, `removed`: rows of publishes.
    - `missed_ticks`: starts of an interval that were skipped because a refresh was running.
    - `differences`: rows for which a full read disagreed with the deltas before it. It must stay 0.
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

    def count_attempt(self, outcome: str, took_s: float) -> None:
        """Count an attempt that has ended."""
        self.outcomes[outcome] += 1
        self.durations.observe(took_s)

    def count_publish(self, added: int, changed: int, removed: int) -> None:
        """Count the rows that a publish changed."""
        self.added += added
        self.changed += changed
        self.removed += removed

    def count_read(self, rows: int) -> None:
        """Count rows that came from the database."""
        self.rows_read += rows

    def count_missed(self, ticks: int) -> None:
        """Count starts of an interval that were skipped."""
        self.missed_ticks += ticks

    def count_differences(self, rows: int) -> None:
        """Count rows that deltas had missed."""
        self.differences += rows

    def count_save_failure(self) -> None:
        """Count a failure to save."""
        self.save_failures += 1
