"""Laws of a read: what it returns is the query's result, whole, of one moment, as PostgreSQL renders it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.base.errors import BadResult, LockTimeout, QueryFailed, QueryTimeout, ResultTooLarge
from cacheservice.cache.rows import Groups, Rows, RowsBuilder, Shards
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import ReadPlan
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.fetching import Fetching
from cacheservice.sources.postgres.statements import first_rows
from cacheservice.sources.postgres.target import parse
from tests.kit.database import TIMEOUT_S, DatabaseTestCase
from tests.kit.datasets import rows_builder
from tests.kit.paths import ROOT
from tests.kit.postgres import OURS, connect, query
from tests.kit.waiting import until

MIGRATION = ROOT / "migrations" / "0001_schema.sql"

TYPES = r"""
SELECT 1 AS id, 12345678901234567890.123456789 AS "numeric", 'NaN'::numeric AS nan, 0.1::float8 AS "float8",
       'infinity'::float8 AS infinite, timestamptz '2024-02-29 12:34:56.789+05:30' AS "timestamptz",
       timestamp 'infinity' AS forever, date '0044-03-15 BC' AS ides, interval '1 mon 2 days' AS "interval",
       '{"b": 1,  "a": [1, null], "b": 2}'::json AS "json", '{"b": 1, "a": 2}'::jsonb AS "jsonb",
       ARRAY[[1, 2], [3, NULL]] AS "array", ARRAY['a"b', NULL, ''] AS texts, '\x00ff10'::bytea AS "bytea",
       NULL::text AS nothing, true AS yes, E'“naïve”\t\\ \U0001F600 \u2028' AS "text", '(1,2)'::point AS "point",
       ROW(1, 'x') AS composite, '10.0.0.1/8'::inet AS "inet", int8range(1, 5) AS "range",
       'e2c8b1a0-0000-4000-8000-000000000000'::uuid AS "uuid"
"""


class Interrupted(RowsBuilder):
    """Calls `between` before it takes each chunk."""

    def __init__(self, between: Callable[[], object], release: Callable[[Groups], object] = lambda _: None) -> None:
        super().__init__(release)
        self.between = between

    def add(self, chunk: Sequence[tuple[bytes | None, bytes]]) -> None:
        self.between()
        super().add(chunk)


class DocumentTests(DatabaseTestCase):
    """What a document is."""

    async def test_documents_are_what_row_to_json_gives(self) -> None:
        """Byte for byte, for every type."""
        ((expected,),) = self.sql(f"SELECT row_to_json(t)::text FROM ({TYPES}) AS t")
        self.assertEqual(await self.rows(TYPES), {b"1": expected.encode()})

    async def test_documents_are_utf8_whatever_the_databases_encoding(self) -> None:
        """A LATIN1 database returns the same bytes."""
        name = f"{self.name}_latin1"
        create = f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
        query(self.server, "postgres", create)
        self.addCleanup(query, self.server, "postgres", f"DROP DATABASE {name} WITH (FORCE)")
        rows = await self.rows("SELECT chr(233) AS id", database=self.make_database(database=name))
        self.assertEqual(rows, {"é".encode(): '{"id":"é"}'.encode()})

    async def test_no_rows(self) -> None:
        """An empty result is a result."""
        self.assertEqual(await self.rows("SELECT 1 AS id WHERE false"), {})

    async def test_a_cell_of_16_mb(self) -> None:
        """A large cell arrives whole, and those beside it."""
        size = 16 * 1024 * 1024
        rows = await self.rows(
            f"SELECT i AS id, repeat('x', {size} * (i = 2)::int) AS cell FROM generate_series(1, 3) i"
        )
        self.assertEqual(
            {key: len(json.loads(document)["cell"]) for key, document in rows.items()}, {b"1": 0, b"2": size, b"3": 0}
        )

    async def test_a_million_rows(self) -> None:
        """All of them arrive."""
        builder = rows_builder()
        await self.read_into(builder, "SELECT i AS id FROM generate_series(1, 1000000) AS i")
        rows: Rows = builder.finish()
        self.assertEqual(rows.count, 1_000_000)
        self.assertTrue(all(rows.get(b"%d" % i) == b'{"id":%d}' % i for i in range(1, 1_000_001)))

    async def test_every_size_of_a_result_arrives_whole(self) -> None:
        """No size falls between two chunks."""
        for size in [*range(12), 20, 21, 22, 84, 85, 86, 340, 341, 342, 1340, 1341, 1342, 2341]:
            rows = await self.rows(f"SELECT i AS id FROM generate_series(1, {size}) AS i")
            self.assertEqual(sorted(map(int, rows)), list(range(1, size + 1)))


class SmallResults(DatabaseTestCase):
    """What was small is read without a cursor, which rules out parallel plans; `pg_cursors` shows how it was read."""

    async def read_like(self, rows: int | None, count: int, width: int = 1) -> tuple[Rows, int]:
        """A result of `count` rows after one of `rows`, `width` bytes each, or none; and how many cursors they saw."""
        before, builder = rows_builder(), rows_builder()
        before.add([(b"%d" % number, b"x" * width) for number in range(rows or 0)])
        last = None if rows is None else before.finish()
        sql = f"SELECT i AS id, (SELECT count(*) FROM pg_cursors) AS cursors FROM generate_series(1, {count}) AS i"
        settings = DatasetSettings(name="things", query=sql, key=("id",), timeout_s=TIMEOUT_S)
        await self.database.read([ReadPlan(settings, lambda: builder, last=last)])
        read = builder.finish()
        seen = {json.loads(document)["cursors"] for _, document in read.items()}
        return read, max(seen, default=0)

    async def test_only_what_was_small_is_read_without_a_cursor(self) -> None:
        for rows, width, cursors in ((0, 1, 0), (250, 1, 0), (251, 1, 1), (1, 300_000, 1)):
            with self.subTest(rows=rows, width=width):
                self.assertEqual((await self.read_like(rows, 2, width))[1], cursors)

    async def test_all_rows_come_however_many_there_are_now(self) -> None:
        """More than fit into one answer are read with a cursor after all, none twice."""
        for count, cursors in ((0, 0), (1, 0), (500, 0), (501, 1), (2000, 1)):
            with self.subTest(count=count):
                read, seen = await self.read_like(3, count)
                self.assertEqual(seen, cursors)
                self.assertEqual({key for key, _ in read.items()}, {b"%d" % number for number in range(1, count + 1)})

    async def test_the_first_result_goes_by_the_estimate(self) -> None:
        """Nothing was read before, so that the planner decides."""
        for count, cursors in ((500, 0), (501, 1)):
            with self.subTest(count=count):
                read, seen = await self.read_like(None, count)
                self.assertEqual((read.count, seen), (count, cursors))

    async def test_large_rows_need_a_cursor(self) -> None:
        """However few they are: one answer would have to be in memory as a whole."""
        for width, cursors in ((9_000, 0), (11_000, 1)):
            sql = (
                f"SELECT i AS id, (SELECT count(*) FROM pg_cursors) AS cursors, repeat('x', {width}) AS x "
                "FROM generate_series(1, 400) AS i"
            )
            (document, *_) = (await self.rows(sql)).values()
            self.assertEqual(json.loads(document)["cursors"], cursors)

    async def test_a_plan_for_all_rows(self) -> None:
        """Few rows are asked for by the plan that is best for all, not by the one that has the first ones soonest."""
        self.sql(
            "CREATE TABLE alike AS SELECT i % 100 AS a, i % 100 AS b, repeat('x', 100) AS pad "
            "FROM generate_series(1, 100000) AS i ORDER BY random(); CREATE INDEX ON alike (a, b)"
        )
        self.sql("ANALYZE alike")
        select = "SELECT a, b, count(*) FROM alike GROUP BY a, b"
        for sql, strategy in ((f"{select} LIMIT 501", "Sorted"), (first_rows(select, 501), "Hashed")):
            ((plan,),) = self.sql(f"EXPLAIN (FORMAT JSON) {sql}")
            self.assertIn(f'"Strategy": "{strategy}"', json.dumps(plan), sql)

    async def test_a_result_that_has_outgrown_one_answer(self) -> None:
        """If the query cannot run twice within the deadline, that fails one attempt and not the next one, too."""

        class Late(Fetching):
            runs: ClassVar[list[str]] = []

            async def _at_once(self, *arguments: Any) -> bool:
                self.runs.append("at once")
                return await super()._at_once(*arguments)

            async def _by_cursor(self, *arguments: Any) -> Any:
                self.runs.append("cursor")
                if self.runs == ["at once", "cursor"]:
                    raise QueryTimeout("the query took longer than its deadline allows", "57014")
                return await super()._by_cursor(*arguments)

        reader = self.database._reader
        self.patch(reader, "_fetching", Late(reactor, reader._fetching._statements))
        with self.assertRaises(QueryTimeout):
            await self.read_like(3, 600)
        for _ in range(2):  # the second one tries again, because the last result was small
            self.assertEqual((await self.read_like(3, 600))[0].count, 600)
        self.assertEqual(Late.runs, ["at once", "cursor", "cursor", "at once", "cursor"])


class QueryTextTests(DatabaseTestCase):
    """Which queries can be declared."""

    async def test_endings(self) -> None:
        """A semicolon, a comment, or both may end a query."""
        for ending in (
            "",
            ";",
            " ; ",
            ";;",
            "\n;\n;\n",
            " -- done",
            " -- done;",
            " /* done; */",
            "; -- done",
            ";\n-- it's\n;\n",
        ):
            self.assertEqual(await self.rows(f"SELECT 1 AS id{ending}"), {b"1": b'{"id":1}'}, ending)

    async def test_what_only_looks_like_an_ending(self) -> None:
        """Semicolons and dashes in a literal or a name belong to it."""
        for literal in ("';--'", "'it''s;'", r"E'\';'", "$$;--$$", "$a$;$$--;$a$", "$$/*$$"):
            ((expected,),) = self.sql(f"SELECT {literal}")
            self.assertEqual(await self.document(f"SELECT 1 AS id WHERE {literal} <> ''"), {"id": 1}, literal)
            self.assertEqual(
                await self.rows(f"SELECT {literal}", "?column?"),
                {expected.encode(): json.dumps({"?column?": expected}, separators=(",", ":")).encode()},
                literal,
            )
        self.assertEqual(await self.document('SELECT 1 AS "id;--";', "id;--"), {"id;--": 1})
        self.assertEqual(await self.document("SELECT 1 AS id -- first\n, 2 AS n"), {"id": 1, "n": 2})

    async def test_a_percent_sign_is_a_percent_sign(self) -> None:
        """Nothing in a query is taken for a parameter."""
        self.assertEqual(await self.document("SELECT 5 % 3 AS id WHERE 'a%s' LIKE 'a%%s'"), {"id": 2})

    async def test_names_that_need_quotes(self) -> None:
        """Any column's name may be a key or stand beside it."""
        for name in ('Order "No"', "Größe", "select", "a:b", "q", "rows", "%s", " "):
            quoted = '"' + name.replace('"', '""') + '"'
            self.assertEqual(await self.document(f"SELECT 7 AS {quoted}", name), {name: 7}, name)
            self.assertEqual(await self.document(f"SELECT 1 AS id, 7 AS {quoted}"), {"id": 1, name: 7}, name)

    async def test_other_statements_that_give_rows(self) -> None:
        """WITH, VALUES and TABLE are queries, too."""
        self.sql("CREATE TABLE things AS SELECT 3 AS id")
        self.assertEqual(await self.document("WITH t AS (SELECT 3 AS id) SELECT * FROM t"), {"id": 3})
        self.assertEqual(await self.document("VALUES (3)", "column1"), {"column1": 3})
        self.assertEqual(await self.document("TABLE things"), {"id": 3})

    async def test_the_planner_tells_what_it_expects(self) -> None:
        """`expect` hears the planner's estimate before the first row comes."""
        self.sql("CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 5000) AS i")
        self.sql("ANALYZE things")
        heard: list[tuple[int, int]] = []
        builder = rows_builder()
        await self.read_into(builder, "TABLE things;", expect=lambda rows: heard.append((rows, builder.count)))
        self.assertEqual((heard, builder.count), ([(5000, 0)], 5000))


class KeyTests(DatabaseTestCase):
    """What a key is."""

    async def test_several_columns_are_joined(self) -> None:
        """With ":" between them, in the order they are given in."""
        rows = await self.rows("SELECT 1 AS a, 'x' AS b, date '2024-01-02' AS c", "c", "a", "b")
        self.assertEqual(list(rows), [b"2024-01-02:1:x"])

    async def test_a_null_key_fails(self) -> None:
        """The message names the row; a NULL in one of several columns is one."""
        sql = "SELECT nullif(i, 1234) AS id, 1 AS other FROM generate_series(1, 2000) AS i"
        self.assertIn("row 1234 is NULL", str(await self.fails(BadResult, sql)))
        self.assertIn("row 1234 is NULL", str(await self.fails(BadResult, sql, "other", "id")))

    async def test_a_key_twice_fails(self) -> None:
        """The message names it, however far apart the two are."""
        sql = "SELECT i % 4000 AS id FROM generate_series(1, 4001) AS i"
        self.assertIn('"1"', str(await self.fails(BadResult, sql)))

    async def test_joined_keys_may_collide(self) -> None:
        """("a:b", "c") and ("a", "b:c") are the same key, and so fail."""
        sql = "SELECT * FROM (VALUES ('a:b', 'c'), ('a', 'b:c')) AS t (x, y)"
        self.assertIn('"a:b:c"', str(await self.fails(BadResult, sql, "x", "y")))

    async def test_a_key_over_64_kib_fails(self) -> None:
        """64 KiB are allowed, one byte more is not; the message names the key, but not all of it."""
        self.assertEqual(list(await self.rows("SELECT repeat('k', 65536) AS id")), [b"k" * 65536])
        error = await self.fails(BadResult, "SELECT repeat('k', 65537) AS id")
        self.assertIn("kkk", str(error))
        self.assertIn("65537", str(error))
        self.assertLess(len(str(error)), 500)

    async def test_an_absent_key_column_fails(self) -> None:
        """The message names the column."""
        self.assertIn("nothing", str(await self.fails(QueryFailed, "SELECT 1 AS id", "nothing")))


class LimitTests(DatabaseTestCase):
    """max_rows and max_bytes bound what is held."""

    async def test_max_rows(self) -> None:
        """A result past it fails after the chunk that passes it, not at its end."""
        endless = "SELECT generate_series(1, 1000000000) AS id"
        for limit in (1, 10, 1000, 5000):
            builder = RowsBuilder(lambda shards: None, max_rows=limit)
            await self.assertFailure(self.read_into(builder, endless), ResultTooLarge)
            self.assertLessEqual(builder.count, limit + 1000)
        self.assertEqual(len(await self.rows("SELECT 1 AS id")), 1)

    async def test_max_bytes(self) -> None:
        """A result past it fails after the chunk that passes it, not at its end."""
        endless = "SELECT generate_series(1, 1000000000) AS id, repeat('x', 100000) AS filler"
        for limit in (1, 1_000_000, 10_000_000):
            builder = RowsBuilder(lambda shards: None, max_bytes=limit)
            await self.assertFailure(self.read_into(builder, endless), ResultTooLarge)
            self.assertLessEqual(builder.size_bytes, limit + 1_000_000)

    async def test_a_limit_is_allowed(self) -> None:
        """Exactly max_rows rows and max_bytes bytes are a result."""
        sql = "SELECT i AS id FROM generate_series(1, 1000) AS i"
        size_bytes = sum(len(key) + len(document) for key, document in (await self.rows(sql)).items())
        builder = RowsBuilder(lambda shards: None, max_rows=1000, max_bytes=size_bytes)
        await self.read_into(builder, sql)
        self.assertEqual((builder.count, builder.size_bytes), (1000, size_bytes))
        await self.fails(ResultTooLarge, sql, max_rows=999)
        await self.fails(ResultTooLarge, sql, max_bytes=size_bytes - 1)


class SessionTests(DatabaseTestCase):
    """In what session a query runs."""

    async def test_the_session_is_bounded(self) -> None:
        """READ ONLY, REPEATABLE READ, with a pinned search_path and the server's own time limits."""
        self.sql(f"ALTER DATABASE {self.name} SET search_path = nowhere")
        self.sql(f"ALTER DATABASE {self.name} SET default_transaction_isolation = 'read committed'")
        names = (
            "transaction_isolation", "transaction_read_only", "search_path", "statement_timeout", "lock_timeout",
            "idle_in_transaction_session_timeout", "client_connection_check_interval", "client_encoding",
        )  # fmt: skip
        columns = ", ".join(f"(SELECT setting FROM pg_settings WHERE name = '{name}') AS {name}" for name in names)
        settings = await self.document(f"SELECT 1 AS id, {columns}", timeout_s=40.0)
        self.assertEqual(settings["transaction_isolation"], "repeatable read")
        self.assertEqual(settings["transaction_read_only"], "on")
        self.assertEqual(settings["search_path"], "pg_catalog, public, pg_temp")
        self.assertEqual(settings["client_connection_check_interval"], "1000")
        self.assertEqual(settings["client_encoding"], "UTF8")
        lock_ms, statement_ms, idle_ms = (
            int(settings[f"{name}_timeout"]) for name in ("lock", "statement", "idle_in_transaction_session")
        )
        self.assertTrue(0 < lock_ms < statement_ms < idle_ms <= 40_000, settings)

    async def test_a_query_that_writes_fails(self) -> None:
        """A function that writes is refused by the server."""
        self.sql("CREATE TABLE things (id int)")
        self.sql("CREATE FUNCTION write() RETURNS int LANGUAGE sql AS 'INSERT INTO things VALUES (1) RETURNING id'")
        self.assertEqual((await self.fails(QueryFailed, "SELECT write() AS id")).sqlstate, "25006")
        self.assertEqual(self.sql("TABLE things"), [])

    async def test_the_session_tells_its_dataset(self) -> None:
        """`application_name` is the service's, or the DSN's own, and the dataset's."""
        sql = "SELECT current_setting('application_name') AS id"
        self.assertEqual(list(await self.rows(sql)), [b"cacheservice things"])
        named = parse(self.server.dsn(database=self.name) + "?application_name=shop")
        database = Database(reactor, named, TIMEOUT_S, self.status)
        self.addCleanup(database.stop)
        self.assertEqual(list(await self.rows(sql, database=database)), [b"shop things"])

    async def test_an_error_shows_no_data(self) -> None:
        """A value that cannot be converted is not quoted."""
        error = await self.fails(QueryFailed, "SELECT 'secret'::text::int AS id")
        self.assertNotIn("secret", str(error))


class BytesTests(DatabaseTestCase):
    """A row whose bytes have no form in UTF-8 is named."""

    async def bad(self, encoding: str, table: str, *, locale: str = "C") -> QueryFailed:
        name = f"{self.name}_{encoding.lower()}"
        query(
            self.server, "postgres", f"CREATE DATABASE {name} ENCODING {encoding} LOCALE '{locale}' TEMPLATE template0"
        )
        self.addCleanup(query, self.server, "postgres", f"DROP DATABASE {name} WITH (FORCE)")
        query(self.server, name, table)
        database = self.make_database(database=name)
        failure = await self.assertFailure(
            self.read_into(rows_builder(), "SELECT id, name FROM things", database=database),
            QueryFailed,
        )
        assert isinstance(failure, QueryFailed)
        self.assertEqual(len(str(failure).splitlines()), 1)
        return failure

    async def test_bytes_that_nobody_checked(self) -> None:
        failure = await self.bad(
            "SQL_ASCII",
            r"CREATE TABLE things AS SELECT i AS id, CASE i WHEN 777 THEN E'caf\xe9 bleu' ELSE 'good' END AS name "
            "FROM generate_series(1, 2000) i",
        )
        self.assertIn('things: the row with the key "777"', str(failure))
        self.assertIn("SQL_ASCII", str(failure))
        self.assertNotIn("bleu", str(failure))
        self.assertEqual(failure.sqlstate, "22021")
        self.assertIn("correct the bytes", failure.advice)

    async def test_a_character_without_a_form_in_utf8(self) -> None:
        failure = await self.bad(
            "WIN1252", r"CREATE TABLE things AS SELECT 1 AS id, 'fine' AS name UNION ALL SELECT 2, E'\x81'"
        )
        self.assertIn('things: the row with the key "2"', str(failure))
        self.assertIn("WIN1252", str(failure))

    async def test_a_value_that_the_query_cannot_make(self) -> None:
        """An error of the query itself, in which no row is to be found, names the encoding and no bytes."""
        failure = await self.fails(QueryFailed, r"SELECT 1 AS id, convert_from('\xe9e9', 'UTF8') AS name")
        self.assertIn('invalid byte sequence for encoding "UTF8": …', str(failure))


class MomentTests(DatabaseTestCase):
    """The moment of the rows."""

    async def test_all_rows_are_of_one_snapshot(self) -> None:
        """What others commit between two chunks is not seen, in part or whole."""
        self.sql("CREATE TABLE things AS SELECT i AS id, 0 AS n FROM generate_series(1, 3000) AS i")
        writes = 0

        with closing(connect(self.server, self.name)) as writer, writer.cursor() as cursor:

            def write() -> None:
                nonlocal writes
                writes += 1
                cursor.execute("UPDATE things SET n = n + 1; DELETE FROM things WHERE id % 10 = 0")
                cursor.execute("INSERT INTO things SELECT -i, 1 FROM generate_series(1, 10) AS i")

            builder = Interrupted(write)
            await self.read_into(builder, "TABLE things", timeout_s=200)
        self.assertGreater(writes, 3)
        self.assertEqual(dict(builder.finish().items()), {b"%d" % i: b'{"id":%d,"n":0}' % i for i in range(1, 3001)})

    async def test_as_of_is_the_databases_clock(self) -> None:
        """At the start of the transaction, in UTC; `read_at` is ours, just before."""
        ((before,),) = self.sql("SELECT clock_timestamp()")
        asked_at = reactor.seconds()
        builder = rows_builder()
        reading = await self.read_into(builder, "SELECT 1 AS id, extract(epoch FROM now())::text AS now, pg_sleep(0.1)")
        ((after,),) = self.sql("SELECT clock_timestamp()")
        self.assertTrue(before <= reading.moment.as_of <= after, reading)
        self.assertIs(reading.moment.as_of.tzinfo, UTC)
        self.assertTrue(asked_at <= reading.moment.read_at <= reactor.seconds() - 0.1, reading)
        now = float(json.loads(builder.finish().get(b"1") or b"")["now"])
        self.assertLess(abs(reading.moment.as_of - datetime.fromtimestamp(now, UTC)), timedelta(microseconds=2))

    async def test_the_snapshot_tells_what_is_in_it(self) -> None:
        """`database_snapshot` parses; a transaction before it is in it, one after it is not."""
        with closing(connect(self.server, self.name)) as writer, writer.cursor() as cursor:
            xids = []
            for read in (True, False):
                cursor.execute("SELECT pg_current_xact_id()::text")
                xids.append(cursor.fetchone()[0])
                if read:
                    reading = await self.read_into(rows_builder(), "SELECT 1 AS id")
            cursor.execute(
                "SELECT pg_visible_in_snapshot(x::xid8, %s::pg_snapshot) FROM unnest(%s) AS x",
                (reading.moment.database_snapshot, xids),
            )
            self.assertEqual(cursor.fetchall(), [(True,), (False,)])

    async def test_the_schema_changes_between_reads(self) -> None:
        """The next read has the new columns, or fails and names what it misses."""
        self.sql("CREATE TABLE things AS SELECT 1 AS id, 2 AS n")
        self.assertEqual(await self.document("TABLE things"), {"id": 1, "n": 2})
        self.sql("ALTER TABLE things ADD COLUMN extra text DEFAULT 'new'")
        self.assertEqual(await self.document("TABLE things"), {"id": 1, "n": 2, "extra": "new"})
        self.sql("ALTER TABLE things DROP COLUMN n")
        self.assertEqual(await self.document("TABLE things"), {"id": 1, "extra": "new"})
        error = await self.fails(QueryFailed, "SELECT id, n FROM things")
        self.assertEqual(error.sqlstate, "42703")
        self.assertIn('"n"', str(error))
        self.sql("DROP TABLE things")
        error = await self.fails(QueryFailed, "TABLE things")
        self.assertEqual(error.sqlstate, "42P01")
        self.assertIn('"things"', str(error))

    async def test_the_schema_changes_during_a_read(self) -> None:
        """A change waits for the read's end: all rows have the old columns."""
        self.sql("CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 3000) AS i")
        altering: list[Deferred[Any]] = []

        def alter() -> None:
            if not altering:
                altering.append(deferToThread(self.sql, "ALTER TABLE things ADD COLUMN extra int"))

        builder = Interrupted(alter)
        await self.read_into(builder, "TABLE things")
        await altering[0]
        self.assertEqual(dict(builder.finish().items()), {b"%d" % i: b'{"id":%d}' % i for i in range(1, 3001)})
        self.assertEqual(json.loads((await self.rows("TABLE things"))[b"1"]), {"id": 1, "extra": None})

    async def test_the_schema_changes_while_a_read_waits_for_it(self) -> None:
        """A read that waited for the change has the new columns, or fails and names what it misses."""
        self.sql("CREATE TABLE things AS SELECT 1 AS id, 2 AS n")
        with closing(connect(self.server, self.name)) as holder, holder.cursor() as cursor:
            cursor.execute("BEGIN; ALTER TABLE things DROP COLUMN n, ADD COLUMN extra int DEFAULT 3")
            reads = [self.document("TABLE things"), self.fails(QueryFailed, "SELECT id, n FROM things")]
            results = gatherResults([Deferred.fromCoroutine(read) for read in reads], consumeErrors=True)
            await self.until_waiting(2)
            cursor.execute("COMMIT")
        document, error = await results
        self.assertEqual(document, {"id": 1, "extra": 3})
        self.assertEqual(error.sqlstate, "42703")

    async def until_waiting(self, number: int) -> None:
        """Until so many sessions wait for a lock; trial's own time limit ends a test where they do not."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        await until(lambda: self.sql(sql) == [(number,)])


class LostSessions(DatabaseTestCase):
    """A kept session is lost in the middle of a read, which is repeated in another session."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("one", "two"):
            self.sql(f"CREATE TABLE {name} AS SELECT i AS id, 0 AS n FROM generate_series(1, 2000) AS i")

    def wanted(self, name: str, build: Callable[[], RowsBuilder]) -> ReadPlan:
        settings = DatasetSettings(
            name=name, query=f"TABLE {name}", key=("id",), timeout_s=TIMEOUT_S, group="both", interval_s=5.0
        )
        return ReadPlan(settings, build)

    async def read_losing(self, lost_in: str, chunk: int, names: Sequence[str]) -> list[dict[bytes, bytes]]:
        """Read `names` together; lose the session before the chunk of that number, with a write to all of them."""
        freed: list[Shards] = []
        lost = 0

        def lose() -> None:
            nonlocal lost
            lost += 1
            if lost == chunk:
                self.sql("; ".join(f"DELETE FROM {name} WHERE id <= 50" for name in names))
                self.sql("; ".join(f"UPDATE {name} SET n = 1; INSERT INTO {name} VALUES (-1, 1)" for name in names))
                self.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{self.name}' AND application_name LIKE 'cacheservice both%'"
                )

        def build(name: str) -> RowsBuilder:
            return Interrupted(lose, freed.extend) if name == lost_in else RowsBuilder(freed.extend)

        await self.database.read([self.wanted(name, lambda: RowsBuilder(freed.extend)) for name in names])
        self.assertEqual(self.status.connections, 1)
        readings = await self.database.read([self.wanted(name, lambda name=name: build(name)) for name in names])
        self.assertGreater(lost, chunk)
        self.assertEqual(len({reading.moment.database_snapshot for reading in readings}), 1)
        self.assertGreater(sum(len(shard) for shards in freed for shard in shards), 0, "what was lost is freed")
        tables = [dict(reading.rows.finish().items()) for reading in readings if reading.rows is not None]
        self.database.stop()
        return tables

    async def test_of_a_dataset(self) -> None:
        """All rows are of the second session's moment: none that was deleted, none twice."""
        for chunk in (1, 4, 6, 7):
            self.sql("DROP TABLE one; CREATE TABLE one AS SELECT i AS id, 0 AS n FROM generate_series(1, 2000) AS i")
            self.database = self.make_database()
            (table,) = await self.read_losing("one", chunk, ["one"])
            expected = {b"%d" % i: b'{"id":%d,"n":1}' % i for i in (-1, *range(51, 2001))}
            self.assertEqual(table, expected)

    async def test_of_a_group(self) -> None:
        """A group is of one moment, although one of its datasets was read whole before the session was lost."""
        tables = await self.read_losing("two", 4, ["one", "two"])
        expected = {b"%d" % i: b'{"id":%d,"n":1}' % i for i in (-1, *range(51, 2001))}
        self.assertEqual(tables, [expected, expected])


class LockTests(DatabaseTestCase):
    """Somebody holds the table."""

    timeout_s = 8.0

    def make_reader(self) -> Database:
        """As a role that may read the table and nothing more."""
        role = f"reader_{self.name}"
        self.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'reader'")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {role}")
        self.addCleanup(self.sql, f"DROP OWNED BY {role}")
        self.sql(f"GRANT SELECT ON things TO {role}")
        return self.make_database(user=role, password="reader")

    async def read_locked(self, cursor: Any, *databases: Database) -> tuple[int, datetime, list[LockTimeout]]:
        """The holder's pid, its transaction's start, and what reads get, all at once, while it holds the table."""
        cursor.execute("BEGIN")
        cursor.execute("SELECT pg_backend_pid(), now(), count(*) FROM things")  # a weaker lock on it, first
        ((pid, since, _),) = cursor.fetchall()
        cursor.execute("LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
        reads = [
            self.read_into(rows_builder(), "TABLE things", database=database, timeout_s=self.timeout_s)
            for database in databases
        ]
        errors = await gatherResults([self.assertFailure(read, LockTimeout) for read in reads])
        cursor.execute("COMMIT")
        return pid, since, errors

    async def test_who_holds_the_lock_is_told(self) -> None:
        """As much of it as the role may see: all for a superuser, less for a plain reader."""
        self.sql("CREATE TABLE things AS SELECT 1 AS id")
        reader = self.make_reader()
        with closing(connect(self.server, self.name)) as holder, holder.cursor() as cursor:
            pid, since, errors = await self.read_locked(cursor, self.database, reader)
        for error in errors:
            self.assertEqual(len(error.blockers), 1, error.blockers)
            blocker = error.blockers[0]
            self.assertEqual((blocker.pid, blocker.user, blocker.application), (pid, "postgres", OURS))
            self.assertEqual(blocker.lock_mode, "AccessExclusiveLock")
            self.assertIn(blocker.relation, ("things", "public.things"))
        everything, little = (error.blockers[0] for error in errors)
        self.assert_told(everything, since)
        self.assertEqual((little.transaction_since, little.state, little.statement_kind), (None, None, None))
        self.assertEqual(await self.rows("TABLE things", database=reader), {b"1": b'{"id":1}'})

    async def test_the_migrations_let_a_plain_reader_know_all(self) -> None:
        """With cacheservice.blocking_sessions a plain reader sees the same as a superuser."""
        self.sql("CREATE TABLE things AS SELECT 1 AS id")
        reader = self.make_reader()
        self.sql("CREATE SCHEMA cacheservice")
        self.sql(MIGRATION.read_text())
        role = f"reader_{self.name}"
        self.sql(f"GRANT USAGE ON SCHEMA cacheservice TO {role}")
        self.sql(f"GRANT EXECUTE ON FUNCTION cacheservice.blocking_sessions TO {role}")
        with closing(connect(self.server, self.name)) as holder, holder.cursor() as cursor:
            pid, since, (error,) = await self.read_locked(cursor, reader)
        (blocker,) = error.blockers
        self.assertEqual((blocker.pid, blocker.user, blocker.application), (pid, "postgres", OURS))
        self.assertEqual((blocker.lock_mode, blocker.relation), ("AccessExclusiveLock", "public.things"))
        self.assert_told(blocker, since)

    def assert_told(self, blocker: Any, since: datetime) -> None:
        self.assertEqual(blocker.state, "idle in transaction")
        self.assertIn(blocker.statement_kind, ("LOCK", "LOCK TABLE"))
        self.assertLess(abs(blocker.transaction_since - since), timedelta(milliseconds=1))

    async def test_a_lock_that_ends_in_time_is_waited_for(self) -> None:
        """A read that waited for less than its deadline succeeds."""
        self.sql("CREATE TABLE things AS SELECT 1 AS id")
        with closing(connect(self.server, self.name)) as holder, holder.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
            read = Deferred.fromCoroutine(self.rows("TABLE things"))
            while self.sql("SELECT 1 FROM pg_locks WHERE NOT granted") == []:
                await deferLater(reactor, 0.01)
            cursor.execute("COMMIT")
        self.assertEqual(await read, {b"1": b'{"id":1}'})

    async def test_who_else_waits_is_not_forgotten_at_the_end(self) -> None:
        """Cancelling a read while it asks for its blockers ends both sessions."""
        self.sql("CREATE TABLE things AS SELECT 1 AS id")
        with closing(connect(self.server, self.name)) as holder, holder.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
            for after_s in (1.4, 1.5, 1.51, 1.52, 1.55, 1.6):
                read = self.read_into(rows_builder(), "TABLE things", timeout_s=2.0)
                reactor.callLater(after_s, read.cancel)
                results = await read.addErrback(lambda failure: failure.type.__name__)
                # On a busy machine the cancel may come after the end.
                self.assertIn(results, ("CancelledError", "LockTimeout", "DeadlineExceeded"))
                self.assertEqual(self.status.connections, 0)
            cursor.execute("COMMIT")
