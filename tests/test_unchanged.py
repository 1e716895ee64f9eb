"""Laws of "unchanged": what a probe, a delta or an operator's refresh may leave unread, and for how long."""

from __future__ import annotations

import json
import re
from contextlib import closing
from typing import Any

from twisted.internet import reactor

from cacheservice.base import shipped
from cacheservice.cache.dataset import Dataset
from cacheservice.refresh.service import CacheService
from cacheservice.sources.postgres.inspect.watching import HOLDING_PROBE, misses_changes
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch
from tests.kit.paths import ROOT
from tests.kit.postgres import connect, query
from tests.kit.service import ServiceTestCase, declare
from tests.kit.waiting import until

TABLE = "CREATE TABLE products (id int PRIMARY KEY, n int, updated_at timestamptz DEFAULT now())"
PROBE = f"SELECT {HOLDING_PROBE} FROM products"
GREATEST = "SELECT max(updated_at) FROM products"


class UnchangedTestCase(ServiceTestCase):
    async def setUp(self) -> None:
        await super().setUp()
        self.sql(TABLE)
        self.sql("INSERT INTO products SELECT i, 0 FROM generate_series(1, 20) AS i")

    async def loaded(self, **settings: Any) -> tuple[CacheService, Dataset]:
        """A service that refreshes only on request."""
        one = declare("products", "SELECT id, n FROM products", **{"interval_s": 3600.0, "max_age_s": 1e5, **settings})
        service, cache = self.make_service(one)
        await self.start_and_load(service, cache)
        return service, cache.dataset("products")

    async def refreshed(self, service: CacheService, dataset: Dataset) -> str:
        """Refresh as for a reader that requests fresh data; returns how it was read."""
        ended = sum(dataset.counts.outcomes.values())
        service.refresh_since("products", reactor.seconds())
        await until(lambda: sum(dataset.counts.outcomes.values()) > ended and not dataset.refresh.is_running)
        return dataset.attempts[-1].how or str(dataset.attempts[-1].error)

    def served(self, dataset: Dataset) -> dict[int, int]:
        assert dataset.snapshot is not None
        return {int(key): json.loads(document)["n"] for key, document in dataset.snapshot.rows.items()}

    def held(self) -> dict[int, int]:
        return dict(query(self.server, self.database_name, "SELECT id, n FROM products"))


class Probes(UnchangedTestCase):
    async def test_the_documented_probe_sees_all(self) -> None:
        """A transaction that commits after a later one, a DELETE, an UPDATE, and each of them alone."""
        service, dataset = await self.loaded(probe=PROBE)
        self.assertIn("nothing has changed", await self.refreshed(service, dataset))
        with closing(connect(self.server, self.database_name)) as late, late.cursor() as cursor:
            cursor.execute("BEGIN; UPDATE products SET n = 1, updated_at = now() WHERE id = 1")
            cursor.execute("INSERT INTO products VALUES (21, 1)")
            self.sql("UPDATE products SET n = 2, updated_at = now() WHERE id = 2")
            await self.refreshed(service, dataset)
            self.assertEqual(self.served(dataset), self.held())
            cursor.execute("COMMIT")
        for change in (
            "",
            "DELETE FROM products WHERE id = 3",
            "UPDATE products SET n = 4 WHERE id = 4",
            "VACUUM FREEZE",
        ):
            if change:
                self.sql(change)
            await self.refreshed(service, dataset)
            self.assertEqual(self.served(dataset), self.held(), change)
        self.assertIn("nothing has changed", await self.refreshed(service, dataset))

    async def test_it_is_not_believed_for_ever(self) -> None:
        """Every full_interval_s all is read, whatever the probe returns; what it had missed is named in the log."""
        _, dataset = await self.loaded(probe="SELECT 1", interval_s=0.2, full_interval_s=1.0)
        self.sql("UPDATE products SET n = 7 WHERE id = 7")
        await until(lambda: self.served(dataset) == self.held())
        self.assertEqual(dataset.counts.differences, 1)
        (told,) = [fields for event, fields in self.log.events if event == "delta_differences"]
        self.assertEqual(told["keys"], ["7"])
        self.assertIn("although the probe's value did not", told["error"])

    async def test_beside_watch_it_hides_nothing(self) -> None:
        """Recorded changes are read although the probe is the same."""
        migrate(self.server.dsn(database=self.database_name), shipped.folder("migrations"))
        watch(
            self.server.dsn(database=self.database_name),
            "products",
            ["id"],
            notify=False,
            dry_run=False,
            show=lambda _: None,
        )
        watched = [{"table": "public.products", "key": "id"}]
        service, dataset = await self.loaded(probe="SELECT 1", watch=watched)
        self.sql("UPDATE products SET n = 7 WHERE id = 7; DELETE FROM products WHERE id = 8")
        self.assertEqual(await self.refreshed(service, dataset), "a delta of 2 keys")
        self.assertEqual(self.served(dataset), self.held())

    def test_the_documentation_shows_it(self) -> None:
        """Probes in the documentation are reliable, except those that it warns of."""
        text = (ROOT / "docs" / "freshness.md").read_text()
        self.assertIn(PROBE, text)
        self.assertFalse(misses_changes(PROBE))
        for probe in (GREATEST, "SELECT updated_at FROM products ORDER BY 1 DESC LIMIT 1", "SELECT last_value FROM s"):
            self.assertTrue(misses_changes(probe), probe)
        for probe in ("SELECT v FROM version", "SELECT pg_current_snapshot()", "SELECT count(*) FROM products"):
            self.assertFalse(misses_changes(probe), probe)


class Keys(UnchangedTestCase):
    async def test_a_key_that_the_query_cannot_hold(self) -> None:
        """A recorded int8 that is not an int2: all is read, it reports why, and deltas go on after it."""
        self.sql("ALTER TABLE products ALTER id TYPE int8")
        dsn = self.server.dsn(database=self.database_name)
        migrate(dsn, shipped.folder("migrations"))
        watch(dsn, "products", ["id"], notify=False, dry_run=False, show=lambda _: None)
        declared = declare(
            "products",
            "SELECT id::int2, n FROM products WHERE id < 1000",
            interval_s=3600.0,
            watch=[{"table": "public.products", "key": "id"}],
        )
        service, cache = self.make_service(declared)
        await self.start_and_load(service, cache)
        dataset = cache.dataset("products")
        self.sql("INSERT INTO products VALUES (70000, 0); UPDATE products SET n = 5 WHERE id = 5")
        how = await self.refreshed(service, dataset)
        self.assertIn("all rows, because the keys that changed do not fit the key of the query", how)
        self.assertIn("SQLSTATE 22003", how)
        self.assertEqual(self.served(dataset)[5], 5)
        self.sql("UPDATE products SET n = 6 WHERE id = 6")
        self.assertEqual(await self.refreshed(service, dataset), "a delta of 1 key")
        self.assertEqual((self.served(dataset)[6], dataset.counts.outcomes["failed"]), (6, 0))


class Texts(UnchangedTestCase):
    async def test_no_two_attempts_differ(self) -> None:
        """All attempts send the same texts except for constants of SELECTs, which the server counts as one statement;
        no statement has the attempt's id in a comment."""
        self.sql(f"ALTER DATABASE {self.database_name} SET log_statement = 'all'")
        before = len(self.server.log_path.read_text())
        service, dataset = await self.loaded(probe="SELECT clock_timestamp()")
        for _ in range(8):
            self.sql("UPDATE products SET n = n + 1")
            self.assertEqual(await self.refreshed(service, dataset), "all rows")
        self.sql(f"ALTER DATABASE {self.database_name} RESET log_statement")
        logged = self.server.log_path.read_text()[before:]
        ids = [attempt.id for attempt in dataset.attempts]
        self.assertEqual([id for id in ids if re.search(rf"/\*[^*]*{id}", logged)], [])
        begins = re.findall(r"statement:[^\S\n]*\n(?:\t.*\n)*?\tBEGIN ISOLATION(?:.*\n)(?:\t.*\n)*", logged)
        utilities = {
            line.strip() for begin in begins for line in begin.splitlines() if line.strip().startswith(("SET", "BEGIN"))
        }
        names = [line.split("=")[0] for line in utilities]
        self.assertGreaterEqual(len(begins), 9)
        # The first one had less time left, because it opened the session.
        twice = {name for name in names if names.count(name) > 2}
        self.assertEqual(twice, set(), sorted(utilities))
        fetches = set(re.findall(r"FETCH FORWARD .*", logged))
        self.assertEqual(fetches, {f"FETCH FORWARD {rows} FROM rows" for rows in (1, 4, 16, 64)})

    async def test_keys_of_a_delta_are_constants_of_a_select(self) -> None:
        """The server counts a DECLARE as another statement for each list of keys, before PostgreSQL 16."""
        dsn = self.server.dsn(database=self.database_name)
        migrate(dsn, shipped.folder("migrations"))
        watch(dsn, "products", ["id"], notify=False, dry_run=False, show=lambda _: None)
        self.sql("INSERT INTO products SELECT i, 0 FROM generate_series(101, 2000) AS i")
        self.sql(f"ALTER DATABASE {self.database_name} SET log_statement = 'all'")
        service, dataset = await self.loaded(watch=[{"table": "public.products", "key": "id"}], max_delta=0.5)
        self.sql("UPDATE products SET n = 1 WHERE id > 1200")
        before = len(self.server.log_path.read_text())
        self.assertEqual(await self.refreshed(service, dataset), "a delta of 800 keys")
        self.assertEqual(self.served(dataset), self.held())
        logged = self.server.log_path.read_text()[before:]
        self.assertIn("LIMIT 801", logged)
        self.assertNotIn("DECLARE", logged)
