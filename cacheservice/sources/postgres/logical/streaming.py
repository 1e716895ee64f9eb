"""One stream of changes, from the creation of its slot to its end, and what readers wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from twisted.internet.defer import CancelledError, Deferred

from cacheservice.base.errors import Blocker, RefreshFailed
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import pause
from cacheservice.cache.capture import CaptureStatus
from cacheservice.cache.identity import Visibility
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.logical.captured import BOUNDS, Captured
from cacheservice.sources.postgres.logical.environment import Environment, Retained
from cacheservice.sources.postgres.logical.kept import Committed, Trash
from cacheservice.sources.postgres.logical.stream import ChangeStream, StreamObserver, position
from cacheservice.sources.postgres.logical.tables import Sent

_LOOK_S = 10.0
"""Between two looks at the log that the server keeps for the slot."""
_WAIT_SEEN_S = 1.0
"""A slot that is not there after so long waits for open transactions, whose sessions are then asked for so often."""
_QUERY_WITHIN_S = 5.0
_POKE_AFTER_S = 0.003
"""The log reaches the disk with the next commit; if none comes for so long, one of our own does that."""
_AGAIN_FIRST_S, _AGAIN_LAST_S = 0.002, 1.0
"""Until a dataset is read again, from which a transaction was not visible yet."""
_LOGGED = (
    "of the primary, which logs each 15 s those that are running; SELECT pg_log_standby_snapshot() there does that at "
    "once"
)


class Asks(Protocol):
    """The database, as the capture uses it: `cacheservice.sources.postgres.database.Database`."""

    def environment(self, publication: str, timeout_s: float) -> Deferred[Environment]: ...

    def retained(self, slot: str, timeout_s: float) -> Deferred[Retained]: ...

    def blockers(self, pid: int, timeout_s: float) -> Deferred[tuple[Blocker, ...]]: ...

    def flush_log(self, timeout_s: float) -> Deferred[None]: ...


@dataclass(frozen=True, slots=True)
class CaptureObserver:
    """The functions that a capture calls. They must be quick, and must not raise.

    :param changed: called with the name of a dataset whose tables have changed.
    :param missed: called if changes may have been missed.
    :param bases: returns the snapshots from which deltas may start that use a slot.
    """

    changed: Callable[[str], object]
    missed: Callable[[], object]
    bases: Callable[[str], list[Visibility]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all streams of a process share."""

    database: Asks
    observer: CaptureObserver
    reactor: Reactor
    log: Log


class Streaming:
    """A stream. It waits for its slot at first; `is_streaming` from then on until it ends.

    `captured` is what it has shown.

    :param began: called once the slot exists.
    """

    def __init__(
        self, guard: GuardedConnection, found: Environment, around: Surroundings, began: Callable[[], object]
    ) -> None:
        self.is_streaming = False
        self.captured = Captured(found.next_xid, BOUNDS, Trash(self._begin_freeing))
        self._in_recovery = found.in_recovery
        self._around = around
        self._began_with = began
        self._guard = guard
        observer = StreamObserver(self._began, self._committed)
        self._stream = ChangeStream(guard, self.captured.decoder, self.captured.open, observer, around.reactor)
        self._tasks = Tasks(around.log)
        self._pokes: Deferred[None] | None = None
        self._concerned: set[str] = set()
        self._again_s: dict[str, float] = {}
        self._blockers: str | None = None
        self._retained: Retained | None = None
        self._marks: deque[tuple[float, int]] = deque()

    @property
    def slot(self) -> str:
        return self._stream.slot

    def status(self) -> CaptureStatus:
        """Return the state of this stream."""
        now, kept = self._around.reactor.seconds(), self.captured.kept
        while self._marks and self._marks[0][1] <= self._stream.passed:
            self._marks.popleft()
        retained = self._retained
        waits = None if self.is_streaming else self._blockers
        return CaptureStatus(
            "streaming" if self.is_streaming else "waiting" if waits else "starting",
            problem=waits and f"the slot waits for open transactions: {waits}",
            slot=self.slot,
            lag_bytes=max(0, position(retained.written) - self._stream.passed) if retained is not None else 0,
            lag_s=now - self._marks[0][0] if self._marks else 0.0,
            retained_bytes=None if retained is None else retained.retained_bytes,
            limit_bytes=None if retained is None else retained.limit_bytes,
            kept_keys=kept.count,
            kept_bytes=kept.size_bytes,
            transactions=self.captured.transactions,
            keys=self.captured.keys,
        )

    async def run(self, publication: str) -> NoReturn:
        """Stream until the session ends.

        :raises RefreshFailed: why it has ended, or why it cannot stream.
        :raises BadChanges: if the server sends something else than changes.
        """
        self._tasks.run(self._look())
        try:
            await self._stream.run(publication)
        finally:
            self.is_streaming = False
            self._tasks.cancel()
        raise AssertionError("a stream ends with an error")

    async def pass_by(self, lsn: str, within_s: float, *, may_write: bool) -> bool:
        """Wait until all changes before a position in the log are known.

        :param may_write: whether the server is a primary. A standby decodes what it has replayed, which is on the disk.
        :returns: False if they are not in time, or the stream has ended.
        """
        passing = self._stream.until_passed(position(lsn))
        is_late = False

        def expire() -> None:
            nonlocal is_late
            is_late = True
            passing.cancel()

        timers = [self._around.reactor.callLater(within_s, expire)]
        if may_write:
            timers.append(self._around.reactor.callLater(_POKE_AFTER_S, self._poke))
        try:
            return await passing
        except CancelledError:
            if is_late:
                return False
            raise
        finally:
            for timer in timers:
                if timer.active():
                    timer.cancel()

    def learn(self, dataset: str, sent: tuple[Sent, ...], now: Visibility) -> None:
        """Note the tables that a dataset watches now, and have it read again if the read misses a transaction.

        A transaction becomes visible right after it is in the log, except if it waits for a synchronous standby.

        :param now: the snapshot of a read.
        """
        if not self.captured.learn(dataset, sent, now):
            self._again_s.pop(dataset, None)
            return
        delay_s = self._again_s.get(dataset, _AGAIN_FIRST_S)
        self._again_s[dataset] = min(2 * delay_s, _AGAIN_LAST_S)
        self._tasks.run(self._notify_again(dataset, delay_s))

    async def _notify_again(self, dataset: str, delay_s: float) -> None:
        await pause(self._around.reactor, delay_s)
        self._around.observer.changed(dataset)

    def _began(self, _: int) -> None:
        self.is_streaming = True
        self._began_with()

    def _committed(self, transaction: Committed) -> None:
        concerned = self.captured.committed(transaction)
        if concerned and not self._concerned:
            # In the next turn, once for all transactions of this one.
            self._around.reactor.callLater(0, self._notify)
        self._concerned |= concerned
        self.captured.forget(lambda: self._around.observer.bases(self.slot))

    def _notify(self) -> None:
        concerned, self._concerned = self._concerned, set()
        for name in concerned:
            self._around.observer.changed(name)

    def _begin_freeing(self) -> None:
        self._tasks.run(self._free())

    async def _free(self) -> None:
        is_left = True
        while is_left:
            await pause(self._around.reactor)
            is_left = self.captured.trash.free()

    def _poke(self) -> None:
        """Have the server write its log to the disk: what an open transaction has written is not decoded before."""
        if self._pokes is None:
            self._pokes = self._tasks.run(self._flush())
            self._pokes.addBoth(self._poked)

    def _poked(self, _: object) -> None:
        self._pokes = None

    async def _flush(self) -> None:
        try:
            await self._around.database.flush_log(_QUERY_WITHIN_S)
        except RefreshFailed as error:
            self._around.log.debug("log_not_flushed", error=str(error))

    async def _look(self) -> None:
        """Ask for the sessions that the slot waits for, and later for the log that the server keeps."""
        database = self._around.database
        while True:
            await pause(self._around.reactor, _LOOK_S if self.is_streaming else _WAIT_SEEN_S)
            try:
                if self.is_streaming:
                    at = self._around.reactor.seconds()
                    self._retained = await database.retained(self.slot, _QUERY_WITHIN_S)
                    self._marks.append((at, position(self._retained.written)))
                else:
                    found = await database.blockers(self._guard.pid, _QUERY_WITHIN_S)
                    self._blockers = "; ".join(map(str, found)) or (_LOGGED if self._in_recovery else None)
            except RefreshFailed as error:
                self._around.log.debug("capture_not_looked_at", error=str(error))
