"""Leads on a real server: there is one leader of each unit, and another one soon after it is lost, however that is."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor

from cacheservice.sources.postgres.leads import LeadObserver, Leads, LeadSettings
from cacheservice.sources.postgres.listening.opening import Access
from cacheservice.sources.postgres.target import parse
from tests.kit.guard import LONG_S, GuardTestCase
from tests.kit.logs import Log
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.standby import running_standby
from tests.kit.waiting import until

QUICK: dict[str, Any] = {"heartbeat_s": 0.05, "retry_initial_s": 0.02, "retry_max_s": 0.1, "retry_slowly_s": 0.1}
PATIENT = QUICK | {"silent_s": LONG_S}
UNITS = ("dataset/products", "group/shop")


class Candidate:
    """A process that competes, and what it has been notified of."""

    def __init__(self, test: LeadsTestCase, dsn: str, prefix: str = "cs", **pace: float) -> None:
        self.log = Log()
        self.events: list[tuple[str, str]] = []
        access = Access(parse(dsn), test.direct.connector, LONG_S)
        observer = LeadObserver(
            lambda unit: self.events.append(("gained", unit)), lambda unit: self.events.append(("lost", unit))
        )
        self.leads = Leads(LeadSettings(prefix, **PATIENT | pace), access, test.status, reactor, self.log)
        self.leads.notify(observer)
        self.leads.compete_for(UNITS)
        self.leads.startService()
        test.addCleanup(self.leads.stopService)

    def has_all(self) -> bool:
        return self.leads.held == set(UNITS)


class LeadsTestCase(GuardTestCase):
    def candidate(self, *, through_network: bool = False, **pace: float) -> Candidate:
        port = {"port": self.network.port} if through_network else {}
        return Candidate(self, self.server.dsn(database=self.database_name, **port), **pace)

    async def leader_and_other(self, **pace: float) -> tuple[Candidate, Candidate]:
        """One that has all leads, through the faulty network, and another one that has tried to get them."""
        leader = self.candidate(through_network=True, **pace)
        await until(leader.has_all)
        other = self.candidate()
        await until(lambda: other.leads.problem is None and self.status.connections == 2)
        return leader, other


class OneLeader(LeadsTestCase):
    async def test_it_stays(self) -> None:
        """The others get nothing while it has the leads, and everything once it stops."""
        leader, other = await self.leader_and_other()
        self.assertEqual((leader.has_all(), other.events), (True, []))
        await leader.leads.stopService()
        self.assertEqual(leader.events[2:], [("lost", unit) for unit in UNITS])
        await until(other.has_all)
        self.assertEqual(other.events, [("gained", unit) for unit in UNITS])

    async def test_other_prefixes_are_independent(self) -> None:
        leader = self.candidate()
        await until(leader.has_all)
        other = Candidate(self, self.server.dsn(database=self.database_name), "elsewhere")
        await until(other.has_all)
        self.assertTrue(leader.has_all())

    async def test_units_that_are_not_wanted_any_more(self) -> None:
        """They are released at once; the rest stays."""
        leader, other = await self.leader_and_other()
        leader.leads.compete_for(UNITS[:1])
        await until(lambda: other.leads.held == {UNITS[1]})
        self.assertEqual(leader.leads.held, {UNITS[0]})

    async def test_no_units(self) -> None:
        """Without units the leads are given up, and there is no session, until there are units again."""
        leader = self.candidate()
        await until(leader.has_all)
        self.assertTrue(leader.leads.can_refresh)
        leader.leads.compete_for(())
        await until(lambda: self.status.connections == 0)
        self.assertEqual(leader.events[2:], [("lost", unit) for unit in UNITS])
        self.assertEqual((leader.leads.problem, leader.leads.can_refresh), (None, False))
        leader.leads.compete_for(UNITS)
        self.assertIsNotNone(leader.leads.problem)
        await until(leader.has_all)

    async def test_a_killed_session(self) -> None:
        """The leader is notified, and there is a leader again, the same one or another."""
        leader, other = await self.leader_and_other()
        self.ask("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        await until(lambda: ("lost", UNITS[0]) in leader.events)
        for unit in UNITS:
            await until(lambda unit=unit: (unit in leader.leads.held) is not (unit in other.leads.held))
        self.assertIn("lead_session_lost", leader.log.names())

    async def test_a_silent_network(self) -> None:
        """A leader that is cut off gives up, and the server ends its session, so that another one can lead."""
        leader, other = await self.leader_and_other(silent_s=1.0)
        self.network.silence()
        await until(other.has_all)
        await until(lambda: not leader.leads.held)
        self.assertEqual(leader.events.count(("lost", UNITS[0])), 1)

    async def test_a_suspended_process(self) -> None:
        """The server ends the session of a process that sends nothing, although its connection still exists."""
        leader = self.candidate(heartbeat_s=LONG_S, silent_s=1.0)
        await until(leader.has_all)
        other = self.candidate()
        await until(other.has_all)
        await until(lambda: not leader.leads.held)
        self.assertIn("lead_session_lost", leader.log.names())

    async def test_a_resignation(self) -> None:
        leader, other = await self.leader_and_other()
        leader.leads.resign("a test")
        await until(lambda: bool(other.leads.held or leader.leads.held))
        self.assertEqual(leader.events[2:4], [("lost", unit) for unit in UNITS])


class Impossible(LeadsTestCase):
    async def test_a_standby(self) -> None:
        """A standby would grant the locks to everybody who asks another server."""
        with running_standby(self.server) as standby:
            candidate = Candidate(self, standby(database="postgres"))
            await until(lambda: "is a standby" in (candidate.leads.problem or ""))
            self.assertEqual((candidate.events, candidate.log.names()), ([], ["leads_impossible"]))
            await candidate.leads.stopService()

    async def test_a_pooler(self) -> None:
        """Behind a proxy that pools transactions a lock would belong to the next client."""
        with running_pgbouncer(self.server) as dsn:
            candidate = Candidate(self, dsn(database=self.database_name))
            await until(lambda: "pools transactions" in (candidate.leads.problem or ""))
            self.assertEqual(candidate.events, [])
            self.assertEqual(self.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"), [(0,)])
            await candidate.leads.stopService()
