"""The events of datasets, and the one way to be notified of them.

An observer is called in the turn of the reactor in which the event happens, once the state has changed. It must not
raise. Observers of all datasets are called first, then the observers of the one dataset, in the order in which they
subscribed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cacheservice.cache.delta import Delta
from cacheservice.cache.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to the dataset of this name."""

    dataset: str


@dataclass(frozen=True, slots=True)
class Published(Event):
    """The dataset serves another snapshot.

    :param previous: the generation that was served before, and that `delta` applies to.
    :param delta: how the rows differ from those served before; None if that is not known, so that any row may.
    """

    snapshot: Snapshot
    previous: int
    delta: Delta | None = None

    @property
    def generation(self) -> int:
        """The generation that is served from now on."""
        return self.snapshot.generation


class Renewed(Event):
    """The same content is served, as of a later moment; the rows may be another object."""


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """The dataset is not declared any more, and serves nothing; `generation` is the last one that it served."""

    generation: int


class AttemptEnded(Event):
    """An attempt to refresh it has ended; it is the last of the dataset's `attempts`."""


class Noted(Event):
    """Something else that operators see of it has changed.

    That is what its refreshes do or plan, its part in a fleet, a held result, a pin, an acceptance, or a problem of
    saving.
    """


class Added(Event):
    """The configuration has added it."""


class Changed(Event):
    """The configuration has changed its settings."""


Observer = Callable[[Event], object]


class Events:
    """Notifies observers."""

    def __init__(self) -> None:
        self._observers: dict[tuple[type[Event], str | None], list[Observer]] = {}

    @property
    def subscription_count(self) -> int:
        """How many subscriptions there are, one for each kind of event."""
        return sum(map(len, self._observers.values()))

    def subscribe(self, observer: Observer, *kinds: type[Event], of: str | None = None) -> Callable[[], None]:
        """Call `observer` for events of these kinds from now on; return a function that ends the subscription.

        :param of: the name of one dataset; None for all datasets.
        """
        for kind in kinds:
            self._observers.setdefault((kind, of), []).append(observer)

        def unsubscribe() -> None:
            for kind in kinds:
                observers = self._observers[kind, of]
                observers.remove(observer)
                if not observers:
                    del self._observers[kind, of]

        return unsubscribe

    def notify(self, event: Event) -> None:
        """Call the observers of `event`."""
        kind, name = type(event), event.dataset
        for observer in (*self._observers.get((kind, None), ()), *self._observers.get((kind, name), ())):
            observer(event)
