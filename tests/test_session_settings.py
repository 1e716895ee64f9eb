"""Laws of the settings of a reading transaction: one document, whatever the role, the host or a pooler set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings, PostgresSettings
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.inspect import inspecting
from cacheservice.sources.postgres.target import parse
from tests.kit import pgbouncer
from tests.kit.datasets import rows_builder
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.postgres import fresh_database, query
from tests.kit.readings import read_one

# One column for each setting that is pinned, by its name; the others of the test are PostgreSQL's defaults.
RENDERED = """
SELECT 1 AS id,
       timestamptz '2026-07-01 12:00:00+00' AS "TimeZone", (date '2026-07-01')::text AS "DateStyle",
       interval '1 day 02:00' AS "IntervalStyle", '\\x01ff'::bytea AS bytea_output,
       0.1::float8 + 0.2::float8 AS extra_float_digits, 1234.5::numeric::money AS lc_monetary,
       to_char(1234.5, 'FM9G999D9') AS lc_numeric, to_char(date '2026-07-01', 'TMMonth') AS lc_time,
       current_setting('xmlbinary') AS xmlbinary, current_setting('xmloption') AS xmloption,
       'id'::text::regclass::text AS quote_all_identifiers, 'a\\b' AS standard_conforming_strings,
       '{NULL}'::text[] AS array_nulls, (SELECT NULL = NULL) AS transform_null_equals,
       (SELECT string_agg(label, '') FROM guarded) AS row_security,
       current_setting('gin_fuzzy_search_limit') AS gin_fuzzy_search_limit,
       current_setting('backslash_quote') AS backslash_quote
"""
DEFAULTS: Mapping[str, Any] = {
    "id": 1,
    "TimeZone": "2026-07-01T12:00:00+00:00",
    "DateStyle": "2026-07-01",
    "IntervalStyle": "1 day 02:00:00",
    "bytea_output": "\\x01ff",
    "extra_float_digits": 0.30000000000000004,
    "lc_monetary": "$1,234.50",
    "lc_numeric": "1,234.5",
    "lc_time": "July",
    "xmlbinary": "base64",
    "xmloption": "content",
    "quote_all_identifiers": "id",
    "standard_conforming_strings": "a\\b",
    "array_nulls": [None],
    "transform_null_equals": None,
    "row_security": "seen",
    "gin_fuzzy_search_limit": "0",
    "backslash_quote": "safe_encoding",
}
OTHERS: Mapping[str, str] = {
    "TimeZone": "Asia/Kolkata",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "xmlbinary": "hex",
    "xmloption": "document",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "row_security": "off",
    "gin_fuzzy_search_limit": "7",
    "backslash_quote": "off",
}
"""What another client, or the role, may have set; locales other than C need not be installed."""
ROLE = "of_settings"


@pytest.mark.usefixtures("server")
class SessionSettingsTestCase(TestCase):
    server: EmbeddedPostgres
    timeout = 240

    def setUp(self) -> None:
        self.name = fresh_database(self.server, self.addCleanup)
        self.role = f"{ROLE}_{self.name}"
        self.sql(
            "CREATE TABLE id (); CREATE TABLE guarded AS SELECT unnest(ARRAY['seen', 'hidden']) AS label; "
            "ALTER TABLE guarded ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON guarded USING (label = 'seen'); "
            f"CREATE ROLE {self.role} LOGIN PASSWORD 'reader'; GRANT SELECT ON guarded TO {self.role}"
        )
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE {self.role}")
        self.addCleanup(self.sql, f"DROP OWNED BY {self.role}")

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.server, self.name, statement)

    async def document(self, sql: str = RENDERED, dsn: str | None = None, **more: Any) -> Any:
        dsn = dsn or self.server.dsn(self.role, "reader", database=self.name)
        database = Database(reactor, parse(dsn), 60.0, DatabaseStatus())
        self.addCleanup(database.stop)
        settings = {"name": "things", "query": sql, "key": "id", "timeout_s": 60.0, **more}
        reading = await read_one(database, DatasetSettings.model_validate(settings), rows_builder)
        self.assertGreater(reading.moment.as_of.year, 2024)
        assert reading.rows is not None
        ((_, document),) = reading.rows.finish().items()
        return json.loads(document)


class Pinned(SessionSettingsTestCase):
    async def test_whatever_the_role_has(self) -> None:
        """What ALTER ROLE and ALTER DATABASE set changes no document."""
        self.assertEqual(await self.document(), DEFAULTS)
        for number, (name, value) in enumerate(OTHERS.items()):
            owner = f"ROLE {self.role}" if number % 2 else f"DATABASE {self.name}"
            self.sql(f"ALTER {owner} SET {name} = '{value}'")
        self.assertEqual(await self.document(), DEFAULTS)

    async def test_what_is_chosen(self) -> None:
        """`settings` of the service or of a dataset go over what is pinned, each in its own spelling of the name."""
        chosen = {"timezone": "Europe/Berlin", "INTERVALSTYLE": "iso_8601", "DateStyle": "German", "app.tenant": "it's"}
        sql = RENDERED.replace("SELECT 1 AS id", "SELECT current_setting('app.tenant') AS tenant, 1 AS id")
        self.assertEqual(
            await self.document(sql, settings=chosen),
            {
                **DEFAULTS,
                "TimeZone": "2026-07-01T14:00:00+02:00",
                "IntervalStyle": "P1DT2H",
                "DateStyle": "01.07.2026",
                "tenant": "it's",
            },
        )

    async def test_what_the_role_decides(self) -> None:
        """The order of day and month in what a query reads is the role's, and so is its text search configuration."""
        sql = "SELECT 1 AS id, '1/2/2026'::date AS day, to_tsvector('running')::text AS words"
        self.sql(f"ALTER ROLE {self.role} SET default_text_search_config = 'simple'")
        self.assertEqual(await self.document(sql), {"id": 1, "day": "2026-01-02", "words": "'running':1"})
        self.sql(f"ALTER ROLE {self.role} SET DateStyle = 'German, DMY'")
        self.sql(f"ALTER ROLE {self.role} SET default_text_search_config = 'english'")
        self.assertEqual(await self.document(sql), {"id": 1, "day": "2026-02-01", "words": "'run':1"})

    async def test_search_path(self) -> None:
        """Names are found in the path of the dataset, or else of the service; temporary objects come last."""
        self.sql("CREATE SCHEMA ext; CREATE FUNCTION ext.f() RETURNS text LANGUAGE sql AS $$ SELECT 'of ext' $$")
        self.sql("CREATE FUNCTION public.f() RETURNS text LANGUAGE sql AS $$ SELECT 'of public' $$")
        self.sql(f"GRANT USAGE ON SCHEMA ext TO {self.role}")
        sql = "SELECT 1 AS id, f() AS f"
        self.assertEqual((await self.document(sql))["f"], "of public")
        for path in ("ext, public", 'pg_catalog, "ext", public'):
            self.assertEqual((await self.document(sql, search_path=path))["f"], "of ext")
        found = await self.document("SELECT 1 AS id, current_setting('search_path') AS path", search_path="ext")
        self.assertEqual(found["path"], "ext, pg_temp")

    async def test_behind_pgbouncer(self) -> None:
        """What another client sets in a session of the pool changes no document, and it keeps what it set."""
        if pgbouncer.PROGRAM is None:
            pytest.skip(pgbouncer.NEEDED)
        superuser = {**DEFAULTS, "row_security": "seenhidden"}
        with running_pgbouncer(self.server, pool_size=1) as dsn:
            through = dsn(database=self.name)
            self.assertEqual(await self.document(dsn=through), superuser)
            with closing(psycopg2.connect(through)) as stranger, stranger.cursor() as cursor:
                stranger.autocommit = True
                for name, value in {**OTHERS, "default_text_search_config": "german", "role": self.role}.items():
                    cursor.execute(f"SET {name} = '{value}'")
                self.assertEqual(await self.document(dsn=through), superuser)
                words = (
                    "SELECT 1 AS id, to_tsvector('running')::text AS words, current_user AS role, '1/2/2026'::date AS d"
                )
                served = {"id": 1, "words": "'run':1", "role": "postgres", "d": "2026-01-02"}
                self.assertEqual(await self.document(words, dsn=through), served)
                cursor.execute("SELECT current_setting('bytea_output'), current_setting('role')")
                self.assertEqual(cursor.fetchone(), ("escape", self.role))

    async def test_check_names_a_value_that_is_not_possible(self) -> None:
        """`check --db` reports a value that PostgreSQL refuses, and goes on."""
        postgres = PostgresSettings.model_validate({"dsn": self.server.dsn(database=self.name)})
        declared = {"name": "things", "query": "SELECT 1 AS id", "key": "id", "settings": {"TimeZone": "Europe/Berln"}}
        dataset = DatasetSettings.model_validate(declared)
        with inspecting(postgres, [dataset]) as inspector:
            (finding,) = inspector.inspect(dataset).findings
            self.assertEqual(
                (finding.level, finding.text),
                ("problem", 'settings: invalid value for parameter "TimeZone": "Europe/Berln"'),
            )
            right = dataset.model_copy(update={"settings": {"TimeZone": "Europe/Berlin"}})
            self.assertTrue(inspector.inspect(right).ok)


class Paths(SessionSettingsTestCase):
    """What the query means with the role's own search_path."""

    def look(self, sql: str, **more: Any) -> list[str]:
        """The problems that `check --db` finds."""
        postgres = PostgresSettings.model_validate({"dsn": self.server.dsn(self.role, "reader", database=self.name)})
        dataset = DatasetSettings.model_validate({"name": "things", "query": sql, "key": "id", **more})
        with inspecting(postgres, [dataset]) as inspector:
            return [each.text for each in inspector.inspect(dataset).findings if each.level == "problem"]

    async def test_operators_of_another_schema(self) -> None:
        """Where a type is compared by the operators of a schema that the pinned path lacks, it is a problem with the
        key to set; with that, rows are found and there is none.
        """
        self.sql(
            """
            CREATE SCHEMA ext;
            CREATE TYPE ext.ci;
            CREATE FUNCTION ext.ci_in(cstring) RETURNS ext.ci LANGUAGE internal IMMUTABLE STRICT AS 'textin';
            CREATE FUNCTION ext.ci_out(ext.ci) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
            CREATE TYPE ext.ci (INPUT = ext.ci_in, OUTPUT = ext.ci_out, LIKE = text, CATEGORY = 'S');
            CREATE CAST (ext.ci AS text) WITHOUT FUNCTION AS IMPLICIT;
            CREATE FUNCTION ext.same(ext.ci, ext.ci) RETURNS bool LANGUAGE sql IMMUTABLE
            AS $$ SELECT lower($1::text) = lower($2::text) $$;
            CREATE OPERATOR ext.= (LEFTARG = ext.ci, RIGHTARG = ext.ci, FUNCTION = ext.same);
            CREATE TABLE people (id int PRIMARY KEY, email ext.ci); INSERT INTO people VALUES (1, 'X@y');
            """
        )
        path = "ext, public"
        self.sql(f"GRANT SELECT ON people TO {self.role}; GRANT USAGE ON SCHEMA ext TO {self.role}")
        self.sql(f"ALTER ROLE {self.role} SET search_path = {path}")
        sql = "SELECT id FROM people WHERE email = 'x@y'"
        (problem,) = self.look(sql)
        self.assertIn(f"search_path: with the role's own, {path}, the query means something else", problem)
        self.assertIn("operator ext.=(ci, ci)", problem)
        self.assertEqual(self.look(sql, search_path=path), [])
        self.assertEqual(await self.document(sql, search_path=path), {"id": 1})

    async def test_what_is_found_elsewhere(self) -> None:
        """A function or a table that the own path finds in another place is named; one that is not used is not."""
        self.sql(
            "CREATE SCHEMA ext; CREATE TABLE things (id int); CREATE TABLE ext.things (id int); CREATE TABLE ext.x (); "
            "CREATE FUNCTION ext.upper(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT lower($1)'; "
            f"GRANT SELECT ON things, ext.things TO {self.role}; GRANT USAGE ON SCHEMA ext TO {self.role}; "
            f"ALTER ROLE {self.role} SET search_path = ext, pg_catalog, public"
        )
        (problem,) = self.look("SELECT id FROM things AS x")
        self.assertIn("table ext.things is found with it alone", problem)
        (problem,) = self.look("SELECT id, upper('a') AS u FROM public.things")
        self.assertIn("function ext.upper(text) is found with it alone", problem)
        self.assertEqual(self.look("SELECT id FROM public.things AS x"), [])
