"""Keeps one dataset fresh, or a group of them: its LoopingCall, its attempts, its retries."""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import LoopingCall, deferLater

from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.changes import Change, ChangeCount
from cacheservice.cache.dataset import Attempt, Dataset, Snapshot, Trigger, rows_builder
from cacheservice.cache.describe import describe_blocker, seconds
from cacheservice.cache.history import Outcome
from cacheservice.cache.identity import why_elsewhere
from cacheservice.cache.rows import Groups, Rows, RowsBuilder, RowsPatch
from cacheservice.config import timing
from cacheservice.errors import (
    DatabaseUnavailable,
    LockTimeout,
    LoginRefused,
    NothingToPin,
    RefreshFailed,
    Stopped,
    let_go,
)
from cacheservice.postgres.database import Reading, Wanted
from cacheservice.postgres.recorded import Recorded
from cacheservice.refresh.backoff import full_jitter
from cacheservice.refresh.expiry import ExpiryWatch
from cacheservice.refresh.gates import refusal
from cacheservice.refresh.slots import Slots


class Reads(Protocol):
    """What a refresh asks of the database: ``cacheservice.postgres.database.Database``."""

    def read_together(self, wanted: Sequence[Wanted]) -> Deferred[list[Reading]]: ...

    def prune(self, keep_s: float, timeout_s: float) -> Deferred[int]: ...

    def recorded(self, timeout_s: float) -> Deferred[Recorded]: ...

    def end_kept(self) -> None: ...


class _Try(NamedTuple):
    """An attempt that is under way: its id, why it was begun, and when by this machine's wall clock."""

    id: str
    trigger: Trigger
    began_on: datetime

    def ended(
        self, outcome: Outcome, took_s: float, rows: int | None, error: str | None = None, **more: Any
    ) -> Attempt:
        return Attempt(outcome, self.trigger, self.began_on, took_s, rows, error, id=self.id, **more)

    def fields(self) -> dict[str, str]:
        """For its line in the log."""
        return {"trigger": self.trigger, "attempt": self.id}


class _Result(NamedTuple):
    """What was read of one dataset, before it is known whether it is published.

    `base` is what there was when it was read, and `change` what a delta changed of it; None where all was read.
    """

    dataset: Dataset
    reading: Reading
    rows: Rows
    refused: str | None
    base: Snapshot | None = None
    change: Change | None = None


class _Comparison(NamedTuple):
    """What publishing a result would change of what is served; and what it is `like`, to the byte, if anything."""

    change: Change
    like: Snapshot | None


_LEAST_DELTA_KEYS = 100
"""A delta of so many keys is cheap however small the dataset is."""
_CALM_S = 0.02
"""A notification that comes within it after another, or after an attempt, is of a burst."""
_LONGEST_BURST_S = 2.0
"""However long a burst is, an attempt begins after so much of it."""
_WHOLE_PAUSE_S = 1.0
_WHOLE_PAUSE_TIMES = 4.0
"""While deltas are off, notifications start a full read after a pause of so many times the last one at least."""
_PATCHED_A_TURN = 500
"""Keys, in half a millisecond."""


class Refresher:
    """Refreshes one dataset, or those of one group together, never twice at the same time, until it is stopped.

    What a group reads is of one moment, and published in one turn of the reactor, or none of it is.
    Starts are at a fixed phase, one interval apart. One that comes while an attempt still runs is
    skipped and counted. A failure is tried again with backoff, never past the next start.

    :param clock: `IReactorTime`, monotonic.
    :param random: a number from 0 to 1; the phase is drawn from it once.
    :param heard_all: waits until every notification that was sent before this call has been heard; False if that is
        not to be known.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        database: Reads,
        status: DatabaseStatus,
        slots: Slots,
        release: Callable[[Groups], None],
        clock: Any,
        random: Callable[[], float],
        log: Any,
        heard_all: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self._database = database
        self._status = status
        self._slots = slots
        self._release = release
        self._clock = clock
        self._logs = {dataset.name: log.bind(dataset=dataset.name) for dataset in datasets}
        self._expiries = [ExpiryWatch(dataset, clock, self._logs[dataset.name]) for dataset in datasets]
        self._random = random
        self._share = random()
        self._take_timing()
        self._loop = self._new_loop()
        self._phase_at = 0.0
        self._started_at: float | None = None
        self._first_tick: Any = None
        self._retry: Any = None
        self._calm: Any = None
        self._burst_began_at = 0.0
        self._told_at = -math.inf
        self._ended_at = -math.inf
        self._running: Deferred[None] | None = None
        self._again: Trigger | None = None
        self._again_whole = False
        self._whole_is_due = False
        self._heard_all = heard_all
        self._told: dict[str, set[str] | None] = {}
        self._stopping = False
        self._began_at = 0.0
        self._urgent = False
        self._expected_s = 0.0

    def _new_loop(self) -> LoopingCall:
        loop = LoopingCall.withCount(self._tick)
        loop.clock = self._clock
        return loop

    def _take_timing(self) -> None:
        settings = self.datasets[0].settings  # a group has in common what says when
        self._timing = timing(settings)
        self._interval_s = settings.interval_s
        self._earlier_s = settings.interval_s * settings.jitter * self._share
        self._retry_wait_s = full_jitter(settings.retry_initial_s, settings.retry_max_s, self._random)

    def start(self) -> None:
        """Load now, and then at every start of an interval."""
        for expiry in self._expiries:
            expiry.published()  # what was restored, or is served from before
        # Earlier than an interval from now, not later, so that the first snapshot is not stale before the second.
        self._started_at = self._clock.seconds()
        for dataset in self.datasets:
            if dataset.snapshot is not None:
                dataset.checked_at = dataset.checked_at or self._started_at
        self._plan_first_tick(self._interval_s - self._earlier_s)
        self._begin("start")

    def _plan_first_tick(self, in_s: float) -> None:
        self._phase_at = self._clock.seconds() + in_s
        self._first_tick = self._clock.callLater(in_s, self._start_loop)

    def settings_changed(self) -> None:
        """Go by the datasets' new settings; an attempt that runs goes on by those that it began with."""
        if self._started_at is None:
            self._take_timing()
            return
        for expiry in self._expiries:
            expiry.published()
        if timing(self.datasets[0].settings) == self._timing:
            return
        self._take_timing()
        retry_at = self._retry.getTime() if _is_active(self._retry) else math.inf
        self._forget_starts()
        self._loop = self._new_loop()  # one that was stopped would count what it missed
        # As if the new interval had begun with the last start.
        passed_s = self._clock.seconds() - self._started_at
        self._plan_first_tick(max(0.0, self._interval_s - self._earlier_s - passed_s))
        if retry_at < self._phase_at:
            self._retry = self._clock.callLater(retry_at - self._clock.seconds(), self._begin, "retry")
        self._plan(min(retry_at, self._phase_at))

    def stop(self) -> Deferred[None]:
        """Start nothing more and end what runs; fires when it has. May be called again."""
        was_stopped, self._stopping = self._stopping, True
        self._forget_plans()
        done: Deferred[None] = Deferred()
        if self._running is None:
            done.callback(None)
        else:
            self._running.addBoth(lambda _: done.callback(None))
            if not was_stopped:
                self._running.cancel()
        # What ran may have ended by itself at this moment, and planned what comes after it.
        return done.addCallback(lambda _: self._forget_plans())

    def _forget_starts(self) -> None:
        if self._loop.running:
            self._loop.stop()
        for timer in (self._first_tick, self._retry):
            if _is_active(timer):
                timer.cancel()

    def _forget_plans(self) -> None:
        self._forget_starts()
        if _is_active(self._calm):
            self._calm.cancel()
        for expiry in self._expiries:
            expiry.stop()
        self._plan(None)

    def _plan(self, next_refresh_at: float | None) -> None:
        for dataset in self.datasets:
            dataset.next_refresh_at = next_refresh_at

    def refresh_now(self) -> bool:
        """Start an attempt that begins after this call and reads all; False if it follows one that is running."""
        if self._started_at is None:
            return True  # it begins with the start
        if self._running is not None:
            self._again, self._again_whole = "manual", True
            self._hurry()
            return False
        self._begin("manual", whole=True)
        return True

    def tell(self, name: str, keys: Iterable[str] | None) -> None:
        """One dataset has changed, in these rows alone or in whatever rows; `notified` is to follow."""
        told = self._told.setdefault(name, set())
        self._told_at = self._clock.seconds()
        if keys is None or told is None:
            self._told[name] = None
        else:
            told.update(keys)

    def notified(self, *, at_once: bool = False) -> None:
        """See to it that an attempt begins after what was told: one is running and one follows at most.

        :param at_once: do not wait for a retry, because the database has just been proven to be there.
        """
        if self._started_at is None:
            return  # it is read with the start
        if self._running is None:
            # Else with the retry: writers must not drive it past its backoff.
            if at_once:
                self._begin("notify")
            elif not _is_active(self._retry) and not _is_active(self._calm):
                self._begin_when_calm()
        elif self._began_at < self._clock.seconds():
            self._again = self._again or "notify"

    def _begin_when_calm(self) -> None:
        """Begin now, or if what an application notifies of comes in a burst, when that is over.

        Of a burst each attempt would see but a part. What triggers tell of costs little to read, and is read at once.
        """
        self._burst_began_at = self._clock.seconds()
        self._look_for_calm()

    def _look_for_calm(self) -> None:
        now = self._clock.seconds()
        calm_at = min(max(self._told_at, self._ended_at) + _CALM_S, self._burst_began_at + _LONGEST_BURST_S)
        is_first = self._ended_at + _CALM_S <= self._burst_began_at
        if any(dataset.whole_since is not None and dataset.whole_since < self._began_at for dataset in self.datasets):
            # Each change would be a read of everything, one after the other.
            rested_at = self._ended_at + max(_WHOLE_PAUSE_S, _WHOLE_PAUSE_TIMES * self._expected_s)
            if now < rested_at:
                self._calm = self._clock.callLater(rested_at - now, self._look_for_calm)
                return
        if is_first or now >= calm_at or not any(dataset.settings.notify for dataset in self.datasets):
            self._begin("notify")
        else:
            self._calm = self._clock.callLater(calm_at - now, self._look_for_calm)

    def pin(self) -> list[str]:
        """Serve what is served; results that come become candidates.

        :raises NothingToPin: if there is nothing to serve yet.
        """
        for dataset in self.datasets:
            if dataset.snapshot is None:
                raise NothingToPin(f"{dataset.name} has not been loaded yet")
        for dataset in self.datasets:
            dataset.pinned = True
            self._logs[dataset.name].info("dataset_pinned")
        return [dataset.name for dataset in self.datasets]

    def unpin(self) -> list[str]:
        """Serve the newest results, and those that come."""
        for dataset, expiry in zip(self.datasets, self._expiries, strict=True):
            served = dataset.snapshot
            dataset.unpin()
            self._logs[dataset.name].info("dataset_unpinned", published=dataset.snapshot is not served)
            if dataset.snapshot is not served:
                expiry.published()
        return [dataset.name for dataset in self.datasets]

    def roll_back(self, saved: Sequence[Snapshot]) -> None:
        """Serve saved snapshots, one of each dataset, pinned, from one turn of the reactor on."""
        for dataset, snapshot, expiry in zip(self.datasets, saved, self._expiries, strict=True):
            dataset.roll_back(snapshot)
            self._logs[dataset.name].info(
                "dataset_rolled_back",
                to=snapshot.generation,
                generation=dataset.snapshot.generation if dataset.snapshot else None,
                rows=snapshot.rows.count,
            )
            expiry.published()

    def _start_loop(self) -> None:
        # The loop's phase is when it really starts, which is later if the reactor was held.
        self._phase_at = self._clock.seconds()
        self._loop.start(self._interval_s)

    def refresh_since(self, moment: float) -> None:
        """See to it that an attempt begins at or after `moment`, unless one that did is running already."""
        if self._started_at is None:
            return  # it begins with the start
        if self._running is None:
            self._begin("manual")
        else:
            if self._began_at < moment:
                self._again = "manual"
            self._hurry()

    def _hurry(self) -> None:
        """Somebody waits for what runs: if postgres.max_load puts it off, it is not put off any more."""
        if not self._urgent:
            self._urgent = True
            self._slots.grant()

    def _is_urgent(self) -> bool:
        return self._urgent or any(dataset.snapshot is None or dataset.redefined for dataset in self.datasets)

    def _put_off(self) -> None:
        for dataset in self.datasets:
            dataset.put_off = True

    def _tick(self, due: int) -> None:
        is_running = self._running is not None
        for dataset in self.datasets:
            # Those that came while the reactor was held, and this one.
            dataset.counts.missed_ticks += due - 1 + is_running
            if is_running:
                self._logs[dataset.name].debug("interval_skipped", missed_ticks=dataset.missed_ticks)
        if not is_running:
            self._begin("interval")

    def _begin(self, trigger: Trigger, whole: bool = False) -> None:
        for timer in (self._retry, self._calm):
            if _is_active(timer):
                timer.cancel()
        self._again, self._again_whole = None, False
        self._urgent = trigger == "manual"
        for dataset in self.datasets:
            dataset.refreshing = True
            dataset.due_at = self._clock.seconds()
        self._began_at = math.inf  # it waits for a slot, and so begins after whatever moment is asked for now
        self._plan(self._next_tick_at())
        running = Deferred.fromCoroutine(self._attempt(trigger, whole))
        if running.called:
            self._ended(None)
        else:
            self._running = running
            running.addBoth(self._ended)

    def _ended(self, _: object) -> None:
        self._running = None
        self._ended_at = self._clock.seconds()
        for dataset in self.datasets:
            dataset.refreshing = dataset.put_off = False
        again, self._again = self._again, None
        if again is None or self._stopping:
            return
        if again != "notify":
            self._begin(again, self._again_whole)
        elif not _is_active(self._retry):
            self._begin_when_calm()

    async def _attempt(self, trigger: Trigger, whole: bool) -> None:
        """One try, whatever comes of it: it never raises, because it is all that stands in the loop."""
        # What an operator asked for is not done before all has been read: a failure does not end it.
        whole = self._whole_is_due = whole or self._whole_is_due
        asked_at = began_at = self._clock.seconds()
        this = _Try(secrets.token_hex(4), trigger, datetime.now(UTC))
        readings: list[Reading] = []
        bases: list[Snapshot | None] = []

        def read() -> Deferred[list[Reading]]:
            nonlocal began_at, this
            began_at = self._began_at = self._started_at = self._clock.seconds()
            this = this._replace(began_on=datetime.now(UTC))
            for dataset in self.datasets:
                dataset.last_put_off_s = dataset.behind_s() or 0.0
                dataset.put_off = False
            bases[:] = [dataset.newest() for dataset in self.datasets]
            wanted = [self._wanted(*each, this, whole) for each in zip(self.datasets, bases, strict=True)]
            return self._database.read_together(wanted).addBoth(self._note_duration_and_passthrough)

        try:
            readings = await self._slots.run(
                self._need,
                self._is_failing,
                read,
                urgent=self._is_urgent,
                expected_s=lambda: self._expected_s,
                put_off=self._put_off,
            )
            if self._stopping:  # they came in spite of it, and may be of a query that is no more
                raise Stopped("the refreshes were stopped")
            results = [await self._result(*each) for each in zip(self.datasets, readings, bases, strict=True)]
            if any(result.refused and not result.dataset.accepts_next for result in results):
                self._hold(results, this)
            else:
                await self._publish(results, this, began_at - asked_at)
            self._whole_is_due = False
        except (Stopped, CancelledError) as error:
            self._tell("debug", "refresh_cancelled", **this.fields())
            let_go(error)
        except RefreshFailed as error:
            self._fail(error, this, self._clock.seconds() - began_at)
            let_go(error)
        except Exception as error:
            # A mistake of ours: told with its traceback, and as any other failure no end of the loop.
            self._tell("error", "refresh_broke", **this.fields(), exc_info=True)
            ours = RefreshFailed(f"an internal error, {type(error).__name__}; its traceback is in the log")
            self._fail(ours, this, self._clock.seconds() - began_at)
            let_go(error)
        finally:
            for dataset in self.datasets:
                dataset.loading = dataset.expected_rows = None
            for reading in readings:
                if reading.rows is not None:
                    reading.rows.discard()
            bases.clear()  # an error keeps this call, which cannot be cleared while it runs

    def _note_duration_and_passthrough(self, result: Any) -> Any:
        self._expected_s = self._clock.seconds() - self._began_at
        return result

    def _tell(self, level: str, event: str, **fields: Any) -> None:
        """A line for each dataset."""
        for log in self._logs.values():
            getattr(log, level)(event, **fields)

    def _need(self) -> float:
        return max(dataset.need() for dataset in self.datasets)

    def _is_failing(self) -> bool:
        return any(dataset.consecutive_failures > 0 for dataset in self.datasets)

    def _hold(self, results: Sequence[_Result], this: _Try) -> None:
        """Go on with what is served; the next interval tries again."""
        self._status.answered()
        self._withdraw_what_is_elsewhere()
        (first, why_first), *_ = [(r.dataset.name, r.refused) for r in results if r.refused]
        for dataset, reading, rows, refused, *_ in results:
            dataset.accepts_next = False
            if dataset.settings.notify:
                self._told[dataset.name] = None  # the keys that were told are not served yet; triggers keep theirs
            reason = refused or f"is of one group with {first}, whose result {why_first}"
            took_s = self._clock.seconds() - reading.began_at
            dataset.hold(reason, rows.count, datetime.now(UTC))
            advice = (
                f"if the result is right, say 'accept {dataset.name if refused else first}' on the admin socket, "
                "which lets the next one through; if not, correct the data, and the next one clears it by itself"
            )
            dataset.attempted(this.ended("held", took_s, rows.count, reason, advice=advice))
            self._logs[dataset.name].warning(
                "refresh_held",
                **this.fields(),
                error=f"the result {reason}",
                rows=rows.count,
                took_s=seconds(took_s),
            )

    async def _publish(self, results: Sequence[_Result], this: _Try, queued_s: float) -> None:
        """Serve all of them from one turn of the reactor on; of pinned ones, keep them."""
        comparisons = await self._comparisons(results)
        self._status.answered()
        # Again, so that a transaction that is waited for is looked for on this server, whatever was read meanwhile.
        self._status.seen(results[0].reading.server, results[0].reading.lag)
        for result, comparison in zip(results, comparisons, strict=True):
            self._publish_one(result, comparison, this, queued_s)
        for dataset, expiry in zip(self.datasets, self._expiries, strict=True):
            if not dataset.pinned:
                expiry.published()

    def _publish_one(self, result: _Result, comparison: _Comparison, this: _Try, queued_s: float) -> None:
        dataset, reading, rows = result.dataset, result.reading, result.rows
        change, like = comparison
        if like is not None and like.rows.is_laid_out_as(rows):
            rows = like.rows
        log = self._logs[dataset.name]
        dataset.accepts_next = False
        generation = dataset.next_generation()
        took_s = self._clock.seconds() - reading.began_at
        how = _how(result)
        snapshot = Snapshot(
            generation,
            rows,
            reading.as_of,
            reading.read_at,
            reading.database_snapshot,
            reading.columns,
            change=change,
            watch_state=reading.watch_state,
            probe=reading.probe,
            server=reading.server,
            lag=reading.lag,
            content_since=like.modified_as_of if like is not None else None,
            dependencies=reading.dependencies,
        )
        if reading.kind == "all":
            dataset.checked_at = self._clock.seconds()
        if dataset.pinned:
            dataset.keep(snapshot)
            kept = f"waits as a candidate, because {dataset.name} is pinned"
            advice = f"say 'unpin {dataset.name}' on the admin socket to serve it"
            dataset.attempted(this.ended("held", took_s, rows.count, kept, advice=advice, how=how))
            log.info(
                "refresh_held", **this.fields(), error=f"the result {kept}", rows=rows.count, took_s=seconds(took_s)
            )
            return
        fields = {"rows": rows.count, "read": how, "took_s": seconds(took_s), "queued_s": seconds(queued_s)}
        served = dataset.snapshot
        if served is not None and like is served:
            dataset.renew(replace(snapshot, generation=served.generation, change=served.change))
            dataset.attempted(this.ended("unchanged", took_s, rows.count, how=how))
            log.info("refresh_unchanged", **this.fields(), generation=served.generation, **fields)
            return
        dataset.publish(snapshot)
        dataset.attempted(this.ended("published", took_s, rows.count, how=how))
        log.info(
            "refresh_published",
            **this.fields(),
            generation=generation,
            bytes=rows.size_bytes,
            **change._asdict(),
            accepted=result.refused,
            **fields,
        )

    async def _comparisons(self, results: Sequence[_Result]) -> list[_Comparison]:
        """What publishing would change, counted without holding the reactor."""
        while True:
            served = [result.dataset.snapshot for result in results]
            found = [await self._compared(*each) for each in zip(results, served, strict=True)]
            if all(result.dataset.snapshot is before for result, before in zip(results, served, strict=True)):
                return found

    async def _compared(self, result: _Result, served: Snapshot | None) -> _Comparison:
        if served is None:
            return _Comparison(Change(result.rows.count, 0, 0), None)
        change = await self._change(result, served)
        candidate = result.dataset.candidate
        # Nothing was asked of the columns if nothing has changed.
        columns = served.columns if result.reading.kind == "unchanged" else result.reading.columns
        if not any(change) and served.columns == columns:
            result.rows.note_digest(served.rows.digest)
            return _Comparison(change, served)
        # Or else unpin would publish, and save, once more what a rollback went back from.
        if candidate is not None and candidate.columns == columns and await self._is_equal(candidate.rows, result.rows):
            return _Comparison(change, candidate)
        return _Comparison(change, None)

    async def _is_equal(self, old: Rows, new: Rows) -> bool:
        if old is new or old.count != new.count:
            return old is new
        count = ChangeCount(old, new)
        for _ in count:
            await deferLater(self._clock, 0)
        return not any(count.change)

    async def _change(self, result: _Result, served: Snapshot) -> Change:
        if result.change is not None and result.base is served:
            return result.change
        expected = result.reading.may_differ if result.change is None and result.base is served else None
        count = ChangeCount(served.rows, result.rows, expected)
        for _ in count:
            await deferLater(self._clock, 0)
        result.rows.note_digest(count.digest)
        if count.unexpected_count:
            # Deltas have missed something: what is published now is right again, and somebody has to know.
            result.dataset.counts.differences += count.unexpected_count
            self._logs[result.dataset.name].error(
                "delta_differences",
                count=count.unexpected_count,
                keys=[key.decode() for key in count.unexpected],
                error="rows changed of which no trigger told; does the query depend on a table that is not watched, "
                "or a row of it on other rows?"
                if result.dataset.settings.watch
                else "rows changed although the probe's value did not; a probe must see deletes, and changes that are "
                "committed later than others which began after them",
            )
        return count.change

    def _fail(self, error: RefreshFailed, this: _Try, took_s: float) -> None:
        # The keys that were told are as lost as the attempt that took them: the next one reads all.
        self._told = dict.fromkeys((dataset.name for dataset in self.datasets if dataset.settings.notify), None)
        self._withdraw_what_is_elsewhere()
        retry_in_s = self._plan_retry()
        blockers = error.blockers if isinstance(error, LockTimeout) else ()
        if isinstance(error, DatabaseUnavailable):
            self._status.failed(str(error), login_refused=isinstance(error, LoginRefused))
        else:
            self._status.answered()
        for dataset in self.datasets:
            dataset.attempted(this.ended("failed", took_s, None, str(error), advice=error.advice, blockers=blockers))
            self._logs[dataset.name].warning(
                "refresh_failed",
                **this.fields(),
                error=str(error),
                blocked_by=[describe_blocker(blocker) for blocker in blockers] or None,
                took_s=seconds(took_s),
                retry_in_s=seconds(retry_in_s),
                consecutive_failures=dataset.consecutive_failures,
            )

    def _withdraw_what_is_elsewhere(self) -> None:
        """What was saved from another database is served only until that one is reached; nothing replaces it here."""
        for dataset in self.datasets:
            served = dataset.snapshot
            if served is None or served.source == "postgres":
                continue
            reason = why_elsewhere(served.server, self._status.server)
            if reason is not None:
                dataset.withdraw()
                self._logs[dataset.name].error(
                    "snapshot_withdrawn", error=f"the saved snapshot is not served any more: {reason}"
                )

    def _plan_retry(self) -> float:
        """Try again after a wait, or at the next start if that comes first; gives the seconds until then."""
        now: float = self._clock.seconds()
        next_tick_at = self._next_tick_at()
        retry_at = now + self._retry_wait_s(self.datasets[0].consecutive_failures)
        if retry_at < next_tick_at:
            self._retry = self._clock.callLater(retry_at - now, self._begin, "retry")
        next_at: float = min(retry_at, next_tick_at)
        self._plan(next_at)
        return next_at - now

    def _next_tick_at(self) -> float:
        passed: int = math.floor((self._clock.seconds() - self._phase_at) / self._interval_s)
        return self._phase_at + max(0, passed + 1) * self._interval_s

    def _wanted(self, dataset: Dataset, base: Snapshot | None, this: _Try, whole: bool) -> Wanted:
        settings = dataset.settings
        dataset.expected_rows = base.rows.count if base else None
        last = base.rows if base else None
        told = self._told.pop(dataset.name, set())
        was_told = told is None or bool(told)

        def build() -> RowsBuilder:
            dataset.loading = builder = rows_builder(settings, self._release)
            if base is not None:
                builder.expect(base.rows.count)
            return builder

        def expect(rows: int) -> None:
            dataset.expected_rows = rows

        async def told_by_now() -> frozenset[str] | None:
            # The transaction sees what was sent before it began, and perhaps not what is heard meanwhile. So these keys
            # stay for the attempt that follows, and for this one if it has to begin again in another session.
            if told is None or self._heard_all is None or not await self._heard_all():
                return None
            more = self._told.get(dataset.name, set())
            return None if more is None else frozenset(told | more)

        if (whole and not settings.watch) or (settings.watch and was_told):
            # An operator wants it read (with watch that is a check as well), or it was notified of what no trigger saw.
            return Wanted(settings, build, last=last, attempt=this.id)
        return Wanted(
            settings,
            build,
            # The planner's estimate is asked for only where there is no better one.
            expect if base is None else None,
            last,
            base if settings.watch or settings.probe or settings.notify else None,
            check=bool(settings.watch or settings.probe) and (whole or self._check_is_due(dataset, this.trigger)),
            most_keys=int(max(_LEAST_DELTA_KEYS, settings.max_delta * base.rows.count)) if base else 0,
            told=told_by_now if settings.notify and this.trigger == "notify" else None,
            # Whoever notifies knows better.
            trust_probe=not was_told,
            attempt=this.id,
        )

    def _check_is_due(self, dataset: Dataset, trigger: Trigger) -> bool:
        # Not when somebody waits for a change: a check takes as long as reading all.
        if trigger not in ("interval", "retry") or dataset.checked_at is None:
            return False
        due: bool = self._clock.seconds() - dataset.checked_at >= dataset.settings.full_interval_s
        return due

    async def _result(self, dataset: Dataset, reading: Reading, base: Snapshot | None) -> _Result:
        if dataset.settings.watch and dataset.whole_because != reading.no_delta:
            dataset.note_deltas(reading.no_delta)
        if reading.kind == "all":
            assert reading.rows is not None, "a full read has rows"
            rows = reading.rows.finish()
            dataset.counts.rows_read += rows.count
            return _Result(dataset, reading, rows, _refusal(dataset, rows, reading), base)
        assert base is not None, "a delta follows something"
        settings = dataset.settings
        dataset.counts.rows_read += len(reading.changed)
        patch = RowsPatch(base.rows, max_rows=settings.max_rows, max_bytes=settings.max_bytes)
        for number, (key, document) in enumerate(reading.changed.items(), 1):
            if document is None:
                patch.remove(key)
            else:
                patch.put(key, document)
            if number % _PATCHED_A_TURN == 0:
                await deferLater(self._clock, 0)
        change = Change(patch.added, patch.changed, patch.removed)
        rows = patch.finish() if any(change) else base.rows
        return _Result(dataset, reading, rows, _refusal(dataset, rows, reading), base, change)


def _is_active(timer: Any) -> bool:
    return timer is not None and timer.active()


def _refusal(dataset: Dataset, rows: Rows, reading: Reading) -> str | None:
    served = dataset.snapshot
    elsewhere = served is not None and served.source != "postgres" and why_elsewhere(served.server, reading.server)
    comparable = None if dataset.redefined or elsewhere else served
    return refusal(comparable, rows.count, reading.columns, dataset.settings)


def _how(result: _Result) -> str:
    """What was read, in words."""
    reading = result.reading
    if reading.kind == "all":
        return f"all rows, because {reading.because}" if reading.because else "all rows"
    if reading.kind == "unchanged":
        return "nothing, because nothing has changed"
    return f"a delta of {len(reading.changed):,} key{'s' if len(reading.changed) != 1 else ''}"
