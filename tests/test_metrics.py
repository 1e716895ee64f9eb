"""Laws of the metrics: each form in which they are asked for tells the same, and what it tells is so."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cacheservice.ops.stall import BOUNDS_S, TICK_S, StallWatch
from tests.kit.daemon import PRODUCTS
from tests.kit.datasets import declared
from tests.kit.metrics import Series, World, of_monitor_lines, of_openmetrics, of_text, place
from tests.kit.paths import ROOT
from tests.kit.real_service import RealServiceTestCase
from tests.kit.waiting import GIVE_UP_S, wait_until

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

# What the contract names, with the kind and the labels of each. A histogram's buckets have "le" besides.
CONTRACT = {
    "cacheservice_dataset_age_seconds": ("gauge", {"dataset"}),
    "cacheservice_dataset_rows": ("gauge", {"dataset"}),
    "cacheservice_dataset_bytes": ("gauge", {"dataset"}),
    "cacheservice_dataset_generation": ("gauge", {"dataset"}),
    "cacheservice_dataset_state": ("gauge", {"dataset", "state"}),
    "cacheservice_dataset_held": ("gauge", {"dataset"}),
    "cacheservice_dataset_last_success_timestamp_seconds": ("gauge", {"dataset"}),
    "cacheservice_refresh_total": ("counter", {"dataset", "outcome"}),
    "cacheservice_refresh_duration_seconds": ("histogram", {"dataset"}),
    "cacheservice_refresh_rows_total": ("counter", {"dataset"}),
    "cacheservice_refresh_queue_depth": ("gauge", set()),
    "cacheservice_reads_total": ("counter", {"dataset", "port", "result"}),
    "cacheservice_connections": ("gauge", {"port"}),
    "cacheservice_rejected_total": ("counter", {"port", "reason"}),
    "cacheservice_reactor_stall_seconds": ("histogram", set()),
    "cacheservice_postgres_up": ("gauge", set()),
    "cacheservice_ready": ("gauge", set()),
    "cacheservice_build_info": ("gauge", {"version", "python", "twisted"}),
    "process_cpu_seconds_total": ("counter", set()),
    "process_resident_memory_bytes": ("gauge", set()),
    "process_open_fds": ("gauge", set()),
    "process_start_time_seconds": ("gauge", set()),
}


EVENTS = [
    "publish",
    "published",
    "unchanged",
    "held",
    "failed",
    "hold",
    "renew",
    "pin",
    "age",
    "count",
    "read",
    "declare",
]


class Forms(SynchronousTestCase):
    def assert_same(self, ours: Series, theirs: Series) -> None:
        """Shows what differs alone: a diff of all of them takes seconds."""
        places = ours.keys() | theirs.keys()
        differing = {at: (ours.get(at), theirs.get(at)) for at in places if ours.get(at) != theirs.get(at)}
        self.assertEqual(differing, {})

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["products", "prices"]), st.sampled_from(EVENTS), st.integers(0, 50))))
    def test_all_forms_tell_the_same(self, events: list[tuple[str, str, int]]) -> None:
        """Whatever happens, and after each of it: the text, OpenMetrics, the lines of mntr, and what prometheus-client
        makes of `collect`, hold the same series with the same values; both formats' own parsers take them.
        """
        world = World()
        for name, what, number in events:
            world.do(world.cache.dataset(name), what, number)
            self.assert_same(of_text(world.text()), of_text(generate_latest(world.metrics)))
        expected = of_text(generate_latest(world.metrics))
        self.assert_same(of_text(world.text()), expected)
        self.assert_same(of_monitor_lines(world.monitor_lines()), expected)
        openmetrics = of_openmetrics(generate_openmetrics(world.metrics))
        self.assert_same(of_openmetrics(world.text(openmetrics=True)), openmetrics)
        self.assert_same(openmetrics, expected)
        pushed = {place(sample.name, **sample.labels): sample.value for _, sample in world.metrics.samples()}
        self.assert_same({at: value for at, value in pushed.items() if not at[0].startswith("process_")}, expected)

    def test_help_and_type(self) -> None:
        """Each family is told once, with a sentence of help and its kind, by both formats, as the library tells it."""
        world = World()
        world.publish(world.cache.dataset("products"))
        for ours, theirs in (
            (world.text(), generate_latest(world.metrics)),
            (world.text(openmetrics=True), generate_openmetrics(world.metrics)),
        ):
            told, expected = ([line for line in text.splitlines() if line[:1] == b"#"] for text in (ours, theirs))
            self.assertEqual(told, expected)
            self.assertEqual(len(set(told)), len(told))

    def test_before_the_first_load(self) -> None:
        """What is not known yet is not there, rather than 0; what was counted is there from the start, as 0."""
        world = World()
        now = of_text(world.text())
        self.assertNotIn(place("cacheservice_dataset_age_seconds", dataset="products"), now)
        self.assertNotIn(place("cacheservice_dataset_last_success_timestamp_seconds", dataset="products"), now)
        self.assertEqual(now[place("cacheservice_dataset_state", dataset="products", state="never_loaded")], 1)
        self.assertEqual(now[place("cacheservice_refresh_total", dataset="products", outcome="failed")], 0)
        self.assertEqual(now[place("cacheservice_reads_total", dataset="prices", port="http", result="hit")], 0)
        self.assertEqual(now[place("cacheservice_rejected_total", port="resp", reason="auth_failed")], 0)
        self.assertEqual(now[place("cacheservice_ready")], 0)

    def test_the_histogram_of_refreshes(self) -> None:
        """A bucket counts what took no longer than its bound says, the bound itself included."""
        world = World()
        dataset = world.cache.dataset("products")
        for took_s in (0.01, 0.02, 0.5, 1000.0):
            world.attempt(dataset, "published", took_s)
        now = of_text(world.text())
        for bound, count in (("0.01", 1), ("0.025", 2), ("0.25", 2), ("0.5", 3), ("300.0", 3), ("+Inf", 4)):
            at = place("cacheservice_refresh_duration_seconds_bucket", dataset="products", le=bound)
            self.assertEqual(now[at], count, bound)
        self.assertEqual(now[place("cacheservice_refresh_duration_seconds_count", dataset="products")], 4)
        self.assertEqual(now[place("cacheservice_refresh_duration_seconds_sum", dataset="products")], 1000.53)

    def test_a_reload(self) -> None:
        """The series of a dataset that is removed go away; those of one that comes again count on; none goes down."""
        world = World()
        products = world.cache.dataset("products")
        world.publish(products, 5)
        world.attempt(products, "published")
        products.counts.resp.hits += 7
        before = of_text(world.text())
        world.cache.declare([declared("prices"), declared("flags")])
        without = of_text(world.text())
        named = {dict(labels).get("dataset") for _, labels in without}
        self.assertEqual(named, {None, "prices", "flags"})
        self.assertNotIn('dataset="products"', world.monitor_lines())
        world.attempt(products, "failed")  # which was under way when it was removed
        self.assertEqual(set(world.metrics._lines), {"prices", "flags"})
        world.cache.declare([declared("prices"), declared("products", max_age_s=7.0)])
        again = of_text(world.text())
        counters = [at for at in before if at[0].endswith(("_total", "_bucket", "_count", "_sum"))]
        self.assertEqual([(at, again[at]) for at in counters if again[at] < before[at]], [])
        self.assertEqual(again[place("cacheservice_reads_total", dataset="products", port="resp", result="hit")], 7)
        self.assertEqual(again[place("cacheservice_dataset_generation", dataset="products")], 0)
        self.assertEqual(again[place("cacheservice_dataset_max_age_seconds", dataset="products")], 7)

    def test_ready_before_they_are_asked_for(self) -> None:
        """What an attempt changes is rendered when it ends: a scrape after it needs no more turns."""
        world = World(*(f"d{number}" for number in range(350)))
        world.text()
        before = world.clock.turns
        for dataset in world.cache.datasets.values():
            world.publish(dataset)
            world.attempt(dataset, "published")
        world.text()
        self.assertEqual(world.clock.turns, before + 1)

    def test_no_turn_is_long(self) -> None:
        """When all of many datasets have changed, the reactor has its turn after each hundred, and before them all;
        what is removed and added meanwhile does no harm.
        """
        world = World(*(f"d{number}" for number in range(350)))
        world.text()
        self.assertEqual(world.clock.turns, 4)
        world.text()
        self.assertEqual(world.clock.turns, 5)
        for dataset in world.cache.datasets.values():
            world.publish(dataset)
        coming = Deferred.fromCoroutine(world.metrics.exposition(openmetrics=False))
        self.assertFalse(coming.called)
        world.cache.declare([declared("d300"), declared("new")])
        world.clock.advance(0)
        self.assertEqual({dict(labels).get("dataset") for _, labels in of_text(coming.result)}, {None, "d300", "new"})


class Stalls(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.watch = StallWatch(self.clock)
        self.watch.startService()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))
        self.addCleanup(self.watch.stopService)

    def test_ticks_in_time(self) -> None:
        """A reactor that is there all the time is never late."""
        for _ in range(2000):
            self.clock.advance(TICK_S / 4)
        self.assertEqual(sum(self.watch.lateness.counts), 500)
        self.assertEqual(self.watch.lateness.total, 0)

    @given(st.floats(0.001, 100))
    def test_a_long_turn(self, stall_s: float) -> None:
        """It is one late tick, later by what the turn took less at most a tick; and those that follow are in time."""
        clock = Clock()
        watch = StallWatch(clock)
        watch.startService()
        clock.advance(TICK_S)
        before_s = watch.lateness.total
        clock.advance(stall_s)
        late_s = watch.lateness.total - before_s
        self.assertTrue(stall_s - TICK_S - 1e-9 <= late_s <= stall_s + 1e-9, late_s)
        self.assertLessEqual(sum(watch.lateness.counts), 2)
        watch.stopService()
        self.assertEqual(clock.getDelayedCalls(), [])


class RealStalls(TestCase):
    async def test_the_reactor_is_held(self) -> None:
        """What really holds the reactor is seen as that long, less a tick at most."""
        watch = StallWatch(reactor)
        watch.startService()
        self.addCleanup(watch.stopService)
        await deferLater(reactor, 0.05)
        time.sleep(0.3)  # noqa: ASYNC251  # it is to hold the reactor
        await deferLater(reactor, 0.05)
        from_a_quarter = BOUNDS_S.index(0.25) + 1
        self.assertGreaterEqual(sum(watch.lateness.counts[from_a_quarter:]), 1)
        self.assertGreaterEqual(watch.lateness.total, 0.3 - TICK_S)


# Every read returns the same rows, so that all but the first are "unchanged".
STEADY = PRODUCTS.replace(", clock_timestamp() AS read_at", "")
PRICES = """
[datasets.prices]
query = "SELECT id, repeat('x', 5000) AS text FROM generate_series(1, 200) AS id"
key = "id"
"""
REFUSED = """
[datasets.refused]
query = "SELECT 1 AS id FROM no_such_table"
key = "id"
"""
# What a Prometheus server of 2026 sends.
PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


class RealService(RealServiceTestCase):
    def test_the_names_of_the_contract(self) -> None:
        """Each is there with its kind and its labels, in the text, in OpenMetrics, and in mntr; all are in the docs."""
        daemon = self.started(self.configuration(PRODUCTS, PRICES))
        daemon.wait_until_ready()
        answer = self.get(daemon)
        self.assertEqual(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8")
        families = {family.name: family for family in parse_text(answer.body.decode())}
        for name, (kind, labels) in CONTRACT.items():
            family = families[name.removesuffix("_total") if kind == "counter" else name]
            self.assertEqual(family.type, kind, name)
            self.assertTrue(family.documentation)
            self.assertTrue(family.samples, name)
            for sample in family.samples:
                self.assertEqual(set(sample.labels) - {"le"}, labels, name)
        openmetrics = self.get(daemon, Accept=PROMETHEUS_ACCEPT)
        self.assertEqual(
            openmetrics.headers["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8"
        )
        self.assertEqual(set(of_openmetrics(openmetrics.body)), set(of_text(answer.body)))
        self.assertEqual(set(of_monitor_lines(daemon.ask("mntr"))), set(of_text(answer.body)))
        for family in families.values():
            name = family.name + ("_total" if family.type == "counter" else "")
            if name.startswith("cacheservice_"):
                labels = {label for sample in family.samples for label in sample.labels} - {"le"}
                row = re.search(rf"^\| `{name}` \| (\w+) \|([^|]*)\|", PAGE, re.M)
                assert row is not None, f"{name} is not in docs/metrics.md"
                self.assertEqual(row[1], family.type, name)
                self.assertEqual(set(re.findall(r"\w+", row[2])), labels, name)

    def test_what_is_counted(self) -> None:
        """Refreshes and rows of the database, reads of both ports by what they got, and who was turned away."""
        daemon = self.started(self.configuration(STEADY, PRICES, REFUSED, "[limits]\nmax_connections = 50\n"))
        wait_until(lambda: daemon.json()["datasets"]["refused"]["last_attempt"], "a failure")
        wait_until(
            lambda: daemon.json()["datasets"]["products"]["last_attempt"]["outcome"] == "unchanged", "a second refresh"
        )
        get = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n"
        hits = [get % (len(key), key) for key in (b"prices:%d" % number for number in range(1, 201))]
        # A megabyte: more than a turn may send, so that some are answered twice over before they are sent.
        others = [get % (10, b"products:1"), get % (10, b"products:9"), get % (9, b"refused:1"), get % (6, b"none:1")]
        more = [
            b"MGET products:1 products:2 products:77 prices:1\r\n",
            b"HGET products 2\r\nHGET products nope\r\nHMGET products 1 2 8\r\nHGETALL products\r\nHGETALL refused\r\n",
            b"EXISTS products:1\r\nHLEN products\r\nTTL products:1\r\nDBSIZE\r\n",
            b"MULTI\r\nGET products:1\r\nGET products:78\r\nEXEC\r\n",
        ]
        self.resp(daemon, *hits, *others, *hits[:50], *more, until_bytes=b"$7\r\nthe-end\r\n")
        for path in ("products", "products/rows/1", "products/rows/1", "products/rows/9", "refused", "refused/rows/1"):
            self.get(daemon, f"/v1/datasets/{path}")
        now = self.now(daemon)

        def reads(dataset: str, port: str) -> list[float]:
            results = ("hit", "miss", "loading", "stale")
            return [
                now[place("cacheservice_reads_total", dataset=dataset, port=port, result=result)] for result in results
            ]

        self.assertEqual(reads("prices", "resp"), [251, 0, 0, 0])
        self.assertEqual(reads("products", "resp"), [1 + 2 + 1 + 2 + 1 + 1, 1 + 1 + 1 + 1 + 1, 0, 0])
        self.assertEqual(reads("refused", "resp"), [0, 0, 2, 0])
        self.assertEqual(reads("products", "http"), [3, 1, 0, 0])
        self.assertEqual(reads("refused", "http"), [0, 0, 2, 0])
        self.assertNotIn("none", {dict(labels).get("dataset") for _, labels in now})
        refreshes = {
            outcome: now[place("cacheservice_refresh_total", dataset="products", outcome=outcome)]
            for outcome in ("published", "unchanged", "held", "failed")
        }
        self.assertEqual(refreshes["published"], 1)
        self.assertGreaterEqual(refreshes["unchanged"], 1)
        count = now[place("cacheservice_refresh_duration_seconds_count", dataset="products")]
        self.assertEqual(count, sum(refreshes.values()))
        self.assertEqual(now[place("cacheservice_refresh_rows_total", dataset="products")], 3 * count)
        self.assertEqual(now[place("cacheservice_dataset_changed_rows_total", dataset="products", change="added")], 3)
        self.assertGreaterEqual(now[place("cacheservice_refresh_total", dataset="refused", outcome="failed")], 1)
        self.assertEqual(now[place("cacheservice_postgres_up")], 1)
        self.assertEqual(now[place("cacheservice_ready")], 0)
        self.assertEqual(now[place("cacheservice_connections_limit", port="resp")], 50)
        ticks = place("cacheservice_reactor_stall_seconds_count")
        wait_until(lambda: self.now(daemon)[ticks] > now[ticks], "another measure of the reactor")

    def test_what_is_rejected(self) -> None:
        """Too many clients, wrong passwords and tokens, and what is no request, by port and reason."""
        tables = (
            '[limits]\nmax_connections = 3\n[resp]\nport = 0\npassword = "right"\n[http]\nport = 0\ntoken = "right"\n'
        )
        configuration = self.configuration(PRODUCTS, tables).replace("[resp]\nport = 0\n[http]\nport = 0\n", "", 1)
        daemon = self.started(configuration)
        daemon.wait_until_ready()
        resp_port = self.port_of(daemon, "resp")
        for said, heard in ((b"AUTH wrong\r\n", b"-WRONGPASS"), (b"*x\r\n", b"-ERR Protocol error")):
            with socket.create_connection(("127.0.0.1", resp_port), timeout=GIVE_UP_S) as client:
                client.sendall(said)
                self.assertTrue(client.recv(1000).startswith(heard))
        wait_until(
            lambda: self.now(daemon)[place("cacheservice_connections", port="resp")] == 0, "the end of the clients"
        )
        crowd = [socket.create_connection(("127.0.0.1", resp_port), timeout=GIVE_UP_S) for _ in range(4)]
        self.assertTrue(crowd[-1].recv(1000).startswith(b"-ERR max number of clients"))
        self.assertEqual(self.get(daemon, "/v1/datasets").status, 401)
        self.assertEqual(self.get(daemon, "/v1/datasets", Authorization="Bearer wrong").status, 401)
        self.assertEqual(self.get(daemon, "/v1/datasets", Authorization="Bearer right").status, 200)
        self.assertEqual(self.get(daemon, Host="not a host").status, 400)
        daemon.ask("x" * 300)
        now = self.now(daemon)
        self.assertEqual(now[place("cacheservice_connections", port="resp")], 3)
        rejected = {
            (dict(labels)["port"], dict(labels)["reason"]): value
            for (name, labels), value in now.items()
            if name == "cacheservice_rejected_total" and value
        }
        self.assertEqual(
            rejected,
            {
                ("resp", "auth_failed"): 1,
                ("resp", "protocol_error"): 1,
                ("resp", "too_many_connections"): 1,
                ("http", "auth_failed"): 2,
                ("http", "protocol_error"): 1,
                ("status", "protocol_error"): 1,
            },
        )
        for client in crowd:
            client.close()

    def test_how_it_is_served(self) -> None:
        """gzip for who asks for it, HEAD without a body, 405 for other methods, text for whatever else is accepted."""
        daemon = self.started()
        daemon.wait_until_ready()
        zipped = self.get(daemon, Accept_Encoding="gzip")
        self.assertEqual(zipped.headers["content-encoding"], "gzip")
        self.assertEqual(set(of_text(gzip.decompress(zipped.body))), set(self.now(daemon)))
        head = self.get(daemon, method="HEAD")
        self.assertEqual((head.status, head.body), (200, b""))
        self.assertGreater(int(head.headers["content-length"]), 1000)
        for method in ("POST", "PUT", "DELETE"):
            self.assertEqual(self.get(daemon, method=method).status, 405)
        for accept in (
            "*/*",
            "text/plain",
            "application/json",
            "text/plain;version=0.0.4, application/openmetrics-text;q=0",
        ):
            answer = self.get(daemon, Accept=accept)
            self.assertEqual((answer.status, answer.headers["content-type"][:10]), (200, "text/plain"), accept)
        self.assertEqual(zipped.headers["cache-control"], "no-store")

    def test_without_a_token(self) -> None:
        """Metrics are served beyond the machine without a token, when data are not, and with one to who has none."""
        for http, status in (('host = "0.0.0.0"', 403), ('host = "0.0.0.0"\ntoken = "secret"', 401)):
            configuration = self.configuration().replace("[http]\n", f"[http]\n{http}\n")
            daemon = self.started(configuration)
            daemon.wait_until_ready()
            self.assertEqual(self.get(daemon, "/v1/datasets").status, status)
            self.assertEqual(self.get(daemon).status, 200)
            self.assertNotIn(b"secret", self.get(daemon).body)
            daemon.kill()

    def test_a_reload_of_the_real_service(self) -> None:
        """SIGHUP with one dataset less and one more: their series go and come, the others count on."""
        daemon = self.started(self.configuration(PRODUCTS, PRICES))
        daemon.wait_until_ready()
        self.get(daemon, "/v1/datasets/products")
        before = self.now(daemon)
        (self.directory / "cacheservice.toml").write_text(self.configuration(PRODUCTS, REFUSED))
        daemon.process.send_signal(1)
        daemon.event("config_reloaded")
        now = self.now(daemon)
        self.assertEqual({dict(labels).get("dataset") for _, labels in now}, {None, "products", "refused"})
        hits = place("cacheservice_reads_total", dataset="products", port="http", result="hit")
        self.assertEqual((before[hits], now[hits]), (1, 1))
        self.assertEqual(json.loads(self.get(daemon, "/v1/datasets/prices").body)["status"], 404)
