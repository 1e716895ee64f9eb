"""Decides what one receiver is sent next. Pure: events in, updates out.

A receiver that is slower than the publishes gets their merged changes, or the newest snapshot, so that what waits for
it never exceeds one delta for each dataset.
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheservice.cache.delta import NO_CHANGE, Delta
from cacheservice.cache.events import Published


@dataclass(frozen=True, slots=True)
class Update:
    """The next update of a dataset.

    :param base: the generation that `delta` applies to; 0 for all rows.
    :param delta: None for all rows.
    :param generation: the generation that results.
    """

    base: int
    delta: Delta | None
    generation: int

    def followed_by(self, event: Published) -> Update:
        """Return the update to the generation of a later publish."""
        merged = None
        if self.delta is not None and event.delta is not None and event.previous == self.generation:
            merged = self.delta.then(event.delta)
        return Update(0 if merged is None else self.base, merged, event.generation)


class Outbox:
    """The updates that one receiver has not been sent yet, at most one for each dataset.

    A dataset is unknown to the receiver, or at the generation that it was sent last.
    """

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._pending: dict[str, Update] = {}

    @property
    def is_empty(self) -> bool:
        return not self._pending

    def has(self, name: str) -> bool:
        """Return whether the receiver has the dataset, or will have it once it is sent what is pending."""
        return name in self._sent or name in self._pending

    def published(self, event: Published) -> None:
        """Note a publish."""
        name = event.dataset
        sent = self._sent.get(name)
        before = self._pending.get(name)
        if before is None:
            before = Update(0, None, 0) if sent is None else Update(sent, NO_CHANGE, sent)
        self._pending[name] = before.followed_by(event)

    def renewed(self, name: str) -> None:
        """Note that the same generation is served as of a later moment."""
        sent = self._sent.get(name)
        if sent is not None:
            self._pending.setdefault(name, Update(sent, NO_CHANGE, sent))

    def resend(self, name: str, generation: int) -> None:
        """Send all rows of a dataset, which the receiver lacks."""
        self._pending[name] = Update(0, None, generation)

    def forget(self, name: str) -> None:
        """Note that the receiver drops the dataset."""
        self._pending.pop(name, None)
        self._sent.pop(name, None)

    def take(self) -> dict[str, Update]:
        """Return all pending updates, which the receiver is sent now; they belong together."""
        taken, self._pending = self._pending, {}
        self._sent.update((name, update.generation) for name, update in taken.items())
        return taken
