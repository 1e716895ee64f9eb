"""A saved generation becomes a snapshot.

A thread reads, decompresses and checks the file, while the reactor unpacks the rows slice by slice, because clients
wait meanwhile and only the reactor may use its dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from twisted.internet.defer import Deferred

from cacheservice.base import file_errors
from cacheservice.base.errors import BadResult, CacheServiceError, OfAnotherDatabase, SnapshotRejected, Stopped
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.timers import pause
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.identity import ServerIdentity, why_elsewhere
from cacheservice.cache.rows import Groups, Rows, RowsBuilder
from cacheservice.cache.snapshot import Snapshot, rows_builder
from cacheservice.config import DatasetSettings
from cacheservice.sources.disk.generations import Generations
from cacheservice.sources.disk.layout import move_aside, open_saved, problem_of
from cacheservice.sources.disk.work import Work
from cacheservice.sources.frames.clocks import Clocks
from cacheservice.sources.frames.header import Header, damaged
from cacheservice.sources.frames.rows import RowsUnpacker

_AHEAD_BYTES = 1024 * 1024
"""Bytes that the thread reads ahead while the reactor unpacks as many."""


class FileReader:
    """Reads the rows of one file.

    :param release: called with the groups of the rows once they have no readers left.
    """

    def __init__(self, work: Work, clock: Clock, release: Callable[[Groups], None]) -> None:
        self._work = work
        self._clock = clock
        self._release = release

    async def read(
        self, path: Path, settings: DatasetSettings, generation: int, check: Callable[[Header], None]
    ) -> tuple[Header, Rows]:
        """Return the header and the rows of a file.

        :param check: called with the header before the rows are read; it raises to refuse the file.
        :raises SnapshotRejected: if the file is refused.
        :raises OSError: if it cannot be read.
        :raises Stopped: if the service stops meanwhile.
        """
        builder = rows_builder(settings, self._release)
        try:
            header, blocks = await self._work.in_thread(open_saved, path, settings, generation)
            try:
                check(header)
            except SnapshotRejected:
                await self._work.in_thread(blocks.close)
                raise
            builder.expect(header.rows)
            await self._unpack(header, blocks, builder, path.name)
            # The trailer repeats the header; the unpacked rows must match both.
            if (builder.count, builder.size_bytes) != (header.rows, header.size_bytes):
                raise damaged(path.name, "its header declares other numbers of rows or bytes")
            rows = builder.finish()
            rows.note_digest(header.digest)
            return header, rows
        except BadResult as error:
            raise SnapshotRejected(f"{path.name}: {error}") from error
        finally:
            builder.discard()

    async def _unpack(self, header: Header, blocks: Generator[bytes], builder: RowsBuilder, name: str) -> None:
        unpacker = RowsUnpacker(name, header.size_bytes)
        ahead: Deferred[list[bytes]] | None = self._work.in_thread(_next_blocks, blocks)
        try:
            while ahead is not None:
                reading, ahead = ahead, None
                if some := await reading:
                    ahead = self._work.in_thread(_next_blocks, blocks)
                for block in some:
                    for rows in unpacker.slices(block):
                        builder.add(rows)
                        await pause(self._clock)
                        self._work.go_on()
        finally:
            # The thread must have finished with the file before it is closed here. Its failure no longer matters.
            if ahead is not None:
                await ahead.addErrback(lambda _: None)
            blocks.close()


def _next_blocks(blocks: Iterator[bytes]) -> list[bytes]:
    """Return the next blocks, about 1 MiB; an empty list after the last. It runs in a thread."""
    some: list[bytes] = []
    size_bytes = 0
    for block in blocks:
        some.append(block)
        size_bytes += len(block)
        if size_bytes >= _AHEAD_BYTES:
            break
    return some


class Loader:
    """Loads snapshots of the saved generations.

    A file that is refused is moved aside and not tried again, unless it belongs to another database or only cannot be
    read now.

    :param present_server: returns the database whose snapshots may be loaded; None if it is not known.
    """

    def __init__(
        self,
        generations: Generations,
        reader: FileReader,
        present_server: Callable[[], ServerIdentity | None],
        clocks: Clocks,
        work: Work,
        log: Log,
    ) -> None:
        self._generations = generations
        self._reader = reader
        self._present_server = present_server
        self._clocks = clocks
        self._work = work
        self._log = log

    async def newest(self, members: Sequence[DatasetSettings], wanted: Callable[[], bool]) -> list[Snapshot]:
        """Return the newest acceptable snapshot of one dataset, or of all of a group, of one moment.

        The list is empty if there is none. A file that is refused is logged, and the previous one is tried.

        :param wanted: returns whether the snapshots are still needed.
        :raises Stopped: if the service stops meanwhile.
        """
        if len(members) > 1:
            # Files with a damaged header do not belong to any moment, so they would never be tried.
            for settings in members:
                for generation in self._generations.unreadable(settings.name):
                    if wanted():
                        await self._load_unless_refused(settings, generation)
        for generations in self._generations.of_one_moment([settings.name for settings in members]):
            found: list[Snapshot] = []
            for settings, generation in zip(members, generations, strict=True):
                snapshot = await self._load_unless_refused(settings, generation) if wanted() else None
                if snapshot is None:
                    break
                found.append(snapshot)
            else:
                return found
        return []

    async def _load_unless_refused(self, settings: DatasetSettings, generation: int) -> Snapshot | None:
        """Return the snapshot of a file; None, and log the refusal, if it is refused."""
        try:
            return await self.load(settings, generation)
        except Stopped:
            raise
        except Exception as error:
            # No failure, not even a bug of ours, may keep the service from starting.
            is_bug = not isinstance(error, CacheServiceError)
            self._log.warning(
                "snapshot_rejected",
                dataset=settings.name,
                file=self._generations.path(settings.name, generation).name,
                error=problem_of(self._generations.directory, error) if is_bug else str(error),
                exc_info=is_bug,
            )
            return None

    async def load(self, settings: DatasetSettings, generation: int) -> Snapshot:
        """Load one saved generation.

        :raises UnknownGeneration: if its file does not exist.
        :raises SnapshotRejected: if its file is refused.
        :raises Stopped: if the service stops meanwhile.
        """
        name, path = settings.name, self._generations.path(settings.name, generation)
        with self._work.counted():
            try:
                header, rows = await self._reader.read(path, settings, generation, self._check_server)
            except OfAnotherDatabase as error:
                raise OfAnotherDatabase(f"{path.name}: {error}") from None  # it is kept for that database
            except SnapshotRejected:
                await self._work.in_thread(move_aside, path)
                self._generations.forget(name, generation)
                raise
            except FileNotFoundError:
                self._generations.forget(name, generation)
                raise self._generations.unknown(name, generation) from None
            except OSError as error:
                # An unreadable file is not proven bad, so it stays.
                raise SnapshotRejected(f"{path.name}: it cannot be read: {file_errors.reason(error)}") from error
        self._generations.note_loaded(name, generation, rows)
        read_at = self._clocks.read_at(header)
        return Snapshot(
            generation,
            rows,
            header.as_of,
            read_at.seconds,
            header.database_snapshot,
            header.columns,
            source="disk",
            watch_state=header.watch_state,
            probe=header.probe or None,
            server=header.server,
            content_since=header.content_since,
            dependencies=Dependencies.from_text(header.dependencies),
            age_uncertain=read_at.uncertain,
        )

    def _check_server(self, header: Header) -> None:
        elsewhere = why_elsewhere(header.server, self._present_server())
        if elsewhere is not None:
            raise OfAnotherDatabase(elsewhere)
