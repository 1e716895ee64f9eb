"""A process of a fleet, with its units: it leads some and follows the leaders of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twisted.application.service import Service

from cacheservice.base.interfaces import Reactor
from cacheservice.cache.rows import Groups
from cacheservice.config import groups
from cacheservice.replication.competition import Competition, Leads
from cacheservice.replication.leading import Fleet
from cacheservice.replication.unit import Unit
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.deputy import Deputy
from cacheservice.replication.valkey.manifest import Names
from cacheservice.replication.valkey.publisher import Here
from cacheservice.replication.valkey.replica import Replica
from cacheservice.replication.valkey.store import Store
from cacheservice.replication.valkey.subscription import Subscription


@dataclass(frozen=True, slots=True)
class Carried:
    """How a fleet's publishes are carried.

    :param prefix: of all keys; fleets with other prefixes are independent.
    :param release: called with the groups of rows once they have no readers left.
    """

    valkey: Valkey
    prefix: str
    release: Callable[[Groups], None]
    reactor: Reactor


class Cluster(Service):
    """Runs the units of this process, by the datasets of its cache.

    :param leads: notifies `gained` and `lost`.
    """

    name = "cluster"

    def __init__(self, carried: Carried, here: Here, fleet: Fleet, leads: Leads) -> None:
        self.units: dict[str, Unit] = {}
        self._carried = carried
        self._here = here
        self._fleet = fleet
        self._held: set[str] = set()
        self._by_channel: dict[bytes, Unit] = {}
        self._subscription = Subscription(carried.valkey, self._heard, carried.reactor, here.log, here.random)
        deputy = Deputy(carried.valkey, carried.prefix, here.name)
        self._competition = Competition(lambda: self.units, deputy, leads, carried.reactor, here.log, here.random)

    def startService(self) -> None:
        super().startService()
        self.redeclared()
        self._competition.start()

    def stopService(self) -> None:
        super().stopService()
        self._competition.stop()
        self._subscription.stop()
        for unit in self.units.values():
            unit.stop()
        self._carried.valkey.close()

    def redeclared(self) -> None:
        """Have a unit for each dataset or group of the cache. Units whose datasets are the same stay."""
        before, self.units = self.units, {}
        for group in groups(dataset.settings for dataset in self._here.cache.datasets.values()):
            name = f"group/{group[0].group}" if group[0].group else f"dataset/{group[0].name}"
            members = tuple(settings.name for settings in group)
            kept = before.get(name)
            if kept is not None and kept.names == members:
                self.units[name] = before.pop(name)
                kept.redeclared()
            else:
                self.units[name] = self._unit(Names(self._carried.prefix, name), members)
        for unit in before.values():
            unit.retire()
        for name, unit in self.units.items():
            if name in self._held:
                unit.gained()
        self._by_channel = {Names(self._carried.prefix, name).channel: unit for name, unit in self.units.items()}
        self._subscription.subscribe(self._by_channel)
        self._competition.look()

    def _unit(self, names: Names, members: tuple[str, ...]) -> Unit:
        store = Store(self._carried.valkey, names, self._here.clock)
        replica = Replica(members, store, self._here, self._carried.release, self._carried.reactor)
        unit = Unit(members, store, replica, self._here, self._fleet)
        unit.start()
        return unit

    def gained(self, name: str) -> None:
        """Note that this process has the lead of a unit."""
        self._held.add(name)
        if name in self.units:
            self.units[name].gained()
        self._competition.look()

    def lost(self, name: str) -> None:
        """Note that this process has the lead of a unit no longer."""
        self._held.discard(name)
        if name in self.units:
            self.units[name].lost()
        self._competition.look()

    def unit_of(self, dataset: str) -> Unit | None:
        """Return the unit of a dataset; None if the fleet has none of it yet."""
        return next((unit for unit in self.units.values() if dataset in unit.names), None)

    def ask(self, dataset: str) -> None:
        """Ask the leader of a dataset for a refresh."""
        unit = self.unit_of(dataset)
        if unit is not None:
            unit.ask()

    def _heard(self, channel: bytes | None) -> None:
        for unit in self.units.values() if channel is None else [self._by_channel.get(channel)]:
            if unit is not None:
                unit.wake()
