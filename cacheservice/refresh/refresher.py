"""Keeps one dataset fresh, or a group of them: its LoopingCall, its attempts, its retries.

`timetable` decides when an attempt begins, `sources.full_or_delta` how much it reads, and `gates` whether its results
may be published. `outcomes` publishes, holds or records a failure. This module runs the attempts and owns the timers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from twisted.internet.defer import CancelledError, Deferred

from cacheservice.base.errors import RefreshFailed, Stopped, let_go
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.snapshot import Snapshot
from cacheservice.refresh.claim import Claim
from cacheservice.refresh.members import members_of
from cacheservice.refresh.operator import Operator
from cacheservice.refresh.outcomes import Outcomes
from cacheservice.refresh.process import Process
from cacheservice.refresh.read_plans import Planning
from cacheservice.refresh.results import Result, Try
from cacheservice.refresh.slots import Slots
from cacheservice.refresh.starts import Starts
from cacheservice.refresh.statuses import Statuses
from cacheservice.refresh.timetable import Due, Notifiable, Timetable
from cacheservice.sources.base import AllRows, ReadResult, Source

T = TypeVar("T")


class Shared(NamedTuple):
    """The objects that all refreshers share.

    :param heard_all: waits until every notification that was sent before this call has been heard; False if that
        cannot be known.
    """

    process: Process
    source: Source
    status: DatabaseStatus
    slots: Slots
    heard_all: Callable[[], Awaitable[bool]] | None = None


class Refresher:
    """Refreshes one dataset, or the datasets of one group together, until it is stopped.

    Attempts never overlap. The results of a group are of one moment, and are published in one turn of the reactor, or
    not at all. Starts are at a fixed phase, one interval apart. A start during an attempt is skipped and counted. A
    failed attempt is retried with backoff, never past the next start.
    """

    def __init__(self, datasets: Sequence[Dataset], shared: Shared) -> None:
        self.datasets = tuple(datasets)
        self._shared = shared
        self._clock = shared.process.clock
        self._members = members_of(datasets, shared.process.log)
        self._statuses = Statuses(self.datasets, shared.process.clock)
        self._outcomes = Outcomes(self._members, self._statuses, shared.status, shared.process.clock)
        self.operator = Operator(self._members)
        self._planning = Planning(self._statuses, shared.process, shared.heard_all)
        self._timetable = Timetable(datasets[0].settings, shared.process.random)
        self._claim = Claim(self.datasets, self._timetable)
        self._starts = Starts(shared.process.clock, self._loop_started, self._tick, self._wake)
        self._running: Deferred[None] | None = None
        self._whole_is_due = False  # an operator asked for a full read, and none has succeeded since
        self._stopping = False

    # Life

    def start(self, stretch: float = 1.0) -> None:
        """Load now, and then at every start of an interval.

        :param stretch: multiplies the interval.
        """
        now = self._clock.seconds()
        self._statuses.started()
        self._timetable.stretch(stretch, self.datasets[0].settings)
        due = self._timetable.start(now)
        self._begin_loop()
        self._begin(due)

    def settings_changed(self) -> None:
        """Apply changed settings. A running attempt keeps the old ones."""
        planned_at = self._timetable.settings_changed(self.datasets[0].settings, self._clock.seconds())
        if planned_at is None:
            return
        self._begin_loop()
        self._arm()
        self._statuses.planned(planned_at)

    def stop(self) -> Deferred[None]:
        """Plan no attempts any more, and end a running one. The Deferred fires when it has ended."""
        was_stopped, self._stopping = self._stopping, True
        self._forget_plans()
        done: Deferred[None] = Deferred()
        if self._running is None:
            done.callback(None)
        else:
            self._running.addBoth(lambda _: done.callback(None))
            if not was_stopped:
                self._running.cancel()
        # The attempt may have ended by itself at this moment, and planned the next one.
        return done.addCallback(lambda _: self._forget_plans())

    # Requests

    def refresh_now(self) -> bool:
        """Start a full read that begins after this call; return False if it follows a running attempt."""
        was_running = self._timetable.is_running
        self._begin(self._timetable.refresh_now())
        if was_running:
            self._hurry()
        return not was_running

    def refresh_since(self, moment: float) -> None:
        """Ensure that an attempt begins at or after `moment`, unless such an attempt is already running."""
        was_running = self._timetable.is_running
        self._begin(self._timetable.refresh_since(moment))
        if was_running:
            self._hurry()

    def note_changed(self, name: str, keys: Iterable[str] | None) -> None:
        """Note that rows of a dataset have changed; None stands for any row. Call `notified` afterwards."""
        self._planning.note_changed(name, keys)
        self._timetable.heard(self._clock.seconds())

    def notified(self, *, at_once: bool = False) -> None:
        """Ensure that an attempt begins after the noted changes. At most one follows a running attempt.

        :param at_once: do not wait for a retry, because the database has just been proven to be there.
        """
        due = self._timetable.notified(self._clock.seconds(), self._notifiable(), at_once=at_once)
        self._begin(due)
        self._arm()

    def _hurry(self) -> None:
        """Exempt the waiting attempt from postgres.max_load, because a reader or an operator waits for it."""
        if self._claim.await_it():
            self._shared.slots.grant()

    # Starts

    def _begin_loop(self) -> None:
        self._starts.begin(self._timetable.grid.starts_in_s(self._clock.seconds()), self._timetable.grid.interval_s)

    def _loop_started(self) -> None:
        self._timetable.grid.loop_started(self._clock.seconds())

    def _tick(self, due: int) -> None:
        started = self._timetable.interval_began()
        for dataset, log in self._members:
            # The starts that came while the reactor was blocked, and this one.
            dataset.counts.count_missed(due - 1 + (started is None))
            if started is None:
                log.debug("interval_skipped", missed_ticks=dataset.counts.missed_ticks)
        self._begin(started)

    def _arm(self) -> None:
        if not self._stopping:
            self._starts.arm(self._timetable.wake_at())

    def _wake(self) -> None:
        self._begin(self._timetable.wake(self._clock.seconds(), self._notifiable()))
        self._arm()

    def _forget_plans(self) -> None:
        self._starts.stop()
        self._statuses.planned(None)

    def _notifiable(self) -> Notifiable:
        since = [each.refresh.without_deltas.since for each in self.datasets if each.refresh.without_deltas is not None]
        may_burst = any(dataset.settings.notify for dataset in self.datasets)
        return Notifiable(may_burst, min(since, default=None))

    # Attempts

    def _begin(self, due: Due | None) -> None:
        if due is None:
            return
        now = self._clock.seconds()
        self._statuses.planned(self._timetable.began(now))
        self._arm()
        self._claim.begin(is_awaited=due.trigger == "manual")
        self._statuses.waiting()
        running = Deferred.fromCoroutine(self._attempt(due))
        if running.called:
            self._ended(None)
        else:
            self._running = running
            running.addBoth(self._ended)

    def _ended(self, _: object) -> None:
        self._running = None
        self._statuses.idle()
        due = self._timetable.ended(self._clock.seconds(), self._notifiable())
        if not self._stopping:
            self._begin(due)
            self._arm()

    async def _attempt(self, due: Due) -> None:
        """Run one attempt. Never raises: an exception would end the loop."""
        # An operator's request for a full read is not done before one has succeeded: a failure does not end it.
        whole = self._whole_is_due = due.whole or self._whole_is_due
        asked_at = began_at = self._clock.seconds()
        this = Try.new(due.trigger)
        found: list[ReadResult] = []
        bases: list[Snapshot | None] = []

        def read() -> Deferred[list[ReadResult]]:
            nonlocal began_at, this
            began_at = self._clock.seconds()
            self._timetable.got_slot(began_at)
            this = this.begins_now()
            self._statuses.reading()
            bases[:] = [dataset.newest() for dataset in self.datasets]
            members = zip(self.datasets, bases, strict=True)
            plans = [self._planning.read_plan(*each, this, whole=whole) for each in members]
            return self._shared.source.read(plans).addBoth(ended)

        def ended(result: T) -> T:
            self._timetable.read(self._clock.seconds())
            return result

        try:
            found = await self._shared.slots.run(
                self._claim.need,
                self._claim.is_failing,
                read,
                urgent=self._claim.is_urgent,
                expected_s=self._claim.expected_s,
                put_off=self._statuses.put_off,
            )
            if self._stopping:  # the results arrived nevertheless, and the query may not be declared any more
                raise Stopped("the refreshes were stopped")
            for dataset, each in zip(self.datasets, found, strict=True):
                self._statuses.deltas(dataset, each.no_delta)
            read_of = zip(self.datasets, found, bases, strict=True)
            results = [await Result.of(self._clock, *each) for each in read_of]
            if any(result.is_held for result in results):
                self._planning.lose_keys(
                    self.datasets
                )  # those that were named are not served yet; triggers keep theirs
                self._outcomes.hold(results, this)
            else:
                await self._outcomes.publish(results, this, began_at - asked_at)
            self._whole_is_due = False
        except (Stopped, CancelledError) as error:
            for member in self._members:
                member.log.debug("refresh_cancelled", **this.fields())
            let_go(error)
        except RefreshFailed as error:
            self._fail(error, this, self._clock.seconds() - began_at)
            let_go(error)
        except Exception as error:
            # A bug. Log the traceback and count it as a failed refresh; the loop continues.
            for member in self._members:
                member.log.error("refresh_broke", **this.fields(), exc_info=True)
            ours = RefreshFailed(f"an internal error, {type(error).__name__}; its traceback is in the log")
            self._fail(ours, this, self._clock.seconds() - began_at)
            let_go(error)
        finally:
            self._statuses.loaded()
            for each in found:
                if isinstance(each, AllRows):
                    each.rows.discard()
            bases.clear()  # an error keeps this call, which cannot be cleared while it runs

    def _fail(self, error: RefreshFailed, this: Try, took_s: float) -> None:
        self._planning.lose_keys(self.datasets)
        self._outcomes.withdraw_what_is_elsewhere()
        now = self._clock.seconds()
        next_at = self._timetable.failed(now, self.datasets[0].consecutive_failures)
        self._statuses.planned(next_at)
        self._outcomes.fail(error, this, took_s, next_at - now)
