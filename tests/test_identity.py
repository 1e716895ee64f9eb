"""Laws of the server's identity: what was read from another server, or another life of it, proves nothing."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import psycopg2
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from cacheservice.base import shipped
from cacheservice.base.errors import DatabaseUnavailable, QueryFailed
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import State
from cacheservice.cache.lag import NO_LAG
from cacheservice.cache.rows import RowsBuilder
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.ports.freshness import Freshness
from cacheservice.refresh.service import CacheService
from cacheservice.sources.base import AllRows, ReadPlan, ReadResult
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.reading import DatasetReader
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.transaction import Transaction
from cacheservice.sources.postgres.watch import watch
from tests.kit.database import snapshot_of_reading
from tests.kit.datasets import MOMENT, numbered_rows, rows_builder
from tests.kit.postgres import PRIMARY, connect, fresh_database, query
from tests.kit.readings import because_of, kind_of, refreshes_of
from tests.kit.refreshes import RefreshTestCase, World
from tests.kit.service import ServiceTestCase, declare
from tests.kit.standby import Standby, running_standby
from tests.kit.waiting import until


class Elsewhere(RefreshTestCase):
    def saved(self) -> World:
        """A dataset that was restored from a file of another cluster, before the database is reached."""
        world = World()
        server = replace(PRIMARY, system_identifier="1")
        snapshot = Snapshot(7, numbered_rows(100), MOMENT, world.clock.seconds(), "1:1:", source="disk", server=server)
        world.dataset.restore(snapshot)
        world.service.startService()
        return world

    def test_replaced(self) -> None:
        """The first full read replaces it, compared with nothing."""
        world = self.saved()
        self.assertEqual(world.dataset.state(), State.FRESH)
        world.cache.database.seen(PRIMARY, NO_LAG)
        read = world.database.last
        read.result.callback(AllRows(moment=replace(read.moment, server=PRIMARY), rows=rows_builder()))
        assert world.dataset.snapshot is not None
        self.assertEqual((world.dataset.snapshot.rows.count, world.dataset.last_generation), (0, 8))

    def test_withdrawn(self) -> None:
        """Where it cannot be read here, nothing is served any more; until the database is reached, it is."""
        world = self.saved()
        world.database.last.fail(DatabaseUnavailable("away"))
        self.assertIsNotNone(world.dataset.snapshot)
        world.advance(1)
        world.cache.database.seen(PRIMARY, NO_LAG)
        world.database.last.fail(QueryFailed("there is no such table"))
        self.assertEqual((world.dataset.snapshot, world.dataset.last_generation), (None, 7))
        self.assertEqual(world.log.names("snapshot_withdrawn"), ["snapshot_withdrawn"])


class OnServers(ServiceTestCase):
    """With a watched table."""

    timeout = 180

    async def setUp(self) -> None:
        await super().setUp()
        self.sql("ALTER TABLE things ADD PRIMARY KEY (id)")
        await deferToThread(migrate, self.dsn(), shipped.folder("migrations"))
        await deferToThread(watch, self.dsn(), "things", ["id"], notify=False, dry_run=False, show=lambda _: None)

    def dsn(self) -> str:
        return self.server.dsn(database=self.database_name)

    def reader(self, dsn: str) -> Database:
        database = Database(reactor, parse(dsn), 30.0, Cache([], reactor.seconds).database)
        self.addCleanup(database.stop)
        return database

    async def read(self, database: Database, since: Snapshot | None = None, **more: Any) -> tuple[ReadResult, Snapshot]:
        """Read `things`, by a delta or a probe if one will do; the snapshot is what the next one may start from."""
        settings = declare("things", **({"watch": [{"table": "public.things", "key": "id"}]} | more))
        wanted = ReadPlan(settings, rows_builder, since=since, most_keys=1000)
        (reading,) = await database.read([wanted])
        return reading, snapshot_of_reading(reading, since)

    async def standby(self, **settings: str) -> Standby:
        running = running_standby(self.server, settings)
        standby = await deferToThread(running.__enter__)
        self.addCleanup(deferToThread, running.__exit__, None, None, None)
        return standby

    async def until_replayed(self, standby: Standby) -> None:
        ((position,),) = query(self.server, "postgres", "SELECT pg_current_wal_lsn()::text")
        await until(lambda: standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{position}'") == [(True,)])

    async def test_all_parts(self) -> None:
        """The server is identified in the transaction that reads, the timeline of a primary included."""
        (reading, _) = await self.read(self.reader(self.dsn()))
        ((system, oid, timeline),) = query(
            self.server,
            self.database_name,
            "SELECT (SELECT system_identifier::text FROM pg_control_system()), "
            "(SELECT oid::int FROM pg_database WHERE datname = current_database()), "
            "(SELECT timeline_id FROM pg_control_checkpoint())",
        )
        server = reading.moment.server
        assert server is not None
        self.assertEqual(
            (server.database, server.database_oid, server.role, server.in_recovery),
            (self.database_name, oid, "postgres", False),
        )
        self.assertEqual((server.system_identifier, server.timeline), (system, timeline))

    async def test_without_rights(self) -> None:
        """A role that may not ask for the system identifier reads all the same, deltas included."""
        functions = "pg_control_system(), pg_control_checkpoint(), pg_walfile_name(pg_lsn)"
        self.sql(
            f"CREATE ROLE {self.database_name} LOGIN PASSWORD 'reader'; GRANT SELECT ON things TO {self.database_name}"
        )
        self.addCleanup(self.sql, f"DROP OWNED BY {self.database_name}; DROP ROLE {self.database_name}")
        self.sql(f"GRANT USAGE ON SCHEMA cacheservice TO {self.database_name}")
        self.sql(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cacheservice TO {self.database_name}")
        self.sql(f"REVOKE EXECUTE ON FUNCTION {functions} FROM PUBLIC")
        self.addCleanup(self.sql, f"GRANT EXECUTE ON FUNCTION {functions} TO PUBLIC")
        database = self.reader(self.server.dsn(database=self.database_name, user=self.database_name, password="reader"))
        reading, snapshot = await self.read(database)
        assert reading.moment.server is not None
        self.assertEqual((reading.moment.server.system_identifier, reading.moment.server.timeline), (None, None))
        self.sql("UPDATE things SET n = 1 WHERE id = 7")
        reading, _ = await self.read(database, snapshot)
        self.assertEqual((kind_of(reading), list(reading.changed)), ("delta", [b"7"]))

    async def test_a_probe_of_another_database(self) -> None:
        """An equal value of another database, or for another role, does not pass for "unchanged"."""
        probe = {"probe": "SELECT 1", "watch": []}
        database = self.reader(self.dsn())
        _, snapshot = await self.read(database, **probe)
        reading, _ = await self.read(database, snapshot, **probe)
        self.assertEqual(kind_of(reading), "unchanged")
        other = fresh_database(self.server, self.addCleanup)
        query(self.server, other, "CREATE TABLE things (id int, n int)")
        reading, _ = await self.read(self.reader(self.server.dsn(database=other)), snapshot, **probe)
        self.assertEqual(kind_of(reading), "all")
        self.assertIn("another database", because_of(reading) or "")
        reading, _ = await self.read(database, replace(snapshot, server=None), **probe)
        self.assertEqual(kind_of(reading), "all")

    async def test_a_restart(self) -> None:
        """After a restart all is read: a transaction that had been seen may be lost."""
        database = self.reader(self.dsn())
        _, snapshot = await self.read(database)
        self.side.close()
        await deferToThread(self.server.stop, "fast")
        await deferToThread(self.server.start)
        self.side = connect(self.server)
        reading, _ = await self.read(database, snapshot)
        self.assertEqual(because_of(reading), "the server was restarted, and could have lost what had been read")

    async def test_an_open_transaction_on_a_standby(self) -> None:
        """CACHE.WAIT on a standby does not count a transaction that is still open on the primary."""
        standby = await self.standby()
        settings = declare("things", interval_s=0.2)
        service, cache = self.make_service_of(standby(database=self.database_name), settings)
        dataset = cache.dataset("things")
        freshness = Freshness(service, cache.database, reactor)
        with closing(psycopg2.connect(self.dsn())) as writer, writer.cursor() as cursor:
            cursor.execute("UPDATE things SET n = 9 WHERE id = 7")
            cursor.execute("SELECT pg_current_xact_id()::text::int8")
            (xid,) = cursor.fetchone()
            for number in range(3):
                self.sql(f"UPDATE things SET n = {number} WHERE id = 8")
            await self.until_replayed(standby)
            await self.start_and_load(service, cache)
            self.assertFalse(await freshness.includes(dataset, xid, 1.0))
            writer.commit()
        self.assertTrue(await freshness.includes(dataset, xid, 30.0))
        assert dataset.snapshot is not None
        self.assertIn(b'"n":9', dataset.snapshot.rows.get(b"7") or b"")

    async def read_amid_a_transaction(self, standby: Standby, database: Database) -> tuple[int, Snapshot]:
        """Read the standby while a transaction is open that changes row 7; return its number and the snapshot.

        It has committed, and the standby has replayed that, when this returns.
        """
        with closing(psycopg2.connect(self.dsn())) as writer, writer.cursor() as cursor:
            cursor.execute("UPDATE things SET n = 9 WHERE id = 7")
            cursor.execute("SELECT pg_current_xact_id()::text::int8")
            (xid,) = cursor.fetchone()
            self.sql("UPDATE things SET n = 1 WHERE id = 8")
            await self.until_replayed(standby)
            _, snapshot = await self.read(database)
            writer.commit()
        await self.until_replayed(standby)
        return xid, snapshot

    async def test_a_promotion(self) -> None:
        """What was committed while a standby was read is not missed by the first read after its promotion."""
        standby = await self.standby()
        dsn = standby(database=self.database_name)
        database = self.reader(dsn)
        xid, snapshot = await self.read_amid_a_transaction(standby, database)
        # A delta between two reads of the standby finds it; what it found is not used here.
        reading, _ = await self.read(database, snapshot)
        self.assertIn(b"7", reading.changed)
        await deferToThread(standby.sql, "SELECT pg_promote()")
        reading, after = await self.read(database, snapshot)
        self.assertEqual(kind_of(reading), "all")
        self.assertIn("a standby, which was promoted", because_of(reading) or "")
        self.assertIn(b'"n":9', after.rows.get(b"7") or b"")
        assert reading.moment.server is not None
        assert snapshot.server is not None
        self.assertEqual(reading.moment.server.timeline, 2)
        self.assertEqual(reading.moment.server.system_identifier, snapshot.server.system_identifier)
        self.assertFalse(snapshot.includes(xid, reading.moment.server))
        self.assertTrue(after.includes(xid, reading.moment.server))

    async def test_a_promotion_amid_a_read(self) -> None:
        """A delta that begins on the standby and ends after its promotion is repeated, and misses no change."""
        standby = await self.standby()

        class Promoting(DatasetReader):
            promoted = False

            async def read(self, transaction: Transaction, read: ReadPlan, builder: RowsBuilder) -> ReadResult:
                if read.since is not None and not self.promoted:
                    self.promoted = True
                    await deferToThread(standby.sql, "SELECT pg_promote()")
                return await super().read(transaction, read, builder)

        target = parse(standby(database=self.database_name))
        database = Database(reactor, target, 30.0, Cache([], reactor.seconds).database)
        promoting = Promoting(database._transactions, database._reader._fetching, database.capturing)
        self.patch(database, "_reader", promoting)
        self.addCleanup(database.stop)
        _, snapshot = await self.read_amid_a_transaction(standby, database)
        reading, after = await self.read(database, snapshot)
        self.assertTrue(promoting.promoted)
        self.assertEqual(kind_of(reading), "all")
        self.assertIn(b'"n":9', after.rows.get(b"7") or b"")

    def make_service_of(self, dsn: str, *datasets: DatasetSettings) -> tuple[CacheService, Cache]:
        cache = Cache(datasets, reactor.seconds)
        database = Database(reactor, parse(dsn), 30.0, cache.database)
        service = refreshes_of(cache, database, self.log, max_connections=2)
        self.addCleanup(database.stop)
        self.addCleanup(lambda: service.stopService() if service.running else None)
        return service, cache
