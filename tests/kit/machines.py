"""Processes on machines of their own that publish in a real Valkey, and follow one another."""

from __future__ import annotations

from random import Random

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from cacheservice.base import clock as monotonic
from cacheservice.base.clock import Host
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Event, Published
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Rows
from cacheservice.config.valkey_url import parse
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.manifest import Member, Names
from cacheservice.replication.valkey.publisher import Here, Publisher
from cacheservice.replication.valkey.replica import Replica
from cacheservice.replication.valkey.store import Fenced, Lead, Store
from cacheservice.sources.frames.clocks import Clocks
from tests.kit.datasets import Table, declared, snapshot_of, table_of
from tests.kit.logs import Log
from tests.kit.valkey import ValkeyServer

LONG_S = 30.0
NAMES = ("products", "prices")


class ClockOf(Clock):
    """The monotonic clock of a machine: another zero than that of others."""

    def __init__(self, ahead_s: float) -> None:
        self._ahead_s = ahead_s
        self.callLater = reactor.callLater

    def seconds(self) -> float:
        return monotonic.seconds() + self._ahead_s


class Machine:
    """A process on a machine of its own: a cache, and a connection to the Valkey.

    :param ahead_s: its clocks go ahead of those of the first machine.
    :param store: its class.
    """

    def __init__(
        self,
        test: TestCase,
        server: ValkeyServer,
        name: str,
        ahead_s: float = 0.0,
        store: type[Store] = Store,
    ) -> None:
        self.clock = ClockOf(ahead_s)
        self.log = Log()
        self.cache = Cache([declared(each, group="shop") for each in NAMES], self.clock.seconds)
        valkey = Valkey(parse(f"redis://{server.address}"), reactor, LONG_S)
        test.addCleanup(deferLater, reactor, 0.01)
        test.addCleanup(valkey.close)
        clocks = Clocks(self.clock, lambda: 2e9 + self.clock.seconds(), Host(name, name), self.clock.seconds)
        self.here = Here(name, self.cache, clocks, self.clock, self.log, Random(1).random)
        self.store = store(valkey, Names("cs", "group/shop"), self.clock)
        self.replica = Replica(NAMES, self.store, self.here, lambda _: None, reactor)
        self.publisher: Publisher | None = None
        self.fenced: list[Fenced] = []
        self.moments: list[tuple[int, ...]] = []
        self.cache.events.subscribe(self._published, Published)
        test.addCleanup(self.stop)

    def _published(self, event: Event) -> None:
        self.moments.append(tuple(self.cache.dataset(name).last_generation for name in NAMES))

    def stop(self) -> None:
        if self.publisher is not None:
            self.publisher.stop()

    async def lead(self, epoch: int = 1) -> Lead:
        lead = await self.store.take_lead(self.here.name, epoch)
        self.publisher = Publisher(NAMES, self.store, self.here, lead, self.replica.loaded, self.fenced.append)
        self.publisher.start()
        return lead

    def serve(self, name: str, rows: Rows, patch: RowsPatch | None = None, age_s: float = 0.0) -> None:
        dataset = self.cache.dataset(name)
        snapshot = snapshot_of(rows, dataset.last_generation + 1, self.clock.seconds() - age_s)
        dataset.publish(snapshot, None if patch is None else patch.delta)

    def change(self, name: str, key: bytes, document: bytes | None) -> None:
        patch = RowsPatch(self.rows(name))
        if document is None:
            patch.remove(key)
        else:
            patch.put(key, document)
        self.serve(name, patch.finish(), patch)

    def rows(self, name: str) -> Rows:
        snapshot = self.cache.dataset(name).snapshot
        assert snapshot is not None
        return snapshot.rows

    def tables(self) -> dict[str, tuple[int, Table]]:
        served = {name: self.cache.dataset(name) for name in NAMES}
        return {
            name: (dataset.snapshot.generation, table_of(dataset.snapshot.rows))
            for name, dataset in served.items()
            if dataset.snapshot is not None
        }

    async def published(self, name: str) -> Member:
        """Wait until what it serves is published; return what the Valkey has of the dataset."""
        while True:
            manifest = await self.store.current()
            if manifest is not None and name in manifest.members:
                member = manifest.members[name]
                if member.generation == self.cache.dataset(name).last_generation:
                    return member
            await deferLater(reactor, 0.001)

    async def follow(self, leader: Machine) -> None:
        """Load until it serves what the leader does."""
        while self.tables() != leader.tables():
            await self.replica.load()
            await deferLater(reactor, 0.002)
