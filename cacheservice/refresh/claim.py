"""The claim of a group of datasets on a connection: its need of a refresh, and reasons to delay it."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.cache.dataset import Dataset
from cacheservice.refresh.timetable import Timetable


class Claim:
    """The claim of one group on a connection.

    An attempt is awaited while an operator or a reader waits for it.
    """

    def __init__(self, datasets: Sequence[Dataset], timetable: Timetable) -> None:
        self._datasets = datasets
        self._timetable = timetable
        self._is_awaited = False

    def begin(self, *, is_awaited: bool) -> None:
        """Begin to claim for an attempt."""
        self._is_awaited = is_awaited

    def await_it(self) -> bool:
        """Note that the attempt is awaited from now on; return whether that is new."""
        was_awaited, self._is_awaited = self._is_awaited, True
        return not was_awaited

    def need(self) -> float:
        """Return the greatest need of its datasets."""
        return max(dataset.need() for dataset in self._datasets)

    def is_failing(self) -> bool:
        return any(dataset.consecutive_failures > 0 for dataset in self._datasets)

    def is_urgent(self) -> bool:
        """Return whether postgres.max_load does not hold it back."""
        return self._is_awaited or any(dataset.snapshot is None or dataset.redefined for dataset in self._datasets)

    def expected_s(self) -> float:
        """Return how long it will probably take."""
        return self._timetable.last.took_s
