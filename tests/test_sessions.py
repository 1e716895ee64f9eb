"""Kept sessions: few logins, nothing of one use left for the next, and no place taken that somebody else needs."""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.base.errors import NoSessionLeft, QueryFailed
from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres import idle_sessions
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.listening.calls import Observer
from cacheservice.sources.postgres.listening.listener import Listener
from cacheservice.sources.postgres.listening.opening import Access
from cacheservice.sources.postgres.listening.pace import Pace
from cacheservice.sources.postgres.target import parse
from tests.kit import pgbouncer
from tests.kit.datasets import rows_builder
from tests.kit.guard import LONG_S, GuardTestCase
from tests.kit.listening import Diary
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.postgres import connect, sessions
from tests.kit.readings import read_one
from tests.kit.waiting import until


class SessionsTestCase(GuardTestCase):
    async def setUp(self) -> None:
        await super().setUp()
        self.roles: list[str] = []
        self.addCleanup(self.drop_roles)

    def make_role(self, limit: int = -1, **settings: str) -> str:
        role = f"role{len(self.roles)}_{self.database_name}"
        with self.side.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'reads' CONNECTION LIMIT {limit}")
            for name, value in settings.items():
                cursor.execute(f"ALTER ROLE {role} SET {name} = '{value}'")
        self.roles.append(role)
        return role

    async def drop_roles(self) -> None:
        for role in self.roles:
            await until(lambda role=role: not self.ask("SELECT FROM pg_stat_activity WHERE usename = %s", role))
            with self.side.cursor() as cursor:
                cursor.execute(f"DROP ROLE {role}")

    def as_role(self, role: str) -> Database:
        return self.make_database(self.server.port, user=role, password="reads")

    def make_listener(self, role: str, diary: Diary, **options: float) -> Listener:
        listener = Listener(
            Access(
                parse(self.server.dsn(database=self.database_name, user=role, password="reads")),
                self.direct.connector,
                LONG_S,
            ),
            Observer(diary.heard, diary.missed),
            self.status,
            reactor,
            diary.log,
            Pace(**options),
        )
        listener.listen_to(["changes"])
        self.addCleanup(lambda: listener.stopService() if listener.running else None)
        return listener

    async def read_one(
        self, sql: str, database: Database | None = None, name: str = "things", interval_s: float = 5.0, **more: Any
    ) -> str:
        """Refresh a dataset of one row; returns its one value as text."""
        settings = {"name": name, "query": f"SELECT 1 AS id, ({sql})::text AS value", "key": ("id",), "timeout_s": 60.0}
        dataset = DatasetSettings.model_validate({**settings, "interval_s": interval_s, **more})
        reading = await read_one(database or self.direct, dataset, rows_builder)
        ((_, document),) = reading.rows.finish().items()
        value: str = json.loads(document)["value"]
        return value

    async def pid(self, database: Database | None = None, **more: Any) -> str:
        """Of the server process that a refresh is read by."""
        return await self.read_one("SELECT pg_backend_pid()", database, **more)

    def logins(self) -> int:
        ((count,),) = self.ask("SELECT sessions FROM pg_stat_database WHERE datname = %s", self.database_name)
        return int(count)


class KeptTests(SessionsTestCase):
    """Whether the next refresh logs in again."""

    async def test_fifty_datasets(self) -> None:
        """Of fifty datasets every 5 s, two at a time, four rounds cost two logins, not two hundred."""
        pids = set()
        for _ in range(4):
            for number in range(0, 50, 2):
                pids |= set(await gatherResults([self.pid_of(f"d{number}"), self.pid_of(f"d{number + 1}")]))
        self.assertEqual(len(pids), 2)
        self.assertEqual(self.status.connections, 2)

    def pid_of(self, name: str) -> Deferred[str]:
        return Deferred.fromCoroutine(self.pid(name=name))

    async def test_a_next_use_that_is_far_away(self) -> None:
        """A dataset that is read once an hour holds no session meanwhile; another one's interval keeps it."""
        await self.pid(interval_s=3600.0)
        self.assertEqual(self.status.connections, 0)
        await self.pid(name="often", interval_s=5.0)
        self.assertEqual(await self.pid(interval_s=3600.0), await self.pid(interval_s=3600.0))
        self.assertEqual(self.status.connections, 1)

    async def test_a_session_that_the_server_ended(self) -> None:
        """It is noticed before it is used, and is not a failure of the refresh."""
        for _ in range(10):
            pid = await self.pid()
            self.ask("SELECT pg_terminate_backend(%s, 5000)", int(pid))
            self.assertNotEqual(await self.pid(), pid)
            self.assertEqual(self.status.connections, 1)

    async def test_a_server_that_was_restarted(self) -> None:
        await self.pid()
        self.side.close()
        await deferToThread(self.server.restart, "immediate")
        self.side = connect(self.server)
        await self.pid()
        self.assertEqual(self.status.connections, 1)

    async def test_never_after_a_failure(self) -> None:
        """Nobody knows what it left behind."""
        pid = await self.pid()
        await self.assertFailure(Deferred.fromCoroutine(self.read_one("SELECT 1 / 0")), QueryFailed)
        self.assertEqual(self.status.connections, 0)
        self.assertNotEqual(await self.pid(), pid)

    async def test_renewed_in_time(self) -> None:
        """After its lifetime a session is opened again: to see another address, another role's settings."""
        self.patch(idle_sessions, "LIFETIME_S", 0.3)
        pid = await self.pid()
        self.assertEqual(await self.pid(), pid)
        await deferLater(reactor, 0.4)
        self.assertNotEqual(await self.pid(), pid)

    async def test_idle_sessions_end(self) -> None:
        """One that nobody uses any more ends by itself."""
        self.patch(idle_sessions, "IDLE_LIMIT_S", 0.2)
        await self.pid()
        self.assertEqual(self.status.connections, 1)
        await until(lambda: self.status.connections == 0)
        await until(lambda: not sessions(self.server, self.database_name))

    async def test_another_connection_string(self) -> None:
        """No session of the old one is used again, not even one that was busy meanwhile."""
        database = self.make_database(self.server.port)
        old = Deferred.fromCoroutine(self.read_one("SELECT pg_backend_pid() FROM pg_sleep(0.3)", database))
        await deferLater(reactor, 0.1)
        other = parse(self.server.dsn(database=self.database_name, port=self.network.port))
        database.configure(other, LONG_S)
        pid = await old
        self.assertEqual(self.status.connections, 0)
        self.assertNotEqual(await self.pid(database), pid)
        self.assertEqual(len(self.network.links), 1)

    async def test_stopped(self) -> None:
        await self.pid()
        self.direct.stop()
        self.assertEqual(self.status.connections, 0)


class NothingLeftTests(SessionsTestCase):
    """What a query did to its session is not there for the next one."""

    async def test_settings_locks_and_roles(self) -> None:
        with closing(connect(self.server, self.database_name)) as connection, connection.cursor() as cursor:
            cursor.execute(
                "CREATE FUNCTION lock_for_good() RETURNS text LANGUAGE sql AS 'SELECT pg_advisory_lock(42)::text'"
            )
            cursor.execute("GRANT pg_monitor TO postgres")
        pid = await self.pid()
        for left, seen in (
            ("SELECT set_config('bytea_output', 'escape', false)", "SELECT current_setting('bytea_output')"),
            ("SELECT set_config('app.tenant', '7', false)", "SELECT current_setting('app.tenant', true)"),
            ("SELECT set_config('role', 'pg_monitor', false)", "SELECT current_user"),
            ("SELECT set_config('work_mem', '64kB', false)", "SELECT current_setting('work_mem')"),
            ("SELECT public.lock_for_good()", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"),
        ):
            before = await self.read_one(seen)
            await self.read_one(left)
            self.assertIn(await self.read_one(seen), (before, ""), left)
        self.assertEqual(await self.pid(), pid)

    async def test_behind_pgbouncer(self) -> None:
        """There a kept session costs no login, and nothing is sent that would touch another client's session."""
        if pgbouncer.PROGRAM is None:
            pytest.skip(pgbouncer.NEEDED)
        bouncer = running_pgbouncer(self.server, pool_size=1)
        dsn = await deferToThread(bouncer.__enter__)
        self.addCleanup(deferToThread, bouncer.__exit__, None, None, None)
        database = Database(reactor, parse(dsn(database=self.database_name)), LONG_S, self.status)
        self.addCleanup(database.stop)
        with closing(psycopg2.connect(dsn(database=self.database_name))) as stranger, stranger.cursor() as cursor:
            stranger.autocommit = True
            cursor.execute("SET work_mem = '77kB'")
            for _ in range(5):
                await self.pid(database)
            await deferToThread(cursor.execute, "SHOW work_mem")
            self.assertEqual(cursor.fetchone(), ("77kB",))
            await deferToThread(cursor.execute, "SHOW idle_session_timeout")
            self.assertEqual(cursor.fetchone(), ("0",))
        self.assertEqual(self.status.connections, 1)


class RoleSettingsTests(SessionsTestCase):
    """Time-outs that were set for the role or the database."""

    async def test_idle_session_timeout(self) -> None:
        """A kept session outlives it."""
        database = self.as_role(self.make_role(idle_session_timeout="200ms"))
        pid = await self.pid(database)
        for _ in range(3):
            await deferLater(reactor, 0.5)
            self.assertEqual(await self.pid(database), pid)

    async def test_transaction_timeout(self) -> None:
        """PostgreSQL 17 and later; a refresh has its own deadline."""
        ((version,),) = self.ask("SELECT current_setting('server_version_num')::int")
        settings = {"transaction_timeout": "300ms"} if version >= 170000 else {}
        role = self.make_role(statement_timeout="300ms", idle_in_transaction_session_timeout="300ms", **settings)
        self.assertEqual(await self.read_one("SELECT 7 FROM pg_sleep(1)", self.as_role(role)), "7")

    async def test_the_listener_outlives_idle_session_timeout(self) -> None:
        """It is one session from the start on, and nothing is read in full because it was lost."""
        diary = Diary()
        listener = self.make_listener(self.make_role(idle_session_timeout="300ms"), diary)
        listener.startService()
        await until(lambda: self.status.listening)
        await deferLater(reactor, 1.5)
        self.assertTrue(self.status.listening)
        self.assertEqual([entry for entry in diary if entry[0] == "listening_lost"], [])


class FewConnectionsTests(SessionsTestCase):
    """A role with few connections: refreshes go first."""

    async def test_one_connection_and_a_listener(self) -> None:
        """The listener gives up its session; no refresh fails, and the status shows why nothing is heard."""
        role = self.make_role(limit=1)
        listener = self.make_listener(role, Diary())
        listener.startService()
        await until(lambda: self.ask("SELECT FROM pg_stat_activity WHERE usename = %s", role))
        database = self.as_role(role)
        database.make_room_by(listener.give_up_session)
        for _ in range(5):
            await self.pid(database)
        await until(lambda: self.status.listening_problem)
        self.assertFalse(self.status.listening)
        self.assertIn("no connection is left for listening", self.status.listening_problem or "")
        await listener.stopService()

    async def test_a_listener_that_is_being_connected(self) -> None:
        """A listener that is still logging in may hold the only connection, and releases it."""
        role = self.make_role(limit=1)
        listener = self.make_listener(role, Diary())
        self.assertFalse(listener.give_up_session())
        listener.startService()
        self.assertTrue(listener.give_up_session())
        self.assertIn("a refresh needed the connection", self.status.listening_problem or "")
        database = self.as_role(role)
        database.make_room_by(listener.give_up_session)
        await self.pid(database)
        await listener.stopService()

    async def test_a_login_that_was_refused_for_another(self) -> None:
        """Of two logins at a time both may be refused, because each counts as a session; one more is tried."""
        role = self.make_role(limit=1)
        other = psycopg2.connect(self.server.dsn(role, "reads", database=self.database_name))
        asked: list[bool] = []

        def give_nothing() -> bool:
            if not asked:
                other.close()
                while self.ask("SELECT FROM pg_stat_activity WHERE usename = %s", role):
                    time.sleep(0.01)
            asked.append(False)
            return False

        database = self.as_role(role)
        database.make_room_by(give_nothing)
        await self.pid(database)
        self.assertEqual(asked, [False])

    async def test_a_role_without_a_connection(self) -> None:
        """Where the server stays full, an attempt ends after a few logins."""
        role = self.make_role(limit=1)
        with closing(psycopg2.connect(self.server.dsn(role, "reads", database=self.database_name))):
            asked: list[bool] = []
            database = self.as_role(role)
            database.make_room_by(lambda: bool(asked.append(False)))
            with self.assertRaises(NoSessionLeft):
                await self.pid(database)
        self.assertEqual(len(asked), 4)

    async def test_one_connection_and_many_datasets(self) -> None:
        """They follow each other: a limit below max_connections makes refreshes wait, not fail."""
        database = self.as_role(self.make_role(limit=1))
        reads = [
            Deferred.fromCoroutine(self.read_one("SELECT pg_backend_pid() FROM pg_sleep(0.05)", database, name=f"d{n}"))
            for n in range(10)
        ]
        results = await DeferredList(reads, consumeErrors=True)
        self.assertEqual([str(result) for succeeded, result in results if not succeeded], [])

    async def test_an_idle_session_does_not_take_the_last_connection(self) -> None:
        """Two services of one role with a limit of two: each finds a connection whenever it needs one."""
        role = self.make_role(limit=2)
        one, other = self.as_role(role), self.as_role(role)
        for _ in range(5):
            await self.pid(one)
            await self.pid(other)
            await self.pid(self.as_role(role))

    async def test_none_at_all(self) -> None:
        """With nothing to give up, the failure is reported at once."""
        database = self.as_role(self.make_role(limit=0))
        error = await self.assertFailure(Deferred.fromCoroutine(self.pid(database)), NoSessionLeft)
        self.assertIn("CONNECTION LIMIT", error.advice)
