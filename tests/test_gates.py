"""Laws of the gates: what may replace what is served, and what is held back."""

from __future__ import annotations

from contextlib import closing

from twisted.internet.threads import deferToThread

from tests.kit.postgres import connect
from tests.kit.service import ROWS, ServiceTestCase, declare
from tests.kit.waiting import until


class Races(ServiceTestCase):
    async def test_truncate_by_another_session(self) -> None:
        """A TRUNCATE between a transaction's begin and its read shows it an empty table without an error: held.

        PostgreSQL's manual, 13.5: TRUNCATE is not MVCC-safe.
        """
        service, cache = self.make_service(declare("things", interval_s=3600.0))
        await self.start_and_load(service, cache)
        dataset = cache.dataset("things")
        served = dataset.snapshot
        with closing(connect(self.server, self.database_name)) as other:
            other.autocommit = False
            cursor = other.cursor()
            cursor.execute("LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
            service.refresh_now("things")
            # It has its snapshot by now and waits for the lock to open its cursor.
            await until(lambda: dataset.refresh.is_running and cache.database.connections == 1)
            await self.until_waiting_for_a_lock()
            cursor.execute("TRUNCATE things")
            await deferToThread(other.commit)
        await until(lambda: not dataset.refresh.is_running)
        self.assertIs(dataset.snapshot, served)
        assert dataset.held is not None
        self.assertEqual(dataset.held.reason, f"would drop {ROWS} to 0 rows, limit 50 %")
        self.sql(f"INSERT INTO things SELECT i, 1 FROM generate_series(1, {ROWS}) AS i")
        service.refresh_now("things")
        await until(lambda: dataset.snapshot is not served)
        self.assertIsNone(dataset.held)
        assert dataset.snapshot is not None
        self.assertEqual(dataset.snapshot.change, (0, ROWS, 0))

    async def test_a_column_that_is_gone(self) -> None:
        """A migration that drops a column is noticed before readers miss it."""
        service, cache = self.make_service(declare("things", interval_s=3600.0))
        await self.start_and_load(service, cache)
        dataset = cache.dataset("things")
        assert dataset.snapshot is not None
        self.assertEqual(dataset.snapshot.columns, ("id", "n"))
        self.sql("ALTER TABLE things DROP COLUMN n")
        service.refresh_now("things")
        await until(lambda: dataset.held is not None)
        assert dataset.held is not None
        self.assertEqual(dataset.held.reason, "has no column n any more")

    async def until_waiting_for_a_lock(self) -> None:
        def waiting() -> bool:
            with closing(connect(self.server, self.database_name)) as other, other.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
                return bool(cursor.fetchone()[0])

        while not await deferToThread(waiting):
            pass
