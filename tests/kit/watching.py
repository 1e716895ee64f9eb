"""Test cases of watched tables, each with a migrated database of its own."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import psycopg2
import pytest
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.watch import unwatch, watch
from tests.kit.postgres import connect, query

Key = str | tuple[str | None, ...] | None
TRIGGERS = "SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE tgname LIKE 'cacheservice%' ORDER BY 1, 2"


@pytest.mark.usefixtures("server")
class Watching(SynchronousTestCase):
    """A migrated database for each test, and a session in it."""

    server: EmbeddedPostgres
    template: str

    @pytest.fixture(autouse=True)
    def migrated(self, template: str) -> None:
        self.template = template

    def setUp(self) -> None:
        self.database = f"test_{secrets.token_hex(6)}"
        query(self.server, "postgres", f"CREATE DATABASE {self.database} TEMPLATE {self.template}")
        self.addCleanup(query, self.server, "postgres", f"DROP DATABASE {self.database} WITH (FORCE)")
        self.dsn = self.server.dsn(database=self.database)
        self.session = self.open()

    def open(self) -> Any:
        """A cursor in a session of its own, in autocommit."""
        connection = connect(self.server, self.database)
        self.addCleanup(connection.close)
        return connection.cursor()

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        """The rows of the last one."""
        for statement in statements:
            self.session.execute(statement)
        return self.session.fetchall() if self.session.description else []

    def watch(self, table: str, *key: str, notify: bool = False) -> list[str]:
        return watch(self.dsn, table, key or ("id",), notify, False, self.fail)

    def unwatch(self, table: str, *key: str) -> list[str]:
        return unwatch(self.dsn, table, key, False, self.fail)

    def rows(self) -> list[tuple[int, list[Any] | None]]:
        """What was recorded since the last call: the watch and the keys."""
        return self.sql(
            "WITH gone AS (DELETE FROM cacheservice.changes RETURNING watched, xid, keys) "
            "SELECT watched, keys FROM gone ORDER BY xid, watched, keys"
        )

    def keys(self) -> set[Key]:
        """Every key that was recorded since the last call, of whatever watch."""
        found: set[Key] = set()
        for _, keys in self.rows():
            assert keys is not None, "a TRUNCATE was recorded"
            found.update(tuple(key) if isinstance(key, list) else key for key in keys)
        return found

    def content(self, table: str) -> Counter[tuple[Key, str]]:
        return Counter(self.sql(f"SELECT t.id::text, t::text FROM {table} AS t"))

    def assert_recorded(self, table: str, statement: str, *expected: Key) -> None:
        """It records exactly these keys, and they are those whose rows differ after it."""
        before = self.content(table)
        self.sql(statement)
        after = self.content(table)
        differing = {key for key, _ in (before - after) + (after - before)}
        self.assertEqual(self.keys(), set(expected), statement)
        self.assertEqual(differing, set(expected), statement)


class Refresh(NamedTuple):
    """What a refresh asks before it reads, and the snapshot in which it asked and would read."""

    snapshot: str
    state: dict[str, Any]
    problem: str | None
    keys: list[Any]


class Refreshing(Watching):
    """A reader, and a table for it."""

    def setUp(self) -> None:
        super().setUp()
        self.reader = f"reader_{secrets.token_hex(4)}"
        create_reader(self.dsn, self.reader, [], "wörd")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {self.reader}")
        self.addCleanup(query, self.server, self.database, f"DROP OWNED BY {self.reader}")
        self.sql("CREATE TABLE items (id int PRIMARY KEY, name text)", f"GRANT SELECT ON items TO {self.reader}")
        self.tables: dict[str, Sequence[str]] = {"items": ["id"]}

    def as_reader(self) -> Any:
        """A cursor of the reader's, outside of any transaction."""
        connection = psycopg2.connect(self.server.dsn(self.reader, "wörd", self.database))
        self.addCleanup(connection.close)
        connection.autocommit = True
        return connection.cursor()

    def begin_refresh(self) -> Any:
        """A cursor in a transaction that has its snapshot."""
        cursor = self.as_reader()
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        cursor.execute("SELECT 1")
        return cursor

    def refresh(self, previous: str | None = None, most: int = 100_000, begun: Any = None) -> Refresh:
        """As the service does it; `begun` is what `begin_refresh` returned."""
        cursor = begun or self.begin_refresh()
        cursor.execute("SELECT pg_current_snapshot()")
        ((snapshot,),) = cursor.fetchall()
        watches = []
        for table, key in self.tables.items():
            cursor.execute("SELECT to_regclass(%s)::oid::bigint", (table,))
            watches.append({"table": table, "relation": cursor.fetchone()[0], "key": key})
        cursor.execute("SELECT * FROM cacheservice.changes(%s, %s, %s)", (json.dumps(watches), previous, most))
        (state, problem, key), *rest = cursor.fetchall()
        self.assertIsNone(key)
        self.assertEqual([row[:2] for row in rest if row[:2] != (None, None)], [])
        cursor.connection.close()
        single = all(len(key) == 1 for key in self.tables.values())
        return Refresh(snapshot, state, problem, [row[2] if single else tuple(json.loads(row[2])) for row in rest])

    def found(self, previous: Refresh) -> tuple[Refresh, set[Any]]:
        """The next refresh, which has nothing against a delta, and the keys that it finds, none of them twice."""
        now = self.refresh(previous.snapshot)
        self.assertIsNone(now.problem)
        self.assertEqual(now.state, previous.state)
        self.assertEqual(len(now.keys), len(set(now.keys)))
        return now, set(now.keys)

    def assert_problem(self, previous: Refresh, problem: str) -> None:
        now = self.refresh(previous.snapshot)
        self.assertEqual(now.problem, problem)
        self.assertEqual(now.keys, [])
