"""Compares results with what is served, slice by slice: a publish reports what it changes, and no change is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.timers import pause
from cacheservice.cache.changes import Change, ChangeCount
from cacheservice.cache.delta import Delta
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.refresh.results import Result
from cacheservice.sources.base import AllRows, Unchanged


class Comparison(NamedTuple):
    """The changes that publishing a result would make.

    :param like: the snapshot that the result equals to the byte, if any.
    :param delta: the rows that differ from what is served; None if nothing is served, or they are many.
    """

    change: Change
    like: Snapshot | None
    delta: Delta | None


class Comparer:
    """Compares results without holding the reactor.

    :param clock: `IReactorTime`.
    :param logs: by dataset.
    """

    def __init__(self, clock: Clock, logs: Mapping[str, Log]) -> None:
        self._clock = clock
        self._logs = logs

    async def compare(self, results: Sequence[Result]) -> list[Comparison]:
        """Return a comparison for each result, all with what is served in this very turn."""
        while True:
            served = [result.dataset.snapshot for result in results]
            found = [await self._compared(*each) for each in zip(results, served, strict=True)]
            if all(result.dataset.snapshot is before for result, before in zip(results, served, strict=True)):
                return found

    async def _compared(self, result: Result, served: Snapshot | None) -> Comparison:
        if served is None:
            return Comparison(Change(result.rows.count, 0, 0), None, None)
        change, delta = await self._change(result, served)
        candidate = result.dataset.candidate
        # The columns of an unchanged result were not asked for.
        columns = served.columns if isinstance(result.read, Unchanged) else result.read.columns
        if not any(change) and served.columns == columns:
            result.rows.note_digest(served.rows.digest)
            return Comparison(change, served, delta)
        # Otherwise unpin would publish, and save, once more what a rollback went back from.
        if candidate is not None and candidate.columns == columns and await self._is_equal(candidate.rows, result.rows):
            return Comparison(change, candidate, delta)
        return Comparison(change, None, delta)

    async def _is_equal(self, old: Rows, new: Rows) -> bool:
        if old is new or old.count != new.count:
            return old is new
        count = ChangeCount(old, new)
        for _ in count:
            await pause(self._clock)
        return not any(count.change)

    async def _change(self, result: Result, served: Snapshot) -> tuple[Change, Delta | None]:
        if result.change is not None and result.base is served:
            return result.change, result.delta
        expected = result.read.may_differ if isinstance(result.read, AllRows) and result.base is served else None
        differing = result.differing if result.base is not None and result.base.rows is served.rows else None
        count = ChangeCount(served.rows, result.rows, expected, differing)
        for _ in count:
            await pause(self._clock)
        result.rows.note_digest(count.digest)
        if count.unexpected_count:
            # Deltas have missed something: what is published now is right again, and somebody has to know.
            result.dataset.counts.count_differences(count.unexpected_count)
            self._logs[result.dataset.name].error(
                "delta_differences",
                count=count.unexpected_count,
                keys=[key.decode() for key in count.unexpected],
                error="rows changed that no trigger recorded; does the query depend on a table that is not watched, "
                "or a row of it on other rows?"
                if result.dataset.settings.watch
                else "rows changed although the probe's value did not; a probe must see deletes, and changes that are "
                "committed later than others which began after them",
            )
        return count.change, count.delta
