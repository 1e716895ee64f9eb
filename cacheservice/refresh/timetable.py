"""Decides when the attempts of a dataset, or of a group of datasets, begin.

Pure: each method gets the time and the facts it needs, and returns what to do. `Refresher` owns the timers and runs
the attempts. All times are seconds of one monotonic clock.

A timetable is in one of these states:

- NEW: nothing was started. Everything that is asked for happens with the start.
- IDLE: no attempt is under way. The next start of an interval, a retry and the end of a burst of notifications are
  planned, each at most once.
- RUNNING: an attempt waits for its slot or reads. What arrives now is remembered as one attempt that follows.

An attempt never overlaps another one, because only IDLE leads to RUNNING.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

from cacheservice.base.backoff import full_jitter
from cacheservice.cache.history import Trigger
from cacheservice.config import DatasetSettings, timing

CALM_S = 0.02
"""A notification within this time after another one, or after an attempt, belongs to a burst."""
LONGEST_BURST_S = 2.0
"""An attempt begins after this time, however long the burst lasts."""
FULL_READ_PAUSE_S = 1.0
FULL_READ_PAUSE_TIMES = 4.0
"""While deltas are off, notifications start a full read only after a pause of so many times the last one's duration."""


class Due(NamedTuple):
    """An attempt that is to begin now.

    :param whole: an operator asked for it, and nothing but a full read satisfies the request.
    """

    trigger: Trigger
    whole: bool = False


class Notifiable(NamedTuple):
    """What decides how soon a notification starts an attempt.

    :param may_burst: an application notifies, so that one change may cause many notifications. What triggers record
        costs little to read, and is read at once.
    :param full_since: when deltas stopped working, so that each attempt reads all rows; None if they work.
    """

    may_burst: bool
    full_since: float | None = None


class State(enum.Enum):
    """See the module."""

    NEW = enum.auto()
    IDLE = enum.auto()
    RUNNING = enum.auto()


class Timetable:
    """Decides when attempts begin.

    :param settings: of any dataset of the group; a group has in common what decides when.
    :param random: returns a number from 0 to 1. The phase is drawn from it once, each retry again.
    """

    def __init__(self, settings: DatasetSettings, random: Callable[[], float]) -> None:
        self._random = random
        self._share = random()
        self._state = State.NEW
        self._take(settings)
        self._phase_at = 0.0
        self._last_start_at = 0.0
        self._retry_at = math.inf
        self._calm_at = math.inf
        self._burst_began_at = 0.0
        self._notified_at = -math.inf
        self._began_at = 0.0
        self._ended_at = -math.inf
        self._took_s = 0.0
        self._next: Due | None = None

    def _take(self, settings: DatasetSettings) -> None:
        self._timing = timing(settings)
        self.interval_s = settings.interval_s
        self._earlier_s = settings.interval_s * settings.jitter * self._share
        self._retry_wait_s = full_jitter(settings.retry_initial_s, settings.retry_max_s, self._random)

    @property
    def is_new(self) -> bool:
        return self._state is State.NEW

    @property
    def is_running(self) -> bool:
        return self._state is State.RUNNING

    @property
    def began_at(self) -> float:
        """When the running attempt, or the last one, got its slot; infinite while it waits for one."""
        return self._began_at

    @property
    def took_s(self) -> float:
        """How long the last attempt read."""
        return self._took_s

    # Plans

    def next_start_at(self, now: float) -> float:
        """Return the next start of an interval after `now`."""
        passed = math.floor((now - self._phase_at) / self.interval_s)
        return self._phase_at + max(0, passed + 1) * self.interval_s

    def wake_at(self) -> float | None:
        """Return when `wake` is to be called; None if nothing but the interval is planned."""
        at = min(self._retry_at, self._calm_at)
        return None if at == math.inf else at

    def planned_at(self, now: float) -> float:
        """Return when the next attempt is planned, as far as that is known."""
        return min(self._retry_at, self.next_start_at(now))

    # What happens

    def start(self, now: float) -> Due:
        """Load now, and from then on at every start of an interval.

        The first of these comes earlier than an interval from now, not later, so that the first snapshot is not stale
        before the second arrives.
        """
        self._state = State.IDLE
        self._last_start_at = now
        self._phase_at = now + self.interval_s - self._earlier_s
        return Due("start")

    def loop_started(self, now: float) -> None:
        """Take the phase of the loop, which starts later than planned if the reactor was held."""
        self._phase_at = now

    def settings_changed(self, settings: DatasetSettings, now: float) -> float | None:
        """Apply changed settings; return when the next attempt is planned if that has moved, else None.

        The new interval counts from the last start. A retry that would come after the next start is dropped.
        """
        if self.is_new:
            self._take(settings)
            return None
        if timing(settings) == self._timing:
            return None
        self._take(settings)
        passed_s = now - self._last_start_at
        self._phase_at = now + max(0.0, self.interval_s - self._earlier_s - passed_s)
        if self._retry_at >= self._phase_at:
            self._retry_at = math.inf
        return min(self._retry_at, self._phase_at)

    def first_start_in_s(self, now: float) -> float:
        """Return the seconds until the loop is to start."""
        return max(0.0, self._phase_at - now)

    def interval_began(self) -> Due | None:
        """Return the attempt of an interval; None, because one is running and this start is skipped."""
        return None if self.is_running else Due("interval")

    def refresh_now(self) -> Due | None:
        """Return the attempt that an operator asks for; None if it follows the running one, or comes with the start."""
        if self.is_new:
            return None
        if self.is_running:
            self._next = Due("manual", whole=True)
            return None
        return Due("manual", whole=True)

    def refresh_since(self, moment: float) -> Due | None:
        """Return the attempt that has to begin at or after `moment`; None if a running or planned one does."""
        if self.is_new:
            return None
        if self.is_running:
            if self._began_at < moment and not (self._next and self._next.whole):
                self._next = Due("manual")
            return None
        return Due("manual")

    def heard(self, now: float) -> None:
        """Note that a notification arrived; `notified` follows once its burst has been heard."""
        self._notified_at = now

    def notified(self, now: float, what: Notifiable, *, at_once: bool = False) -> Due | None:
        """Return the attempt that notifications start now, if any; else it is planned.

        :param at_once: do not wait for a retry, because the database has just been proven to be there.
        """
        if self.is_new:
            return None
        if self.is_running:
            if self._began_at < now:
                self._next = self._next or Due("notify")
            return None
        if at_once:
            return Due("notify")
        # Writers must not drive a retry past its backoff: it reads what they changed.
        if self._retry_at < math.inf or self._calm_at < math.inf:
            return None
        return self._when_calm(now, what)

    def wake(self, now: float, what: Notifiable) -> Due | None:
        """Return the attempt that was planned for this moment."""
        if self._retry_at <= now:
            self._retry_at = math.inf
            return Due("retry")
        if self._calm_at <= now:
            self._calm_at = math.inf
            return self._calm_or_later(now, what)
        return None

    def began(self, now: float) -> float:
        """Note that an attempt begins, and return when the one after it is planned."""
        assert not self.is_running, "an attempt never overlaps another one"
        self._state = State.RUNNING
        self._retry_at = self._calm_at = math.inf
        self._next = None
        # It waits for a slot, and so it begins after whatever moment is asked for now.
        self._began_at = math.inf
        return self.next_start_at(now)

    def got_slot(self, now: float) -> None:
        """Note that the running attempt reads from now on."""
        self._began_at = self._last_start_at = now

    def read(self, now: float) -> None:
        """Note that the running attempt has read, or failed to."""
        self._took_s = now - self._began_at

    def failed(self, now: float, failures_before: int) -> float:
        """Plan a retry, unless the next start comes first; return when the next attempt is planned."""
        retry_at = now + self._retry_wait_s(failures_before)
        if retry_at < self.next_start_at(now):
            self._retry_at = retry_at
        return self.planned_at(now)

    def ended(self, now: float, what: Notifiable) -> Due | None:
        """Note that no attempt runs any more, and return the one that follows at once."""
        self._state = State.IDLE
        self._ended_at = now
        due, self._next = self._next, None
        if due is None or due.trigger != "notify":
            return due
        return self._when_calm(now, what) if self._retry_at == math.inf else None

    # Bursts

    def _when_calm(self, now: float, what: Notifiable) -> Due | None:
        """Begin now, or at the end of a burst of notifications: an attempt within it would see only a part."""
        self._burst_began_at = now
        return self._calm_or_later(now, what)

    def _calm_or_later(self, now: float, what: Notifiable) -> Due | None:
        if what.full_since is not None and what.full_since < self._began_at:
            # Without a pause each change would be a read of everything, one after the other.
            rested_at = self._ended_at + max(FULL_READ_PAUSE_S, FULL_READ_PAUSE_TIMES * self._took_s)
            if now < rested_at:
                self._calm_at = rested_at
                return None
        calm_at = min(max(self._notified_at, self._ended_at) + CALM_S, self._burst_began_at + LONGEST_BURST_S)
        is_first = self._ended_at + CALM_S <= self._burst_began_at
        if is_first or now >= calm_at or not what.may_burst:
            return Due("notify")
        self._calm_at = calm_at
        return None
