"""Notes for readers and operators what the refreshes of a group do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cacheservice.base.interfaces import Clock
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.refresh_status import Phase, Progress, WithoutDeltas
from cacheservice.cache.rows import RowsBuilder


class Statuses:
    """Replaces the `RefreshStatus` of each dataset of a group.

    :param clock: monotonic.
    """

    def __init__(self, datasets: Sequence[Dataset], clock: Clock) -> None:
        self._datasets = datasets
        self._clock = clock

    def started(self) -> None:
        """Note the start of the refreshes: what is served counts as checked now."""
        for dataset in self._datasets:
            if dataset.snapshot is not None and dataset.refresh.checked_at is None:
                self.checked(dataset)

    def planned(self, next_at: float | None) -> None:
        """Note when the next attempt is planned; None if none is."""
        for dataset in self._datasets:
            dataset.note_refresh(replace(dataset.refresh, next_at=next_at))

    def waiting(self) -> None:
        """Note that an attempt is due and waits for a connection."""
        for dataset in self._datasets:
            dataset.note_refresh(replace(dataset.refresh, phase=Phase.WAITING, due_at=self._clock.seconds()))

    def put_off(self) -> None:
        """Note that only postgres.max_load holds the attempt back."""
        for dataset in self._datasets:
            dataset.note_refresh(replace(dataset.refresh, phase=Phase.PUT_OFF))

    def reading(self) -> None:
        """Note that the attempt has a connection, and by how much it was put off."""
        for dataset in self._datasets:
            late_s = dataset.behind_s() or 0.0
            dataset.note_refresh(replace(dataset.refresh, phase=Phase.READING, put_off_s=late_s))

    def loading(self, dataset: Dataset, rows: RowsBuilder, expected: int | None) -> None:
        """Note the rows that are being read, and how many are expected."""
        dataset.note_refresh(replace(dataset.refresh, progress=Progress(rows, expected)))

    def loaded(self) -> None:
        """Note that no rows are being read any more."""
        for dataset in self._datasets:
            dataset.note_refresh(replace(dataset.refresh, progress=None))

    def idle(self) -> None:
        """Note that no attempt is under way."""
        for dataset in self._datasets:
            dataset.note_refresh(replace(dataset.refresh, phase=Phase.IDLE))

    def checked(self, dataset: Dataset) -> None:
        """Note a full read."""
        dataset.note_refresh(replace(dataset.refresh, checked_at=self._clock.seconds()))

    def deltas(self, dataset: Dataset, problem: str | None) -> None:
        """Note why the last read could not be a delta, and since when; None if it could."""
        before = dataset.refresh.without_deltas
        if not dataset.settings.watch or problem == (before and before.because):
            return
        since = before.since if before is not None else self._clock.seconds()
        without = None if problem is None else WithoutDeltas(since, problem)
        dataset.note_refresh(replace(dataset.refresh, without_deltas=without))
