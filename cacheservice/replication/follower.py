"""Publishes in this process what a sender publishes in another one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import CancelledError

from cacheservice.base.errors import BadResult, SnapshotRejected
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import pause
from cacheservice.cache.cache import Cache
from cacheservice.cache.delta import Delta
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Groups, Rows, RowsBuilder
from cacheservice.cache.snapshot import Snapshot
from cacheservice.replication.codec import Decoder, End, Head, Item, Part, Put, Removed
from cacheservice.replication.sender import RESEND, TAKEN, WINDOW_BYTES
from cacheservice.sources.frames.clocks import ReadAt

_FEW = 128
"""Rows or keys that are applied in a fifth of a millisecond, so that nothing else has to wait for a turn."""
_REPORTED_BYTES = WINDOW_BYTES // 8
"""The sender is not woken up for less, as each small delta would."""
_NAME = "the frames of the main process"


class Carrier(Protocol):
    """The receiver's side of a connection to the sender."""

    def send(self, name: str, /, **fields: str | int) -> None:
        """Send an event."""

    def lose(self) -> None:
        """Close the connection, so that the sender begins again."""


@dataclass(frozen=True, slots=True)
class _Received:
    """A complete update that waits for its batch."""

    snapshot: Snapshot
    delta: Delta | None

    def followed_by(self, later: _Received) -> _Received:
        """Return the update of both."""
        delta = None if self.delta is None or later.delta is None else self.delta.then(later.delta)
        return _Received(later.snapshot, delta)


class Follower:
    """Applies frames to a cache in slices, and publishes each batch in one turn of the reactor.

    It is idle, or works on the bytes and calls in the order of their arrival.

    :param release: called with the groups of rows once they have no readers left.
    :param read_at: returns when the rows of a publish were read, on this machine's monotonic clock.
    :param clock: `IReactorTime`.
    """

    def __init__(
        self,
        cache: Cache,
        carrier: Carrier,
        release: Callable[[Groups], None],
        read_at: Callable[[Head], ReadAt],
        clock: Clock,
        log: Log,
    ) -> None:
        self._cache = cache
        self._carrier = carrier
        self._release = release
        self._read_at = read_at
        self._clock = clock
        self._log = log
        self._tasks = Tasks(log)
        self._decoder = Decoder(_NAME)
        self._queue: deque[bytes | Sequence[Part] | Callable[[], object]] = deque()
        self._is_working = False
        self._building: _Building | None = None
        self._batch: dict[str, _Received] = {}
        self._lacking: set[str] = set()
        self._taken_bytes = 0

    def received(self, data: bytes) -> None:
        """Apply bytes of frames."""
        self._queue.append(data)
        self._begin()

    def cut(self, parts: Sequence[Part]) -> None:
        """Apply parts of frames, which have been cut elsewhere; whole publishes, apart from `received`."""
        self._queue.append(parts)
        self._begin()

    def then(self, call: Callable[[], object]) -> None:
        """Call once all that was received before has been applied."""
        self._queue.append(call)
        self._begin()

    def stop(self) -> None:
        """Apply nothing any more."""
        self._queue.clear()
        self._tasks.cancel()
        if self._building is not None:
            self._building.discard()
            self._building = None

    def commit(self) -> None:
        """Publish the updates since the last commit, in one turn of the reactor.

        While a dataset is incomplete and has been requested again, they wait for it, because they may be of its group.
        """
        if self._lacking:
            return
        batch, self._batch = self._batch, {}
        for name, received in batch.items():
            dataset = self._cache.datasets.get(name)
            if dataset is None:
                continue  # the configuration has removed it
            if dataset.snapshot is not None and dataset.last_generation == received.snapshot.generation:
                dataset.renew(received.snapshot)
            else:
                dataset.publish(received.snapshot, received.delta)

    def withdraw(self, name: str) -> None:
        """Serve nothing of a dataset until its next publish."""
        dataset = self._cache.datasets.get(name)
        if dataset is not None:
            dataset.withdraw()

    def _begin(self) -> None:
        if not self._is_working:
            self._is_working = True
            self._tasks.run(self._work())

    async def _work(self) -> None:
        try:
            while self._queue:
                next_one = self._queue.popleft()
                if callable(next_one):
                    next_one()
                    continue
                if isinstance(next_one, bytes):
                    await self._apply(self._decoder.feed(next_one))
                    self._note_taken(len(next_one))
                else:
                    await self._apply(self._decoder.items(next_one))
        except CancelledError:
            raise
        except (SnapshotRejected, BadResult) as error:
            self._log.error("feed_broken", error=str(error))
            self._carrier.lose()
        except Exception:
            # A bug, which is logged. What it lacks now is not known, so it begins again.
            self._carrier.lose()
            raise
        finally:
            self._is_working = False

    def _note_taken(self, size_bytes: int) -> None:
        self._taken_bytes += size_bytes
        if self._taken_bytes >= _REPORTED_BYTES:
            self._carrier.send(TAKEN, size_bytes=self._taken_bytes)
            self._taken_bytes = 0

    async def _apply(self, items: Iterator[Item]) -> None:
        for item in items:
            if self._take(item):
                await pause(self._clock)

    def _take(self, item: Item) -> bool:
        """Apply one item; return whether that took so long that others should have a turn."""
        if isinstance(item, Head):
            self._building = self._build(item)
            return False
        building = self._building
        if building is None:
            return False  # it cannot be applied, and all rows have been requested
        if isinstance(item, End):
            self._building = None
            self._complete(building)
            return False
        return building.take(item)

    def _build(self, head: Head) -> _Building | None:
        name = head.header.dataset
        dataset = self._cache.datasets.get(name)
        if dataset is None:
            self._lacking.discard(name)
            return None
        waiting = self._batch.get(name)
        newest = dataset.snapshot if waiting is None else waiting.snapshot
        if not head.base:
            builder = RowsBuilder(self._release, patched=True)
            builder.expect(head.header.rows)
            return _Building(head, builder)
        if newest is None or newest.generation != head.base:
            self._request_again(name)
            return None
        return _Building(head, RowsPatch(newest.rows))

    def _request_again(self, name: str) -> None:
        self._lacking.add(name)
        self._carrier.send(RESEND, name=name)

    def _complete(self, building: _Building) -> None:
        head = building.head
        header = head.header
        rows, delta = building.finish()
        differs = header.digest is not None and rows.digest is not None and header.digest != rows.digest
        if (rows.count, rows.size_bytes) != (header.rows, header.size_bytes) or differs:
            # The frames are whole, so this is a bug. Readers get the rows of the last update until all rows have come.
            self._log.error(
                "feed_differs", dataset=header.dataset, generation=header.generation, rows=rows.count, sent=header.rows
            )
            self._request_again(header.dataset)
            return
        if header.digest is not None:
            rows.note_digest(header.digest)
        received = _Received(self._snapshot(head, rows), delta)
        waiting = self._batch.get(header.dataset)
        self._batch[header.dataset] = received if waiting is None else waiting.followed_by(received)
        self._lacking.discard(header.dataset)

    def _snapshot(self, head: Head, rows: Rows) -> Snapshot:
        header, read_at = head.header, self._read_at(head)
        return Snapshot(
            header.generation,
            rows,
            header.as_of,
            read_at.seconds,
            header.database_snapshot,
            header.columns,
            source=head.origin,
            change=head.change,
            rolled_back_to=head.rolled_back_to,
            watch_state=header.watch_state,
            probe=header.probe or None,
            server=header.server,
            lag=head.lag,
            content_since=header.content_since,
            dependencies=Dependencies.from_text(header.dependencies),
            age_uncertain=head.age_uncertain or read_at.uncertain,
        )


class _Building:
    """The rows of an update that is not complete yet: of a snapshot, or of a delta."""

    def __init__(self, head: Head, rows: RowsBuilder | RowsPatch) -> None:
        self.head = head
        self._rows = rows

    def take(self, item: Put | Removed) -> bool:
        """Apply rows or removed keys; return whether that took about half a millisecond."""
        rows = self._rows
        if isinstance(rows, RowsBuilder):
            if isinstance(item, Removed):
                raise SnapshotRejected(f"{_NAME}: a snapshot removes rows")
            rows.add(item.rows)
            return True
        if isinstance(item, Put):
            for key, document in item.rows:
                rows.put(key, document)
        else:
            for key in item.keys:
                rows.remove(key)
        return len(item[0]) > _FEW

    def finish(self) -> tuple[Rows, Delta | None]:
        """Return the rows, and how they differ from those before; None if that is not known."""
        if isinstance(self._rows, RowsBuilder):
            return self._rows.finish(), None
        patch = self._rows
        if patch.added or patch.changed or patch.removed:
            return patch.finish(), patch.delta
        return patch.old, patch.delta

    def discard(self) -> None:
        """Free the rows of an update that will not be complete."""
        if isinstance(self._rows, RowsBuilder):
            self._rows.discard()
