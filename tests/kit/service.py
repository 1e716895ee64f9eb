"""Test cases of the refreshing service, with a faulty network before the server."""

from __future__ import annotations

import gc
import json
from typing import Any

from twisted.internet import reactor

from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.config import DatasetSettings
from cacheservice.refresh.service import CacheService
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.target import parse
from tests.kit.guard import GuardTestCase
from tests.kit.logs import Log
from tests.kit.postgres import query
from tests.kit.readings import refreshes_of
from tests.kit.waiting import until

ROWS = 200
THINGS = "TABLE things"
SLOW_THINGS = "SELECT *, pg_sleep(0.005) FROM things"


def declare(name: str, sql: str = THINGS, **settings: Any) -> DatasetSettings:
    """Refreshed often, retried soon."""
    quick = {"interval_s": 0.3, "timeout_s": 20.0, "max_age_s": 60.0, "retry_initial_s": 0.1, "retry_max_s": 0.2}
    return DatasetSettings(name=name, query=sql, key="id", jitter=0.0, **(quick | settings))


class ServiceTestCase(GuardTestCase):
    """Services before a table of `ROWS` rows, whose `n` is the same in all of them at any moment."""

    timeout = 90

    async def setUp(self) -> None:
        await super().setUp()
        self.addCleanup(self.server.thaw)  # the other cleanups ask the server
        self.sql(f"CREATE TABLE things AS SELECT i AS id, 0 AS n FROM generate_series(1, {ROWS}) AS i")
        self.log = Log()

    def sql(self, statement: str) -> None:
        query(self.server, self.database_name, statement)

    def make_service(
        self, *datasets: DatasetSettings, max_connections: int = 2, connect_timeout_s: float = 30.0
    ) -> tuple[CacheService, Cache]:
        """Reads through the faulty network; stopped at the end of the test at the latest."""
        cache = Cache(datasets, reactor.seconds)
        target = parse(self.server.dsn(database=self.database_name, port=self.network.port))
        database = Database(reactor, target, connect_timeout_s, cache.database)
        service = refreshes_of(cache, database, self.log, max_connections=max_connections)
        self.addCleanup(self.check_log)
        self.addCleanup(database.stop)
        self.addCleanup(lambda: service.stopService() if service.running else None)
        return service, cache

    def check_log(self) -> None:
        """No bug of the service, and no secret."""
        self.assertEqual([fields for event, fields in self.log.events if event == "refresh_broke"], [])
        self.assertNotIn(self.password, str(self.log.events))
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    async def start_and_load(self, service: CacheService, cache: Cache) -> None:
        service.startService()
        await until(lambda: all(dataset.snapshot for dataset in cache.datasets.values()))

    async def until_read(self, dataset: Dataset, more: int) -> None:
        def count() -> int:
            return dataset.counts.outcomes["published"] + dataset.counts.outcomes["unchanged"]

        wanted = count() + more
        await until(lambda: count() >= wanted)

    async def until_failed(self, dataset: Dataset, more: int = 1) -> None:
        wanted = dataset.counts.outcomes["failed"] + more
        await until(lambda: dataset.counts.outcomes["failed"] >= wanted)

    def n(self, dataset: Dataset) -> int:
        """The `n` that all rows of the served snapshot have."""
        documents = dict(dataset.snapshot.rows.items())
        self.assertEqual(sorted(map(int, documents)), list(range(1, ROWS + 1)))
        (n,) = {json.loads(document)["n"] for document in documents.values()}
        return n
