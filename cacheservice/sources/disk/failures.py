"""Failures to save, such as on a full disk: each is reported once, counted, and tried again."""

from __future__ import annotations

from collections.abc import Iterable

from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.text import seconds
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.sources.disk.generations import Names
from cacheservice.sources.disk.layout import problem_of
from cacheservice.sources.disk.lock import DirectoryTaken
from cacheservice.sources.disk.schedule import Schedule
from cacheservice.sources.disk.writer import Writer


class SaveFailures:
    """Reports failed saves and their end, and plans the next try.

    The served snapshots stay. What was written of the save has been removed by `Writer`.
    """

    def __init__(self, cache: Cache, schedule: Schedule, writer: Writer, clock: Clock, log: Log) -> None:
        self._cache = cache
        self._schedule = schedule
        self._writer = writer
        self._clock = clock
        self._log = log

    def failed(self, names: Names, error: Exception) -> None:
        """Report a failed save of these datasets; the log has a line for each new problem, not for each try."""
        is_bug = not isinstance(error, OSError | DirectoryTaken)
        problem = str(error) if isinstance(error, DirectoryTaken) else problem_of(self._writer.directory, error)
        retry_in_s = self._schedule.failed(names, self._clock.seconds())
        for dataset in self._declared(names):
            is_new = dataset.save_problem != problem
            dataset.note_save(problem)
            if is_new:
                self._log.warning(
                    "snapshot_save_failed",
                    dataset=dataset.name,
                    error=problem,
                    retry_in_s=seconds(retry_in_s),
                    exc_info=is_bug,
                )

    def succeeded(self, name: str) -> None:
        """Report the end of a problem, if there was one."""
        for dataset in self._declared([name]):
            if dataset.save_problem is not None:
                self._log.info("snapshot_save_recovered", dataset=name)
                dataset.note_save(None)

    def _declared(self, names: Iterable[str]) -> list[Dataset]:
        return [dataset for name in names if (dataset := self._cache.datasets.get(name)) is not None]
