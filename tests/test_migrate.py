"""Laws of the migrations and of the reader's role, on the real server."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from cacheservice import shipped
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.rows import RowsBuilder
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.errors import LockTimeout, MigrationFailed, QueryFailed
from cacheservice.postgres.database import Database, Reading
from cacheservice.postgres.migrate import create_reader, migrate
from cacheservice.postgres.target import parse
from tests.postgres import connect, fresh_database, query

READER = "a reader"  # quoted wherever it goes


@pytest.mark.usefixtures("server")
class Migrations(TestCase):
    server: EmbeddedPostgres

    def setUp(self) -> None:
        self.database = fresh_database(self.server, self.addCleanup)
        self.owner = self.server.dsn(database=self.database)
        self.addCleanup(self.drop_reader)
        query(self.server, self.database, "CREATE TABLE public.granted AS SELECT 1 AS id")
        query(self.server, self.database, "CREATE TABLE public.secret AS SELECT 1 AS id")
        query(self.server, self.database, 'CREATE SCHEMA "My Shop"')
        query(self.server, self.database, 'CREATE TABLE "My Shop"."Orders" AS SELECT 7 AS id')
        # As docs/deployment.md advises; from 15 on it is so from the start.
        query(self.server, self.database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")

    def drop_reader(self) -> None:
        with closing(connect(self.server, self.database)) as connection, connection.cursor() as cursor:
            cursor.execute(f'DROP OWNED BY "{READER}"') if self.reader_exists() else None
            cursor.execute(f'DROP ROLE IF EXISTS "{READER}"')

    def reader_exists(self) -> bool:
        return bool(query(self.server, "postgres", "SELECT 1 FROM pg_roles WHERE rolname = %s", (READER,)))

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.server, self.database, statement)

    def as_reader(self, statement: str, unset: bool = False) -> list[tuple[Any, ...]]:
        dsn = self.server.dsn(READER, "wörd", self.database)
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            # A session can unset its role's defaults: the grants are what holds.
            cursor.execute("SET default_transaction_read_only = off" if unset else "SELECT 1")
            cursor.execute(statement)
            return list(cursor.fetchall())

    def read(self, sql: str, timeout_s: float = 20) -> Deferred[Reading]:
        target = parse(self.server.dsn(READER, "wörd", self.database))
        database = Database(reactor, target, 5, DatabaseStatus())
        self.addCleanup(database.stop)
        self.rows = RowsBuilder(lambda _: None)
        return database.read(DatasetSettings(name="d", query=sql, key=("id",), timeout_s=timeout_s), self.rows)

    def test_everything_lies_in_a_schema_of_its_own(self) -> None:
        """The migrations and their bookkeeping put nothing into any schema but cacheservice."""
        elsewhere = """
            SELECT count(*) FROM pg_class WHERE relnamespace::regnamespace::text NOT IN
            ('cacheservice', 'pg_catalog', 'information_schema', 'pg_toast')
        """
        before = self.sql(elsewhere)
        self.assertEqual(migrate(self.owner, shipped.folder("migrations"))[:1], ["0001_schema"])
        self.assertEqual(self.sql(elsewhere), before)
        self.assertTrue(self.sql("SELECT 1 FROM pg_class WHERE relnamespace = 'cacheservice'::regnamespace"))

    def test_a_second_run_applies_nothing(self) -> None:
        """Migrating again does nothing and harms nothing."""
        self.assertTrue(migrate(self.owner, shipped.folder("migrations")))
        self.assertEqual(migrate(self.owner, shipped.folder("migrations")), [])

    def test_the_reader_reads_what_it_is_granted_and_nothing_else(self) -> None:
        """A granted table, in whatever schema, can be read; another cannot, and nothing can be written or made."""
        migrate(self.owner, shipped.folder("migrations"))
        for _ in range(2):  # made, then brought to the same state again
            create_reader(self.owner, READER, ["public.granted", '"My Shop"."Orders"'], "wörd")
        self.assertEqual(self.as_reader("SELECT id FROM public.granted"), [(1,)])
        self.assertEqual(self.as_reader('SELECT id FROM "My Shop"."Orders"'), [(7,)])
        self.assertEqual(self.as_reader("SHOW default_transaction_read_only"), [("on",)])
        for statement in (
            "SELECT * FROM public.secret",
            "INSERT INTO public.granted VALUES (2) RETURNING 1",
            "CREATE TABLE public.mine (id int)",
            "CREATE TABLE cacheservice.mine (id int)",
            "SELECT * FROM cacheservice._yoyo_log",
            "SELECT pg_read_file('/etc/hostname')",
            "CREATE ROLE other",
        ):
            with self.assertRaises(psycopg2.errors.InsufficientPrivilege, msg=statement):
                self.as_reader(statement, unset=True)

    def test_the_password_reaches_the_server_only_as_a_verifier(self) -> None:
        """Not even a server that logs every statement writes the reader's password down."""
        self.sql(f"ALTER DATABASE {self.database} SET log_statement = 'all'")
        size = self.server.log_path.stat().st_size
        migrate(self.owner, shipped.folder("migrations"))
        create_reader(self.owner, READER, [], "wörd")
        with self.server.log_path.open("rb") as log:
            log.seek(size)
            written = log.read().decode()
        self.assertIn("SCRAM-SHA-256", written)
        self.assertNotIn("wörd", written)

    def test_a_refusal_is_one_line(self) -> None:
        """What the server refuses is told in one line, without the password."""
        migrate(self.owner, shipped.folder("migrations"))
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(self.owner, READER, ["no.such_table"], "wörd")
        # 14 names the schema.
        self.assertRegex(str(refused.exception), r'(relation "no\.such_table"|schema "no") does not exist')
        wrong = self.server.dsn("nobody", "hidden-word", self.database)
        with self.assertRaises(MigrationFailed) as refused:
            migrate(wrong, shipped.folder("migrations"))
        self.assertNotIn("hidden-word", str(refused.exception))
        self.assertNotIn("\n", str(refused.exception))

    async def test_the_service_reads_as_the_reader(self) -> None:
        """The reader's rights are enough for a refresh, and the lack of one is told with what to do."""
        migrate(self.owner, shipped.folder("migrations"))
        create_reader(self.owner, READER, ["public.granted"], "wörd")
        await self.read("SELECT * FROM granted")
        self.assertEqual(dict(self.rows.finish().items()), {b"1": b'{"id":1}'})
        with self.assertRaises(QueryFailed) as refused:
            await self.read("SELECT * FROM secret")
        self.assertIn("permission denied for table secret", str(refused.exception))
        self.assertIn("GRANT SELECT", refused.exception.advice)

    async def test_the_reader_is_told_who_blocks_it(self) -> None:
        """A role with few rights learns who holds the lock, through the migrations' function, which shows no text."""
        migrate(self.owner, shipped.folder("migrations"))
        create_reader(self.owner, READER, ["public.granted"], "wörd")
        with closing(connect(self.server, self.database)) as holder, holder.cursor() as cursor:
            cursor.execute("/* a comment */ BEGIN")
            cursor.execute("-- another\nLOCK TABLE granted")
            with self.assertRaises(LockTimeout) as failed:
                await self.read("SELECT * FROM granted", timeout_s=1.5)
            (blocker,) = failed.exception.blockers
            self.assertEqual(blocker.pid, holder.info.backend_pid)
        self.assertEqual((blocker.user, blocker.application), ("postgres", "cacheservice tests"))
        self.assertEqual((blocker.lock_mode, blocker.relation), ("AccessExclusiveLock", "public.granted"))
        self.assertEqual((blocker.state, blocker.statement_kind), ("idle in transaction", "LOCK TABLE"))
        self.assertIsNotNone(blocker.transaction_since)

    def test_the_environment_of_a_test_is_clean(self) -> None:
        """No variable of libpq's decides where these tests connect."""
        self.assertEqual([name for name in os.environ if name in {"PGHOST", "PGPORT", "PGSERVICE"}], [])
