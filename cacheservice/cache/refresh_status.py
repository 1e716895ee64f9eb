"""The current work and plans of a dataset's refreshes."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from cacheservice.cache.rows import RowsBuilder


class Phase(enum.Enum):
    """The attempt that is under way.

    - IDLE: none is.
    - WAITING: it waits for a connection.
    - PUT_OFF: it could begin, but postgres.max_load holds it back.
    - READING: it has a connection, or opens one.
    """

    IDLE = enum.auto()
    WAITING = enum.auto()
    PUT_OFF = enum.auto()
    READING = enum.auto()


class Progress(NamedTuple):
    """The rows that an attempt has read so far, and how many are expected; None if that is not known."""

    rows: RowsBuilder
    expected: int | None


class WithoutDeltas(NamedTuple):
    """Deltas have not worked since a moment on the monotonic clock, and why."""

    since: float
    because: str


@dataclass(frozen=True, slots=True)
class RefreshStatus:
    """The current work and plans of a dataset's refreshes. Its owner, the refresher, replaces it.

    Times are on the monotonic clock, in seconds.

    :param due_at: when the attempt that is under way was due, or the last one.
    :param next_at: when the next attempt is planned; None if none is.
    :param put_off_s: by how much postgres.max_load delayed the last attempt.
    :param checked_at: the last full read; None before the first.
    :param without_deltas: None while deltas work, or are not wanted.
    :param logged_expired: whether the log has the dataset as expired.
    """

    phase: Phase = Phase.IDLE
    due_at: float | None = None
    next_at: float | None = None
    put_off_s: float = 0.0
    progress: Progress | None = None
    checked_at: float | None = None
    without_deltas: WithoutDeltas | None = None
    logged_expired: bool = False

    @property
    def is_running(self) -> bool:
        """Whether an attempt is under way."""
        return self.phase is not Phase.IDLE

    def next_in_s(self, now: float) -> float | None:
        """Return the seconds until the next planned attempt, at least 0; None if none is planned."""
        return None if self.next_at is None else max(0.0, self.next_at - now)

    def behind_s(self, now: float) -> float | None:
        """Return for how many seconds postgres.max_load has delayed an attempt; None if it delays none."""
        return now - self.due_at if self.phase is Phase.PUT_OFF and self.due_at is not None else None

    def without_deltas_s(self, now: float) -> float:
        """Return for how many seconds deltas have not worked; 0 if they do."""
        return 0.0 if self.without_deltas is None else now - self.without_deltas.since
