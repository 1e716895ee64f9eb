"""Laws of a stream of changes by logical decoding: it misses no key, leaves nothing behind, and never hangs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from cacheservice.base.errors import DatabaseUnavailable, QueryFailed, RefreshFailed
from cacheservice.cache.identity import Visibility
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.connector import Connector, ReplicationSession
from cacheservice.sources.postgres.guard import KEEPALIVES, GuardedConnection
from cacheservice.sources.postgres.logical.kept import Bounds, Committed, Kept, Transactions, full_xid
from cacheservice.sources.postgres.logical.pgoutput import Decoder, Key, Relation
from cacheservice.sources.postgres.logical.stream import ChangeStream, StreamObserver, position
from cacheservice.sources.postgres.resolve import Resolver
from cacheservice.sources.postgres.target import parse
from tests.kit.chaos import FaultyNetwork
from tests.kit.guard import Ticker
from tests.kit.postgres import connect, fresh_database, query
from tests.kit.versions import MakeServer, running_server
from tests.kit.waiting import until

PUBLICATION = "cacheservice"
MANY = Bounds(100_000, 1 << 24)
ROWS = 50_000
WRITERS = 4
ROUNDS = 60
SEED = 20261130


@pytest.fixture(scope="module")
def logical_postgres(make_server: MakeServer) -> Iterator[EmbeddedPostgres]:
    with running_server(make_server, wal_level="logical", wal_writer_delay="10ms") as server:
        yield server


@pytest.fixture(scope="class")
def logical_server(request: pytest.FixtureRequest, logical_postgres: EmbeddedPostgres) -> None:
    request.cls.server = logical_postgres


class Stream:
    """A stream of the watched table `things`, and what it has reported."""

    def __init__(self, target: str, connector: Connector, bounds: Bounds, near: int) -> None:
        self.began: list[int] = []
        self.committed: list[Committed] = []
        self.kept = Kept(bounds)
        self.guard = GuardedConnection(reactor, parse(target), reactor.seconds() + 60)
        transactions = Transactions(bounds, lambda xid: full_xid(xid, near))
        self.stream = ChangeStream(
            self.guard, Decoder(self._places), transactions, StreamObserver(self.began.append, self._keep), reactor
        )
        self._connector = connector
        self.oid = 0
        self.ended: Deferred[Any] = Deferred.fromCoroutine(self._run())
        self.failure: Failure | None = None
        self.ended.addErrback(self._note)

    def _places(self, relation: Relation) -> list[int] | None:
        if relation.name != "things":
            return None
        self.oid = relation.oid
        return [[column.name for column in relation.columns].index("id")]

    def _keep(self, committed: Committed) -> None:
        self.committed.append(committed)
        self.kept.add(committed)

    def _note(self, failure: Failure) -> None:
        self.failure = failure

    async def _run(self) -> None:
        try:
            await self.guard.connect(self._connector, "changes", 30.0, KEEPALIVES, ReplicationSession)
            await self.stream.run(PUBLICATION)
        finally:
            self.guard.close_and_passthrough(None)

    async def until_began(self) -> None:
        await until(lambda: bool(self.began) or self.failure is not None)
        if self.failure is not None:
            self.failure.raiseException()

    @property
    def keys(self) -> list[set[Key] | None]:
        found = [(each.changed[self.oid], each.more) for each in self.committed if self.oid in each.changed]
        return [None if keys is None else set(keys).union(*(part.keys for part in more)) for keys, more in found]


@pytest.mark.usefixtures("logical_server")
class Streams(TestCase):
    server: EmbeddedPostgres
    timeout = 120

    def setUp(self) -> None:
        self.database = fresh_database(self.server, self.addCleanup)
        self.resolver = Resolver(reactor)
        self.addCleanup(self.resolver.stop)
        self.connector = Connector(reactor, self.resolver.resolve)
        self.sql("CREATE TABLE things AS SELECT i AS id, 0 AS n FROM generate_series(1, 10) AS i")
        self.sql("ALTER TABLE things ADD PRIMARY KEY (id)")
        self.sql(f"CREATE PUBLICATION {PUBLICATION} FOR TABLE things")

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.server, self.database, statement)

    def streaming(self, bounds: Bounds = MANY, **dsn: Any) -> Stream:
        ((near,),) = self.sql("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        stream = Stream(self.server.dsn(database=self.database, **dsn), self.connector, bounds, near)
        self.addCleanup(until, lambda: not self.slots())
        self.addCleanup(stream.ended.cancel)
        return stream

    def slots(self) -> list[tuple[Any, ...]]:
        return query(
            self.server,
            "postgres",
            f"SELECT active_pid, temporary, wal_status FROM pg_replication_slots WHERE database = '{self.database}'",
        )

    async def passed(self, stream: Stream) -> None:
        ((lsn,),) = self.sql("SELECT pg_current_wal_insert_lsn()::text")
        self.assertTrue(await stream.stream.until_passed(position(lsn)))

    async def test_keys(self) -> None:
        """The keys of each transaction, in the order of the commits; nothing that was rolled back."""
        stream = self.streaming()
        await stream.until_began()
        self.sql("UPDATE things SET n = 1 WHERE id IN (3, 4)")
        self.sql("BEGIN; UPDATE things SET n = 2; ROLLBACK")
        self.sql("UPDATE things SET id = 20 WHERE id = 5")
        self.sql("CREATE TABLE other (id integer PRIMARY KEY); INSERT INTO other VALUES (1)")
        self.sql("TRUNCATE things")
        await self.passed(stream)
        self.assertEqual(stream.keys, [{("3",), ("4",)}, {("5",), ("20",)}, None])
        ((xid,),) = self.sql("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        numbers = [each.xid for each in stream.committed]
        self.assertEqual(numbers, sorted(numbers))
        self.assertLess(xid - numbers[-1], 100)

    async def test_the_slot_is_temporary(self) -> None:
        """There is one slot, which does not outlive its session, whichever end closes that."""
        for end in ("ours", "theirs", "network"):
            network = FaultyNetwork(self.server.port)
            await network.start()
            stream = self.streaming(port=network.port)
            await stream.until_began()
            ((pid, temporary, _),) = self.slots()
            self.assertTrue(temporary)
            waiting = stream.stream.until_passed(1 << 62)
            if end == "ours":
                stream.ended.cancel()
            elif end == "theirs":
                query(self.server, "postgres", f"SELECT pg_terminate_backend({pid})")
            else:
                network.reset()
            self.assertFalse(await waiting)
            await until(lambda stream=stream: stream.failure is not None)
            if end != "ours":
                self.assertIsInstance(stream.failure.value, RefreshFailed)
            await until(lambda: not self.slots())
            await network.stop()

    async def test_what_cannot_work(self) -> None:
        """Without the right to replicate the error is the server's."""
        role = f"role_{self.database}"
        self.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {role}")
        stream = self.streaming(user=role, password="secret")
        await until(lambda: stream.failure is not None)
        self.assertIsInstance(stream.failure.value, (DatabaseUnavailable, QueryFailed))
        self.assertIn("replication", str(stream.failure.value).lower())

    async def test_a_transaction_delays_the_slot(self) -> None:
        """A slot waits for transactions that write; so does the stream, and everything else goes on."""
        with closing(connect(self.server, self.database)) as blocker, blocker.cursor() as cursor:
            cursor.execute("BEGIN; UPDATE things SET n = 1 WHERE id = 1")
            stream = self.streaming()
            await until(lambda: bool(self.slots()))
            self.assertEqual(stream.began, [])
            cursor.execute("COMMIT")
            await stream.until_began()
        self.sql("UPDATE things SET n = 2 WHERE id = 2")
        await self.passed(stream)
        self.assertEqual(stream.keys[-1], {("2",)})

    async def test_a_large_transaction(self) -> None:
        """Its rows are decoded in many turns; beyond the bounds its keys are not collected."""
        for bounds, known in ((Bounds(2 * ROWS, 1 << 26), True), (Bounds(1000, 1 << 26), False)):
            stream = self.streaming(bounds)
            await stream.until_began()
            ticker = Ticker()
            await deferToThread(
                self.sql, f"INSERT INTO things SELECT i, 0 FROM generate_series(1000, {999 + ROWS}) AS i"
            )
            await self.passed(stream)
            ticker.stop()
            self.assertEqual([None if keys is None else len(keys) for keys in stream.keys], [ROWS if known else None])
            self.assertLess(ticker.longest_gap_s, 0.5)
            self.sql("DELETE FROM things WHERE id >= 1000")
            stream.ended.cancel()

    async def test_random_writers(self) -> None:
        """Between any two snapshots each row that differs is among the changed keys."""
        stream = self.streaming()
        await stream.until_began()
        choose = random.Random(SEED)
        writers = [connect(self.server, self.database) for _ in range(WRITERS)]
        for writer in writers:
            self.addCleanup(writer.close)
            writer.autocommit = False
        with closing(connect(self.server, self.database)) as reading:
            reading.set_session(isolation_level="REPEATABLE READ", readonly=True, autocommit=False)
            before: dict[str, int] = {}
            snapshot = ""
            for _ in range(ROUNDS):
                for _ in range(choose.randint(0, 4)):
                    number = choose.randrange(WRITERS)
                    self._write(number, writers[number], choose)
                with reading.cursor() as cursor:
                    cursor.execute("SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text")
                    ((now, lsn),) = cursor.fetchall()
                    # What transactions in progress have written reaches the disk with the next commit, not before.
                    self.sql("SELECT pg_logical_emit_message(true, 'test', '')")
                    self.assertTrue(await stream.stream.until_passed(position(lsn)))
                    cursor.execute("SELECT id::text, n FROM things")
                    rows = dict(cursor.fetchall())
                reading.rollback()
                if snapshot:
                    base = Visibility.of(snapshot, in_recovery=False)
                    keys = stream.kept.changed(stream.oid, base) if stream.oid else frozenset()
                    differing = {key for key in before.keys() | rows.keys() if before.get(key) != rows.get(key)}
                    self.assertLessEqual({(key,) for key in differing}, keys)
                before, snapshot = rows, now
                stream.kept.forget([Visibility.of(snapshot, in_recovery=False)])

    def _write(self, number: int, writer: Any, choose: random.Random) -> None:
        """A statement that may leave its transaction open; each writer has rows of its own, so that none waits."""
        with writer.cursor() as cursor:
            key = 1000 * (1 + number) + choose.randint(1, 5)
            cursor.execute(
                choose.choice(
                    (
                        "INSERT INTO things VALUES (%(key)s, 0) ON CONFLICT (id) DO UPDATE SET n = things.n + 1",
                        "DELETE FROM things WHERE id = %(key)s",
                        "UPDATE things SET n = n + 1 WHERE id = %(key)s",
                    )
                ),
                {"key": key},
            )
        if choose.random() < 0.6:
            (writer.commit if choose.random() < 0.8 else writer.rollback)()
