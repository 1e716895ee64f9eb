"""Saves snapshots from PostgreSQL, and loads them at the start and for rollbacks.

The datasets of a group are saved together and rolled back together, so that all served rows of a group are of one
moment. The reactor packs and unpacks rows slice by slice, because clients wait meanwhile and only the reactor may use
its dicts. A thread reads, writes, compresses and checks files.
"""

from __future__ import annotations

import errno
import math
import os
import re
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import ref

from twisted.application.service import Service
from twisted.internet.defer import Deferred

from cacheservice.base import clock, file_errors
from cacheservice.base.errors import (
    BadResult,
    CacheServiceError,
    OfAnotherDatabase,
    SnapshotRejected,
    Stopped,
    UnknownGeneration,
)
from cacheservice.base.interfaces import DelayedCall, Log, Reactor
from cacheservice.base.text import seconds
from cacheservice.base.threads import in_thread
from cacheservice.base.timers import is_active, pause
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset, Snapshot, rows_builder
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.events import Ended, Event, Published, Renewed
from cacheservice.cache.identity import why_elsewhere
from cacheservice.cache.rows import Groups, Rows, RowsBuilder
from cacheservice.config import DatasetSettings, groups
from cacheservice.sources.disk.age import ReadOn
from cacheservice.sources.disk.files import (
    Header,
    RowsUnpacker,
    SnapshotWriter,
    fingerprint,
    packed,
    read,
    read_whole_header,
)
from cacheservice.sources.disk.lock import DirectoryLock, DirectoryTaken

_LEAST_RETRY_S = 1.0
_AHEAD_BYTES = 1024 * 1024
"""Bytes that the thread reads ahead while the reactor unpacks as many."""
_SAVED = re.compile(r"([a-z][a-z0-9_]{0,62})\.(?!0{12})([0-9]{12})\.snapshot")
_RENEWAL = re.compile(r"[a-z][a-z0-9_]{0,62}\.[0-9]{12}\.renewal")
_TEMPORARY = re.compile(r"\.[a-z][a-z0-9_]{0,62}\.[0-9]{12}\.[0-9]+\.tmp")

_P = ParamSpec("_P")
_T = TypeVar("_T")

_Names = tuple[str, ...]
"""The names of the datasets of one group, or the name of a single dataset."""
_Saved = dict[int, Header | None]
"""The generations of a dataset on disk, newest first, with their headers after renewals; None if the header cannot be
read."""


class _Part(NamedTuple):
    """One dataset's share of a save.

    It has the header, the rows in pieces, the file, and the temporary file that becomes it. A part that only renews a
    file has no rows.
    """

    header: Header
    pieces: Generator[bytes]
    path: Path
    temporary: Path
    renews: bool
    rows: ref[Rows]


class SnapshotStore(Service):
    """Keeps snapshots of the datasets of `cache`, one file for each generation.

    `problems` holds, for each dataset whose last save failed, the cause in one line.

    If a refresh reads the same rows, they are not saved again. A small file beside the saved one renews it, so that
    after a restart the age counts from the last read that returned these rows.

    :param min_save_interval_s: the minimum time from the start of one save of a dataset to the start of its next save,
        and from one renewal to the next.
    :param keep_generations: files kept of a dataset, at least 1.
    :param release: called with the groups of loaded rows once they have no readers left.
    :param reactor: `IReactorTime`, whose `seconds` are monotonic, and `IReactorThreads`.
    :param wall_s: the wall clock, in seconds since 1970. It counts the age of files that were written before the
        machine was started, or on another machine.
    :param host: this machine and the run of its kernel.
    """

    name = "persistence"

    def __init__(
        self,
        cache: Cache,
        directory: Path,
        min_save_interval_s: float,
        keep_generations: int,
        release: Callable[[Groups], None],
        reactor: Reactor,
        log: Log,
        wall_s: Callable[[], float] = time.time,
        host: clock.Host | None = None,
    ) -> None:
        self.problems: dict[str, str] = {}
        self._cache = cache
        self._directory = directory
        self._lock = DirectoryLock(directory)
        self._min_save_interval_s = min_save_interval_s
        self._keep_generations = keep_generations
        self._release = release
        self._reactor = reactor
        self._log = log
        self._wall_s = wall_s
        self._host = clock.Host.here() if host is None else host
        self._saved: dict[str, _Saved] = {}
        self._saved_rows: dict[str, dict[int, ref[Rows]]] = {}
        self._wanted: set[_Names] = set()
        self._due_at: dict[_Names, float] = {}
        self._to_renew: set[_Names] = set()
        self._renewal_due_at: dict[_Names, float] = {}
        self._timer: DelayedCall | None = None
        self._saving: Deferred[None] | None = None
        self._temporaries: frozenset[Path] = frozenset()
        self._unsubscribe: Callable[[], None] | None = None
        self._stopping = False
        self._working = 0
        self._idle: list[Deferred[None]] = []

    def startService(self) -> None:
        super().startService()
        self._stopping = False
        self._unsubscribe = self._cache.events.subscribe(self._happened, Published, Renewed, Ended)

    def stopService(self) -> Deferred[None]:
        """Stop saving, and abandon unfinished saves and loads.

        The Deferred fires when no thread works for the store.
        """
        super().stopService()
        self._stopping = True
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        self._wanted.clear()
        self._to_renew.clear()
        self._forget_timer()
        stopped: Deferred[None] = Deferred()
        stopped.addCallback(lambda _: self._lock.release())
        if self._working:
            self._idle.append(stopped)
        else:
            stopped.callback(None)
        return stopped

    def saved(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the generations on disk that can be restored, newest first.

        For a group these are the combinations of generations of one moment. The list is as `restore` found it, updated
        by the saves since then.
        """
        first, *others = [self._saved.get(name, {}) for name in names]
        if not others:
            return [(generation,) for generation in first]
        return _of_one_moment([first, *others])

    # Loading

    async def restore(self) -> None:
        """Publish the newest saved snapshot of each dataset that has none yet.

        Never raises. A file that is refused is logged and moved aside, and the previous file is tried.
        """
        await _shielded(Deferred.fromCoroutine(self._restore()))

    async def _restore(self) -> None:
        try:
            with self._work():
                with suppress(OSError):  # without a directory, or on a file system without locks
                    await self._in_thread(self._lock.take)
                # Known entries win: our own saves have kept them current. New entries may belong to datasets that were
                # added.
                self._saved = await self._in_thread(_scan, self._directory, self._temporaries) | self._saved
                datasets = self._cache.datasets
                for group in groups(dataset.settings for dataset in datasets.values()):
                    await self._restore_together([datasets[settings.name] for settings in group])
        except Stopped:
            return
        except DirectoryTaken as error:
            self._log.error("persistence_locked", error=str(error))
            for dataset in self._cache.datasets.values():
                dataset.save_problem = self.problems[dataset.name] = str(error)
        except OSError as error:
            self._log.warning("snapshot_restore_failed", error=_problem(self._directory, error))

    async def _restore_together(self, datasets: Sequence[Dataset]) -> None:
        """Publish the newest acceptable snapshot of one dataset, or of all of a group."""
        names = tuple(dataset.name for dataset in datasets)
        began_at = self._reactor.seconds()
        settings = [dataset.settings for dataset in datasets]
        found: list[Snapshot] = []
        if len(datasets) > 1:
            await self._refuse_those_of_no_moment(datasets)
        for generations in self.saved(names):
            found = await self._load_unless_refused(datasets, generations)
            if len(found) == len(datasets):
                break
        # A refresh may have finished first; its rows are newer.
        if any(dataset.snapshot is not None for dataset in datasets):
            return
        if any(dataset.removed for dataset in datasets) or settings != [dataset.settings for dataset in datasets]:
            return  # the configuration was reloaded meanwhile
        if len(found) < len(datasets):
            if len(datasets) > 1 and any(self._saved.get(name) for name in names):
                error = f"nothing that is saved of {', '.join(names)} is of one moment"
                self._log.warning("group_not_restored", error=error)
            return
        for dataset, snapshot in zip(datasets, found, strict=True):
            dataset.restore(snapshot)
            self._log.info(
                "snapshot_restored",
                dataset=dataset.name,
                generation=dataset.last_generation,
                rows=snapshot.rows.count,
                age_s=seconds(dataset.age_s() or 0.0),
                age_uncertain=snapshot.age_uncertain,
                took_s=seconds(self._reactor.seconds() - began_at),
            )

    async def _refuse_those_of_no_moment(self, datasets: Sequence[Dataset]) -> None:
        """Refuse files with a damaged header, which would otherwise never be tried.

        They do not belong to any moment.
        """
        for dataset in datasets:
            for generation in [each for each, header in self._saved.get(dataset.name, {}).items() if header is None]:
                await self._load_unless_refused([dataset], [generation])

    async def _load_unless_refused(self, datasets: Sequence[Dataset], generations: Sequence[int]) -> list[Snapshot]:
        """Return the snapshots of these files, up to the first that is refused.

        The refusal is logged.
        """
        found: list[Snapshot] = []
        for dataset, generation in zip(datasets, generations, strict=True):
            if dataset.snapshot is not None:
                break
            try:
                found.append(await self._load(dataset.settings, generation))
            except Stopped:
                raise
            except Exception as error:
                # No failure, not even a bug of ours, may keep the service from starting.
                ours = not isinstance(error, CacheServiceError)
                self._log.warning(
                    "snapshot_rejected",
                    dataset=dataset.name,
                    file=self._path(dataset.name, generation).name,
                    error=_problem(self._directory, error) if ours else str(error),
                    exc_info=ours,
                )
                break
        return found

    async def load(self, name: str, generation: int) -> Snapshot:
        """Load one saved generation for a rollback.

        The caller publishes it under a new number.

        :raises UnknownDataset: if there is no dataset of that name.
        :raises UnknownGeneration: if that generation is not on disk.
        :raises SnapshotRejected: if its file is refused. The file was moved aside, unless it only could not be read.
        :raises Stopped: if the service stops meanwhile.
        """
        settings = self._cache.dataset(name).settings
        if generation not in self._saved.get(name, ()):
            raise self._unknown(name, generation)
        return await _shielded(Deferred.fromCoroutine(self._load(settings, generation)))

    async def _load(self, settings: DatasetSettings, generation: int) -> Snapshot:
        path = self._path(settings.name, generation)
        with self._work():
            try:
                header, rows = await self._read(path, settings, generation)
            except OfAnotherDatabase:
                raise  # the file belongs to another database: keep it
            except SnapshotRejected:
                await self._in_thread(_move_aside, path)
                self._forget(settings.name, generation)
                raise
            except FileNotFoundError:
                self._forget(settings.name, generation)
                raise self._unknown(settings.name, generation) from None
            except OSError as error:
                # An unreadable file is not proven bad, so it stays.
                raise SnapshotRejected(f"{path.name}: it cannot be read: {file_errors.reason(error)}") from error
        self._saved_rows.setdefault(settings.name, {})[generation] = ref(rows)
        age = header.age(self._wall_s(), clock.seconds(), self._host)
        return Snapshot(
            generation,
            rows,
            header.as_of,
            self._reactor.seconds() - age.seconds,
            header.database_snapshot,
            header.columns,
            source="disk",
            watch_state=header.watch_state,
            probe=header.probe or None,
            server=header.server,
            content_since=header.content_since,
            dependencies=Dependencies.from_text(header.dependencies),
            age_uncertain=age.uncertain,
        )

    async def _read(self, path: Path, settings: DatasetSettings, generation: int) -> tuple[Header, Rows]:
        builder = rows_builder(settings, self._release)
        try:
            header, blocks = await self._in_thread(_open, path, settings, generation)
            elsewhere = why_elsewhere(header.server, self._cache.database.server)
            if elsewhere is not None:
                await self._in_thread(blocks.close)
                raise OfAnotherDatabase(f"{path.name}: {elsewhere}")
            builder.expect(header.rows)
            await self._unpack(header, blocks, builder, path.name)
            # The trailer repeats the header; the unpacked rows must match both.
            if (builder.count, builder.size_bytes) != (header.rows, header.size_bytes):
                raise SnapshotRejected(f"{path.name}: it is damaged: its rows are not as many as its header says")
            rows = builder.finish()
            rows.note_digest(header.digest)
            return header, rows
        except BadResult as error:
            raise SnapshotRejected(f"{path.name}: {error}") from error
        finally:
            builder.discard()

    async def _unpack(self, header: Header, blocks: Generator[bytes], builder: RowsBuilder, name: str) -> None:
        unpacker = RowsUnpacker(header, name)
        ahead: Deferred[list[bytes]] | None = self._in_thread(_some, blocks)
        try:
            while ahead is not None:
                reading, ahead = ahead, None
                if some := await reading:
                    ahead = self._in_thread(_some, blocks)
                for block in some:
                    for rows in unpacker.slices(block):
                        builder.add(rows)
                        await pause(self._reactor)
                        self._go_on()
        finally:
            # The thread must have finished with the file before it is closed here. Its failure no longer matters.
            if ahead is not None:
                await ahead.addErrback(lambda _: None)
            blocks.close()

    def _forget(self, name: str, generation: int) -> None:
        self._saved.get(name, {}).pop(generation, None)
        self._saved_rows.get(name, {}).pop(generation, None)

    def _unknown(self, name: str, generation: int) -> UnknownGeneration:
        known = ", ".join(map(str, self._saved.get(name, ()))) or "none"
        return UnknownGeneration(f"generation {generation} of {name} is not on disk; there are: {known}")

    # Saving

    def _happened(self, event: Event) -> None:
        if isinstance(event, Ended):
            self.problems.pop(event.dataset, None)
            return
        dataset = self._cache.dataset(event.dataset)
        snapshot = dataset.snapshot
        if snapshot is None or snapshot.source != "postgres" or dataset.redefined:
            return
        is_saved = self._is_saved(_header(dataset.settings, snapshot, self._read_on(snapshot)))
        (self._to_renew if is_saved else self._wanted).add(self._with_its_group(dataset))
        self._plan()

    def _is_saved(self, header: Header) -> bool:
        saved = self._saved.get(header.dataset, {}).get(header.generation)
        return saved is not None and header.renews(saved)

    def _with_its_group(self, dataset: Dataset) -> _Names:
        group = dataset.settings.group
        if not group:
            return (dataset.name,)
        return tuple(name for name, each in self._cache.datasets.items() if each.settings.group == group)

    def _plan(self) -> None:
        """Start the timer for the first save that is due.

        It fires in the next turn at the earliest. By then all datasets of a group are published.
        """
        self._forget_timer()
        if self._saving is not None or self._stopping:
            return
        due = [(self._due_at.get(names, -math.inf), names) for names in self._wanted]
        due += [(self._renewal_due_at.get(names, -math.inf), names) for names in self._to_renew]
        if due:
            at, names = min(due)
            self._timer = self._reactor.callLater(max(0.0, at - self._reactor.seconds()), self._begin, names)

    def _begin(self, names: _Names) -> None:
        self._wanted.discard(names)
        self._to_renew.discard(names)
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

    async def _save(self, names: _Names) -> None:
        """Save one dataset or group, and record the outcome. Never raises."""
        # Save the newest snapshots, which may be newer than those published when this save was planned.
        snapshots = self._newest(names)
        if not snapshots:
            return
        began_at = self._reactor.seconds()
        try:
            with self._work():
                headers = [
                    _header(self._cache.dataset(name).settings, snapshot, self._read_on(snapshot))
                    for name, snapshot in zip(names, snapshots, strict=True)
                ]
                self._renewal_due_at[names] = began_at + self._min_save_interval_s
                if not all(map(self._is_saved, headers)):
                    self._due_at[names] = began_at + self._min_save_interval_s
                kept = self._kept(names, snapshots)
                dropped = [
                    path
                    for name in names
                    for generation in self._saved.get(name, {})
                    if generation not in kept[name]
                    for path in (self._path(name, generation), self._renewal_path(name, generation))
                ]
                # A failure's traceback holds the frames it passed, and the thread that failed holds the failure until
                # its next work. Therefore none of these frames may hold the rows.
                parts = [self._part(*each) for each in zip(headers, snapshots, strict=True)]
                del snapshots
                try:
                    sizes = await self._write(parts, dropped)
                finally:
                    for part in parts:
                        part.pieces.close()
        except Stopped:
            return
        except Exception as error:
            self._fail(names, error)
            return
        took_s = self._reactor.seconds() - began_at
        for part, size_bytes in zip(parts, sizes, strict=True):
            self._succeed(part, kept[part.header.dataset], size_bytes, took_s)

    def _newest(self, names: _Names) -> list[Snapshot]:
        """Return the served snapshots, or an empty list if they cannot be saved.

        A snapshot that was rolled back, or belongs to an older query, is not saved; the snapshots of a group must be of
        one moment.
        """
        datasets = [dataset for name in names if (dataset := self._cache.datasets.get(name))]
        served = [dataset.snapshot for dataset in datasets if not dataset.redefined]
        snapshots = [snapshot for snapshot in served if snapshot is not None and snapshot.source == "postgres"]
        one_moment = len({snapshot.as_of for snapshot in snapshots}) == 1
        return snapshots if one_moment and len(snapshots) == len(names) else []

    def _kept(self, names: _Names, snapshots: Sequence[Snapshot]) -> dict[str, set[int]]:
        """Return the generations of each dataset to keep on disk after this save.

        Of several files with the same rows only the newest is kept.
        """
        generations = tuple(snapshot.generation for snapshot in snapshots)
        # Generations only rise, so a higher number on disk is from before the restored snapshot. If it stayed, it would
        # be restored as the newest.
        older = [
            each
            for each in self.saved(names)
            if each != generations
            and all(other <= new for other, new in zip(each, generations, strict=True))
            and not all(map(self._has_rows, names, each, snapshots))
        ]
        moments = [generations, *older[: self._keep_generations - 1]]
        return {name: set(each) for name, each in zip(names, zip(*moments, strict=True), strict=True)}

    def _has_rows(self, name: str, generation: int, snapshot: Snapshot) -> bool:
        """Return whether that generation holds the very rows of `snapshot`.

        That happens when a rollback was undone.
        """
        saved = self._saved_rows.get(name, {}).get(generation)
        return saved is not None and saved() is snapshot.rows

    def _part(self, header: Header, snapshot: Snapshot) -> _Part:
        name, generation, renews = header.dataset, header.generation, self._is_saved(header)
        return _Part(
            header,
            packed(snapshot.rows) if not renews else (_ for _ in ()),
            self._renewal_path(name, generation) if renews else self._path(name, generation),
            self._directory / f".{name}.{generation:012}.{os.getpid()}.tmp",
            renews,
            ref(snapshot.rows),
        )

    def _read_on(self, snapshot: Snapshot) -> ReadOn:
        age_s = self._reactor.seconds() - snapshot.read_at
        wall_s, boot_s = self._wall_s() - age_s, clock.seconds() - age_s
        return ReadOn(int(wall_s * 1e6), self._host.boot, int(boot_s * 1e6), self._host.machine)

    def _succeed(self, part: _Part, kept: set[int], size_bytes: int, took_s: float) -> None:
        header = part.header
        name = header.dataset
        older = self._saved.get(name, {})
        others = [each for each in older if each in kept and each != header.generation]
        rows = self._saved_rows.get(name, {}) | {header.generation: part.rows}
        self._saved_rows[name] = {each: rows[each] for each in rows if each in kept}
        self._saved[name] = {header.generation: header, **{each: older[each] for each in others}}
        if (dataset := self._cache.datasets.get(name)) is not None:
            dataset.save_problem = None
        log = self._log.bind(dataset=name)
        if self.problems.pop(name, None) is not None:
            log.info("snapshot_save_recovered")
        if part.renews:
            log.debug("snapshot_renewed", generation=header.generation, bytes=size_bytes, took_s=seconds(took_s))
            return
        log.info(
            "snapshot_saved", generation=header.generation, rows=header.rows, bytes=size_bytes, took_s=seconds(took_s)
        )

    def _fail(self, names: _Names, error: Exception) -> None:
        ours = not isinstance(error, OSError | DirectoryTaken)
        problem = str(error)
        if not isinstance(error, DirectoryTaken):
            problem = _problem(self._directory, error)
        retry_in_s = max(_LEAST_RETRY_S, self._min_save_interval_s)
        for name in names:
            dataset = self._cache.datasets.get(name)
            if dataset is not None:
                dataset.counts.save_failures += 1
            if dataset is not None and self.problems.get(name) != problem:
                self.problems[name] = dataset.save_problem = problem
                self._log.warning(
                    "snapshot_save_failed", dataset=name, error=problem, retry_in_s=seconds(retry_in_s), exc_info=ours
                )
        self._due_at[names] = self._renewal_due_at[names] = self._reactor.seconds() + retry_in_s
        if not self._stopping:
            self._wanted.add(names)

    async def _write(self, parts: Sequence[_Part], dropped: Sequence[Path]) -> list[int]:
        """Write all files and return the bytes of each.

        Either all files are complete and durable, or none is left.
        """
        await self._in_thread(_prepare, self._directory, self._lock)
        self._temporaries = frozenset(part.temporary for part in parts)
        try:
            try:
                sizes = [await self._write_part(part) for part in parts]
                await self._in_thread(_commit, parts)
            except BaseException:
                await self._in_thread(_remove, [part.temporary for part in parts])
                raise
            await self._in_thread(_remove, dropped)
        finally:
            self._temporaries = frozenset()
        return sizes

    async def _write_part(self, part: _Part) -> int:
        """Write one file under its temporary name, and make it durable."""
        file = await self._in_thread(_create, part.temporary)
        try:
            writer = await self._in_thread(SnapshotWriter, file, part.header)
            # The thread takes one piece at a time; between two pieces the reactor runs everything else.
            for piece in part.pieces:
                await self._in_thread(writer.write, piece)
                self._go_on()
            await self._in_thread(_finish, writer, file)
        except BaseException:
            await self._in_thread(_abandon, file)
            raise
        return writer.size_bytes

    # Saving and loading

    def _path(self, name: str, generation: int) -> Path:
        return self._directory / f"{name}.{generation:012}.snapshot"

    def _renewal_path(self, name: str, generation: int) -> Path:
        return _renewal_of(self._path(name, generation))

    def _go_on(self) -> None:
        if self._stopping:
            raise Stopped("the service is stopping")

    def _in_thread(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Deferred[_T]:
        return in_thread(self._reactor, work, *args, **kwargs)

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Count the enclosed work, which a stop has to wait for."""
        self._go_on()
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1
            if not self._working:
                idle, self._idle = self._idle, []
                for stopped in idle:
                    stopped.callback(None)


def _shielded(running: Deferred[_T]) -> Deferred[_T]:
    """Return the result of `running`, which continues if the wait is cancelled.

    A thread cannot be cancelled.
    """
    waiting: Deferred[_T] = Deferred()

    def ended(result: Any) -> None:
        if not waiting.called:
            waiting.callback(result)

    running.addBoth(ended)
    return waiting


def _header(settings: DatasetSettings, snapshot: Snapshot, read_on: ReadOn) -> Header:
    return Header(
        settings.name,
        snapshot.generation,
        snapshot.as_of,
        snapshot.database_snapshot,
        snapshot.rows.count,
        snapshot.rows.size_bytes,
        snapshot.columns,
        fingerprint(settings),
        snapshot.watch_state,
        snapshot.probe or "",
        snapshot.server,
        snapshot.content_since,
        snapshot.rows.digest,
        read_on,
        snapshot.dependencies.to_text() if snapshot.dependencies else "",
    )


def _of_one_moment(saved: Sequence[_Saved]) -> list[tuple[int, ...]]:
    """Return the combinations of a group's generations of one moment, newest first.

    A generation was served from its first read to its last renewal. The members of a group are read together, so
    wherever these spans overlap there is a moment at which all of them were served.
    """
    known = [[(number, header) for number, header in each.items() if header is not None] for each in saved]
    return [tuple(number for number, _ in combined) for combined in _overlapping(known)]


def _overlapping(members: Sequence[Sequence[tuple[int, Header]]]) -> list[list[tuple[int, Header]]]:
    if not members:
        return [[]]
    first, *others = members
    rests = _overlapping(others)
    return [[each, *rest] for each in first for rest in rests if _overlap([header for _, header in (each, *rest)])]


def _overlap(headers: Sequence[Header]) -> bool:
    ends = [max(header.as_of, header.modified_as_of) for header in headers]
    return max(header.modified_as_of for header in headers) <= min(ends)


def _renewal_of(path: Path) -> Path:
    return path.with_suffix(".renewal")


# The functions below run in a thread.


def _scan(directory: Path, busy: Collection[Path]) -> dict[str, _Saved]:
    """Return the saved files by dataset.

    The unfinished files of a killed process are removed.
    """
    found: dict[str, _Saved] = {}
    try:
        entries = sorted(directory.iterdir(), reverse=True)
    except FileNotFoundError:
        return found
    for path in entries:
        if _TEMPORARY.fullmatch(path.name) and path not in busy:
            with suppress(OSError):
                path.unlink()
        elif (named := _SAVED.fullmatch(path.name)) and path.is_file():
            found.setdefault(named[1], {})[int(named[2])] = _saved_header(path)
        elif _RENEWAL.fullmatch(path.name) and not path.with_suffix(".snapshot").exists():
            _remove([path])  # a killed process left it without its snapshot
    return found


def _saved_header(path: Path) -> Header | None:
    try:
        header, blocks = read(path)
    except (SnapshotRejected, OSError):
        return None  # logged when it is loaded
    blocks.close()
    return _renewed(header, path)


def _renewed(header: Header, path: Path) -> Header:
    """Return the header after its renewal.

    The file's own header is returned if there is no renewal, or if the renewal is damaged or belongs to other rows.
    """
    try:
        renewed = read_whole_header(_renewal_of(path))
    except (SnapshotRejected, OSError):
        return header
    return renewed if renewed.renews(header) else header


def _open(path: Path, settings: DatasetSettings, generation: int) -> tuple[Header, Generator[bytes]]:
    header, blocks = read(path)
    try:
        header.check(settings, generation, path.name)
    except SnapshotRejected:
        blocks.close()
        raise
    return _renewed(header, path), blocks


def _some(blocks: Iterator[bytes]) -> list[bytes]:
    """Return the next blocks, about 1 MiB; an empty list after the last."""
    some: list[bytes] = []
    size_bytes = 0
    for block in blocks:
        some.append(block)
        size_bytes += len(block)
        if size_bytes >= _AHEAD_BYTES:
            break
    return some


def _move_aside(path: Path) -> None:
    with suppress(OSError):
        path.replace(path.with_name(f"{path.name}.rejected"))
    _remove([_renewal_of(path)])


def _prepare(directory: Path, lock: DirectoryLock) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        lock.take()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
            raise


def _create(temporary: Path) -> Any:
    temporary.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Left by a killed process with our process id; the first process of a container always has the same id.
    temporary.unlink(missing_ok=True)
    return open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _finish(writer: SnapshotWriter, file: Any) -> None:
    writer.finish()
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _commit(parts: Sequence[_Part]) -> None:
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
        _remove([part.path for part in parts])
        raise


def _abandon(file: Any) -> None:
    with suppress(OSError):
        file.close()


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _problem(directory: Path, error: Exception) -> str:
    """Return the problem of a save or a restore.

    The text is the same each time the same problem occurs.
    """
    if isinstance(error, OSError):
        return file_errors.of_folder("persistence.directory", directory, error)
    return f"{directory}: an internal error, {type(error).__name__}; its traceback is in the log"
