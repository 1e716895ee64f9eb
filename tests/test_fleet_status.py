"""What operators see of processes of a fleet, which units over a real Valkey write into their datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from cacheservice.base import clock as monotonic
from cacheservice.base.clock import Host
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Event, Noted
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.config.valkey_url import parse
from cacheservice.replication.leading import Fleet
from cacheservice.replication.unit import Unit
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.manifest import Names
from cacheservice.replication.valkey.publisher import Here
from cacheservice.replication.valkey.replica import Replica
from cacheservice.replication.valkey.store import Asked, Store
from cacheservice.sources.frames.clocks import Clocks
from tests.kit.datasets import declared, numbered_rows, snapshot_of
from tests.kit.logs import Log
from tests.kit.valkey import ValkeyServer, running_valkey
from tests.kit.waiting import until

LONG_S = 30.0


class MonotonicClock(Clock):
    """The reactor's timers, on the clock of the service."""

    def __init__(self) -> None:
        self.callLater = reactor.callLater

    def seconds(self) -> float:
        return monotonic.seconds()


class Refreshing:
    """Refreshes that note what they are asked for."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, float]] = []

    def take_over(self, name: str, *, stretch: float, delay_s: float) -> None:
        self.taken.append((name, stretch))

    def stand_by(self, name: str) -> None:
        self.taken.clear()

    def refresh_since(self, name: str, moment: float) -> None:
        pass


class Process:
    """A process of a fleet with one dataset; a test wins its leads.

    :param fallback_after_s: as in the configuration.
    """

    def __init__(self, test: TestCase, server: ValkeyServer, name: str, fallback_after_s: float = 600.0) -> None:
        self.cache = Cache([declared("products")], monotonic.seconds)
        self.dataset = self.cache.dataset("products")
        valkey = Valkey(parse(f"redis://{server.address}"), reactor, LONG_S)
        test.addCleanup(deferLater, reactor, 0.01)
        test.addCleanup(valkey.close)
        clock = MonotonicClock()
        clocks = Clocks(clock, lambda: 2e9 + monotonic.seconds(), Host(name, name), monotonic.seconds)
        here = Here(name, self.cache, clocks, clock, Log(), Random(1).random)
        store = Store(valkey, Names("cs", "dataset/products"), clock)
        self.replica = Replica(("products",), store, here, lambda _: None, reactor)
        self.lead_problem: str | None = None
        self.refreshing = Refreshing()
        fleet = Fleet(self.refreshing, lambda: True, lambda _: None, fallback_after_s, lambda: 1e9, self._looked)
        self.roles: list[str] = []
        self.unit = Unit(("products",), store, self.replica, here, fleet)
        test.addCleanup(self.unit.stop)
        self.unit.start()

    def _looked(self) -> str | None:
        """Note the role after each look at the Valkey."""
        self.roles.append(self.unit.role.value)
        return self.lead_problem

    @property
    def status(self) -> FleetStatus:
        assert self.dataset.fleet is not None
        return self.dataset.fleet

    def serve(self, rows: int) -> None:
        snapshot = snapshot_of(numbered_rows(rows), self.dataset.last_generation + 1, monotonic.seconds())
        self.dataset.publish(snapshot)

    async def follows(self, leader: Process) -> None:
        await until(lambda: self.dataset.last_generation == leader.dataset.last_generation)


class Statuses(TestCase):
    timeout = 120

    async def test_roles(self) -> None:
        """A replica names the leader and its epoch, and shows the Valkey as the source; another leader has another."""
        with running_valkey() as server:
            first, second = Process(self, server, "first"), Process(self, server, "second")
            self.assertEqual((second.status.role, second.status.process), ("replica", "second"))
            self.assertIsNone(second.status.leader)
            first.serve(100)
            first.unit.gained()
            await second.follows(first)
            await until(lambda: first.status.role == "leader" and second.status.leader == "first")
            self.assertEqual((first.status.leader, first.status.lag, first.dataset.silent_s()), ("first", None, 0.0))
            self.assertEqual((second.status.role, second.status.lag), ("replica", 0))
            self.assertEqual(second.status.epoch, first.status.epoch)
            sources = [each.dataset.snapshot and each.dataset.snapshot.source for each in (first, second)]
            self.assertEqual(sources, ["postgres", "valkey"])
            epoch = first.status.epoch
            assert epoch is not None
            first.unit.gained()  # as after a reload
            first.unit.lost()
            self.assertEqual((first.status.role, first.status.lead_changes), ("replica", 2))
            second.unit.gained()
            await until(lambda: first.status.leader == "second" and second.status.role == "leader")
            self.assertGreater(first.status.epoch or 0, epoch)

    async def test_a_replica_that_lacks_a_piece(self) -> None:
        """It knows how many generations it lacks, and why."""
        with running_valkey() as server:
            leader, replica = Process(self, server, "leader"), Process(self, server, "replica")
            leader.serve(100)
            leader.unit.gained()
            await replica.follows(leader)
            replica.unit.stop()
            leader.serve(90)
            await until(lambda: leader.status.epoch is not None)

            async def published() -> bool:
                manifest = await replica.replica._store.current()
                return manifest is not None and manifest.members["products"].generation == 2

            while not await published():
                await deferLater(reactor, 0.01)
            for key in server.cli("KEYS", "*}:*:0").split():
                server.cli("DEL", key)
            replica.unit.start()
            await until(lambda: replica.status.valkey_problem is not None)
            self.assertIn("not there any more", replica.status.valkey_problem or "")
            self.assertEqual((replica.status.lag, replica.dataset.last_generation), (1, 1))

    async def test_a_leader_that_can_load_nothing(self) -> None:
        """Its first generation is greater than the published one, although it has neither those rows nor others."""
        with running_valkey() as server:
            first, second = Process(self, server, "first"), Process(self, server, "second")
            second.unit.stop()
            for rows in (100, 90, 80):
                first.serve(rows)
            first.unit.gained()

            async def published() -> bool:
                return await first.replica._store.current() is not None

            while not await published():
                await deferLater(reactor, 0.01)
            first.unit.lost()
            first.unit.stop()
            for key in server.cli("KEYS", "*}:*:0").split():
                server.cli("DEL", key)
            second.unit.start()
            second.unit.gained()
            await until(lambda: second.status.epoch is not None and second.status.leader == "second")
            self.assertIsNone(second.dataset.snapshot)
            second.serve(70)
            self.assertEqual(second.dataset.last_generation, 1000)

    async def test_numbers_that_a_lost_leader_may_have_used(self) -> None:
        """The next leader publishes what it serves again, under the next multiple of 1,000; the same one does not."""
        with running_valkey() as server:
            first, second = Process(self, server, "first"), Process(self, server, "second")
            first.serve(100)
            first.unit.gained()
            await until(lambda: second.dataset.last_generation == 1)
            first.unit.lost()
            first.unit.gained()
            first.serve(90)
            await until(lambda: second.dataset.last_generation == 2)
            first.unit.lost()
            first.serve(80)  # the third, which nobody else gets
            second.unit.gained()
            await until(lambda: first.dataset.last_generation == second.dataset.last_generation == 1000)
            self.assertEqual(second.dataset.snapshot.rows.count, 90)
            self.assertEqual(first.dataset.snapshot.rows.count, 90)

    async def test_a_lead_that_is_lost_while_it_answers(self) -> None:
        """A process that learns what replicas want, and has lost the lead meanwhile, leaves that to the next leader."""
        with running_valkey() as server:
            leader = Process(self, server, "leader")
            leader.serve(100)
            leader.unit.gained()
            await until(lambda: leader.status.epoch is not None)
            store = leader.replica._store
            asked = store.asked

            async def lost_meanwhile(names: Sequence[str]) -> Asked:
                found = await asked(names)
                if found.least:
                    leader.unit.lost()
                return found

            self.patch(store, "asked", lost_meanwhile)
            await store.ask({"products": 10})
            leader.unit.wake()
            await until(lambda: leader.status.role == "replica")
            await deferLater(reactor, 0.05)
            self.assertEqual(leader.dataset.last_generation, 1)

    async def test_a_lead_that_is_won_while_it_follows(self) -> None:
        """The refreshes of a leader begin after its epoch, and so with numbers that no other leader has used."""
        with running_valkey() as server:
            first, second = Process(self, server, "first"), Process(self, server, "second")
            first.serve(100)
            first.unit.gained()
            await second.follows(first)
            load, presents = second.replica.load, list[object]()

            async def won_meanwhile() -> object:
                found = await load()
                if not second.unit.has_lead:
                    first.unit.lost()
                    second.unit.gained()
                return found

            def take_over(name: str, *, stretch: float, delay_s: float) -> None:
                presents.append(second.unit.leading.present)

            self.patch(second.replica, "load", won_meanwhile)
            self.patch(second.refreshing, "take_over", take_over)
            second.unit.wake()
            await until(lambda: presents)
            self.assertIsNotNone(presents[0])

    async def test_problems(self) -> None:
        """A Valkey that is down is a problem of both; a process that hears of no leader for long is alone."""
        with running_valkey() as server:
            leader, replica = Process(self, server, "leader"), Process(self, server, "replica", 1.0)
            leader.serve(100)
            leader.unit.gained()
            await replica.follows(leader)
            server.kill()
            leader.serve(90)
            await until(lambda: leader.status.publish_problem and replica.status.valkey_problem)
            self.assertIn(server.address, leader.status.publish_problem or "")
            self.assertIn(server.address, replica.status.valkey_problem or "")
            replica.lead_problem = "the server is a standby"
            await until(lambda: replica.status.role == "alone" and replica.status.lead_problem is not None)
            self.assertGreaterEqual(replica.dataset.silent_s() or 0.0, 1.0)
            self.assertEqual(replica.refreshing.taken, [("products", 3.0)])
            server.start()
            replica.lead_problem = None
            await until(lambda: replica.status.role == "replica" and replica.dataset.last_generation == 2)
            await until(lambda: leader.status.publish_problem is None and replica.status.valkey_problem is None)
            self.assertEqual(leader.status.role, "leader")

    async def test_alone_with_a_valkey(self) -> None:
        """A process that is alone stays so while only its own reads are new, until a leader publishes again."""
        with running_valkey() as server:
            leader, replica = Process(self, server, "leader"), Process(self, server, "replica", 0.5)
            leader.serve(100)
            leader.unit.gained()
            await replica.follows(leader)
            leader.unit.stop()
            served = replica.dataset.snapshot
            assert served is not None
            # The leader's result becomes stale, and then a read of its own returns the same rows.
            replica.dataset.renew(replace(served, read_at=monotonic.seconds() - 1000))
            await until(lambda: replica.status.role == "alone")
            replica.dataset.renew(replace(served, read_at=monotonic.seconds(), source="postgres"))
            looks = len(replica.roles)
            await until(lambda: len(replica.roles) > looks + 2)
            self.assertEqual(set(replica.roles[looks:]), {"alone"})
            leader.unit.start()
            leader.serve(90)
            await replica.follows(leader)
            await until(lambda: replica.status.role == "replica")

    async def test_observers(self) -> None:
        """They are notified of changes, and not of each look at the Valkey."""
        with running_valkey() as server:
            leader, replica = Process(self, server, "leader"), Process(self, server, "replica")
            leader.serve(100)
            leader.unit.gained()
            await replica.follows(leader)
            await until(lambda: replica.status.leader == "leader")
            seen: list[Event] = []
            replica.dataset.subscribe(seen.append, Noted)
            heard_at = replica.status.heard_at or 0.0
            await until(lambda: (replica.status.heard_at or 0.0) > heard_at)
            self.assertEqual(seen, [])
            leader.unit.lost()
            replica.unit.gained()
            await until(lambda: seen)
