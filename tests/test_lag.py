"""Laws of the lag: an age on a standby never understates, whatever keeps it from its primary; idleness is not lag."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from pydantic import SecretStr
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.base import shipped
from cacheservice.cache.cache import Cache
from cacheservice.cache.lag import NO_LAG
from cacheservice.config import PostgresSettings
from cacheservice.sources.base import ReadPlan, ReadResult
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.inspect import inspecting
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.target import parse
from tests.kit import views
from tests.kit.datasets import rows_builder
from tests.kit.service import declare
from tests.kit.standby import Standby, running_standby
from tests.kit.versions import MakeServer
from tests.kit.waiting import until


@pytest.mark.usefixtures("server_maker")
class OnStandbys(TestCase):
    make_server: MakeServer
    timeout = 90

    async def setUp(self) -> None:
        self.directory = await deferToThread(self.start)

    def start(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        self.server = self.make_server(directory)
        self.server.start()
        self.addCleanup(self.server.stop, "immediate")
        self.sql("CREATE TABLE things (id int PRIMARY KEY, n int); INSERT INTO things VALUES (1, 0)")

    def sql(self, statement: str) -> None:
        with closing(psycopg2.connect(self.server.dsn())) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement)

    async def standby(self, *, of: Standby | None = None, streaming: bool = True, **settings: str) -> Standby:
        running = running_standby(self.server, settings, of, streaming=streaming)
        standby = await deferToThread(running.__enter__)
        self.addCleanup(deferToThread, running.__exit__, None, None, None)
        return standby

    def reader(self, dsn: str) -> Database:
        self.cache = Cache([], reactor.seconds)
        database = Database(reactor, parse(dsn), 30.0, self.cache.database)
        self.addCleanup(database.stop)
        return database

    async def read(self, database: Database) -> ReadResult:
        (reading,) = await database.read([ReadPlan(declare("things"), rows_builder)])
        self.assertAlmostEqual(reading.moment.began_at - reading.moment.read_at, reading.moment.lag.seconds)
        return reading

    async def until_lag(self, database: Database, least_s: float, words: str) -> ReadResult:
        """Read until the lag is known to be as much; it names its cause."""
        while True:
            reading = await self.read(database)
            if reading.moment.lag.seconds >= least_s:
                self.assertIn(words, reading.moment.lag.problem)
                self.assertIn(words, views.status_table(self.cache))
                return reading
            await deferLater(reactor, 0.05)

    async def caught_up(self, database: Database) -> None:
        while (await self.read(database)).moment.lag != NO_LAG:
            await deferLater(reactor, 0.05)

    async def test_idle_paused_and_dead(self) -> None:
        """An idle primary is not lag; a paused replay is, and a primary that is dead."""
        self.assertEqual((await self.read(self.reader(self.server.dsn()))).moment.lag, NO_LAG)
        standby = await self.standby()
        database = self.reader(standby())
        await self.caught_up(database)
        await deferLater(reactor, 2.0)
        self.assertEqual((await self.read(database)).moment.lag, NO_LAG)
        self.assertIn(", a standby\n", views.status_table(self.cache) + "\n")
        await deferToThread(standby.sql, "SELECT pg_wal_replay_pause()")
        self.sql("UPDATE things SET n = 1")
        reading = await self.until_lag(database, 1.5, "paused")
        self.assertTrue(reading.moment.lag.known)
        await deferToThread(standby.sql, "SELECT pg_wal_replay_resume()")
        await self.caught_up(database)
        await deferToThread(self.server.stop, "immediate")
        await self.until_lag(database, 1.5, "receives nothing")
        await deferToThread(self.server.start)
        await self.caught_up(database)

    async def test_frozen(self) -> None:
        """A receiver that is frozen, and a primary that is, are noticed after half of wal_receiver_timeout."""
        standby = await self.standby(wal_receiver_timeout="2s")
        database = self.reader(standby())
        await self.caught_up(database)
        receiver = await deferToThread(standby.receiver)
        os.kill(receiver, signal.SIGSTOP)
        try:
            self.sql("UPDATE things SET n = 2")
            reading = await self.until_lag(database, 6.5, "heard nothing")
            self.assertTrue(reading.moment.lag.known)
        finally:
            os.kill(receiver, signal.SIGCONT)
        await self.caught_up(database)

    async def test_a_role_that_may_not_see_it(self) -> None:
        """Its lag is unknown and conservative, the GRANT is named, and helps."""
        standby = await self.standby()
        self.sql("CREATE ROLE reader LOGIN PASSWORD 'reader'; GRANT SELECT ON things TO reader")
        await until(lambda: standby.sql("SELECT 1 FROM pg_roles WHERE rolname = 'reader'"))
        database = self.reader(standby(user="reader", password="reader"))
        reading = await self.until_lag(database, 1.5, "GRANT pg_read_all_stats TO reader")
        self.assertFalse(reading.moment.lag.known)
        self.sql("GRANT pg_read_all_stats TO reader")
        await self.caught_up(database)

    async def test_a_role_that_sees_it_by_the_function(self) -> None:
        """A reader sees it by the migrations' function if the owner of that may; else migrate names the GRANT, and
        check --db does."""
        standby = await self.standby()
        self.sql("CREATE ROLE owner; CREATE ROLE unrelated LOGIN PASSWORD 'unrelated'")
        owner = self.server.dsn()
        await deferToThread(migrate, owner, shipped.folder("migrations"))
        self.assertIsNone((await deferToThread(create_reader, owner, "reader", ["things"], "reader")).grant)
        await until(lambda: standby.sql("SELECT 1 FROM pg_roles WHERE rolname = 'reader' AND rolconnlimit = 20"))
        dsn = standby(user="reader", password="reader")
        database = self.reader(dsn)
        await self.caught_up(database)
        await deferLater(reactor, 2.0)
        self.assertEqual((await self.read(database)).moment.lag, NO_LAG)
        self.assertEqual(await deferToThread(self.hints, dsn), [])
        with self.assertRaises(psycopg2.errors.InsufficientPrivilege):
            standby.sql("SELECT pid FROM cacheservice.wal_receiver()", user="unrelated", password="unrelated")
        # Owned by a role that sees no more itself, it helps nobody, and does not hide what a reader may see.
        await deferToThread(migrate, owner, shipped.folder("migrations"), "owner")
        grant = (await deferToThread(create_reader, owner, "reader")).grant
        self.assertEqual(grant, 'GRANT pg_read_all_stats TO "reader";')
        await self.until_lag(database, 1.5, "GRANT pg_read_all_stats TO reader")
        (hint,) = await deferToThread(self.hints, dsn)
        self.assertIn("GRANT pg_read_all_stats TO reader;", hint)
        self.sql(grant)
        await self.caught_up(database)
        self.assertEqual(await deferToThread(self.hints, dsn), [])
        self.assertIsNone((await deferToThread(create_reader, owner, "reader")).grant)

    def hints(self, dsn: str) -> list[str]:
        """What check --db reports about the server."""
        with inspecting(PostgresSettings(dsn=SecretStr(dsn)), []) as inspector:
            return [finding.todo for finding in inspector.server.findings]

    async def test_from_an_archive_and_late(self) -> None:
        """A standby that only restores an archive counts from its last commit; one that replays late is reported."""
        standby = await self.standby(streaming=False, restore_command="false")
        self.sql("UPDATE things SET n = 3")
        database = self.reader(standby())
        reading = await self.until_lag(database, 1.5, "receives nothing")
        self.assertFalse(reading.moment.lag.known)
        late = await self.standby(recovery_min_apply_delay="1h")
        database = self.reader(late())
        self.sql("UPDATE things SET n = 4")
        await self.until_lag(database, 1.0, "recovery_min_apply_delay")

    async def test_a_cascade(self) -> None:
        """The standby of a standby is up to date while it hears from that one."""
        first = await self.standby()
        second = await self.standby(of=first)
        database = self.reader(second())
        self.sql("UPDATE things SET n = 5")
        await self.caught_up(database)
        first.process.send_signal(signal.SIGQUIT)
        await self.until_lag(database, 1.0, "receives nothing")
