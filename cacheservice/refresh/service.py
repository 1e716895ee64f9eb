"""The main service: refreshes every dataset on its interval; a failing dataset does not harm the others."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.python.failure import Failure

from cacheservice.base.errors import CacheServiceError, NothingToRollBackTo, RefreshFailed, Stopped, UnknownDataset
from cacheservice.base.interfaces import Clock, DelayedCall, Log
from cacheservice.base.timers import is_active, looping
from cacheservice.cache.cache import Cache, Declared
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.drain import Drain
from cacheservice.config import OWN_CHANNEL, DatasetSettings, groups
from cacheservice.refresh.budget import Budget
from cacheservice.refresh.history import History
from cacheservice.refresh.pruning import CHANGES_KEPT_S, kept_because
from cacheservice.refresh.refresher import Means, Reads, Refresher
from cacheservice.refresh.restore import restore
from cacheservice.refresh.slots import Slots
from cacheservice.sources.postgres.database import PRUNED_A_CALL
from cacheservice.sources.postgres.deltas import watched_ids
from cacheservice.sources.postgres.recorded import Recorded

_BURST = 100
"""This many notifications in a row are a burst: a transaction that sends thousands."""
_BURST_PAUSE_S = 0.005
_LONGEST_BURST_S = 0.1
_PRUNE_INTERVAL_S = 60.0
_PRUNE_TIMEOUT_S = 10.0


class CacheService(Service):
    """Refreshes the datasets of `cache` from `database`.

    Each dataset or group has a LoopingCall. At most `max_connections` refreshes run at once.

    :param clock: `IReactorTime`, monotonic.
    :param random: returns a number from 0 to 1.
    :param drain: frees dropped rows; it is stopped with this service.
    :param history: the saved snapshots, for a warm start and for rollbacks.
    :param max_load: share of one connection's time that refreshes may use; 0 for no limit.
    :param heard_all: waits until `heard` got every notification sent before the call; False if that is not known.
    """

    name = "refresh"

    def __init__(
        self,
        cache: Cache,
        database: Reads,
        max_connections: int,
        clock: Clock,
        random: Callable[[], float],
        log: Log,
        drain: Drain,
        history: History | None = None,
        max_load: float = 0.0,
        heard_all: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self.slots = Slots(max_connections, self._any_healthy, Budget(max_load, clock))
        cache.database.queued = lambda: self.slots.queue_depth
        self._cache = cache
        self._database = database
        self._clock = clock
        self._drain = drain
        self._history = history
        self._log = log
        self._means = Means(database, cache.database, self.slots, drain.add, clock, random, log, heard_all)
        self._stopping = False
        self._told: set[Refresher] = set()
        self._burst = 0
        self._burst_began_at = 0.0
        self._burst_timer: DelayedCall | None = None
        self._pruning = looping(clock, lambda: self._run(self._prune()))
        self._under_way: set[Deferred[None]] = set()
        self._refreshers: dict[str, Refresher] = {}
        self._ending: set[Refresher] = set()
        for group in groups(dataset.settings for dataset in cache.datasets.values()):
            self._add([cache.dataset(settings.name) for settings in group])

    def _add(self, members: Sequence[Dataset]) -> Refresher:
        refresher = Refresher(members, self._means)
        if any(dataset.pinned for dataset in members):
            for dataset in members:  # one of them joined a group, and a pin is of the whole group
                dataset.pinned = dataset.snapshot is not None
        self._refreshers |= {dataset.name: refresher for dataset in members}
        return refresher

    def startService(self) -> None:
        super().startService()
        self._pruning.start(_PRUNE_INTERVAL_S, now=False)
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
        await restore(history, self._cache, self._clock, self._log)
        for refresher in self._still_there(refreshers):
            refresher.start()

    def channels(self) -> set[str]:
        """Return the LISTEN channels of the datasets, and the service's own channel if a table is watched."""
        declared = [dataset.settings for dataset in self._cache.datasets.values()]
        named = {settings.notify for settings in declared if settings.notify}
        return named | {OWN_CHANNEL} if any(settings.watch for settings in declared) else named

    def heard(self, channel: str, payload: str) -> None:
        """Note a notification."""
        for name, dataset in self._cache.datasets.items():
            if channel == OWN_CHANNEL and dataset.settings.watch and self._is_watched(dataset, payload):
                self._changed(name, ())  # the triggers have recorded which rows
            elif channel == dataset.settings.notify:
                self._changed(name, _keys_of(payload))

    def _changed(self, name: str, keys: Sequence[str] | None) -> None:
        """Refresh once the burst of notifications is over, because an attempt within it would see only a part."""
        refresher = self._refreshers[name]
        refresher.note_changed(name, keys)
        if not self._told:
            self._burst, self._burst_began_at = 0, self._clock.seconds()
            self._burst_timer = self._clock.callLater(0, self._notify, 0)
        self._told.add(refresher)
        self._burst += 1

    def _notify(self, heard_before: int) -> None:
        more = self._burst - heard_before
        is_long = self._clock.seconds() - self._burst_began_at > _LONGEST_BURST_S
        if self._burst >= _BURST and more and not is_long:
            self._burst_timer = self._clock.callLater(_BURST_PAUSE_S, self._notify, self._burst)
            return
        told, self._told = self._told, set()
        for refresher in self._each_once():
            if refresher in told:
                refresher.notified()

    def missed(self) -> None:
        """Look for changes whose notifications may have been missed."""
        for name, dataset in self._cache.datasets.items():
            if dataset.settings.watch or dataset.settings.notify:
                self._refreshers[name].note_changed(name, None if dataset.settings.notify else ())
        for refresher in self._each_once():
            if any(dataset.settings.watch or dataset.settings.notify for dataset in refresher.datasets):
                refresher.notified(at_once=True)

    def _is_watched(self, dataset: Dataset, payload: str) -> bool:
        """Return whether the payload "changed 7" may be of a table that the dataset watches."""
        newest = dataset.newest()
        word, _, number = payload.partition(" ")
        if word != "changed" or not number.isdecimal() or newest is None or not newest.watch_state:
            return True
        known = watched_ids(newest.watch_state)
        # The state does not contain watches with a problem, and the payload may be of one of these.
        return int(number) in known or len(known) < len(dataset.settings.watch)

    async def _prune(self) -> None:
        """Delete recorded changes that are not needed any more. A failure does not end the loop."""
        if not any(dataset.settings.watch for dataset in self._cache.datasets.values()):
            return
        database = self._cache.database
        can_delete = database.server is None or not database.server.in_recovery
        total, until = 0, self._clock.seconds() + _PRUNE_INTERVAL_S / 2
        try:
            while can_delete:
                deleted = await self._database.prune(CHANGES_KEPT_S, _PRUNE_TIMEOUT_S)
                total += deleted
                if deleted < PRUNED_A_CALL or self._clock.seconds() >= until:
                    break
            recorded = await self._database.recorded(_PRUNE_TIMEOUT_S)
        except RefreshFailed as error:
            self._pruned(str(error), total, None)
        else:
            self._pruned(kept_because(recorded, database.lag.seconds), total, recorded)

    def _pruned(self, problem: str | None, deleted: int, recorded: Recorded | None) -> None:
        database = self._cache.database
        is_new = problem != database.prune_problem
        count, oldest_s = (recorded.kept, recorded.oldest_s or 0.0) if recorded is not None else (None, None)
        if recorded is not None and not recorded.may_ask:
            oldest_s = None
        database.pruned(problem, count, oldest_s)
        if problem is None:
            self._log.debug("changes_pruned", rows=deleted, kept=count)
        else:
            level = "warning" if is_new else "debug"
            getattr(self._log, level)("changes_not_pruned", error=problem, kept=count, oldest_s=oldest_s)

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
            self._log.error("internal_error", error=result.getErrorMessage(), traceback=result.getTraceback())

    def stopService(self) -> Deferred[Any]:
        """Start nothing more and end running attempts; fires when no session is left."""
        super().stopService()
        self._stopping = True
        if self._pruning.running:
            self._pruning.stop()
        if is_active(self._burst_timer):
            self._burst_timer.cancel()
        for running in list(self._under_way):
            running.cancel()
        self.slots.stop()
        stopped = DeferredList([refresher.stop() for refresher in {*self._each_once(), *self._ending}])
        stopped.addBoth(lambda _: self._database.end_kept())
        return stopped.addBoth(lambda _: self._drain.stop())

    def refresh_now(self, name: str) -> bool:
        """``cacheservice.cache.cache.Refreshes``."""
        return self._refresher(name).refresh_now()

    def accept_next(self, name: str) -> None:
        """``cacheservice.cache.cache.Refreshes``."""
        self._cache.dataset(name).accepts_next = True

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
                self._log.warning("rollback_failed", dataset=dataset.name, to=generation, error=str(error))
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


def _keys_of(payload: str) -> list[str] | None:
    """Return the keys of a payload that is a JSON list of keys; None, which means any row, for other payloads."""
    try:
        keys = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(keys, list) or not all(isinstance(key, str | int) and not isinstance(key, bool) for key in keys):
        return None
    return [str(key) for key in keys]
