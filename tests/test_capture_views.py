"""What operators see of change capture by logical decoding, on a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.base import shipped
from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Histogram
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.ops.exposition import Metrics
from cacheservice.sources.postgres.capturing import Mode
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.watch import watch
from cacheservice.views import collect, table
from cacheservice.views import json as as_json
from cacheservice.views.problems import problems
from cacheservice.views.why import sentences
from tests.kit.capturing import LOGICAL, capturing, slots
from tests.kit.logs import Log
from tests.kit.metrics import Series, of_text, place
from tests.kit.postgres import fresh_database, query
from tests.kit.readings import refreshes_of
from tests.kit.versions import MakeServer, running_server
from tests.kit.waiting import GIVE_UP_S, until

PRODUCTS = DatasetSettings.model_validate(
    {
        "name": "products",
        "query": "TABLE products",
        "key": "id",
        "watch": [{"table": "public.products", "key": "id"}],
        "interval_s": 3600.0,
        "timeout_s": 60.0,
    }
)


@pytest.fixture(scope="class")
def decoding_server(request: pytest.FixtureRequest, make_server: MakeServer) -> Iterator[None]:
    """A server that decodes its log, as `self.server`."""
    with running_server(make_server, **LOGICAL) as request.cls.server:
        yield


@pytest.mark.usefixtures("decoding_server")
class Seen(TestCase):
    server: EmbeddedPostgres
    timeout = 300

    def setUp(self) -> None:
        self.name = fresh_database(self.server, self.addCleanup)
        self.dsn = self.server.dsn(database=self.name)
        self.sql("CREATE TABLE products (id int PRIMARY KEY, n int); INSERT INTO products VALUES (1, 0), (2, 0)")
        self.cache = Cache([PRODUCTS], reactor.seconds)
        self.products = self.cache.dataset("products")

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.server, self.name, statement)

    def start(self, mode: Mode) -> None:
        """Refresh the dataset, and capture its changes."""
        database = Database(reactor, parse(self.dsn), 30.0, self.cache.database)
        self.log = Log()
        self.service = refreshes_of(self.cache, database, self.log)
        self.addCleanup(until, lambda: not slots(query(self.server, "postgres", "TABLE pg_replication_slots")))
        self.addCleanup(database.stop)
        capturing(self, self.dsn, self.cache, database, self.service, self.log, mode)
        self.addCleanup(self.service.stopService)
        self.service.startService()

    async def until(self, true: Callable[[], object]) -> None:
        await until(true, GIVE_UP_S, lambda: (self.cache.database.capture, self.log.events[-5:]))

    async def until_state(self, state: str) -> None:
        await self.until(lambda: self.cache.database.capture.state == state)

    async def refreshed(self) -> None:
        ended = self.products.counts.outcomes.total()
        self.service.note_changed("products", ())
        await self.until(lambda: self.products.counts.outcomes.total() > ended)

    def json(self) -> Any:
        return json.loads(as_json.line(collect.everything(self.cache)))

    def why(self) -> str:
        return " ".join(sentences(collect.details(self.products, self.cache), collect.database(self.cache)))

    def head(self) -> str:
        seen = collect.everything(self.cache)
        return table.status_table(seen.service, seen.database, seen.datasets.values()).splitlines()[0]

    def problems(self) -> list[str]:
        return [str(each) for each in problems(collect.everything(self.cache))]

    async def metrics(self) -> Series:
        text = await Deferred.fromCoroutine(
            Metrics(self.cache, Histogram((1.0,)), reactor).exposition(openmetrics=False)
        )
        return of_text(text)

    async def test_a_stream(self) -> None:
        """Its slot, lag and counts are everywhere; so is its loss, which is counted once, and the stream after it."""
        self.sql("CREATE PUBLICATION cacheservice FOR TABLE products")
        self.start("logical")
        await self.until_state("streaming")
        await self.until(lambda: self.products.snapshot)
        self.sql("UPDATE products SET n = 1 WHERE id = 1")
        await self.until(lambda: self.products.snapshot and self.products.snapshot.generation == 2)
        await self.until(lambda: self.cache.database.capture.retained_bytes is not None)
        await self.until(lambda: self.cache.database.capture.lag_bytes == 0)
        seen = self.json()
        capture, products = seen["postgres"]["capture"], seen["datasets"]["products"]
        ((slot, pid),) = self.sql("SELECT slot_name, active_pid FROM pg_replication_slots")
        self.assertEqual((capture["state"], capture["problem"], capture["slot"]), ("streaming", None, slot))
        self.assertEqual((capture["transactions"], capture["keys"], capture["restarts"]), (1, 1, {}))
        self.assertEqual((products["capture"], products["not_logical"]), ("logical", None))
        self.assertRegex(
            self.why(),
            rf"Changes of its tables are read from the write-ahead log \(slot {slot}, \d\.\d\d s behind\)\.",
        )
        self.assertNotIn("listening", self.why())
        self.assertIn(", capturing from the log", self.head())
        self.assertEqual(self.problems(), [])
        now = await self.metrics()
        for name, value in (("up", 1), ("keys_total", 1), ("transactions_total", 1), ("lag_bytes", 0)):
            self.assertEqual(now[place(f"cacheservice_capture_{name}")], value, name)
        self.assertEqual(now[place("cacheservice_capture_logical", dataset="products")], 1)
        self.assertLess(now[place("cacheservice_capture_lag_seconds")], 1)
        self.assertGreaterEqual(now[place("cacheservice_capture_retained_bytes")], 0)
        self.assertNotIn(place("cacheservice_capture_retained_limit_bytes"), now)
        self.sql("DROP PUBLICATION cacheservice")
        self.sql(f"SELECT pg_terminate_backend({pid})")
        await self.until_state("impossible")
        self.assertIn("Changes of its tables were read from the write-ahead log until the last refresh.", self.why())
        self.assertIn("there is no publication cacheservice; run cacheservice watch --logical", self.why())
        (problem,) = self.problems()
        self.assertIn("changes are not captured from the log: there is no publication cacheservice", problem)
        now = await self.metrics()
        self.assertEqual(now[place("cacheservice_capture_up")], 0)
        self.assertEqual(now[place("cacheservice_capture_restarts_total", reason="lost")], 1)
        self.assertEqual(now[place("cacheservice_capture_keys_total")], 1)

    async def test_a_slot_that_waits(self) -> None:
        """The session with the open transaction is named until it ends."""
        self.sql("CREATE PUBLICATION cacheservice FOR TABLE products")
        with closing(psycopg2.connect(self.dsn, application_name="a_batch")) as writer:
            writer.cursor().execute("UPDATE products SET n = 7 WHERE id = 2")
            pid = writer.info.backend_pid
            self.start("logical")
            await self.until_state("waiting")
            await self.until(lambda: self.products.snapshot)
            await self.refreshed()
            waits = f"the slot waits for open transactions: session {pid} of postgres (a_batch)"
            seen = self.json()
            capture, products = seen["postgres"]["capture"], seen["datasets"]["products"]
            self.assertEqual(capture["state"], "waiting")
            self.assertIn(waits, capture["problem"])
            self.assertEqual((products["capture"], products["not_logical"]), ("nothing", None))
            self.assertIn(waits, self.why())
            self.assertIn("Deltas do not work: all rows have been read", self.why())
            self.assertIn(f", NOT capturing from the log: {waits}", self.head())
            (problem,) = self.problems()
            self.assertIn(f"changes are not captured from the log: {waits}", problem)
            now = await self.metrics()
            self.assertEqual(now[place("cacheservice_capture_up")], 0)
            self.assertEqual(now[place("cacheservice_capture_logical", dataset="products")], 0)
            self.assertNotIn(place("cacheservice_capture_lag_bytes"), now)
            writer.commit()
        await self.until_state("streaming")
        # A stream that has begun has the datasets read, from which deltas then start.
        await self.until(lambda: self.json()["datasets"]["products"]["capture"] == "logical")
        self.assertEqual(self.problems(), [])

    async def test_triggers_alone(self) -> None:
        """If nobody has set logical decoding up, `json` and `why` have the reason, and nothing is a problem."""
        migrate(self.dsn, shipped.folder("migrations"))
        await deferToThread(watch, self.dsn, "products", ["id"], notify=False, dry_run=False, show=lambda _: None)
        self.start("auto")
        await self.until_state("impossible")
        await self.until(lambda: self.products.snapshot)
        await self.refreshed()
        seen = self.json()
        missing = "there is no publication cacheservice; run cacheservice watch --logical"
        self.assertIn(missing, seen["postgres"]["capture"]["problem"])
        products = seen["datasets"]["products"]
        self.assertEqual(products["capture"], "triggers")
        self.assertIn(missing, products["not_logical"])
        by_triggers = "Changes of its tables are recorded by triggers, not read from the write-ahead log: "
        self.assertIn(f"{by_triggers}{missing}", self.why())
        self.assertNotIn("captur", self.head())
        self.assertEqual(self.problems(), [])
