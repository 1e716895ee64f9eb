"""The main job: every dataset refreshed on its interval, a failing one without harm to the others."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure

from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset, Snapshot
from cacheservice.config import OWN_CHANNEL, groups
from cacheservice.errors import CacheServiceError, NothingToRollBackTo, RefreshFailed, UnknownDataset
from cacheservice.postgres.deltas import watched_ids
from cacheservice.refresh.drain import Drain
from cacheservice.refresh.refresher import Reads, Refresher
from cacheservice.refresh.slots import Slots

CHANGES_KEPT_S = 3600.0
"""A dataset that was not refreshed for longer reads all rows."""
_PRUNE_INTERVAL_S = 60.0
_PRUNE_TIMEOUT_S = 10.0


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
    :param heard_all: waits until every notification that was sent before has come to `heard`; False if nobody knows.
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
        heard_all: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self.slots = Slots(max_connections, any_healthy=self._any_healthy)
        self._cache = cache
        self._drain = drain
        self._history = history
        self._log = log
        self._database = database
        self._clock = clock
        self._pruning = LoopingCall(lambda: self._run(self._prune()))
        self._pruning.clock = clock
        self._under_way: set[Deferred[None]] = set()
        self._refreshers: dict[str, Refresher] = {}
        for group in groups(dataset.settings for dataset in cache.datasets.values()):
            members = [cache.dataset(settings.name) for settings in group]
            refresher = Refresher(
                members, database, cache.database, self.slots, self._drain.add, clock, random, log, heard_all
            )
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
        self._pruning.start(_PRUNE_INTERVAL_S, now=False)

    def channels(self) -> set[str]:
        """On which datasets are notified of; the service's own among them where a table is watched."""
        declared = [dataset.settings for dataset in self._cache.datasets.values()]
        named = {settings.notify for settings in declared if settings.notify}
        return named | {OWN_CHANNEL} if any(settings.watch for settings in declared) else named

    def heard(self, channel: str, payload: str) -> None:
        """A notification came."""
        for name, dataset in self._cache.datasets.items():
            if channel == OWN_CHANNEL and dataset.settings.watch and self._is_watched(dataset, payload):
                self._refreshers[name].notified(name, None)
            elif channel == dataset.settings.notify:
                self._refreshers[name].notified(name, _keys_of(payload))

    def missed(self) -> None:
        """Notifications may have been missed: what they would have told of is looked for."""
        for name, dataset in self._cache.datasets.items():
            if dataset.settings.watch or dataset.settings.notify:
                self._refreshers[name].notified(name, None)

    def _is_watched(self, dataset: Dataset, payload: str) -> bool:
        """Whether "changed 7" is of a table that the dataset watches; of which it is not known, it may be."""
        newest = dataset.newest()
        word, _, number = payload.partition(" ")
        if word != "changed" or not number.isdecimal() or newest is None or not newest.watch_state:
            return True
        return int(number) in watched_ids(newest.watch_state)

    async def _prune(self) -> None:
        """Delete recorded changes that nobody will ask for any more; whatever comes of it, the loop goes on."""
        if not any(dataset.settings.watch for dataset in self._cache.datasets.values()):
            return
        try:
            deleted = await self._database.prune(CHANGES_KEPT_S, _PRUNE_TIMEOUT_S)
        except RefreshFailed as error:
            # On a standby, without the right, without the migration: told with each delta that suffers from it.
            self._log.debug("changes_not_pruned", error=str(error))
        else:
            self._log.debug("changes_pruned", rows=deleted)

    def _run(self, work: Coroutine[Any, Any, None]) -> Deferred[None]:
        """See `work` to its end, or to the stop of the service."""
        running = Deferred.fromCoroutine(work)
        self._under_way.add(running)
        return running.addBoth(self._ran, running)

    def _ran(self, result: object, running: Deferred[None]) -> None:
        self._under_way.discard(running)
        if isinstance(result, Failure) and not result.check(CancelledError):
            self._log.error("internal_error", error=result.getErrorMessage(), traceback=result.getTraceback())

    def stopService(self) -> Deferred[Any]:
        """Start nothing more, end what runs; fires when no session is left."""
        super().stopService()
        if self._pruning.running:
            self._pruning.stop()
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


def _keys_of(payload: str) -> list[str] | None:
    """The keys that a payload names if it is a JSON list of keys; None, for any row, if it is something else."""
    try:
        keys = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(keys, list) or not all(isinstance(key, str | int) and not isinstance(key, bool) for key in keys):
        return None
    return [str(key) for key in keys]
