"""One dataset, as readers and operators see it."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from cacheservice.cache.counts import Counts
from cacheservice.cache.events import AttemptEnded, Event, Events, Noted, Observer
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.cache.history import KEPT_ATTEMPTS, Attempt, LastHour
from cacheservice.cache.refresh_status import RefreshStatus
from cacheservice.cache.served import Served
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings


class State(enum.StrEnum):
    """The age of the served snapshot compared with its limits, in the words of docs/status-port.md."""

    NEVER_LOADED = "never_loaded"
    FRESH = "fresh"
    STALE = "stale"
    EXPIRED = "expired"


class Dataset(Served):
    """A dataset: its served snapshot (`Served`), and the history of its refreshes.

    `fleet` is what this process does about it in a fleet; None without a fleet.

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
        super().__init__(settings, generation_before, counts or Counts(), Events() if events is None else events)
        self._now = now
        self._greatest_age_s: float | None = None
        self.refresh = RefreshStatus()
        self.fleet: FleetStatus | None = None
        self.save_problem: str | None = None
        self.attempts: deque[Attempt] = deque(maxlen=KEPT_ATTEMPTS)
        self.last_hour = LastHour()
        self.last_ended_at: float | None = None
        self.consecutive_failures = 0

    @property
    def is_refreshed_here(self) -> bool:
        """Whether this process reads it from the database, and not only what a leader publishes."""
        return self.fleet is None or self.fleet.role != "replica"

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

    def _serve(self, snapshot: Snapshot) -> None:
        self._note_age()
        super()._serve(snapshot)

    def _note_age(self) -> None:
        """Record the age, which is greatest just before a younger snapshot replaces the served one."""
        age_s = self.age_s()
        if age_s is not None:
            self._greatest_age_s = max(age_s, self._greatest_age_s or 0.0)

    def need(self) -> float:
        """Return how urgently it needs a refresh: its age divided by max_age_s, infinite if never loaded."""
        age_s = self.age_s()
        return float("inf") if age_s is None else age_s / self.settings.max_age_s

    def next_refresh_in_s(self) -> float | None:
        """Return the seconds until the next planned attempt, at least 0; None if none is planned."""
        return self.refresh.next_in_s(self._now())

    def behind_s(self) -> float | None:
        """Return for how many seconds postgres.max_load has delayed a refresh; None if it delays none."""
        return self.refresh.behind_s(self._now())

    def without_deltas_s(self) -> float | None:
        """Return for how many seconds deltas have not worked; None if the dataset has no `watch`."""
        return self.refresh.without_deltas_s(self._now()) if self.settings.watch else None

    def watch_state(self) -> str | None:
        """Return the state of the watched tables in the newest snapshot, from which the next delta starts.

        :returns: None without `watch`, before the first load, and if another process reads the dataset.
        """
        newest = self.newest() if self.settings.watch and self.is_refreshed_here else None
        return None if newest is None else newest.watch_state

    def subscribe(self, observer: Observer, *kinds: type[Event]) -> Callable[[], None]:
        """Call `observer` for its events of these kinds; return a function that ends the subscription."""
        return self._events.subscribe(observer, *kinds, of=self.name)

    def note_refresh(self, status: RefreshStatus) -> None:
        """Note what the refreshes do and plan."""
        if status != self.refresh:
            self.refresh = status
            self._events.notify(Noted(self.name))

    def note_fleet(self, status: FleetStatus) -> None:
        """Note what this process does about it in a fleet. Observers are not notified if only time has passed."""
        before, self.fleet = self.fleet, status
        if status.differs_from(before):
            self._events.notify(Noted(self.name))

    def silent_s(self) -> float | None:
        """Return for how many seconds no results of a leader have come; None without a fleet."""
        return None if self.fleet is None else self.fleet.silent_s(self._now())

    def note_save(self, problem: str | None, *, tried: bool = True) -> None:
        """Note the problem of saving a snapshot; None once it is saved.

        :param tried: whether a save has failed, which is counted; otherwise the problem was found before a save.
        """
        self.save_problem = problem
        if problem is not None and tried:
            self.counts.count_save_failure()
        self._events.notify(Noted(self.name))

    def attempted(self, attempt: Attempt) -> None:
        """Record an attempt that has ended."""
        self.attempts.append(attempt)
        self.counts.count_attempt(attempt.outcome, attempt.took_s)
        self.consecutive_failures = self.consecutive_failures + 1 if attempt.outcome == "failed" else 0
        self.last_ended_at = self._now()
        self._note_age()
        self.last_hour.add(self.last_ended_at, attempt.took_s, self._greatest_age_s, attempt.outcome)
        self._greatest_age_s = None
        self._events.notify(AttemptEnded(self.name))

    def attempted_elsewhere(self, ended_at: float) -> None:
        """Note when another process last ended an attempt, on the monotonic clock of this machine."""
        self.last_ended_at = ended_at

    def skip_to(self, generation: int) -> None:
        """Give the next publish a greater generation than this one, which another process has used."""
        self._generation_before = max(self.last_generation, generation)

    def change(self, settings: DatasetSettings) -> None:
        """Apply changed settings. The served snapshot stays until the next publish, whatever has changed."""
        if settings.definition != self.settings.definition:
            self.consecutive_failures = 0  # they belong to the old definition
        super().change(settings)
