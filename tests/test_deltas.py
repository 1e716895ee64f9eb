"""Laws of deltas: after each, what is served is what the query returns at that snapshot, whatever writers do."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from io import StringIO
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.base import shipped
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.rows import RowsBuilder
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.refresh.service import CacheService
from cacheservice.sources.base import ReadPlan, ReadResult
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.reading import DatasetReader
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.transaction import Transaction
from cacheservice.sources.postgres.watch import watch
from tests.kit.capturing import LOGICAL, capturing
from tests.kit.datasets import Table, rows_builder, table_of
from tests.kit.logs import Log
from tests.kit.readings import because_of, kind_of, refreshes_of
from tests.kit.standby import running_standby
from tests.kit.versions import MakeServer, running_server
from tests.kit.waiting import GIVE_UP_S, until

SEED = int(os.environ.get("CACHESERVICE_TEST_DELTAS_SEED", "20261128"))
ROUNDS = int(os.environ.get("CACHESERVICE_TEST_DELTAS", "150"))
LEAST_COMMITS = 21
"""Of each writer, however slow the machine is."""
"""Deltas of each dataset, while writers write."""
KEYS = 200
WRITERS = 4

TABLES = """
CREATE TABLE products (id int PRIMARY KEY, name text, n int NOT NULL);
CREATE TABLE prices (
    product_id int, currency text, amount numeric, PRIMARY KEY (product_id, currency) DEFERRABLE INITIALLY IMMEDIATE
);
INSERT INTO products SELECT i, 'product ' || i, 0 FROM generate_series(1, 200) AS i;
INSERT INTO prices SELECT i, c, i FROM generate_series(1, 200) AS i, unnest(ARRAY['EUR', 'a:b', 'x"\\y''']) AS c;
"""
PRODUCTS: dict[str, Any] = {"name": "products", "query": "TABLE products", "key": "id"}
PRODUCTS["watch"] = [{"table": "public.products", "key": "id"}]
PRICES: dict[str, Any] = {"name": "prices", "query": "TABLE prices", "key": ["product_id", "currency"]}
PRICES["watch"] = [{"table": "public.prices", "key": ["product_id", "currency"]}]
JOINED: dict[str, Any] = {
    "name": "joined",
    "query": """
        SELECT p.id, p.name, json_agg(q ORDER BY q.currency) AS prices
        FROM products AS p JOIN prices AS q ON q.product_id = p.id GROUP BY p.id -- of each product
    """,
    "key": "id",
    "watch": [{"table": "products", "key": "id"}, {"table": "public.prices", "key": "product_id"}],
}


_MOST_TIMES = 20


class Compared(Database):
    """Reads the whole query as well in the transaction of each delta."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.whole: dict[str, tuple[str, Table]] = {}
        self.kinds: list[str] = []
        self.reasons: set[str] = set()
        self._reader = _ReadsAllToo(self, self._transactions, self._reader._fetching, self.capturing)

    @property
    def changing(self) -> list[str]:
        """The kinds of reads, without those that only a late notification caused."""
        return [kind for kind in self.kinds if kind != "unchanged"]


class _ReadsAllToo(DatasetReader):
    def __init__(self, database: Compared, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._database = database

    async def read(self, transaction: Transaction, read: ReadPlan, builder: RowsBuilder) -> ReadResult:
        result = await super().read(transaction, read, builder)
        self._database.kinds.append(kind_of(result))
        if because := because_of(result):
            self._database.reasons.add(because)
        again = rows_builder()
        await self._fetching.all_rows(transaction, ReadPlan(read.dataset, lambda: again), again)
        moment = result.moment.database_snapshot
        self._database.whole[read.dataset.name] = (moment, table_of(again.finish()))
        return result


@pytest.fixture(scope="class")
def preparing_server(request: pytest.FixtureRequest, make_server: MakeServer) -> Iterator[None]:
    """A server that prepares transactions and decodes its log, as `self.server`."""
    with running_server(make_server, max_prepared_transactions="10", **LOGICAL) as request.cls.server:
        yield


@pytest.mark.usefixtures("preparing_server")
class Proof(TestCase):
    server: EmbeddedPostgres
    timeout = 600
    after_a_merge = "all"

    def setUp(self) -> None:
        self.dsn = self.read_dsn = self.server.dsn()
        self.sql("DROP SCHEMA public CASCADE; DROP SCHEMA IF EXISTS cacheservice CASCADE; CREATE SCHEMA public")
        self.sql(TABLES)
        self.watch_tables()

    def watch_tables(self) -> None:
        migrate(self.dsn, shipped.folder("migrations"))
        for table, key in (("products", ["id"]), ("prices", ["product_id"]), ("prices", ["product_id", "currency"])):
            # A transaction that has notified cannot be prepared.
            watch(self.dsn, table, key, notify=False, dry_run=False, show=lambda _: None)

    def watch_sales(self) -> None:
        watch(self.dsn, "sales", ["id"], notify=False, dry_run=False, show=lambda _: None)

    def sql(self, statement: str) -> None:
        with closing(psycopg2.connect(self.dsn)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement)

    def service(self, *declared: dict[str, Any], **more: Any) -> tuple[CacheService, Cache, Compared]:
        often = {"interval_s": 3600.0, "timeout_s": 60.0, "max_shrink": 1.0, "max_delta": 1.0}
        cache = Cache([DatasetSettings.model_validate(often | each | more) for each in declared], reactor.seconds)
        database = Compared(reactor, parse(self.read_dsn), 30.0, cache.database)
        self.log = Log()
        service = refreshes_of(cache, database, self.log, max_connections=3)
        self.use_capture(cache, database, service)
        self.addCleanup(database.stop)
        self.addCleanup(lambda: service.stopService() if service.running else None)
        return service, cache, database

    def use_capture(self, cache: Cache, database: Compared, service: CacheService) -> None:
        """Triggers need nothing else."""

    async def until(self, true: Callable[[], object]) -> None:
        await until(true, GIVE_UP_S, lambda: self.log.events[-5:])

    def check(self, dataset: Dataset, database: Compared) -> None:
        """What is served is the query's result at the snapshot that it names."""
        assert dataset.snapshot is not None
        snapshot, whole = database.whole[dataset.name]
        self.assertEqual(dataset.snapshot.database_snapshot, snapshot)
        served = table_of(dataset.snapshot.rows)
        differing = {key for key in whole.keys() | served.keys() if whole.get(key) != served.get(key)}
        self.assertEqual({key: (whole.get(key), served.get(key)) for key in differing}, {})

    async def test_whatever_writers_do(self) -> None:
        """Long and short transactions, rollbacks, savepoints, prepared transactions, changed keys, deletes and
        re-inserts, TRUNCATE, COPY, MERGE: after each delta the snapshot equals the query at that snapshot."""
        await self.prove(ROUNDS)

    async def test_whatever_writers_do_to_its_primary(self) -> None:
        """The same of a service that reads from a standby, whose snapshots do not list what is in progress."""
        following = {"hot_standby_feedback": "on", "max_standby_streaming_delay": "-1"}
        with running_standby(self.server, following) as standby_dsn:
            self.read_dsn = standby_dsn()
            await self.prove(ROUNDS // 3)

    async def prove(self, rounds: int) -> None:
        service, cache, database = self.service(PRODUCTS, PRICES, JOINED)
        service.startService()
        await self.until(lambda: all(dataset.snapshot for dataset in cache.datasets.values()))
        stop = threading.Event()
        self.addCleanup(stop.set)  # else their threads would not end where this test does
        writers = DeferredList(
            [deferToThread(write, self.dsn, random.Random(SEED + number), stop, number) for number in range(WRITERS)]
        )
        choose = random.Random(SEED)
        # On a busy machine writers may do nothing between two reads, which are then no deltas.
        for number in range(_MOST_TIMES * rounds):
            if number >= rounds and database.kinds.count("delta") > rounds:
                break
            for dataset in cache.datasets.values():
                await self.attempted(service, dataset)
                # A writer's lock can end an attempt, and what was notified meanwhile has begun the next one.
                if dataset.attempts[-1].outcome != "failed" and not dataset.refresh.is_running:
                    self.check(dataset, database)
                self.assertFalse(dataset.held)
            await deferLater(reactor, choose.random() * 0.02)
        stop.set()
        for succeeded, result in await writers:
            self.assertTrue(succeeded, f"seed {SEED}: {result}")
            self.assertGreaterEqual(result, LEAST_COMMITS, f"seed {SEED}")
        self.assertGreater(database.kinds.count("delta"), rounds, f"seed {SEED}: {database.reasons}")
        # Whether a writer has truncated is left to chance; the last one is not.
        await deferToThread(self.sql, "TRUNCATE prices")  # it waits for a refresh that a late notification has begun
        await self.until_replayed()
        service.note_changed(dataset.name, ())
        # An attempt that began before it may end first, and does not know of it.
        await self.until(lambda: any("was truncated" in reason for reason in database.reasons))
        # And a full read finds nothing that the deltas missed.
        for name, dataset in cache.datasets.items():
            ended = dataset.counts.outcomes.total()
            service.refresh_now(name)
            await self.until(lambda dataset=dataset, ended=ended: dataset.counts.outcomes.total() > ended)
            self.check(dataset, database)
            self.assertEqual(dataset.counts.differences, 0, f"seed {SEED}: {self.log.events[-5:]}")
        await service.stopService()
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    async def until_replayed(self) -> None:
        """A reader of a standby sees now what was committed before."""
        with closing(psycopg2.connect(self.dsn)) as primary, closing(psycopg2.connect(self.read_dsn)) as standby:
            written, replayed = primary.cursor(), standby.cursor()
            standby.autocommit = True
            written.execute("SELECT pg_current_wal_lsn()")
            wanted = written.fetchone()

            def is_replayed() -> bool:
                replayed.execute("SELECT pg_is_in_recovery() AND pg_last_wal_replay_lsn() < %s", wanted)
                return replayed.fetchone() == (False,)

            await self.until(is_replayed)

    async def test_commits_out_of_order(self) -> None:
        """What a transaction did that began before a refresh and ends after it is found by the next one."""
        service, cache, database = self.service(PRODUCTS)
        service.startService()
        dataset = cache.dataset("products")
        await self.until(lambda: dataset.snapshot)
        with closing(psycopg2.connect(self.dsn)) as early, closing(psycopg2.connect(self.dsn)) as late:
            early.cursor().execute("UPDATE products SET n = 1 WHERE id = 1")
            late.cursor().execute("UPDATE products SET n = 2 WHERE id = 2")
            late.commit()
            await self.refreshed(service, dataset, database)
            self.assertEqual(self.n(dataset, 1, 2), [0, 2])
            early.commit()
        await self.refreshed(service, dataset, database)
        self.assertEqual(self.n(dataset, 1, 2), [1, 2])
        self.assertEqual(database.changing, ["all", "delta", "delta"])
        await service.stopService()

    async def test_a_merge_across_partitions(self) -> None:
        """What it moves is served as it is afterwards, though no trigger sees it; other updates stay deltas."""
        self.sql(
            "CREATE TABLE sales (id int, region text, n int) PARTITION BY LIST (region);"
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a');"
            "CREATE TABLE sales_b PARTITION OF sales FOR VALUES IN ('b');"
            "INSERT INTO sales SELECT i, 'a', 0 FROM generate_series(1, 50) AS i"
        )
        self.watch_sales()
        service, cache, database = self.service(
            {"name": "sales", "query": "TABLE sales", "key": "id", "watch": [{"table": "public.sales", "key": "id"}]}
        )
        service.startService()
        dataset = cache.dataset("sales")
        await self.until(lambda: dataset.snapshot)
        statements = ["UPDATE sales SET n = 1 WHERE id = 1", "UPDATE sales SET region = 'b', n = 2 WHERE id = 2"]
        kinds = ["all", "delta", "delta"]
        with closing(psycopg2.connect(self.dsn)) as connection:
            if connection.server_version >= 150_000:
                merge = "MERGE INTO sales AS s USING (VALUES (3)) AS v (id) ON s.id = v.id "
                statements += [f"{merge} WHEN MATCHED THEN UPDATE SET region = 'b', n = 3", statements[0]]
                kinds += [self.after_a_merge, "delta"]
        for statement in statements:
            self.sql(statement)
            await self.refreshed(service, dataset, database)
        self.assertEqual(database.changing, kinds)
        await service.stopService()

    async def test_a_truncate_waits(self) -> None:
        """A TRUNCATE cannot come between the snapshot of a delta and what it reads."""
        service, cache, database = self.service(PRODUCTS)
        service.startService()
        dataset = cache.dataset("products")
        await self.until(lambda: dataset.snapshot)
        truncated: list[Deferred[None]] = []
        changes = database.capturing.changes

        async def changes_while_truncated(*arguments: Any) -> Any:
            told = await changes(*arguments)
            truncated.append(deferToThread(self.sql, "TRUNCATE products"))
            await deferLater(reactor, 0.2)
            self.assertFalse(truncated[0].called)
            return told

        self.patch(database.capturing, "changes", changes_while_truncated)
        self.sql("UPDATE products SET n = 7 WHERE id = 7")
        await self.refreshed(service, dataset, database)
        self.assertEqual(self.n(dataset, 7), [7])
        await truncated[0]
        await service.stopService()

    async def attempted(self, service: CacheService, dataset: Dataset) -> None:
        # A late notification may have begun an attempt, which does not see what was committed since.
        await self.until(lambda: not dataset.refresh.is_running)
        ended = dataset.counts.outcomes.total()
        service.note_changed(dataset.name, ())
        await self.until(lambda: dataset.counts.outcomes.total() > ended)

    async def refreshed(self, service: CacheService, dataset: Dataset, database: Compared) -> None:
        await self.attempted(service, dataset)
        await self.until(lambda: not dataset.refresh.is_running)
        self.check(dataset, database)

    def n(self, dataset: Dataset, *ids: int) -> list[int]:
        assert dataset.snapshot is not None
        documents = [dataset.snapshot.rows.get(b"%d" % number) or b"" for number in ids]
        return [int(document.rpartition(b":")[2].rstrip(b"}")) for document in documents]


@pytest.mark.usefixtures("preparing_server")
class LogicalProof(Proof):
    """The same laws of changes that are captured by logical decoding."""

    after_a_merge = "delta"

    def watch_tables(self) -> None:
        self.sql("DROP PUBLICATION IF EXISTS cacheservice; ALTER TABLE prices REPLICA IDENTITY FULL")
        self.sql("CREATE PUBLICATION cacheservice FOR TABLE products, prices WITH (publish_via_partition_root = true)")

    def watch_sales(self) -> None:
        self.sql("ALTER TABLE sales_a REPLICA IDENTITY FULL; ALTER TABLE sales_b REPLICA IDENTITY FULL")
        self.sql("ALTER PUBLICATION cacheservice ADD TABLE sales")

    def use_capture(self, cache: Cache, database: Compared, service: CacheService) -> None:
        self.capture = capturing(self, self.read_dsn, cache, database, service, self.log)


def write(dsn: str, choose: random.Random, stop: threading.Event, number: int) -> int:
    """Run random transactions until `stop` is set and enough have committed; return how many did."""
    committed = 0
    with closing(psycopg2.connect(dsn)) as connection:
        while committed < LEAST_COMMITS or not stop.is_set():
            prepared = choose.random() < 0.15
            if prepared:
                connection.tpc_begin(connection.xid(1, f"{number}-{committed}-{choose.random()}", "test"))
            try:
                with connection.cursor() as cursor:
                    for _ in range(choose.choice([1, 1, 1, 3, 10])):
                        step(cursor, choose)
                        if choose.random() < 0.1:
                            time.sleep(choose.random() * 0.05)
                if prepared:
                    connection.tpc_prepare()
                    time.sleep(choose.random() * 0.1)
                    (connection.tpc_commit if choose.random() < 0.8 else connection.tpc_rollback)()
                else:
                    (connection.commit if choose.random() < 0.85 else connection.rollback)()
                committed += 1
            except (
                psycopg2.errors.UniqueViolation,
                psycopg2.errors.DeadlockDetected,
                psycopg2.errors.CardinalityViolation,
            ):
                (connection.tpc_rollback if prepared else connection.rollback)()
            time.sleep(choose.random() * 0.01)
    return committed


def step(cursor: Any, choose: random.Random) -> None:
    """One statement, or a few that belong together."""
    one, other, n = choose.randrange(KEYS), choose.randrange(KEYS), choose.randrange(10**6)
    what = choose.randrange(13)
    if what == 11 and cursor.connection.server_version < 150_000:
        what = 4  # no MERGE before PostgreSQL 15
    if what == 0:
        cursor.execute("UPDATE products SET n = %s WHERE id = %s", (n, one))
    elif what == 1:
        cursor.execute("UPDATE products SET n = %s WHERE id %% 10 = %s", (n, one % 10))
    elif what == 2:
        cursor.execute("UPDATE products SET id = %s WHERE id = %s", (other, one))
    elif what == 3:
        cursor.execute("DELETE FROM products WHERE id = %s", (one,))
    elif what == 4:
        cursor.execute("INSERT INTO products VALUES (%s, 'new', %s) ON CONFLICT (id) DO UPDATE SET n = -1", (one, n))
    elif what == 5:
        cursor.execute("DELETE FROM products WHERE id = %s", (one,))
        cursor.execute("INSERT INTO products VALUES (%s, 'again', %s)", (one, n))
    elif what == 6:
        cursor.execute("SAVEPOINT s")
        cursor.execute("UPDATE products SET n = %s WHERE id = %s", (n, one))
        cursor.execute("ROLLBACK TO s" if choose.random() < 0.5 else "RELEASE s")
    elif what == 7:
        cursor.execute("UPDATE prices SET amount = %s WHERE product_id = %s", (n, one))
    elif what == 8:
        cursor.execute("UPDATE prices SET product_id = %s WHERE product_id = %s AND currency = 'EUR'", (other, one))
    elif what == 9:
        cursor.execute("DELETE FROM prices WHERE product_id = %s", (one,))
    elif what == 10:
        cursor.execute("DELETE FROM prices WHERE product_id = %s", (one,))
        cursor.copy_expert("COPY prices FROM STDIN", StringIO(f"{one}\tEUR\t{n}\n{one}\ta:b\t{n}\n"))
    elif what == 11:
        cursor.execute(
            "MERGE INTO products AS p USING (VALUES (%s, %s)) AS v (id, n) ON p.id = v.id "
            "WHEN MATCHED AND v.n %% 3 = 0 THEN DELETE WHEN MATCHED THEN UPDATE SET n = v.n "
            "WHEN NOT MATCHED THEN INSERT VALUES (v.id, 'merged', v.n)",
            (one, n),
        )
    elif choose.random() < 0.05:
        cursor.execute("TRUNCATE prices" if n % 2 else "TRUNCATE products")
        cursor.execute(
            "INSERT INTO products SELECT i, 'refilled', 0 FROM generate_series(1, 50) AS i ON CONFLICT DO NOTHING"
        )
    with contextlib.suppress(psycopg2.ProgrammingError):
        cursor.fetchall()
