"""Deletes recorded changes that are not needed any more, each minute, and reports if they are kept too long."""

from __future__ import annotations

from typing import Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed

from cacheservice.base.errors import QueryFailed, RefreshFailed
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import looping
from cacheservice.cache.cache import Cache
from cacheservice.cache.capture import captured_by
from cacheservice.cache.dataset import Dataset
from cacheservice.sources.postgres.blockers import NO_FUNCTION
from cacheservice.sources.postgres.recorded import Pruned, Recorded

CHANGES_KEPT_S = 3600.0
"""A dataset that was not refreshed for longer reads all rows."""
_MARGIN_S = 600.0
"""Changes are deleted each minute, by the service or by cron; a transaction of some minutes does no harm."""

_INTERVAL_S = 60.0
_TIMEOUT_S = 10.0


class Prunes(Protocol):
    """The database, as the pruning uses it: `cacheservice.sources.postgres.database.Database`."""

    def prune(self, keep_s: float, timeout_s: float) -> Deferred[Pruned]: ...

    def recorded(self, timeout_s: float) -> Deferred[Recorded]: ...


class Pruning(Service):
    """Deletes old recorded changes each minute while a table is watched.

    :param cache: its `database` is informed of the outcome.
    :param clock: `IReactorTime`, monotonic.
    """

    name = "pruning"

    def __init__(self, cache: Cache, database: Prunes, clock: Clock, log: Log) -> None:
        self._cache = cache
        self._database = database
        self._clock = clock
        self._log = log
        self._loop = looping(clock, lambda: self._tasks.run(self._prune()))
        self._tasks = Tasks(log)
        self._ended: Deferred[None] = succeed(None)

    def startService(self) -> None:
        super().startService()
        self._ended = self._loop.start(_INTERVAL_S, now=False).addCallback(lambda _: None)

    def stopService(self) -> Deferred[None]:
        """End the loop and a running call; fires when it has ended."""
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        self._tasks.cancel()
        return self._ended

    async def _prune(self) -> None:
        """Delete recorded changes that are not needed any more. A failure does not end the loop."""
        datasets = self._cache.datasets.values()
        if not any(dataset.settings.watch and dataset.is_refreshed_here for dataset in datasets):
            return  # in a fleet, the leader deletes them
        status = self._cache.database
        can_delete = status.server is None or not status.server.in_recovery
        total, until = 0, self._clock.seconds() + _INTERVAL_S / 2
        try:
            while can_delete:
                pruned = await self._database.prune(CHANGES_KEPT_S, _TIMEOUT_S)
                total += pruned.rows
                if pruned.is_complete or self._clock.seconds() >= until:
                    break
            recorded = await self._database.recorded(_TIMEOUT_S)
        except RefreshFailed as error:
            is_needed = any(_uses_triggers(each) for each in datasets if each.settings.watch)
            if isinstance(error, QueryFailed) and error.sqlstate in NO_FUNCTION and not is_needed:
                self._note(None, 0, None)  # changes are captured from the log, and the database has no triggers
            else:
                self._note(str(error), total, None)
        else:
            self._note(kept_because(recorded, status.lag.seconds), total, recorded)

    def _note(self, problem: str | None, deleted: int, recorded: Recorded | None) -> None:
        status = self._cache.database
        is_new = problem != status.prune_problem
        count, oldest_s = (recorded.kept, recorded.oldest_s or 0.0) if recorded is not None else (None, None)
        if recorded is not None and not recorded.may_ask:
            oldest_s = None
        status.pruned(problem, count, oldest_s)
        if problem is None:
            self._log.debug("changes_pruned", rows=deleted, kept=count)
        else:
            log = self._log.warning if is_new else self._log.debug
            log("changes_not_pruned", error=problem, kept=count, oldest_s=oldest_s)


def _uses_triggers(dataset: Dataset) -> bool:
    newest = dataset.newest()
    return newest is None or captured_by(newest.watch_state).way != "logical"


def kept_because(recorded: Recorded, lag_s: float) -> str | None:
    """Return why changes older than `CHANGES_KEPT_S` are still there, or None if they are not.

    :param lag_s: of the standby that was asked, where the deletions arrive as late as everything else.
    """
    if not recorded.may_ask and recorded.in_recovery:
        return (
            "this is a standby, and its role may not ask how old they are; on the primary run cacheservice migrate "
            "--reader NAME"
        )
    if recorded.oldest_s is None or recorded.oldest_s - lag_s <= CHANGES_KEPT_S + _MARGIN_S:
        return None
    if recorded.in_recovery:
        return (
            "this is a standby, where nothing can be deleted; let cron on the primary run "
            "SELECT cacheservice.prune('1 hour') each minute"
        )
    return recorded.in_the_way or (
        "the service deletes for at most 30 s a minute and has not caught up; run SELECT cacheservice.prune('1 hour') "
        "until it returns less than 10000"
    )
