"""Writes files so that all of them are complete and durable, or none is left.

The reactor packs the rows slice by slice, because only it may use their dicts. A thread compresses and writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from weakref import ref

from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.sources.disk.format import SnapshotWriter
from cacheservice.sources.disk.generations import Generations
from cacheservice.sources.disk.layout import remove, renewal_of, temporary_path
from cacheservice.sources.disk.lock import DirectoryLock
from cacheservice.sources.disk.work import Work
from cacheservice.sources.frames.header import Header
from cacheservice.sources.frames.rows import packed


class Part(NamedTuple):
    """One dataset's share of a save.

    It has the header, the rows in pieces, the file, the temporary file that becomes it, and the generations to keep on
    disk beside it. A part that only renews a file has no rows.
    """

    header: Header
    pieces: Generator[bytes]
    path: Path
    temporary: Path
    renews: bool
    rows: ref[Rows]
    kept: set[int]


class Writer:
    """Writes the files of one save after the other, and keeps `generations` current.

    `busy` holds the temporary files that are being written.
    """

    def __init__(self, generations: Generations, lock: DirectoryLock, work: Work) -> None:
        self._generations = generations
        self._lock = lock
        self._work = work
        self.busy: frozenset[Path] = frozenset()

    @property
    def directory(self) -> Path:
        """The directory of the files."""
        return self._generations.directory

    def holds(self, header: Header) -> bool:
        """Return whether the rows with this header are on disk."""
        return self._generations.holds(header)

    def parts(self, headers: Sequence[Header], snapshots: Sequence[Snapshot]) -> list[Part]:
        """Return the parts of a save of these snapshots, which are of one moment."""
        kept = self._generations.to_keep(tuple(header.dataset for header in headers), snapshots)
        return [
            self._part(header, snapshot, kept[header.dataset])
            for header, snapshot in zip(headers, snapshots, strict=True)
        ]

    def _part(self, header: Header, snapshot: Snapshot, kept: set[int]) -> Part:
        name, generation, renews = header.dataset, header.generation, self.holds(header)
        path = self._generations.path(name, generation)
        return Part(
            header,
            packed(snapshot.rows) if not renews else (_ for _ in ()),
            renewal_of(path) if renews else path,
            temporary_path(self.directory, name, generation),
            renews,
            ref(snapshot.rows),
            kept,
        )

    async def write(self, parts: Sequence[Part]) -> list[int]:
        """Write all files, remove those that are not kept, and return the bytes of each.

        :raises Stopped: if the service stops meanwhile.
        :raises DirectoryTaken: if another process saves in the directory.
        :raises OSError: if a file cannot be written.
        """
        dropped = self._generations.to_remove({part.header.dataset: part.kept for part in parts})
        with self._work.counted():
            try:
                sizes = await self._write(parts, dropped)
            finally:
                for part in parts:
                    part.pieces.close()
        for part in parts:
            self._generations.note_saved(part.header, part.rows, part.kept)
        return sizes

    async def _write(self, parts: Sequence[Part], dropped: Sequence[Path]) -> list[int]:
        await self._work.in_thread(_prepare, self.directory, self._lock)
        self.busy = frozenset(part.temporary for part in parts)
        try:
            try:
                sizes = [await self._write_part(part) for part in parts]
                await self._work.in_thread(_commit, parts)
            except BaseException:
                await self._work.in_thread(remove, self.busy)
                raise
            await self._work.in_thread(remove, dropped)
        finally:
            self.busy = frozenset()
        return sizes

    async def _write_part(self, part: Part) -> int:
        """Write one file under its temporary name, and make it durable."""
        file = await self._work.in_thread(_create, part.temporary)
        try:
            writer = await self._work.in_thread(SnapshotWriter, file, part.header)
            # The thread takes one piece at a time; between two pieces the reactor runs everything else.
            for piece in part.pieces:
                await self._work.in_thread(writer.write, piece)
                self._work.go_on()
            await self._work.in_thread(_finish, writer, file)
        except BaseException:
            await self._work.in_thread(_abandon, file)
            raise
        return writer.size_bytes


# The functions below run in a thread.


def _prepare(directory: Path, lock: DirectoryLock) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        lock.take()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
            raise


def _create(temporary: Path) -> BinaryIO:
    temporary.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Left by a killed process with our process id; the first process of a container always has the same id.
    temporary.unlink(missing_ok=True)
    return open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _finish(writer: SnapshotWriter, file: BinaryIO) -> None:
    writer.finish()
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _commit(parts: Sequence[Part]) -> None:
    """Rename all files to their final names, or none of them.

    A crash in between leaves some files of a group, which are useless without the others; the files that they replace
    are still there.
    """
    try:
        for part in parts:
            part.temporary.replace(part.path)
        directory = os.open(parts[0].path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError:
        remove(part.path for part in parts)
        raise


def _abandon(file: BinaryIO) -> None:
    with suppress(OSError):
        file.close()
