"""Laws of changes captured from the log: each change is read by a delta, or all rows are, and the reason names it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.base import shipped
from cacheservice.cache.cache import Cache
from cacheservice.cache.capture import CaptureStatus, captured_by
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres.capturing import Mode
from cacheservice.sources.postgres.logical import service
from cacheservice.sources.postgres.logical.service import Capture
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.watch import watch
from tests.kit import pgbouncer
from tests.kit.capturing import LOGICAL, capturing
from tests.kit.compared import Compared
from tests.kit.datasets import table_of
from tests.kit.logs import Log
from tests.kit.postgres import at_least, connect, fresh_database, query
from tests.kit.readings import refreshes_of
from tests.kit.standby import running_standby
from tests.kit.versions import MakeServer, running_server
from tests.kit.waiting import until

ROWS = "INSERT INTO t SELECT i, i, i FROM generate_series(1, 20) AS i"
PLAIN = f"CREATE TABLE t (id int PRIMARY KEY, other int, n int); {ROWS}"
PUBLISHED = "CREATE PUBLICATION cacheservice FOR TABLE t"
PARTITIONED = (
    "CREATE TABLE t (id int, other int, n int, PRIMARY KEY (id, other)) PARTITION BY LIST (other);"
    "CREATE TABLE t_low PARTITION OF t FOR VALUES IN (1, 2, 3, 4, 5, 6, 7, 8, 9, 10);"
    f"CREATE TABLE t_rest PARTITION OF t DEFAULT; {ROWS};"
    "ALTER TABLE t_low REPLICA IDENTITY FULL; ALTER TABLE t_rest REPLICA IDENTITY FULL"
)
BY_ROOT = f"{PUBLISHED} WITH (publish_via_partition_root = true)"
DELTA = "delta"

# The set-up, and statements with what must be read after each: a delta, or all rows for a reason. None: nothing new.
CASES: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "keys that change": (
        f"{PLAIN}; {PUBLISHED}",
        [
            ("UPDATE t SET n = 0 WHERE id = 1", DELTA),
            ("UPDATE t SET id = 100 WHERE id = 2", DELTA),
            ("DELETE FROM t WHERE id = 3", DELTA),
            ("INSERT INTO t VALUES (2, 2, 2), (3, 3, 3)", DELTA),
            ("CREATE TABLE unrelated (i int); INSERT INTO unrelated VALUES (1)", None),
        ],
    ),
    "truncate": (
        f"{PLAIN}; {PUBLISHED}",
        [("TRUNCATE t", "was truncated"), ("INSERT INTO t VALUES (1, 1, 1)", DELTA)],
    ),
    "rewriting": (
        f"{PLAIN}; {PUBLISHED}",
        [
            ("ALTER TABLE t ADD COLUMN more int DEFAULT 7", "definition"),
            ("UPDATE t SET n = 9 WHERE id = 4; ALTER TABLE t ALTER n TYPE bigint", "definition"),
            ("VACUUM FULL t", "was truncated or rewritten"),
            ("UPDATE t SET n = 10 WHERE id = 4", DELTA),
        ],
    ),
    "identity full": (
        f"CREATE TABLE t (id int, other int, n int); {ROWS}; ALTER TABLE t REPLICA IDENTITY FULL; {PUBLISHED}",
        [("UPDATE t SET id = 30 WHERE id = 1", DELTA), ("DELETE FROM t WHERE id = 30", DELTA)],
    ),
    "identity by an index": (
        f"CREATE TABLE t (id int NOT NULL UNIQUE, other int, n int); {ROWS};"
        f"ALTER TABLE t REPLICA IDENTITY USING INDEX t_id_key; {PUBLISHED}",
        [("UPDATE t SET id = 30 WHERE id = 1", DELTA), ("DELETE FROM t WHERE id = 30", DELTA)],
    ),
    "identity without the key": (
        f"{PLAIN}; ALTER TABLE t ALTER other SET NOT NULL; CREATE UNIQUE INDEX i ON t (other); {PUBLISHED}",
        [
            (
                "ALTER TABLE t REPLICA IDENTITY USING INDEX i; UPDATE t SET id = 30 WHERE id = 1",
                "run ALTER TABLE t REPLICA IDENTITY FULL",
            ),
            ("ALTER TABLE t REPLICA IDENTITY DEFAULT; UPDATE t SET n = 5 WHERE id = 2", "only since the last refresh"),
            (
                "ALTER TABLE t REPLICA IDENTITY USING INDEX i; UPDATE t SET id = 31 WHERE id = 3;"
                "ALTER TABLE t REPLICA IDENTITY DEFAULT",
                "replica identity was changed",
            ),
            ("UPDATE t SET n = 6 WHERE id = 2", DELTA),
        ],
    ),
    "partitions by their root": (
        f"{PARTITIONED}; {BY_ROOT}",
        [
            ("UPDATE t SET n = 0 WHERE id = 1", DELTA),
            ("UPDATE t SET other = 15, id = 40 WHERE id = 2", DELTA),
            ("CREATE TABLE t_new PARTITION OF t FOR VALUES IN (77)", "partitions"),
            ("ALTER TABLE t_new REPLICA IDENTITY FULL; INSERT INTO t VALUES (50, 77, 1)", DELTA),
            ("ALTER TABLE t DETACH PARTITION t_new", "partitions"),
            ("INSERT INTO t_new VALUES (51, 77, 1); ALTER TABLE t ATTACH PARTITION t_new FOR VALUES IN (77)", "partit"),
            ("TRUNCATE t_low", "was truncated"),
        ],
    ),
    "partitions by themselves": (
        f"{PARTITIONED}; {PUBLISHED}",
        [
            ("UPDATE t SET n = 0 WHERE id = 1", DELTA),
            ("UPDATE t SET other = 15, id = 40 WHERE id = 2", DELTA),
            ("DELETE FROM t_rest WHERE id = 40", DELTA),
            ("ALTER TABLE t DETACH PARTITION t_low; ALTER TABLE t ATTACH PARTITION t_low "
             "FOR VALUES IN (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)", "partitions"),
        ],
    ),
    "inheritance": (
        f"{PLAIN}; CREATE TABLE child (PRIMARY KEY (id)) INHERITS (t); INSERT INTO child VALUES (70, 7, 7);"
        f"{PUBLISHED}",
        [
            ("UPDATE t SET n = 1 WHERE id IN (1, 70)", DELTA),
            ("DELETE FROM child", DELTA),
            ("CREATE TABLE other_child (PRIMARY KEY (id)) INHERITS (t); INSERT INTO other_child VALUES (80, 8, 8)",
             "other_child is not in the publication"),
        ],
    ),
    "tables that leave the publication": (
        f"{PLAIN}; CREATE TABLE u (i int); {PUBLISHED}, u",
        [
            ("ALTER PUBLICATION cacheservice DROP TABLE t; UPDATE t SET n = 3 WHERE id = 3",
             "t is not in the publication cacheservice; run cacheservice watch --logical public.t --key id"),
            ("ALTER PUBLICATION cacheservice ADD TABLE t; UPDATE t SET n = 4 WHERE id = 4", "only since the last"),
            ("ALTER PUBLICATION cacheservice DROP TABLE t; UPDATE t SET n = 5 WHERE id = 5;"
             "ALTER PUBLICATION cacheservice ADD TABLE t", "was removed from the publication or added to it"),
            ("UPDATE t SET n = 6 WHERE id = 6", DELTA),
            ("ALTER PUBLICATION cacheservice SET (publish = 'insert'); UPDATE t SET n = 7 WHERE id = 7",
             "does not publish all kinds of changes"),
            ("ALTER PUBLICATION cacheservice SET (publish = 'insert, update, delete, truncate')", "only since"),
        ],
    ),
    "savepoints": (
        f"{PLAIN}; {PUBLISHED}",
        [("INSERT INTO t SELECT i, i, i FROM generate_series(1000, 1060) AS i", DELTA),
         ("BEGIN; SAVEPOINT s; DELETE FROM t WHERE id > 1000; ROLLBACK TO s; SAVEPOINT s2; "
          "UPDATE t SET n = 1 WHERE id = 1030; RELEASE s2; COMMIT", DELTA)],
    ),
    "values that are stored out of line": (
        "CREATE TABLE t (id text PRIMARY KEY, other text, n int); ALTER TABLE t ALTER id SET STORAGE EXTERNAL;"
        "INSERT INTO t SELECT rpad(i::text, 2100, 'x'), repeat('y', 90000), i FROM generate_series(1, 9) AS i;"
        f"{PUBLISHED}",
        [("UPDATE t SET n = 0 WHERE n = 1", DELTA), ("DELETE FROM t WHERE n = 2", DELTA),
         ("UPDATE t SET id = 'short' WHERE n = 3", DELTA)],
    ),
    "keys of booleans": (
        "CREATE TABLE t (id boolean PRIMARY KEY, other int, n int); INSERT INTO t VALUES (true, 1, 1), (false, 2, 2);"
        f"{PUBLISHED}",
        [("UPDATE t SET n = 5 WHERE id", DELTA), ("DELETE FROM t WHERE NOT id", DELTA)],
    ),
    "a replica's writes": (
        f"{PLAIN}; {PUBLISHED}",
        [("SET session_replication_role = replica; UPDATE t SET n = 0 WHERE id = 1", DELTA)],
    ),
    "generated columns": (
        f"CREATE TABLE t (id int PRIMARY KEY, other int, n int, twice int GENERATED ALWAYS AS (2 * n) STORED);"
        f"{ROWS}; {PUBLISHED}",
        [("UPDATE t SET n = 50 WHERE id = 5", DELTA)],
    ),
    "all tables": (
        f"{PLAIN}; CREATE PUBLICATION cacheservice FOR ALL TABLES",
        [("UPDATE t SET n = 0 WHERE id = 1", DELTA)],
    ),
}  # fmt: skip
LISTS: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "a filter of rows": (f"{PLAIN}; {PUBLISHED} WHERE (id > 5)",
                         [("UPDATE t SET n = 0 WHERE id = 1", "filters the rows of t")]),
    "a list of columns": (f"{PLAIN}; {PUBLISHED} (id)", [("UPDATE t SET n = 0 WHERE id = 1", DELTA)]),
    "a schema": (
        f"{PLAIN}; CREATE PUBLICATION cacheservice FOR TABLES IN SCHEMA public; CREATE SCHEMA elsewhere",
        [("UPDATE t SET n = 0 WHERE id = 1", DELTA),
         ("ALTER TABLE t SET SCHEMA elsewhere; UPDATE elsewhere.t SET n = 9 WHERE id = 2;"
          "ALTER TABLE elsewhere.t SET SCHEMA public", "changed")],
    ),
}  # fmt: skip
"""Only from PostgreSQL 15 on."""


@pytest.fixture(scope="module")
def logical_postgres(make_server: MakeServer) -> Iterator[EmbeddedPostgres]:
    with running_server(make_server, max_prepared_transactions="10", **LOGICAL) as server:
        yield server


@pytest.fixture(scope="class")
def logical_server(request: pytest.FixtureRequest, logical_postgres: EmbeddedPostgres) -> None:
    request.cls.server = logical_postgres


class CaptureTestCase(TestCase):
    """A dataset over the table `t` of a database of its own, whose changes are captured."""

    server: EmbeddedPostgres
    timeout = 120

    def setUp(self) -> None:
        self.log = Log()
        if getattr(self, "server", None) is not None:
            self.database_name = fresh_database(self.server, self.addCleanup)

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.server, self.database_name, statement)

    def run_each(self, statements: str) -> None:
        """Run statements in one session, each in a transaction of its own unless one begins one."""
        with closing(connect(self.server, self.database_name)) as connection, connection.cursor() as cursor:
            for statement in filter(str.strip, statements.split(";")):
                cursor.execute(statement)

    async def capture(self, mode: Mode = "logical", dsn: str = "", **more: Any) -> None:
        """Begin to serve the table."""
        settings = {"name": "t", "query": "TABLE t", "key": "id", "interval_s": 3600.0, "timeout_s": 60.0}
        settings |= {"watch": [{"table": "public.t", "key": "id"}], "max_delta": 1.0, "max_shrink": 1.0}
        self.cache = Cache([DatasetSettings.model_validate(settings | more)], reactor.seconds)
        dsn = dsn or self.server.dsn(database=self.database_name)
        self.reads = Compared(reactor, parse(dsn), 5.0, self.cache.database)
        self.service = refreshes_of(self.cache, self.reads, self.log)
        self.addCleanup(until, lambda: not self.slots())
        self.addCleanup(self.reads.stop)
        self.capturing: Capture = capturing(self, dsn, self.cache, self.reads, self.service, self.log, mode)
        self.addCleanup(lambda: self.service.stopService() if self.service.running else None)
        self.service.startService()
        self.dataset = self.cache.dataset("t")
        await self.until(lambda: self.dataset.snapshot)
        await self.forget_reads()

    async def forget_reads(self) -> None:
        """Let `read` return what is read from now on."""
        await self.until(lambda: not self.dataset.refresh.is_running)
        self.reads.reasons.clear()
        self.seen = len(self.reads.kinds)

    def slots(self) -> list[tuple[Any, ...]]:
        return self.sql(
            f"SELECT slot_name, temporary FROM pg_replication_slots WHERE database = '{self.database_name}'"
        )

    async def until(self, true: Callable[[], object]) -> None:
        await until(true, seen=lambda: self.log.events[-5:])

    async def read(self) -> str | None:
        """Refresh; return what was read since the last call: a delta, all rows (the reason), or nothing (None).

        The notification of a change may begin a refresh before this one does.
        """
        await self.until(lambda: not self.dataset.refresh.is_running)
        ended = self.dataset.counts.outcomes.total()
        self.service.note_changed("t", ())
        await self.until(lambda: self.dataset.counts.outcomes.total() > ended and not self.dataset.refresh.is_running)
        self.check()
        kinds, self.seen = set(self.reads.kinds[self.seen :]), len(self.reads.kinds)
        reasons = "; ".join(self.reads.reasons)
        self.reads.reasons.clear()
        return reasons if "all" in kinds else DELTA if DELTA in kinds else None

    def check(self) -> None:
        """What is served is what the query returned in the last transaction."""
        assert self.dataset.snapshot is not None
        moment, whole = self.reads.whole["t"]
        self.assertEqual(self.dataset.snapshot.database_snapshot, moment)
        self.assertEqual(table_of(self.dataset.snapshot.rows), whole)


@pytest.mark.usefixtures("logical_server")
class Changes(CaptureTestCase):
    async def prove(self, set_up: str, steps: list[tuple[str, str | None]]) -> None:
        self.run_each(set_up)
        await self.capture()
        for statements, expected in steps:
            await self.until(lambda: not self.dataset.refresh.is_running)
            # A thread, because a statement may wait for a refresh that another statement has begun.
            await deferToThread(self.run_each, statements)
            read = await self.read()
            if expected in (DELTA, None):
                self.assertEqual(read, expected, statements)
            else:
                self.assertIn(expected, read or "nothing was read", statements)
        # And a check finds nothing that was missed.
        ended = self.dataset.counts.outcomes.total()
        self.service.refresh_now("t")
        await self.until(lambda: self.dataset.counts.outcomes.total() > ended)
        self.check()
        self.assertEqual(self.dataset.counts.differences, 0)

    async def test_two_keys_of_one_table(self) -> None:
        """Datasets may watch a table by different keys; each has its own."""
        self.run_each(
            "CREATE TABLE t (id int PRIMARY KEY, other int, n int); CREATE TABLE o (id int PRIMARY KEY, name text);"
            f"INSERT INTO o SELECT i, 'name' FROM generate_series(1, 20) AS i; {ROWS};"
            "ALTER TABLE t REPLICA IDENTITY FULL; CREATE PUBLICATION cacheservice FOR TABLE t, o"
        )
        await self.capture(
            query="SELECT o.id, o.name, (SELECT sum(n) FROM t WHERE t.other = o.id) AS n FROM o",
            watch=[{"table": "public.o", "key": "id"}, {"table": "public.t", "key": "other"}],
        )
        for statement in (
            "UPDATE t SET n = 100 WHERE id = 3",
            "UPDATE t SET other = 9 WHERE id = 4",
            "DELETE FROM t WHERE id = 5",
            "UPDATE o SET name = 'new' WHERE id = 5",
        ):
            await deferToThread(self.run_each, statement)
            self.assertEqual(await self.read(), DELTA, statement)

    async def test_a_change_is_noticed(self) -> None:
        """A commit begins a refresh by itself; nobody sends a NOTIFY, and the interval is an hour."""
        self.run_each(f"{PLAIN}; {PUBLISHED}")
        await self.capture()
        self.assertEqual(self.slots()[0][1:], (True,))
        for number in range(5):
            self.run_each(f"UPDATE t SET n = {100 + number} WHERE id = 1")
            served = b'"n":%d' % (100 + number)
            await self.until(lambda served=served: served in (self.dataset.snapshot.rows.get(b"1") or b""))
        self.assertEqual(self.reads.changing, ["all", *[DELTA] * 5])

    async def test_transactions_that_began_before(self) -> None:
        """A transaction that had changed a table before that was published is known only in part: all rows are read."""
        self.run_each(f"{PLAIN}; CREATE TABLE u (i int); CREATE PUBLICATION cacheservice FOR TABLE u")
        await self.capture()
        with closing(connect(self.server, self.database_name)) as early:
            early.autocommit = False
            early.cursor().execute("UPDATE t SET n = 70 WHERE id = 7")
            self.run_each("ALTER PUBLICATION cacheservice ADD TABLE t")
            await self.read()
            early.cursor().execute("UPDATE t SET n = 80 WHERE id = 8")
            early.commit()
        self.assertIn("a transaction had begun before", await self.read() or "")
        self.run_each("UPDATE t SET n = 81 WHERE id = 8")
        self.assertEqual(await self.read(), DELTA)

    async def test_a_prepared_transaction(self) -> None:
        """It is captured when it is committed, whenever that is."""
        self.run_each(f"{PLAIN}; {PUBLISHED}")
        await self.capture()
        with closing(connect(self.server, self.database_name)) as connection:
            connection.autocommit = False
            connection.tpc_begin(connection.xid(1, self.database_name, "test"))
            connection.cursor().execute("UPDATE t SET n = 70 WHERE id = 7")
            connection.tpc_prepare()
            self.assertIsNone(await self.read())
            connection.tpc_commit()
        self.assertEqual(await self.read(), DELTA)

    async def test_asynchronous_commits_and_open_transactions(self) -> None:
        """A delta waits until the log is decoded, and has the server write the log if nothing else does."""
        self.run_each(f"{PLAIN}; {PUBLISHED}")
        await self.capture()
        with closing(connect(self.server, self.database_name)) as idle:
            idle.autocommit = False
            idle.cursor().execute("UPDATE t SET n = 70 WHERE id = 7")
            for number in range(5):
                self.run_each(f"SET synchronous_commit = off; UPDATE t SET n = {number} WHERE id = 1")
                self.assertEqual(await self.read(), DELTA)
                self.assertIsNone(await self.read())

    async def test_more_keys_than_are_kept(self) -> None:
        """The table is read in full, once."""
        self.run_each(f"{PLAIN}; {PUBLISHED}")
        await self.capture()
        streaming = self.capturing.streaming
        assert streaming is not None
        streaming.captured.kept._bounds = streaming.captured.open._bounds = streaming.captured.kept._bounds._replace(
            keys=10
        )
        self.run_each("UPDATE t SET n = 1")
        self.assertIn("more keys changed than are kept", await self.read() or "")
        self.run_each("UPDATE t SET n = 2 WHERE id = 2")
        self.assertEqual(await self.read(), DELTA)

    async def test_what_a_subscription_applies(self) -> None:
        """Rows that logical replication writes are captured, although ordinary triggers do not see them."""
        other = fresh_database(self.server, self.addCleanup)
        query(self.server, other, f"{PLAIN}; CREATE PUBLICATION source FOR TABLE t")
        self.run_each("CREATE TABLE t (id int PRIMARY KEY, other int, n int)")
        self.run_each(PUBLISHED)
        slot = f"slot_{other}"
        query(self.server, other, f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")
        source = f"host={self.server.socket_directory} port={self.server.port} user=postgres dbname={other}"
        self.sql(
            f"CREATE SUBSCRIPTION s_{other} CONNECTION '{source}' PUBLICATION source "
            f"WITH (create_slot = false, slot_name = '{slot}')"
        )
        try:
            await self.capture()
            await self.until(lambda: self.dataset.snapshot and self.dataset.snapshot.rows.count == 20)
            query(self.server, other, "UPDATE t SET n = 99 WHERE id = 9")
            await self.until(lambda: b'"n":99' in (self.dataset.snapshot.rows.get(b"9") or b""))
            self.check()
            self.assertEqual(self.reads.kinds[-1], DELTA)
        finally:
            await deferToThread(self.sql, f"DROP SUBSCRIPTION s_{other}")


def _law(set_up: str, steps: list[tuple[str, str | None]]) -> Callable[[Changes], Any]:
    async def law(self: Changes) -> None:
        await self.prove(set_up, steps)

    return law


def _law_of_lists(set_up: str, steps: list[tuple[str, str | None]]) -> Callable[[Changes], Any]:
    async def law(self: Changes) -> None:
        with closing(psycopg2.connect(self.server.dsn())) as connection:
            if connection.server_version < 150_000:
                with self.assertRaises(psycopg2.errors.SyntaxError):
                    self.run_each(set_up)
                return
        await self.prove(set_up, steps)

    return law


for _name, _case in CASES.items():
    setattr(Changes, f"test_{_name.replace(' ', '_').replace(chr(39), '')}", _law(*_case))
for _name, _case in LISTS.items():
    setattr(Changes, f"test_{_name.replace(' ', '_')}", _law_of_lists(*_case))


@pytest.mark.usefixtures("logical_server")
class Obstacles(CaptureTestCase):
    """Without a stream all rows are read, or triggers are used, and the reason names the next step."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(service, "_RETRY_SLOWLY_S", 0.2)

    def status(self) -> CaptureStatus:
        return self.cache.database.capture

    async def until_streaming(self) -> None:
        await self.until(lambda: self.status().state == "streaming")
        await self.until(lambda: captured_by(self.state).way == "logical")
        await self.forget_reads()

    @property
    def state(self) -> str:
        newest = self.dataset.newest()
        return "" if newest is None else newest.watch_state

    async def test_a_role_without_the_right(self) -> None:
        """REPLICATION is asked for; once it is granted, the stream begins without a restart."""
        self.run_each(f"{PLAIN}; {PUBLISHED}; GRANT SELECT ON t TO PUBLIC")
        role = f"reader_{self.database_name}"
        self.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        self.addCleanup(self.sql, f"DROP ROLE {role}")
        dsn = self.server.dsn(role, "secret", self.database_name)
        await self.capture(dsn=dsn)
        self.assertEqual(self.status().state, "impossible")
        asked = (
            f"the role {role} lacks the attribute REPLICATION; run cacheservice migrate --reader {role} --replication"
        )
        self.assertIn(asked, self.status().problem or "")
        self.run_each("UPDATE t SET n = 0 WHERE id = 1")
        self.assertIn(asked, await self.read() or "")
        self.sql(f"ALTER ROLE {role} REPLICATION")
        await self.until_streaming()
        self.run_each("UPDATE t SET n = 1 WHERE id = 1")
        self.assertEqual(await self.read(), DELTA)
        await self.capturing.stopService()
        self.reads.end_kept()

    async def test_no_publication(self) -> None:
        """The command that creates it is named; the stream begins once it is there."""
        self.run_each(PLAIN)
        await self.capture()
        self.assertIn("there is no publication cacheservice; run cacheservice watch", self.status().problem or "")
        self.run_each(PUBLISHED)
        await self.until_streaming()

    async def test_no_free_slot(self) -> None:
        """The limit is named, and a slot that becomes free is used."""
        self.run_each(f"{PLAIN}; {PUBLISHED}")
        ((most,),) = self.sql(
            "SELECT current_setting('max_replication_slots')::int - count(*) FROM pg_replication_slots"
        )
        names = [f"taken_{number}" for number in range(most)]
        for name in names:
            self.sql(f"SELECT pg_create_physical_replication_slot('{name}')")
        try:
            await self.capture()
            self.assertIn("replication slots are in use; drop one that nobody needs", self.status().problem or "")
        finally:
            for name in names:
                self.sql(f"SELECT pg_drop_replication_slot('{name}')")
        await self.until_streaming()

    async def test_triggers_instead(self) -> None:
        """With "auto" triggers are used until logical decoding works, and again when it does not, without a gap."""
        self.run_each(PLAIN)
        dsn = self.server.dsn(database=self.database_name)
        migrate(dsn, shipped.folder("migrations"))
        watch(dsn, "t", ["id"], notify=False, dry_run=False, show=lambda _: None)
        await self.capture("auto")
        by_triggers = captured_by(self.state)
        self.assertEqual(by_triggers.way, "triggers")
        self.assertIn("there is no publication cacheservice", by_triggers.not_logical or "")
        self.run_each("UPDATE t SET n = 1 WHERE id = 1")
        self.assertEqual(await self.read(), DELTA)
        self.run_each(PUBLISHED)
        await self.until_streaming()
        self.run_each("UPDATE t SET n = 2 WHERE id = 1")
        self.assertEqual(await self.read(), DELTA)
        self.assertEqual(self.reads.changing, ["all", DELTA, DELTA])
        self.run_each("DROP PUBLICATION cacheservice; UPDATE t SET n = 3 WHERE id = 1")
        await self.read()
        await self.until(lambda: captured_by(self.state).way == "triggers")
        self.run_each("UPDATE t SET n = 4 WHERE id = 1")
        self.assertEqual(await self.read(), DELTA)

    async def test_neither(self) -> None:
        """Both reasons are named."""
        self.run_each(PLAIN)
        await self.capture("auto")
        without = self.dataset.refresh.without_deltas
        reason = "" if without is None else without.because
        self.assertIn("there is no publication cacheservice", reason)
        self.assertIn("the database does not know cacheservice.changes", reason)

    async def test_a_pooler(self) -> None:
        """Behind a proxy that pools transactions there is no stream, and the reason names that."""
        self.run_each(f"{PLAIN}; {PUBLISHED}")
        with pgbouncer.running_pgbouncer(self.server) as dsn:
            await self.capture(dsn=dsn(database=self.database_name))
            await self.until(lambda: self.status().state in ("lost", "impossible"))
            self.assertIn("name a direct connection in postgres.dsn", self.status().problem or "")
            self.run_each("UPDATE t SET n = 1 WHERE id = 1")
            self.assertIn("name a direct connection", await self.read() or "")
            await self.service.stopService()
            await self.capturing.stopService()
            self.reads.end_kept()


@pytest.mark.usefixtures("server_maker")
class Restarts(CaptureTestCase):
    """Servers that stop, and standbys that are promoted."""

    make_server: MakeServer

    async def test_a_restart(self) -> None:
        """A shutdown does not wait for the stream; afterwards another one begins, after a full read."""
        with running_server(self.make_server, **LOGICAL) as self.server:
            self.database_name = "postgres"
            self.run_each(f"{PLAIN}; {PUBLISHED}")
            await self.capture()
            self.run_each("INSERT INTO t SELECT i, i, i FROM generate_series(1000, 100000) AS i")
            await deferToThread(self.server.stop, "fast")
            await self.until(lambda: self.cache.database.capture.state == "lost")
            await deferToThread(self.server.start)
            await self.until(lambda: self.cache.database.capture.state == "streaming")
            self.run_each("UPDATE t SET n = 11 WHERE id = 1")
            await self.until(lambda: b'"n":11}' in (self.dataset.snapshot.rows.get(b"1") or b""))
            self.assertEqual(self.cache.database.capture.restarts["lost"] > 0, True)
            await self.forget_reads()
            self.run_each("UPDATE t SET n = 12 WHERE id = 1")
            self.assertEqual(await self.read(), DELTA)
            await self.service.stopService()
            await self.capturing.stopService()
            self.reads.end_kept()
            await self.until(lambda: not self.slots())
            self.slots = list  # type: ignore[method-assign]  # the server is gone then

    async def test_a_promotion(self) -> None:
        """The stream of a standby ends with its promotion; all rows are read, and then changes are captured again."""
        with (
            running_server(self.make_server, **LOGICAL) as self.server,
            running_standby(self.server, {"hot_standby_feedback": "on"}) as standby,
        ):
            if not at_least(self.server, 16):
                return  # tests.test_deltas: standbys of these versions cannot decode their log
            self.database_name = "postgres"
            self.run_each(f"{PLAIN}; {PUBLISHED}")
            await self.until(lambda: standby.sql("SELECT to_regclass('t')") != [(None,)])
            stop = threading.Event()
            self.addCleanup(stop.set)
            logged = deferToThread(self.log_snapshots, stop)
            await self.capture(dsn=standby())
            await self.until(lambda: self.cache.database.capture.state == "streaming")
            stop.set()
            await logged
            await self.read()
            self.run_each("UPDATE t SET n = 11 WHERE id = 1")
            await self.until(lambda: b'"n":11}' in (self.dataset.snapshot.rows.get(b"1") or b""))
            self.assertEqual(self.reads.changing[-1], DELTA, self.reads.reasons)
            standby.sql("SELECT pg_promote()")
            standby.sql("UPDATE t SET n = 12 WHERE id = 1")
            await self.until(lambda: b'"n":12}' in (self.dataset.snapshot.rows.get(b"1") or b""))
            await self.until(lambda: self.cache.database.capture.state == "streaming")
            await self.until(lambda: not self.dataset.refresh.is_running)
            await self.read()
            standby.sql("UPDATE t SET n = 13 WHERE id = 1")
            self.assertEqual(await self.read(), DELTA)
            await self.service.stopService()
            await self.capturing.stopService()
            self.reads.end_kept()
            self.slots = list  # type: ignore[method-assign]  # both servers are gone then

    def log_snapshots(self, stop: threading.Event) -> None:
        while not stop.wait(0.1):
            self.sql("SELECT pg_log_standby_snapshot()")
