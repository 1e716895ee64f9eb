"""The leader's part of a unit: begins an epoch, publishes, and does what replicas ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cacheservice.cache.delta import NO_CHANGE
from cacheservice.replication.valkey.publisher import Here, Publisher
from cacheservice.replication.valkey.replica import Replica
from cacheservice.replication.valkey.store import Fenced, Leader, Store


class Refreshing(Protocol):
    """The refreshes of this process."""

    def take_over(self, name: str, *, stretch: float, delay_s: float) -> None:
        """Refresh a dataset, with its group, from now on.

        :param stretch: multiplies the interval.
        :param delay_s: until the first refresh.
        """

    def stand_by(self, name: str) -> None:
        """Refresh a dataset and its group no longer; an attempt that runs is ended."""

    def refresh_since(self, name: str, moment: float) -> None:
        """Ensure that a refresh begins at or after a moment of the monotonic clock."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What all units share.

    :param may_refresh: returns whether a refresh of this process can help.
    :param resign: gives up all leads, for a reason, and competes for them again.
    :param wall_s: returns seconds since 1970.
    :param lead_problem: returns why this process cannot win a lead; None if it can.
    """

    refreshing: Refreshing
    may_refresh: Callable[[], bool]
    resign: Callable[[str], object]
    fallback_after_s: float
    wall_s: Callable[[], float]
    lead_problem: Callable[[], str | None] = lambda: None


class Leading:
    """Publishes a unit while this process has its lead.

    `epoch` is that of its last lead, 0 before the first.
    """

    def __init__(self, names: Sequence[str], store: Store, replica: Replica, here: Here, fleet: Fleet) -> None:
        self.epoch = 0
        self._names = names
        self._store = store
        self._replica = replica
        self._here = here
        self._fleet = fleet
        self._log = here.log.bind(unit=store.names.unit)
        self._publisher: Publisher | None = None
        self._asked = 0

    @property
    def problem(self) -> str | None:
        """Why nothing can be published now; None if it can, or if nothing is to be published."""
        return None if self._publisher is None else self._publisher.problem

    @property
    def present(self) -> Leader | None:
        """This process with the epoch of its lead; None while it has not begun one in the Valkey."""
        return None if self._publisher is None else Leader(self._here.name, self.epoch)

    async def look(self, has_lead: Callable[[], bool]) -> None:
        """Begin an epoch, if this lead has none yet; otherwise do what replicas have asked for.

        :param has_lead: returns whether this process still has the lead.
        :raises CacheServiceError: if the Valkey fails.
        """
        if self._publisher is None:
            await self._begin(has_lead)
        else:
            await self._answer()

    async def _begin(self, has_lead: Callable[[], bool]) -> None:
        """Begin an epoch, catch up with what the leader before has published, and publish from now on."""
        lead = await self._store.take_lead(self._here.name, max(self.epoch + 1, int(self._fleet.wall_s() * 1000)))
        self.epoch = lead.epoch
        if lead.manifest is not None:
            await self._replica.load()
        if not has_lead():
            return
        loaded = {name: each for name, each in self._replica.loaded.items() if self._serves(name, each)}
        self._publisher = Publisher(self._names, self._store, self._here, lead, loaded, self._fenced)
        self._publisher.start()
        self._log.info("lead_began", epoch=lead.epoch)

    def _serves(self, name: str, generation: int) -> bool:
        dataset = self._here.cache.datasets.get(name)
        return dataset is not None and dataset.snapshot is not None and dataset.snapshot.generation == generation

    async def _answer(self) -> None:
        """Do what replicas have asked the leader for."""
        asked = await self._store.asked(self._names)
        for name, least in asked.least.items():
            dataset = self._here.cache.datasets.get(name)
            if dataset is not None and dataset.snapshot is not None and dataset.last_generation <= least:
                dataset.publish(replace(dataset.snapshot, generation=least + 1), NO_CHANGE)
        if asked.times != self._asked:
            is_first, self._asked = not self._asked, asked.times
            if not is_first:
                self._fleet.refreshing.refresh_since(self._names[0], self._here.clock.seconds())

    def _fenced(self, error: Fenced) -> None:
        self._publisher = None
        self.epoch = max(self.epoch, error.epoch)
        self._fleet.resign(str(error))

    def end(self) -> None:
        """Publish no more."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.stop()
