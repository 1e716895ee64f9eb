"""Laws of the timetable, without a clock: whatever happens, and in whatever order."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cacheservice.cache.history import Trigger
from cacheservice.config import DatasetSettings
from cacheservice.refresh.timetable import (
    CALM_S,
    FULL_READ_PAUSE_S,
    FULL_READ_PAUSE_TIMES,
    LONGEST_BURST_S,
    Due,
    Notifiable,
    Timetable,
)

CALM = Notifiable(may_burst=False)
BURSTS = Notifiable(may_burst=True)
INTERVAL_S = 60.0


def declared(**keys: Any) -> DatasetSettings:
    return DatasetSettings(name="products", query="SELECT 1 AS id", key="id", **{"interval_s": INTERVAL_S, **keys})


class Actor:
    """Does what a Refresher does with a timetable: begins what is due, ends it, and wakes it in time."""

    def __init__(self, seed: int = 1, **keys: Any) -> None:
        self.now = 1000.0
        self.timetable = Timetable(declared(**keys), Random(seed).random)
        self.what = CALM
        self.failures = 0
        self.began: list[tuple[float, Trigger]] = []
        self.read_at: list[float] = []
        self.begin(self.timetable.start(self.now))

    def begin(self, due: Due | None) -> None:
        if due is not None:
            assert not self.timetable.is_running, "an attempt never overlaps another one"
            self.timetable.began(self.now)
            self.began.append((self.now, due.trigger))

    def got_slot(self) -> None:
        if self.timetable.is_running and self.timetable.last.began_at == math.inf:
            self.timetable.got_slot(self.now)
            self.read_at.append(self.now)

    def end(self, *, fails: bool = False) -> None:
        if not self.timetable.is_running:
            return
        self.got_slot()
        self.timetable.read(self.now)
        if fails:
            next_at = self.timetable.failed(self.now, self.failures)
            self.failures += 1
            assert self.now <= next_at <= self.timetable.grid.next_start_at(self.now), "never past the next start"
        else:
            self.failures = 0
        self.begin(self.timetable.ended(self.now, self.what))

    def notify(self, *, at_once: bool = False) -> None:
        self.timetable.heard(self.now)
        self.begin(self.timetable.notified(self.now, self.what, at_once=at_once))

    def pass_time(self, to: float) -> None:
        """Let the time pass, with all starts and wakes on the way in their order."""
        while True:
            wake_at = self.timetable.wake_at()
            start_at = self.timetable.grid.next_start_at(self.now)
            if start_at <= self.now:  # by a rounding
                start_at += self.timetable.grid.interval_s
            at = min(math.inf if wake_at is None else wake_at, start_at)
            if at > to:
                break
            self.now = max(self.now, at)
            if at == wake_at:
                self.begin(self.timetable.wake(self.now, self.what))
            else:
                self.begin(self.timetable.interval_began())
        self.now = to


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["notify", "at once", "now", "since", "slot", "end", "fail"]),
        st.floats(0, 90, allow_nan=False),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS, st.booleans(), st.integers(0, 10_000))
def test_an_attempt_never_overlaps_another(steps: list[tuple[str, float]], bursts: bool, seed: int) -> None:
    """Whatever is asked for, one attempt runs at most, and a retry is never past the next start."""
    actor = Actor(seed, notify="changed" if bursts else "")
    actor.what = BURSTS if bursts else CALM
    for step, pause_s in steps:
        actor.pass_time(actor.now + pause_s)
        match step:
            case "notify" | "at once":
                actor.notify(at_once=step == "at once")
            case "now":
                actor.begin(actor.timetable.refresh_now())
            case "since":
                actor.begin(actor.timetable.refresh_since(actor.now))
            case "slot":
                actor.got_slot()
            case "end" | "fail":
                actor.end(fails=step == "fail")
    for earlier, later in zip(actor.began, actor.began[1:], strict=False):
        assert earlier[0] <= later[0]


@settings(deadline=None)
@given(st.lists(st.floats(0, CALM_S * 0.9), min_size=1, max_size=100), st.booleans())
def test_notifications_cost_two_attempts_at_most(pauses: list[float], is_running: bool) -> None:
    """Of any number of notifications one begins an attempt, and one follows what runs or what came with the burst."""
    actor = Actor()
    actor.end()
    actor.what = BURSTS
    actor.pass_time(actor.now + 1)
    if is_running:
        actor.begin(actor.timetable.refresh_now())
        actor.got_slot()
        actor.pass_time(actor.now + 0.001)
    before = len(actor.began)
    for pause_s in pauses:
        actor.pass_time(min(actor.now + pause_s, 1002.0))
        actor.notify()
    last_notified_at = actor.now
    for _ in range(3):
        actor.end()
        actor.pass_time(actor.now + LONGEST_BURST_S)
    of_notifications = [at for at, trigger in actor.began[before:] if trigger == "notify"]
    assert 1 <= len(of_notifications) <= 2
    assert actor.read_at[-1] >= last_notified_at, "one reads after the last of them"


@settings(deadline=None)
@given(st.integers(1, 30), st.floats(0.1, 200), st.floats(1, 1000), st.integers(0, 1000))
def test_retries(count: int, initial_s: float, interval_s: float, seed: int) -> None:
    """Each failure is followed by a retry within its bound, or by the next start if that comes first."""
    actor = Actor(seed, interval_s=interval_s, retry_initial_s=initial_s, retry_max_s=2 * initial_s)
    for failures in range(count):
        bound_s = initial_s * min(2**failures, 2)
        ended_at, next_start_at = actor.now, actor.timetable.grid.next_start_at(actor.now)
        actor.end(fails=True)
        planned_at = actor.timetable.planned_at(actor.now)
        assert planned_at <= min(ended_at + bound_s, next_start_at) + 1e-6
        actor.pass_time(planned_at)
        assert actor.began[-1][0] == planned_at
        assert actor.began[-1][1] == ("interval" if planned_at == next_start_at else "retry")


def test_a_retry_is_not_driven_by_writers() -> None:
    """A notification waits for the retry, which reads its change; one that proves the database does not."""
    actor = Actor(retry_initial_s=50, retry_max_s=50)
    actor.end(fails=True)
    began = len(actor.began)
    actor.notify()
    assert len(actor.began) == began
    actor.notify(at_once=True)
    assert actor.began[-1][1] == "notify"


def test_a_pause_while_deltas_are_off() -> None:
    """While each change costs a full read, notifications wait for a multiple of the last one."""
    actor = Actor()
    actor.got_slot()
    actor.pass_time(actor.now + 3)
    actor.end()
    ended_at = actor.now
    actor.what = Notifiable(may_burst=False, full_since=0.0)
    actor.notify()
    assert actor.timetable.wake_at() == ended_at + max(FULL_READ_PAUSE_S, FULL_READ_PAUSE_TIMES * 3)


def test_a_changed_interval_counts_from_the_last_start() -> None:
    """A shorter one begins at once if it has passed, a longer one waits; the same one moves nothing."""
    for interval_s, expected_at in ((5.0, 1010.0), (30.0, 1030.0)):
        actor = Actor(jitter=0)
        actor.got_slot()
        actor.pass_time(1010.0)
        assert actor.timetable.settings_changed(declared(jitter=0), actor.now) is None
        assert actor.timetable.settings_changed(declared(jitter=0, interval_s=interval_s), actor.now) == expected_at
        assert actor.timetable.grid.starts_in_s(actor.now) == expected_at - 1010.0


def test_what_is_asked_for_before_the_start_comes_with_it() -> None:
    timetable = Timetable(declared(), lambda: 0.5)
    assert timetable.refresh_now() is None
    assert timetable.refresh_since(5.0) is None
    assert timetable.notified(5.0, CALM) is None
    assert timetable.wake_at() is None
