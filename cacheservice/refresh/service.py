"""The main job: every dataset refreshed on its interval, a failing one without harm to the others."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.python.failure import Failure

from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Snapshot
from cacheservice.config import groups
from cacheservice.errors import CacheServiceError, NothingToRollBackTo, UnknownDataset
from cacheservice.refresh.drain import Drain
from cacheservice.refresh.refresher import Reads, Refresher
from cacheservice.refresh.slots import Slots


class History(Protocol):
    """What was saved: ``cacheservice.persistence.store.SnapshotStore``."""

    async def restore(self) -> None:
        """Publish the newest saved snapshot of each dataset. Never raises."""

    def saved(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """The saved generations of a dataset, or those of a group that are of one moment, newest first."""

    async def load(self, name: str, generation: int) -> Snapshot:
        """:raises CacheServiceError: if it cannot be had."""


class CacheService(Service):
    """Refreshes the datasets of `cache` from `database`: a LoopingCall for each or for each group, at most
    `max_connections` at once.

    :param clock: `IReactorTime`, monotonic.
    :param random: a number from 0 to 1.
    :param drain: gets what is dropped; it is stopped with this service.
    :param history: what is served before the first refresh, and what can be rolled back to.
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
        drain: Drain,
        history: History | None = None,
    ) -> None:
        self.slots = Slots(max_connections, any_healthy=self._any_healthy)
        self._cache = cache
        self._drain = drain
        self._history = history
        self._log = log
        self._under_way: set[Deferred[None]] = set()
        self._refreshers: dict[str, Refresher] = {}
        for group in groups(dataset.settings for dataset in cache.datasets.values()):
            members = [cache.dataset(settings.name) for settings in group]
            refresher = Refresher(members, database, cache.database, self.slots, self._drain.add, clock, random, log)
            self._refreshers |= {dataset.name: refresher for dataset in members}

    def startService(self) -> None:
        super().startService()
        if self._history is None:
            self._start_refreshers()
        else:
            self._run(self._start_warm(self._history))

    async def _start_warm(self, history: History) -> None:
        # What was saved first: the database is asked for nothing before readers have what there is.
        await history.restore()
        self._start_refreshers()

    def _start_refreshers(self) -> None:
        for refresher in self._each_once():
            refresher.start()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """See `work` to its end, or to the stop of the service."""
        running = Deferred.fromCoroutine(work)
        self._under_way.add(running)
        running.addBoth(self._ran, running)

    def _ran(self, result: object, running: Deferred[None]) -> None:
        self._under_way.discard(running)
        if isinstance(result, Failure) and not result.check(CancelledError):
            self._log.error("internal_error", error=result.getErrorMessage(), traceback=result.getTraceback())

    def stopService(self) -> Deferred[Any]:
        """Start nothing more, end what runs; fires when no session is left."""
        super().stopService()
        for running in list(self._under_way):
            running.cancel()
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

    def roll_back(self, name: str) -> dict[str, int]:
        """``cacheservice.cache.cache.Refreshes``."""
        refresher = self._refresher(name)
        names = [dataset.name for dataset in refresher.datasets]
        if self._history is None:
            raise NothingToRollBackTo("nothing is saved; set persistence.directory")
        current = []
        for dataset in refresher.datasets:
            if (served := dataset.snapshot) is None:
                raise NothingToRollBackTo(f"{dataset.name} has not been loaded yet")
            current.append(served.rolled_back_to or served.generation)
        for saved in self._history.saved(names):
            if all(earlier < served for earlier, served in zip(saved, current, strict=True)):
                self._run(self._roll_back(self._history, refresher, saved))
                return dict(zip(names, saved, strict=True))
        group = f" together with its group ({', '.join(names)})" if len(names) > 1 else ""
        raise NothingToRollBackTo(f"no generation of {name} before {current[names.index(name)]} is saved{group}")

    async def _roll_back(self, history: History, refresher: Refresher, generations: Sequence[int]) -> None:
        saved = []
        for dataset, generation in zip(refresher.datasets, generations, strict=True):
            try:
                saved.append(await history.load(dataset.name, generation))
            except CacheServiceError as error:
                self._log.warning("rollback_failed", dataset=dataset.name, to=generation, error=str(error))
                return
        refresher.roll_back(saved)

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
