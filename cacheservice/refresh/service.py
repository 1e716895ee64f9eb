"""The main service: refreshes every dataset on its interval; a failing dataset does not harm the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList

from cacheservice.base.errors import NothingToRollBackTo, Stopped
from cacheservice.base.tasks import Tasks
from cacheservice.cache.cache import Cache, Declared
from cacheservice.cache.dataset import Dataset
from cacheservice.config import DatasetSettings, groups
from cacheservice.refresh.budget import Budget
from cacheservice.refresh.bursts import Bursts
from cacheservice.refresh.expiry import Expiries
from cacheservice.refresh.history import History
from cacheservice.refresh.lives import Lives
from cacheservice.refresh.process import Process
from cacheservice.refresh.refresher import Refresher, Shared
from cacheservice.refresh.registry import Registry
from cacheservice.refresh.rollback import earlier_generations, load_generations
from cacheservice.refresh.slots import Slots
from cacheservice.sources.base import Source


class Limits(NamedTuple):
    """Limits of all refreshes together.

    :param max_connections: the most refreshes at once.
    :param max_load: share of one connection's time that refreshes may use; 0 for no limit.
    """

    max_connections: int
    max_load: float = 0.0


class CacheService(Service):
    """Refreshes the datasets of `cache` from `source`.

    Each dataset or group has a LoopingCall.

    :param history: the saved snapshots, for a warm start and for rollbacks.
    :param heard_all: waits until `note_changed` was called for every notification sent before; False if that is not
        known.
    """

    name = "refresh"

    def __init__(
        self,
        cache: Cache,
        source: Source,
        limits: Limits,
        process: Process,
        history: History | None = None,
        heard_all: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._slots = Slots(limits.max_connections, self._any_healthy, Budget(limits.max_load, process.clock))
        cache.database.count_queue_by(lambda: self._slots.queue_depth)
        self._cache = cache
        self._history = history
        self._process = process
        self._source = source
        self._stopping = False
        self._changed: set[Refresher] = set()
        self._bursts = Bursts(process.clock, self._notify)
        self._tasks = Tasks(process.log)
        shared = Shared(process, source, cache.database, self._slots, heard_all)
        self._refreshers = Registry(shared, self._groups(dataset.settings for dataset in cache.datasets.values()))
        self._lives = Lives(self._refreshers, cache, history, process, self._tasks)
        self._expiries = Expiries(cache, process.clock, process.log)

    def _groups(self, declared: Iterable[DatasetSettings]) -> list[list[Dataset]]:
        return [[self._cache.dataset(settings.name) for settings in group] for group in groups(declared)]

    def startService(self) -> None:
        super().startService()
        self._expiries.start()
        self._lives.start(self._refreshers.each())

    def follow_leaders(self, ask: Callable[[str], object]) -> None:
        """Refresh nothing until `take_over`, because processes of a fleet take turns. Call it before the start.

        :param ask: asks the leader of a dataset for a refresh.
        """
        self._lives.follow_leaders(ask)

    def take_over(self, name: str, *, stretch: float, delay_s: float) -> None:
        """Refresh a dataset, with its group, from now on; see `Lives.take_over`."""
        self._lives.take_over(name, stretch=stretch, delay_s=delay_s)

    def stand_by(self, name: str) -> None:
        """Refresh a dataset and its group no longer; an attempt that runs is ended."""
        self._lives.stand_by(name)

    def set_limits(self, limits: Limits) -> None:
        """Apply changed limits. Running attempts continue."""
        self._slots.budget.set_share(limits.max_load)
        self._slots.set_limit(limits.max_connections)

    def note_changed(self, name: str, keys: Sequence[str] | None) -> None:
        """Refresh a dataset once the burst of notifications is over.

        :param keys: of the changed rows; None for any row, empty if the source finds the rows by itself.
        """
        refresher = self._refreshers.find(name)
        refresher.note_changed(name, keys)
        self._changed.add(refresher)
        self._bursts.heard()

    def _notify(self) -> None:
        changed, self._changed = self._changed, set()
        for refresher in self._refreshers.each():
            if refresher in changed:
                refresher.notified()

    def missed(self) -> None:
        """Look for changes whose notifications may have been missed."""
        for name, dataset in self._cache.datasets.items():
            if dataset.settings.watch or dataset.settings.notify:
                self._refreshers.find(name).note_changed(name, None if dataset.settings.notify else ())
        for refresher in self._refreshers.each():
            if any(dataset.settings.watch or dataset.settings.notify for dataset in refresher.datasets):
                refresher.notified(at_once=True)

    def redeclare(self, declared: Sequence[DatasetSettings], *, moved: bool = False) -> Declared:
        """Replace the declared datasets; unchanged datasets are not disturbed.

        A dataset that is new, or whose query, key or group has changed, is loaded at once, and serves its old snapshot
        until then. The running refresh of a removed dataset is ended.

        :param moved: the database is another one, so that all datasets are loaded again.
        :raises Stopped: if the service is not running.
        """
        if not self.running:
            raise Stopped("the service is stopping")
        definitions = {name: dataset.settings.reading for name, dataset in self._cache.datasets.items()}
        fates = self._cache.declare(declared)
        if moved:
            for dataset in self._cache.datasets.values():
                dataset.forget_transactions()
            fates = fates._replace(changed=[name for name in definitions if name not in fates.removed], unchanged=[])
        keepable = [
            refresher
            for refresher in self._refreshers.each()
            if not moved and all(d.settings.reading == definitions[d.name] for d in refresher.datasets)
        ]
        ended, begun, kept = self._refreshers.replace(self._groups(declared), keepable)
        for refresher in kept:
            if not all(dataset.name in fates.unchanged for dataset in refresher.datasets):
                refresher.settings_changed()
        self._lives.replace(ended, begun)
        return fates

    def stopService(self) -> Deferred[Any]:
        """Start nothing more and end running attempts; fires when no session is left."""
        super().stopService()
        self._stopping = True
        self._bursts.stop()
        self._expiries.stop()
        self._tasks.cancel()
        self._slots.stop()
        stopped = DeferredList([refresher.stop() for refresher in {*self._refreshers.each(), *self._lives.ending}])
        stopped.addBoth(lambda _: self._source.end_kept())
        return stopped.addBoth(lambda _: self._process.drain.stop())

    def refresh_now(self, name: str) -> bool:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._lives.ask_leader(name) or self._refreshers.find(name).refresh_now()

    def accept_next(self, name: str) -> None:
        """``cacheservice.cache.cache.Refreshes``."""
        self._lives.leading(name)
        self._cache.dataset(name).accept_next()

    def pin(self, name: str) -> list[str]:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._lives.leading(name).operator.pin()

    def unpin(self, name: str) -> list[str]:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._lives.leading(name).operator.unpin()

    def roll_back(self, name: str) -> dict[str, int]:
        """``cacheservice.cache.cache.Refreshes``."""
        refresher = self._lives.leading(name)
        if self._history is None:
            raise NothingToRollBackTo("nothing is saved; set persistence.directory")
        generations = earlier_generations(name, refresher.datasets, self._history)
        self._tasks.run(self._roll_back(self._history, refresher, generations))
        return dict(zip([dataset.name for dataset in refresher.datasets], generations, strict=True))

    async def _roll_back(self, history: History, refresher: Refresher, generations: Sequence[int]) -> None:
        def still_declared() -> bool:
            return bool(self._refreshers.still_there([refresher]))

        saved = await load_generations(refresher.datasets, generations, history, still_declared, self._process.log)
        if saved is not None:
            refresher.operator.roll_back(saved)

    def refresh_since(self, name: str, moment: float) -> None:
        """``cacheservice.cache.cache.Refreshes``."""
        if self._stopping:
            raise Stopped("the service is stopping")
        if not self._lives.ask_leader(name):
            self._refreshers.find(name).refresh_since(moment)

    def _any_healthy(self) -> bool:
        return any(dataset.consecutive_failures == 0 for dataset in self._cache.datasets.values())
