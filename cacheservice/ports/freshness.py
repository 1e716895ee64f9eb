"""Waits for a snapshot that is new enough.

All readers that wait for a dataset share its refreshes.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred

from cacheservice.base.errors import UnknownDataset
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import DatabaseStatus, Refreshes
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Ended, Event, Published, Renewed
from cacheservice.cache.snapshot import Snapshot

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


class Freshness:
    """Lets the read ports wait until a dataset is fresh enough.

    :param database: knows the server whose transactions readers wait for.
    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, refreshes: Refreshes, database: DatabaseStatus, clock: Clock) -> None:
        self._refreshes = refreshes
        self._database = database
        self._clock = clock

    async def at_most(self, dataset: Dataset, max_age_s: float) -> bool:
        """Wait for a snapshot read at most `max_age_s` before this call.

        Return False if there is none within the dataset's `timeout_s`.

        :raises UnknownDataset: if the dataset is removed meanwhile.
        :raises Stopped: if a refresh is needed, and the process is stopping or does not refresh.
        """
        moment: float = self._clock.seconds() - max_age_s

        def enough(snapshot: Snapshot) -> bool:
            return snapshot.read_at >= moment

        return await self._wait(dataset, enough, moment, dataset.settings.timeout_s)

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
