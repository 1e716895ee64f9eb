"""Test cases of what a query depends on: views, functions, types and rights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.snapshot import Snapshot
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import ReadPlan, ReadResult
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.target import parse
from tests.kit.database import snapshot_of_reading
from tests.kit.datasets import rows_builder
from tests.kit.postgres import drop_role, fresh_database, query
from tests.kit.readings import how_read

SCHEMA = """
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN short AS text CHECK (length(value) < 9);
CREATE TYPE pair AS (a int, b int);
CREATE TABLE t (id int PRIMARY KEY, m mood, s short, v text, p pair);
INSERT INTO t SELECT i, 'sad', 's', 'v' || i, ROW(i, i)::pair FROM generate_series(1, 5) AS i;
CREATE FUNCTION inner_one(text) RETURNS text LANGUAGE sql STABLE AS $$ SELECT upper($1) $$;
CREATE FUNCTION outer_one(text) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN inner_one($1); END $$;
CREATE FUNCTION atomic(text) RETURNS text LANGUAGE sql STABLE BEGIN ATOMIC SELECT inner_one($1); END;
CREATE VIEW v AS SELECT id, m, v FROM t;
CREATE VIEW w AS SELECT id, m, v FROM v;
CREATE VIEW calling AS SELECT id, atomic(v) AS v FROM t;
CREATE TABLE apart (id int);
CREATE SCHEMA other;
"""


@pytest.mark.usefixtures("server")
class DependenciesTestCase(TestCase):
    server: EmbeddedPostgres
    timeout = 300

    def setUp(self) -> None:
        self.name = fresh_database(self.server, self.addCleanup)
        self.reader = f"reader_{self.name}"
        self.sql(SCHEMA)
        self.sql(f"CREATE ROLE {self.reader} LOGIN PASSWORD 'reader'")
        self.addCleanup(drop_role, self.server, self.name, self.reader)
        self.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {self.reader}")
        self.database = self.of(self.server.dsn(self.reader, "reader", database=self.name))

    def of(self, dsn: str) -> Database:
        database = Database(reactor, parse(dsn), 60.0, DatabaseStatus())
        self.addCleanup(database.stop)
        return database

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.server, self.name, statement)

    def dataset(self, sql: str, **more: Any) -> DatasetSettings:
        declared = {"name": "things", "query": sql, "key": "id", "interval_s": 1.0, "probe": "SELECT 1", **more}
        return DatasetSettings.model_validate(declared)

    async def read(
        self, dataset: DatasetSettings, since: Snapshot | None = None, database: Database | None = None
    ) -> tuple[ReadResult, Snapshot]:
        """One attempt; what was read, and the snapshot that it makes."""
        wanted = ReadPlan(dataset, rows_builder, since=since, most_keys=100)
        (reading,) = await (database or self.database).read([wanted])
        return reading, snapshot_of_reading(reading, since)

    async def check(self, sql: str, changes: Sequence[tuple[str, str | None]], **more: Any) -> None:
        """After each change all is read for that reason, or nothing where the reason is None; then nothing."""
        dataset = self.dataset(sql, **more)
        _, since = await self.read(dataset)
        for change, reason in changes:
            reading, since = await self.read(dataset, since)
            self.assertEqual(how_read(reading), ("unchanged", None), f"before {change}")
            self.sql(change)
            reading, since = await self.read(dataset, since)
            kind = "unchanged" if reason is None else "all"
            self.assertEqual(how_read(reading), (kind, reason), change)
