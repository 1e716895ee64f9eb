"""The part of a dataset that readers see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from cacheservice.cache.counts import Counts
from cacheservice.cache.delta import Delta
from cacheservice.cache.events import Ended, Events, Noted, Published, Renewed
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings


@dataclass(frozen=True, slots=True)
class Held:
    """A result that a gate refused: the reason, the time of the first refusal by the wall clock, and its rows."""

    reason: str
    since: datetime
    rows: int


class Served:
    """The served snapshot of one dataset, and what may follow it.

    A snapshot is replaced by one assignment, so that no reader sees half of it. All methods are called in the reactor's
    thread. Beside the served snapshot there may be

    - `held`: the newest result was refused by a gate. The next publish or renewal ends that.
    - `pinned`: an operator wants the same snapshot served. The newest result is kept as `candidate` until `unpin`.
    - `accepts_next`: an operator wants the next result published, whatever the gates refuse.
    - `removed`: the dataset is not declared any more.

    :param generation_before: the last generation of a removed dataset with this name.
    :param counts: counts the rows of publishes.
    :param events: notifies observers of the dataset's events.
    """

    def __init__(
        self,
        settings: DatasetSettings,
        generation_before: int,
        counts: Counts,
        events: Events,
    ) -> None:
        self.settings = settings
        self.snapshot: Snapshot | None = None
        self.held: Held | None = None
        self.accepts_next = False
        self.pinned = False
        self.candidate: Snapshot | None = None
        self.removed = False
        self.counts = counts
        self._served_definition = settings.definition
        self._generation_before = generation_before
        self._events = events

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def last_generation(self) -> int:
        return max(self._generation_before, self.snapshot.generation if self.snapshot else 0)

    @property
    def redefined(self) -> bool:
        """Whether the served snapshot is the result of another query or key than the dataset has now."""
        return self.snapshot is not None and self._served_definition != self.settings.definition

    def newest(self) -> Snapshot | None:
        """Return the snapshot that the next result follows: the served one, or the candidate of a pinned dataset.

        None if it is of another definition.
        """
        if self.redefined:
            return None
        return self.candidate if self.pinned and self.candidate is not None else self.snapshot

    # Results

    def publish(self, snapshot: Snapshot, delta: Delta | None = None) -> None:
        """Serve `snapshot` from now on.

        :param delta: how it differs from the served snapshot; None if that is not known.
        """
        previous = self.last_generation
        assert snapshot.generation > previous, "a generation never goes down"
        self._serve(snapshot)
        if (change := snapshot.change) is not None:
            self.counts.count_publish(change.added, change.changed, change.removed)
        self._events.notify(Published(self.name, snapshot, previous, delta))

    def renew(self, snapshot: Snapshot) -> None:
        """Serve the same content and generation as of a later moment, because nothing has changed.

        The rows may be another object with the same content.
        """
        assert self.snapshot is not None, "there is nothing to renew"
        assert snapshot.rows.count == self.snapshot.rows.count, "the rows stay"
        assert snapshot.generation == self.snapshot.generation, "and so does the generation"
        self._serve(snapshot)
        self._events.notify(Renewed(self.name))

    def _serve(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.held = None
        self._served_definition = self.settings.definition

    def hold(self, reason: str, rows: int, on: datetime) -> None:
        """Keep serving the same snapshot, because a gate refused the newest result."""
        self.held = Held(reason, self.held.since if self.held else on, rows)
        self._events.notify(Noted(self.name))

    def keep(self, candidate: Snapshot) -> None:
        """Keep the newest result of a pinned dataset until `unpin`."""
        assert self.pinned, "only a pinned dataset keeps a candidate"
        self.candidate = candidate
        self.held = None
        self._events.notify(Noted(self.name))

    def restore(self, saved: Snapshot) -> None:
        """Serve `saved` under its own generation, or under the next one if its own has been used since."""
        self.publish(replace(saved, generation=max(saved.generation, self.last_generation + 1)))

    def withdraw(self) -> None:
        """Serve nothing until the next publish, because the served snapshot is of another database."""
        self._generation_before = self.last_generation
        self.snapshot = self.candidate = None
        self._events.notify(Noted(self.name))

    # Operators

    def accept_next(self, accepts: bool = True) -> None:
        """Let the next result pass the gates; with False, that result has come."""
        self.accepts_next = accepts
        self._events.notify(Noted(self.name))

    def pin(self) -> None:
        """Serve the same snapshot until `unpin`; results that arrive become candidates."""
        assert self.snapshot is not None, "there is nothing to pin"
        self.pinned = True
        self._events.notify(Noted(self.name))

    def unpin(self) -> None:
        """Serve the newest result again, and each result that follows it."""
        self.pinned = False
        self._events.notify(Noted(self.name))
        candidate, self.candidate = self.candidate, None
        if candidate is None:
            return
        if self.snapshot is not None and candidate.rows is self.snapshot.rows and not self.snapshot.rolled_back_to:
            self.renew(replace(candidate, generation=self.snapshot.generation, change=self.snapshot.change))
        else:
            self.publish(replace(candidate, generation=self.last_generation + 1))

    def roll_back(self, saved: Snapshot) -> None:
        """Serve `saved` under the next generation and pin it.

        The snapshot that was served becomes the candidate if there is none.
        """
        newest = self.candidate or (None if self.redefined else self.snapshot)
        self.publish(replace(saved, generation=self.last_generation + 1, change=None, rolled_back_to=saved.generation))
        self.pinned = True
        self.candidate = None if newest is None else replace(newest, change=None)

    # The configuration

    def change(self, settings: DatasetSettings) -> None:
        """Apply changed settings. The served snapshot stays until the next publish, whatever has changed."""
        if settings.definition != self.settings.definition:
            # The candidate and the held result belong to the old definition.
            self.candidate = self.held = None
        if settings.reading != self.settings.reading:
            self._start_from_nothing()
        self.settings = settings

    def forget_transactions(self) -> None:
        """Note that the database is another one now, and that the snapshots include none of its transactions."""
        self._start_from_nothing()
        self.snapshot = self.snapshot and replace(self.snapshot, server=None)
        self.candidate = self.candidate and replace(self.candidate, server=None)

    def _start_from_nothing(self) -> None:
        """Make the next read a full one, because states of before and after cannot be compared."""
        self.snapshot = self.snapshot and self.snapshot.without_states()
        self.candidate = self.candidate and self.candidate.without_states()

    def end(self) -> None:
        """Serve nothing any more, because the dataset is not declared; observers stop waiting for a publish."""
        self._generation_before = self.last_generation
        self.removed = True
        self.snapshot = self.candidate = self.held = None
        self._events.notify(Ended(self.name, self.last_generation))
