"""The main service: refreshes every dataset on its interval; a failing dataset does not harm the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.python.failure import Failure

from cacheservice.base.errors import CacheServiceError, NothingToRollBackTo, Stopped, UnknownDataset
from cacheservice.cache.cache import Cache, Declared
from cacheservice.cache.dataset import Dataset
from cacheservice.config import DatasetSettings, groups
from cacheservice.refresh.budget import Budget
from cacheservice.refresh.bursts import Bursts
from cacheservice.refresh.history import History
from cacheservice.refresh.refresher import Process, Refresher, Shared
from cacheservice.refresh.restore import restore
from cacheservice.refresh.slots import Slots
from cacheservice.sources.base import Source


class Limits(NamedTuple):
    """What all refreshes together may use of the database.

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
        cache.database.queued = lambda: self._slots.queue_depth
        self._cache = cache
        self._history = history
        self._process = process
        self._shared = Shared(process, source, cache.database, self._slots, heard_all)
        self._stopping = False
        self._changed: set[Refresher] = set()
        self._bursts = Bursts(process.clock, self._notify)
        self._under_way: set[Deferred[None]] = set()
        self._refreshers: dict[str, Refresher] = {}
        self._ending: set[Refresher] = set()
        for group in groups(dataset.settings for dataset in cache.datasets.values()):
            self._add([cache.dataset(settings.name) for settings in group])

    def _add(self, members: Sequence[Dataset]) -> Refresher:
        refresher = Refresher(members, self._shared)
        if any(dataset.pinned for dataset in members):
            for dataset in members:  # one of them joined a group, and a pin is of the whole group
                dataset.pin() if dataset.snapshot is not None else dataset.unpin()
        self._refreshers |= {dataset.name: refresher for dataset in members}
        return refresher

    def startService(self) -> None:
        super().startService()
        self._start(self._each_once())

    def _start(self, refreshers: Iterable[Refresher]) -> None:
        """Start refreshers; those that serve nothing yet start after the saved snapshots have been restored."""
        cold = []
        for refresher in refreshers:
            if self._history is None or all(dataset.snapshot for dataset in refresher.datasets):
                refresher.start()
            else:
                cold.append(refresher)
        if self._history is not None and cold:
            self._run(self._start_warm(self._history, cold))

    async def _start_warm(self, history: History, refreshers: Sequence[Refresher]) -> None:
        # Saved snapshots come first, so that readers have them before the database is asked.
        await restore(history, self._cache, self._process.clock, self._process.log)
        for refresher in self._still_there(refreshers):
            refresher.start()

    def set_limits(self, limits: Limits) -> None:
        """Apply changed limits. Running attempts continue."""
        self._slots.budget.set_share(limits.max_load)
        self._slots.set_limit(limits.max_connections)

    def note_changed(self, name: str, keys: Sequence[str] | None) -> None:
        """Refresh a dataset once the burst of notifications is over.

        :param keys: of the changed rows; None for any row, empty if the source finds the rows by itself.
        """
        refresher = self._refreshers[name]
        refresher.note_changed(name, keys)
        self._changed.add(refresher)
        self._bursts.heard()

    def _notify(self) -> None:
        changed, self._changed = self._changed, set()
        for refresher in self._each_once():
            if refresher in changed:
                refresher.notified()

    def missed(self) -> None:
        """Look for changes whose notifications may have been missed."""
        for name, dataset in self._cache.datasets.items():
            if dataset.settings.watch or dataset.settings.notify:
                self._refreshers[name].note_changed(name, None if dataset.settings.notify else ())
        for refresher in self._each_once():
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
        before = self._each_once()
        definitions = {name: dataset.settings.reading for name, dataset in self._cache.datasets.items()}
        told = self._cache.declare(declared)
        if moved:
            for dataset in self._cache.datasets.values():
                dataset.forget_transactions()
            told = told._replace(changed=[name for name in definitions if name not in told.removed], unchanged=[])
        kept = {
            frozenset(dataset.name for dataset in refresher.datasets): refresher
            for refresher in before
            if not moved and all(d.settings.reading == definitions[d.name] for d in refresher.datasets)
        }
        self._refreshers, begun = {}, []
        for group in groups(declared):
            members = [self._cache.dataset(settings.name) for settings in group]
            refresher = kept.get(frozenset(dataset.name for dataset in members))
            if refresher is None:
                begun.append(self._add(members))
                continue
            self._refreshers |= {dataset.name: refresher for dataset in members}
            if not all(dataset.name in told.unchanged for dataset in members):
                refresher.settings_changed()
        current = set(self._refreshers.values())
        self._run(self._replace([refresher for refresher in before if refresher not in current], begun))
        return told

    async def _replace(self, ended: Sequence[Refresher], begun: Sequence[Refresher]) -> None:
        """Start new refreshers once no attempt of the old ones runs, because refreshes never overlap."""
        self._ending.update(ended)
        await DeferredList([refresher.stop() for refresher in list(self._ending)])
        self._ending.difference_update(ended)
        self._start(self._still_there(begun))

    def _still_there(self, refreshers: Iterable[Refresher]) -> list[Refresher]:
        """Return the refreshers that have not been replaced since."""
        current = set(self._refreshers.values())
        return [refresher for refresher in refreshers if refresher in current]

    def _run(self, work: Coroutine[Any, Any, None]) -> Deferred[None]:
        """Run `work` until it ends or the service stops."""
        running = Deferred.fromCoroutine(work)
        self._under_way.add(running)
        return running.addBoth(self._ran, running)

    def _ran(self, result: object, running: Deferred[None]) -> None:
        self._under_way.discard(running)
        if isinstance(result, Failure) and not result.check(CancelledError):
            self._process.log.error("internal_error", error=result.getErrorMessage(), traceback=result.getTraceback())

    def stopService(self) -> Deferred[Any]:
        """Start nothing more and end running attempts; fires when no session is left."""
        super().stopService()
        self._stopping = True
        self._bursts.stop()
        for running in list(self._under_way):
            running.cancel()
        self._slots.stop()
        stopped = DeferredList([refresher.stop() for refresher in {*self._each_once(), *self._ending}])
        stopped.addBoth(lambda _: self._shared.source.end_kept())
        return stopped.addBoth(lambda _: self._process.drain.stop())

    def refresh_now(self, name: str) -> bool:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._refresher(name).refresh_now()

    def accept_next(self, name: str) -> None:
        """``cacheservice.cache.cache.Refreshes``."""
        self._cache.dataset(name).accept_next()

    def pin(self, name: str) -> list[str]:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._refresher(name).operator.pin()

    def unpin(self, name: str) -> list[str]:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._refresher(name).operator.unpin()

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
            # A dataset whose content did not change has the same generation at both moments.
            if list(saved) != current and all(was <= now for was, now in zip(saved, current, strict=True)):
                self._run(self._roll_back(self._history, refresher, saved))
                return dict(zip(names, saved, strict=True))
        group = f" together with its group ({', '.join(names)})" if len(names) > 1 else ""
        raise NothingToRollBackTo(f"no generation of {name} before {current[names.index(name)]} is saved{group}")

    async def _roll_back(self, history: History, refresher: Refresher, generations: Sequence[int]) -> None:
        saved = []
        for dataset, generation in zip(refresher.datasets, generations, strict=True):
            try:
                saved.append(await history.load(dataset.name, generation))
                if refresher is not self._refreshers.get(dataset.name):
                    raise NothingToRollBackTo(f"{dataset.name} is not declared any more as it was then")
            except CacheServiceError as error:
                self._process.log.warning("rollback_failed", dataset=dataset.name, to=generation, error=str(error))
                return
        refresher.operator.roll_back(saved)

    def refresh_since(self, name: str, moment: float) -> None:
        """``cacheservice.cache.cache.Refreshes``."""
        if self._stopping:
            raise Stopped("the service is stopping")
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
