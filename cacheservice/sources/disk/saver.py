"""Saves the snapshots that the cache serves.

The datasets of a group are saved together, so that all served rows of a group are of one moment after a restart, too.
If a refresh reads the same rows, they are not saved again: a small file beside the saved one renews it, so that the age
counts from the last read that returned these rows.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred

from cacheservice.base.errors import Stopped
from cacheservice.base.interfaces import Clock, DelayedCall, Log
from cacheservice.base.text import seconds
from cacheservice.base.timers import is_active
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Event, Published, Renewed
from cacheservice.cache.snapshot import Snapshot
from cacheservice.sources.disk.failures import SaveFailures
from cacheservice.sources.disk.generations import Names
from cacheservice.sources.disk.schedule import Schedule
from cacheservice.sources.disk.writer import Part, Writer
from cacheservice.sources.frames.clocks import Clocks
from cacheservice.sources.frames.header import Header, header_of


class Saver:
    """Saves one dataset or group after the other.

    It is stopped at first: nothing is saved. After `start` it is idle, waits for the first save that is due, or saves.
    `stop` stops it again; a save that runs then ends, because the work of the store is stopped, and is not retried.
    """

    def __init__(
        self,
        cache: Cache,
        writer: Writer,
        schedule: Schedule,
        clocks: Clocks,
        clock: Clock,
        log: Log,
    ) -> None:
        self._cache = cache
        self._writer = writer
        self._schedule = schedule
        self._clocks = clocks
        self._clock = clock
        self._log = log
        self._failures = SaveFailures(cache, schedule, writer, clock, log)
        self._unsubscribe: Callable[[], None] | None = None
        self._timer: DelayedCall | None = None
        self._saving: Deferred[None] | None = None

    def start(self) -> None:
        """Save what is published from now on."""
        self._unsubscribe = self._cache.events.subscribe(self._happened, Published, Renewed)

    def stop(self) -> None:
        """Begin no save any more."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        self._schedule.clear()
        self._forget_timer()

    def _happened(self, event: Event) -> None:
        dataset = self._cache.dataset(event.dataset)
        snapshot = dataset.snapshot
        if snapshot is None or not _is_to_be_saved(snapshot) or dataset.redefined:
            return
        is_saved = self._writer.holds(self._header(dataset, snapshot))
        self._schedule.want(self._with_its_group(dataset), renews=is_saved)
        self._plan()

    def _header(self, dataset: Dataset, snapshot: Snapshot) -> Header:
        return header_of(dataset.settings, snapshot, self._clocks.read_on(snapshot.read_at))

    def _with_its_group(self, dataset: Dataset) -> Names:
        group = dataset.settings.group
        if not group:
            return (dataset.name,)
        return tuple(name for name, each in self._cache.datasets.items() if each.settings.group == group)

    def _plan(self) -> None:
        """Start the timer for the first save that is due.

        It fires in the next turn at the earliest. By then all datasets of a group are published.
        """
        self._forget_timer()
        first = self._schedule.first()
        if first is not None and self._saving is None and self._unsubscribe is not None:
            at, names = first
            self._timer = self._clock.callLater(max(0.0, at - self._clock.seconds()), self._begin, names)

    def _begin(self, names: Names) -> None:
        self._schedule.begin(names)
        saving = Deferred.fromCoroutine(self._save(names))
        if not saving.called:
            self._saving = saving
        saving.addCallback(self._ended)

    def _ended(self, _: None) -> None:
        self._saving = None
        self._plan()

    def _forget_timer(self) -> None:
        if is_active(self._timer):
            self._timer.cancel()

    async def _save(self, names: Names) -> None:
        """Save one dataset or group, and record the outcome. Never raises."""
        # Save the newest snapshots, which may be newer than those published when this save was planned.
        snapshots = self._newest(names)
        if not snapshots:
            return
        began_at = self._clock.seconds()
        try:
            headers = [
                self._header(self._cache.dataset(name), snapshot)
                for name, snapshot in zip(names, snapshots, strict=True)
            ]
            parts = self._writer.parts(headers, snapshots)
            # A failure's traceback holds the frames it passed, and the thread that failed holds the failure until its
            # next work. Therefore none of these frames may hold the rows.
            del snapshots
            self._schedule.began(names, began_at, renews=all(part.renews for part in parts))
            sizes = await self._writer.write(parts)
        except Stopped:
            return
        except Exception as error:
            self._failures.failed(names, error)
            if self._unsubscribe is not None:
                self._schedule.want(names, renews=False)
            return
        took_s = self._clock.seconds() - began_at
        for part, size_bytes in zip(parts, sizes, strict=True):
            self._succeed(part, size_bytes, took_s)

    def _newest(self, names: Names) -> list[Snapshot]:
        """Return the served snapshots, or an empty list if they cannot be saved.

        A snapshot that was rolled back, or belongs to an older query, is not saved; the snapshots of a group must be of
        one moment.
        """
        datasets = [dataset for name in names if (dataset := self._cache.datasets.get(name))]
        served = [dataset.snapshot for dataset in datasets if not dataset.redefined]
        snapshots = [snapshot for snapshot in served if snapshot is not None and _is_to_be_saved(snapshot)]
        one_moment = len({snapshot.as_of for snapshot in snapshots}) == 1
        return snapshots if one_moment and len(snapshots) == len(names) else []

    def _succeed(self, part: Part, size_bytes: int, took_s: float) -> None:
        header = part.header
        log = self._log.bind(dataset=header.dataset)
        self._failures.succeeded(header.dataset)
        if part.renews:
            log.debug("snapshot_renewed", generation=header.generation, bytes=size_bytes, took_s=seconds(took_s))
            return
        log.info(
            "snapshot_saved", generation=header.generation, rows=header.rows, bytes=size_bytes, took_s=seconds(took_s)
        )


def _is_to_be_saved(snapshot: Snapshot) -> bool:
    """Return whether it is new: it was neither saved before nor rolled back, here or at the leader of a fleet."""
    return snapshot.source != "disk" and snapshot.rolled_back_to is None
