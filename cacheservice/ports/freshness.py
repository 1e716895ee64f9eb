"""Waits for a snapshot that is new enough.

All readers that wait for a dataset share its refreshes. A wait for a generation starts none: generations come from
another process that publishes them, or from the dataset's schedule, and an early refresh that finds the same content
would not change the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from twisted.internet.defer import Deferred

from cacheservice.base.errors import UnknownDataset
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import DatabaseStatus, Refreshes
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Ended, Event, Published, Renewed
from cacheservice.cache.snapshot import Snapshot

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


class Wanted(NamedTuple):
    """The snapshot that a reader asks for.

    :param max_age_s: its greatest age when the request arrives; infinite for any.
    :param min_generation: its least generation; 0 for any.
    """

    max_age_s: float = math.inf
    min_generation: int = 0


class Freshness:
    """Lets the read ports wait until a dataset is fresh enough.

    :param database: knows the server whose transactions readers wait for.
    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, refreshes: Refreshes, database: DatabaseStatus, clock: Clock) -> None:
        self._refreshes = refreshes
        self._database = database
        self._clock = clock

    async def meets(self, dataset: Dataset, wanted: Wanted) -> bool:
        """Wait for a snapshot as `wanted`.

        Return False if there is none within the dataset's `timeout_s`.

        :raises UnknownDataset: if the dataset is removed meanwhile.
        :raises Stopped: if a refresh is needed, and the process is stopping or does not refresh.
        """
        now: float = self._clock.seconds()
        moment, deadline_at = now - wanted.max_age_s, now + dataset.settings.timeout_s

        def enough(snapshot: Snapshot) -> bool:
            return snapshot.read_at >= moment

        if math.isinf(wanted.max_age_s):
            return await self.reaches(dataset, wanted.min_generation, dataset.settings.timeout_s)
        # A refresh for the age may bring the generation, so the age comes first. A rollback publishes a higher
        # generation that is older, so both are checked on the same snapshot.
        while await self._wait(dataset, enough, moment, deadline_at - self._clock.seconds()):
            if not await self.reaches(dataset, wanted.min_generation, deadline_at - self._clock.seconds()):
                return False
            if dataset.snapshot and enough(dataset.snapshot):
                return True
        return False

    async def reaches(self, dataset: Dataset, generation: int, timeout_s: float) -> bool:
        """Wait until the served generation is at least `generation`, without starting a refresh.

        Return False if it is not within `timeout_s`.

        :raises UnknownDataset: if the dataset is removed meanwhile.
        """
        deadline_at: float = self._clock.seconds() + timeout_s
        while generation and not (dataset.snapshot and dataset.snapshot.generation >= generation):
            if dataset.removed:
                raise UnknownDataset(f"unknown dataset '{dataset.name}'")
            left_s = deadline_at - self._clock.seconds()
            if left_s <= 0:
                return False
            await self._published(dataset, left_s)
        return True

    async def includes(self, dataset: Dataset, transaction_id: int, timeout_s: float) -> bool:
        """Wait until the served snapshot includes a finished PostgreSQL transaction.

        Return False if it does not within `timeout_s`.

        :raises UnknownDataset: if the dataset is removed meanwhile.
        :raises Stopped: if a refresh is needed, and the process is stopping or does not refresh.
        """

        def enough(snapshot: Snapshot) -> bool:
            return snapshot.includes(transaction_id, self._database.server)

        return await self._wait(dataset, enough, self._clock.seconds(), timeout_s)

    async def _wait(
        self, dataset: Dataset, enough: Callable[[Snapshot], bool], moment: float, timeout_s: float
    ) -> bool:
        pause_s = _FIRST_PAUSE_S
        deadline_at: float = self._clock.seconds() + timeout_s
        while not (dataset.snapshot and enough(dataset.snapshot)):
            if dataset.removed:
                raise UnknownDataset(f"unknown dataset '{dataset.name}'")
            left_s = deadline_at - self._clock.seconds()
            if left_s <= 0:
                return False
            if dataset.snapshot and dataset.snapshot.began_at >= moment:
                # The snapshot was read after the request and still lacks the transaction, which has not ended yet.
                # Pause first.
                await self._published(dataset, min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                moment = self._clock.seconds()
            else:
                # The dataset's own schedule retries a refresh that fails.
                self._refreshes.refresh_since(dataset.name, moment)
                await self._published(dataset, left_s)
        return True

    async def _published(self, dataset: Dataset, timeout_s: float) -> None:
        """Wait for the next publish or renewal, the dataset's removal, or the timeout."""
        woken: Deferred[None] = Deferred()
        timer = self._clock.callLater(timeout_s, woken.callback, None)

        def wake(_: Event) -> None:
            if not woken.called:
                woken.callback(None)

        unsubscribe = dataset.subscribe(wake, Published, Renewed, Ended)
        try:
            await woken
        finally:
            unsubscribe()
            if timer.active():
                timer.cancel()
