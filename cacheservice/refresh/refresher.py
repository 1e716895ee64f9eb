"""Keeps one dataset fresh: its LoopingCall, its attempts, its retries."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import LoopingCall, deferLater

from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.changes import Change, ChangeCount
from cacheservice.cache.dataset import Attempt, Dataset, Snapshot, State, Trigger
from cacheservice.cache.describe import describe_blocker, seconds
from cacheservice.cache.rows import Rows, RowsBuilder, Shards
from cacheservice.config import DatasetSettings
from cacheservice.errors import DatabaseUnavailable, LockTimeout, RefreshFailed, Stopped
from cacheservice.postgres.database import Reading
from cacheservice.refresh.backoff import full_jitter
from cacheservice.refresh.gates import refusal
from cacheservice.refresh.slots import Slots

_EXPIRY_MARGIN_S = 0.001
"""A dataset is expired when its age is greater than its limit, not equal to it."""
_LONGEST_TIMER_S = 2_000_000.0
"""epoll takes no more than 2**31 ms."""


class Reads(Protocol):
    """What a refresh asks of the database: ``cacheservice.postgres.database.Database``."""

    def read(
        self, dataset: DatasetSettings, into: RowsBuilder, expect: Callable[[int], None] | None = None
    ) -> Deferred[Reading]: ...


class Refresher:
    """Refreshes one dataset, never twice at the same time, until it is stopped.

    Starts are at a fixed phase, one interval apart. One that comes while an attempt still runs is
    skipped and counted. A failure is tried again with backoff, never past the next start.

    :param clock: `IReactorTime`, monotonic.
    :param random: a number from 0 to 1; the phase is drawn from it once.
    """

    def __init__(
        self,
        dataset: Dataset,
        database: Reads,
        status: DatabaseStatus,
        slots: Slots,
        release: Callable[[Shards], None],
        clock: Any,
        random: Callable[[], float],
        log: Any,
    ) -> None:
        self.dataset = dataset
        self._database = database
        self._status = status
        self._slots = slots
        self._release = release
        self._clock = clock
        self._log = log.bind(dataset=dataset.name)
        settings = dataset.settings
        self._interval_s = settings.interval_s
        self._earlier_s = settings.interval_s * settings.jitter * random()
        self._retry_wait_s = full_jitter(settings.retry_initial_s, settings.retry_max_s, random)
        self._loop = LoopingCall.withCount(self._tick)
        self._loop.clock = clock
        self._phase_at = 0.0
        self._first_tick: Any = None
        self._retry: Any = None
        self._expiry: Any = None
        self._running: Deferred[None] | None = None
        self._again: Trigger | None = None
        self._stopping = False
        self._expired_told = False
        self._began_at = 0.0

    def start(self) -> None:
        """Load now, and then at every start of an interval."""
        # Earlier than an interval from now, not later, so that the first snapshot is not stale before the second.
        first_in_s = self._interval_s - self._earlier_s
        self._phase_at = self._clock.seconds() + first_in_s
        self._first_tick = self._clock.callLater(first_in_s, self._start_loop)
        self._begin("start")

    def stop(self) -> Deferred[None]:
        """Start nothing more and end what runs; fires when it has."""
        self._stopping = True
        self._forget_plans()
        done: Deferred[None] = Deferred()
        if self._running is None:
            done.callback(None)
        else:
            self._running.addBoth(lambda _: done.callback(None))
            self._running.cancel()
        # What ran may have ended by itself at this moment, and planned what comes after it.
        return done.addCallback(lambda _: self._forget_plans())

    def _forget_plans(self) -> None:
        if self._loop.running:
            self._loop.stop()
        for timer in (self._first_tick, self._retry, self._expiry):
            if timer is not None and timer.active():
                timer.cancel()
        self.dataset.next_refresh_at = None

    def refresh_now(self) -> bool:
        """Start an attempt that begins after this call; False if it follows one that is running."""
        if self._running is not None:
            self._again = "manual"
            return False
        self._begin("manual")
        return True

    def _start_loop(self) -> None:
        # The loop's phase is when it really starts, which is later if the reactor was held.
        self._phase_at = self._clock.seconds()
        self._loop.start(self._interval_s)

    def refresh_since(self, moment: float) -> None:
        """See to it that an attempt begins at or after `moment`, unless one that did is running already."""
        if self._running is None or self._began_at < moment:
            self.refresh_now()

    def _tick(self, due: int) -> None:
        self.dataset.missed_ticks += due - 1  # those that came while the reactor was held
        if self._running is not None:
            self.dataset.missed_ticks += 1
            self._log.debug("interval_skipped", missed_ticks=self.dataset.missed_ticks)
            return
        self._begin("interval")

    def _begin(self, trigger: Trigger) -> None:
        if self._retry is not None and self._retry.active():
            self._retry.cancel()
        self._again = None
        self.dataset.refreshing = True
        self._began_at = math.inf  # it waits for a slot, and so begins after whatever moment is asked for now
        self.dataset.next_refresh_at = self._next_tick_at()
        running = Deferred.fromCoroutine(self._attempt(trigger))
        if running.called:
            self._ended(None)
        else:
            self._running = running
            running.addBoth(self._ended)

    def _ended(self, _: object) -> None:
        self._running = None
        self.dataset.refreshing = False
        if self._again is not None and not self._stopping:
            self._begin(self._again)

    async def _attempt(self, trigger: Trigger) -> None:
        """One try, whatever comes of it: it never raises, because it is all that stands in the loop."""
        dataset, settings = self.dataset, self.dataset.settings
        asked_at = began_at = self._clock.seconds()
        began_on = datetime.now(UTC)
        builder = RowsBuilder(self._release, max_rows=settings.max_rows, max_bytes=settings.max_bytes)

        def read() -> Deferred[Reading]:
            nonlocal began_at, began_on
            began_at = self._began_at = self._clock.seconds()
            began_on = datetime.now(UTC)
            dataset.loading = builder
            dataset.expected_rows = dataset.snapshot.rows.count if dataset.snapshot else None
            # The planner's estimate is asked for only where there is no better one.
            expect = self._expect if dataset.snapshot is None else None
            return self._database.read(settings, builder, expect)

        try:
            reading = await self._slots.run(dataset.need, self._is_failing, read)
            rows = builder.finish()
            refused = refusal(dataset.snapshot, rows.count, reading.columns, settings)
            accepted, dataset.accepts_next = dataset.accepts_next, False
            if refused is not None and not accepted:
                self._hold(refused, reading, rows.count, trigger, began_on)
            else:
                change = await self._change(rows)
                self._publish(reading, rows, change, trigger, began_on, began_at - asked_at, refused)
        except (Stopped, CancelledError):
            self._log.debug("refresh_cancelled", trigger=trigger)
        except RefreshFailed as error:
            self._fail(error, trigger, began_on, self._clock.seconds() - began_at)
        except Exception as error:
            # A mistake of ours: told with its traceback, and as any other failure no end of the loop.
            self._log.error("refresh_broke", trigger=trigger, exc_info=True)
            ours = RefreshFailed(f"an internal error, {type(error).__name__}; its traceback is in the log")
            self._fail(ours, trigger, began_on, self._clock.seconds() - began_at)
        finally:
            dataset.loading = dataset.expected_rows = None
            builder.discard()

    def _expect(self, rows: int) -> None:
        self.dataset.expected_rows = rows

    def _is_failing(self) -> bool:
        return self.dataset.consecutive_failures > 0

    async def _change(self, rows: Rows) -> Change:
        """What publishing `rows` would change, counted without holding the reactor."""
        dataset = self.dataset
        while (served := dataset.snapshot) is not None:
            count = ChangeCount(served.rows, rows)
            for _ in count:
                await deferLater(self._clock, 0)
            if dataset.snapshot is served:
                return count.change
        return Change(rows.count, 0, 0)

    def _hold(self, refused: str, reading: Reading, rows: int, trigger: Trigger, began_on: datetime) -> None:
        """Go on with what is served; the next interval tries again."""
        dataset = self.dataset
        took_s = self._clock.seconds() - reading.read_at
        dataset.hold(refused, rows, datetime.now(UTC))
        advice = (
            f"if the result is right, say 'accept {dataset.name}' on the admin socket, which lets the next one through;"
            " if not, correct the data, and the next one clears it by itself"
        )
        dataset.attempted(Attempt("held", trigger, began_on, took_s, rows, refused, advice))
        self._status.answered()
        self._log.warning(
            "refresh_held", trigger=trigger, error=f"the result {refused}", rows=rows, took_s=seconds(took_s)
        )

    def _publish(
        self,
        reading: Reading,
        rows: Rows,
        change: Change,
        trigger: Trigger,
        began_on: datetime,
        queued_s: float,
        accepted: str | None,
    ) -> None:
        """:param accepted: what a gate had against it, and an operator had not."""
        dataset = self.dataset
        generation = dataset.snapshot.generation + 1 if dataset.snapshot else 1
        took_s = self._clock.seconds() - reading.read_at
        dataset.publish(
            Snapshot(
                generation,
                rows,
                reading.as_of,
                reading.read_at,
                reading.database_snapshot,
                reading.columns,
                change=change,
            )
        )
        dataset.attempted(Attempt("published", trigger, began_on, took_s, rows.count))
        self._status.answered()
        self._log.info(
            "refresh_published",
            trigger=trigger,
            generation=generation,
            rows=rows.count,
            bytes=rows.size_bytes,
            **change._asdict(),
            accepted=accepted,
            took_s=seconds(took_s),
            queued_s=seconds(queued_s),
        )
        self._watch_expiry()

    def _fail(self, error: RefreshFailed, trigger: Trigger, began_on: datetime, took_s: float) -> None:
        dataset = self.dataset
        retry_in_s = self._plan_retry()
        blockers = error.blockers if isinstance(error, LockTimeout) else ()
        dataset.attempted(Attempt("failed", trigger, began_on, took_s, None, str(error), error.advice, blockers))
        if isinstance(error, DatabaseUnavailable):
            self._status.failed(str(error))
        else:
            self._status.answered()
        self._log.warning(
            "refresh_failed",
            trigger=trigger,
            error=str(error),
            blocked_by=[describe_blocker(blocker) for blocker in blockers] or None,
            took_s=seconds(took_s),
            retry_in_s=seconds(retry_in_s),
            consecutive_failures=dataset.consecutive_failures,
        )

    def _plan_retry(self) -> float:
        """Try again after a wait, or at the next start if that comes first; gives the seconds until then."""
        now: float = self._clock.seconds()
        next_tick_at = self._next_tick_at()
        retry_at = now + self._retry_wait_s(self.dataset.consecutive_failures)
        if retry_at < next_tick_at:
            self._retry = self._clock.callLater(retry_at - now, self._begin, "retry")
        next_at: float = min(retry_at, next_tick_at)
        self.dataset.next_refresh_at = next_at
        return next_at - now

    def _next_tick_at(self) -> float:
        passed: int = math.floor((self._clock.seconds() - self._phase_at) / self._interval_s)
        return self._phase_at + max(0, passed + 1) * self._interval_s

    def _watch_expiry(self) -> None:
        """Tell once when the new snapshot expires, and that the one before it is replaced if that had."""
        if self._expiry is not None and self._expiry.active():
            self._expiry.cancel()
        if self._expired_told:
            if self.dataset.state() is State.EXPIRED:
                return  # it took longer to read than it may be old
            self._expired_told = False
            self._log.info("dataset_recovered")
        age_s = self.dataset.age_s() or 0.0
        in_s = max(0.0, self.dataset.settings.max_age_s - age_s) + _EXPIRY_MARGIN_S
        self._expiry = self._clock.callLater(min(in_s, _LONGEST_TIMER_S), self._expired)

    def _expired(self) -> None:
        if self.dataset.state() is not State.EXPIRED:
            self._watch_expiry()
            return
        self._expired_told = True
        age_s = self.dataset.age_s() or 0.0
        self._log.warning("dataset_expired", age_s=seconds(age_s), max_age_s=self.dataset.settings.max_age_s)
