"""The leader's part of a unit: begins an epoch, publishes, and does what replicas ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cacheservice.base.errors import SnapshotRejected
from cacheservice.cache.delta import NO_CHANGE
from cacheservice.replication.valkey.publisher import Here, Publisher
from cacheservice.replication.valkey.replica import Replica
from cacheservice.replication.valkey.store import Fenced, Leader, Store

_RESERVED = 1000
"""A lost leader may have served generations that it had not published. The next one leaves their numbers out, and
continues with the next multiple of this."""


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
            await self._answer(has_lead)

    async def _begin(self, has_lead: Callable[[], bool]) -> None:
        """Begin an epoch, catch up with what the leader before has published, and publish from now on."""
        # What was asked for before is answered by the first refresh of this lead.
        self._asked = (await self._store.asked(self._names)).times
        known = self._replica.manifest.epoch if self._replica.manifest is not None else 0
        least = max(self.epoch + 1, known + 1, int(self._fleet.wall_s() * 1000))
        lead = await self._store.take_lead(self._here.name, least)
        before, self.epoch = self.epoch, lead.epoch
        if lead.manifest is not None:
            try:
                await self._replica.load()
            except SnapshotRejected as error:
                # The server has lost a part of it, or the leader before has another definition. What this process
                # serves takes its place.
                self._log.warning("lead_without_snapshot", error=str(error))
        if not has_lead():
            return
        loaded = {name: each for name, each in self._replica.loaded.items() if self._serves(name, each)}
        self._publisher = Publisher(self._names, self._store, self._here, lead, loaded, self._fenced)
        self._publisher.start()
        if lead.manifest is not None:
            is_ours = lead.manifest.epoch == before
            for name, member in lead.manifest.members.items():
                if not is_ours:
                    self._exceed(name, member.generation - member.generation % _RESERVED + _RESERVED - 1)
                elif loaded.get(name) != member.generation:
                    self._exceed(name, member.generation)
        self._log.info("lead_began", epoch=lead.epoch)

    def _serves(self, name: str, generation: int) -> bool:
        dataset = self._here.cache.datasets.get(name)
        return dataset is not None and dataset.snapshot is not None and dataset.snapshot.generation == generation

    async def _answer(self, has_lead: Callable[[], bool]) -> None:
        """Do what replicas have asked the leader for."""
        asked = await self._store.asked(self._names)
        if not has_lead():
            return  # lost meanwhile, as by a process that was suspended: they have asked another one
        for name, least in asked.least.items():
            self._exceed(name, least)
        if asked.times != self._asked:
            self._asked = asked.times
            self._fleet.refreshing.refresh_since(self._names[0], self._here.clock.seconds())

    def _exceed(self, name: str, generation: int) -> None:
        """Serve a greater generation than this one: now, or with the next read if these rows may not be published."""
        dataset = self._here.cache.datasets.get(name)
        if name not in self._names or dataset is None or dataset.last_generation > generation:
            return
        if dataset.snapshot is None or dataset.redefined:
            dataset.skip_to(generation)
        else:
            dataset.publish(replace(dataset.snapshot, generation=generation + 1), NO_CHANGE)

    def _fenced(self, error: Fenced) -> None:
        self._publisher = None
        self.epoch = max(self.epoch, error.epoch)
        self._fleet.resign(str(error))

    def end(self) -> None:
        """Publish no more."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.stop()
