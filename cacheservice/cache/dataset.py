"""One dataset: its snapshot, its attempts and its state, as readers and operators see them."""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from cacheservice.base.errors import Blocker
from cacheservice.cache.changes import Change
from cacheservice.cache.counts import Counts
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.events import AttemptEnded, Ended, Event, Events, Observer, Published, Renewed
from cacheservice.cache.history import LastHour, Outcome
from cacheservice.cache.identity import ServerIdentity, is_visible, why_another
from cacheservice.cache.lag import NO_LAG, Lag
from cacheservice.cache.rows import Groups, Rows, RowsBuilder
from cacheservice.config import DatasetSettings

Trigger = Literal["interval", "notify", "retry", "manual", "start"]

KEPT_ATTEMPTS = 10


class State(enum.StrEnum):
    """The age of the served snapshot compared with its limits, in the words of docs/status-port.md."""

    NEVER_LOADED = "never_loaded"
    FRESH = "fresh"
    STALE = "stale"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One complete, immutable result of a dataset's query.

    :param as_of: the database clock at the start of the transaction that read it, minus `lag`.
    :param read_at: this machine's monotonic clock in seconds just before that transaction began, minus `lag`.
    :param database_snapshot: the result of `pg_current_snapshot()` in that transaction.
    :param columns: the names of the query's columns.
    :param change: what its publish changed; None if it was not read from the database.
    :param rolled_back_to: the saved generation that a rollback published again as this one.
    :param watch_state: the state of the watched tables by `cacheservice.changes`; empty if deltas cannot start here.
    :param probe: the value of the probe; None without a probe.
    :param server: the server that it was read from.
    :param lag: how far that server was behind its primary.
    :param content_since: `as_of` of the first read with the same content; None if this read was the first.
    :param dependencies: what the form of its documents depends on; None if that is not known.
    :param age_uncertain: why `read_at` is uncertain, which is possible only for saved rows; None if it is certain.
    """

    generation: int
    rows: Rows
    as_of: datetime
    read_at: float
    database_snapshot: str
    columns: tuple[str, ...] = ()
    source: Literal["postgres", "disk", "valkey"] = "postgres"
    change: Change | None = None
    rolled_back_to: int | None = None
    watch_state: str = ""
    probe: str | None = None
    server: ServerIdentity | None = None
    lag: Lag = NO_LAG
    content_since: datetime | None = None
    dependencies: Dependencies | None = None
    age_uncertain: str | None = None

    @property
    def began_at(self) -> float:
        """The monotonic clock in seconds just before its transaction began."""
        return self.read_at + self.lag.seconds

    @property
    def modified_as_of(self) -> datetime:
        """The database clock at the first read that returned this content."""
        return self.content_since or self.as_of

    def includes(self, transaction_id: int, present: ServerIdentity | None) -> bool:
        """Return whether it includes a committed transaction of the server `present`."""
        if self.server is None or why_another(self.server, present) is not None:
            return False
        return is_visible(transaction_id, self.database_snapshot, in_recovery=self.server.in_recovery)


@dataclass(frozen=True, slots=True)
class Held:
    """A result that a gate refused: the reason, the time of the first refusal by the wall clock, and its rows."""

    reason: str
    since: datetime
    rows: int


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


class Dataset:
    """The state of one dataset. `refresh` writes it and the ports read it, all in the reactor's thread.

    :param now: the monotonic clock, in seconds.
    :param generation_before: the last generation of a removed dataset with this name.
    :param counts: the counts of a removed dataset with this name, which continue.
    :param events: notifies observers of the dataset's events.
    """

    def __init__(
        self,
        settings: DatasetSettings,
        now: Callable[[], float],
        generation_before: int = 0,
        counts: Counts | None = None,
        events: Events | None = None,
    ) -> None:
        self.settings = settings
        self.snapshot: Snapshot | None = None
        self.held: Held | None = None
        self.accepts_next = False
        self.pinned = False
        self.candidate: Snapshot | None = None
        self.save_problem: str | None = None
        self.told_expired = False
        self.due_at: float | None = None
        self.put_off = False
        self.last_put_off_s = 0.0
        self.removed = False
        self.refreshing = False
        self.loading: RowsBuilder | None = None
        self.expected_rows: int | None = None
        self.attempts: deque[Attempt] = deque(maxlen=KEPT_ATTEMPTS)
        self.counts = counts or Counts()
        self.last_hour = LastHour()
        self.last_ended_at: float | None = None
        self.consecutive_failures = 0
        self.next_refresh_at: float | None = None
        self.checked_at: float | None = None
        self.whole_since: float | None = None
        self.whole_because: str | None = None
        self._served_definition = settings.definition
        self._generation_before = generation_before
        self._greatest_age_s: float | None = None
        self._now = now
        self._events = Events() if events is None else events

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def outcomes(self) -> Counter[str]:
        """The number of attempts by outcome; see `Counts`."""
        return self.counts.outcomes

    @property
    def missed_ticks(self) -> int:
        return self.counts.missed_ticks

    @property
    def differences(self) -> int:
        return self.counts.differences

    def publish(self, snapshot: Snapshot) -> None:
        """Serve `snapshot` from now on. One assignment, so that no reader sees half of it."""
        previous = self.last_generation
        assert snapshot.generation > previous, "a generation never goes down"
        self._note_age()
        self.snapshot = snapshot
        self.held = None
        self._served_definition = self.settings.definition
        if (change := snapshot.change) is not None:
            self.counts.added += change.added
            self.counts.changed += change.changed
            self.counts.removed += change.removed
        self._events.notify(Published(self.name, snapshot.generation, previous))

    @property
    def last_generation(self) -> int:
        return self.snapshot.generation if self.snapshot else self._generation_before

    @property
    def was_tried(self) -> bool:
        """Whether an attempt has ended, or a saved snapshot is served."""
        return self.snapshot is not None or self.last_ended_at is not None

    @property
    def redefined(self) -> bool:
        """Whether the served snapshot is the result of another query or key than the dataset has now."""
        return self.snapshot is not None and self._served_definition != self.settings.definition

    def change(self, settings: DatasetSettings) -> None:
        """Apply changed settings. The served snapshot stays until the next publish, whatever has changed."""
        if settings.definition != self.settings.definition:
            # The candidate, the held result and the failures belong to the old definition.
            self.candidate = self.held = None
            self.consecutive_failures = 0
        if settings.reading != self.settings.reading:
            self._start_from_nothing()
        self.settings = settings

    def forget_transactions(self) -> None:
        """Note that the database is another one now, and that the snapshots include none of its transactions."""
        self._start_from_nothing()
        if self.snapshot is not None:
            self.snapshot = replace(self.snapshot, server=None)
        if self.candidate is not None:
            self.candidate = replace(self.candidate, server=None)

    def _start_from_nothing(self) -> None:
        """Make the next read a full one, because states of before and after cannot be compared."""
        if self.snapshot is not None:
            self.snapshot = replace(self.snapshot, watch_state="", probe=None, dependencies=None)
        if self.candidate is not None:
            self.candidate = replace(self.candidate, watch_state="", probe=None, dependencies=None)

    def end(self) -> None:
        """Serve nothing any more, because the dataset is not declared; observers stop waiting for a publish."""
        self._generation_before = self.last_generation
        self.removed = True
        self.snapshot = self.candidate = self.held = None
        self._events.notify(Ended(self.name, self.last_generation))

    def withdraw(self) -> None:
        """Serve nothing until the next publish, because the served snapshot is of another database."""
        self._generation_before = self.last_generation
        self.snapshot = self.candidate = None

    def restore(self, saved: Snapshot) -> None:
        """Serve `saved` under its own generation, or under the next one if its own has been used since."""
        self.publish(replace(saved, generation=max(saved.generation, self.next_generation())))

    def renew(self, snapshot: Snapshot) -> None:
        """Serve the same content and generation as of a later moment, because nothing has changed.

        The rows may be another object with the same content.
        """
        assert self.snapshot is not None, "there is nothing to renew"
        assert snapshot.rows.count == self.snapshot.rows.count, "the rows stay"
        assert snapshot.generation == self.snapshot.generation, "and so does the generation"
        self._note_age()
        self.snapshot = snapshot
        self.held = None
        self._served_definition = self.settings.definition
        self._events.notify(Renewed(self.name))

    def note_deltas(self, problem: str | None) -> None:
        """Note why the last read could not be a delta, and since when; None if it could."""
        self.whole_because = problem
        if problem is None:
            self.whole_since = None
        elif self.whole_since is None:
            self.whole_since = self._now()

    def note_save(self, problem: str | None, *, tried: bool = True) -> None:
        """Note the problem of saving a snapshot; None once it is saved.

        :param tried: whether a save has failed, which is counted; otherwise the problem was found before a save.
        """
        self.save_problem = problem
        if problem is not None and tried:
            self.counts.save_failures += 1

    def whole_for_s(self) -> float | None:
        """Return for how many seconds deltas have not worked; None if the dataset has no `watch`."""
        if not self.settings.watch:
            return None
        return 0.0 if self.whole_since is None else self._now() - self.whole_since

    def newest(self) -> Snapshot | None:
        """Return the snapshot that the next result follows: the served one, or the candidate of a pinned dataset.

        None if it is of another definition.
        """
        if self.redefined:
            return None
        return self.candidate if self.pinned and self.candidate is not None else self.snapshot

    def keep(self, candidate: Snapshot) -> None:
        """Keep the newest result of a pinned dataset until `unpin`."""
        assert self.pinned, "only a pinned dataset keeps a candidate"
        self.candidate = candidate
        self.held = None

    def roll_back(self, saved: Snapshot) -> None:
        """Serve `saved` under the next generation and pin it.

        The snapshot that was served becomes the candidate if there is none.
        """
        newest = self.candidate or (None if self.redefined else self.snapshot)
        self.publish(replace(saved, generation=self.next_generation(), change=None, rolled_back_to=saved.generation))
        self.pinned = True
        self.candidate = None if newest is None else replace(newest, change=None)

    def unpin(self) -> None:
        """Serve the newest result again, and each result that follows it."""
        self.pinned = False
        candidate, self.candidate = self.candidate, None
        if candidate is None:
            return
        if self.snapshot is not None and candidate.rows is self.snapshot.rows and not self.snapshot.rolled_back_to:
            self.renew(replace(candidate, generation=self.snapshot.generation, change=self.snapshot.change))
        else:
            self.publish(replace(candidate, generation=self.next_generation()))

    def next_generation(self) -> int:
        return self.last_generation + 1

    def hold(self, reason: str, rows: int, on: datetime) -> None:
        """Keep serving the same snapshot, because a gate refused the newest result."""
        self.held = Held(reason, self.held.since if self.held else on, rows)

    def subscribe(self, observer: Observer, *kinds: type[Event]) -> Callable[[], None]:
        """Call `observer` for its events of these kinds; return a function that ends the subscription."""
        return self._events.subscribe(observer, *kinds, of=self.name)

    def attempted(self, attempt: Attempt) -> None:
        """Record an attempt that has ended."""
        self.attempts.append(attempt)
        self.counts.outcomes[attempt.outcome] += 1
        self.counts.durations.observe(attempt.took_s)
        self.consecutive_failures = self.consecutive_failures + 1 if attempt.outcome == "failed" else 0
        self.last_ended_at = self._now()
        self._note_age()
        self.last_hour.add(self.last_ended_at, attempt.took_s, self._greatest_age_s, attempt.outcome)
        self._greatest_age_s = None
        self._events.notify(AttemptEnded(self.name))

    def _note_age(self) -> None:
        """Record the age, which is greatest just before a younger snapshot replaces the served one."""
        age_s = self.age_s()
        if age_s is not None:
            self._greatest_age_s = max(age_s, self._greatest_age_s or 0.0)

    def age_s(self) -> float | None:
        """Return the age of the served snapshot in seconds; None if the dataset was never loaded."""
        return None if self.snapshot is None else max(0.0, self._now() - self.snapshot.read_at)

    def state(self) -> State:
        """Return the state by the limits; the worse one if the limits cross."""
        age_s = self.age_s()
        if age_s is None:
            return State.NEVER_LOADED
        if age_s > self.settings.max_age_s:
            return State.EXPIRED
        if age_s > self.settings.interval_s + self.settings.timeout_s:
            return State.STALE
        return State.FRESH

    def next_refresh_in_s(self) -> float | None:
        """Return the seconds until the next planned attempt, at least 0; None if none is planned."""
        return None if self.next_refresh_at is None else max(0.0, self.next_refresh_at - self._now())

    def behind_s(self) -> float | None:
        """Return for how many seconds postgres.max_load has delayed a refresh; None if it delays none."""
        return self._now() - self.due_at if self.put_off and self.due_at is not None else None

    def need(self) -> float:
        """Return how urgently it needs a refresh: its age divided by max_age_s, infinite if never loaded."""
        age_s = self.age_s()
        return float("inf") if age_s is None else age_s / self.settings.max_age_s


def rows_builder(settings: DatasetSettings, release: Callable[[Groups], None]) -> RowsBuilder:
    """Return a builder for the rows of a dataset; `release` takes over their groups in the end."""
    patched = bool(settings.watch or settings.notify)
    return RowsBuilder(release, max_rows=settings.max_rows, max_bytes=settings.max_bytes, patched=patched)
