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

from cacheservice.cache.history import Trigger
from cacheservice.config import DatasetSettings, timing
from cacheservice.refresh.retries import Retries

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
    """The facts that decide how soon a notification starts an attempt.

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


class Grid:
    """The starts of the intervals: at a fixed phase, one interval apart.

    The first of them comes earlier than an interval from the start, not later, so that the first snapshot is not stale
    before the second arrives.

    :param share: from 0 to 1, of the jitter by which it comes earlier.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._stretch = 1.0
        self.interval_s = 0.0
        self._earlier_s = 0.0
        self._phase_at = 0.0

    def stretch(self, times: float) -> None:
        """Multiply the intervals of the settings that are taken from now on."""
        self._stretch = times

    def take(self, settings: DatasetSettings) -> None:
        """Use the interval of these settings from the next `begin` on."""
        self.interval_s = settings.interval_s * self._stretch
        self._earlier_s = self.interval_s * settings.jitter * self._share

    def begin(self, now: float, since: float) -> None:
        """Count the interval from an earlier moment; the next start is not before `now`."""
        self._phase_at = now + max(0.0, self.interval_s - self._earlier_s - (now - since))

    def loop_started(self, now: float) -> None:
        """Take the phase of the loop, which starts later than planned if the reactor was held."""
        self._phase_at = now

    def starts_in_s(self, now: float) -> float:
        """Return the seconds until the loop is to start."""
        return max(0.0, self._phase_at - now)

    def next_start_at(self, now: float) -> float:
        """Return the next start of an interval after `now`."""
        passed = math.floor((now - self._phase_at) / self.interval_s)
        return self._phase_at + max(0, passed + 1) * self.interval_s

    @property
    def phase_at(self) -> float:
        """When the loop starts, or has started."""
        return self._phase_at


class _Bursts:
    """When a notification starts an attempt: at once, or at the end of its burst, which would see only a part."""

    def __init__(self) -> None:
        self.calm_at = math.inf
        self._began_at = 0.0
        self._heard_at = -math.inf

    def heard(self, now: float) -> None:
        """Note that a notification arrived."""
        self._heard_at = now

    def forget(self) -> None:
        """Plan nothing: an attempt begins, and reads what they are about."""
        self.calm_at = math.inf

    def begin(self, now: float, what: Notifiable, last: LastAttempt) -> bool:
        """Return whether an attempt begins now; otherwise it begins at `calm_at`."""
        self._began_at = now
        return self.is_over(now, what, last)

    def is_over(self, now: float, what: Notifiable, last: LastAttempt) -> bool:
        """Return whether the burst has ended; otherwise `calm_at` is when to ask again."""
        self.calm_at = math.inf
        if what.full_since is not None and what.full_since < last.began_at:
            # Without a pause each change would be a read of everything, one after the other.
            rested_at = last.ended_at + max(FULL_READ_PAUSE_S, FULL_READ_PAUSE_TIMES * last.took_s)
            if now < rested_at:
                self.calm_at = rested_at
                return False
        calm_at = min(max(self._heard_at, last.ended_at) + CALM_S, self._began_at + LONGEST_BURST_S)
        is_first = last.ended_at + CALM_S <= self._began_at
        if is_first or now >= calm_at or not what.may_burst:
            return True
        self.calm_at = calm_at
        return False


class LastAttempt(NamedTuple):
    """The last attempt: when it got its slot, when it ended, and how long it read."""

    began_at: float = 0.0
    ended_at: float = -math.inf
    took_s: float = 0.0


class Timetable:
    """Decides when attempts begin.

    `grid` has the starts of the intervals, `last` the last attempt.

    :param settings: of any dataset of the group; a group has in common what decides when.
    :param random: returns a number from 0 to 1. The phase is drawn from it once, each retry again.
    """

    def __init__(self, settings: DatasetSettings, random: Callable[[], float]) -> None:
        self.grid = Grid(random())
        self._retries = Retries(random)
        self._state = State.NEW
        self._take(settings)
        self._last_start_at = 0.0
        self._bursts = _Bursts()
        self.last = LastAttempt()
        self._next: Due | None = None

    def _take(self, settings: DatasetSettings) -> None:
        self._timing = timing(settings)
        self.grid.take(settings)
        self._retries.take(settings)

    @property
    def is_new(self) -> bool:
        return self._state is State.NEW

    @property
    def is_running(self) -> bool:
        return self._state is State.RUNNING

    # Plans

    def wake_at(self) -> float | None:
        """Return when `wake` is to be called; None if nothing but the interval is planned."""
        at = min(self._retries.at, self._bursts.calm_at)
        return None if at == math.inf else at

    def planned_at(self, now: float) -> float:
        """Return when the next attempt is planned, as far as that is known."""
        return min(self._retries.at, self.grid.next_start_at(now))

    # What happens

    def stretch(self, times: float, settings: DatasetSettings) -> None:
        """Multiply the interval, before the start."""
        assert self.is_new, "the grid has no phase yet"
        self.grid.stretch(times)
        self._take(settings)

    def start(self, now: float) -> Due:
        """Load now, and from then on at every start of an interval."""
        self._state = State.IDLE
        self._last_start_at = now
        self.grid.begin(now, now)
        return Due("start")

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
        self.grid.begin(now, self._last_start_at)
        self._retries.start_moved(self.grid.phase_at)
        return min(self._retries.at, self.grid.phase_at)

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
            if self.last.began_at < moment and not (self._next and self._next.whole):
                self._next = Due("manual")
            return None
        return Due("manual")

    def heard(self, now: float) -> None:
        """Note that a notification arrived; `notified` follows once its burst has been heard."""
        self._bursts.heard(now)

    def notified(self, now: float, what: Notifiable, *, at_once: bool = False) -> Due | None:
        """Return the attempt that notifications start now, if any; else it is planned.

        :param at_once: do not wait for a retry, because the database has just been proven to be there.
        """
        if self.is_new:
            return None
        if self.is_running:
            if self.last.began_at < now:
                self._next = self._next or Due("notify")
            return None
        if at_once:
            return Due("notify")
        # Writers must not drive a retry past its backoff: it reads what they changed.
        if self._retries.is_planned or self._bursts.calm_at < math.inf:
            return None
        return Due("notify") if self._bursts.begin(now, what, self.last) else None

    def wake(self, now: float, what: Notifiable) -> Due | None:
        """Return the attempt that was planned for this moment."""
        if self._retries.at <= now:
            self._retries.forget()
            return Due("retry")
        if self._bursts.calm_at <= now and self._bursts.is_over(now, what, self.last):
            return Due("notify")
        return None

    def began(self, now: float) -> float:
        """Note that an attempt begins, and return when the one after it is planned."""
        assert not self.is_running, "an attempt never overlaps another one"
        self._state = State.RUNNING
        self._retries.forget()
        self._bursts.forget()
        self._next = None
        # It waits for a slot, and so it begins after whatever moment is asked for now.
        self.last = self.last._replace(began_at=math.inf)
        return self.grid.next_start_at(now)

    def got_slot(self, now: float) -> None:
        """Note that the running attempt reads from now on."""
        self._last_start_at = now
        self.last = self.last._replace(began_at=now)

    def read(self, now: float) -> None:
        """Note that the running attempt has read, or failed to."""
        self.last = self.last._replace(took_s=now - self.last.began_at)

    def failed(self, now: float, failures_before: int) -> float:
        """Plan a retry, unless the next start comes first; return when the next attempt is planned."""
        self._retries.failed(now, failures_before, self.grid.next_start_at(now))
        return self.planned_at(now)

    def ended(self, now: float, what: Notifiable) -> Due | None:
        """Note that no attempt runs any more, and return the one that follows at once."""
        self._state = State.IDLE
        self.last = self.last._replace(ended_at=now)
        due, self._next = self._next, None
        if due is None or due.trigger != "notify":
            return due
        if not self._retries.is_planned and self._bursts.begin(now, what, self.last):
            return due
        return None
