"""Laws of what a query depends on: what changes the form of its documents makes the next attempt read all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.base import shipped
from cacheservice.base.errors import QueryFailed
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.snapshot import Snapshot
from cacheservice.sources.base import ReadPlan, ReadResult
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch
from tests.kit import pgbouncer
from tests.kit.datasets import rows_builder
from tests.kit.dependencies import DependenciesTestCase
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.postgres import connect, drop_role
from tests.kit.readings import because_of, how_read, kind_of

WAITING = """
SELECT l.pid FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted
"""
KEPT = "SELECT pid FROM pg_stat_activity WHERE usename = '{role}' AND state = 'idle'"
HELD = "SELECT id, m FROM t CROSS JOIN (SELECT pg_advisory_xact_lock_shared(7)) AS held"


class Changes(DependenciesTestCase):
    async def test_views_and_functions(self) -> None:
        """What replaces a view or a function under the query, at whatever depth, is seen and named."""
        await self.check(
            "SELECT id, m, outer_one(v) AS v FROM w",
            [
                ("CREATE OR REPLACE VIEW v AS SELECT id, m, v || '!' AS v FROM t", "view public.v was replaced"),
                ("CREATE OR REPLACE VIEW w AS SELECT id, m, v || '?' AS v FROM v", "view public.w was replaced"),
                (
                    "CREATE OR REPLACE FUNCTION inner_one(text) RETURNS text LANGUAGE sql STABLE AS 'SELECT lower($1)'",
                    "the function inner_one was created, replaced or dropped",
                ),
                (
                    "CREATE OR REPLACE FUNCTION outer_one(text) RETURNS text LANGUAGE sql STABLE "
                    "AS 'SELECT inner_one($1)'",
                    "the function outer_one was created, replaced or dropped",
                ),
                (
                    "CREATE FUNCTION outer_one(varchar) RETURNS text LANGUAGE sql STABLE AS 'SELECT $1::text'",
                    "the function outer_one was created, replaced or dropped",
                ),
            ],
        )

    async def test_a_function_in_a_view(self) -> None:
        """A function that a view names, and one of a body that PostgreSQL has parsed, are found without their names."""
        await self.check(
            "SELECT * FROM calling",
            [
                (
                    "CREATE OR REPLACE FUNCTION inner_one(text) RETURNS text LANGUAGE sql STABLE AS 'SELECT lower($1)'",
                    "the function inner_one was created, replaced or dropped",
                ),
            ],
        )

    async def test_types(self) -> None:
        """Labels, attributes and domains are seen."""
        await self.check(
            "SELECT * FROM t",
            [
                ("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'", "the labels of type public.mood changed"),
                ("ALTER TYPE pair RENAME ATTRIBUTE a TO c", "the columns of type public.pair changed"),
                ("ALTER DOMAIN short RENAME TO brief", "type public.short changed"),
            ],
        )

    async def test_names_in_bodies(self) -> None:
        """A body may name what neither the query nor search_path does: of its own schema, or of its own search_path."""
        self.sql(f"GRANT USAGE ON SCHEMA other TO {self.reader}")
        for body, function in (
            ("SELECT other.hidden($1)", "direct"),
            ("SELECT hidden($1)", "by_path"),
        ):
            path = "SET search_path = other, pg_catalog" if function == "by_path" else ""
            self.sql(
                "CREATE OR REPLACE FUNCTION other.hidden(text) RETURNS text LANGUAGE sql STABLE AS 'SELECT upper($1)'; "
                f"CREATE FUNCTION {function}(text) RETURNS text LANGUAGE sql STABLE {path} AS '{body}'"
            )
            await self.check(
                f"SELECT id, {function}(v) AS v FROM t",
                [
                    (
                        "CREATE OR REPLACE FUNCTION other.hidden(text) RETURNS text LANGUAGE sql STABLE "
                        "AS 'SELECT lower($1)'",
                        "the function hidden was created, replaced or dropped",
                    ),
                    (
                        "CREATE FUNCTION other.hidden(varchar) RETURNS text LANGUAGE sql AS 'SELECT $1::text'; "
                        "DROP FUNCTION other.hidden(varchar)",
                        None,
                    ),
                    (
                        "CREATE FUNCTION other.lower(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT upper($1)'",
                        "the function lower was created, replaced or dropped",
                    ),
                ],
            )
            self.sql("DROP FUNCTION other.lower(text)")

    async def test_a_policy_that_calls_another_schema(self) -> None:
        """Rows that a policy's function forbids now are not served on, however deep the function is named."""
        self.sql(
            f"GRANT USAGE ON SCHEMA other TO {self.reader}; "
            "CREATE FUNCTION other.most() RETURNS int LANGUAGE sql STABLE AS 'SELECT 4'; "
            "CREATE FUNCTION allowed(int) RETURNS bool LANGUAGE plpgsql STABLE AS "
            "'BEGIN RETURN $1 < other.most(); END'; "
            "CREATE POLICY p ON t USING (allowed(id)); ALTER TABLE t ENABLE ROW LEVEL SECURITY"
        )
        await self.check(
            "SELECT id FROM t",
            [
                (
                    "CREATE OR REPLACE FUNCTION other.most() RETURNS int LANGUAGE sql STABLE AS 'SELECT 2'",
                    "the function most was created, replaced or dropped",
                )
            ],
        )

    async def test_functions_that_take_a_name(self) -> None:
        """A function takes what was called by its name until then: a type, or a column of a row."""
        self.sql('CREATE DOMAIN "Long" AS text')
        for called, parameter, argument in (("short", "text", "v"), ('"Long"', "text", "v"), ("v", "t", "t")):
            name = called.strip('"')
            await self.check(
                f"SELECT id, {called}({argument}) AS x FROM t",
                [
                    (
                        f"CREATE FUNCTION {called}({parameter}) RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$",
                        f"the function {name} was created, replaced or dropped",
                    ),
                    ("CREATE FUNCTION id(t) RETURNS int LANGUAGE sql AS 'SELECT 1'; DROP FUNCTION id(t)", None),
                ],
            )

    async def test_functions_in_pg_catalog(self) -> None:
        """Some extensions put theirs there, where they are found with any search_path."""
        self.sql("CREATE FUNCTION pg_catalog.mine(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT $1'")
        reason = "the function mine was created, replaced or dropped"
        await self.check(
            "SELECT id, mine(v) AS x FROM t",
            [
                (
                    "CREATE OR REPLACE FUNCTION pg_catalog.mine(text) RETURNS text LANGUAGE sql IMMUTABLE "
                    "AS 'SELECT upper($1)'",
                    reason,
                ),
                ("CREATE FUNCTION pg_catalog.mine(varchar) RETURNS text LANGUAGE sql AS 'SELECT $1::text'", reason),
            ],
        )

    async def test_operators(self) -> None:
        """An operator that only the query names: its function, a better match, one that SQL spells with a word."""
        self.sql(
            "CREATE FUNCTION joined(text, int) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT $1 || $2'; "
            "CREATE OPERATOR <=> (LEFTARG = text, RIGHTARG = int, FUNCTION = joined); "
            "CREATE FUNCTION alike(short, short) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT true'"
        )
        await self.check(
            "SELECT id, v<=>-1 AS v, s LIKE 's'::short AS l FROM t",
            [
                (
                    "CREATE OR REPLACE FUNCTION joined(text, int) RETURNS text LANGUAGE sql IMMUTABLE "
                    "AS 'SELECT $2 || $1'",
                    "the function joined was created, replaced or dropped",
                ),
                (
                    "CREATE OPERATOR ~~ (LEFTARG = short, RIGHTARG = short, FUNCTION = alike)",
                    "an operator was created, altered or dropped",
                ),
                (
                    "CREATE OR REPLACE FUNCTION alike(short, short) RETURNS bool LANGUAGE sql IMMUTABLE "
                    "AS 'SELECT false'",
                    "the function alike was created, replaced or dropped",
                ),
            ],
        )

    async def test_casts(self) -> None:
        """A cast, and the function behind it; also the one to json by which documents are made."""
        self.sql(
            "CREATE FUNCTION to_text(pair) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ($1).a::text'; "
            "CREATE FUNCTION to_json_of(pair) RETURNS json LANGUAGE sql IMMUTABLE AS 'SELECT to_json(($1).a)'; "
            "CREATE CAST (pair AS text) WITH FUNCTION to_text(pair)"
        )
        await self.check(
            "SELECT id, p, p::text AS x FROM t",
            [
                (
                    "CREATE OR REPLACE FUNCTION to_text(pair) RETURNS text LANGUAGE sql IMMUTABLE "
                    "AS 'SELECT ($1).b::text'",
                    "the function to_text was created, replaced or dropped",
                ),
                (
                    "CREATE CAST (pair AS json) WITH FUNCTION to_json_of(pair)",
                    "a cast was created, altered or dropped",
                ),
                (
                    "CREATE OR REPLACE FUNCTION to_json_of(pair) RETURNS json LANGUAGE sql IMMUTABLE "
                    "AS 'SELECT to_json(($1).b)'",
                    "the function to_json_of was created, replaced or dropped",
                ),
                ("DROP CAST (pair AS text)", "a cast was created, altered or dropped"),
            ],
        )

    async def test_types_behind_types(self) -> None:
        """The labels of an enum with ranges and multiranges."""
        self.sql(
            "CREATE TYPE moods AS RANGE (subtype = mood, multirange_type_name = sets); "
            f"CREATE TABLE ranges (id int, r sets); GRANT SELECT ON ranges TO {self.reader}"
        )
        await self.check(
            "SELECT id, r FROM ranges",
            [("ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'", "the labels of type public.mood changed")],
        )

    async def test_constraints_of_domains(self) -> None:
        """A value that is valid no longer fails the query, and some ask whether one is."""
        self.sql(
            "CREATE FUNCTION fits(text) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT true'; "
            "CREATE DOMAIN fitting AS text CHECK (fits(value)); "
            "CREATE FUNCTION checked(text) RETURNS bool LANGUAGE plpgsql STABLE AS "
            "'BEGIN PERFORM $1::short::fitting; RETURN true; EXCEPTION WHEN check_violation THEN RETURN false; END'"
        )
        reason = "a constraint of type public.short changed"
        await self.check(
            "SELECT id, checked(v) AS valid FROM t",
            [
                ("ALTER DOMAIN short ADD CONSTRAINT shorter CHECK (length(value) < 2) NOT VALID", reason),
                ("ALTER DOMAIN short DROP CONSTRAINT shorter", reason),
                (
                    "CREATE OR REPLACE FUNCTION fits(text) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT false'",
                    "the function fits was created, replaced or dropped",
                ),
            ],
        )

    async def test_collations(self) -> None:
        """One that takes the name of another."""
        self.sql('CREATE COLLATION mine FROM pg_catalog."C"')
        await self.check(
            "SELECT id, v COLLATE mine > 'v3' AS later FROM t",
            [
                (
                    "DROP COLLATION mine; CREATE COLLATION mine (locale = 'POSIX')",
                    "a collation was created, altered or dropped",
                ),
            ],
        )

    async def test_a_type_in_front_of_another(self) -> None:
        """A type that takes the name by which the query, or a body, knows another one."""
        self.sql(
            f"GRANT USAGE ON SCHEMA other TO {self.reader}; "
            "CREATE FUNCTION labelled(text) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN $1::mood; END $$"
        )
        for sql in ("SELECT id, 'sad'::mood AS m FROM t", "SELECT id, labelled('sad') AS m FROM t"):
            await self.check(
                sql,
                [
                    ("CREATE DOMAIN other.mood AS text", "a type named mood was created, altered or dropped"),
                    ("DROP DOMAIN other.mood", "type other.mood changed"),
                ],
                search_path="other, pg_catalog, public",
            )

    async def test_settings_in_parsed_bodies(self) -> None:
        """A view and a BEGIN ATOMIC body have no text of their own, and may read a setting all the same."""
        self.sql(
            "CREATE VIEW tenant AS SELECT id, current_setting('app.view', true) AS s FROM t; "
            "CREATE FUNCTION tenant() RETURNS text LANGUAGE sql STABLE "
            "BEGIN ATOMIC SELECT current_setting('app.body', true); END; "
            f"GRANT SELECT ON tenant TO {self.reader}"
        )
        for setting, sql in (
            ("app.view", "SELECT * FROM tenant"),
            ("app.body", "SELECT id, tenant() AS s FROM t"),
        ):
            _, since = await self.read(self.dataset(sql))
            dsn = self.server.dsn(self.reader, "reader", database=self.name)
            other = self.of(f"{dsn}?options=-c{setting}%3D7")
            reading, _ = await self.read(self.dataset(sql), since, other)
            self.assertEqual(how_read(reading), ("all", f"the setting {setting} changed"))

    async def test_spelling(self) -> None:
        """Names as PostgreSQL folds them, and quoted ones beside quotation marks in strings; texts of any length."""
        self.sql(
            'CREATE FUNCTION "straÉe"(text) RETURNS text LANGUAGE sql STABLE AS $$ SELECT $1 $$; '
            'CREATE FUNCTION "My Own"(text) RETURNS text LANGUAGE sql STABLE AS $$ SELECT $1 $$'
        )
        filler = ", ".join(f"{i} AS filler_{i}" for i in range(1500))
        await self.check(
            """SELECT id, '"' AS q, "My Own"(v) AS o FROM t""",
            [
                (
                    'CREATE OR REPLACE FUNCTION "My Own"(text) RETURNS text LANGUAGE sql AS $$ SELECT 1::text $$',
                    "the function My Own was created, replaced or dropped",
                )
            ],
        )
        await self.check(
            f"SELECT id, {filler}, StraÉe(v) AS s FROM t",
            [
                (
                    'CREATE OR REPLACE FUNCTION "straÉe"(text) RETURNS text LANGUAGE sql AS $$ SELECT 1::text $$',
                    "the function straÉe was created, replaced or dropped",
                )
            ],
        )

    async def test_the_first_child(self) -> None:
        """A table that had no children, and a partitioned one without partitions."""
        self.sql(f"CREATE TABLE parted (id int) PARTITION BY LIST (id); GRANT SELECT ON parted TO {self.reader}")
        await self.check(
            "SELECT id FROM parted UNION ALL SELECT id FROM apart",
            [
                (
                    "CREATE TABLE part PARTITION OF parted FOR VALUES IN (1)",
                    "the partitions or children of table public.parted changed",
                ),
                (
                    "CREATE TABLE child () INHERITS (apart)",
                    "the partitions or children of table public.apart changed",
                ),
            ],
        )

    async def test_a_schema_of_the_path_that_comes_later(self) -> None:
        """search_path names a schema that does not exist yet."""
        await self.check(
            "SELECT id, upper(v) AS v FROM t",
            [
                ("CREATE SCHEMA later", None),
                (
                    f"GRANT USAGE ON SCHEMA later TO {self.reader}",
                    "the schemas of search_path that the role may use changed",
                ),
            ],
            search_path="later, pg_catalog, public",
        )

    async def test_columns_and_names(self) -> None:
        """Columns, and a table or a function that stands in front of another, are seen."""
        self.sql(f"GRANT USAGE ON SCHEMA other TO {self.reader}")
        await self.check(
            "SELECT t.*, upper(v) AS u FROM t",
            [
                ("ALTER TABLE t RENAME COLUMN s TO s2", "the columns of table public.t changed"),
                ("ALTER TABLE t ADD COLUMN extra int DEFAULT 1", "the columns of table public.t changed"),
                (
                    "CREATE FUNCTION other.upper(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT lower($1)'",
                    "the function upper was created, replaced or dropped",
                ),
                (
                    f"CREATE TABLE other.t AS TABLE public.t; GRANT SELECT ON other.t TO {self.reader}",
                    "the name t may stand for another relation",
                ),
            ],
            search_path="other, pg_catalog, public",
        )

    async def test_a_role_whose_name_needs_quotes(self) -> None:
        """What its queries depend on is found as well."""
        role = f"Cache-{self.reader}"
        self.sql(f"""CREATE ROLE "{role}" LOGIN PASSWORD 'reader' IN ROLE {self.reader}""")
        self.addCleanup(self.sql, f'DROP ROLE "{role}"')
        database = self.of(self.server.dsn(role, "reader", database=self.name))
        _, since = await self.read(self.dataset("SELECT id FROM t"), database=database)
        reading, _ = await self.read(self.dataset("SELECT id FROM t"), since, database)
        self.assertEqual(how_read(reading), ("unchanged", None))

    async def test_row_security(self) -> None:
        """Row security, policies, and the functions that policies call; rows that are forbidden now go."""
        self.sql("CREATE FUNCTION allowed(int) RETURNS bool LANGUAGE sql STABLE AS 'SELECT $1 < 4'")
        self.sql("CREATE POLICY p ON t USING (allowed(id))")
        dataset = self.dataset("SELECT id FROM t")
        _, since = await self.read(dataset)
        self.assertEqual(since.rows.count, 5)
        for change, reason, rows in (
            ("ALTER TABLE t ENABLE ROW LEVEL SECURITY", "row security of table public.t was switched on or off", 3),
            (
                "CREATE OR REPLACE FUNCTION allowed(int) RETURNS bool LANGUAGE sql STABLE AS 'SELECT $1 < 3'",
                "the function allowed was created, replaced or dropped",
                2,
            ),
            ("ALTER POLICY p ON t USING (allowed(id) AND id > 1)", "a policy of table public.t changed", 1),
            (
                f"ALTER ROLE {self.reader} BYPASSRLS",
                "row security of table public.t was switched on or off",
                5,
            ),
        ):
            self.sql(change)
            reading, since = await self.read(dataset, since)
            self.assertEqual((*how_read(reading), since.rows.count), ("all", reason, rows))
            reading, since = await self.read(dataset, since)
            self.assertEqual(kind_of(reading), "unchanged")

    async def test_rights(self) -> None:
        """GRANT and REVOKE are seen, of tables and of columns; what was allowed before is not served on unseen."""
        await self.check(
            "SELECT id, m FROM t",
            [
                (f"GRANT UPDATE ON t TO {self.reader}", "the rights on table public.t, or its owner, changed"),
                (f"GRANT UPDATE (v) ON t TO {self.reader}", "the columns of table public.t changed"),
                (f"ALTER ROLE {self.reader} SET work_mem = '8MB'", "settings of the role or the database were altered"),
            ],
        )
        self.sql(f"REVOKE SELECT ON t FROM {self.reader}")
        dataset = self.dataset("SELECT id FROM apart")
        _, since = await self.read(dataset)
        self.sql(f"REVOKE SELECT ON apart FROM {self.reader}")
        with self.assertRaisesRegex(Exception, "permission denied"):
            await self.read(dataset, since)

    async def test_rights_through_others(self) -> None:
        """Rights of a group, and of the owners as whom views and functions read; those of others do not matter."""
        group, owner = f"group_{self.name}", f"owner_{self.name}"
        for role in (group, owner):
            self.sql(f"CREATE ROLE {role}")
            self.addCleanup(drop_role, self.server, self.name, role)
        self.sql(
            "CREATE TABLE parts (id int, v int); INSERT INTO parts VALUES (1, 1), (3, 3); CREATE SCHEMA hidden; "
            "CREATE FUNCTION shown() RETURNS int LANGUAGE sql STABLE AS 'SELECT 1'; "
            "CREATE FUNCTION hidden.count() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT count(*) FROM public.parts'; "
            "CREATE FUNCTION defined() RETURNS bigint LANGUAGE sql STABLE SECURITY DEFINER AS 'SELECT hidden.count()'; "
            "REVOKE EXECUTE ON FUNCTION shown() FROM public; CREATE VIEW owned AS SELECT id, v FROM parts; "
            f"ALTER VIEW owned OWNER TO {owner}; ALTER FUNCTION defined() OWNER TO {owner}; "
            f"GRANT USAGE ON SCHEMA hidden TO {owner}; GRANT SELECT ON owned TO {self.reader}; "
            f"GRANT SELECT (id) ON parts TO {self.reader}; GRANT SELECT (v) ON parts TO {group}; "
            f"GRANT SELECT ON parts TO {group}; GRANT EXECUTE ON FUNCTION shown() TO {group}"
        )
        for sql, of in (
            ("SELECT id, v FROM parts", self.reader),
            ("SELECT id, shown() AS v FROM t", self.reader),
            ("SELECT id, v FROM owned", owner),
            ("SELECT 1 AS id, defined() AS v", owner),
        ):
            self.sql(f"GRANT {group} TO {of}")
            dataset = self.dataset(sql)
            _, since = await self.read(dataset)
            self.sql("GRANT SELECT ON parts, t, owned TO pg_monitor")
            reading, _ = await self.read(dataset, since)
            self.assertEqual(how_read(reading), ("unchanged", None), sql)
            self.sql(f"REVOKE {group} FROM {of}; REVOKE SELECT ON parts, t, owned FROM pg_monitor")
            with self.assertRaisesRegex(QueryFailed, "permission denied", msg=sql):
                await self.read(dataset, since)
        self.sql(f"GRANT {group} TO {owner}")
        _, since = await self.read(dataset)
        self.sql(f"REVOKE USAGE ON SCHEMA hidden FROM {owner}")
        with self.assertRaisesRegex(QueryFailed, "permission denied for schema hidden"):
            await self.read(dataset, since)

    async def test_schemas_that_change_their_names(self) -> None:
        """One deployment takes the place of another."""
        self.sql(
            f"CREATE SCHEMA staging; CREATE TABLE other.p AS SELECT 1 AS id; CREATE TABLE staging.p AS SELECT 2 AS id; "
            f"GRANT USAGE ON SCHEMA other, staging TO {self.reader}; "
            f"GRANT SELECT ON other.p, staging.p TO {self.reader}"
        )
        dataset = self.dataset("SELECT id FROM other.p")
        _, since = await self.read(dataset)
        self.sql("ALTER SCHEMA other RENAME TO old; ALTER SCHEMA staging RENAME TO other")
        reading, since = await self.read(dataset, since)
        self.assertEqual(
            how_read(reading),
            ("all", "the name of the schema other, or the rights on it, changed"),
        )
        self.assertEqual([key for key, _ in since.rows.items()], [b"2"])

    async def test_a_setting_of_the_role_without_its_name(self) -> None:
        """What reads all because settings were altered has to begin a session, which takes the new ones."""
        self.sql(
            "CREATE FUNCTION tenant() RETURNS text LANGUAGE plpgsql STABLE AS "
            "$$ DECLARE n text := 'app.' || 'tenant'; BEGIN RETURN current_setting(n, true); END $$"
        )
        dataset = self.dataset("SELECT id, tenant() AS t FROM t WHERE id = 1")
        # Two at a time, so that a second session is kept, which has the old settings as well.
        waiting = self.dataset("SELECT id, pg_sleep(0.2)::text AS slept FROM t WHERE id = 1", name="waiting")
        _, (_, since) = await gatherResults(map(Deferred.fromCoroutine, (self.read(waiting), self.read(dataset))))
        self.assertEqual(len(self.sql(KEPT.format(role=self.reader))), 2)
        self.sql(f"ALTER ROLE {self.reader} SET app.tenant = '5'")
        reading, since = await self.read(dataset, since)
        self.assertEqual(how_read(reading), ("all", "settings of the role or the database were altered"))
        self.assertEqual([json.loads(row)["t"] for _, row in since.rows.items()], ["5"])
        self.sql(f"ALTER ROLE {self.reader} SET app.tenant = '6'")
        group = [dataset.model_copy(update={"name": f"d{number}", "group": "all"}) for number in range(9)]
        wanted = [ReadPlan(each, rows_builder, since=since, most_keys=100) for each in group]
        for reading in await self.database.read(wanted):
            self.assertEqual(because_of(reading), "settings of the role or the database were altered")
            assert reading.rows is not None
            self.assertEqual([json.loads(row)["t"] for _, row in reading.rows.finish().items()], ["6"])

    async def test_a_setting_that_is_newer_than_the_session(self) -> None:
        """The first read of a dataset uses no kept session that began with old settings."""
        dataset = self.dataset(
            "SELECT id, current_setting('app.tenant', true) AS t FROM t WHERE id = 1", notify="changes"
        )
        for tenant in ("5", "6"):
            self.sql(f"ALTER ROLE {self.reader} SET app.tenant = '{tenant}'")
            _, since = await self.read(dataset)
            self.assertEqual([json.loads(row)["t"] for _, row in since.rows.items()], [tenant])
            self.assertEqual(len(self.sql(KEPT.format(role=self.reader))), 1)
            reading, _ = await self.read(dataset, since)
            self.assertEqual(kind_of(reading), "unchanged")

    async def test_text_search(self) -> None:
        """Configurations, their mappings and dictionaries, also those of PostgreSQL."""
        self.sql("CREATE TEXT SEARCH CONFIGURATION mine (COPY = simple)")
        reason = "a text search configuration or dictionary was created, altered or dropped"
        await self.check(
            "SELECT id, to_tsvector('public.mine', v)::text AS v FROM t",
            [
                ("ALTER TEXT SEARCH CONFIGURATION mine DROP MAPPING FOR numword", reason),
                ("CREATE TEXT SEARCH DICTIONARY plain (TEMPLATE = simple)", reason),
            ],
        )
        await self.check(
            "SELECT id, to_tsvector('english', 'the ' || v)::text AS v FROM t",
            [
                ("ALTER TEXT SEARCH DICTIONARY english_stem (StopWords)", reason),
                ("ALTER TEXT SEARCH CONFIGURATION english ALTER MAPPING FOR asciiword WITH simple", reason),
                ("ALTER TEXT SEARCH CONFIGURATION english ADD MAPPING FOR tag WITH simple", reason),
                ("ALTER TEXT SEARCH CONFIGURATION english DROP MAPPING FOR tag", reason),
            ],
        )

    async def test_a_lock_on_what_the_query_does_not_read(self) -> None:
        """A word of the query is the name of a view on a locked table: nothing waits for that."""
        self.sql("CREATE TABLE big (id int); CREATE VIEW report AS SELECT id FROM big")
        with closing(connect(self.server, self.name)) as other, other.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE big IN ACCESS EXCLUSIVE MODE")
            _, since = await self.read(self.dataset("SELECT id, v AS report FROM t"))
        self.assertIsNotNone(since.dependencies)

    async def test_what_makes_no_difference(self) -> None:
        """Maintenance, indexes, rows and the objects of others leave it alone."""
        self.sql("CREATE TABLE watched_by_all (id int)")
        with closing(connect(self.server, self.name)) as other, other.cursor() as cursor:
            cursor.execute("CREATE TEMP TABLE t (id int)")
            await self.check(
                "SELECT id, m, outer_one(v) AS v FROM w",
                [
                    (statement, None)
                    for statement in (
                        "ANALYZE t",
                        "VACUUM t",
                        "VACUUM FREEZE t",
                        "ANALYZE",
                        "VACUUM (ANALYZE) pg_catalog.pg_class",
                        "CREATE INDEX ON t (v)",
                        "UPDATE t SET v = 'other'; DELETE FROM t WHERE id = 5",
                        "CREATE VIEW mine AS SELECT 1 AS one",
                        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                        "CREATE TABLE mine_too (id int PRIMARY KEY)",
                        "ALTER TABLE apart ADD COLUMN x int",
                        "CREATE TABLE other.w (id int)",
                    )
                ],
            )

    async def test_settings(self) -> None:
        """What a query reads of the session, and what it is read with, are part of it."""
        dataset = self.dataset("SELECT id, current_setting('app.tenant', true) AS tenant FROM t")
        _, since = await self.read(dataset)
        self.database.stop()
        self.database = self.of(
            f"{self.server.dsn(self.reader, 'reader', database=self.name)}?options=-capp.tenant%3D7"
        )
        reading, since = await self.read(dataset, since)
        self.assertEqual(how_read(reading), ("all", "the setting app.tenant changed"))
        chosen = dataset.model_copy(update={"settings": {"TimeZone": "Asia/Kolkata"}})
        reading, since = await self.read(chosen, since)
        self.assertEqual(how_read(reading), ("all", "settings or search_path changed"))

    async def test_a_snapshot_without_them(self) -> None:
        """What was read by a version that did not know them is read again."""
        dataset = self.dataset("SELECT id FROM t")
        _, since = await self.read(dataset)
        assert since.dependencies is not None
        self.assertEqual(Dependencies.from_text(since.dependencies.to_text()), since.dependencies)
        self.assertIsNone(Dependencies.from_text(""))
        since = Snapshot(
            1, since.rows, since.as_of, since.read_at, since.database_snapshot, probe=since.probe, server=since.server
        )
        reading, _ = await self.read(dataset, since)
        self.assertEqual(how_read(reading), ("all", "what the query depends on is not known yet"))

    async def test_deltas(self) -> None:
        """Deltas have it as well: none mixes labels, and none has rows that row security forbids."""
        migrate(self.server.dsn(database=self.name), shipped.folder("migrations"))
        self.sql(
            f"GRANT USAGE ON SCHEMA cacheservice TO {self.reader}; "
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cacheservice TO {self.reader}"
        )
        watch(self.server.dsn(database=self.name), "public.t", ["id"], notify=False, dry_run=False, show=lambda _: None)
        dataset = self.dataset("SELECT id, m FROM w", probe="", watch=[{"table": "public.t", "key": "id"}])
        _, since = await self.read(dataset)
        self.sql("UPDATE t SET v = 'x' WHERE id = 1")
        reading, since = await self.read(dataset, since)
        self.assertEqual((*how_read(reading), list(reading.changed)), ("delta", None, [b"1"]))
        self.sql("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'; UPDATE t SET v = 'y' WHERE id = 1")
        reading, since = await self.read(dataset, since)
        self.assertEqual(how_read(reading), ("all", "the labels of type public.mood changed"))
        self.assertIsNone(reading.may_differ)
        self.assertEqual({json.loads(document)["m"] for _, document in since.rows.items()}, {"blue"})
        reading, since = await self.read(dataset, since)
        self.assertEqual(kind_of(reading), "unchanged")

    async def while_it_reads(self, wanted: ReadPlan, changes: Sequence[str]) -> ReadResult:
        """Read `HELD`, and commit one of `changes` while each of its first transactions is in the middle of it."""
        with closing(connect(self.server, self.name)) as keeper, keeper.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(7)")
            d = self.database.read([wanted])
            for change in changes:
                while not d.called and not self.sql(WAITING):
                    await deferLater(reactor, 0.01)
                self.sql(change)
                # A waiting session has the lock at once; one that asks for it again waits for the end of it.
                await deferToThread(cursor.execute, "SELECT pg_advisory_unlock(7); SELECT pg_advisory_lock(7)")
            cursor.execute("SELECT pg_advisory_unlock(7)")
            (reading,) = await d
            return reading

    async def test_definitions_that_change_during_a_read(self) -> None:
        """A statement sees definitions newer than its snapshot: what it read is not used, neither delta nor all."""
        migrate(self.server.dsn(database=self.name), shipped.folder("migrations"))
        self.sql(
            f"GRANT USAGE ON SCHEMA cacheservice TO {self.reader}; "
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cacheservice TO {self.reader}"
        )
        watch(self.server.dsn(database=self.name), "public.t", ["id"], notify=False, dry_run=False, show=lambda _: None)
        dataset = self.dataset(HELD, probe="", watch=[{"table": "public.t", "key": "id"}])
        _, since = await self.read(dataset)
        self.sql("UPDATE t SET v = 'x' WHERE id = 1")

        def wanted(**more: Any) -> ReadPlan:
            return ReadPlan(dataset, rows_builder, most_keys=100, **more)

        for old, label, start in (("sad", "blue", since), ("blue", "red", None), ("red", "green", None)):
            change = f"ALTER TYPE mood RENAME VALUE '{old}' TO '{label}'"
            reading = await self.while_it_reads(wanted(since=start), [change])
            self.assertEqual(
                how_read(reading),
                ("all", "definitions that it depends on changed during the read"),
            )
            assert reading.rows is not None
            self.assertEqual({json.loads(row)["m"] for _, row in reading.rows.finish().items()}, {label})
        changes = ["GRANT UPDATE ON t TO public", "REVOKE UPDATE ON t FROM public"] * 2
        reading = await self.while_it_reads(wanted(), changes[:3])
        self.assertEqual(kind_of(reading), "all")
        with self.assertRaisesRegex(QueryFailed, "things was read 4 times, and in the end definitions that it depends"):
            await self.while_it_reads(wanted(), changes[::-1])

    async def test_a_path_that_changes_during_a_read(self) -> None:
        """A schema that the role may use, or may use no longer, since names were found: the next attempt reads all."""
        self.sql("CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$ SELECT 'public' $$")
        create = (
            "CREATE SCHEMA later; CREATE FUNCTION later.f() RETURNS text LANGUAGE sql AS $$ SELECT 'later' $$; "
            f"GRANT USAGE ON SCHEMA later TO {self.reader}"
        )
        sql = "SELECT id, f() AS f FROM t CROSS JOIN (SELECT pg_advisory_xact_lock_shared(7)) AS held"
        dataset = self.dataset(sql, search_path="later, public")
        for change, now in ((create, "later"), (f"REVOKE USAGE ON SCHEMA later FROM {self.reader}", "public")):
            reading = await self.while_it_reads(ReadPlan(dataset, rows_builder), [change])
            assert reading.rows is not None
            since = Snapshot(
                1,
                reading.rows.finish(),
                reading.moment.as_of,
                reading.moment.read_at,
                reading.moment.database_snapshot,
                probe=reading.probe,
                server=reading.moment.server,
                dependencies=reading.dependencies,
            )
            _, since = await self.read(dataset, since)
            self.assertEqual({json.loads(document)["f"] for _, document in since.rows.items()}, {now})

    async def test_a_partition_that_is_attached_during_a_read(self) -> None:
        """The snapshot has neither that partition nor what went with it; a statement has the partition."""
        self.sql(
            "CREATE TABLE parted (id int) PARTITION BY RANGE (id); CREATE TABLE rest PARTITION OF parted DEFAULT; "
            "CREATE TABLE part (id int); INSERT INTO rest VALUES (1), (11); INSERT INTO part VALUES (12); "
            f"GRANT SELECT ON parted TO {self.reader}"
        )
        dataset = self.dataset("SELECT id FROM parted", probe="SELECT pg_advisory_xact_lock_shared(7)::text")
        attach = "DELETE FROM rest WHERE id = 11; ALTER TABLE parted ATTACH PARTITION part FOR VALUES FROM (10) TO (20)"
        reading = await self.while_it_reads(ReadPlan(dataset, rows_builder), [attach])
        assert reading.rows is not None
        self.assertEqual({key for key, _ in reading.rows.finish().items()}, {b"1", b"12"})

    async def test_a_partition_that_is_dropped(self) -> None:
        """The reason names what happened to it."""
        self.sql(
            "CREATE TABLE parted (id int) PARTITION BY LIST (id); CREATE TABLE one PARTITION OF parted DEFAULT; "
            f"GRANT SELECT ON parted TO {self.reader}"
        )
        await self.check("SELECT id FROM parted", [("DROP TABLE one", "table public.one was dropped")])

    async def test_a_partition_whose_detaching_was_broken_off(self) -> None:
        """Its rows are gone from the table although it still is a partition, and no trigger saw them go."""
        migrate(self.server.dsn(database=self.name), shipped.folder("migrations"))
        self.sql(
            "CREATE TABLE sales (id int PRIMARY KEY) PARTITION BY RANGE (id); "
            "CREATE TABLE early PARTITION OF sales FOR VALUES FROM (0) TO (10); "
            "CREATE TABLE late PARTITION OF sales FOR VALUES FROM (10) TO (20); "
            "INSERT INTO sales VALUES (1), (11); "
            f"GRANT SELECT ON sales TO {self.reader}; GRANT USAGE ON SCHEMA cacheservice TO {self.reader}; "
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cacheservice TO {self.reader}"
        )
        dsn = self.server.dsn(database=self.name)
        watch(dsn, "public.sales", ["id"], notify=False, dry_run=False, show=lambda _: None)
        dataset = self.dataset("SELECT id FROM sales", probe="", watch=[{"table": "public.sales", "key": "id"}])
        _, since = await self.read(dataset)
        with closing(connect(self.server, self.name)) as user, user.cursor() as using:
            using.execute("BEGIN; SELECT FROM sales")
            with closing(connect(self.server, self.name)) as owner, owner.cursor() as detaching:
                detaching.execute("SET lock_timeout = '100ms'")
                with self.assertRaises(psycopg2.errors.LockNotAvailable):
                    detaching.execute("ALTER TABLE sales DETACH PARTITION late CONCURRENTLY")
        self.assertEqual(
            self.sql("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhdetachpending"), [("late",)]
        )
        reading, since = await self.read(dataset, since)
        self.assertEqual(how_read(reading), ("all", "the partitions or children of table public.sales changed"))
        self.assertEqual([key for key, _ in since.rows.items()], [b"1"])

    async def test_keys_of_a_notification(self) -> None:
        """The keys of a payload are read alone only while nothing else has changed."""
        dataset = self.dataset("SELECT id, m FROM w", probe="", notify="things")
        _, since = await self.read(dataset)

        async def notified() -> frozenset[str]:
            return frozenset({"1"})

        for change, kind in (("SELECT 1", "delta"), ("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'", "all")):
            self.sql(change)
            wanted = ReadPlan(dataset, rows_builder, since=since, most_keys=100, notified=notified)
            (reading,) = await self.database.read([wanted])
            self.assertEqual(kind_of(reading), kind)

    async def test_statements_that_are_kept(self) -> None:
        """A session of the server keeps its statements and the pinned settings hold; behind a pooler none is kept."""
        dataset = self.dataset("SELECT id, m FROM w")
        _, since = await self.read(dataset)
        for _ in range(3):
            reading, since = await self.read(dataset, since)
            self.assertEqual(kind_of(reading), "unchanged")
        text = (
            "SELECT id, (SELECT count(*) FROM pg_prepared_statements) AS kept, '\\x01'::bytea AS b FROM t WHERE id = 1"
        )
        _, snapshot = await self.read(self.dataset(text))
        ((_, document),) = snapshot.rows.items()
        self.assertEqual(json.loads(document), {"id": 1, "kept": 3, "b": "\\x01"})
        if pgbouncer.PROGRAM is None:
            pytest.skip(pgbouncer.NEEDED)
        with running_pgbouncer(self.server, pool_size=1) as dsn:
            pooled = self.of(dsn(database=self.name))
            _, since = await self.read(dataset, database=pooled)
            for _ in range(3):
                reading, since = await self.read(dataset, since, pooled)
                self.assertEqual(kind_of(reading), "unchanged")
            self.sql("CREATE OR REPLACE VIEW v AS SELECT id, m, v || '!' AS v FROM t")
            reading, since = await self.read(dataset, since, pooled)
            self.assertEqual(how_read(reading), ("all", "view public.v was replaced"))
            _, snapshot = await self.read(self.dataset(text), database=pooled)
            ((_, document),) = snapshot.rows.items()
            self.assertEqual(json.loads(document)["kept"], 0)
            pooled.stop()
