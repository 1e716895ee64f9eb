"""Laws of following an attempt: one id names it in the log, in `show`, and in all that the server shows of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres.target import parse
from tests.kit import views
from tests.kit.postgres import query, sessions
from tests.kit.service import ServiceTestCase, declare
from tests.kit.waiting import until

STARTED = ("refresh_published", "refresh_unchanged", "refresh_held", "refresh_failed")


class Seen(NamedTuple):
    """A session of an attempt as pg_stat_activity shows it."""

    application_name: str
    query: str


class TracingTests(ServiceTestCase):
    async def served(self, *settings: DatasetSettings) -> Cache:
        service, cache = self.make_service(*settings)
        await self.start_and_load(service, cache)
        return cache

    async def seen(self, statement: str) -> Seen:
        """The session whose statement holds that word, once there is one."""

        def found() -> list[Seen]:
            return [
                Seen(session.application_name, session.query)
                for session in sessions(self.server, self.database_name)
                if statement in session.query and session.state == "active"
            ]

        await until(lambda: bool(found()))
        return found()[0]

    def attempts(self, dataset: str) -> list[tuple[str, str]]:
        """(event, id) of the lines in the log."""
        return [(e, f["attempt"]) for e, f in self.log.events if e in STARTED and f["dataset"] == dataset]

    async def test_a_refresh_that_hangs(self) -> None:
        """A statement at the server leads to the log line of its attempt, and the other way round."""
        service, cache = self.make_service(declare("slow", "SELECT 1 AS id, pg_sleep(1.5)::text AS slept"))
        service.startService()
        session = await self.seen("MATERIALIZED")
        dataset = cache.dataset("slow")
        await until(lambda: dataset.attempts)
        first = dataset.attempts[0].id
        self.assertRegex(first, "^[0-9a-f]{8}$")
        self.assertEqual(self.attempts("slow")[0], ("refresh_published", first))
        self.assertEqual(session.application_name, f"cacheservice slow {first}")
        self.assertNotIn(first, session.query, "each text would be another statement in pg_stat_statements")
        [line] = [line for line in views.show(dataset, cache).splitlines() if f", id {first}" in line]
        self.assertRegex(line, "^attempt: .* start published in ")

    async def test_each_attempt_has_its_own(self) -> None:
        """No two attempts share an id, however they end."""
        cache = await self.served(declare("things"))
        dataset = cache.dataset("things")
        await self.until_read(dataset, 1)
        await until(lambda: dataset.counts.outcomes["unchanged"])
        self.sql("ALTER TABLE things RENAME TO gone")
        await self.until_failed(dataset)
        logged = self.attempts("things")
        self.assertEqual({event for event, _ in logged}, {"refresh_published", "refresh_unchanged", "refresh_failed"})
        self.assertEqual(len({id for _, id in logged}), len(logged))
        self.assertEqual([attempt.id for attempt in dataset.attempts], [id for _, id in logged][-10:])

    async def test_of_a_group(self) -> None:
        """A group is read in one attempt: its datasets have the id in common, and the server shows the group's name."""
        slow = "SELECT 1 AS id, pg_sleep(1)::text AS slept"
        service, cache = self.make_service(
            declare("one", slow, group="shop */ DROP"), declare("other", group="shop */ DROP")
        )
        service.startService()
        session = await self.seen("MATERIALIZED")
        one, other = (cache.dataset(name) for name in ("one", "other"))
        await until(lambda: one.attempts and other.attempts)
        self.assertEqual(one.attempts[0].outcome, "published", one.attempts[0].error)
        self.assertEqual(one.attempts[0].id, other.attempts[0].id)
        self.assertEqual(session.application_name, f"cacheservice shop */ DROP {one.attempts[0].id}")
        self.assertNotIn(one.attempts[0].id, session.query)

    async def test_the_session_that_waits_for_the_next(self) -> None:
        """A session that is kept between two attempts names none of them."""
        cache = await self.served(declare("things", probe="SELECT 1", interval_s=20.0))
        self.assertEqual(len(cache.dataset("things").attempts), 1)
        [kept] = sessions(self.server, self.database_name)
        self.assertEqual((kept.state, kept.application_name), ("idle", "cacheservice things"))

    async def test_by_statement_timeouts_of_the_server(self) -> None:
        """The server's own log names the attempt with the statement that it ended, if log_line_prefix has %a."""
        self.set_log_line_prefix("%m [%p] %a ")
        self.addCleanup(self.set_log_line_prefix, "%m [%p] ")
        before = len(self.server.log_path.read_text())
        service, cache = self.make_service(declare("slow", "SELECT 1 AS id, pg_sleep(9)", timeout_s=0.6))
        service.startService()
        dataset: Dataset = cache.dataset("slow")
        await until(lambda: dataset.attempts)
        line = f"cacheservice slow {dataset.attempts[0].id} STATEMENT:  WITH"
        await until(lambda: line in self.server.log_path.read_text()[before:])

    def set_log_line_prefix(self, prefix: str) -> None:
        query(self.server, self.database_name, f"ALTER SYSTEM SET log_line_prefix = '{prefix}'")
        query(self.server, self.database_name, "SELECT pg_reload_conf()")
        while query(self.server, self.database_name, "SHOW log_line_prefix") != [(prefix,)]:
            pass

    def test_a_long_name(self) -> None:
        """PostgreSQL cuts an application_name at 63 bytes; the id is kept, the name before it is cut."""
        target: Any = parse("application_name=reporting")
        name = target.application_name("a" * 63, "0123abcd")
        self.assertEqual((len(name), name[-12:]), (63, "aaa 0123abcd"))
        [(cut,)] = query(self.server, self.database_name, f"SELECT '{name}'::name::text")
        self.assertEqual(cut, name)
