"""Which processes of a fleet compete for leads, over a real Valkey: few, but always one that can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from cacheservice.base.interfaces import Clock
from cacheservice.config.valkey_url import parse
from cacheservice.replication.competition import Competition
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.deputy import Deputy
from tests.kit.logs import Log
from tests.kit.valkey import ValkeyServer, running_valkey
from tests.kit.waiting import until

LONG_S = 30.0


class ShiftedClock(Clock):
    """The reactor's timers; the time is as a test sets it."""

    def __init__(self) -> None:
        self.callLater = reactor.callLater
        self.now_s = 1000.0

    def seconds(self) -> float:
        return self.now_s


class Session:
    """Notes which units a process competes for."""

    def __init__(self, looked: Callable[[], None]) -> None:
        self.problem: str | None = None
        self.wanted: list[str] = []
        self._looked = looked

    def compete_for(self, units: Iterable[str]) -> None:
        self.wanted = list(units)
        self._looked()


@dataclass
class Unit:
    has_lead: bool = False
    is_deserted: bool = False


class Process:
    """A process with one unit, whose facts a test changes."""

    def __init__(self, test: TestCase, server: ValkeyServer, name: str) -> None:
        self.name = name
        self.clock = ShiftedClock()
        self.looks = 0
        self.session = Session(self._looked)
        self.unit = Unit()
        valkey = Valkey(parse(f"redis://{server.address}"), reactor, LONG_S)
        test.addCleanup(deferLater, reactor, 0.01)
        test.addCleanup(valkey.close)
        self.competition = Competition(
            lambda: {"dataset/products": self.unit},
            Deputy(valkey, "cs", name),
            self.session,
            self.clock,
            Log(),
            lambda: 0.5,
        )
        test.addCleanup(self.competition.stop)
        self.competition.start()

    def _looked(self) -> None:
        self.looks += 1

    @property
    def competes(self) -> bool:
        return self.session.wanted == ["dataset/products"]

    async def look(self) -> bool:
        """Look now; return whether the process competes."""
        for _ in range(2):  # the first one may have begun before
            looks = self.looks
            self.competition.look()
            await until(lambda looks=looks: self.looks > looks)  # type: ignore[misc]
        return self.competes


class Competing(TestCase):
    timeout = 120

    async def test_one_waits(self) -> None:
        """One of three waits for leads; after its end another one does."""
        with running_valkey() as server:
            fleet = [Process(self, server, "same name") for _ in range(3)]
            await until(lambda: all(process.looks > 1 for process in fleet))
            (deputy,) = [process for process in fleet if process.competes]
            deputy.competition.stop()
            rest = [process for process in fleet if process is not deputy]
            await until(lambda: any(process.competes for process in rest))
            self.assertEqual([await process.look() for process in rest].count(True), 1)

    async def test_a_leader_is_no_deputy(self) -> None:
        """A process with a lead goes on competing for all leads, and another one is the deputy at once."""
        with running_valkey() as server:
            leader, other = Process(self, server, "leader"), Process(self, server, "other")
            await until(lambda: leader.competes or other.competes)
            if other.competes:
                leader, other = other, leader
            leader.unit.has_lead = True
            self.assertTrue(await leader.look())
            self.assertNotIn(leader.name, server.cli("GET", "cs:deputy"))
            self.assertEqual((await other.look(), await leader.look()), (True, True))
            leader.unit.has_lead = False
            self.assertFalse(await leader.look())

    async def test_one_that_cannot_win(self) -> None:
        """A deputy that has no session for long makes room, and comes back later."""
        with running_valkey() as server:
            deputy = Process(self, server, "deputy")
            await until(lambda: deputy.competes)
            other = Process(self, server, "other")
            deputy.session.problem = "the database is down"
            self.assertTrue(await deputy.look())
            deputy.clock.now_s += 4
            self.assertTrue(await deputy.look())
            deputy.clock.now_s += 2
            self.assertFalse(await deputy.look())
            # Now a look asks nobody. It must not change the leads in the turn of its call, which may be theirs.
            looks = deputy.looks
            deputy.competition.look()
            self.assertEqual(deputy.looks, looks)
            deputy.session.problem = None
            self.assertTrue(await other.look())
            other.unit.has_lead = True
            await other.look()
            deputy.clock.now_s += 9
            self.assertFalse(await deputy.look())
            deputy.clock.now_s += 2
            self.assertTrue(await deputy.look())

    async def test_no_leader_helps(self) -> None:
        """A process that has heard of no leader for long competes, too, after a pause of some seconds."""
        with running_valkey() as server:
            deputy = Process(self, server, "deputy")
            await until(lambda: deputy.competes)
            other = Process(self, server, "other")
            await until(lambda: other.looks > 0)
            other.unit.is_deserted = True
            self.assertFalse(await other.look())
            other.clock.now_s += 3
            self.assertTrue(await other.look())
            other.unit.is_deserted = False
            self.assertFalse(await other.look())

    async def test_without_the_valkey(self) -> None:
        """Each stays what it is, even a leader that loses its lead, and all is as before once the Valkey is back."""
        with running_valkey() as server:
            leader = Process(self, server, "leader")
            await until(lambda: leader.competes)
            leader.unit.has_lead = True
            await leader.look()
            deputy = Process(self, server, "deputy")
            await until(lambda: deputy.competes)
            other = Process(self, server, "other")
            await until(lambda: other.looks > 0)
            server.kill()
            leader.unit.has_lead = False
            fleet = (leader, deputy, other)
            self.assertEqual([await process.look() for process in fleet], [True, True, False])
            server.start()
            deputy.unit.has_lead = True
            await deputy.look()
            await until(lambda: [process.competes for process in (leader, other)].count(True) == 1)
