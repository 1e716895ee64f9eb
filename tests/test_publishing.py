"""Laws of `cacheservice watch --logical` and of the right to replicate, by decoding what real servers log."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from click.testing import CliRunner, Result
from psycopg2.extras import LogicalReplicationConnection
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base import shipped
from cacheservice.base.errors import MigrationFailed
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.cli.main import main
from cacheservice.sources.postgres.logical.pgoutput import Changed, Decoder, Key, Relation, Truncated
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.publishing import publish, unpublish
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.replica_identity import Index, better, missing
from tests.kit.postgres import at_least, connect, fresh_database, query
from tests.kit.versions import MakeServer, running_server

ENTRIES = "SELECT prrelid::regclass::text FROM pg_publication_rel ORDER BY 1"
TRIGGERS = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'cacheservice%'"


@pytest.fixture(scope="module")
def logical_postgres(make_server: MakeServer) -> Iterator[EmbeddedPostgres]:
    with running_server(make_server, wal_level="logical") as server:
        yield server


@pytest.fixture(scope="class")
def logical_server(request: pytest.FixtureRequest, logical_postgres: EmbeddedPostgres) -> None:
    request.cls.server = logical_postgres


class Publishing(SynchronousTestCase):
    """A database of its own, without the schema of the service."""

    server: EmbeddedPostgres

    def setUp(self) -> None:
        self.database = fresh_database(self.server, self.addCleanup)
        self.dsn = self.server.dsn(database=self.database)
        connection = connect(self.server, self.database)
        self.addCleanup(connection.close)
        self.session = connection.cursor()

    def drop_role(self, name: str) -> None:
        """Drop a role, if there is one, and what it owns in the database."""
        if self.has_role(name):
            query(self.server, self.database, f'DROP OWNED BY "{name}" CASCADE')
            query(self.server, self.database, f'DROP ROLE "{name}"')

    def has_role(self, name: str) -> bool:
        return bool(query(self.server, self.database, "SELECT 1 FROM pg_roles WHERE rolname = %s", (name,)))

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        """The rows of the last one."""
        for statement in statements:
            self.session.execute(statement)
        return self.session.fetchall() if self.session.description else []

    def run_command(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, env={"CACHESERVICE_MIGRATE_DSN": self.dsn})

    def done(self, *arguments: str) -> str:
        result = self.run_command(*arguments)
        self.assertEqual(result.exit_code, 0, result.output)
        return result.output

    def watch(self, table: str, *key: str, options: tuple[str, ...] = ()) -> str:
        keys = [word for column in key or ("id",) for word in ("--key", column)]
        return self.done("watch", "--logical", table, *keys, *options)

    def refused(self, *arguments: str) -> str:
        """Its error, which is one line and changes nothing."""
        before = self.state()
        result = self.run_command(*arguments)
        self.assertEqual(result.exit_code, 1, result.output)
        self.assertTrue(result.output.startswith("cacheservice: "), result.output)
        self.assertEqual(result.output.count("\n"), 1, result.output)
        self.assertEqual(self.state(), before)
        return result.output.removeprefix("cacheservice: ").rstrip("\n")

    def state(self) -> list[Any]:
        return [
            self.sql("SELECT pubname, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot "
                     "FROM pg_publication ORDER BY 1"),
            self.sql(ENTRIES),
            self.sql("SELECT tgrelid, tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2"),
        ]  # fmt: skip

    def entries(self) -> list[str]:
        return [name for (name,) in self.sql(ENTRIES)]


@pytest.mark.usefixtures("logical_server")
class Decoded(Publishing):
    """What a stream of the publication gets has the keys of all changed rows, before and after."""

    def decoded(self, *statements: str, key: tuple[str, ...] = ("id",)) -> list[tuple[str, tuple[Key, ...] | None]]:
        """The tables and the keys in the log, of what these statements change."""
        slot = f"slot_{secrets.token_hex(6)}"
        names: dict[int, str] = {}

        def places(relation: Relation) -> list[int]:
            names[relation.oid] = relation.name
            columns = {column.name: place for place, column in enumerate(relation.columns)}
            self.assertTrue(all(column.in_identity for column in relation.columns if column.name in key))
            return [columns[column] for column in key]

        self.sql(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput', true)", *statements)
        messages = self.sql(
            f"SELECT data FROM pg_logical_slot_get_binary_changes('{slot}', NULL, NULL, "
            "'proto_version', '1', 'publication_names', 'cacheservice')"
        )
        self.sql(f"SELECT pg_drop_replication_slot('{slot}')")
        decoder = Decoder(places)
        found: list[tuple[str, tuple[Key, ...] | None]] = []
        for (payload,) in messages:
            message = decoder.decode(bytes(payload))
            if isinstance(message, Changed):
                found.append((names[message.oid], message.keys))
            if isinstance(message, Truncated):
                found += [(names[oid], None) for oid in message.oids]
        return found

    def test_a_table(self) -> None:
        """The publication is made with the first table, and further tables are added to it; again changes nothing."""
        self.sql("CREATE TABLE items (id int PRIMARY KEY, name text)", "CREATE TABLE others (id int PRIMARY KEY)")
        text = self.watch("items")
        self.assertEqual(text, 'changes of "public"."items" are published by "cacheservice", with id\n')
        once = self.state()
        self.assertEqual(once[0], [("cacheservice", False, True, True, True, True, True)])
        self.assertEqual(self.watch("public.items"), '"public"."items" is already published by "cacheservice"\n')
        self.assertEqual(self.state(), once)
        self.watch("others")
        self.assertEqual(self.entries(), ["items", "others"])
        self.assertEqual(
            self.decoded(
                "INSERT INTO items VALUES (1, 'a'), (2, 'b')",
                "UPDATE items SET name = 'c' WHERE id = 1",
                "UPDATE items SET id = 3 WHERE id = 2",
                "DELETE FROM items WHERE id = 3",
                "INSERT INTO others VALUES (7)",
                "TRUNCATE items",
            ),
            [
                ("items", (("1",),)), ("items", (("2",),)), ("items", (("1",),)), ("items", (("2",), ("3",))),
                ("items", (("3",),)), ("others", (("7",),)), ("items", None),
            ],
        )  # fmt: skip

    def test_a_composite_key(self) -> None:
        """Each column of the key must be in the replica identity; the order does not matter."""
        self.sql("CREATE TABLE prices (product int, currency text, amount int, PRIMARY KEY (product, currency))")
        self.watch("prices", "currency", "product")
        self.assertEqual(
            self.decoded(
                "INSERT INTO prices VALUES (1, 'EUR', 1)",
                "UPDATE prices SET currency = 'GBP'",
                "DELETE FROM prices",
                key=("currency", "product"),
            ),
            [
                ("prices", (("EUR", "1"),)), ("prices", (("EUR", "1"), ("GBP", "1"))), ("prices", (("GBP", "1"),)),
            ],
        )  # fmt: skip

    def test_what_the_advice_leads_to(self) -> None:
        """After the statement of the error the command succeeds, and keys outside of the primary key are decoded."""
        self.sql(
            "CREATE TABLE items (id int PRIMARY KEY, sku text NOT NULL, shop int NOT NULL, UNIQUE (shop, sku))",
            "CREATE TABLE loose (id int, name text)",
        )
        error = self.refused("watch", "--logical", "items", "--key", "sku")
        self.assertEqual(
            error,
            '"public"."items" cannot be published with sku: its replica identity, the primary key (id), lacks sku, so '
            "that the log does not hold the keys of deleted rows; as the owner, run: "
            'ALTER TABLE "public"."items" REPLICA IDENTITY USING INDEX "items_shop_sku_key";',
        )
        self.sql(error.partition("run: ")[2])
        self.watch("items", "sku")
        self.assertEqual(
            self.decoded("INSERT INTO items VALUES (1, 'a', 1)", "UPDATE items SET sku = 'b'", "DELETE FROM items",
                         key=("sku",)),
            [("items", (("a",),)), ("items", (("a",), ("b",))), ("items", (("b",),))],
        )  # fmt: skip
        error = self.refused("watch", "--logical", "items", "--key", "id")
        self.assertIn('the index "items_shop_sku_key" (shop, sku), lacks id', error)
        self.sql(error.partition("run: ")[2])
        self.assertEqual(self.sql("SELECT relreplident FROM pg_class WHERE relname = 'items'"), [("d",)])
        self.watch("items")
        error = self.refused("watch", "--logical", "loose", "--key", "name")
        self.assertEqual(
            error,
            '"public"."loose" cannot be published with name: it lacks a replica identity (no primary key, or a '
            "deferrable one), without which UPDATE and DELETE of a published table fail; as the owner, run: "
            'ALTER TABLE "public"."loose" REPLICA IDENTITY FULL;',
        )
        self.sql(error.partition("run: ")[2])
        self.watch("loose", "name")
        self.assertEqual(
            self.decoded("INSERT INTO loose VALUES (1, 'a')", "UPDATE loose SET name = NULL", "DELETE FROM loose",
                         key=("name",)),
            [("loose", (("a",),)), ("loose", (("a",), (None,))), ("loose", ((None,),))],
        )  # fmt: skip

    def test_partitions(self) -> None:
        """Changes of partitions are published as those of the table, also of partitions that are added later."""
        self.sql(
            "CREATE TABLE sales (id int, region text, PRIMARY KEY (id, region)) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            "CREATE TABLE sales_b (region text NOT NULL, unwanted int, id int NOT NULL)",
            "ALTER TABLE sales_b DROP COLUMN unwanted",
            "ALTER TABLE sales ATTACH PARTITION sales_b FOR VALUES IN ('b')",
        )
        text = self.watch("sales")
        self.assertEqual(text, 'changes of "public"."sales" are published by "cacheservice", with id\n')
        self.assertEqual(self.entries(), ["sales"])
        changes = (
            "INSERT INTO sales VALUES (1, 'a'), (2, 'b')",
            "UPDATE sales SET region = 'b' WHERE id = 1",
            "CREATE TABLE sales_c PARTITION OF sales FOR VALUES IN ('c')",
            "INSERT INTO sales VALUES (3, 'c')",
            "DELETE FROM sales_c",
            "TRUNCATE sales",
        )
        self.assertEqual(
            self.decoded(*changes),
            [("sales", ((key,),)) for key in ("1", "2", "1", "1", "3", "3")] + [("sales", None)],
        )
        self.assertIn("already published", self.watch("sales_c"))

    def test_partitions_with_identities_of_their_own(self) -> None:
        """Each partition that lacks the key is counted, with a statement for each; new ones are pointed out."""
        self.sql(
            "CREATE TABLE sales (id int, region text) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            "CREATE TABLE sales_b PARTITION OF sales FOR VALUES IN ('b') PARTITION BY LIST (id)",
            "CREATE TABLE sales_b_1 PARTITION OF sales_b DEFAULT",
            "ALTER TABLE sales_a REPLICA IDENTITY NOTHING",
        )
        error = self.refused("watch", "--logical", "sales", "--key", "id")
        self.assertIn("fail (the same applies to 2 more tables); as the owner, run: ALTER TABLE", error)
        statements = error.partition("run: ")[2]
        self.assertEqual(
            statements,
            " ".join(f'ALTER TABLE "public"."{name}" REPLICA IDENTITY FULL;' for name in
                     ("sales", "sales_a", "sales_b_1")),
        )  # fmt: skip
        self.sql("ALTER TABLE sales REPLICA IDENTITY FULL", "ALTER TABLE sales_b_1 REPLICA IDENTITY FULL")
        error = self.refused("watch", "--logical", "sales", "--key", "id")
        self.assertIn('"public"."sales_a" cannot be published with id: it lacks a replica identity (REPLICA', error)
        self.sql(statements)
        self.assertIn("partitions do not inherit its REPLICA IDENTITY", self.watch("sales"))
        self.assertEqual(
            self.decoded("INSERT INTO sales VALUES (1, 'a')", "UPDATE sales SET id = 2", "DELETE FROM sales"),
            [("sales", (("1",),)), ("sales", (("1",), ("2",))), ("sales", (("2",),))],
        )

    def test_a_partition(self) -> None:
        """It can be published by itself, and is not added if the table above it is."""
        self.sql(
            "CREATE TABLE sales (id int, region text, PRIMARY KEY (id, region)) PARTITION BY LIST (region)",
            "CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a')",
            "CREATE TABLE sales_b PARTITION OF sales FOR VALUES IN ('b')",
        )
        self.watch("sales_a")
        self.assertEqual(
            self.decoded("INSERT INTO sales VALUES (1, 'a'), (2, 'b')", "DELETE FROM sales"),
            [("sales_a", (("1",),)), ("sales_a", (("1",),))],
        )
        self.watch("sales")
        self.assertEqual(self.entries(), ["sales", "sales_a"])
        self.done("unwatch", "--logical", "sales_a")
        self.assertEqual(
            self.refused("unwatch", "--logical", "sales_a"),
            '"public"."sales_a" is published by "cacheservice" as a partition of "public"."sales"; unwatch '
            '"public"."sales"',
        )

    def test_inheritance(self) -> None:
        """Children are added, those that come later by the command again, and removed with their parent."""
        self.sql(
            "CREATE TABLE items (id int PRIMARY KEY)",
            "CREATE TABLE more (extra int, PRIMARY KEY (id)) INHERITS (items)",
            "CREATE TABLE most (PRIMARY KEY (id)) INHERITS (more)",
        )
        text = self.watch("items")
        self.assertEqual(text, 'changes of "public"."items", "public"."more", "public"."most" are published by '
                               '"cacheservice", with id\n')  # fmt: skip
        self.sql("CREATE TABLE late () INHERITS (items)")
        error = self.refused("watch", "--logical", "items", "--key", "id")
        self.assertIn('"public"."late" cannot be published with id: it lacks', error)
        self.sql("ALTER TABLE late ADD PRIMARY KEY (id)")
        self.assertIn('changes of "public"."late" are published', self.watch("items"))
        self.assertIn("already published", self.watch("items"))
        self.assertEqual(self.entries(), ["items", "late", "more", "most"])
        self.assertEqual(
            self.decoded(
                "INSERT INTO late VALUES (1)", "INSERT INTO most VALUES (2)", "DELETE FROM items WHERE id = 2"
            ),
            [("late", (("1",),)), ("most", (("2",),)), ("most", (("2",),))],
        )
        self.done("unwatch", "--logical", "more")
        self.assertEqual(self.entries(), ["items", "late"])
        text = self.done("unwatch", "items")
        self.assertEqual(
            text,
            'changes of "public"."items", "public"."late" are no longer published by "cacheservice"\n'
            'the publication "cacheservice" was empty and is dropped\n',
        )
        self.assertEqual(self.state()[0], [])

    def test_several_at_once(self) -> None:
        """Commands for several tables at once make one publication with all of them, and remove it together."""
        names = [f"t{number}" for number in range(6)]
        self.sql(*(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in names))
        with ThreadPoolExecutor(len(names)) as pool:
            added = list(
                pool.map(lambda name: publish(self.dsn, name, ("id",), "cacheservice", False, self.fail), names)
            )
            self.assertEqual([each.added for each in added], [(f'"public"."{name}"',) for name in names])
            self.assertEqual(self.entries(), names)
            removed = list(pool.map(lambda name: unpublish(self.dsn, name, "cacheservice", False, self.fail), names))
        self.assertEqual([each.drops for each in removed].count(True), 1)
        self.assertEqual(self.state()[0], [])

    def test_names_that_need_quotes(self) -> None:
        """Names of any kind are taken as SQL writes a table's, and as they are for a column and a publication."""
        odd = "a$$b%s{x}\"';"
        quoted = odd.replace('"', '""')
        self.sql(
            'CREATE SCHEMA "My Shop"',
            f'CREATE TABLE "My Shop"."Orders;" ("Id" int, "{quoted}" text NOT NULL)',
            f'CREATE UNIQUE INDEX "In;""dex" ON "My Shop"."Orders;" ("{quoted}")',
        )
        error = self.refused("watch", "--logical", '"My Shop"."Orders;"', "--key", odd)
        self.sql(error.partition("run: ")[2])
        options = ("--publication", odd)
        dry = self.watch('"My Shop"."Orders;"', odd, options=(*options, "--dry-run"))
        self.assertEqual(self.state()[0], [])
        self.server.run_sql(dry, self.database)
        self.assertEqual(self.sql("SELECT pubname FROM pg_publication"), [(odd,)])
        self.assertIn("already published", self.watch('"My Shop"."Orders;"', odd, options=options))
        self.done("unwatch", "--logical", '"My Shop"."Orders;"', *options)
        self.assertEqual(self.entries(), [])
        # Another publication than the default one was created for somebody.
        self.assertEqual(self.sql("SELECT pubname FROM pg_publication"), [(odd,)])


@pytest.mark.usefixtures("logical_server")
class Refused(Publishing):
    """What would lose changes is refused with what to do, before anything is changed."""

    def setUp(self) -> None:
        super().setUp()
        self.sql("CREATE TABLE items (id int PRIMARY KEY, name text)")

    def test_kinds(self) -> None:
        """Only permanent tables of this server are published."""
        foreign = [
            "CREATE EXTENSION file_fdw",
            "CREATE SERVER files FOREIGN DATA WRAPPER file_fdw",
            "CREATE FOREIGN TABLE far () INHERITS (items) SERVER files OPTIONS (filename '/dev/null')",
        ]
        if not self.sql("SELECT 1 FROM pg_available_extensions WHERE name = 'file_fdw'"):
            foreign[:2] = ["CREATE FOREIGN DATA WRAPPER none", "CREATE SERVER files FOREIGN DATA WRAPPER none"]
            foreign[2] = "CREATE FOREIGN TABLE far () INHERITS (items) SERVER files"
        self.sql(
            "CREATE VIEW seen AS SELECT * FROM items",
            "CREATE MATERIALIZED VIEW kept AS SELECT * FROM items",
            "CREATE TEMP TABLE passing (id int)",
            "CREATE UNLOGGED TABLE quick (id int PRIMARY KEY)",
            "CREATE TABLE sales (id int PRIMARY KEY) PARTITION BY RANGE (id)",
            "CREATE UNLOGGED TABLE sales_1 PARTITION OF sales FOR VALUES FROM (0) TO (9)",
            "CREATE TABLE made (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (2 * id) STORED UNIQUE)",
            *foreign,
        )
        ((schema,),) = self.sql("SELECT nspname FROM pg_namespace WHERE oid = pg_my_temp_schema()")
        for table, column, error in (
            ("nothing", "id", 'relation "nothing" does not exist'),
            ("made", "nome", '"public"."made" has no column nome; it has id, twice'),
            ("made", "a,b", "and --key is repeated for each column"),
            ("seen", "id", '"public"."seen" cannot be published; watch the tables that it reads'),
            ("kept", "id", "watch the tables that it reads"),
            (f"{schema}.passing", "id", "is a temporary table, whose changes are not logged"),
            ("quick", "id", 'run: ALTER TABLE "public"."quick" SET LOGGED;'),
            ("sales", "id", '"public"."sales" has "public"."sales_1" below it, which is UNLOGGED, so that its changes '
                            'are not logged; run: ALTER TABLE "public"."sales_1" SET LOGGED;'),
            ("items", "id", '"public"."items" has "public"."far" below it, which is a foreign table'),
            ("made", "twice", "the column twice is generated, and generated columns are not published"),
            ("pg_class", "oid", '"pg_catalog"."pg_class" is a system table'),
        ):  # fmt: skip
            self.assertIn(error, self.refused("watch", "--logical", table, "--key", column))
        self.sql("ALTER TABLE sales_1 SET LOGGED")
        self.watch("sales")

    def test_identities(self) -> None:
        """Only a valid, immediate, complete, unique index over columns that are not NULL can identify rows."""
        self.sql(
            "CREATE TABLE late (id int PRIMARY KEY DEFERRABLE, code int NOT NULL)",
            "CREATE UNIQUE INDEX ON late (code) WHERE id > 0",
            "CREATE UNIQUE INDEX ON late ((code + 1), code)",
            "CREATE UNIQUE INDEX covering ON late (id) INCLUDE (code)",
            "ALTER TABLE items ADD UNIQUE (name)",
        )
        error = self.refused("watch", "--logical", "late", "--key", "id")
        self.assertTrue(error.endswith('REPLICA IDENTITY USING INDEX "covering";'), error)
        self.assertIn('"late" REPLICA IDENTITY FULL;', self.refused("watch", "--logical", "late", "--key", "code"))
        self.assertIn('"items" REPLICA IDENTITY FULL;', self.refused("watch", "--logical", "items", "--key", "name"))
        self.sql("ALTER TABLE late REPLICA IDENTITY USING INDEX covering", "DROP INDEX covering")
        error = self.refused("watch", "--logical", "late", "--key", "id")
        self.assertIn("it lacks a replica identity (the index was dropped), without which UPDATE and DELETE", error)
        self.sql("CREATE TABLE two (PRIMARY KEY (id)) INHERITS (items)", "ALTER TABLE two REPLICA IDENTITY NOTHING")
        error = self.refused("watch", "--logical", "items", "--key", "id")
        self.assertTrue(error.endswith('run: ALTER TABLE "public"."two" REPLICA IDENTITY DEFAULT;'), error)

    def test_a_publication_of_others(self) -> None:
        """One that leaves changes out is refused, and the statement of the error makes it work."""
        self.sql("CREATE PUBLICATION cacheservice FOR TABLE items WITH (publish = 'insert, update')")
        error = self.refused("watch", "--logical", "items", "--key", "id")
        self.assertEqual(
            error,
            'the publication "cacheservice" does not publish all changes; as its owner, run: '
            "ALTER PUBLICATION \"cacheservice\" SET (publish = 'insert, update, delete, truncate');",
        )
        self.sql(error.partition("run: ")[2])
        self.assertIn("already published", self.watch("items"))
        if not at_least(self.server, 15):
            return
        self.sql("CREATE TABLE children (PRIMARY KEY (id)) INHERITS (items)")
        self.watch("items")
        for entry, cause in (
            ("ONLY items WHERE (id > 7)", "only with the rows of a WHERE"),
            ("ONLY items (name)", "without the column id"),
        ):
            self.sql("ALTER PUBLICATION cacheservice DROP TABLE ONLY items",
                     f"ALTER PUBLICATION cacheservice ADD TABLE {entry}")  # fmt: skip
            error = self.refused("watch", "--logical", "items", "--key", "id")
            self.assertIn(f'the publication "cacheservice" publishes "public"."items" {cause}; as the owner', error)
            self.sql(*error.partition("run: ")[2].split("; "))
            self.assertIn("already published", self.watch("items"))
        self.sql("ALTER PUBLICATION cacheservice DROP TABLE ONLY items",
                 "ALTER PUBLICATION cacheservice ADD TABLE ONLY items (id)")  # fmt: skip
        self.assertIn("already published", self.watch("items"))

    def test_publications_of_more_than_tables(self) -> None:
        """A table is published by them already, and cannot be removed from them."""
        self.sql("CREATE PUBLICATION cacheservice FOR ALL TABLES")
        self.assertEqual(self.watch("items"), '"public"."items" is already published by "cacheservice"\n')
        for options in ((), ("--logical",)):
            self.assertEqual(
                self.refused("unwatch", *options, "items"),
                '"public"."items" cannot be removed from the publication "cacheservice", which is FOR ALL TABLES; to '
                'end it for all of them, run: DROP PUBLICATION "cacheservice";',
            )
        self.sql("DROP PUBLICATION cacheservice")
        if not at_least(self.server, 15):
            return
        self.sql(
            'CREATE SCHEMA "A b"',
            'CREATE TABLE "A b".parts (id int PRIMARY KEY) PARTITION BY RANGE (id)',
            'CREATE TABLE parts_1 PARTITION OF "A b".parts DEFAULT',
            'CREATE TABLE "A b".parent (id int PRIMARY KEY)',
            'CREATE TABLE child (PRIMARY KEY (id)) INHERITS ("A b".parent)',
            'CREATE PUBLICATION cacheservice FOR TABLES IN SCHEMA "A b"',
        )
        self.assertIn("already published", self.watch('"A b".parts'))
        self.assertIn("already published", self.watch("parts_1"))
        self.assertIn('changes of "public"."child" are published', self.watch('"A b".parent'))
        for table in ('"A b".parts', "parts_1"):
            self.assertIn(
                'cannot be removed from the publication "cacheservice", which has all tables of the schema "A b"; to '
                'end it for all of them, run: ALTER PUBLICATION "cacheservice" DROP TABLES IN SCHEMA "A b";',
                self.refused("unwatch", "--logical", table),
            )
        self.done("unwatch", "--logical", "child")
        self.assertEqual(self.sql("SELECT pubname FROM pg_publication"), [("cacheservice",)])

    def test_rights_that_are_missing(self) -> None:
        """The error has the statement for a role that may; a table that is published needs no rights."""
        role = f"role_{secrets.token_hex(4)}"
        self.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'hidden-word'")
        self.addCleanup(self.drop_role, role)
        command = ("watch", "--logical", "items", "--key", "id")
        owner, self.dsn = self.dsn, self.server.dsn(role, "hidden-word", self.database)
        error = self.refused(*command)
        self.assertIn(f"permission denied for database {self.database}; GRANT CREATE ON DATABASE", error)
        self.sql(error.partition("; ")[2])
        self.assertIn("must be owner of table items; run it as the owner of items", self.refused(*command))
        self.sql(f"ALTER TABLE items OWNER TO {role}")
        self.watch("items")
        self.done("unwatch", "items")
        self.sql("CREATE PUBLICATION cacheservice")
        error = self.refused(*command)
        self.assertEqual(
            error,
            f'the publication "cacheservice" belongs to postgres, and {role} may not change it; run it as a role that '
            f"may, or: GRANT postgres TO {role};",
        )
        self.dsn = owner
        self.watch("items")
        self.dsn = self.server.dsn(role, "hidden-word", self.database)
        self.assertIn("already published", self.watch("items"))
        self.assertIn('the publication "cacheservice" belongs to postgres', self.refused("unwatch", "items"))

    def test_a_table_that_is_being_changed(self) -> None:
        """The command gives up in seconds and names the session; writers do not block it."""
        with closing(connect(self.server, self.database)) as other, other.cursor() as cursor:
            cursor.execute("BEGIN; INSERT INTO items VALUES (1, 'a')")
            self.watch("items")
            self.done("unwatch", "items")
            cursor.execute("COMMIT; BEGIN; LOCK TABLE items IN SHARE UPDATE EXCLUSIVE MODE")
            began = time.monotonic()
            error = self.refused("watch", "--logical", "items", "--key", "id")
            self.assertLess(time.monotonic() - began, 60)
            self.assertRegex(error, r"items is in use: the lock was not granted within 5 s, .* blocked: session \d+")

    def test_options(self) -> None:
        """Options of triggers and of publications are not mixed."""
        for arguments, error in (
            (("watch", "--logical", "t", "--key", "id", "--no-notify"), "--notify and --no-notify belong to triggers"),
            (("watch", "--logical", "t", "--key", "id", "--notify"), "--notify and --no-notify belong to triggers"),
            (("watch", "t", "--key", "id", "--publication", "p"), "--publication requires --logical"),
            (("watch", "--logical", "t"), "Missing option '--key'"),
            (("unwatch", "--logical", "t", "--key", "id"), "--key selects triggers, and --logical removes none"),
            (("unwatch", "t", "--key", "id", "--publication", "p"), "the publication is not changed"),
            (("migrate", "--replication"), "--replication requires --reader"),
            (("migrate", "--no-replication"), "--no-replication requires --reader"),
        ):
            result = self.run_command(*arguments)
            self.assertEqual(result.exit_code, 2, arguments)
            self.assertIn(error.lower(), result.output.lower())


@pytest.mark.usefixtures("logical_server")
class Undoing(Publishing):
    """`unwatch` ends triggers and publications."""

    def setUp(self) -> None:
        super().setUp()
        migrate(self.dsn, shipped.folder("migrations"))
        self.sql("CREATE TABLE items (id int PRIMARY KEY, name text)", "CREATE TABLE others (id int PRIMARY KEY)")

    def test_both(self) -> None:
        """Without options both are undone; with --key only triggers, and with --logical only the publication."""
        empty = self.state()
        self.done("watch", "items", "--key", "id")
        self.done("watch", "items", "--key", "name")
        self.watch("items")
        both = self.state()
        self.done("unwatch", "--logical", "items")
        self.assertEqual((self.state()[0], self.sql(TRIGGERS)), ([], [(10,)]))
        self.assertEqual(
            self.refused("unwatch", "--logical", "items"),
            '"public"."items" is not published: the database has no publication "cacheservice"',
        )
        self.watch("items")
        self.done("unwatch", "items", "--key", "name")
        self.assertEqual((self.entries(), self.sql(TRIGGERS)), (["items"], [(5,)]))
        self.done("watch", "items", "--key", "name")
        dry = self.done("unwatch", "items", "--dry-run")
        self.assertEqual(self.state()[:2], both[:2])
        self.server.run_sql(dry, self.database)
        self.assertEqual(self.state(), empty)
        self.done("watch", "items", "--key", "id")
        self.watch("items")
        self.assertEqual(
            self.done("unwatch", "items"),
            'changes of "public"."items" are no longer recorded\n'
            'changes of "public"."items" are no longer published by "cacheservice"\n'
            'the publication "cacheservice" was empty and is dropped\n',
        )
        self.assertEqual(self.state(), empty)
        self.assertEqual(self.refused("unwatch", "items"), '"public"."items" is not watched')

    def test_one_of_several_tables(self) -> None:
        """The publication stays for the other tables, and a table that is not in it is reported."""
        self.watch("items")
        self.watch("others")
        self.assertEqual(
            self.done("unwatch", "others"), 'changes of "public"."others" are no longer published by "cacheservice"\n'
        )
        self.assertEqual(self.entries(), ["items"])
        self.assertEqual(
            self.refused("unwatch", "--logical", "others"), '"public"."others" is not published by "cacheservice"'
        )

    def test_a_publication_that_must_stay(self) -> None:
        """It does not keep triggers from being removed, and the output reports that the table is still published."""
        self.sql("CREATE PUBLICATION cacheservice FOR ALL TABLES")
        self.done("watch", "items", "--key", "id")
        result = self.done("unwatch", "items")
        self.assertIn('still published: "public"."items" cannot be removed from the publication', result)
        self.assertEqual(self.sql(TRIGGERS), [(0,)])

    def test_a_table_that_was_dropped(self) -> None:
        """What its triggers have left is removed; its entry went with it."""
        self.done("watch", "items", "--key", "id")
        self.watch("items")
        self.sql("DROP TABLE items")
        self.done("unwatch", "items")
        self.assertEqual(self.sql("SELECT count(*) FROM cacheservice.watched"), [(0,)])
        self.assertIn('relation "items" does not exist', self.refused("unwatch", "--logical", "items"))


@pytest.mark.usefixtures("server")
class WithoutLogicalLevel(Publishing):
    """A server that does not log enough for logical decoding yet."""

    def test_the_level(self) -> None:
        """The table is added nevertheless, and the output names the setting; a dry run prints SQL alone."""
        self.sql("CREATE TABLE items (id int PRIMARY KEY)", "CREATE TABLE more (PRIMARY KEY (id)) INHERITS (items)")
        note = 'wal_level is "replica", so that no change is captured by logical decoding yet; as a superuser, run: '
        result = self.run_command("watch", "--logical", "items", "--key", "id", "--dry-run")
        self.assertIn(note, result.stderr)
        self.assertEqual(
            result.stdout,
            "BEGIN;\nSET LOCAL lock_timeout = 5000;\n"
            'CREATE PUBLICATION "cacheservice" FOR TABLE ONLY "public"."items", ONLY "public"."more" '
            "WITH (publish_via_partition_root = true);\nCOMMIT;\n",
        )
        self.assertEqual(self.state()[0], [])
        self.sql(result.stdout)
        self.assertEqual(self.entries(), ["items", "more"])
        self.sql("DROP PUBLICATION cacheservice")
        self.assertIn(f"{note}ALTER SYSTEM SET wal_level = logical; and restart the server", self.watch("items"))
        result = self.run_command("watch", "--logical", "items", "--key", "id", "--dry-run")
        self.assertEqual(result.stdout, "BEGIN;\nSET LOCAL lock_timeout = 5000;\nCOMMIT;\n")
        self.assertIn('"public"."items" is already published by "cacheservice"', result.stderr)
        result = self.run_command("unwatch", "--logical", "items", "--dry-run")
        self.assertEqual(
            result.stdout, 'BEGIN;\nSET LOCAL lock_timeout = 5000;\nDROP PUBLICATION "cacheservice";\nCOMMIT;\n'
        )
        self.sql(result.stdout)
        self.assertEqual(self.state()[0], [])


@pytest.mark.usefixtures("logical_server")
class Replicating(Publishing):
    """The right that a logical slot needs."""

    def setUp(self) -> None:
        super().setUp()
        migrate(self.dsn, shipped.folder("migrations"))
        self.reader = f"Reader {secrets.token_hex(4)}"
        self.addCleanup(self.drop_role, self.reader)

    def may(self) -> bool:
        ((found,),) = self.sql(f"SELECT rolreplication FROM pg_roles WHERE rolname = '{self.reader}'")
        return bool(found)

    def member(self) -> bool:
        return bool(
            self.sql(
                "SELECT 1 FROM pg_auth_members AS m JOIN pg_roles AS r ON r.oid = m.member "
                f"WHERE m.roleid = 'rds_replication'::regrole AND r.rolname = '{self.reader}'"
            )
        )

    def command(self, *options: str) -> str:
        return self.done("migrate", "--reader", self.reader, *options)

    def test_the_attribute(self) -> None:
        """It is set and taken away on request, kept otherwise, and a new role does not have it."""
        self.command()
        self.assertFalse(self.may())
        text = self.command("--replication")
        self.assertIn("it may replicate: it can read the write-ahead log of all databases of the server", text)
        self.assertTrue(self.may())
        self.assertNotIn("replicat", self.command())
        self.assertTrue(self.may())
        self.command("--replication")
        self.assertIn("it may not replicate", self.command("--no-replication"))
        self.assertFalse(self.may())
        self.drop_role(self.reader)
        self.command("--replication")
        self.assertTrue(self.may())
        self.sql(f"ALTER ROLE \"{self.reader}\" PASSWORD 'hidden-word'")
        dsn = self.server.dsn(self.reader, "hidden-word", self.database)
        options = {"connection_factory": LogicalReplicationConnection}
        with closing(psycopg2.connect(dsn, **options)) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE_REPLICATION_SLOT mine TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT")
            self.assertEqual(cursor.fetchall()[0][0], "mine")

    def test_on_amazon_rds(self) -> None:
        """There membership in a role is the right."""
        self.sql("CREATE ROLE rds_replication")
        self.addCleanup(query, self.server, self.database, "DROP ROLE rds_replication")
        self.command("--replication")
        self.assertEqual((self.may(), self.member()), (False, True))
        self.command("--replication")
        self.command()
        self.assertTrue(self.member())
        self.command("--no-replication")
        self.assertFalse(self.member())
        self.sql(f'ALTER ROLE "{self.reader}" REPLICATION', f'GRANT rds_replication TO "{self.reader}"')
        self.command("--no-replication")
        self.assertEqual((self.may(), self.member()), (False, False))
        self.sql("CREATE ROLE between", "GRANT rds_replication TO between", f'GRANT between TO "{self.reader}"')
        self.addCleanup(query, self.server, self.database, "DROP ROLE between")
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(self.dsn, self.reader, replication=False)
        self.assertIn("through another role", str(refused.exception))

    def test_rights_that_are_missing(self) -> None:
        """A role that may not grant it gets the statement for an administrator; nothing is left of a new reader."""
        role = f"own_{secrets.token_hex(4)}"
        self.sql(f"CREATE ROLE {role} LOGIN CREATEROLE PASSWORD 'hidden-word'", "DROP SCHEMA cacheservice CASCADE",
                 f"GRANT CREATE ON DATABASE {self.database} TO {role}")  # fmt: skip
        self.addCleanup(self.drop_role, role)
        self.addCleanup(self.drop_role, self.reader)
        dsn = self.server.dsn(role, "hidden-word", self.database)
        migrate(dsn, shipped.folder("migrations"))
        advice = f'as an administrator, run: ALTER ROLE "{self.reader}" REPLICATION;'
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(dsn, self.reader, replication=True)
        self.assertIn(f"first run this command without --replication, then, {advice}", str(refused.exception))
        self.assertFalse(self.has_role(self.reader))
        create_reader(dsn, self.reader)
        with self.assertRaises(MigrationFailed) as refused:
            create_reader(dsn, self.reader, replication=True)
        error = str(refused.exception)
        self.assertIn(f'{role} may not give the right to replicate to "{self.reader}"; {advice}', error)
        self.sql(error.partition("run: ")[2])
        self.assertTrue(create_reader(dsn, self.reader, replication=True).replicates)
        if at_least(self.server, 16):
            with self.assertRaises(MigrationFailed) as refused:
                create_reader(dsn, self.reader, replication=False)
            self.assertIn("may not take the right to replicate from", str(refused.exception))
            self.sql(f"ALTER ROLE {role} REPLICATION")
            self.assertFalse(create_reader(dsn, self.reader, replication=False).replicates)
            self.assertTrue(create_reader(dsn, self.reader, replication=True).replicates)
        else:
            with self.assertRaises(MigrationFailed) as refused:
                create_reader(dsn, self.reader, password="another")
            self.assertIn("may replicate, or is a superuser; run this command as a superuser", str(refused.exception))
            self.assertFalse(create_reader(self.dsn, self.reader, replication=False).replicates)


class Identities(SynchronousTestCase):
    """Which columns of old rows are logged, and which identity to use instead."""

    def test_the_smallest(self) -> None:
        """Of indexes that contain the key the primary key comes first, then that with the fewest columns."""
        primary = Index("p", ("id",), True, False, False)
        small = Index("s", ("sku",), False, True, False)
        large = Index("l", ("shop", "sku"), False, False, False)
        nulls = Index("n", ("code",), False, False, True)
        indexes = [nulls, large, small, primary]
        for key, expected in (
            (["id"], "DEFAULT"), (["sku"], "USING INDEX s"), (["sku", "shop"], "USING INDEX l"), (["code"], "FULL"),
            (["id", "sku"], "FULL"),
        ):  # fmt: skip
            self.assertEqual(better(indexes, key), expected)
        for identity, lacking in (("d", ["sku"]), ("i", ["id"]), ("f", []), ("n", ["id", "sku"])):
            self.assertEqual(missing(identity, indexes, ["id", "sku"]), lacking)
        self.assertEqual(missing("d", [large], ["sku"]), ["sku"])
        self.assertEqual(missing("i", [large], ["sku"]), ["sku"])
