"""Laws of the recorded changes where others work on the schema, the tables and the rights, on real servers."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheservice.base import shipped
from cacheservice.base.errors import WatchFailed
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import unwatch, watch
from tests.kit.postgres import at_least, connect, fresh_database, query
from tests.kit.versions import MakeServer, running_server
from tests.kit.waiting import wait_until
from tests.kit.watching import TRIGGERS, Refreshing

FOLDER = shipped.folder("migrations")


class Bookkeeping(Refreshing):
    """A watched table."""

    def setUp(self) -> None:
        super().setUp()
        self.watch("items")

    def prune(self) -> int:
        ((count,),) = self.sql("SELECT cacheservice.prune('0')")
        return int(count)


class Writers(Bookkeeping):
    """A writer's statement never fails because of the service, and no delta misses what could not be recorded."""

    WRITES = (
        "INSERT INTO items VALUES (1, 'a'), (2, 'b')",
        "UPDATE items SET name = 'c'",
        "DELETE FROM items WHERE name = 'c'",
        "TRUNCATE items",
    )

    def test_a_key_that_is_renamed(self) -> None:
        """Each statement is recorded as unknown, for keys of one column or several; a name that comes back is trusted
        again, but not for the time between."""
        self.watch("items", "name", "id")
        before = self.refresh()
        self.sql("ALTER TABLE items RENAME id TO number", *self.WRITES)
        self.assertEqual(self.rows(), [(1, None), (2, None)] * 4)
        self.assertEqual(
            self.refresh(before.snapshot).problem,
            "items has no stored column id any more; watch it by another key, and say so in the configuration",
        )
        self.sql("INSERT INTO items VALUES (1, 'a')", "ALTER TABLE items RENAME number TO id")
        self.assertIn("its key was renamed", self.refresh(before.snapshot).problem or "")
        now = self.refresh()
        self.sql("UPDATE items SET name = 'd'")
        self.assertEqual(self.found(now)[1], {"1"})

    def test_a_key_that_is_dropped(self) -> None:
        """The same; and the same name for another column is another state."""
        before = self.refresh()
        self.sql("ALTER TABLE items DROP id", "INSERT INTO items VALUES ('a')")
        self.assertEqual(self.rows(), [(1, None)])
        self.sql("ALTER TABLE items ADD id int", "UPDATE items SET name = 'b'")
        self.assertEqual(self.rows(), [(1, [None])])
        self.assertNotEqual(self.refresh().state, before.state)

    def test_watching_again_by_the_new_name(self) -> None:
        """It records by the new name, and takes the watch by the old one away."""
        self.sql("ALTER TABLE items RENAME id TO number")
        self.watch("items", "number")
        self.sql("INSERT INTO items VALUES (7, 'a')")
        self.assertEqual(self.rows(), [(2, ["7"])])
        self.assertEqual(self.sql("SELECT key_columns::text FROM cacheservice.watched"), [("{number}",)])

    def test_columns_named_like_variables(self) -> None:
        """A key column may be called as a variable of PL/pgSQL is, or as what the function names."""
        self.sql('CREATE TABLE odd (found int, tg_op text, "new" text, r text, keys text, none text, "A ""b" int)')
        names = ("found", "tg_op", "new", "r", "keys", "none", 'A "b')
        self.watch("odd", *names)
        self.sql("INSERT INTO odd VALUES (1, '2', '3', '4', '5', '6', 7)")
        self.assertEqual(self.rows(), [(2, [["1", "2", "3", "4", "5", "6", "7"]])])
        for name in names:
            self.sql(
                'ALTER TABLE odd RENAME "{}" TO away'.format(name.replace('"', '""')), "UPDATE odd SET away = away"
            )
            self.assertEqual(self.rows(), [(2, None)], name)
            self.sql('ALTER TABLE odd RENAME away TO "{}"'.format(name.replace('"', '""')))

    def test_rights_that_are_lost(self) -> None:
        """Writers go on; it is a problem that names `migrate`, which restores them, and what was written meanwhile is
        in no delta: the state is another."""
        owner = f"owner_{self.database[5:]}"
        self.sql(f"CREATE ROLE {owner}")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {owner}")
        self.addCleanup(query, self.server, self.database, f"DROP OWNED BY {owner} CASCADE")
        migrate(self.dsn, FOLDER, owner)
        self.watch("items")
        for revoke in (
            f"REVOKE ALL ON cacheservice.changes FROM {owner}",
            f"REVOKE ALL ON SCHEMA cacheservice FROM {owner}",
        ):
            before = self.refresh()
            self.assertIsNone(before.problem)
            self.sql(revoke, *self.WRITES)
            self.assertIn("say: cacheservice migrate", self.refresh(before.snapshot).problem or "")
            self.assertEqual(self.sql("SELECT * FROM cacheservice.changes"), [])
            self.assertEqual(migrate(self.dsn, FOLDER), [])
            after = self.refresh(before.snapshot)
            self.assertIsNone(after.problem)
            self.assertNotEqual(after.state, before.state)
            self.sql("INSERT INTO items VALUES (1, 'a')")
            self.assertEqual(self.rows(), [(1, ["1"])])
            self.sql("TRUNCATE items", "DELETE FROM cacheservice.changes")

    def test_another_owner(self) -> None:
        """If the table of changes gets another owner, it is a problem until it is watched again."""
        owner = f"owner_{self.database[5:]}"
        self.sql(f"CREATE ROLE {owner}")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {owner}")
        self.addCleanup(query, self.server, self.database, f"DROP OWNED BY {owner} CASCADE")
        before = self.refresh()
        self.sql(f"ALTER TABLE cacheservice.changes OWNER TO {owner}", *self.WRITES)
        self.assertIn("say: cacheservice migrate", self.refresh(before.snapshot).problem or "")
        migrate(self.dsn, FOLDER)
        self.assertIn("say again: cacheservice watch items --key id", self.refresh(before.snapshot).problem or "")
        self.watch("items")
        self.assertIsNone(self.refresh().problem)

    def test_tables_that_are_dropped(self) -> None:
        """Writers go on, readers get a problem, `migrate` makes the tables again, and then `watch` and deltas work."""
        for table in ("changes", "watched", "pruned"):
            self.sql(f"DROP TABLE cacheservice.{table}", *self.WRITES)
            self.assertEqual(
                self.refresh().problem,
                f"of the schema cacheservice the tables {table} are missing; say: cacheservice migrate",
            )
            if table != "pruned":
                with self.assertRaises(WatchFailed) as failed:
                    self.watch("items")
                self.assertIn("run cacheservice migrate first", str(failed.exception))
            self.assertEqual(migrate(self.dsn, FOLDER)[0], "0002_changes")
            self.assertEqual(self.sql(TRIGGERS), [])
            self.sql(*self.WRITES)
            self.watch("items")
            self.sql(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cacheservice TO {self.reader}")
            now = self.refresh()
            self.sql("INSERT INTO items VALUES (1, 'a')")
            self.assertEqual(self.found(now)[1], {"1"})
            self.sql("TRUNCATE items")

    def test_the_schema_is_dropped(self) -> None:
        """One statement frees all writers, and everything can be made again."""
        self.sql("DROP SCHEMA cacheservice CASCADE", *self.WRITES)
        self.assertEqual(self.sql(TRIGGERS), [])
        with self.assertRaises(WatchFailed) as failed:
            self.unwatch("items")
        self.assertIn("the database has no schema cacheservice", str(failed.exception))
        migrate(self.dsn, FOLDER)
        self.watch("items")

    def test_unwatching_always_works(self) -> None:
        """Without each of our tables, by a role that lost rights on them, and of a table that is gone."""
        for table in ("changes", "watched", "pruned"):
            self.sql(f"DROP TABLE cacheservice.{table}")
            self.unwatch("items")
            self.assertEqual(self.sql(TRIGGERS), [], table)
            migrate(self.dsn, FOLDER)
            self.watch("items")
        self.sql("REVOKE ALL ON SCHEMA cacheservice FROM postgres", "INSERT INTO items VALUES (1, 'a')")
        self.sql("ALTER TABLE items RENAME id TO number")
        self.unwatch("items")
        self.sql("ALTER TABLE items RENAME number TO id")
        self.watch("items")
        self.sql("DROP TABLE items")
        self.unwatch("items")
        self.assertEqual(self.sql("SELECT * FROM cacheservice.watched"), [])
        self.assertEqual(self.sql("SELECT proname FROM pg_proc WHERE proname ~ '^record_[0-9]'"), [])

    def test_what_cannot_be_recorded(self) -> None:
        """A virtual column as key, and a foreign partition, are refused: each write would fail."""
        for statement in (
            "CREATE TABLE twice (a int, id int GENERATED ALWAYS AS (a * 2) VIRTUAL)",
            "CREATE TABLE parts (id int) PARTITION BY RANGE (id)",
            "CREATE FOREIGN DATA WRAPPER none",
            "CREATE SERVER elsewhere FOREIGN DATA WRAPPER none",
            "CREATE FOREIGN TABLE far PARTITION OF parts FOR VALUES FROM (0) TO (9) SERVER elsewhere",
        ):
            if "VIRTUAL" in statement and self.session.connection.server_version < 180_000:
                statement = "CREATE VIEW twice AS SELECT 1 AS id"  # noqa: PLW2901
            self.sql(statement)
        for table, problem in (("twice", "not stored|cannot have such triggers"), ("parts", "foreign table")):
            with self.assertRaises(WatchFailed) as failed:
                self.watch(table)
            self.assertRegex(str(failed.exception), problem)

    def test_watches_of_an_older_version(self) -> None:
        """Those that 0002 knows go on after 0003."""
        name = fresh_database(self.server, self.addCleanup)
        dsn = self.server.dsn(database=name)
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        for file in ("0001_schema.sql", "0002_changes.sql"):
            shutil.copy(FOLDER / file, folder)
        migrate(dsn, folder)
        query(self.server, name, "CREATE TABLE items (id int)")
        with self.assertRaises(WatchFailed) as failed:
            watch(dsn, "items", ("id",), False, False, self.fail)
        self.assertIn("run cacheservice migrate first", str(failed.exception))
        migrate(dsn, FOLDER)
        watch(dsn, "items", ("id",), False, False, self.fail)
        query(self.server, name, "UPDATE cacheservice.watched SET form = 1")
        self.assertEqual(unwatch(dsn, "items", (), False, self.fail), ['"public"."items"'])

    def functions(self) -> list[tuple[Any, ...]]:
        return self.sql(
            "SELECT proname, prosrc, pg_get_userbyid(proowner), proacl::text FROM pg_proc "
            "WHERE proname LIKE 'record%' AND pronamespace = 'cacheservice'::regnamespace ORDER BY 1"
        )

    def test_functions_of_an_older_version(self) -> None:
        """`migrate` replaces the functions of a watch and leaves its triggers; the next refresh reads all rows."""
        self.sql(
            "CREATE TABLE sales (id int, region text) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            f"GRANT SELECT ON sales TO {self.reader}",
        )
        self.watch("sales", notify=True)
        self.watch("items", "name", "id")
        self.tables = {"items": ["id"], "sales": ["id"]}
        new, seen = self.functions(), self.sql("SELECT oid, xmin, tgname FROM pg_trigger ORDER BY 1")
        for function, *_ in new:
            self.sql(
                f"CREATE OR REPLACE FUNCTION cacheservice.{function}() RETURNS trigger LANGUAGE plpgsql "
                "SECURITY DEFINER AS 'BEGIN RETURN NULL; END'"
            )
        self.sql("UPDATE cacheservice.watched SET form = 2")
        before = self.refresh()
        older = "sales was watched by an older version, which misses rows that a MERGE moves to another partition"
        if at_least(self.server, 15):
            self.assertIn(older, before.problem or "")
        self.assertEqual(migrate(self.dsn, FOLDER), [])
        self.assertEqual(self.functions(), new)
        self.assertEqual(self.sql("SELECT oid, xmin, tgname FROM pg_trigger ORDER BY 1"), seen)
        now = self.refresh()
        self.assertIsNone(now.problem)
        self.assertNotEqual(now.state, before.state)
        self.assertEqual(self.sql("SELECT DISTINCT form FROM cacheservice.watched"), [(3,)])
        self.assertEqual(migrate(self.dsn, FOLDER), [])
        self.assertEqual(self.refresh().state, now.state)
        # Those may belong to a role that `migrate` cannot act as.
        self.sql("UPDATE cacheservice.watched SET form = 1")
        self.assertEqual(migrate(self.dsn, FOLDER), [])
        if at_least(self.server, 15):
            self.assertEqual(
                self.refresh().problem,
                f"{older}; run again: cacheservice watch sales --key id",
            )

    def test_functions_that_others_own(self) -> None:
        """`migrate` leaves functions that do not belong to the owner of the recorded changes, or are gone."""
        owner = f"owner_{self.database[5:]}"
        self.sql(f"CREATE ROLE {owner}")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {owner}")
        self.addCleanup(query, self.server, self.database, f"DROP OWNED BY {owner} CASCADE")
        for statement in (
            f"ALTER FUNCTION cacheservice.record_1_update() OWNER TO {owner}",
            "DROP FUNCTION cacheservice.record_1_update() CASCADE",
        ):
            self.sql("UPDATE cacheservice.watched SET form = 2", statement)
            before = self.functions()
            migrate(self.dsn, FOLDER)
            self.assertEqual(self.functions(), before)
            self.assertIn("say again: cacheservice watch items --key id", self.refresh().problem or "")
            self.watch("items")


@pytest.mark.usefixtures("server_maker")
class Kept(Bookkeeping):
    """What happens to the recorded changes."""

    make_server: MakeServer

    def test_a_publication_of_all_tables(self) -> None:
        """Pruning, watching again and unwatching work under it."""
        self.sql("CREATE PUBLICATION everything FOR ALL TABLES", "INSERT INTO items VALUES (1, 'a')")
        self.assertEqual(self.prune(), 1)
        self.sql("INSERT INTO items VALUES (2, 'a')")
        self.watch("items")
        self.sql("INSERT INTO items VALUES (3, 'a')")
        self.unwatch("items")
        self.assertEqual(self.rows(), [])
        unidentified = """
            SELECT c.oid::regclass FROM pg_class AS c
            WHERE c.relnamespace = 'cacheservice'::regnamespace AND c.relkind = 'r' AND c.relreplident <> 'f'
              AND NOT EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisprimary)
        """
        self.assertEqual(self.sql(unidentified), [])

    def test_truncated_by_somebody(self) -> None:
        """A snapshot from before has missed changes, also one that a running refresh took, and is not trusted."""
        before = self.refresh()
        self.sql("INSERT INTO items VALUES (1, 'a')")
        begun = self.begin_refresh()
        self.sql("TRUNCATE cacheservice.changes")
        during = self.refresh(before.snapshot, begun=begun)
        self.assertNotEqual(during.state["kept"], before.state["kept"])
        after = self.refresh(before.snapshot)
        self.assertEqual(after.problem, "the changes since the last refresh are not kept any more")
        self.sql("INSERT INTO items VALUES (2, 'a')")
        now = self.refresh()
        self.sql("INSERT INTO items VALUES (3, 'a')")
        self.assertEqual(self.found(now)[1], {"3"})
        # The running one had the state of after, and the rows of before.
        self.assertNotEqual(self.refresh().state["kept"], during.state["kept"])

    def test_deleted_by_somebody(self) -> None:
        """A snapshot that has not seen what somebody deleted is not trusted either."""
        before = self.refresh()
        self.sql("INSERT INTO items VALUES (1, 'a')", "DELETE FROM cacheservice.changes")
        self.assert_problem(before, "the changes since the last refresh are not kept any more")

    def test_unwatching_another(self) -> None:
        """That another watch is taken away or made again costs no full read of this one."""
        self.sql("CREATE TABLE others (id int)")
        self.watch("others")
        self.sql("INSERT INTO items VALUES (1, 'a')")
        before = self.refresh()
        self.sql("INSERT INTO items VALUES (2, 'a')", "INSERT INTO others VALUES (1)")
        self.watch("others")
        self.sql("INSERT INTO others VALUES (1)")
        self.unwatch("others")
        self.assertEqual(self.found(before)[1], {"2"})

    def test_what_another_cluster_wrote(self) -> None:
        """Numbers of transactions that are not assigned here yet, as a restored dump has them, are a problem until
        somebody prunes; then deltas work, and no change is lost."""
        for restored in (
            "UPDATE cacheservice.watched SET since_xid = '900000000000'",
            "UPDATE cacheservice.pruned SET through = '900000000000'",
            "INSERT INTO cacheservice.changes (watched, xid, keys) VALUES (1, '900000000000', '{9}')",
        ):
            for cure in (self.prune, lambda: migrate(self.dsn, FOLDER)):
                self.sql(restored, "INSERT INTO items VALUES (1, 'a')")
                before = self.refresh()
                if "INSERT" not in restored:
                    self.assertIn("were written by another cluster", before.problem or "")
                cure()
                now = self.refresh()
                self.assertIsNone(now.problem)
                self.sql("UPDATE items SET name = 'b'")
                self.assertEqual(self.found(now)[1], {"1"})
                self.sql("DELETE FROM items")

    def test_a_dump_in_another_cluster(self) -> None:
        """A real dump with more transactions behind it, restored into a new cluster."""
        self.sql("INSERT INTO items VALUES (1, 'a')")
        directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, directory)
        other = self.make_server(directory)
        self.addCleanup(other.stop, "immediate")
        other.start()
        ((here,),) = self.sql("SELECT pg_current_xact_id()::text::bigint")
        ((there,),) = query(other, "postgres", "SELECT pg_current_xact_id()::text::bigint")
        for _ in range(max(0, there + 1000 - here)):
            self.sql("SELECT pg_current_xact_id()")
        self.watch("items")
        self.sql("INSERT INTO items VALUES (2, 'a')")
        query(other, "postgres", f"CREATE ROLE {self.reader} LOGIN PASSWORD 'wörd'")
        other.create_database(self.database)
        dump = subprocess.run(
            [self.server.psql_path.with_name("pg_dump"), self.dsn], check=True, capture_output=True, text=True
        )
        # pg_dump is of the default version; a server before 17 does not know this setting.
        other.run_sql(dump.stdout.replace("SET transaction_timeout = 0;\n", ""), self.database)
        connection = connect(other, self.database)
        self.addCleanup(connection.close)
        self.server, self.session = other, connection.cursor()
        self.assertIn("were written by another cluster", self.refresh().problem or "")
        self.prune()
        before = self.refresh()
        self.assertIsNone(before.problem)
        self.sql("INSERT INTO items VALUES (3, 'a')")
        self.assertEqual(self.found(before)[1], {"3"})

    def test_triggers_off_and_on_again(self) -> None:
        """Also if they are enabled as they were: their versions are others."""
        before = self.refresh()
        self.sql("ALTER TABLE items DISABLE TRIGGER USER", "INSERT INTO items VALUES (1, 'a')")
        for event in ("insert", "update", "delete", "truncate"):
            self.sql(f"ALTER TABLE items ENABLE ALWAYS TRIGGER cacheservice_1_{event}")
        now = self.refresh(before.snapshot)
        self.assertIsNone(now.problem)
        self.assertNotEqual(now.state, before.state)


@pytest.fixture(scope="class")
def publisher(request: pytest.FixtureRequest, make_server: MakeServer) -> Iterator[None]:
    """A server that publishes changes, as `self.other`."""
    with running_server(make_server, wal_level="logical") as request.cls.other:
        yield


@pytest.mark.usefixtures("publisher")
class Replicated(Bookkeeping):
    """Tables that logical replication fills."""

    other: EmbeddedPostgres

    def wait_for(self, statement: str, expected: list[tuple[Any, ...]]) -> None:
        wait_until(lambda: self.sql(statement) == expected, str(expected))

    def test_a_subscription(self) -> None:
        """What its worker copies, inserts, updates, deletes and truncates is recorded, in a partitioned table too."""
        self.watch("items", "name", "id")
        self.sql(
            "CREATE TABLE sales (id int, region text, PRIMARY KEY (id, region)) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            "CREATE TABLE sales_b PARTITION OF sales FOR VALUES IN ('b')",
            f"GRANT SELECT ON sales TO {self.reader}",
        )
        self.watch("sales")
        other = self.other
        for statement in (
            "CREATE TABLE items (id int PRIMARY KEY, name text)",
            "CREATE TABLE sales (id int, region text, PRIMARY KEY (id, region))",
            "INSERT INTO items VALUES (1, 'a'), (2, 'b')",
            "CREATE PUBLICATION all_of_it FOR ALL TABLES",
        ):
            query(other, "postgres", statement)
        self.tables["sales"] = ["id"]
        before = self.refresh()
        source = f"host={other.socket_directory} port={other.port} user=postgres dbname=postgres"
        self.sql(f"CREATE SUBSCRIPTION it CONNECTION '{source}' PUBLICATION all_of_it")
        self.addCleanup(self.sql, "DROP SUBSCRIPTION it")
        self.wait_for("SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'", [(0,)])
        before, found = self.found(before)
        self.assertEqual(found, {"1", "2"})
        for statement, seen, expected in (
            ("INSERT INTO items VALUES (3, 'c')", "SELECT count(*) FROM items WHERE id = 3", {"3"}),
            ("UPDATE items SET name = 'd' WHERE id = 1", "SELECT count(*) FROM items WHERE name = 'd'", {"1"}),
            ("UPDATE items SET id = 9 WHERE id = 1", "SELECT count(*) FROM items WHERE id = 9", {"1", "9"}),
            ("DELETE FROM items WHERE id = 2", "SELECT 3 - count(*) FROM items", {"2"}),
            ("INSERT INTO sales VALUES (5, 'a')", "SELECT count(*) FROM sales", {"5"}),
            ("UPDATE sales SET region = 'b'", "SELECT count(*) FROM sales_b", {"5"}),
        ):
            query(other, "postgres", statement)
            self.wait_for(seen, [(1,)])
            before, found = self.found(before)
            self.assertEqual(found, expected, statement)
        query(other, "postgres", "TRUNCATE items")
        self.wait_for("SELECT count(*) FROM items", [(0,)])
        self.assertIn("items was truncated", self.refresh(before.snapshot).problem or "")

    def test_ordinary_writers(self) -> None:
        """They fire no trigger for rows: each statement records one row."""
        self.sql("INSERT INTO items VALUES (1, 'a'), (2, 'b')", "UPDATE items SET name = 'c'", "DELETE FROM items")
        self.assertEqual(len(self.rows()), 3)
