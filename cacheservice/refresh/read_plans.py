"""Makes the read plans of an attempt, and reports the progress of its reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from cacheservice.cache.dataset import Dataset
from cacheservice.cache.rows import RowsBuilder
from cacheservice.cache.snapshot import Snapshot, rows_builder
from cacheservice.refresh.notified import NotifiedKeys
from cacheservice.refresh.process import Process
from cacheservice.refresh.results import Try
from cacheservice.refresh.statuses import Statuses
from cacheservice.sources.base import ReadPlan
from cacheservice.sources.full_or_delta import plan


class Planning:
    """Makes read plans.

    It knows the keys that notifications have named: an attempt takes them as it begins. If it fails or its result is
    held, `lose_keys` makes the next one read everything, because the keys are as lost as the attempt.

    :param heard_all: waits until every notification that was sent before this call has been heard; False if that
        cannot be known.
    """

    def __init__(self, statuses: Statuses, process: Process, heard_all: Callable[[], Awaitable[bool]] | None) -> None:
        self._statuses = statuses
        self._process = process
        self._heard_all = heard_all
        self._notified = NotifiedKeys()

    def note_changed(self, name: str, keys: Iterable[str] | None) -> None:
        """Note that a dataset has changed, in these rows or with None in any row."""
        self._notified.add(name, keys)

    def lose_keys(self, datasets: Iterable[Dataset]) -> None:
        """Have the next attempt read all rows of datasets whose notifications name keys."""
        self._notified.forget(dataset.name for dataset in datasets if dataset.settings.notify)

    def read_plan(self, dataset: Dataset, base: Snapshot | None, this: Try, *, whole: bool) -> ReadPlan:
        """Return how an attempt reads a dataset.

        :param base: the newest result, None if there is none of this definition.
        :param whole: whether an operator asked for a full read.
        """
        settings = dataset.settings
        keys = self._notified.take(dataset.name)
        checked_at = dataset.refresh.checked_at
        is_due = checked_at is not None and self._process.clock.seconds() - checked_at >= settings.full_interval_s
        planned = plan(settings, base, keys, this.trigger, whole=whole, check_is_due=is_due)

        def build() -> RowsBuilder:
            builder = rows_builder(settings, self._process.drain.add)
            self._statuses.loading(dataset, builder, base.rows.count if base else None)
            if base is not None:
                builder.expect(base.rows.count, base.rows)
            return builder

        def expect(rows: int) -> None:
            progress = dataset.refresh.progress
            assert progress is not None, "the builder was made before"
            self._statuses.loading(dataset, progress.rows, rows)

        async def keys_by_now() -> frozenset[str] | None:
            # The transaction sees what was sent before it began, and perhaps not what is heard meanwhile. So these keys
            # stay for the attempt that follows, and for this one if it has to begin again in another session.
            if keys is None or self._heard_all is None or not await self._heard_all():
                return None
            more = self._notified.since(dataset.name)
            return None if more is None else keys | more

        return ReadPlan(
            settings,
            build,
            # The planner's estimate is asked for only where there is no better one.
            expect if base is None else None,
            base.rows if base else None,
            planned.since,
            check=planned.check,
            most_keys=planned.most_keys,
            notified=keys_by_now if planned.use_keys else None,
            trust_probe=planned.trust_probe,
            attempt=this.id,
        )
