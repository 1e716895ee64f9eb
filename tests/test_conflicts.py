"""Laws of failures that only a retry fixes: standby conflicts, serialization failures and deadlocks, kept apart."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg2
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.base.errors import Deadlock, RefreshFailed, SerializationFailed, StandbyConflict
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.config import DatasetSettings
from cacheservice.refresh.service import CacheService
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.translate import translate
from tests.kit import views
from tests.kit.postgres import connect
from tests.kit.readings import refreshes_of
from tests.kit.service import ROWS, ServiceTestCase, declare
from tests.kit.standby import running_standby
from tests.kit.waiting import until

TAKE_BOTH = """
CREATE FUNCTION take_both() RETURNS int LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock(1); PERFORM pg_advisory_xact_lock(2); RETURN 1; END $$
"""


class OnTheServer(ServiceTestCase):
    timeout = 120

    def make_service_before(self, dsn: str, *datasets: DatasetSettings) -> tuple[CacheService, Cache]:
        cache = Cache(datasets, reactor.seconds)
        database = Database(reactor, parse(dsn), 30.0, cache.database)
        service = refreshes_of(cache, database, self.log, max_connections=2)
        self.addCleanup(lambda: service.stopService() if service.running else None)
        return service, cache

    def why(self, dataset: Dataset, cache: Cache, error: type[RefreshFailed]) -> str:
        why = views.why(dataset, cache)
        self.assertIn(error.advice, why)
        return why

    async def test_a_deadlock(self) -> None:
        """A query that takes locks and is in a deadlock with another session is ended, reported and tried again."""
        self.sql(TAKE_BOTH)
        service, cache = self.make_service(declare("things", "SELECT take_both() AS id", interval_s=3600.0))
        dataset = cache.dataset("things")
        with closing(connect(self.server, self.database_name)) as other, other.cursor() as cursor:
            # Ours looks for the deadlock first, and is the one that is ended.
            cursor.execute("SET deadlock_timeout = '10min'; BEGIN; SELECT pg_advisory_xact_lock(2)")
            service.startService()
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            await until(lambda: self.ask(waiting) == [(1,)])
            await deferToThread(cursor.execute, "SELECT pg_advisory_xact_lock(1)")  # until ours has been ended
            await until(lambda: dataset.attempts)
            self.assertIn("deadlock: ", self.why(dataset, cache, Deadlock))
            self.assertEqual((dataset.attempts[-1].outcome, cache.database.state), ("failed", "up"))
            cursor.execute("COMMIT")
        await until(lambda: dataset.snapshot)
        self.assertEqual(dataset.attempts[-1].trigger, "retry")

    async def test_a_serialization_failure(self) -> None:
        """The server's own error is reported as such.

        A refresh is READ ONLY and REPEATABLE READ, in which it cannot be provoked: it only affects sessions that write,
        or SERIALIZABLE. So the error of a session that writes is used.
        """
        error = await deferToThread(self.serialization_failure)
        ours = translate(error, parse("host=localhost"))
        self.assertIsInstance(ours, SerializationFailed)
        self.assertEqual(
            (ours.sqlstate, str(ours)), ("40001", "the query could not be isolated from concurrent changes")
        )

    def serialization_failure(self) -> psycopg2.Error:
        with (
            closing(connect(self.server, self.database_name)) as first,
            closing(connect(self.server, self.database_name)) as second,
            first.cursor() as one,
            second.cursor() as two,
        ):
            one.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM things")
            two.execute("UPDATE things SET n = n + 1 WHERE id = 1")
            try:
                one.execute("UPDATE things SET n = n + 1 WHERE id = 1")
            except psycopg2.Error as error:
                return error
        raise AssertionError("it was not refused")

    async def on_standby(self, **settings: str) -> Any:
        """Start one that waits for no query; return its `dsn`."""
        standby = running_standby(self.server, {"max_standby_streaming_delay": "0", **settings})
        dsn = await deferToThread(standby.__enter__)
        self.addCleanup(deferToThread, standby.__exit__, None, None, None)
        return dsn

    async def conflict(self, dataset: Dataset, change: str, words: str) -> None:
        """Change the primary, again and again, until a read of the standby has failed with `words`.

        A VACUUM may also find the page pinned by the cursor, which is another conflict.

        A session that runs nothing at that moment is ended, without a word that reaches us.
        """

        def told() -> bool:
            return any(words in (attempt.error or "") for attempt in list(dataset.attempts)[-1:])

        while not told():
            await until(lambda: (progress := dataset.refresh.progress) and progress.rows.count)
            self.sql(change)
            self.sql("VACUUM (TRUNCATE false) things")
            await deferLater(reactor, 0.05)

    async def check_conflict(self, change: str, words: str) -> None:
        dsn = await self.on_standby()
        # More rows than come in one answer: with a cursor the rows that have come show that the query runs.
        slowly = "SELECT 3 * id + k AS id, n, pg_sleep(0.005) IS NULL AS slow FROM things, generate_series(0, 2) AS k"
        service, cache = self.make_service_before(
            dsn(database=self.database_name), declare("things", slowly, interval_s=0.3)
        )
        dataset = cache.dataset("things")
        service.startService()
        await until(lambda: dataset.snapshot)
        served = dataset.snapshot
        words = f"the standby ended the query to continue replaying its primary: {words}"
        await self.conflict(dataset, change, words)
        self.assertIn(words, self.why(dataset, cache, StandbyConflict))
        self.assertEqual(cache.database.state, "up")
        assert served is not None
        await until(lambda: dataset.snapshot.as_of > served.as_of)
        await service.stopService()

    async def test_rows_that_a_standby_removes(self) -> None:
        """The primary vacuums rows that the query of a real standby needs: the read fails for that, and is retried."""
        await self.check_conflict("UPDATE things SET n = n + 1", "User query might")

    async def test_a_lock_that_a_standby_takes(self) -> None:
        """On a real standby: the table is locked on the primary. It is reported, and tried again."""
        again = f"INSERT INTO things SELECT i, 0 FROM generate_series(1, {ROWS}) AS i"
        await self.check_conflict(f"BEGIN; TRUNCATE things; {again}; COMMIT", "User was holding a relation lock")
