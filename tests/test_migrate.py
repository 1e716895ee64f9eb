"""Laws of the migrations and of the reader's role, on the real server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from cacheservice.base import shipped
from cacheservice.base.errors import LockTimeout, MigrationFailed, QueryFailed
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import ReadResult
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.migrate import migrate, migration_files
from cacheservice.sources.postgres.oldest import too_old
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.watch import watch
from tests.kit import pgbouncer
from tests.kit.datasets import rows_builder
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.postgres import at_least, connect, fresh_database, query
from tests.kit.readings import read_one
from tests.kit.waiting import GIVE_UP_S

READER = "a reader"  # quoted wherever it goes
FOLDER = shipped.folder("migrations")

# What yoyo-migrations 9.0.0 leaves after 0001 and 0002, dumped; the lock is that of a process that was killed.
YOYO = """
CREATE SCHEMA cacheservice;
CREATE TABLE cacheservice._yoyo_log (id varchar(36) PRIMARY KEY, migration_hash varchar(64), migration_id varchar(255),
    operation varchar(10), username varchar(255), hostname varchar(255), comment varchar(255),
    created_at_utc timestamp);
CREATE TABLE cacheservice._yoyo_migration (
    migration_hash varchar(64) PRIMARY KEY, migration_id varchar(255), applied_at_utc timestamp);
CREATE TABLE cacheservice._yoyo_version (version int PRIMARY KEY, installed_at_utc timestamp);
CREATE TABLE cacheservice.yoyo_lock (locked int DEFAULT 1 PRIMARY KEY, ctime timestamp, pid int NOT NULL);
INSERT INTO cacheservice._yoyo_log VALUES
    ('b1d7ad5a-eb76-11f1-b330-02fc00000001', '3d4e49138f5656408afaba66f07f10aded6f025f4a5656e54223548850f73f8a',
     '0001_schema', 'apply', 'root', 'localhost', NULL, '2026-11-28 21:57:24.764552'),
    ('b1e4c67a-eb76-11f1-b330-02fc00000001', '7c1b3f6f22797863b4ff11c375186a5b83c657cd5ea3f2b1ab5c296d35c76d17',
     '0002_changes', 'apply', 'root', 'localhost', NULL, '2026-11-28 21:57:24.842769');
INSERT INTO cacheservice._yoyo_migration VALUES
    ('3d4e49138f5656408afaba66f07f10aded6f025f4a5656e54223548850f73f8a', '0001_schema', '2026-11-28 21:57:24.769097'),
    ('7c1b3f6f22797863b4ff11c375186a5b83c657cd5ea3f2b1ab5c296d35c76d17', '0002_changes', '2026-11-28 21:57:24.851958');
INSERT INTO cacheservice._yoyo_version VALUES (2, '2026-11-28 21:57:24.647691');
INSERT INTO cacheservice.yoyo_lock VALUES (1, '2026-11-28 21:57:24.6', 4711);
"""

# Run as a child: it imports everything, then takes another user id where it may.
MIGRATE = """
import os, sys
from pathlib import Path
from cacheservice.sources.postgres.oldest import too_old
from cacheservice.sources.postgres.migrate import migrate, migration_files
dsn, folder, user = sys.argv[1:]
if user != "-":
    os.setgroups([])
    os.setgid(int(user))
    os.setuid(int(user))
print("begins", flush=True)
print(" ".join(migrate(dsn, Path(folder))))
"""
NO_SUCH_USER = 54_321  # has no entry in /etc/passwd


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

    def read(self, sql: str, timeout_s: float = 20) -> Deferred[ReadResult]:
        target = parse(self.server.dsn(READER, "wörd", self.database))
        database = Database(reactor, target, 5, DatabaseStatus())
        self.addCleanup(database.stop)
        self.rows = rows_builder()
        return read_one(
            database, DatasetSettings(name="d", query=sql, key=("id",), timeout_s=timeout_s), lambda: self.rows
        )

    def test_everything_lies_in_a_schema_of_its_own(self) -> None:
        """The migrations and their bookkeeping put nothing into any schema but cacheservice."""
        elsewhere = """
            SELECT count(*) FROM pg_class WHERE relnamespace::regnamespace::text NOT IN
            ('cacheservice', 'pg_catalog', 'information_schema', 'pg_toast')
        """
        before = self.sql(elsewhere)
        self.assertEqual(migrate(self.owner, FOLDER)[:1], ["0001_schema"])
        self.assertEqual(self.sql(elsewhere), before)
        self.assertTrue(self.sql("SELECT 1 FROM pg_class WHERE relnamespace = 'cacheservice'::regnamespace"))

    def test_a_second_run_applies_nothing(self) -> None:
        """Migrating again does nothing and harms nothing."""
        self.assertTrue(migrate(self.owner, FOLDER))
        self.assertEqual(migrate(self.owner, FOLDER), [])

    def names(self) -> list[str]:
        return [file.stem for file in migration_files(FOLDER)]

    def objects(self) -> list[tuple[Any, ...]]:
        """All that is in the schema, except yoyo's lock, and its owner."""
        return self.sql(
            "SELECT 'table', relname::text, pg_get_userbyid(relowner)::text FROM pg_class "
            "WHERE relnamespace = to_regnamespace('cacheservice') AND relkind = 'r' AND relname <> 'yoyo_lock' "
            "UNION ALL SELECT 'function', proname, pg_get_userbyid(proowner) FROM pg_proc "
            "WHERE pronamespace = to_regnamespace('cacheservice') ORDER BY 1, 2"
        )

    def test_a_database_that_yoyo_migrated(self) -> None:
        """What yoyo-migrations applied is not applied again, and a lock row that it left is not an obstacle."""
        self.sql(YOYO)
        for name in ("0001_schema", "0002_changes"):
            self.sql((FOLDER / f"{name}.sql").read_text())
        self.assertEqual(migrate(self.owner, FOLDER), self.names()[2:])
        upgraded = self.objects()
        self.assertEqual(
            self.sql("SELECT migration_id FROM cacheservice._yoyo_migration ORDER BY 1"), [(n,) for n in self.names()]
        )
        self.sql("DROP SCHEMA cacheservice CASCADE")
        migrate(self.owner, FOLDER)
        self.assertEqual(self.objects(), upgraded)

    def test_a_migration_that_was_applied_and_not_recorded(self) -> None:
        """yoyo could end between the two (it looks up the user's name there); such a schema is completed."""
        self.sql(YOYO)
        self.sql("TRUNCATE cacheservice._yoyo_migration, cacheservice._yoyo_log")
        self.sql((FOLDER / "0001_schema.sql").read_text())
        self.assertEqual(migrate(self.owner, FOLDER), self.names())
        self.assertEqual(migrate(self.owner, FOLDER), [])

    def test_two_at_once(self) -> None:
        """Two runs at the same time apply each migration once, and neither fails."""
        applied: list[list[str]] = []
        runs = [threading.Thread(target=lambda: applied.append(migrate(self.owner, FOLDER))) for _ in range(2)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        self.assertEqual(sorted(name for names in applied for name in names), self.names())

    def test_the_files_that_take_a_migration_back(self) -> None:
        """Run one after the other, the last first, each leaves what was there before, and all can be applied again."""
        seen = []
        for name in self.names():
            seen.append(self.objects())
            folder = Path(tempfile.mkdtemp())
            self.addCleanup(shutil.rmtree, folder)
            for other in self.names()[: len(seen)]:
                shutil.copy(FOLDER / f"{other}.sql", folder)
            self.assertEqual(migrate(self.owner, folder), [name])
        for name in reversed(self.names()):
            self.sql((FOLDER / f"{name}.rollback.sql").read_text())
            before = seen.pop()
            self.assertEqual(self.objects() if seen else [], before)
        self.assertEqual(migrate(self.owner, FOLDER), self.names())

    def child(self, user: int | None = None) -> subprocess.Popen[str]:
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        folder.chmod(0o755)
        for file in migration_files(FOLDER):
            shutil.copy(file, folder)
        environment = {key: value for key, value in os.environ.items() if key not in ("LOGNAME", "USER", "USERNAME")}
        words = [sys.executable, "-c", MIGRATE, self.owner, str(folder), "-" if user is None else str(user)]
        child = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        self.addCleanup(child.communicate)
        self.addCleanup(child.kill)
        return child

    def test_a_user_without_a_name(self) -> None:
        """It runs under a user id that /etc/passwd does not know, as containers have it."""
        child = self.child(NO_SUCH_USER if os.getuid() == 0 else None)
        told, errors = child.communicate(timeout=GIVE_UP_S)
        self.assertEqual((told.split(), errors), (["begins", *self.names()], ""))

    def test_stopped_at_any_moment(self) -> None:
        """A run that is ended while it works leaves what was there before, and the next one completes it."""
        migrate(self.owner, FOLDER)
        complete = self.objects()
        for number, end in ((1, signal.SIGTERM), (2, signal.SIGKILL), (len(self.names()), signal.SIGTERM)):
            for name in reversed(self.names()[number - 1 :]):
                self.sql((FOLDER / f"{name}.rollback.sql").read_text())
            before = self.objects()
            with closing(connect(self.server, self.database)) as other, other.cursor() as cursor:
                # It waits here with a migration applied, and about to record that.
                cursor.execute("BEGIN; LOCK TABLE cacheservice._yoyo_log")
                child = self.child()
                waiting = (
                    "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'cacheservice._yoyo_log'::regclass"
                )
                limit = time.monotonic() + GIVE_UP_S
                while query(self.server, self.database, waiting) == [(0,)]:
                    self.assertLess(time.monotonic(), limit)
                    self.assertIsNone(child.poll())
                    time.sleep(0.02)
                child.send_signal(end)
                child.wait(GIVE_UP_S)
                cursor.execute("ROLLBACK")
            self.assertEqual(self.objects(), before)
            self.assertEqual(migrate(self.owner, FOLDER), self.names()[number - 1 :])
            self.assertEqual(self.objects(), complete)

    def test_nothing_is_left_to_other_clients_of_a_pooler(self) -> None:
        """Through a PgBouncer that pools transactions it works, and sets nothing for the next client of the session."""
        assert pgbouncer.PROGRAM, pgbouncer.NEEDED
        settings = "SELECT name, setting FROM pg_settings WHERE source = 'session' AND name <> 'application_name'"
        with running_pgbouncer(self.server, pool_size=1) as dsn:
            pooled = dsn(database=self.database)
            with closing(psycopg2.connect(pooled)) as connection, connection.cursor() as cursor:
                cursor.execute(settings)
                before = cursor.fetchall()
            self.assertEqual(migrate(pooled, FOLDER), self.names())
            create_reader(pooled, READER, ["public.granted"], "wörd")
            with closing(psycopg2.connect(pooled)) as connection, connection.cursor() as cursor:
                cursor.execute(settings)
                self.assertEqual(cursor.fetchall(), before)
                cursor.execute("SHOW search_path")
                self.assertEqual(cursor.fetchall(), [('"$user", public',)])

    def role(self, name: str, words: str = "") -> str:
        """A role of its own that may log in; its DSN."""
        query(self.server, self.database, f"CREATE ROLE {name} LOGIN PASSWORD 'hidden-word' {words}")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {name}")
        self.addCleanup(query, self.server, self.database, f"DROP OWNED BY {name} CASCADE")
        return self.server.dsn(name, "hidden-word", self.database)

    def test_another_owner(self) -> None:
        """--owner makes the tables' owner the owner of everything; it can then watch them; a later run leaves it so."""
        app = f"app_{self.database[5:]}"
        dsn = self.role(app)
        migrate(self.owner, FOLDER)
        self.assertEqual(migrate(self.owner, FOLDER, app), [])
        self.assertEqual({owner for *_, owner in self.objects()}, {app})
        self.sql("DROP SCHEMA cacheservice CASCADE")
        self.assertEqual(migrate(self.owner, FOLDER, app), self.names())
        self.assertEqual({owner for *_, owner in self.objects()}, {app})
        self.sql((FOLDER / f"{self.names()[-1]}.rollback.sql").read_text())
        migrate(self.owner, FOLDER)
        self.assertEqual({owner for *_, owner in self.objects()}, {app})
        self.sql(f"CREATE TABLE public.own AS SELECT 1 AS id; ALTER TABLE public.own OWNER TO {app}")
        watch(dsn, "public.own", ("id",), False, False, self.fail)
        create_reader(self.owner, READER, ["public.own"], "wörd")
        self.assertEqual(self.as_reader("SELECT id FROM own"), [(1,)])

    def test_the_readers_connection(self) -> None:
        """The advice for a reader that connects by mistake does not include rights of the owner."""
        migrate(self.owner, FOLDER)
        create_reader(self.owner, READER, [], "wörd")
        with self.assertRaises(MigrationFailed) as refused:
            migrate(self.server.dsn(READER, "wörd", database=self.database), FOLDER)
        self.assertEqual(
            str(refused.exception),
            f"the schema cacheservice belongs to postgres, and {READER} may not act as postgres; connect as postgres",
        )

    def test_what_to_grant(self) -> None:
        """A role that lacks a right gets the statement that grants it, and with that the command goes on."""
        name, app = f"low_{self.database[5:]}", f"app_{self.database[5:]}"
        dsn = self.role(name)
        self.role(app)
        for owner, expected in (
            (None, f"GRANT CREATE ON DATABASE {self.database} TO {name};"),
            (app, f'GRANT "{app}" TO {name};'),
        ):
            with self.assertRaises(MigrationFailed) as refused:
                migrate(dsn, FOLDER, owner)
            told, _, statement = str(refused.exception).partition("; ")
            self.assertEqual(statement, expected, told)
            self.sql(statement)
            self.assertEqual(migrate(dsn, FOLDER, owner), self.names() if owner is None else [])
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(dsn, READER, [], "wörd")
        self.assertIn(f"ALTER ROLE {name} CREATEROLE;", str(refused.exception))
        self.sql(f"ALTER ROLE {name} CREATEROLE")
        create_reader(dsn, READER, [], "wörd")
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(dsn, READER, ["public.secret"], "wörd")
        self.assertIn("run it as the owner of secret", str(refused.exception))

    def test_the_reader_again_by_a_role_with_few_rights(self) -> None:
        """An owner that may create roles makes the reader and brings it up to date; a reader that it did not make it
        may not change: the message has the GRANT, and one that needs no change is only granted what it lacks."""
        name = f"own_{self.database[5:]}"
        dsn = self.role(name, "CREATEROLE")
        self.sql(f"GRANT CREATE ON DATABASE {self.database} TO {name}; GRANT CREATE ON SCHEMA public TO {name}")
        migrate(dsn, FOLDER)
        for _ in range(2):
            create_reader(dsn, READER, [], "wörd")
        if not at_least(self.server, 16):
            return  # there, a role that may create roles may change every other one
        self.sql(f'ALTER ROLE "{READER}" CREATEDB')
        self.sql(f'ALTER ROLE "{READER}" CONNECTION LIMIT 3')
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(dsn, READER)
        self.assertIn(f'GRANT "{READER}" TO {name} WITH ADMIN OPTION;', str(refused.exception))
        self.drop_reader()
        create_reader(self.owner, READER, [], "wörd")
        create_reader(dsn, READER)
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(dsn, READER, [], "another")
        self.assertIn(f'GRANT "{READER}" TO {name} WITH ADMIN OPTION;', str(refused.exception))
        self.sql(f'GRANT "{READER}" TO {name} WITH ADMIN OPTION')
        create_reader(dsn, READER, [], "wörd")
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(dsn, name)
        self.assertIn("is the role of this session", str(refused.exception))

    def test_servers_that_are_too_old(self) -> None:
        """PostgreSQL 13 and older are refused with what to use; 14 and later are not."""
        self.assertEqual(too_old(130_023), "PostgreSQL 13.23 is too old; use PostgreSQL 14 or later")
        self.assertIsNone(too_old(140_000))

    def test_the_reader_reads_what_it_is_granted_and_nothing_else(self) -> None:
        """A granted table, in whatever schema, can be read; another cannot, and nothing can be written or made."""
        migrate(self.owner, FOLDER)
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
        migrate(self.owner, FOLDER)
        create_reader(self.owner, READER, [], "wörd")
        with self.server.log_path.open("rb") as log:
            log.seek(size)
            written = log.read().decode()
        self.assertIn("SCRAM-SHA-256", written)
        self.assertNotIn("wörd", written)

    def test_a_refusal_is_one_line(self) -> None:
        """What the server refuses is reported in one line, without the password."""
        migrate(self.owner, FOLDER)
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(self.owner, READER, ["no.such_table"], "wörd")
        # 14 names the schema.
        self.assertRegex(str(refused.exception), r'(relation "no\.such_table"|schema "no") does not exist')
        wrong = self.server.dsn("nobody", "hidden-word", self.database)
        with self.assertRaises(MigrationFailed) as refused:
            migrate(wrong, FOLDER)
        self.assertNotIn("hidden-word", str(refused.exception))
        self.assertNotIn("\n", str(refused.exception))

    async def test_the_service_reads_as_the_reader(self) -> None:
        """The reader's rights are enough for a refresh, and the lack of one is reported with what to do."""
        migrate(self.owner, FOLDER)
        create_reader(self.owner, READER, ["public.granted"], "wörd")
        await self.read("SELECT * FROM granted")
        self.assertEqual(dict(self.rows.finish().items()), {b"1": b'{"id":1}'})
        with self.assertRaises(QueryFailed) as refused:
            await self.read("SELECT * FROM secret")
        self.assertIn("permission denied for table secret", str(refused.exception))
        self.assertIn("GRANT SELECT", refused.exception.advice)

    async def test_the_reader_is_told_who_blocks_it(self) -> None:
        """A role with few rights learns which session holds the lock, by the migrations' function, without text."""
        migrate(self.owner, FOLDER)
        create_reader(self.owner, READER, ["public.granted"], "wörd")
        with closing(connect(self.server, self.database)) as holder, holder.cursor() as cursor:
            cursor.execute("/* a comment */ BEGIN")
            cursor.execute("-- another\nLOCK TABLE granted")
            with self.assertRaises(LockTimeout) as failed:
                await self.read("SELECT * FROM granted", timeout_s=8)
            (blocker,) = failed.exception.blockers
            self.assertEqual(blocker.pid, holder.info.backend_pid)
        self.assertEqual((blocker.user, blocker.application), ("postgres", "cacheservice tests"))
        self.assertEqual((blocker.lock_mode, blocker.relation), ("AccessExclusiveLock", "public.granted"))
        self.assertEqual((blocker.state, blocker.statement_kind), ("idle in transaction", "LOCK TABLE"))
        self.assertIsNotNone(blocker.transaction_since)

    def test_the_environment_of_a_test_is_clean(self) -> None:
        """No variable of libpq's decides where these tests connect."""
        self.assertEqual([name for name in os.environ if name in {"PGHOST", "PGPORT", "PGSERVICE"}], [])
