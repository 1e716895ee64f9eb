"""The attempts to refresh a dataset: the last ones in detail, those of the last hour in bounded memory."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from cacheservice.base.errors import Blocker

Outcome = Literal["published", "unchanged", "held", "failed"]
Trigger = Literal["interval", "notify", "retry", "manual", "start"]

KEPT_ATTEMPTS = 10

SPAN_S = 3600.0
SLOT_S = 10.0
MOST_POINTS = int(SPAN_S / SLOT_S)

_BEST_FIRST: tuple[Outcome, ...] = ("unchanged", "published", "held", "failed")


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt to refresh that has ended. Times are in seconds.

    `started_at` is of this machine's wall clock, for display only. `id` is in the log, and at the server in the
    application_name of the session.
    """

    outcome: Outcome
    trigger: Trigger
    started_at: datetime
    took_s: float
    rows: int | None = None
    error: str | None = None
    advice: str | None = None
    blockers: tuple[Blocker, ...] = ()
    id: str = ""
    how: str = ""
    """How the rows were read, in words: "a delta of 12 keys", "all rows, because products was truncated"."""


class Point(NamedTuple):
    """The attempts that ended within one slot of 10 s, combined.

    `slot` is the number of the slot on the monotonic clock. `ended_at` is the time on that clock at which the last
    attempt ended, `took_s` the longest duration, and `outcome` the worst outcome. `age_s` is the greatest age that was
    served since the previous point; None while nothing was loaded.
    """

    slot: int
    ended_at: float
    took_s: float
    age_s: float | None
    outcome: Outcome


class LastHour:
    """At most 360 points of one dataset, for any interval; 360 points take 12 KiB.

    Columns of numbers, because 360 tuples of floats would take six times as much.
    """

    def __init__(self) -> None:
        self._slots = array("q")
        self._ended_at = array("d")
        self._took_s = array("d")
        self._age_s = array("d")  # NaN for None
        self._outcomes = array("b")

    def add(self, ended_at: float, took_s: float, age_s: float | None, outcome: Outcome) -> None:
        """Record an attempt, which must not have ended before the previous one; times in seconds."""
        slot, age, rank = (
            math.floor(ended_at / SLOT_S),
            math.nan if age_s is None else age_s,
            _BEST_FIRST.index(outcome),
        )
        if self._slots and self._slots[-1] == slot:
            self._ended_at[-1] = ended_at
            self._took_s[-1] = max(self._took_s[-1], took_s)
            self._age_s[-1] = age if math.isnan(self._age_s[-1]) else max(self._age_s[-1], age)  # NaN is never greater
            self._outcomes[-1] = max(self._outcomes[-1], rank)
            return
        gone = self._first_after(slot)
        for column in (self._slots, self._ended_at, self._took_s, self._age_s, self._outcomes):
            del column[:gone]
        self._slots.append(slot)
        self._ended_at.append(ended_at)
        self._took_s.append(took_s)
        self._age_s.append(age)
        self._outcomes.append(rank)

    def points(self, now: float) -> list[Point]:
        """Return the points of the hour before `now`, the oldest first."""
        first = self._first_after(math.floor(now / SLOT_S))
        return [self._point(index) for index in range(first, len(self._slots))]

    def newest(self) -> Point | None:
        """Return the last point, of any age; None before the first attempt has ended."""
        return self._point(len(self._slots) - 1) if self._slots else None

    def _first_after(self, slot: int) -> int:
        """Return the index of the first point within the hour before `slot`."""
        return next((i for i, each in enumerate(self._slots) if each > slot - MOST_POINTS), len(self._slots))

    def _point(self, index: int) -> Point:
        age_s = self._age_s[index]
        return Point(
            self._slots[index],
            self._ended_at[index],
            self._took_s[index],
            None if math.isnan(age_s) else age_s,
            _BEST_FIRST[self._outcomes[index]],
        )
