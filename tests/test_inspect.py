"""Laws of what `cacheservice check --db` finds out, and of the command, on the real server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from pydantic import SecretStr
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base import shipped
from cacheservice.base.errors import InspectionFailed
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings, PostgresSettings
from cacheservice.sources.postgres import database as refreshes
from cacheservice.sources.postgres import oldest
from cacheservice.sources.postgres.inspect import Inspection, Server, inspecting, keys
from cacheservice.sources.postgres.inspect import session as inspect_session
from cacheservice.sources.postgres.inspect.plans import worst_node
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.session_settings import Limits, begin_reading
from cacheservice.sources.postgres.watch import unwatch, watch
from tests.kit import pgbouncer, pgpool
from tests.kit.command_line import CommandLine
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.pgpool import running_pgpool
from tests.kit.ports import free_port
from tests.kit.postgres import connect, fresh_database, query, sessions
from tests.kit.standby import running_standby
from tests.kit.waiting import GIVE_UP_S, wait_until

SHOP = """
CREATE SCHEMA shop;
CREATE TYPE shop.size AS ENUM ('S', 'M');
CREATE TABLE shop.products (id integer PRIMARY KEY, name text, size shop.size DEFAULT 'S');
INSERT INTO shop.products SELECT n, 'product ' || n FROM generate_series(1, 1000) AS n;
CREATE TABLE shop.prices (product_id integer, currency text, amount numeric, note text);
CREATE UNIQUE INDEX prices_key ON shop.prices (currency, product_id) INCLUDE (amount);
CREATE UNIQUE INDEX prices_some ON shop.prices (product_id) WHERE currency = 'EUR';
INSERT INTO shop.prices SELECT n, c, n, NULL FROM generate_series(1, 1000) AS n, unnest(ARRAY['EUR', 'USD']) AS c;
CREATE VIEW shop.offers AS
    SELECT p.id, p.name, r.amount FROM shop.products AS p JOIN shop.prices AS r ON r.product_id = p.id;
ANALYZE;
"""


@pytest.mark.usefixtures("server")
class Inspecting(SynchronousTestCase):
    """A shop, migrated, and a reader with some rights."""

    server: EmbeddedPostgres

    def setUp(self) -> None:
        self.database = fresh_database(self.server, self.addCleanup)
        self.owner = self.server.dsn(database=self.database)
        with closing(connect(self.server, self.database)) as connection:
            connection.cursor().execute(SHOP)

    def look(self, sql: str, key: str | tuple[str, ...] = "id", dsn: str | None = None, **keys: Any) -> Inspection:
        """What there is to know about a dataset with this query."""
        keys = {"name": "it", "query": sql, "key": key, **keys}
        dataset = DatasetSettings.model_validate(keys)
        with inspecting(PostgresSettings(dsn=SecretStr(dsn or self.owner)), [dataset]) as inspector:
            self.seen: Server = inspector.server
            return inspector.inspect(dataset)

    def problem(self, sql: str, key: str | tuple[str, ...] = "id", **keys: Any) -> tuple[str, str]:
        """The one problem that there is, and what to do about it."""
        found = self.look(sql, key, **keys)
        (problem,) = [finding for finding in found.findings if finding.level == "problem"]
        self.assertFalse(found.ok)
        return problem.text, problem.todo

    def hint(self, sql: str, key: str | tuple[str, ...] = "id", **keys: Any) -> tuple[str, str]:
        found = self.look(sql, key, **keys)
        self.assertTrue(found.ok, found.findings)
        (hint,) = found.findings
        return hint.text, hint.todo


class Describing(Inspecting):
    def test_columns_and_their_types(self) -> None:
        """The query's columns in their order, with types as SQL writes them; a comment or semicolon does not matter."""
        found = self.look("SELECT name AS n, size, id, ARRAY[1.5] FROM shop.products; -- all of it")
        self.assertEqual(
            [tuple(column) for column in found.columns],
            [("n", "text"), ("size", "shop.size"), ("id", "integer"), ("array", "numeric[]")],
        )
        self.assertTrue(found.ok)

    def test_a_server_that_is_too_old(self) -> None:
        """It is the only problem that is reported."""
        self.patch(oldest, "OLDEST_VERSION", 990_000)
        with self.assertRaisesRegex(InspectionFailed, r"^PostgreSQL \d+\.\d+ is too old; use PostgreSQL 99 or later$"):
            self.look("SELECT 1 AS id")

    def test_nothing_is_changed(self) -> None:
        """It reads only: a query that writes is refused, as a refresh would refuse it."""
        query(self.server, self.database, "CREATE SEQUENCE shop.it")
        text, _ = self.problem("SELECT nextval('shop.it') AS id")
        self.assertIn("read-only transaction", text)

    def test_the_settings_are_those_of_a_refresh(self) -> None:
        """It begins as a refresh of that dataset does, except for the time limits."""
        begun: list[tuple[DatasetSettings, Limits]] = []

        def recorded(dataset: DatasetSettings, limits: Limits) -> str:
            begun.append((dataset, limits))
            return begin_reading(dataset, limits)

        self.assertIs(inspect_session.begin_reading, refreshes.begin_reading)
        self.patch(inspect_session, "begin_reading", recorded)
        self.look("SELECT current_setting('work_mem') AS id", settings={"work_mem": "7MB"}, search_path="ext")
        ((dataset, limits),) = begun
        self.assertEqual((dataset.settings, dataset.search_path), ({"work_mem": "7MB"}, "ext, pg_temp"))
        self.assertEqual(limits.lock_ms, 3000)

    def test_size_and_cost(self) -> None:
        """Rows as the planner knows them or as they were counted, bytes of whole documents, the plan's cost."""
        found = self.look("SELECT * FROM shop.products")
        assert found.size is not None
        self.assertEqual(found.size.rows, 1000)
        ((_, total),) = query(
            self.server,
            self.database,
            "SELECT count(*), sum(octet_length(row_to_json(p)::text)) FROM shop.products AS p",
        )
        self.assertLess(abs(found.size.bytes - total), 1000)
        self.assertGreater(found.size.cost, 1)
        query(self.server, self.database, "INSERT INTO shop.products SELECT n FROM generate_series(1001, 50000) AS n")
        query(self.server, self.database, "ANALYZE shop.products")
        found = self.look("SELECT * FROM shop.products")
        assert found.size is not None
        self.assertEqual(found.size.rows, 50000)

    def test_the_worst_node(self) -> None:
        """The node with the highest cost of its own is named as EXPLAIN names it, with its share of the whole."""
        found = self.look("SELECT * FROM shop.products")
        assert found.worst is not None
        self.assertEqual((found.worst.name, found.worst.share), ("Seq Scan on shop.products", 1.0))
        found = self.look(
            "SELECT n AS id, (SELECT count(*) FROM shop.prices AS r) AS c FROM generate_series(1, 2) AS n"
        )
        assert found.worst is not None
        self.assertEqual(found.worst.name, "Seq Scan on shop.prices")
        self.assertTrue(0.5 < found.worst.share < 1, found.worst)

    def test_the_plan_that_runs(self) -> None:
        """Of few rows any plan; of more that of a cursor, for which the planner makes no parallel plan."""
        cheap = {"parallel_setup_cost": "0", "parallel_tuple_cost": "0", "min_parallel_table_scan_size": "0"}
        few = "SELECT 1 AS id, sum(length(md5(md5(i::text)))) FROM shop.many"
        many = "SELECT i AS id, md5(md5(i::text)) FROM shop.many"
        with closing(connect(self.server, self.database)) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE shop.many AS SELECT i FROM generate_series(1, 50000) AS i")
            cursor.execute("ANALYZE shop.many")
            for name, value in cheap.items():
                cursor.execute(f"SET {name} = {value}")
            cursor.execute("BEGIN")
            for sql, by_cursor in ((few, False), (many, True)):
                costs = []
                for statement in (sql, f"DECLARE c NO SCROLL CURSOR FOR {sql}"):
                    cursor.execute(f"EXPLAIN (FORMAT JSON) {statement}")
                    costs.append(cursor.fetchone()[0][0]["Plan"]["Total Cost"])
                self.assertLess(costs[0], costs[1], "a parallel plan is cheaper")
                size = self.look(sql, settings=cheap).size
                assert size is not None
                self.assertEqual(size.cost, costs[by_cursor])

    def test_shares_of_nested_loops(self) -> None:
        """The inner side of a nested loop counts as often as it runs; shares are never more than the whole."""

        def node(kind: str, total: float, rows: int, *plans: Any, **more: Any) -> dict[str, Any]:
            return {"Node Type": kind, "Total Cost": total, "Plan Rows": rows, "Plans": list(plans), **more}

        loop = node(
            "Nested Loop", 1010, 100,
            node("Seq Scan", 10, 100, **{"Parent Relationship": "Outer", "Relation Name": "few", "Schema": "s"}),
            node("Seq Scan", 9, 1, **{"Parent Relationship": "Inner", "Relation Name": "many", "Schema": "s"}),
        )  # fmt: skip
        worst = worst_node(loop)
        self.assertEqual(worst.name, "Seq Scan on s.many")
        self.assertAlmostEqual(worst.share, 900 / 1010)


class OwnSettings(Inspecting):
    def test_a_role_with_other_settings(self) -> None:
        """The role sees another text in psql. A dataset that sets the value itself has no hint."""
        with closing(connect(self.server, self.database)) as connection, connection.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {self.database} SET timezone = 'Asia/Tokyo'")
            cursor.execute(f"ALTER ROLE postgres IN DATABASE {self.database} SET timezone = 'Europe/Berlin'")
            cursor.execute(f"ALTER ROLE postgres IN DATABASE {self.database} SET bytea_output = 'HEX'")
        self.look("SELECT 1 AS id")
        (hint,) = self.seen.findings
        self.assertEqual(
            hint.text, "this role has TimeZone = Europe/Berlin, but refreshes use UTC: it may look different in psql"
        )
        self.assertIn('settings = {TimeZone = "Europe/Berlin"}', hint.todo)
        self.look("SELECT 1 AS id", settings={"timezone": "Europe/Berlin"})
        self.assertEqual(self.seen.findings, [])

    def test_a_role_whose_name_needs_quotes(self) -> None:
        name = f"Reader of {self.database}"
        with closing(connect(self.server, self.database)) as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'reader'")
            self.addCleanup(query, self.server, "postgres", f'DROP ROLE "{name}"')
            cursor.execute(f"ALTER ROLE \"{name}\" SET timezone = 'Asia/Tokyo'")
        self.look("SELECT 1 AS id", dsn=self.server.dsn(name, "reader", database=self.database))
        self.assertEqual([hint.text[:35] for hint in self.seen.findings], ["this role has TimeZone = Asia/Tokyo"])


class Keys(Inspecting):
    def test_a_unique_index_makes_it_unique(self) -> None:
        """Rows of one table whose key holds all columns of a unique index: unique by the catalog, in whatever order."""
        for sql, key, index in (
            ("SELECT id, name FROM shop.products WHERE id > 10 ORDER BY name", "id", "shop.products_pkey"),
            ('SELECT id AS "Id" FROM shop.products', "Id", "shop.products_pkey"),
            ("SELECT product_id, currency FROM shop.prices", ("product_id", "currency"), "shop.prices_key"),
            ("SELECT name, id FROM shop.products", ("name", "id"), "shop.products_pkey"),
        ):
            found = self.look(sql, key)
            assert found.key is not None
            self.assertEqual((found.key.unique, found.key.how), (True, f"unique index {index}"), sql)

    def test_an_index_that_does_not_cover_the_rows(self) -> None:
        """A partial index, rows that a join or a set multiplies, or a key that is computed: it is counted instead."""
        for sql, key, unique in (
            ("SELECT product_id AS id FROM shop.prices", "id", False),
            ("SELECT p.id FROM shop.products AS p JOIN shop.prices AS r ON r.product_id = p.id", "id", False),
            ("SELECT id FROM shop.products UNION ALL SELECT id FROM shop.products", "id", False),
            ("SELECT id, generate_series(1, 2) AS n FROM shop.products", "id", False),
            ("SELECT id % 10 AS id FROM shop.products", "id", False),
            ("SELECT id, amount FROM shop.offers WHERE amount < 0", "id", True),
            ("SELECT id + 1 AS id FROM shop.products", "id", True),
        ):
            found = self.look(sql, key)
            assert found.key is not None, sql
            self.assertEqual(found.key.unique, unique, sql)
            self.assertRegex(found.key.how, r"^all [\d,]+ rows counted$", sql)
            self.assertEqual(found.ok, unique, sql)

    def test_a_sample(self) -> None:
        """Of many rows it counts a sample, and reports that; without a sample in time the answer is open."""
        found = self.look("SELECT n AS id FROM generate_series(1, 20000) AS n")
        assert found.key is not None
        self.assertEqual((found.key.unique, found.key.how), (True, "counted in a sample of 10,000 rows"))
        self.patch(keys, "_SAMPLE_TIMEOUT_MS", 200)
        found = self.look("SELECT 1 AS id, pg_sleep(60)")
        assert found.key is not None
        self.assertEqual((found.key.unique, found.ok), (None, True))
        (finding,) = found.findings
        self.assertIn("timeout_s = 30", finding.text)

    def test_null(self) -> None:
        """A key that is NULL is a problem; one that may become so, by its table, a hint."""
        text, _ = self.problem("SELECT nullif(id, 7) AS id FROM shop.products")
        self.assertEqual(text, "the key is NULL in 1 of 1,000 rows")
        text, todo = self.hint("SELECT product_id, currency FROM shop.prices", ("product_id", "currency"))
        self.assertIn("may become NULL", text)
        self.assertIn("NOT NULL", todo)

    def test_a_column_that_is_not_there(self) -> None:
        """A key that is not a column of the query is a problem, with the nearest name."""
        text, todo = self.problem("SELECT id, name FROM shop.products", "nmae")
        self.assertEqual((text, todo), ("key: the query has no column nmae", 'did you mean "name"?'))

    def test_types_for_deltas(self) -> None:
        """Integers, text, uuid, boolean and enums can be distinguished by their text; others cannot."""
        for expression, fit in (
            ("1", True), ("1::bigint", True), ("'a'::text", True), ("'a'::varchar(9)", True), ("true", True),
            ("gen_random_uuid()", True), ("'S'::shop.size", True), ("1.0", False), ("now()", False),
            ("1::float8", False), ("ARRAY[1]", False),
        ):  # fmt: skip
            found = self.look(f"SELECT {expression} AS id")
            assert found.key is not None
            self.assertEqual(found.key.fit, fit, expression)


class Problems(Inspecting):
    def test_rights(self) -> None:
        """All GRANTs that a role lacks are listed at once, and after them it has what it needs."""
        reader = self.reader()
        sql = "SELECT p.id, r.amount FROM shop.products AS p, shop.prices AS r WHERE r.product_id = p.id AND id < 2"
        text, todo = self.problem(sql, dsn=reader)
        self.assertIn("permission denied for schema shop", text)
        self.assertEqual(
            todo,
            f"GRANT USAGE ON SCHEMA shop TO {self.role}; GRANT SELECT ON shop.prices, shop.products TO {self.role};",
        )
        with closing(connect(self.server, self.database)) as connection:
            connection.cursor().execute(todo)
        self.assertTrue(self.look(f"{sql} AND currency = 'EUR'", dsn=reader).ok)

    def reader(self) -> str:
        migrate(self.owner, shipped.folder("migrations"))
        self.role = f"reader_{self.database.removeprefix('test_')}"
        create_reader(self.owner, self.role, (), "hidden-word")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {self.role}")
        self.addCleanup(query, self.server, self.database, f"DROP OWNED BY {self.role}")
        return self.server.dsn(self.role, "hidden-word", self.database)

    def test_a_view_of_what_the_role_must_not_see(self) -> None:
        """A view returns what its owner may read; missing rights of the role on its tables are not a problem."""
        reader = self.reader()
        query(self.server, self.database, "CREATE VIEW public.goods AS SELECT id, name FROM shop.products")
        query(self.server, self.database, f"GRANT SELECT ON public.goods TO {self.role}")
        found = self.look("SELECT * FROM goods", dsn=reader)
        self.assertEqual((found.ok, found.findings), (True, []))
        assert found.key is not None
        self.assertEqual(found.key.how, "all 1,000 rows counted")

    def test_names_without_a_schema(self) -> None:
        """A table or a function that search_path does not find is reported with the schema that it is in."""
        text, todo = self.problem("SELECT * FROM products")
        self.assertIn('relation "products" does not exist', text)
        self.assertIn("write shop.products", todo)
        query(self.server, self.database, "CREATE FUNCTION shop.one() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        self.assertIn("write shop.one", self.problem("SELECT one() AS id")[1])
        self.assertIn("correct the name", self.problem("SELECT * FROM nowhere")[1])

    def test_errors_have_their_line(self) -> None:
        """A syntax error is reported with the line of the query that it is in; a column, with PostgreSQL's own hint."""
        text, _ = self.problem("SELECT id\nFROM shop.products\nWHERE id >")
        self.assertRegex(text, "syntax error at or near .*, line 3 of the query")
        text, todo = self.problem("SELECT id,\n  nam FROM shop.products")
        self.assertIn("line 2 of the query", text)
        self.assertIn('"products.name"', todo)

    def test_a_locked_table(self) -> None:
        """A table that another session has locked is reported as that, within seconds."""
        self.patch(inspect_session, "_LIMITS", inspect_session._LIMITS._replace(lock_ms=100))
        with closing(psycopg2.connect(self.owner)) as other:
            other.cursor().execute("LOCK TABLE shop.products")
            text, _ = self.problem("SELECT id FROM shop.products")
            other.rollback()
        self.assertIn("a table is locked by another session", text)
        with closing(psycopg2.connect(self.owner, application_name="the other")) as other:
            other.cursor().execute("LOCK TABLE shop.products")
            self.patch(inspect_session, "_LIMITS", inspect_session._LIMITS._replace(lock_ms=5000))
            text, todo = self.problem("SELECT id FROM shop.products")
            other.rollback()
        self.assertRegex(
            text,
            r"^the query: shop\.products is locked by another session: session \d+ of postgres \(the other\) holds "
            r"AccessExclusiveLock on shop\.products, in a transaction since ",
        )
        self.assertEqual(todo, "end that session, or wait for it")

    def test_limits(self) -> None:
        """A result that would pass max_rows or max_bytes, or stay below min_rows, is a problem before it is one."""
        self.assertIn("max_rows = 10", self.problem("SELECT id FROM shop.products", max_rows=10)[0])
        self.assertIn("max_bytes = 99", self.problem("SELECT id FROM shop.products", max_bytes=99)[0])
        self.assertIn("min_rows = 1,001", self.problem("SELECT id FROM shop.products", min_rows=1001)[0])

    def test_rows_that_are_hidden(self) -> None:
        """Where row security lets the role see some rows only, there is a hint; its owner sees all, and gets none."""
        reader = self.reader()
        for statement in (
            f"GRANT USAGE ON SCHEMA shop TO {self.role}",
            f"GRANT SELECT ON shop.products TO {self.role}",
            "ALTER TABLE shop.products ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY those ON shop.products USING (id < 10)",
        ):
            query(self.server, self.database, statement)
        text, _ = self.hint("SELECT id FROM shop.products AS p", dsn=reader)
        self.assertIn(f"row security is active on shop.products: {self.role} gets", text)
        self.assertEqual(self.look("SELECT id FROM shop.products").findings, [])

    def test_a_table_without_statistics(self) -> None:
        """Where the planner can only guess, a hint names what to do about it."""
        query(self.server, self.database, 'CREATE TABLE shop."New" AS SELECT 1 AS id')
        text, todo = self.hint('SELECT id FROM shop."New"')
        self.assertEqual((text.partition(":")[0], todo), ('shop."New" has never been analyzed', 'ANALYZE shop."New";'))

    def test_probe_and_notify(self) -> None:
        """A probe that fails is a problem; one that is NULL, and a channel that has to be quoted, are hints."""
        sql = "SELECT id FROM shop.products"
        self.assertIn("probe: ", self.problem(sql, probe="SELECT 1 / 0")[0])
        self.assertIn("more than one row", self.problem(sql, probe=sql)[0])
        self.assertIn("returns NULL", self.hint(sql, probe="SELECT NULL")[0])
        self.assertIn("a DELETE does not change the greatest value", self.hint(sql, probe="SELECT max(1)")[0])
        self.assertEqual(self.hint(sql, notify="Products")[1], 'use NOTIFY "Products"')
        self.assertTrue(self.look(sql, notify="products", probe="SELECT 1; -- one").ok)

    def test_a_watch_beside_a_failing_query(self) -> None:
        """What is in the way of deltas is reported although the query fails: both can be fixed at once."""
        watching = {"watch": [{"table": "shop.products", "key": "id"}]}
        found = self.look("SELECT idd FROM shop.products", **watching)
        self.assertEqual([finding.text.partition(":")[0] for finding in found.findings], ["the query", "watch"])

    def test_data_stay_hidden(self) -> None:
        """A value that an error of PostgreSQL quotes is not repeated."""
        text, _ = self.problem("SELECT name::integer AS id FROM shop.products")
        self.assertNotIn("product 1", text)

    def test_watch(self) -> None:
        """What deltas need is reported step by step: the migration, the triggers, the type of the key; then nothing."""
        sql = "SELECT id, name FROM shop.products"
        table = {"watch": [{"table": "shop.products", "key": "id"}]}
        self.assertEqual(self.look(sql).deltas, "possible: cacheservice watch shop.products --key id")
        self.assertEqual(self.problem(sql, **table)[1], "run cacheservice migrate --reader postgres")
        migrate(self.owner, shipped.folder("migrations"))
        self.assertEqual(
            self.problem(sql, **table),
            (
                "watch: shop.products is not watched; all rows are read instead",
                "say: cacheservice watch shop.products --key id",
            ),
        )
        watch(self.owner, "shop.products", ["id"], True, False, self.fail)
        found = self.look(sql, **table)
        self.assertEqual((found.ok, found.deltas), (True, "watches shop.products by id, by triggers"))
        self.assertIn("is not fit for deltas", self.problem("SELECT id::numeric AS id FROM shop.products", **table)[0])
        query(self.server, self.database, "ALTER TABLE shop.products DISABLE TRIGGER USER")
        self.assertIn("lacks a trigger", self.problem(sql, **table)[0])
        self.assertIn("write shop.products", self.problem(sql, watch=[{"table": "products", "key": "id"}])[1])

    def test_a_foreign_table_below_the_watched_table(self) -> None:
        """`check --db` names it, and the command that frees its writers, or what to leave out."""
        migrate(self.owner, shipped.folder("migrations"))
        for statement in (
            "CREATE TABLE shop.sales (id int, region text) PARTITION BY LIST (region)",
            "CREATE TABLE shop.sales_a PARTITION OF shop.sales FOR VALUES IN ('a')",
        ):
            query(self.server, self.database, statement)
        sql = "SELECT id, region FROM shop.sales WHERE region = 'a'"
        watched = {"watch": [{"table": "shop.sales", "key": "id"}]}
        watch(self.owner, "shop.sales", ["id"], False, False, self.fail)
        self.assertNotIn("problem", [finding.level for finding in self.look(sql, **watched).findings])
        for statement in (
            "CREATE FOREIGN DATA WRAPPER none",
            "CREATE SERVER elsewhere FOREIGN DATA WRAPPER none",
            "CREATE FOREIGN TABLE shop.far PARTITION OF shop.sales FOR VALUES IN ('f') SERVER elsewhere",
        ):
            query(self.server, self.database, statement)
        self.assertEqual(
            self.problem(sql, **watched),
            (
                "watch: shop.sales has the foreign table shop.far below it, and while shop.sales is watched, "
                "statements on shop.sales that change rows of shop.far fail; all rows are read instead",
                "run: cacheservice unwatch shop.sales",
            ),
        )
        unwatch(self.owner, "shop.sales", [], False, self.fail)
        self.assertEqual(
            self.problem(sql, **watched),
            (
                "watch: shop.sales has the foreign table shop.far below it and cannot be watched; all rows are read "
                "instead",
                "remove watch from the dataset",
            ),
        )


class Servers(Inspecting):
    WATCHED: Mapping[str, Any] = {"notify": "changes"}

    def test_who_we_are(self) -> None:
        """Version, database and role are reported."""
        self.look("SELECT 1 AS id")
        self.assertEqual((self.seen.database, self.seen.role), (self.database, "postgres"))
        self.assertFalse(self.seen.standby or self.seen.pooled)
        self.assertEqual(self.seen.findings, [])
        self.assertRegex(self.seen.version, r"^\d+")

    def test_a_standby(self) -> None:
        """On a standby, a dataset that waits for notifications gets a hint that none will come."""
        with running_standby(self.server) as dsn:
            found = self.look("SELECT id FROM shop.products", dsn=dsn(database=self.database), **self.WATCHED)
        self.assertTrue(found.ok)
        self.assertTrue(self.seen.standby)
        self.assertIn("does not work on a standby: it", self.seen.findings[0].text)

    def test_a_pooler(self) -> None:
        """A pooler is noticed, whatever it calls itself, and everything else is found through it."""
        if pgbouncer.PROGRAM is None:
            pytest.skip(pgbouncer.NEEDED)
        with running_pgbouncer(self.server) as dsn:
            found = self.look("SELECT id FROM shop.products", dsn=dsn(database=self.database), **self.WATCHED)
        self.assertTrue(found.ok)
        self.assertTrue(self.seen.pooled)
        self.assertIn("PgBouncer", self.seen.findings[0].text)

    def test_pgpool(self) -> None:
        """pgpool is named as such, and what it balances to a standby breaks nothing."""
        if pgpool.PROGRAM is None:
            pytest.skip(pgpool.NEEDED)
        with running_standby(self.server) as standby:
            port = int(psycopg2.extensions.parse_dsn(standby())["port"])
            with running_pgpool(self.server, port) as dsn:
                found = self.look("SELECT id FROM shop.products", dsn=dsn(database=self.database), **self.WATCHED)
        self.assertTrue(found.ok, found.findings)
        self.assertFalse(self.seen.pooled)
        self.assertIn("pgpool-II", self.seen.findings[0].text)
        self.assertNotIn("PgBouncer", str(self.seen.findings))

    def test_nobody_there(self) -> None:
        """A database that cannot be reached is one line without a password, with what to do."""
        with self.assertRaises(InspectionFailed) as caught:
            self.look("SELECT 1 AS id", dsn=f"postgresql://me:hidden-word@127.0.0.1:{free_port()}/x")
        self.assertRegex(
            str(caught.exception), r"^PostgreSQL refused the connection: .*; check that PostgreSQL is running"
        )
        self.assertNotIn("hidden-word", str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def test_a_server_that_does_not_answer(self) -> None:
        """It has refused nothing; nor has a host that is not found."""
        with socket.create_server(("127.0.0.1", 0)) as silent, self.assertRaises(InspectionFailed) as caught:
            self.look("SELECT 1 AS id", dsn=f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/x")
        self.assertRegex(
            str(caught.exception),
            r"^PostgreSQL did not answer: .*timeout expired; .*or raise postgres\.connect_timeout_s$",
        )
        with self.assertRaises(InspectionFailed) as caught:
            self.look("SELECT 1 AS id", dsn="postgresql://me@no-such-host.invalid/x")
        self.assertRegex(
            str(caught.exception), r"^PostgreSQL could not be reached: .*; check the host's name in postgres"
        )

    def test_a_session_that_is_lost(self) -> None:
        """A server that ends the session in the middle of it is the same."""
        end = threading.Timer(
            1.0,
            lambda: query(
                self.server,
                "postgres",
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cacheservice check'",
            ),
        )
        end.start()
        self.addCleanup(end.join)
        with self.assertRaises(InspectionFailed) as caught:
            self.look("SELECT 1 AS id, pg_sleep(4)")
        self.assertRegex(str(caught.exception), "^the connection to PostgreSQL was lost: ")


class Command(CommandLine):
    def test_all_is_well(self) -> None:
        """Exit code 0 and a line a fact, no line wider than the terminal."""
        (self.directory / "cacheservice.toml").write_text(
            self.configuration('[datasets.items]\nquery = "TABLE items"\nkey = "id"')
        )
        output = self.succeed("check", "--db", COLUMNS="80")
        self.assertRegex(output, r"(?m)^the configuration is valid: 1 dataset$")
        self.assertRegex(output, rf"(?m)^PostgreSQL [\d.]+, database {self.database} as postgres")
        self.assertRegex(output, r"(?m)^ok +items\n  columns  id integer, name text$")
        self.assertRegex(output, r"(?m)^no problem: 1 dataset can be read$")
        self.assertLessEqual(max(map(len, output.splitlines())), 80)

    def test_a_problem_does_not_stop_the_others(self) -> None:
        """Each dataset is looked at, whatever is wrong with the one before; exit code 1. JSON has the same."""
        tables = [f'[datasets.{name}]\nquery = "{sql}"\nkey = "id"\n' for name, sql in (
            ("a", "SELECT 1 AS id"), ("b", "SELECT x"), ("c", "TABLE items"), ("d", "SELECT 1 AS id FROM"),
        )]  # fmt: skip
        (self.directory / "cacheservice.toml").write_text(self.configuration(*tables))
        finished = self.command("check", "--db")
        self.assertEqual((finished.returncode, finished.stderr), (1, ""))
        self.assertEqual(
            re.findall(r"(?m)^(ok|PROBLEM) +(\w)$", finished.stdout),
            [("ok", "a"), ("PROBLEM", "b"), ("ok", "c"), ("PROBLEM", "d")],
        )
        self.assertTrue(finished.stdout.endswith("\n2 problems\n"))
        finished = self.command("check", "--db", "--json")
        self.assertEqual(finished.returncode, 1)
        datasets = json.loads(finished.stdout)["datasets"]
        self.assertEqual(
            {name: found["ok"] for name, found in datasets.items()}, {"a": True, "b": False, "c": True, "d": False}
        )
        self.assertEqual(datasets["c"]["columns"][0], {"name": "id", "type": "integer"})
        self.assertEqual(datasets["c"]["size"]["rows"], 10)

    def test_a_probe_that_misses_changes(self) -> None:
        """`check` warns without a database, because the text of the probe shows it."""
        (self.directory / "cacheservice.toml").write_text(
            self.configuration('[datasets.a]\nquery = "TABLE items"\nkey = "id"\nprobe = "SELECT max(id) FROM items"')
        )
        output = self.succeed("check")
        self.assertRegex(output, r"(?m)^ok +a\n  hint +probe: a DELETE does not change the greatest value")
        found = json.loads(self.succeed("check", "--json"))["datasets"]["a"]
        self.assertEqual((found["ok"], found["columns"]), (True, []))
        (hint,) = found["findings"]
        self.assertEqual(hint["level"], "hint")
        self.assertIn("such as concat(count(*)", hint["todo"])

    def test_a_bad_configuration_as_json(self) -> None:
        """A configuration with a problem is reported in the same object; no database is queried."""
        (self.directory / "cacheservice.toml").write_text("[nonsense]\n")
        finished = self.command("check", "--db", "--json")
        self.assertEqual((finished.returncode, finished.stderr), (1, ""))
        self.assertTrue(json.loads(finished.stdout)["problems"])

    def test_interrupted(self) -> None:
        """Ctrl-C ends it while it waits for the server."""
        (self.directory / "cacheservice.toml").write_text(
            self.configuration('[datasets.a]\nquery = "SELECT 1 AS id, pg_sleep(60)"\nkey = "id"')
        )
        checking = subprocess.Popen(
            [sys.executable, "-m", "cacheservice", "check", "--db"],
            cwd=self.directory, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until(
            lambda: any("pg_sleep" in session.query for session in sessions(self.server, self.database)), "its sample"
        )
        checking.send_signal(signal.SIGINT)
        output, errors = checking.communicate(timeout=GIVE_UP_S)
        self.assertEqual((checking.returncode, errors), (-signal.SIGINT, ""))
        self.assertNotIn("problem", output)

    def test_a_database_that_is_down(self) -> None:
        """It is one line on standard error, exit code 1, and no password."""
        dsn = f"postgresql://me:hidden-word@127.0.0.1:{free_port()}/x"
        (self.directory / "cacheservice.toml").write_text(
            self.configuration('[datasets.a]\nquery = "SELECT 1 AS id"\nkey = "id"', dsn=dsn)
        )
        finished = self.command("check", "--db")
        self.assertEqual((finished.returncode, finished.stdout), (1, ""))
        self.assertRegex(finished.stderr, r"^cacheservice: PostgreSQL refused the connection: [^\n]*\n$")
        self.assertNotIn("hidden-word", finished.stderr)


class BlindSpots(Inspecting):
    """Watches that cannot work are problems, by the server's own plan."""

    def test_what_no_trigger_sees(self) -> None:
        """Each reason is named; a watch that works has none."""
        migrate(self.owner, shipped.folder("migrations"))
        query(self.server, self.database, "CREATE MATERIALIZED VIEW shop.goods AS SELECT id, name FROM shop.products")
        products = [{"table": "shop.products", "key": "id"}]
        prices = [{"table": "shop.prices", "key": ["currency", "product_id"]}]
        for table, key in (("shop.products", ["id"]), ("shop.prices", ["currency", "product_id"])):
            watch(self.owner, table, key, False, False, self.fail)
        for sql, key, watches, expected in (
            ("SELECT id, name FROM shop.products WHERE id > 5 ORDER BY name", "id", products, ""),
            ("SELECT id FROM shop.products ORDER BY id LIMIT 3", "id", products, "by LIMIT"),
            ("SELECT id, rank() OVER (ORDER BY name) FROM shop.products", "id", products, "a window function"),
            ("SELECT id FROM shop.products WHERE now() > '2020-01-01'", "id", products, "now()"),
            ("SELECT id, random() FROM shop.products", "id", products, "random()"),
            ("SELECT id, CURRENT_DATE AS today FROM shop.products", "id", products, "CURRENT_DATE"),
            ("SELECT id + 0 AS id FROM shop.products", "id", products, "is an expression"),
            ("SELECT id, (SELECT max(amount) FROM shop.prices WHERE product_id = id) FROM shop.products", "id",
             products, "shop.prices is read and not watched"),
            ("SELECT p.id, g.name FROM shop.products AS p JOIN shop.goods AS g USING (id)", "id", products,
             "shop.goods is a materialized view"),
            ("SELECT product_id, currency FROM shop.prices", ("product_id", "currency"), prices,
             "shop.prices is watched by currency, product_id, and the key is product_id, currency"),
        ):  # fmt: skip
            found = self.look(sql, key, watch=watches)
            problems = [finding.text for finding in found.findings if finding.level == "problem"]
            self.assertEqual(len(problems) > 0, bool(expected), (sql, problems))
            self.assertIn(expected, "".join(problems), sql)

    def test_rows_that_belong_to_other_keys(self) -> None:
        """Each watched table that is read must be tied to the key by the columns of its watch, each time it is read."""
        self.watch_shop()
        products, prices = {"table": "shop.products", "key": "id"}, {"table": "shop.prices", "key": "product_id"}
        cats, orders = {"table": "shop.cats", "key": "id"}, {"table": "shop.orders", "key": "id"}
        old, customers = {"table": "shop.old", "key": "id"}, list(self.CUSTOMERS)
        for sql, watches, level, expected in (
            ("SELECT id, (SELECT max(name) FROM shop.products) AS m FROM shop.products", [products], "problem",
             "a row depends on rows of shop.products whose id is not its id"),
            ("SELECT id FROM shop.products WHERE id > (SELECT avg(id) FROM shop.products)", [products], "problem",
             "a row depends on rows of shop.products"),
            ("SELECT c.id, p.name FROM shop.cats AS c LEFT JOIN shop.cats AS p ON p.id = c.parent", [cats], "problem",
             "a row depends on rows of shop.cats"),
            ("SELECT parent AS id, count(*) FROM shop.cats GROUP BY parent", [cats], "problem",
             "a row depends on rows of shop.cats whose id is not its id"),
            ("SELECT id, n FROM shop.parents", [cats], "problem", "a row depends on rows of shop.cats"),
            ("SELECT p.id, c.name FROM shop.products AS p JOIN shop.cats AS c ON c.id = length(p.name)",
             [products, cats], "problem", "a row depends on rows of shop.cats"),
            ("SELECT c.id, o.id AS other FROM shop.cats AS c JOIN shop.orders AS o ON o.cat = c.id", [cats, orders],
             "problem", "a row depends on rows of shop.orders"),
            ("SELECT a.code AS id, b.code AS other FROM shop.names AS a JOIN shop.names AS b "
             "ON b.code = a.code::varchar(1)", [{"table": "shop.names", "key": "code"}], "problem",
             "a row depends on rows of shop.names"),
            ("SELECT o.id, p.id AS other FROM shop.orders AS o JOIN shop.orders AS p ON p.cat = o.cat", [orders],
             "problem", "a row depends on rows of shop.orders"),
            ("SELECT id FROM shop.products WHERE id NOT IN (SELECT product_id FROM shop.prices)", [products, prices],
             "hint", "a row seems to depend on rows of shop.prices whose product_id is not its id"),
            ("WITH RECURSIVE t AS (SELECT id, parent FROM shop.cats WHERE parent IS NULL UNION ALL "
             "SELECT c.id, c.parent FROM shop.cats AS c JOIN t ON c.parent = t.id) SELECT id FROM t", [cats],
             "problem", "a recursive query"),
            ("SELECT p.id, r.note FROM shop.products AS p JOIN "
             "(SELECT * FROM shop.prices ORDER BY amount LIMIT 3) AS r ON r.product_id = p.id",
             [products, prices], "problem", "by LIMIT"),
            ("SELECT p.id, (SELECT max(r.note) FROM (SELECT * FROM shop.prices ORDER BY amount LIMIT 3) AS r "
             "WHERE r.product_id = p.id) FROM shop.products AS p", [products, prices], "problem", "by LIMIT"),
            ("SELECT DISTINCT ON (name) id, name FROM shop.cats ORDER BY name, id", [cats], "problem", "DISTINCT ON"),
            ("SELECT id, name FROM shop.firsts", [cats], "problem", "DISTINCT ON"),
            ("SELECT id FROM shop.products TABLESAMPLE BERNOULLI (50)", [products], "problem", "TABLESAMPLE"),
            ("SELECT id, pg_current_snapshot()::text FROM shop.products", [products], "problem",
             "pg_current_snapshot() changes by itself"),
            ("SELECT id, (SELECT count(*) FROM pg_stat_activity) FROM shop.products", [products], "problem",
             "pg_stat_get_activity()"),
            ("SELECT id, shop.cat_name(id) FROM shop.products", [products], "problem",
             "shop.cats is read by shop.cat_name() and not watched"),
            ("SELECT id, shop.outer_name(id) FROM shop.products", [products], "problem",
             "shop.cats is read by shop.cat_name() and not watched"),
            ("SELECT id, shop.parsed_name(id) FROM shop.products", [products], "problem",
             "shop.cats is read by shop.parsed_name() and not watched"),
            ("SELECT id, shop.view_name(id) FROM shop.products", [products], "problem",
             "shop.cats is read by shop.view_name() and not watched"),
            ("SELECT id, shop.cat_name(id) FROM shop.products", [products, cats], "hint",
             "shop.cat_name() reads shop.cats, and may read rows with another key"),
            ("SELECT id, shop.put_together(id) FROM shop.products", [products], "hint",
             "shop.put_together() names shop.cats, which is not watched"),
            ("SELECT id, shop.overloaded(id) FROM shop.products", [products], "hint",
             "shop.overloaded() names shop.cats, which is not watched"),
            ("SELECT id, shop.slugify(name) FROM shop.products", [products], "hint", "named slugify() is VOLATILE"),
            ("SELECT id, random() FROM shop.products", [products], "problem", "random() changes by itself"),
            ("SELECT id, age(made) FROM shop.old", [old], "problem", "changes by itself"),
            ("SELECT id, cat FROM shop.orders WHERE id IN (SELECT cat FROM shop.orders)", [orders], "problem",
             "a row depends on rows of shop.orders whose id is not its id"),
            ("SELECT p.id, (SELECT count(*) FROM shop.cats AS c WHERE p.id IN (c.id, c.parent)) "
             "FROM shop.products AS p", [products, cats], "problem",
             "a row depends on rows of shop.cats whose id is not its id"),
            ("SELECT p.id, (SELECT count(*) FROM shop.cats AS c WHERE c.id = p.id OR c.parent IS NULL) "
             "FROM shop.products AS p", [products, cats, {"table": "shop.cats", "key": "parent"}], "problem",
             "a row depends on rows of shop.cats whose id is not its id"),
            ("SELECT id, name FROM shop.products UNION ALL SELECT id + 1, name FROM shop.old", [products, old],
             "problem", "the key id is an expression"),
            ("SELECT id::bigint AS id FROM (SELECT id + 1 AS id FROM shop.products OFFSET 0) AS p", [products],
             "problem", "the key id is an expression"),
            ("SELECT coalesce(parent, id) AS id, count(*) FROM shop.cats GROUP BY 1", [cats], "problem",
             "the key id is an expression"),
            ("SELECT id + 1 AS id FROM shop.products WHERE name <> 'UNION'", [products], "problem",
             "the key id is an expression"),
            ("SELECT id, name FROM shop.products UNION ALL SELECT parent, name FROM shop.cats", [products, cats],
             "problem", "a row depends on rows of shop.cats whose id is not its id"),
            ("SELECT id, row_number() OVER (PARTITION BY name ORDER BY id) FROM shop.products", [products], "problem",
             "a window function"),
            ("SELECT id, row_number() OVER (ORDER BY id) FROM shop.products", [products], "problem",
             "a window function"),
            ("SELECT id FROM (SELECT id, row_number() OVER (ORDER BY name) AS n FROM shop.products) AS p WHERE n <= 3",
             [products], "problem", "a window function"),
            ("SELECT DISTINCT ON (o.status) o.cust_id AS id, o.id AS n FROM shop.ord AS o ORDER BY o.status, o.cust_id",
             customers[1:2], "problem", "DISTINCT ON"),
            ("SELECT p.id, count(*) OVER (PARTITION BY r.product_id) FROM shop.products AS p "
             "LEFT JOIN shop.prices AS r ON r.product_id = p.id AND r.currency = 'EUR'", [products, prices], "hint",
             "a window function computes a row from other rows, unless these have the same key"),
            ("SELECT DISTINCT ON (r.product_id) p.id, p.name FROM shop.products AS p LEFT JOIN shop.prices AS r "
             "ON r.product_id = p.id ORDER BY r.product_id, p.id", [products, prices], "hint", "DISTINCT ON"),
            ("SELECT id FROM shop.products WHERE name > 'p' LIMIT 1", [products], "problem", "by LIMIT"),
            ("SELECT c.id, (SELECT max(i.sku) FROM shop.ord AS o JOIN shop.items AS i ON i.ord_id = o.id "
             "WHERE o.cust_id = c.id) FROM shop.cust AS c", customers, "hint",
             "a row seems to depend on rows of shop.items whose cust_id is not its id"),
            ("SELECT c.id, (SELECT max(sku) FROM shop.items WHERE ord_id = (SELECT max(id) FROM shop.ord "
             "WHERE cust_id = c.id)) FROM shop.cust AS c", customers, "hint",
             "a row seems to depend on rows of shop.items whose cust_id is not its id"),
            ("SELECT id, shop.called_by_text(id) FROM shop.products", [products], "hint",
             "shop.cat_name() names shop.cats, which is not watched"),
            ("SELECT id, shop.with_its_path(id) FROM shop.products", [products], "problem",
             "shop.cats is read by shop.cat_name() and not watched"),
            ("SELECT c.id, (SELECT max(o.total) FROM shop.ord AS o WHERE o.id = c.id) FROM shop.cust AS c", customers,
             "problem", "a row depends on rows of shop.ord whose cust_id is not its id"),
        ):  # fmt: skip
            found = self.look(sql, "id", watch=watches)
            texts = [(each.level, each.text) for each in found.findings if each.text.startswith("watch: ")]
            self.assertEqual({each for each, _ in texts}, {level}, (sql, texts))
            self.assertIn(expected, str(texts), sql)

    def test_rows_that_belong_to_the_key(self) -> None:
        """Joins by the key, rows that are aggregated by it, views and partitions have no finding, in any plan."""
        self.watch_shop()
        products, prices = {"table": "shop.products", "key": "id"}, {"table": "shop.prices", "key": "product_id"}
        cats, orders = {"table": "shop.cats", "key": "id"}, {"table": "shop.orders", "key": "id"}
        lines, names = {"table": "shop.lines", "key": "order_id"}, {"table": "shop.names", "key": "code"}
        for sql, watches in (
            ("SELECT p.id, p.name, r.amount FROM shop.products AS p JOIN shop.prices AS r ON r.product_id = p.id "
             "WHERE r.currency = 'EUR'", [products, prices]),
            ("SELECT p.id, p.name, count(r.note), max(r.amount) FROM shop.products AS p "
             "LEFT JOIN shop.prices AS r ON r.product_id = p.id GROUP BY p.id", [products, prices]),
            ("SELECT product_id AS id, sum(amount) FROM shop.prices GROUP BY product_id", [prices]),
            ("SELECT p.id, (SELECT max(amount) FROM shop.prices WHERE product_id = p.id) FROM shop.products AS p",
             [products, prices]),
            ("SELECT p.id, r.most FROM shop.products AS p JOIN (SELECT product_id, max(amount) AS most "
             "FROM shop.prices GROUP BY product_id) AS r ON r.product_id = p.id", [products, prices]),
            ("WITH r AS MATERIALIZED (SELECT product_id, amount FROM shop.prices) "
             "SELECT p.id, r.amount FROM shop.products AS p JOIN r ON r.product_id = p.id AND r.amount < 7",
             [products, prices]),
            ("SELECT p.id, (SELECT r.note FROM shop.prices AS r WHERE r.product_id = p.id ORDER BY r.amount LIMIT 1) "
             "FROM shop.products AS p", [products, prices]),
            ("SELECT p.id, r.note FROM shop.products AS p LEFT JOIN LATERAL (SELECT note FROM shop.prices "
             "WHERE product_id = p.id ORDER BY amount LIMIT 1) AS r ON true", [products, prices]),
            ("SELECT p.id, (SELECT max(currency) FROM shop.prices WHERE product_id = p.id) FROM shop.products AS p",
             [products, prices]),
            ("SELECT id FROM shop.products AS p WHERE EXISTS (SELECT FROM shop.prices WHERE product_id = p.id)",
             [products, prices]),
            ("SELECT id FROM shop.products WHERE id IN (SELECT product_id FROM shop.prices)", [products, prices]),
            ("SELECT DISTINCT id, name FROM shop.products", [products]),
            ("SELECT DISTINCT ON (p.id) p.id, r.amount FROM shop.products AS p "
             "JOIN shop.prices AS r ON r.product_id = p.id ORDER BY p.id, r.amount", [products, prices]),
            ("SELECT id, amount FROM shop.offers WHERE amount < 7", [products, prices]),
            ("SELECT parent AS id, count(*) FROM shop.cats WHERE parent IS NOT NULL GROUP BY parent",
             [{"table": "shop.cats", "key": "parent"}]),
            ("SELECT id, n FROM shop.parents WHERE id IS NOT NULL", [{"table": "shop.cats", "key": "parent"}]),
            ("SELECT a.id, b.name FROM shop.cats AS a JOIN shop.cats AS b ON b.id = a.id", [cats]),
            ("SELECT id, cat FROM shop.orders", [orders]),
            ("SELECT o.id, count(*) FROM shop.orders AS o JOIN shop.lines AS l ON l.order_id = o.id GROUP BY o.id",
             [orders, lines]),
            ("SELECT o.id, (SELECT count(*) FROM shop.lines WHERE order_id = o.id) FROM shop.orders AS o",
             [orders, lines]),
            ("SELECT o.id, c.name FROM shop.orders AS o JOIN shop.cats AS c ON c.id = o.id WHERE o.id = 5",
             [orders, cats]),
            ("SELECT a.code AS id, b.code AS other FROM shop.names AS a JOIN shop.names AS b ON b.code = a.code::text",
             [names]),
            ("SELECT id, shop.twice(id) FROM shop.products", [products]),
            ("SELECT p.id, (SELECT count(*) FROM shop.cats AS c WHERE c.id = p.id OR c.parent = p.id) "
             "FROM shop.products AS p", [products, cats, {"table": "shop.cats", "key": "parent"}]),
            ("SELECT p.id, count(*) AS n FROM shop.products AS p LEFT JOIN shop.cats AS c ON p.id IN (c.id, c.parent) "
             "GROUP BY p.id", [products, cats, {"table": "shop.cats", "key": "parent"}]),
            ("SELECT id, cat FROM shop.orders WHERE id IN (SELECT id FROM shop.orders WHERE cat > 3)", [orders]),
            ("SELECT id::bigint AS id, name FROM shop.products", [products]),
            ("SELECT code::text AS id FROM shop.names", [names]),
            ("SELECT id, p.name, o.name AS other FROM shop.products AS p FULL JOIN shop.old AS o USING (id)",
             [products, {"table": "shop.old", "key": "id"}]),
            ("SELECT id, p.name, o.name AS other, c.name AS third FROM shop.products AS p "
             "FULL JOIN shop.old AS o USING (id) FULL JOIN shop.cats AS c USING (id)",
             [products, {"table": "shop.old", "key": "id"}, cats]),
            ("SELECT id, row_number() OVER (PARTITION BY id) AS n FROM shop.products AS p "
             "FULL JOIN shop.old AS o USING (id)", [products, {"table": "shop.old", "key": "id"}]),
            ("SELECT p.id, count(*) OVER (PARTITION BY p.id) AS n FROM shop.products AS p "
             "LEFT JOIN shop.prices AS r ON r.product_id = p.id AND r.currency = 'EUR'", [products, prices]),
            ("SELECT coalesce(c.id, p.id) AS id, c.name FROM shop.products AS p "
             "LEFT JOIN shop.cust AS c ON c.id = p.id", [products, {"table": "shop.cust", "key": "id"}]),
        ):  # fmt: skip
            self.assert_fine(sql, watches)

    def test_set_operations_and_picks_within_the_key(self) -> None:
        """UNION of tables with the key, windows and DISTINCT ON within it, and a key that is constant are fine."""
        self.watch_shop()
        products, prices = {"table": "shop.products", "key": "id"}, {"table": "shop.prices", "key": "product_id"}
        old, cust, ord_, items = {"table": "shop.old", "key": "id"}, *self.CUSTOMERS
        for sql, watches in (
            ("SELECT id, name FROM shop.products UNION ALL SELECT id, name FROM shop.old", [products, old]),
            ("SELECT id, name FROM shop.products UNION SELECT id, name FROM shop.old", [products, old]),
            ("SELECT id, name FROM shop.products UNION ALL SELECT id, name FROM shop.cust", [products, cust]),
            ("SELECT id, name, 'new' AS kind FROM shop.products UNION SELECT id, name, 'old' FROM shop.cust",
             [products, cust]),
            ("SELECT 0 AS id, 'none' AS name UNION ALL SELECT id, name FROM shop.products", [products]),
            ("SELECT id, name, (SELECT 1) AS n FROM shop.products UNION ALL SELECT id, name, 2 FROM shop.old "
             "WHERE name > (SELECT 'a')", [products, old]),
            ("SELECT DISTINCT ON (cust_id) cust_id AS id, total FROM shop.ord WHERE total > (SELECT 0) "
             "ORDER BY cust_id, total", [ord_]),
            ("SELECT id, name FROM shop.products EXCEPT SELECT id, name FROM shop.old", [products, old]),
            ("SELECT id, name FROM shop.both_of_them WHERE id > 3", [products, old]),
            ("SELECT u.id, u.name, o.status FROM shop.both_of_them AS u LEFT JOIN shop.cust AS c ON c.id = u.id "
             "LEFT JOIN shop.ord AS o ON o.cust_id = u.id AND o.id < 9", [products, old, cust, ord_]),
            ("SELECT id, rank() OVER (PARTITION BY id ORDER BY name) FROM shop.products", [products]),
            ("SELECT cust_id AS id, total FROM (SELECT *, row_number() OVER (PARTITION BY cust_id ORDER BY id DESC) "
             "AS r FROM shop.ord) AS o WHERE r = 1", [ord_]),
            ("SELECT c.id, o.total FROM shop.cust AS c JOIN (SELECT *, row_number() OVER w AS r FROM shop.ord "
             "WINDOW w AS (PARTITION BY status, cust_id ORDER BY id)) AS o ON o.cust_id = c.id AND o.r = 1",
             [cust, ord_]),
            ("SELECT DISTINCT ON (cust_id) cust_id AS id, total FROM shop.ord ORDER BY cust_id, total", [ord_]),
            ("SELECT DISTINCT ON (cust_id) cust_id AS id, total FROM shop.ord ORDER BY cust_id", [ord_]),
            ("SELECT DISTINCT ON (o.cust_id) c.id, o.total FROM shop.cust AS c JOIN shop.ord AS o ON o.cust_id = c.id "
             "ORDER BY o.cust_id, o.total", [cust, ord_]),
            ("SELECT DISTINCT ON (1) cust_id AS id, total FROM shop.ord ORDER BY 1, 2", [ord_]),
            ("SELECT p.id, r.amount FROM shop.products AS p JOIN (SELECT DISTINCT ON (product_id) product_id, amount "
             "FROM shop.prices ORDER BY product_id, amount) AS r ON r.product_id = p.id", [products, prices]),
            ("SELECT p.id, (SELECT DISTINCT ON (r.note) r.note FROM shop.prices AS r WHERE r.product_id = p.id "
             "ORDER BY r.note LIMIT 1) FROM shop.products AS p", [products, prices]),
            ("SELECT id, 'DISTINCT ON (name)' AS n FROM shop.products /* DISTINCT ON (name) */ GROUP BY id",
             [products]),
            ("SELECT c.id, o.total FROM shop.cust AS c JOIN shop.ord AS o ON o.cust_id IS NOT DISTINCT FROM c.id",
             [cust, ord_]),
            ("SELECT c.id, o.total FROM shop.cust AS c JOIN shop.ord AS o ON o.cust_id::bigint = c.id", [cust, ord_]),
            ("SELECT c.id, o.total FROM shop.cust AS c JOIN shop.ord AS o ON c.id::integer = o.cust_id", [cust, ord_]),
            ("SELECT id, name FROM shop.cust WHERE id = 5 LIMIT 1", [cust]),
            ("SELECT c.id, o.total FROM shop.cust AS c JOIN shop.ord AS o ON o.cust_id = c.id WHERE c.id = 5 "
             "ORDER BY o.total LIMIT 1", [cust, ord_]),
            ("SELECT c.id, (SELECT max(i.sku) FROM shop.ord AS o JOIN shop.items AS i ON i.ord_id = o.id "
             "AND i.cust_id = o.cust_id WHERE o.cust_id = c.id) FROM shop.cust AS c", [cust, ord_, items]),
        ):  # fmt: skip
            self.assert_fine(sql, watches)

    def test_words_for_moments(self) -> None:
        """The plan shows a constant for 'today', so that the text of the query decides."""
        self.watch_shop()
        for condition, words in (
            ("made >= 'Today'", "'today' changes by itself"),
            ("made > 'yesterday'::date AND sold < timestamp 'now'", "'now' and 'yesterday' changes by itself"),
            ("made >= '2026-01-01' -- or 'today'", ""),
        ):
            found = self.look(
                f"SELECT id FROM shop.old WHERE {condition}", "id", watch=[{"table": "shop.old", "key": "id"}]
            )
            hints = [finding.text for finding in found.findings if "changes by itself" in finding.text]
            self.assertEqual(len(hints), bool(words), hints)
            self.assertIn(words, "".join(hints))

    def test_names_that_are_not_those_of_functions(self) -> None:
        """Text in strings and comments, and functions of other schemas, are not taken for what a query calls."""
        self.watch_shop()
        products, old = {"table": "shop.products", "key": "id"}, {"table": "shop.old", "key": "id"}
        for sql in (
            "SELECT id, json_build_object('age (years)', name) AS n FROM shop.products",
            "SELECT id, name || ' random (x), it''s now (today)' AS n FROM shop.products",
            "SELECT id, CASE WHEN name = 'now (today)' THEN 1 END AS n FROM shop.products",
            "SELECT id, name || 'CURRENT_DATE' AS n FROM shop.products",
            "SELECT id, name || ' cat_name (old)' AS n FROM shop.products",
            "SELECT id, lower(name) AS n FROM shop.products",
            "SELECT id, shop.label(id) AS n FROM shop.products",
            "SELECT id, shop.commented(id) AS n FROM shop.products",
        ):
            self.assert_fine(sql, [products], plans=self.PLANS[:1])
        for sql in (
            "SELECT id, age(made, sold) AS n FROM shop.old",
            "SELECT id, shop.year_of(made) AS n FROM shop.old",
        ):
            self.assert_fine(sql, [old], plans=self.PLANS[:1])

    CUSTOMERS: tuple[dict[str, str], ...] = (
        {"table": "shop.cust", "key": "id"},
        {"table": "shop.ord", "key": "cust_id"},
        {"table": "shop.items", "key": "cust_id"},
    )
    PLANS: tuple[dict[str, str], ...] = (
        {},
        {"enable_hashjoin": "off", "enable_hashagg": "off"},
        {"enable_hashjoin": "off", "enable_mergejoin": "off", "enable_seqscan": "off"},
        {"enable_nestloop": "off", "enable_hashjoin": "off"},
        {"enable_partitionwise_join": "on", "enable_partitionwise_aggregate": "on"},
    )

    def assert_fine(self, sql: str, watches: list[dict[str, str]], plans: tuple[dict[str, str], ...] = PLANS) -> None:
        for settings in plans:
            found = self.look(sql, "id", watch=watches, settings=settings)
            texts = [each.text for each in found.findings if each.text.startswith("watch: ")]
            self.assertEqual(texts, [], (sql, settings))

    def watch_shop(self) -> None:
        migrate(self.owner, shipped.folder("migrations"))
        query(
            self.server,
            self.database,
            """
            CREATE TABLE shop.cats (id integer PRIMARY KEY, name text, parent integer);
            INSERT INTO shop.cats SELECT n, 'cat ' || n, nullif(n / 2, 0) FROM generate_series(1, 100) AS n;
            CREATE VIEW shop.parents AS SELECT parent AS id, count(*) AS n FROM shop.cats WHERE parent > 0 GROUP BY 1;
            CREATE VIEW shop.firsts AS SELECT DISTINCT ON (name) id, name FROM shop.cats ORDER BY name, id;
            CREATE TABLE shop.orders (id integer PRIMARY KEY, cat integer) PARTITION BY RANGE (id);
            CREATE TABLE shop.orders_1 PARTITION OF shop.orders FOR VALUES FROM (0) TO (500);
            CREATE TABLE shop.orders_2 PARTITION OF shop.orders FOR VALUES FROM (500) TO (2000);
            INSERT INTO shop.orders SELECT n, n FROM generate_series(1, 1000) AS n;
            CREATE TABLE shop.lines (order_id integer, line integer, PRIMARY KEY (order_id, line))
                PARTITION BY RANGE (order_id);
            CREATE TABLE shop.lines_1 PARTITION OF shop.lines FOR VALUES FROM (0) TO (500);
            CREATE TABLE shop.lines_2 PARTITION OF shop.lines FOR VALUES FROM (500) TO (2000);
            INSERT INTO shop.lines SELECT n, 1 FROM generate_series(1, 1000) AS n;
            CREATE TABLE shop.names (code varchar(20) PRIMARY KEY);
            INSERT INTO shop.names SELECT n FROM generate_series(1, 100) AS n;
            CREATE FUNCTION shop.cat_name(n integer) RETURNS text STABLE LANGUAGE plpgsql
                AS 'BEGIN RETURN (SELECT name FROM shop.cats WHERE id = n); END';
            CREATE FUNCTION shop.outer_name(n integer) RETURNS text STABLE LANGUAGE sql AS 'SELECT shop.cat_name(n)';
            CREATE FUNCTION shop.parsed_name(n integer) RETURNS text STABLE LANGUAGE sql
                RETURN (SELECT name FROM shop.cats WHERE id = n);
            CREATE FUNCTION shop.view_name(n integer) RETURNS text STABLE LANGUAGE sql
                AS 'SELECT name FROM shop.firsts WHERE id = n';
            CREATE FUNCTION shop.put_together(n integer) RETURNS text STABLE LANGUAGE plpgsql
                AS $$ DECLARE t text; BEGIN EXECUTE format('TABLE shop.%I', 'cats') INTO t; RETURN t; END $$;
            CREATE FUNCTION shop.twice(n integer) RETURNS integer IMMUTABLE LANGUAGE plpgsql
                AS 'BEGIN RETURN 2 * n; END';

            CREATE TABLE shop.old (id integer PRIMARY KEY, name text, made timestamptz, sold timestamptz);
            INSERT INTO shop.old SELECT n, 'old' FROM generate_series(2000, 2100) AS n;
            CREATE VIEW shop.both_of_them AS SELECT id, name FROM shop.products UNION ALL SELECT id, name FROM shop.old;
            CREATE TABLE shop.cust (id bigint PRIMARY KEY, name text);
            INSERT INTO shop.cust SELECT n, 'customer ' || n FROM generate_series(1, 500) AS n;
            CREATE TABLE shop.ord (id integer PRIMARY KEY, cust_id integer, total numeric, status text);
            INSERT INTO shop.ord SELECT n, n % 500 + 1, n, 'x' FROM generate_series(1, 2000) AS n;
            CREATE INDEX ON shop.ord (cust_id);
            CREATE TABLE shop.items (id integer PRIMARY KEY, ord_id integer, cust_id integer, sku text);
            INSERT INTO shop.items SELECT n, n, n % 500 + 1, 's' FROM generate_series(1, 2000) AS n;
            CREATE SCHEMA legacy;
            CREATE TABLE legacy.history (id integer, label text);
            CREATE FUNCTION legacy.label(n bigint) RETURNS text STABLE LANGUAGE sql
                AS 'SELECT label FROM legacy.history LIMIT 1';
            CREATE FUNCTION legacy.lower(n bigint) RETURNS text VOLATILE LANGUAGE plpgsql AS 'BEGIN RETURN 1; END';
            CREATE FUNCTION shop.label(n integer) RETURNS text IMMUTABLE LANGUAGE plpgsql
                AS 'BEGIN RETURN n::text; END';
            CREATE FUNCTION shop.slugify(t text) RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN lower(t); END';
            CREATE FUNCTION shop.overloaded(n integer) RETURNS text IMMUTABLE LANGUAGE plpgsql
                AS 'BEGIN RETURN n::text; END';
            CREATE FUNCTION shop.overloaded(n text) RETURNS text STABLE LANGUAGE plpgsql
                AS 'BEGIN RETURN (SELECT name FROM shop.cats LIMIT 1); END';
            CREATE FUNCTION shop.commented(n integer) RETURNS text IMMUTABLE LANGUAGE plpgsql
                AS $$ BEGIN
                    -- The import's names come from shop.cats,
                    RETURN n::text; /* and the others FROM shop.orders. */
                END $$;
            CREATE FUNCTION shop.called_by_text(n integer) RETURNS text STABLE LANGUAGE plpgsql
                AS $$ DECLARE t text; BEGIN EXECUTE $q$SELECT shop.cat_name($1)$q$ INTO t USING n; RETURN t; END $$;
            CREATE FUNCTION shop.with_its_path(n integer) RETURNS text STABLE LANGUAGE sql SET search_path = shop
                AS 'SELECT cat_name(n)';
            CREATE TABLE shop.made (id integer);
            CREATE FUNCTION shop.year_of(made timestamptz) RETURNS numeric STABLE LANGUAGE plpgsql
                AS $$ BEGIN RETURN extract(year FROM made); END $$;
            """,
        )
        for table, key in (
            ("products", "id"), ("prices", "product_id"), ("cats", "id"), ("cats", "parent"), ("orders", "id"),
            ("lines", "order_id"), ("names", "code"), ("old", "id"), ("cust", "id"), ("ord", "cust_id"),
            ("items", "cust_id"),
        ):  # fmt: skip
            watch(self.owner, f"shop.{table}", [key], False, False, self.fail)
        query(self.server, self.database, "ANALYZE")
