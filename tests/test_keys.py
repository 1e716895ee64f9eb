"""Laws of keys: deltas and full reads use for each row the same key, and two rows with one key are refused by both."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest

from cacheservice.base import shipped
from cacheservice.base.errors import BadResult
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import ReadPlan
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch
from tests.kit.datasets import rows_builder
from tests.kit.dependencies import DependenciesTestCase
from tests.kit.postgres import query
from tests.kit.readings import because_of, how_read, kind_of
from tests.kit.versions import NEEDS_NPM, OlderPostgres


class Keys(DependenciesTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.sql(
            "CREATE TABLE cc (a text, b text, v int, PRIMARY KEY (a, b)); INSERT INTO cc VALUES ('a:b', 'c', 1); "
            f"GRANT SELECT ON cc TO {self.reader}"
        )
        dsn = self.server.dsn(database=self.name)
        migrate(dsn, shipped.folder("migrations"))
        self.sql(
            f"GRANT USAGE ON SCHEMA cacheservice TO {self.reader}; "
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cacheservice TO {self.reader}"
        )
        watch(dsn, "public.cc", ["a", "b"], notify=False, dry_run=False, show=lambda _: None)

    def of_pairs(self, **more: Any) -> DatasetSettings:
        watched = [{"table": "public.cc", "key": ["a", "b"]}]
        return self.dataset("TABLE cc", key=["a", "b"], probe="", watch=watched, **more)

    async def delta(self, dataset: DatasetSettings, since: Snapshot) -> tuple[dict[bytes, Any], Snapshot]:
        """What one changes, each document as its v; and the snapshot after it, whose rows stay."""
        reading, after = await self.read(dataset, since)
        self.assertEqual(how_read(reading), ("delta", None))
        changed = {key: document and json.loads(document)["v"] for key, document in reading.changed.items()}
        return changed, after

    async def test_rows_that_share_a_key(self) -> None:
        """A delta refuses them as a full read does; neither an update nor a delete of one touches the other."""
        dataset = self.of_pairs()
        _, since = await self.read(dataset)
        self.sql("INSERT INTO cc VALUES ('a', 'b:c', 2)")
        for each in (since, None):
            with self.assertRaisesRegex(BadResult, 'the key "a:b:c" occurs twice'):
                await self.read(dataset, each)
        self.sql("DELETE FROM cc WHERE a = 'a'")
        changed, since = await self.delta(dataset, since)
        self.assertEqual(changed, {b"a:b:c": 1})
        self.sql("INSERT INTO cc VALUES ('a', 'b:c', 2); DELETE FROM cc WHERE a = 'a:b'")
        changed, since = await self.delta(dataset, since)
        self.assertEqual(changed, {b"a:b:c": 2})
        self.sql("DELETE FROM cc")
        changed, since = await self.delta(dataset, since)
        self.assertEqual(changed, {b"a:b:c": None})

    async def test_an_escape_or_another_separator(self) -> None:
        """With either, both rows are served, and deltas use the keys of a full read."""
        for more, keys in (
            ({"key_escape": True}, [rb"a\:b:c", rb"a:b\:c"]),
            ({"key_separator": "|"}, [b"a:b|c", b"a|b:c"]),
            ({"key_separator": "\\"}, [b"a:b\\c", b"a\\b:c"]),
            ({"key_separator": "|", "key_escape": True}, [b"a:b|c", b"a|b:c"]),
        ):
            query(self.server, self.name, "TRUNCATE cc; INSERT INTO cc VALUES ('a:b', 'c', 1)")
            dataset = self.of_pairs(**more)
            _, since = await self.read(dataset)
            self.assertEqual(list(dict(since.rows.items())), keys[:1])
            self.sql("INSERT INTO cc VALUES ('a', 'b:c', 2)")
            changed, since = await self.delta(dataset, since)
            self.assertEqual(changed, {keys[1]: 2})
            self.sql("DELETE FROM cc WHERE a = 'a:b'")
            changed, since = await self.delta(dataset, since)
            self.assertEqual(changed, {keys[0]: None})
            _, whole = await self.read(dataset)
            self.assertEqual(list(dict(whole.rows.items())), keys[1:])

    async def test_keys_of_a_notification(self) -> None:
        """A payload names keys as they are served."""
        dataset = self.dataset("TABLE cc", key=["a", "b"], key_escape=True, probe="", notify="things")
        _, since = await self.read(dataset)
        self.sql("INSERT INTO cc VALUES ('a', 'b:c', 2)")

        async def notified() -> frozenset[str]:
            return frozenset({r"a:b\:c", "gone:now"})

        wanted = ReadPlan(dataset, rows_builder, since=since, most_keys=100, notified=notified)
        (reading,) = await self.database.read([wanted])
        self.assertEqual(set(reading.changed), {rb"a:b\:c", b"gone:now"})
        self.assertIsNone(reading.changed[b"gone:now"])

    async def test_one_key_in_more_rows_than_come_in_one_answer(self) -> None:
        """A delta refuses a repeated key as a full read does, even if 600 rows have it."""
        dataset = self.dataset("SELECT v, a FROM cc", key="v", probe="", notify="things")
        _, since = await self.read(dataset)
        self.sql("INSERT INTO cc SELECT 'k' || i, 'b', 1 FROM generate_series(2, 600) AS i")

        async def notified() -> frozenset[str]:
            return frozenset({"1"})

        wanted = ReadPlan(dataset, rows_builder, since=since, most_keys=100, notified=notified)
        await self.assertFailure(self.database.read([wanted]), BadResult)

    async def test_keys_of_a_notification_that_the_query_cannot_hold(self) -> None:
        """All is read instead, with the reason."""
        dataset = self.dataset("SELECT v::int2 AS id, a FROM cc", probe="", notify="things")
        _, since = await self.read(dataset)

        for key in ("70000", "nonsense"):

            async def notified(key: str = key) -> frozenset[str]:
                return frozenset({key})

            wanted = ReadPlan(dataset, rows_builder, since=since, most_keys=100, notified=notified)
            (reading,) = await self.database.read([wanted])
            self.assertEqual(kind_of(reading), "all")
            self.assertIn("do not fit the key of the query", because_of(reading) or "")

    async def test_keys_whose_equality_is_not_that_of_their_text(self) -> None:
        """Behind a domain, at whatever depth, is a type of others: all is read."""
        self.sql(
            """
            CREATE TYPE ci;
            CREATE FUNCTION ci_in(cstring) RETURNS ci LANGUAGE internal IMMUTABLE STRICT AS 'textin';
            CREATE FUNCTION ci_out(ci) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
            CREATE TYPE ci (INPUT = ci_in, OUTPUT = ci_out, LIKE = text);
            CREATE DOMAIN once AS ci; CREATE DOMAIN twice AS once; CREATE DOMAIN number AS int;
            CREATE TABLE of_domains (one once, two twice, three number);
            INSERT INTO of_domains VALUES ('a', 'a', 1);
            """
        )
        self.sql(f"GRANT SELECT ON of_domains TO {self.reader}")
        for column, fit in (("one", False), ("two", False), ("three", True)):
            watch(self.server.dsn(database=self.name), "of_domains", [column], notify=False, dry_run=False, show=len)
            watched = [{"table": "public.of_domains", "key": column}]
            dataset = self.dataset("TABLE of_domains", key=column, probe="", watch=watched)
            reading, _ = await self.read(dataset)
            self.assertEqual(bool(reading.watch_state), fit, column)
            if not fit:
                self.assertIn("is not fit for deltas", because_of(reading) or "")


class CaseInsensitive(DependenciesTestCase):
    """On a server with ICU and citext, which the wheel of the ordinary tests lacks."""

    def setUp(self) -> None:
        if shutil.which("npm") is None:
            raise SkipTest(NEEDS_NPM)
        directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, directory)
        self.server = OlderPostgres(directory, "17")
        self.server.start()
        self.addCleanup(self.server.stop, "immediate")
        super().setUp()

    async def test_keys_that_are_equal_and_look_different(self) -> None:
        """A nondeterministic collation, citext, and a domain over it: all is read, and no row is kept that is gone."""
        dsn = self.server.dsn(database=self.name)
        migrate(dsn, shipped.folder("migrations"))
        self.sql(
            f"""
            CREATE EXTENSION citext; CREATE DOMAIN email AS citext;
            CREATE COLLATION level2 (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
            CREATE TABLE collated (word text COLLATE level2 PRIMARY KEY);
            CREATE TABLE cited (word citext PRIMARY KEY);
            CREATE TABLE mailed (word email PRIMARY KEY);
            GRANT SELECT ON collated, cited, mailed TO {self.reader};
            GRANT USAGE ON SCHEMA cacheservice TO {self.reader};
            GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cacheservice TO {self.reader}
            """
        )
        for table, why in (
            ("collated", "has a nondeterministic collation"),
            ("cited", "is not fit for deltas"),
            ("mailed", "is not fit for deltas"),
        ):
            with self.subTest(table=table):
                self.sql(f"INSERT INTO {table} VALUES ('Anna')")
                watch(dsn, table, ["word"], notify=False, dry_run=False, show=lambda _: None)
                watched = [{"table": f"public.{table}", "key": "word"}]
                dataset = self.dataset(f"TABLE {table}", key="word", probe="", watch=watched)
                _, since = await self.read(dataset)
                self.sql(f"DELETE FROM {table}; INSERT INTO {table} VALUES ('anna')")
                reading, now = await self.read(dataset, since)
                self.assertEqual(kind_of(reading), "all")
                self.assertIn(why, because_of(reading) or "")
                self.assertEqual([key for key, _ in now.rows.items()], [b"anna"])
