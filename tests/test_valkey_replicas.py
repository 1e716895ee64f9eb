"""A leader and replicas over a real Valkey: what the leader serves is what the replicas serve, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from cacheservice.base import clock as monotonic
from cacheservice.base.clock import Host
from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Event, Published
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Rows
from cacheservice.config.valkey_url import parse
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.errors import ValkeyDown
from cacheservice.replication.valkey.manifest import Names
from cacheservice.replication.valkey.publisher import MOST_DELTAS, Here, Publisher
from cacheservice.replication.valkey.replica import Replica
from cacheservice.replication.valkey.store import Fenced, Lead, Store
from cacheservice.sources.frames.clocks import Clocks
from tests.kit.datasets import Table, declared, numbered_rows, rows_of, snapshot_of, table_of
from tests.kit.logs import Log
from tests.kit.valkey import ValkeyServer, running_valkey
from tests.kit.waiting import until

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
    """

    def __init__(
        self, test: TestCase, server: ValkeyServer, name: str, ahead_s: float = 0.0, group: str = "shop"
    ) -> None:
        self.clock = ClockOf(ahead_s)
        self.log = Log()
        self.cache = Cache([declared(each, group="shop") for each in NAMES], self.clock.seconds)
        valkey = Valkey(parse(f"redis://{server.address}"), reactor, LONG_S)
        test.addCleanup(deferLater, reactor, 0.01)
        test.addCleanup(valkey.close)
        clocks = Clocks(self.clock, lambda: 2e9 + self.clock.seconds(), Host(name, name), self.clock.seconds)
        self.here = Here(name, self.cache, clocks, self.clock, self.log, Random(1).random)
        self.store = Store(valkey, Names("cs", "group/shop"), self.clock)
        self.replica = Replica(NAMES, self.store, self.here, lambda _: None)
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

    async def follow(self, leader: Machine) -> None:
        """Load until it serves what the leader does."""
        while self.tables() != leader.tables():
            await self.replica.load()
            await deferLater(reactor, 0.002)


class Fleet(TestCase):
    timeout = 120

    async def test_snapshots_deltas_and_renewals(self) -> None:
        """Each change of the leader arrives with its generation and its rows; a delta costs its rows only."""
        with running_valkey() as server:
            leader, replica = Machine(self, server, "leader"), Machine(self, server, "replica", 500.0)
            leader.serve("products", numbered_rows(20_000))
            leader.serve("prices", numbered_rows(10))
            await leader.lead()
            await replica.follow(leader)
            written = int(server.cli("INFO", "stats").split("total_net_input_bytes:")[1].split()[0])
            seen: list[Event] = []
            replica.cache.events.subscribe(seen.append, Published)
            leader.change("products", b"17", b"new")
            await replica.follow(leader)
            (event,) = seen
            assert isinstance(event, Published)
            assert event.delta is not None
            self.assertEqual(set(event.delta.put), {b"17"})
            more = int(server.cli("INFO", "stats").split("total_net_input_bytes:")[1].split()[0]) - written
            self.assertLess(more, 20_000)
            dataset = leader.cache.dataset("products")
            assert dataset.snapshot is not None
            rows = replica.rows("products")
            dataset.renew(replace(dataset.snapshot, read_at=leader.clock.seconds()))
            moment = replica.replica.manifest and replica.replica.manifest.moment
            while replica.replica.manifest is None or replica.replica.manifest.moment == moment:
                await replica.replica.load()
            self.assertIs(replica.rows("products"), rows)
            self.assertEqual((leader.log.lines, replica.log.lines), ([], []))

    async def test_ages_are_true_whatever_the_clocks(self) -> None:
        """A replica's age is never less than the leader's, and more by the time of a few commands only."""
        with running_valkey() as server:
            leader, replica = Machine(self, server, "leader", -7000.0), Machine(self, server, "replica", 12_345.0)
            leader.serve("products", numbered_rows(10), age_s=100.0)
            leader.serve("prices", numbered_rows(10), age_s=0.0)
            await leader.lead()
            await replica.follow(leader)
            for name in NAMES:
                ours, theirs = replica.cache.dataset(name).age_s(), leader.cache.dataset(name).age_s()
                assert ours is not None
                assert theirs is not None
                self.assertGreaterEqual(ours + 1e-5, theirs)
                self.assertLess(ours - theirs, LONG_S)
                self.assertIsNone(replica.cache.dataset(name).snapshot.age_uncertain)  # type: ignore[union-attr]

    async def test_a_replica_that_starts_late(self) -> None:
        """It gets the snapshot and the deltas since; after many deltas there is a new snapshot."""
        with running_valkey() as server:
            leader = Machine(self, server, "leader")
            leader.serve("products", numbered_rows(30_000))
            leader.serve("prices", numbered_rows(5))
            await leader.lead()
            pieces = 0
            for number in range(MOST_DELTAS + 10):
                leader.change("products", b"%d" % number, b"new")
                moment = number + 2

                async def published(moment: int = moment) -> bool:
                    manifest = await leader.store.current()
                    return manifest is not None and manifest.members["products"].generation >= moment

                while not await published():
                    await deferLater(reactor, 0.001)
                manifest = await leader.store.current()
                assert manifest is not None
                pieces = max(pieces, len(manifest.members["products"].pieces))
            self.assertEqual(pieces, MOST_DELTAS + 1)
            late = Machine(self, server, "late")
            await late.follow(leader)
            self.assertEqual(late.moments, [(MOST_DELTAS + 11, 0), (MOST_DELTAS + 11, 1)])

    async def test_another_leader(self) -> None:
        """A replica takes the lead and goes on with deltas; the leader before it is fenced, and publishes nothing."""
        with running_valkey() as server:
            first, second, third = (Machine(self, server, name) for name in ("first", "second", "third"))
            first.serve("products", numbered_rows(5000))
            first.serve("prices", numbered_rows(5))
            await first.lead()
            await second.follow(first)
            await third.follow(first)
            await second.lead()
            second.change("products", b"1", b"of the second")
            await third.follow(second)
            self.assertEqual(third.moments[-1], (2, 1))
            manifest = await second.store.current()
            assert manifest is not None
            self.assertEqual(len(manifest.members["products"].deltas), 1)
            first.change("products", b"1", b"of the first")
            await until(lambda: bool(first.fenced))
            self.assertEqual(first.log.names(), ["lead_fenced"])
            self.assertEqual(await second.store.current(), manifest)

    async def test_a_server_that_loses_everything(self) -> None:
        """Replicas keep what they have, the leader publishes all rows again, and generations go on."""
        with running_valkey() as server:
            leader, replica = Machine(self, server, "leader"), Machine(self, server, "replica")
            leader.serve("products", numbered_rows(100))
            leader.serve("prices", numbered_rows(5))
            await leader.lead()
            await replica.follow(leader)
            before = replica.tables()
            server.kill()
            leader.change("products", b"1", b"new")
            with self.assertRaises(ValkeyDown):
                await replica.replica.load()
            self.assertEqual(replica.tables(), before)
            await until(lambda: leader.publisher is not None and leader.publisher.problem is not None)
            server.start()
            server.wait("PING", until="PONG")
            while replica.tables() != leader.tables():
                try:
                    await replica.replica.load()
                except CacheServiceError:
                    await deferLater(reactor, 0.01)
            self.assertEqual(replica.moments[-1], (2, 1))
            self.assertIn("publish_failed", leader.log.names())
            server.cli("FLUSHALL")
            leader.change("prices", b"1", b"new")
            await replica.follow(leader)

    async def test_a_reload_while_rows_are_written(self) -> None:
        """Rows that were read by one definition are never published as those of another."""
        with running_valkey() as server:
            leader, replica = Machine(self, server, "leader"), Machine(self, server, "replica")
            leader.serve("products", numbered_rows(20_000))
            leader.serve("prices", numbered_rows(5))
            await leader.lead()
            while not server.cli("KEYS", "*}:*:0"):  # the first part is written, the rest is not
                await deferLater(reactor, 0)
            self.assertIsNone(await leader.store.current())
            leader.cache.declare([declared(name, group="shop", query="SELECT 2 AS id") for name in NAMES])
            while not replica.tables():
                await replica.replica.load()
            self.assertEqual(replica.tables(), leader.tables())

    async def test_a_replica_that_is_ahead(self) -> None:
        """A replica that has refreshed for itself reports its generation, and serves the leader's next greater one."""
        with running_valkey() as server:
            leader, replica = Machine(self, server, "leader"), Machine(self, server, "replica")
            leader.serve("products", numbered_rows(100))
            leader.serve("prices", numbered_rows(5))
            await leader.lead()
            await replica.follow(leader)
            for _ in range(3):
                replica.serve("products", numbered_rows(7))
            leader.change("products", b"1", b"new")
            moment = 1

            async def load() -> dict[str, int]:
                return dict(await replica.replica.load())

            while not (ahead := await load()):
                await deferLater(reactor, 0.002)
            self.assertEqual(ahead, {"products": 4})
            self.assertEqual(replica.rows("products").count, 7)
            for _ in range(3):
                leader.change("products", b"2", b"%d" % moment)
                moment += 1
            await replica.follow(leader)
            self.assertEqual(replica.moments[-1][0], 5)

    async def test_any_order(self) -> None:
        """Random publishes, lost servers and late loads: replicas serve moments of the leader only, and at last all."""
        random = Random(20261130)
        with running_valkey() as server:
            leader = Machine(self, server, "leader")
            replicas = [Machine(self, server, f"replica {number}", 100.0 * number) for number in range(3)]
            for name in NAMES:
                leader.serve(name, rows_of({}))
            moments = {(0, 0), (1, 1), (1, 0)}
            served: dict[tuple[str, int], Table] = {(name, 1): {} for name in NAMES}
            await leader.lead()
            for _ in range(150):
                await self.step(random, leader, replicas, server)
                for name in NAMES:
                    served[name, leader.cache.dataset(name).last_generation] = table_of(leader.rows(name))
                moments.add(tuple(leader.cache.dataset(name).last_generation for name in NAMES))
                for replica in replicas:
                    for name, (generation, table) in replica.tables().items():
                        self.assertEqual(table, served[name, generation])
                    self.assertIn(tuple(replica.cache.dataset(name).last_generation for name in NAMES), moments)
            for replica in replicas:
                await replica.follow(leader)
                self.assertEqual(replica.moments, sorted(replica.moments))

    async def step(self, random: Random, leader: Machine, replicas: list[Machine], server: ValkeyServer) -> None:
        what: Callable[[], object] = random.choice([self.nothing, self.both(random, leader), self.nothing])
        what()
        if random.random() < 0.03:
            server.cli("FLUSHALL")
            leader.change("products", b"flushed", b"%d" % random.randrange(10**9))
            leader.change("prices", b"flushed", b"%d" % random.randrange(10**9))
        if random.random() < 0.5:
            try:
                await random.choice(replicas).replica.load()
            except CacheServiceError as error:
                self.assertIn("not there any more", str(error))
        if random.random() < 0.3:
            await deferLater(reactor, 0.003)

    def both(self, random: Random, leader: Machine) -> Callable[[], None]:
        """Change both datasets in one turn of the reactor."""

        def change() -> None:
            for name in NAMES:
                key = b"%d" % random.randrange(20)
                leader.change(name, key, random.choice([None, b"1", b"2", b"%d" % random.randrange(10**9)]))

        return change

    def nothing(self) -> None:
        """Change nothing."""
