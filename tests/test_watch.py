"""Laws of `cacheservice watch`, of the triggers that it puts on tables, and of what they report, on the real server."""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import psycopg2
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheservice.base.errors import WatchFailed
from cacheservice.cli.main import main
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.postgres import triggers
from cacheservice.sources.postgres.triggers import EVENTS, MAY_BE_MERGE
from tests.kit.postgres import at_least, connect, fresh_database, query
from tests.kit.watching import TRIGGERS, Refreshing, Watching


class Recording(Watching):
    """Every key of every row that a statement inserts, updates or deletes is recorded in the writer's transaction."""

    def setUp(self) -> None:
        super().setUp()
        self.sql("CREATE TABLE items (id int PRIMARY KEY, name text)")

    def knows(self, statement: str) -> bool:
        """MERGE is known from 15 on."""
        return at_least(self.server, 15) or not statement.startswith("MERGE")

    def test_every_kind_of_statement(self) -> None:
        """Each records, as one row, exactly the keys of the rows that differ after it."""
        self.watch("items")
        for statement, *expected in (
            ("INSERT INTO items SELECT n, 'a' FROM generate_series(1, 5) AS n", "1", "2", "3", "4", "5"),
            ("UPDATE items SET name = 'b' WHERE id < 3", "1", "2"),
            ("UPDATE items SET id = id + 10 WHERE id > 3", "4", "5", "14", "15"),
            ("DELETE FROM items WHERE id = 14", "14"),
            ("MERGE INTO items AS i USING (VALUES (15), (16)) AS s (id) ON i.id = s.id "
             "WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (s.id, 'm')", "15", "16"),
            ("MERGE INTO items AS i USING (VALUES (1), (17)) AS s (id) ON i.id = s.id "
             "WHEN MATCHED THEN UPDATE SET name = 'm' WHEN NOT MATCHED THEN INSERT VALUES (s.id, 'm')", "1", "17"),
            ("INSERT INTO items VALUES (1, 'c'), (20, 'c') ON CONFLICT (id) DO UPDATE SET name = 'c'", "1", "20"),
            ("INSERT INTO items VALUES (1, 'd'), (21, 'd') ON CONFLICT (id) DO NOTHING", "21"),
            ("INSERT INTO items VALUES (1, 'd') ON CONFLICT (id) DO UPDATE SET id = 30", "1", "30"),
            ("WITH gone AS (DELETE FROM items WHERE id = 30 RETURNING *) INSERT INTO items SELECT 31, name FROM gone",
             "30", "31"),
            ("UPDATE items AS i SET id = o.id + 100 FROM items AS o WHERE o.id = i.id AND i.id IN (2, 3)",
             "2", "3", "102", "103"),
        ):  # fmt: skip
            if self.knows(statement):
                self.assert_recorded("items", statement, *expected)
        with closing(connect(self.server, self.database)) as copying, copying.cursor() as cursor:
            cursor.copy_expert("COPY items FROM STDIN", io.StringIO("50\tx\n51\ty\n"))
        self.assertEqual(self.keys(), {"50", "51"})
        self.sql("UPDATE items SET name = 'one row'")
        self.assertEqual(len(self.rows()), 1)
        self.sql("TRUNCATE items")
        self.assertEqual(self.rows(), [(1, None)])

    def test_a_statement_that_touches_no_row(self) -> None:
        """It records nothing and notifies nobody."""
        self.watch("items", notify=True)
        self.sql(f"LISTEN {OWN_CHANNEL}")
        for statement in (
            "INSERT INTO items SELECT 1, 'a' WHERE false",
            "UPDATE items SET name = 'b' WHERE id = 1",
            "DELETE FROM items",
            "MERGE INTO items AS i USING (VALUES (1)) AS s (id) ON i.id = s.id WHEN MATCHED THEN DELETE",
        ):
            if self.knows(statement):
                self.sql(statement)
        self.assertEqual(self.rows(), [])
        self.assertEqual(self.session.connection.notifies, [])

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_whatever_is_done(self, data: st.DataObject) -> None:
        """After any statements, committed or rolled back in part, each key whose row differs was recorded; and no key
        was that no statement named."""
        number = st.integers(0, 12)
        statements = st.lists(
            st.one_of(
                st.builds("INSERT INTO items VALUES ({0}, '{1}') ON CONFLICT DO NOTHING".format, number, number),
                st.builds("INSERT INTO items VALUES ({0}, 'x') ON CONFLICT (id) DO UPDATE SET name = '{1}'".format,
                          number, number),
                st.builds("UPDATE items SET name = '{0}' WHERE id BETWEEN {1} AND {2}".format, number, number, number),
                st.builds("UPDATE items SET id = {0} WHERE id = {1} AND NOT EXISTS "
                          "(SELECT FROM items AS i WHERE i.id = {0})".format, number, number),
                st.builds("UPDATE items SET id = 25 - id WHERE id BETWEEN {0} AND {1}".format, number, number),
                st.builds("DELETE FROM items WHERE id % {0} = 0".format, st.integers(1, 5)),
                st.sampled_from(["SAVEPOINT s", "ROLLBACK TO SAVEPOINT s"]),
            ),
            max_size=8,
        )  # fmt: skip
        chosen, ending = data.draw(statements), data.draw(st.sampled_from(["COMMIT", "COMMIT", "ROLLBACK"]))
        if not self.sql("SELECT 1 FROM cacheservice.watched"):
            self.watch("items")
        before = self.content("items")
        self.sql("BEGIN", "SAVEPOINT s")
        for statement in chosen:
            if statement != "SAVEPOINT s":
                self.sql("SAVEPOINT each")
            try:
                self.sql(statement)
            except psycopg2.errors.UniqueViolation:
                self.sql("ROLLBACK TO SAVEPOINT each")
        self.sql(ending)
        after = self.content("items")
        differing = {key for key, _ in (before - after) + (after - before)}
        recorded = self.keys()
        self.assertLessEqual(differing, recorded)
        self.assertLessEqual(recorded, {str(n) for n in range(26)})

    def test_null_keys(self) -> None:
        """A NULL key is recorded as a NULL, alone and in a composite key, before and after."""
        self.sql("CREATE TABLE loose (id int, part text)")
        self.watch("loose")
        self.watch("loose", "id", "part")
        self.sql("INSERT INTO loose VALUES (NULL, 'a'), (NULL, NULL), (1, NULL)")
        self.assertEqual(self.rows(), [(1, [None, None, "1"]), (2, [[None, "a"], [None, None], ["1", None]])])
        self.sql("UPDATE loose SET id = 2 WHERE part = 'a'")
        self.assertEqual(self.rows(), [(1, [None, "2"]), (2, [[None, "a"], ["2", "a"]])])
        self.sql("UPDATE loose SET part = part WHERE id IS NULL")
        self.assertEqual(self.rows(), [(1, [None]), (2, [[None, None]])])
        self.sql("DELETE FROM loose WHERE id IS NULL")
        self.assertEqual(self.rows(), [(1, [None]), (2, [[None, None]])])

    def test_composite_keys(self) -> None:
        """A key of several columns is an array of arrays, in the order of the columns as they were named."""
        self.sql("CREATE TABLE prices (product int, currency varchar(3), amount numeric)")
        self.watch("prices", "currency", "product")
        self.sql("INSERT INTO prices VALUES (1, 'EUR', 1), (2, 'USD', 1)")
        self.assertEqual(self.rows(), [(1, [["EUR", "1"], ["USD", "2"]])])
        self.sql("UPDATE prices SET amount = 2 WHERE product = 2")
        self.assertEqual(self.rows(), [(1, [["USD", "2"]])])
        self.sql("UPDATE prices SET currency = 'GBP' WHERE product = 2")
        self.assertEqual(self.rows(), [(1, [["USD", "2"], ["GBP", "2"]])])
        self.sql("DELETE FROM prices WHERE product = 1")
        self.assertEqual(self.rows(), [(1, [["EUR", "1"]])])

    def test_keys_as_text(self) -> None:
        """The text of a key is the same whatever the writer's session is set to, for each type that deltas use."""
        types = {
            "int2": "-7", "int4": "7", "int8": "7000000000", "oid": "4000000000", "text": "7,5 'ä' \\ \"",
            "varchar": " x ", "name": "n", "uuid": "00000000-0000-0000-0000-00000000000a", "bool": "true",
            '"char"': "c", "mood": "so-so", "positive": "7", "varchar(9)": "v ",
        }  # fmt: skip
        self.sql("CREATE TYPE mood AS ENUM ('good', 'so-so')", "CREATE DOMAIN positive AS int CHECK (VALUE > 0)")
        self.sql(f"CREATE TABLE typed ({', '.join(f'k{n} {kind}' for n, kind in enumerate(types))})")
        names = [f"k{n}" for n in range(len(types))]
        self.watch("typed", *names)
        for setting in (
            "SELECT 1",
            "SET DateStyle = 'SQL, DMY'; SET IntervalStyle = iso_8601; SET bytea_output = escape",
            "SET extra_float_digits = -15; SET lc_numeric = 'C'; SET lc_monetary = 'C'; SET TimeZone = 'Asia/Kolkata'",
            "SET standard_conforming_strings = off; SET quote_all_identifiers = on; SET array_nulls = off",
            "SET transform_null_equals = on; SET plan_cache_mode = force_custom_plan; SET enable_seqscan = off",
        ):
            with closing(connect(self.server, self.database)) as other, other.cursor() as cursor:
                cursor.execute(setting)
                cursor.execute(f"INSERT INTO typed VALUES ({', '.join(['%s'] * len(types))})", list(types.values()))
                cursor.execute("UPDATE typed SET k1 = k1")
                cursor.execute("DELETE FROM typed")
            self.assertEqual(self.rows(), [(1, [list(types.values())])] * 3, setting)

    def test_foreign_keys_that_change_other_tables(self) -> None:
        """ON DELETE and ON UPDATE actions record the keys of the rows that they change, in one row for a statement."""
        self.sql(
            "CREATE TABLE parts (id int PRIMARY KEY, item int REFERENCES items ON DELETE CASCADE ON UPDATE CASCADE)",
            "CREATE TABLE notes (id int PRIMARY KEY, item int REFERENCES items ON DELETE SET NULL ON UPDATE SET NULL)",
            "INSERT INTO items SELECT n, 'a' FROM generate_series(1, 4) AS n",
            "INSERT INTO parts SELECT n, (n - 1) / 10 + 1 FROM generate_series(1, 40) AS n",
            "INSERT INTO notes SELECT n, n FROM generate_series(1, 4) AS n",
        )
        self.watch("parts")
        self.watch("notes")
        self.assert_recorded("parts", "DELETE FROM items WHERE id = 5")
        self.sql("DELETE FROM items WHERE id < 3")
        self.assertEqual(
            [(watched, {*keys}) for watched, keys in self.rows()],
            [(1, {str(n) for n in range(1, 21)}), (2, {"1", "2"})],
        )
        self.sql("UPDATE items SET id = 30 WHERE id = 3")
        self.assertEqual(
            [(watched, {*keys}) for watched, keys in self.rows()],
            [(1, {str(n) for n in range(21, 31)}), (2, {"3"})],
        )
        self.assertEqual(self.sql("SELECT count(*) FROM parts WHERE item = 30"), [(10,)])
        self.sql("TRUNCATE items CASCADE")
        self.assertEqual(self.rows(), [(1, None), (2, None)])

    def test_row_triggers_of_others(self) -> None:
        """What a BEFORE trigger makes of a row is what is recorded, though no statement named it."""
        self.sql(
            "CREATE FUNCTION moved() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN NEW.id := NEW.id + 100; RETURN NEW; END$$",
            "INSERT INTO items VALUES (1, 'a')",
            "CREATE TRIGGER moved BEFORE UPDATE OR INSERT ON items FOR EACH ROW EXECUTE FUNCTION moved()",
        )
        self.watch("items")
        self.assert_recorded("items", "UPDATE items SET name = 'b'", "1", "101")
        self.assert_recorded("items", "INSERT INTO items VALUES (2, 'b')", "102")

    def partitioned(self) -> None:
        self.sql(
            "CREATE TABLE sales (id int, region text, amount int) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            # Its columns lie in another order.
            "CREATE TABLE sales_b (amount int, unwanted int, region text, id int)",
            "ALTER TABLE sales_b DROP COLUMN unwanted",
            "ALTER TABLE sales ATTACH PARTITION sales_b FOR VALUES IN ('b')",
            "CREATE TABLE sales_c PARTITION OF sales FOR VALUES IN ('c') PARTITION BY RANGE (id)",
            "CREATE TABLE sales_c1 PARTITION OF sales_c FOR VALUES FROM (0) TO (1000)",
        )

    def test_partitions(self) -> None:
        """Statements on the partitioned table, on a partition and on one of its own record the same; a row that moves
        is recorded too."""
        self.partitioned()
        self.assertEqual(
            self.watch("sales"),
            [f'"public"."{name}"' for name in ("sales", "sales_a", "sales_b", "sales_c", "sales_c1")],
        )
        for statement, *expected in (
            ("INSERT INTO sales VALUES (1, 'a', 0), (2, 'b', 0), (3, 'c', 0)", "1", "2", "3"),
            ("INSERT INTO sales_b (id, region, amount) VALUES (4, 'b', 0)", "4"),
            ("INSERT INTO sales_c VALUES (5, 'c', 0)", "5"),
            ("INSERT INTO sales_c1 VALUES (6, 'c', 0)", "6"),
            ("UPDATE sales SET amount = 1 WHERE id < 4", "1", "2", "3"),
            ("UPDATE sales_b SET amount = 2 WHERE id = 4", "4"),
            ("UPDATE sales SET region = 'b' WHERE id = 1", "1"),
            ("UPDATE sales SET region = 'c', id = id + 10 WHERE region = 'b' AND id = 2", "2", "12"),
            ("DELETE FROM sales_c WHERE id = 5", "5"),
            ("DELETE FROM sales WHERE region = 'c'", "3", "6", "12"),
        ):
            self.assert_recorded("sales", statement, *expected)
        self.sql("TRUNCATE sales_b")
        self.assertEqual(self.rows(), [(1, None)])
        self.sql("TRUNCATE sales")
        self.assertEqual({keys for _, keys in self.rows()}, {None})

    def test_a_row_that_another_partition_refuses(self) -> None:
        """A row that leaves its partition and is let into no other was deleted, and is recorded."""
        self.partitioned()
        self.sql(
            "INSERT INTO sales VALUES (1, 'a', 0), (2, 'a', 0)",
            "CREATE FUNCTION refused() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER refused BEFORE INSERT ON sales_b FOR EACH ROW EXECUTE FUNCTION refused()",
        )
        self.watch("sales")
        self.assert_recorded("sales", "UPDATE sales SET region = 'b' WHERE id = 1", "1")
        self.assert_recorded("sales", "UPDATE sales SET region = CASE id WHEN 2 THEN 'b' ELSE 'c' END", "2")

    def test_inheritance(self) -> None:
        """Statements on a table and on a child record the same, also on a child of two parents."""
        self.sql(
            "CREATE TABLE things (id int, name text)",
            "CREATE TABLE red () INHERITS (things)",
            "CREATE TABLE round (size int) INHERITS (things)",
            "CREATE TABLE balls () INHERITS (red, round)",
        )
        self.assertEqual(len(self.watch("things")), 4)
        for statement, *expected in (
            ("INSERT INTO balls VALUES (1, 'a', 1), (2, 'a', 1)", "1", "2"),
            ("INSERT INTO red VALUES (3, 'a')", "3"),
            ("UPDATE things SET name = 'b'", "1", "2", "3"),
            ("UPDATE round SET id = 9 WHERE id = 2", "2", "9"),
            ("DELETE FROM things WHERE id < 9", "1", "3"),
        ):
            self.assert_recorded("things", statement, *expected)

    def test_replicated_sessions(self) -> None:
        """Sessions that fire no ordinary trigger (session_replication_role = replica) are recorded as well."""
        self.watch("items")
        self.sql("SET session_replication_role = replica")
        self.assert_recorded("items", "INSERT INTO items VALUES (1, 'a')", "1")

    def test_columns_that_change_below_open_sessions(self) -> None:
        """Writers that keep plans from before an ALTER TABLE go on, and their keys are recorded: by the triggers for
        statements, by those for rows (as in applied replications), and by both."""
        alterations = (
            "ALTER TABLE items ADD added text DEFAULT 'q'",
            "ALTER TABLE items DROP COLUMN spare",
            "ALTER TABLE items ALTER n TYPE bigint",
            "ALTER TABLE items ALTER id TYPE bigint",
            "ALTER TABLE items ALTER id TYPE text",
            "ALTER TABLE items DROP COLUMN id, ADD id int",
        )
        for kind, writers, role in (
            ("r", "statements", "origin"),
            ("r", "rows", "replica"),
            ("r", "both", "replica"),
            ("r", "both", "origin"),
            ("p", "rows", "replica"),
            ("i", "rows", "replica"),
        ):
            self.sql(
                "DROP TABLE IF EXISTS items CASCADE",
                f"CREATE TABLE items (spare text, n int, id int) {'PARTITION BY HASH (n)' if kind == 'p' else ''}",
                *(["CREATE TABLE part (id int, n int, spare text)"] if kind == "p" else []),
                *(["ALTER TABLE items ATTACH PARTITION part FOR VALUES WITH (MODULUS 1, REMAINDER 0)"] * (kind == "p")),
                *(["CREATE TABLE child (own int) INHERITS (items)"] if kind == "i" else []),
            )
            self.watch("items")
            ((number,),) = self.sql("SELECT max(id) FROM cacheservice.watched")
            names = {"r": ["items"], "p": ["part"], "i": ["items", "child"]}[kind]
            for name in names:
                if writers == "rows":
                    self.sql(*(f"ALTER TABLE {name} DISABLE TRIGGER cacheservice_{number}_{event}" for event in EVENTS))
                elif role == "origin" and writers == "both":
                    self.sql(f"ALTER TABLE {name} DISABLE TRIGGER ALL; ALTER TABLE {name} ENABLE TRIGGER ALL")
            writer = self.open()
            writer.execute(f"SET session_replication_role = {role}")
            target = names[-1] if kind != "p" or writers == "rows" else "items"
            for alteration in ("SELECT", *(each for each in alterations if kind != "p" or " n TYPE" not in each)):
                self.sql(alteration)
                self.rows()
                for statement in (
                    f"INSERT INTO {target} (id, n) VALUES (7, 1)",
                    f"UPDATE {target} SET n = 2 WHERE id::text = '7'",
                    f"DELETE FROM {target} WHERE n = 2",
                ):
                    with self.subTest(kind=kind, writers=writers, role=role, after=alteration, statement=statement):
                        writer.execute(statement)
                        self.assertEqual(self.keys(), {"7"})

    def test_a_table_that_has_another_oid(self) -> None:
        """As after a dump was restored: replicated sessions go on after the type of the key changed, without keys."""
        self.watch("items")
        ((definition, oid),) = self.sql(
            "SELECT pg_get_functiondef('cacheservice.record_1_row()'::regprocedure), 'items'::regclass::oid::text"
        )
        self.sql(definition.replace(f"'{oid}'", "'999999'"))
        self.sql(*(f"ALTER TABLE items DISABLE TRIGGER cacheservice_1_{event}" for event in EVENTS))
        writer = self.open()
        writer.execute("SET session_replication_role = replica; INSERT INTO items VALUES (1)")
        self.sql("ALTER TABLE items ALTER id TYPE bigint")
        self.rows()
        for statement in (
            "INSERT INTO items VALUES (2)",
            "UPDATE items SET name = 'x' WHERE id = 2",
            "DELETE FROM items WHERE id = 2",
        ):
            writer.execute(statement)
        self.assertEqual(self.rows(), [(1, None)] * 3)

    def test_more_bytes_than_an_array_may_have(self) -> None:
        """A statement that changes rows with more bytes of keys than the limit is recorded as a TRUNCATE is; the limit
        holds for the keys before and after, alone or in a key of several columns, and for applied replications."""
        self.patch(triggers, "_MOST_BYTES", 100)
        self.sql("CREATE TABLE wide (id text, part text, n int)")
        self.watch("wide")
        self.watch("wide", "id", "part")
        for replicated in (False, True):
            self.sql("TRUNCATE wide")
            self.rows()
            if replicated:
                self.sql("SET session_replication_role = replica")
                self.sql(
                    *(
                        f"ALTER TABLE wide DISABLE TRIGGER cacheservice_{watch}_{event}"
                        for watch in (1, 2)
                        for event in EVENTS
                    )
                )
            for statement, *expected in (
                ("INSERT INTO wide VALUES (repeat('a', 60), repeat('b', 40))", ["a" * 60], [["a" * 60, "b" * 40]]),
                ("UPDATE wide SET n = 1", ["a" * 60], [["a" * 60, "b" * 40]]),
                ("UPDATE wide SET part = repeat('b', 41)", ["a" * 60], None),
                ("UPDATE wide SET n = 2", ["a" * 60], None),
                ("UPDATE wide SET id = repeat('a', 101), part = NULL", None, None),
                ("UPDATE wide SET n = 3", None, None),
                ("UPDATE wide SET id = 'c'", None, None),
                ("UPDATE wide SET id = NULL", ["c", None], [["c", None], [None, None]]),
                ("UPDATE wide SET id = repeat('a', 101)", None, None),
                ("DELETE FROM wide", None, None),
            ):  # fmt: skip
                self.sql(statement)
                recorded = [
                    (number, list(dict.fromkeys(map(str, keys))) if keys else None) for number, keys in self.rows()
                ]
                wanted = [(number, list(map(str, keys)) if keys else None) for number, keys in enumerate(expected, 1)]
                self.assertEqual(recorded, wanted, statement)

    def test_what_is_rolled_back(self) -> None:
        """Nothing is recorded of a statement that fails, or is rolled back, whole or to a savepoint."""
        self.watch("items")
        self.sql("BEGIN", "INSERT INTO items VALUES (1, 'a')", "ROLLBACK")
        self.assertEqual(self.rows(), [])
        self.sql(
            "BEGIN",
            "INSERT INTO items VALUES (1, 'a')",
            "SAVEPOINT s",
            "INSERT INTO items VALUES (2, 'a')",
            "ROLLBACK TO SAVEPOINT s",
            "INSERT INTO items VALUES (3, 'a')",
            "RELEASE SAVEPOINT s",
            "COMMIT",
        )
        self.assertEqual(self.keys(), {"1", "3"})
        with self.assertRaises(psycopg2.errors.UniqueViolation):
            self.sql("INSERT INTO items VALUES (4, 'a'), (1, 'a')")
        self.assertEqual(self.rows(), [])

    def test_prepared_transactions(self) -> None:
        """One that is committed in two phases is recorded once it is; PostgreSQL allows none that has notified."""
        self.watch("items")
        self.sql("BEGIN", "INSERT INTO items VALUES (1, 'a')", f"PREPARE TRANSACTION '{self.database}'")
        self.assertEqual(self.rows(), [])
        self.sql(f"COMMIT PREPARED '{self.database}'")
        self.assertEqual(self.keys(), {"1"})
        self.watch("items", notify=True)
        self.sql("BEGIN", "INSERT INTO items VALUES (2, 'a')")
        with self.assertRaises(psycopg2.errors.FeatureNotSupported):
            self.sql(f"PREPARE TRANSACTION '{self.database}'")

    def test_notifications(self) -> None:
        """A transaction notifies once, at its commit, which watches recorded something; not with --no-notify."""
        listener = self.open()
        listener.execute(f"LISTEN {OWN_CHANNEL}")
        self.watch("items", notify=True)
        self.watch("items", "name", "id", notify=False)
        self.sql("BEGIN")
        for number in range(40):
            self.sql(f"INSERT INTO items VALUES ({number}, 'a')")
        listener.execute("SELECT 1")
        self.assertEqual(listener.connection.notifies, [])
        self.sql("COMMIT")
        listener.execute("SELECT 1")
        self.assertEqual([told.payload for told in listener.connection.notifies], ["changed 1"])

    def test_more_rows_than_an_array_may_have(self) -> None:
        """A statement that changes more than a million rows is recorded as a TRUNCATE is, rather than fail."""
        self.sql("CREATE UNLOGGED TABLE many (id int)")
        self.watch("many")
        self.sql("INSERT INTO many SELECT generate_series(1, 1000001)")
        self.assertEqual(self.rows(), [(1, None)])
        self.sql("UPDATE many SET id = 0 WHERE id > 1")
        self.assertEqual([len(keys) for _, keys in self.rows()], [2_000_000])
        self.sql("DELETE FROM many")
        self.assertEqual(self.rows(), [(1, None)])


class Rights(Watching):
    """The triggers' functions run with their owner's rights: nobody makes them do anything but record."""

    def setUp(self) -> None:
        super().setUp()
        self.role = f"role_{secrets.token_hex(4)}"
        self.sql(
            f"CREATE ROLE {self.role}",
            "CREATE TABLE items (id int PRIMARY KEY, name text)",
            f"GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON items TO {self.role}",
            f"GRANT CREATE ON SCHEMA public TO {self.role}",
        )
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {self.role}")
        self.addCleanup(query, self.server, self.database, f"DROP OWNED BY {self.role} CASCADE")

    def test_writers_need_no_rights(self) -> None:
        """A writer without any right in the schema writes as usual, and is recorded; it can read no record."""
        self.watch("items", notify=True)
        self.sql(f"SET ROLE {self.role}")
        self.sql("INSERT INTO items VALUES (1, 'a')", "UPDATE items SET id = 2", "DELETE FROM items", "TRUNCATE items")
        for statement in (
            "SELECT * FROM cacheservice.changes",
            "INSERT INTO cacheservice.changes (watched) VALUES (1)",
            "SELECT cacheservice.prune('0')",
        ):
            with self.assertRaises(psycopg2.errors.InsufficientPrivilege, msg=statement):
                self.sql(statement)
        self.sql("RESET ROLE")
        self.assertEqual(self.rows(), [(1, ["1"]), (1, ["1", "2"]), (1, ["2"]), (1, None)])

    def test_a_hostile_search_path(self) -> None:
        """No function, operator, type, cast or table that a writer makes takes the place of what the triggers name."""
        self.watch("items", notify=True)
        self.watch("items", "id", "name")
        self.sql(
            f"SET ROLE {self.role}",
            "CREATE TABLE caught (by text, what text)",
            f"GRANT ALL ON caught TO {self.role}",
        )
        note = "BEGIN INSERT INTO public.caught VALUES (current_user, '{0}'); RETURN {1}; END"
        for name, arguments, returns, value in (
            ("cardinality", "text[]", "int", "0"),
            ("pg_notify", "text, text", "void", ""),
            ("pg_current_xact_id", "", "xid8", "NULL"),
            ("clock_timestamp", "", "timestamptz", "NULL"),
            ("text", "int", "text", "'evil'"),
            ("same", "text[], text[]", "bool", "true"),
            ("joined", "text[], text[]", "text[]", "'{}'"),
            ("greater", "int, int", "bool", "true"),
        ):
            self.sql(f"CREATE FUNCTION public.{name}({arguments}) RETURNS {returns} LANGUAGE plpgsql "
                     f"AS $${note.format(name, value)}$$")  # fmt: skip
        for operator, function, kind in (
            ("=", "same", "text[]"), ("<>", "same", "text[]"), ("||", "joined", "text[]"), (">", "greater", "int"),
            ("<=", "greater", "int"), ("+", "greater", "int"),
        ):  # fmt: skip
            self.sql(f"CREATE OPERATOR public.{operator} "
                     f"(FUNCTION = public.{function}, LEFTARG = {kind}, RIGHTARG = {kind})")  # fmt: skip
        self.sql(
            "CREATE DOMAIN public.text AS pg_catalog.text CHECK (VALUE = 'evil')",
            "CREATE TABLE public.new_rows (id text, name text)",
            "CREATE TABLE public.old_rows (id text, name text)",
            "CREATE TEMP TABLE new_rows (id int, name text)",
            "CREATE TEMP TABLE old_rows (id int, name text)",
            "SET search_path = public, pg_temp, pg_catalog",
            "INSERT INTO items VALUES (1, 'a'), (2, 'b')",
            "UPDATE items SET id = 3 WHERE id = 2",
            "UPDATE items SET name = 'c' WHERE id = 1",
            "DELETE FROM items",
            "TRUNCATE items",
            "RESET search_path",
            "RESET ROLE",
        )
        self.assertEqual(self.sql("SELECT * FROM caught"), [])
        self.assertEqual(
            self.rows(),
            [
                (1, ["1", "2"]), (2, [["1", "a"], ["2", "b"]]), (1, ["2", "3"]), (2, [["2", "b"], ["3", "b"]]),
                (1, ["1"]), (2, [["1", "a"], ["1", "c"]]), (1, ["3", "1"]), (2, [["3", "b"], ["1", "c"]]),
                (1, None), (2, None),
            ],
        )  # fmt: skip

    def test_the_functions_on_tables_of_others(self) -> None:
        """The reader, who may name what lies in the schema, cannot put a function of the service on a table of its own,
        where it would run a cast of the reader's with our rights."""
        self.watch("items")
        self.sql(f"GRANT USAGE ON SCHEMA cacheservice TO {self.role}", f"SET ROLE {self.role}")
        self.sql("CREATE TABLE mine (id int)")
        for event in ("insert", "update", "delete", "truncate"):
            with self.assertRaises(psycopg2.errors.InsufficientPrivilege):
                self.sql(f"CREATE TRIGGER mine AFTER {event} ON mine EXECUTE FUNCTION cacheservice.record_1_{event}()")
        self.sql("RESET ROLE")


class Commands(Watching):
    """What `cacheservice watch` and `unwatch` do, through the command line."""

    def setUp(self) -> None:
        super().setUp()
        self.sql("CREATE TABLE items (id int PRIMARY KEY, name text)")

    def run_command(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, env={"CACHESERVICE_MIGRATE_DSN": self.dsn})

    def state(self) -> list[Any]:
        """All that a watch leaves in the database, except the numbers of transactions."""
        return [
            self.sql("SELECT t.tgrelid, t.tgname, t.tgenabled, t.tgtype, t.tgoldtable, t.tgnewtable, "
                     "t.tgfoid::regproc::text FROM pg_trigger AS t WHERE NOT t.tgisinternal ORDER BY 1, 2"),
            self.sql("SELECT proname, prosrc, prosecdef, proacl::text FROM pg_proc "
                     "WHERE pronamespace = 'cacheservice'::regnamespace ORDER BY 1"),
            self.sql("SELECT id, relation, key_columns, notifies FROM cacheservice.watched ORDER BY 1"),
            self.sql("SELECT watched, keys FROM cacheservice.changes ORDER BY xid"),
        ]  # fmt: skip

    def test_watch_and_unwatch(self) -> None:
        """Watching is reported, and done again does no harm; unwatching leaves nothing behind."""
        empty = self.state()
        told = self.run_command("watch", "items", "--key", "id")
        self.assertEqual((told.exit_code, told.output), (0, 'changes of "public"."items" are recorded by id\n'))
        once = self.state()
        self.sql("INSERT INTO items VALUES (1, 'a')")
        self.assertEqual(self.run_command("watch", "public.items", "--key", "id").exit_code, 0)
        self.assertEqual(self.state(), once)
        self.sql("UPDATE items SET name = 'b'")
        self.assertEqual(self.rows(), [(1, ["1"])])
        self.sql("UPDATE items SET name = 'c'")
        told = self.run_command("unwatch", "items")
        self.assertEqual((told.exit_code, told.output), (0, 'changes of "public"."items" are no longer recorded\n'))
        self.assertEqual(self.state(), empty)
        self.sql("UPDATE items SET name = 'd'")
        self.assertEqual(self.rows(), [])

    def test_several_watches_of_one_table(self) -> None:
        """Each records its own keys; one is taken away alone, or all at once."""
        self.watch("items", "id")
        self.watch("items", "name")
        self.watch("items", "name", "id")
        self.sql("INSERT INTO items VALUES (1, 'a')")
        self.assertEqual(self.rows(), [(1, ["1"]), (2, ["a"]), (3, [["a", "1"]])])
        self.assertEqual(self.run_command("unwatch", "items", "--key", "name").exit_code, 0)
        self.sql("UPDATE items SET name = 'b'")
        self.assertEqual(self.rows(), [(1, ["1"]), (3, [["a", "1"], ["b", "1"]])])
        told = self.run_command("unwatch", "items", "--key", "name")
        self.assertEqual((told.exit_code, told.output), (1, 'cacheservice: "public"."items" is not watched by name\n'))
        self.assertEqual(self.run_command("unwatch", "items").exit_code, 0)
        self.assertEqual(self.sql(TRIGGERS), [])

    def test_names_that_need_quotes(self) -> None:
        """Names of any kind are taken as SQL writes a table's, and as they are for a column."""
        self.sql('CREATE SCHEMA "My Shop"', 'CREATE TABLE "My Shop"."Orders" ("Id" int, "a$$b%s{x}""\'" text)')
        told = self.run_command("watch", '"My Shop"."Orders"', "--key", "Id", "--key", "a$$b%s{x}\"'")
        self.assertEqual(told.exit_code, 0, told.output)
        self.sql("""INSERT INTO "My Shop"."Orders" VALUES (1, 'x')""")
        self.assertEqual(self.rows(), [(1, [["1", "x"]])])
        self.assertEqual(self.run_command("unwatch", '"My Shop"."Orders"').exit_code, 0)
        self.assertEqual(self.sql(TRIGGERS), [])

    def test_what_cannot_be_watched(self) -> None:
        """It is reported in one line with what to do, exit code 1, and nothing is changed."""
        self.sql(
            "CREATE VIEW seen AS SELECT * FROM items",
            "CREATE MATERIALIZED VIEW kept AS SELECT * FROM items",
            "CREATE TEMP TABLE passing (id int)",
            "CREATE TABLE sales (id int) PARTITION BY RANGE (id)",
            "CREATE TABLE sales_1 PARTITION OF sales FOR VALUES FROM (0) TO (9)",
        )
        before = self.state()
        ((passing,),) = self.sql("SELECT 'passing'::regclass::oid::regclass::text")
        ((schema,),) = self.sql("SELECT nspname FROM pg_namespace WHERE oid = pg_my_temp_schema()")
        for table, column, told in (
            ("nothing", "id", 'relation "nothing" does not exist'),
            # 14 and 15 look for the schema first.
            ("nowhere.items", "id", f'{"relation" if at_least(self.server, 16) else "schema"} "nowhere'),
            ("", "id", "invalid name syntax"),
            ("items", "nome", '"public"."items" has no column nome; it has id, name'),
            ("items", "ctid", '"public"."items" has no column ctid'),
            ("seen", "id", '"public"."seen" cannot have such triggers; watch the tables that it reads'),
            ("kept", "id", "watch the tables that it reads"),
            (f"{schema}.{passing}", "id", "cannot have such triggers"),
            ("sales_1", "id", "is a partition or a child of sales; watch that"),
            ("pg_class", "oid", "system catalog"),
        ):
            result = self.run_command("watch", table, "--key", column)
            self.assertEqual(result.exit_code, 1, result.output)
            self.assertIn(told, result.output)
            self.assertTrue(result.output.startswith("cacheservice: "), result.output)
            self.assertEqual(result.output.count("\n"), 1, result.output)
        self.assertEqual(self.state(), before)
        result = self.run_command("unwatch", "items")
        self.assertEqual((result.exit_code, result.output), (1, 'cacheservice: "public"."items" is not watched\n'))

    def test_a_database_that_was_not_migrated(self) -> None:
        """It is, if requested."""
        self.dsn = self.server.dsn(database=fresh_database(self.server, self.addCleanup))
        for command, told in (
            (("watch", "items", "--key", "id"), "run cacheservice migrate first"),
            (("unwatch", "items"), "items is not watched: the database has no schema cacheservice"),
        ):
            result = self.run_command(*command)
            self.assertEqual(result.exit_code, 1)
            self.assertIn(told, result.output)

    def test_rights_that_are_missing(self) -> None:
        """A role that may not put triggers on a table gets one line that names the reason."""
        role = f"role_{secrets.token_hex(4)}"
        self.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'hidden-word'")
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {role}")
        self.dsn = self.server.dsn(role, "hidden-word", self.database)
        result = self.run_command("watch", "items", "--key", "id")
        self.assertEqual(result.exit_code, 1)
        self.assertRegex(result.output, r"^cacheservice: PostgreSQL: permission denied [^\n]*\n$")

    def test_dry_run(self) -> None:
        """--dry-run changes nothing and prints SQL that does, run by psql, what the command does."""
        self.sql(
            "CREATE TABLE sales (id int, region text) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
        )
        before = self.state()
        for command in (
            ("watch", "sales", "--key", "id", "--key", "region"),
            ("watch", "sales", "--key", "id", "--key", "region", "--no-notify"),
            ("unwatch", "sales"),
        ):
            printed = self.run_command(*command, "--dry-run")
            self.assertEqual(printed.exit_code, 0, printed.output)
            self.assertEqual(self.state(), before)
            twin = f"test_{secrets.token_hex(6)}"
            # The command in a copy that is thrown away, then what it printed in the database itself.
            self.session.connection.close()
            query(self.server, "postgres", f"CREATE DATABASE {twin} TEMPLATE {self.database}")
            self.addCleanup(query, self.server, "postgres", f"DROP DATABASE {twin} WITH (FORCE)")
            done, database = self.done_in(twin, command), self.database
            self.database = database
            self.session = self.open()
            self.server.run_sql("SET search_path = 'pg_temp';\n" + printed.output, self.database)
            before = self.state()
            self.assertEqual(before, done)
            # A session that sees the transaction recorded for the triggers sees the triggers.
            self.assertEqual(
                self.sql("SELECT count(*) FROM cacheservice.watched AS w JOIN pg_trigger AS t ON t.tgname "
                         "LIKE 'cacheservice%' AND t.xmin <> w.since_xid::xid"), [(0,)])  # fmt: skip

    def done_in(self, database: str, command: Sequence[str]) -> list[Any]:
        own, self.database = (self.database, self.dsn), database
        self.dsn = self.server.dsn(database=database)
        result = self.run_command(*command)
        self.assertEqual(result.exit_code, 0, result.output)
        self.session = self.open()
        state = self.state()
        self.database, self.dsn = own
        return state

    def test_a_table_that_is_written_to(self) -> None:
        """Behind a long writer the command gives up in seconds and prints what to do; writers do not wait longer."""
        writer = self.open()
        writer.execute("BEGIN; INSERT INTO items VALUES (1, 'a')")
        began = time.monotonic()
        result = self.run_command("watch", "items", "--key", "id")
        self.assertLess(time.monotonic() - began, 60)
        self.assertEqual(result.exit_code, 1)
        self.assertRegex(
            result.output,
            r"items is in use: the lock was not granted within 5 s, and writers should not wait longer behind it\. "
            r"It was blocked: session \d+ of postgres \(.*\) holds RowExclusiveLock on (public\.)?items, in a "
            r"transaction since .*, idle in transaction, last ran BEGIN; end that session, or wait for it, and try",
        )
        self.assertEqual(self.sql("SELECT * FROM cacheservice.watched"), [])
        writer.execute("COMMIT")
        self.assertEqual(self.run_command("watch", "items", "--key", "id").exit_code, 0)

    def test_a_partition_that_was_detached(self) -> None:
        """Unwatching takes the triggers off what was a partition when it was watched, as well."""
        self.sql(
            "CREATE TABLE sales (id int, region text) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            "CREATE TABLE sales_b PARTITION OF sales FOR VALUES IN ('b')",
        )
        self.watch("sales")
        self.sql("ALTER TABLE sales DETACH PARTITION sales_a", "DROP TABLE sales_b")
        self.assertEqual(self.unwatch("sales"), ['"public"."sales"'])
        self.assertEqual(self.sql(TRIGGERS), [])
        self.sql("INSERT INTO sales_a VALUES (1, 'a')")

    def test_a_table_that_was_dropped(self) -> None:
        """What its watch has left goes with the next command, and a new table of that name is watched again."""
        empty = self.state()
        self.watch("items")
        self.sql("INSERT INTO items VALUES (1, 'a')", "DROP TABLE items", "CREATE TABLE items (id int)")
        self.watch("items")
        self.assertEqual(self.sql("SELECT id FROM cacheservice.watched"), [(2,)])
        self.unwatch("items")
        self.sql("CREATE TABLE others (id int)")
        self.watch("items")
        self.watch("others")
        self.sql("DROP TABLE items")
        self.unwatch("others")
        self.assertEqual(self.state()[1:], empty[1:])


class Asking(Refreshing):
    """What `cacheservice.changes()` returns to the reader."""

    def test_the_first_time(self) -> None:
        """Without a previous snapshot it returns the state, in one row, and so for several tables."""
        self.watch("items")
        self.sql("CREATE TABLE others (id int)", f"GRANT SELECT ON others TO {self.reader}")
        self.watch("others", notify=True)
        self.sql("INSERT INTO items VALUES (1, 'a')")
        self.tables["others"] = ["id"]
        first = self.refresh()
        self.assertEqual((first.problem, first.keys), (None, []))
        self.assertEqual([table["notifies"] for table in first.state["tables"].values()], [False, True])
        self.assertEqual([table["key_types"] for table in first.state["tables"].values()], [[23], [23]])
        self.sql("INSERT INTO items VALUES (2, 'a')", "INSERT INTO others VALUES (3)")
        self.assertEqual(self.found(first)[1], {"2", "3"})

    def test_composite_keys(self) -> None:
        """A key of several columns is returned as a JSON array of texts, each once."""
        self.watch("items", "name", "id")
        self.tables = {"items": ["name", "id"]}
        first = self.refresh()
        self.sql("INSERT INTO items VALUES (1, 'a\"'), (2, NULL)", "UPDATE items SET name = 'b' WHERE id = 1")
        self.assertEqual(self.found(first)[1], {('a"', "1"), (None, "2"), ("b", "1")})

    def test_at_most(self) -> None:
        """Of more than `most` changed keys it returns one more than that, so that it shows."""
        self.watch("items")
        first = self.refresh()
        self.sql("INSERT INTO items SELECT generate_series(1, 100)")
        for most, told in ((10, 11), (99, 100), (100, 100), (1000, 100)):
            self.assertEqual(len(self.refresh(first.snapshot, most).keys), told)

    def test_commits_out_of_order(self) -> None:
        """A change is found by the refresh that first sees it, also where its transaction began before the last one
        and ended after it, and by no other."""
        self.watch("items")
        first = self.refresh()
        early, late, prepared = self.open(), self.open(), self.open()
        early.execute("BEGIN; INSERT INTO items VALUES (1, 'early')")
        prepared.execute(f"BEGIN; INSERT INTO items VALUES (3, 'p'); PREPARE TRANSACTION '{self.database}'")
        late.execute("BEGIN; INSERT INTO items VALUES (2, 'late')")
        late.execute("COMMIT")
        second, found = self.found(first)
        self.assertEqual(found, {"2"})
        begun = self.begin_refresh()
        early.execute("SAVEPOINT s; INSERT INTO items VALUES (4, 'early')")
        early.execute("COMMIT")
        # Its snapshot is from before that commit, though it asks after it.
        third = self.refresh(second.snapshot, begun=begun)
        self.assertEqual(third.keys, [])
        fourth, found = self.found(third)
        self.assertEqual(found, {"1", "4"})
        prepared.execute(f"COMMIT PREPARED '{self.database}'")
        fifth, found = self.found(fourth)
        self.assertEqual(found, {"3"})
        self.assertEqual(self.found(fifth)[1], set())

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["write", "write", "commit", "rollback", "refresh"])),
                    max_size=25))  # fmt: skip
    def test_any_order(self, steps: list[tuple[int, str]]) -> None:
        """In whatever order transactions write and end, each refresh finds the keys of those that were committed since
        the one before: nothing is missed, nothing doubled."""
        if not self.sql("SELECT 1 FROM cacheservice.watched"):
            self.watch("items")
            self.writers = [self.open() for _ in range(4)]
            self.next_key = 0
        written: list[set[str]] = [set(), set(), set(), set()]
        committed: set[str] = set()
        last = self.refresh()
        for number, step in [*steps, *((n, "commit") for n in range(4)), (0, "refresh")]:
            writer = self.writers[number]
            if step == "write":
                if not written[number]:
                    writer.execute("BEGIN")
                self.next_key += 1
                writer.execute(f"INSERT INTO items VALUES ({self.next_key})")
                written[number].add(str(self.next_key))
            elif step == "refresh":
                last, found = self.found(last)
                self.assertEqual(found, committed)
                committed = set()
            elif written[number]:
                writer.execute(step)
                committed |= written[number] if step == "commit" else set()
                written[number] = set()

    def test_what_is_not_watched(self) -> None:
        """It is a problem, with the command to run; so is a table that is not there, and one that may not be read."""
        before = self.refresh()
        self.assertEqual(before.problem, "items is not watched; say: cacheservice watch items --key id")
        self.watch("items", "name")
        self.assertEqual(self.refresh().problem, before.problem)
        self.watch("items")
        self.assertIsNone(self.refresh().problem)
        self.tables["nothing"] = ["id"]
        self.assertEqual(self.refresh().problem, "there is no table nothing")
        self.sql("CREATE TABLE secret (id int)")
        self.watch("secret")
        self.tables = {"secret": ["id"]}
        self.assertEqual(
            self.refresh().problem, f"{self.reader} may not read secret; GRANT SELECT ON secret TO {self.reader}"
        )
        self.assertEqual(self.refresh().keys, [])

    def test_watched_since(self) -> None:
        """A snapshot from before the watch has missed changes, also where the same was watched before."""
        before = self.refresh()
        self.watch("items")
        self.assert_problem(before, "items has been watched only since the last refresh")
        before = self.refresh()
        self.watch("items")
        self.assert_problem(before, "items has been watched only since the last refresh")
        before = self.refresh()
        self.unwatch("items")
        self.watch("items")
        self.assert_problem(before, "items has been watched only since the last refresh")

    def test_triggers_that_do_not_fire(self) -> None:
        """A trigger that is disabled, gone, or enabled again for ordinary sessions only, is a problem."""
        self.watch("items")
        told = "items or a partition of it lacks a trigger of ours; say again: cacheservice watch items --key id"
        for statement in (
            "ALTER TABLE items DISABLE TRIGGER cacheservice_1_delete",
            "ALTER TABLE items DISABLE TRIGGER ALL; INSERT INTO items VALUES (1); ALTER TABLE items ENABLE TRIGGER ALL",
            "ALTER TABLE items DISABLE TRIGGER USER",
            "ALTER TABLE items ENABLE REPLICA TRIGGER cacheservice_1_truncate",
            "DROP TRIGGER cacheservice_1_insert ON items",
        ):
            before = self.refresh()
            self.assertIsNone(before.problem)
            self.sql(statement)
            self.assert_problem(before, told)
            self.watch("items")

    def test_partitions_that_come_and_go(self) -> None:
        """A partition without our triggers is a problem until the table is watched again; with one less the state is
        another, and so it is with one that was away and has other rows now."""
        self.sql(
            "CREATE TABLE sales (id int, region text) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            f"GRANT SELECT ON sales TO {self.reader}",
        )
        self.tables = {"sales": ["id"]}
        self.watch("sales")
        before = self.refresh()
        self.sql("CREATE TABLE sales_b PARTITION OF sales FOR VALUES IN ('b')")
        told = "sales or a partition of it lacks a trigger of ours; say again: cacheservice watch sales --key id"
        self.assert_problem(before, told)
        self.watch("sales")
        self.sql("INSERT INTO sales VALUES (1, 'b')")
        before = self.refresh()
        self.assertIsNone(before.problem)
        self.sql("ALTER TABLE sales DETACH PARTITION sales_b")
        between = self.refresh(before.snapshot)
        self.assertNotEqual(between.state, before.state)
        # Its triggers are there all the while.
        self.sql("UPDATE sales_b SET id = 2", "ALTER TABLE sales ATTACH PARTITION sales_b FOR VALUES IN ('b')")
        self.assertEqual(self.found(before)[1], {"1", "2"})
        self.sql("ALTER TABLE sales DETACH PARTITION sales_b", "TRUNCATE sales_b")
        self.sql("ALTER TABLE sales ATTACH PARTITION sales_b FOR VALUES IN ('b')")
        self.assertNotEqual(self.refresh(before.snapshot).state, before.state)

    def test_a_table_that_becomes_a_partition(self) -> None:
        """Statements that name its new parent fire no trigger of its own: a problem."""
        self.sql("CREATE TABLE all_items (LIKE items) PARTITION BY RANGE (id)")
        self.watch("items")
        before = self.refresh()
        self.sql("ALTER TABLE all_items ATTACH PARTITION items DEFAULT", "INSERT INTO all_items VALUES (1)")
        self.assert_problem(before, "items has become a partition or a child of another table; watch that")

    def test_a_child_of_two_parents(self) -> None:
        """Statements on the other parent are not recorded: `watch` refuses it, and a later child is a problem."""
        self.sql("CREATE TABLE others (name text)", "CREATE TABLE child () INHERITS (items, others)")
        with self.assertRaisesRegex(
            WatchFailed, "its child child also inherits from others, and statements on others fire no trigger"
        ):
            self.watch("items")
        self.sql("DROP TABLE child")
        self.watch("items")
        before = self.refresh()
        self.sql("CREATE TABLE child () INHERITS (items, others)")
        self.assert_problem(
            before,
            "a child of items also inherits from another table, and statements on that table are not recorded; "
            "remove watch from the dataset",
        )

    def test_a_foreign_table_below(self) -> None:
        """If one is attached later, statements on the parent that change its rows fail, and no others. The problem
        names the command that frees writers, or advises to remove `watch`."""
        self.sql(
            "CREATE TABLE sales (id int, region text) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            f"GRANT SELECT ON sales TO {self.reader}",
        )
        self.tables = {"sales": ["id"]}
        self.watch("sales")
        options = ""
        # The wheel of PostgreSQL 18 has none.
        has_driver = bool(self.sql("SELECT FROM pg_available_extensions WHERE name = 'postgres_fdw'"))
        if has_driver:
            self.sql(
                "CREATE EXTENSION postgres_fdw",
                "CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw OPTIONS "
                f"(host '{self.server.socket_directory}', port '{self.server.port}', dbname '{self.database}')",
                "CREATE USER MAPPING FOR postgres SERVER elsewhere OPTIONS (user 'postgres')",
                "CREATE TABLE there (id int, region text)",
            )
            options = "OPTIONS (table_name 'there')"
        else:
            self.sql("CREATE FOREIGN DATA WRAPPER none", "CREATE SERVER elsewhere FOREIGN DATA WRAPPER none")
        self.sql(f"CREATE FOREIGN TABLE sales_f PARTITION OF sales FOR VALUES IN ('f') SERVER elsewhere {options}")
        self.sql("INSERT INTO sales VALUES (1, 'a')", "UPDATE sales SET id = 2 WHERE region = 'a'")
        far = "INSERT INTO sales VALUES (3, 'f')"
        if has_driver:
            with self.assertRaisesRegex(psycopg2.errors.FeatureNotSupported, "from child foreign tables"):
                self.sql(far)
        self.assertEqual(
            self.refresh().problem,
            "sales has the foreign table public.sales_f below it, and while sales is watched, statements on sales that "
            "change rows of public.sales_f fail; run: cacheservice unwatch sales",
        )
        self.unwatch("sales")
        if has_driver:
            self.sql(far)
        self.assertEqual(
            self.refresh().problem,
            "sales has the foreign table public.sales_f below it and cannot be watched; remove watch from the dataset",
        )

    def test_truncated(self) -> None:
        """A TRUNCATE that the last snapshot does not see is a problem, one that it sees is none."""
        self.watch("items")
        before = self.refresh()
        self.sql("TRUNCATE items", "INSERT INTO items VALUES (1)")
        self.assert_problem(
            before,
            "items was truncated, one statement changed more than a million rows or 100 MB of keys, "
            "or its key was renamed",
        )
        now = self.refresh()
        self.assertNotEqual(now.state, before.state)
        self.assertEqual(self.found(now)[1], set())

    def test_what_changes_rows_without_a_statement(self) -> None:
        """Whatever rewrites a table, changes its columns, or how one is computed, makes the state another."""
        virtual = at_least(self.server, 18)
        if virtual:
            self.sql("ALTER TABLE items ADD doubled int GENERATED ALWAYS AS (id * 2) VIRTUAL")
        self.watch("items")
        for statement in (
            *(["ALTER TABLE items ALTER doubled SET EXPRESSION AS (id * 3)"] if virtual else []),
            "ALTER TABLE items ADD added int DEFAULT 7",
            "ALTER TABLE items ALTER added TYPE bigint",
            "ALTER TABLE items RENAME added TO renamed",
            "ALTER TABLE items DROP renamed",
            "VACUUM FULL items",
        ):
            before = self.refresh().state
            self.sql(statement)
            self.assertNotEqual(self.refresh().state, before, statement)
        before = self.refresh().state
        self.sql("INSERT INTO items VALUES (1)", "VACUUM ANALYZE items", "CREATE INDEX ON items (name)")
        self.assertEqual(self.refresh().state, before)

    def test_logical_replication(self) -> None:
        """A table that a subscription fills needs a trigger for rows, which its worker fires; without it, a problem."""
        self.watch("items")
        before = self.refresh()
        self.sql(
            "SET allow_system_table_mods = on",
            "INSERT INTO pg_subscription_rel VALUES (1, 'items'::regclass, 'r', NULL)",
        )
        self.assertIsNone(self.refresh(before.snapshot).problem)
        self.sql("DROP TRIGGER cacheservice_1_row ON items")
        self.assert_problem(
            before,
            "items is filled by logical replication and lacks a trigger for that; say again: "
            "cacheservice watch items --key id",
        )

    def test_another_server(self) -> None:
        """After a restart, and after a crash that the server lives through, the state is another."""
        self.watch("items")
        states = [self.refresh().state]
        self.server.restart()
        states.append(self.refresh().state)
        victim = self.open()
        os.kill(victim.connection.info.backend_pid, signal.SIGKILL)
        limit = time.monotonic() + 60
        while len(states) < 3:
            try:
                state = self.refresh().state
                if state != states[-1] or time.monotonic() > limit:
                    states.append(state)
            except psycopg2.OperationalError:
                self.assertLess(time.monotonic(), limit)
            time.sleep(0.05)
        self.assertEqual(len({state["server"] for state in states}), 3)
        self.assertEqual(len({json.dumps(state["tables"]) for state in states}), 1)

    def test_the_reader_sees_no_more(self) -> None:
        """The reader may call it and read no table of the service; others may not even call it."""
        self.watch("items")
        for statement in ("SELECT * FROM cacheservice.changes", "SELECT * FROM cacheservice.watched"):
            with self.assertRaises(psycopg2.errors.InsufficientPrivilege):
                self.as_reader().execute(statement)
        with self.assertRaises(psycopg2.errors.InsufficientPrivilege):
            self.sql("SET ROLE pg_monitor", "SELECT * FROM cacheservice.changes('[]', NULL, 1)")


class Moving(Refreshing):
    """A MERGE that moves a row to another partition shows it to no trigger, so the update is recorded without keys."""

    MERGE = (
        "MERGE INTO sales AS t USING (VALUES (1)) AS s (id) ON t.id = s.id "
        "WHEN MATCHED THEN UPDATE SET region = CASE t.region WHEN 'a' THEN 'b' ELSE 'a' END"
    )
    UPDATE = "UPDATE sales SET region = CASE region WHEN 'a' THEN 'b' ELSE 'a' END WHERE id = 1"

    def setUp(self) -> None:
        super().setUp()
        self.sql(
            "CREATE TABLE sales (id int, region text, amount int) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            "CREATE TABLE sales_b PARTITION OF sales FOR VALUES IN ('b') PARTITION BY LIST (amount)",
            "CREATE TABLE sales_b0 PARTITION OF sales_b FOR VALUES IN (0)",
            "CREATE TABLE sales_b1 PARTITION OF sales_b FOR VALUES IN (1)",
            "INSERT INTO sales VALUES (1, 'a', 0), (2, 'b', 0)",
            f"GRANT SELECT ON sales TO {self.reader}",
        )
        self.tables = {"sales": ["id"]}
        self.watch("sales")
        self.version = self.session.connection.server_version

    def ways(self, statement: str) -> list[tuple[str, ...]]:
        """How a client can run a statement, each as what makes it ready and what runs it."""
        looped = f"FOR r IN {statement} RETURNING t.id LOOP END LOOP"
        fetched = f"OPEN c FOR {statement} RETURNING t.id; FETCH c INTO r"
        declared = "DECLARE r record; c refcursor;"
        simple = [
            (statement,),
            (f"SELECT 1; {statement}; SELECT 1",),
            (f"/* new */ {statement.lower()}",),
            (f"EXPLAIN (ANALYZE) {statement}",),
            (f"PREPARE prepared AS {statement}", "EXECUTE prepared"),
            ("DO $$BEGIN EXECUTE 'EXECUTE prepared'; END$$",),
            (f"DO $$BEGIN {statement}; END$$",),
            (f"DO $$BEGIN EXECUTE $q${statement}$q$; END$$",),
            (f"DO $$BEGIN EXECUTE $q$\n-- new\n{statement}$q$; END$$",),
            (f"CREATE PROCEDURE p() LANGUAGE plpgsql AS $$BEGIN {statement}; END$$", "CALL p()"),
            (f"CREATE PROCEDURE q() LANGUAGE sql AS $${statement}$$", "CALL q()"),
            (f"CREATE FUNCTION f() RETURNS void LANGUAGE sql AS $${statement}$$", "SELECT f()"),
            ("DO $$BEGIN PERFORM f(); END$$",),
            (f"CREATE FUNCTION g() RETURNS void LANGUAGE sql BEGIN ATOMIC {statement}; END", "SELECT g()"),
        ]
        if self.version < 170_000 and statement.startswith("MERGE"):
            return simple
        view = statement.replace("INTO sales", "INTO view_of_it").replace("UPDATE sales", "UPDATE view_of_it")
        return [
            *simple,
            ("CREATE VIEW view_of_it AS SELECT * FROM sales", view),
            (f"WITH changed AS ({statement} RETURNING t.id) SELECT * FROM changed",),
            (f"DO $$DECLARE r record; BEGIN {looped}; END$$",),
            (f"DO $${declared} BEGIN {fetched}; END$$",),
            (
                f"CREATE FUNCTION h() RETURNS refcursor LANGUAGE plpgsql AS $$DECLARE c refcursor := 'open'; "
                f"BEGIN OPEN c FOR {statement} RETURNING t.id; RETURN c; END$$",
                "BEGIN; SELECT h(); FETCH open; COMMIT",
            ),
        ]

    def moved(self, *statements: str) -> list[tuple[int, list[Any] | None]]:
        """What is recorded when these have moved the row."""
        self.sql(*statements[:-1])
        self.rows()
        before = self.content("sales")
        self.sql(statements[-1])
        self.assertNotEqual(self.content("sales"), before, statements)
        return self.rows()

    def test_whatever_runs_a_merge(self) -> None:
        """It is recorded as unknown, once, and the next refresh reads all rows."""
        if not at_least(self.server, 15):
            return
        for statements in self.ways(self.MERGE):
            self.assertEqual(self.moved(*statements), [(1, None)], statements)
            self.moved(statements[-1])
        before = self.refresh()
        self.sql(self.MERGE)
        self.assertIn("a MERGE may have moved rows", self.refresh(before.snapshot).problem or "")

    def test_updates_that_show_what_they_are(self) -> None:
        """Their keys are recorded, whatever runs them, except for functions in SQL, EXECUTE of SQL, and cursors."""
        hidden = ("EXECUTE prepared", "'EXECUTE prepared'", " f()", " g()", " q()", "FOR r IN", "FETCH", "-- new")
        for statements in self.ways(self.UPDATE.replace("sales SET", "sales AS t SET")):
            unseen = at_least(self.server, 15) and any(each in statements[-1] for each in hidden)
            self.assertEqual(self.moved(*statements), [(1, None if unseen else ["1"])], statements)

    def test_the_extended_protocol(self) -> None:
        """Statements that a driver prepares, and those with parameters, show their text as well."""
        for statement, recorded in ((self.MERGE, None), (self.UPDATE, ["1"])):
            if at_least(self.server, 15) or statement == self.UPDATE:
                bound = statement.replace("(1)", "($1::int)").replace("id = 1", "id = $1")
                for script in (f"{bound} \\bind 1 \\g", f"{bound} \\parse named\n\\bind_named named 1 \\g"):
                    before = self.content("sales")
                    subprocess.run(
                        [self.server.psql_path, "-v", "ON_ERROR_STOP=1", "-q", self.dsn],
                        input=script + "\n", text=True, check=True, capture_output=True,
                    )  # fmt: skip
                    self.assertNotEqual(self.content("sales"), before, script)
                    self.assertEqual(self.rows(), [(1, recorded)], script)

    def test_below_the_table(self) -> None:
        """A MERGE on a partition that has partitions moves rows unseen, too; one that holds rows cannot move them."""
        if not at_least(self.server, 15):
            return
        merge = (
            "MERGE INTO {} AS t USING (VALUES (2)) AS s (id) ON t.id = s.id WHEN MATCHED THEN UPDATE SET amount = {}"
        )
        self.assertEqual(self.moved(merge.format("sales_b", 1)), [(1, None)])
        self.sql(merge.format("sales_b1", 1))
        self.assertEqual(self.rows(), [(1, ["2"])])

    def test_a_merge_that_updates_nothing(self) -> None:
        """Without an action that updates, all of its rows are seen, and their keys recorded."""
        if at_least(self.server, 15):
            self.assert_recorded(
                "sales",
                "MERGE INTO sales AS t USING (VALUES (1), (3)) AS s (id) ON t.id = s.id "
                "WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (s.id, 'a', 0)",
                "1",
                "3",
            )

    def test_what_else_changes_rows(self) -> None:
        """Foreign keys and other triggers that move rows are seen; ON CONFLICT moves none."""
        self.sql(
            "CREATE TABLE regions (name text PRIMARY KEY)",
            "INSERT INTO regions VALUES ('a'), ('b')",
            "ALTER TABLE sales ADD FOREIGN KEY (region) REFERENCES regions ON UPDATE CASCADE ON DELETE SET NULL",
            "CREATE TABLE sales_0 PARTITION OF sales DEFAULT",
            "DELETE FROM sales WHERE id = 2",
            "DELETE FROM regions WHERE name = 'b'",
        )
        self.watch("sales")
        self.assertEqual(self.moved("UPDATE regions SET name = 'b'"), [(1, ["1"])])
        self.assertEqual(self.moved("DO $$BEGIN UPDATE regions SET name = 'a'; END$$"), [(1, ["1"])])
        self.assertEqual(self.moved("DELETE FROM regions"), [(1, ["1"])])
        self.sql(
            "CREATE FUNCTION moved() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.region := 'b'; RETURN NEW; END$$",
            "ALTER TABLE sales DROP CONSTRAINT sales_region_fkey",
            "CREATE TRIGGER moved BEFORE UPDATE ON sales_0 FOR EACH ROW EXECUTE FUNCTION moved()",
        )
        self.assertEqual(self.moved("UPDATE sales SET amount = 0"), [(1, ["1"])])
        self.sql("CREATE UNIQUE INDEX ON sales (id, region, amount)")
        with self.assertRaisesRegex(psycopg2.Error, "would appear in a different partition"):
            self.sql("INSERT INTO sales VALUES (1, 'b', 0) ON CONFLICT (id, region, amount) DO UPDATE SET region = 'a'")

    def test_whatever_the_session_is_set_to(self) -> None:
        """No setting of the writer's session changes what its statement is taken for."""
        for setting in ("standard_conforming_strings = off", "search_path = public, pg_temp, pg_catalog"):
            self.session = self.open()
            self.sql(f"SET {setting}")
            self.assertEqual(self.moved(self.UPDATE), [(1, ["1"])], setting)
            if at_least(self.server, 15):
                self.assertEqual(self.moved(self.MERGE), [(1, None)], setting)

    def test_long_statements(self) -> None:
        """A statement too long to look through in a moment is recorded as unknown, from PostgreSQL 15 on."""
        self.assertEqual(self.moved(f"{self.UPDATE} /* {'x' * 900_000} */"), [(1, ["1"])])
        unseen = at_least(self.server, 15)
        self.assertEqual(self.moved(f"{self.UPDATE} /* {'x' * 1_000_000} */"), [(1, None if unseen else ["1"])])

    def test_translated_messages(self) -> None:
        """The words that lc_messages puts around a statement make no difference."""
        update, merge, ours = "UPDATE sales\nSET amount = 1", self.MERGE, "PL/pgSQL-Funktion x() Zeile 1"
        for stack, may_be in (
            (f'{ours}\nSQL-Anweisung »{update}«\nPL/pgSQL-Funktion f() Zeile 3 bei EXECUTE', False),
            (f'{ours}\ninstruction SQL «\u00a0{update}\u00a0»', False),
            (f'{ours}\nSQL-оператор: "{update}"', False),
            (f'{ours}\nSQL文 "{update}"', False),
            (f'{ours}\n"{update}" SQL 구문', False),
            (f'{ours}\nSQL 语句 "{merge}"', True),
            (f'{ours}\nSQL-Funktion »update_it« Anweisung 1\nSQL-Anweisung »{update}«', True),
            (f'{ours}\nPL/pgSQL-Funktion f(timestamp with time zone) Zeile 3 bei FETCH', True),
        ):  # fmt: skip
            expression = MAY_BE_MERGE.format(stack="%(stack)s::text", statement="''::text")
            self.session.execute(f"SELECT {expression}", {"stack": stack})
            self.assertEqual(self.session.fetchone(), (may_be,), stack)

    def test_a_rule_that_merges(self) -> None:
        """The statement that applies it shows no MERGE: a problem."""
        before = self.refresh()
        self.sql("CREATE VIEW seen AS SELECT * FROM sales", "CREATE RULE r1 AS ON INSERT TO seen DO INSTEAD NOTHING")
        self.assertIsNone(self.refresh(before.snapshot).problem)
        if at_least(self.server, 17):
            self.sql(
                "CREATE RULE r2 AS ON UPDATE TO seen DO INSTEAD "
                f"WITH changed AS ({self.MERGE} RETURNING t.id) SELECT * FROM changed"
            )
            self.assert_problem(
                before,
                "a rule on public.seen runs a MERGE, and triggers cannot see rows of sales that it moves to another "
                "partition; remove watch from the dataset, or the rule",
            )

    def test_notifications(self) -> None:
        """An update that is recorded as unknown is notified as any other change."""
        self.unwatch("sales")
        self.watch("sales", notify=True)
        self.sql(f"LISTEN {OWN_CHANNEL}")
        if at_least(self.server, 15):
            self.sql(self.MERGE)
            self.assertEqual([each.payload for each in self.session.connection.notifies], ["changed 1"])


class Pruning(Refreshing):
    """What `cacheservice.prune()` deletes, called by the reader."""

    def setUp(self) -> None:
        super().setUp()
        self.watch("items")

    def prune(self, keep: str = "0", most: int = 10_000) -> int:
        cursor = self.as_reader()
        # The role's sessions are read-only unless they are set otherwise.
        cursor.execute("BEGIN READ WRITE")
        cursor.execute("SELECT cacheservice.prune(%s, %s)", (keep, most))
        ((count,),) = cursor.fetchall()
        cursor.execute("COMMIT")
        return int(count)

    def through(self) -> int:
        ((through,),) = self.sql("SELECT through::text FROM cacheservice.pruned")
        return int(through)

    def test_by_age(self) -> None:
        """What is older than `keep` goes, the oldest first and at most `most` a call; what is younger stays."""
        for number in range(10):
            self.sql(f"INSERT INTO items VALUES ({number})")
        self.sql("UPDATE cacheservice.changes SET changed_at = changed_at - interval '2 h' WHERE keys[1]::int < 6")
        self.assertEqual(self.prune("3 h"), 0)
        self.assertEqual(self.through(), 0)
        self.assertEqual(self.prune("1 h", 4), 4)
        ((greatest,),) = self.sql("SELECT min(xid::text::bigint) FROM cacheservice.changes")
        self.assertLess(self.through(), greatest)
        self.assertEqual(self.prune("1 h", 4), 2)
        self.assertEqual(self.prune("1 h", 4), 0)
        self.assertEqual(self.keys(), {"6", "7", "8", "9"})

    def test_each_watch(self) -> None:
        """No watch with many changes keeps another from being pruned; `through` is the greatest of all."""
        self.watch("items", "name")
        self.sql("INSERT INTO items VALUES (1, 'a')", "INSERT INTO items VALUES (2, 'b')")
        ((first, last),) = self.sql("SELECT min(xid::text::bigint), max(xid::text::bigint) FROM cacheservice.changes")
        self.assertEqual(self.prune(most=1), 2)
        self.assertEqual(self.through(), first)
        self.assertEqual(self.prune(most=1), 2)
        self.assertEqual(self.through(), last)
        self.sql("INSERT INTO items VALUES (3, 'c')", "INSERT INTO items VALUES (4, 'd')")
        self.sql("DELETE FROM cacheservice.changes WHERE watched = 1 AND keys = '{3}'")
        ((last,),) = self.sql("SELECT max(xid::text::bigint) FROM cacheservice.changes")
        self.assertEqual(self.prune(most=1), 2)
        self.assertEqual(self.through(), last)

    def test_transactions_in_progress(self) -> None:
        """What a running transaction has recorded stays, and so does all that is younger; then it is found."""
        first = self.refresh()
        running = self.open()
        running.execute("BEGIN; INSERT INTO items VALUES (1)")
        self.sql("INSERT INTO items VALUES (2)")
        self.assertEqual(self.prune(), 0)
        second, found = self.found(first)
        self.assertEqual(found, {"2"})
        running.execute("COMMIT")
        self.assertEqual(self.found(second)[1], {"1"})
        self.assertEqual(self.prune(), 2)

    def test_a_snapshot_from_before(self) -> None:
        """A refresh that may have missed what was deleted is reported; one that has seen it all is not."""
        before = self.refresh()
        self.sql("INSERT INTO items VALUES (1)")
        after = self.refresh()
        self.assertEqual(self.prune(), 1)
        self.assert_problem(before, "the changes since the last refresh are not kept any more")
        self.assertEqual(self.found(after)[1], set())
        self.sql("INSERT INTO items VALUES (2)")
        self.assertEqual(self.found(after)[1], {"2"})

    def test_a_refresh_that_has_begun(self) -> None:
        """A refresh whose snapshot is from before the pruning finds what is deleted meanwhile."""
        before = self.refresh()
        self.sql("INSERT INTO items VALUES (1)")
        begun = self.begin_refresh()
        self.assertEqual(self.prune(), 1)
        self.assertEqual(self.refresh(before.snapshot, begun=begun).keys, ["1"])

    def test_one_at_a_time(self) -> None:
        """A second one does nothing, and does not wait."""
        self.sql("INSERT INTO items VALUES (1)")
        self.sql("BEGIN", "SELECT cacheservice.prune('0')")
        self.assertEqual(self.prune(), 0)
        self.sql("ROLLBACK")
        self.assertEqual(self.prune(), 1)
