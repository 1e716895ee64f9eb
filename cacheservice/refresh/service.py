"""The main job: every dataset refreshed on its interval, a failing one without harm to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList

from cacheservice.cache.cache import Cache
from cacheservice.config import groups
from cacheservice.errors import UnknownDataset
from cacheservice.refresh.drain import Drain
from cacheservice.refresh.refresher import Reads, Refresher
from cacheservice.refresh.slots import Slots


class CacheService(Service):
    """Refreshes the datasets of `cache` from `database`: a LoopingCall for each or for each group, at most
    `max_connections` at once.

    :param clock: `IReactorTime`, monotonic.
    :param random: a number from 0 to 1.
    """

    name = "refresh"

    def __init__(
        self,
        cache: Cache,
        database: Reads,
        max_connections: int,
        clock: Any,
        random: Callable[[], float],
        log: Any,
    ) -> None:
        self.slots = Slots(max_connections, any_healthy=self._any_healthy)
        self._cache = cache
        self._drain = Drain(clock)
        self._refreshers: dict[str, Refresher] = {}
        for group in groups(dataset.settings for dataset in cache.datasets.values()):
            members = [cache.dataset(settings.name) for settings in group]
            refresher = Refresher(members, database, cache.database, self.slots, self._drain.add, clock, random, log)
            self._refreshers |= {dataset.name: refresher for dataset in members}

    def startService(self) -> None:
        super().startService()
        for refresher in self._each_once():
            refresher.start()

    def stopService(self) -> Deferred[Any]:
        """Start nothing more, end what runs; fires when no session is left."""
        super().stopService()
        self.slots.stop()
        stopped = DeferredList([refresher.stop() for refresher in self._each_once()])
        return stopped.addBoth(lambda _: self._drain.stop())

    def refresh_now(self, name: str) -> bool:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._refresher(name).refresh_now()

    def accept_next(self, name: str) -> None:
        """``cacheservice.cache.cache.Refreshes``."""
        self._cache.dataset(name).accepts_next = True

    def pin(self, name: str) -> list[str]:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._refresher(name).pin()

    def unpin(self, name: str) -> list[str]:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._refresher(name).unpin()

    def refresh_since(self, name: str, moment: float) -> None:
        """``cacheservice.cache.cache.Refreshes``."""
        self._refresher(name).refresh_since(moment)

    def _each_once(self) -> list[Refresher]:
        return list(dict.fromkeys(self._refreshers.values()))

    def _refresher(self, name: str) -> Refresher:
        try:
            return self._refreshers[name]
        except KeyError:
            raise UnknownDataset(f"unknown dataset '{name}'") from None

    def _any_healthy(self) -> bool:
        return any(dataset.consecutive_failures == 0 for dataset in self._cache.datasets.values())
