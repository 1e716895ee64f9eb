"""The service that keeps snapshots on disk: its life, its parts, and its interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from twisted.application.service import Service
from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache
from cacheservice.cache.rows import Groups
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings, PersistenceSettings
from cacheservice.sources.disk.generations import Generations
from cacheservice.sources.disk.layout import problem_of, scan
from cacheservice.sources.disk.loader import FileReader, Loader
from cacheservice.sources.disk.lock import DirectoryLock, DirectoryTaken
from cacheservice.sources.disk.saver import Saver
from cacheservice.sources.disk.schedule import Schedule
from cacheservice.sources.disk.work import Work, shielded
from cacheservice.sources.disk.writer import Writer
from cacheservice.sources.frames.clocks import Clocks


class SnapshotStore(Service):
    """Keeps snapshots of the datasets of `cache` on disk, one file for each generation.

    While it runs it saves what is published. It loads at any time; the caller publishes what it loads.

    :param release: called with the groups of loaded rows once they have no readers left.
    :param clocks: the clocks of this machine, unless a test passes others.
    """

    name = "persistence"

    def __init__(
        self,
        cache: Cache,
        settings: PersistenceSettings,
        release: Callable[[Groups], None],
        reactor: Reactor,
        log: Log,
        clocks: Clocks | None = None,
    ) -> None:
        directory = Path(settings.directory)
        clocks = Clocks(reactor) if clocks is None else clocks
        self._cache = cache
        self._log = log
        self._lock = DirectoryLock(directory)
        self._work = Work(reactor)
        self._generations = Generations(directory, settings.keep_generations)
        reader = FileReader(self._work, reactor, release)
        self._loader = Loader(self._generations, reader, lambda: cache.database.server, clocks, self._work, log)
        self._writer = Writer(self._generations, self._lock, self._work)
        self._saver = Saver(cache, self._writer, Schedule(settings.min_save_interval_s), clocks, reactor, log)

    def startService(self) -> None:
        super().startService()
        self._work.open()
        self._saver.start()

    def stopService(self) -> Deferred[None]:
        """Stop saving, and abandon unfinished saves and loads.

        The Deferred fires when no thread works for the store.
        """
        super().stopService()
        self._saver.stop()
        return self._work.stop().addCallback(lambda _: self._lock.release())

    async def find(self) -> bool:
        """Find out what is on disk; return False, and log the reason, if nothing can be restored from there.

        :raises Stopped: if the service stops meanwhile.
        """
        return await shielded(Deferred.fromCoroutine(self._find()))

    async def _find(self) -> bool:
        try:
            with self._work.counted():
                with suppress(OSError):  # without a directory, or on a file system without locks
                    await self._work.in_thread(self._lock.take)
                found = await self._work.in_thread(scan, self._generations.directory, self._writer.busy)
        except DirectoryTaken as error:
            self._log.error("persistence_locked", error=str(error))
            for dataset in self._cache.datasets.values():
                dataset.note_save(str(error), tried=False)
            return False
        except OSError as error:
            self._log.warning("snapshot_restore_failed", error=problem_of(self._generations.directory, error))
            return False
        self._generations.note_found(found)
        return True

    def saved(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the generations on disk that can be restored, newest first.

        For a group these are the combinations of generations of one moment. The list is as `find` found it, updated by
        the saves since then.
        """
        return self._generations.of_one_moment(names)

    async def newest(self, members: Sequence[DatasetSettings], wanted: Callable[[], bool]) -> list[Snapshot]:
        """Return the newest acceptable snapshot of one dataset, or of all of a group, of one moment.

        The list is empty if there is none. A file that is refused is logged and moved aside, and the previous file is
        tried.

        :param wanted: returns whether the snapshots are still needed.
        :raises Stopped: if the service stops meanwhile.
        """
        return await shielded(Deferred.fromCoroutine(self._loader.newest(members, wanted)))

    async def load(self, name: str, generation: int) -> Snapshot:
        """Load one saved generation for a rollback.

        The caller publishes it under a new number.

        :raises UnknownDataset: if there is no dataset of that name.
        :raises UnknownGeneration: if that generation is not on disk.
        :raises SnapshotRejected: if its file is refused. The file was moved aside, unless it only could not be read.
        :raises Stopped: if the service stops meanwhile.
        """
        settings = self._cache.dataset(name).settings
        if generation not in self._generations.of(name):
            raise self._generations.unknown(name, generation)
        return await shielded(Deferred.fromCoroutine(self._loader.load(settings, generation)))
