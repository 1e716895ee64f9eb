"""Test cases of reads of the real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.rows import RowsBuilder
from cacheservice.cache.snapshot import Snapshot
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import AllRows, ReadResult
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.target import parse
from tests.kit.datasets import rows_builder, rows_of
from tests.kit.postgres import fresh_database, query, sessions_left
from tests.kit.readings import read_one

TIMEOUT_S = 60.0


@pytest.mark.usefixtures("server")
class DatabaseTestCase(TestCase):
    """A database of its own, read without any fault between."""

    server: EmbeddedPostgres
    timeout = 240

    def setUp(self) -> None:
        self.name = fresh_database(self.server, self.addCleanup)
        self.status = DatabaseStatus()
        self.database = self.make_database()
        self.addCleanup(self.check_nothing_left)

    async def check_nothing_left(self) -> None:
        self.assertEqual(self.status.connections, 0)
        self.assertEqual(await sessions_left(self.server, self.name), [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def make_database(self, **dsn: Any) -> Database:
        target = parse(self.server.dsn(**{"database": self.name, **dsn}))
        database = Database(reactor, target, TIMEOUT_S, self.status)
        self.addCleanup(database.stop)
        return database

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return query(self.server, self.name, statement, parameters or None)

    def read_into(
        self,
        builder: RowsBuilder,
        sql: str,
        *key: str,
        database: Database | None = None,
        timeout_s: float = TIMEOUT_S,
        expect: Callable[[int], None] | None = None,
    ) -> Deferred[ReadResult]:
        settings = DatasetSettings(name="things", query=sql, key=key or ("id",), timeout_s=timeout_s)
        return read_one(database or self.database, settings, lambda: builder, expect=expect)

    async def rows(self, sql: str, *key: str, **options: Any) -> dict[bytes, bytes]:
        builder = rows_builder()
        await self.read_into(builder, sql, *key, **options)
        return dict(builder.finish().items())

    async def document(self, sql: str, *key: str, **options: Any) -> Any:
        """Of a query that returns one row."""
        ((_, document),) = (await self.rows(sql, *key, **options)).items()
        return json.loads(document)

    async def fails(self, error: type[Exception], sql: str, *key: str, **options: Any) -> Any:
        builder = RowsBuilder(lambda shards: None, **options)
        failure = await self.assertFailure(self.read_into(builder, sql, *key), error)
        self.assertIs(type(failure), error)
        self.assertEqual(len(str(failure).splitlines()), 1)
        return failure


def snapshot_of_reading(reading: ReadResult, since: Snapshot | None) -> Snapshot:
    """Make what a read would publish; `since` has the rows that it did not read."""
    rows = since.rows if since is not None else rows_of({})
    return Snapshot(
        1,
        reading.rows.finish() if isinstance(reading, AllRows) else rows,
        reading.moment.as_of,
        reading.moment.read_at,
        reading.moment.database_snapshot,
        reading.columns,
        watch_state=reading.watch_state,
        probe=reading.probe,
        server=reading.moment.server,
        dependencies=reading.dependencies,
    )
