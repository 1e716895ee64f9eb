"""Laws of the metrics: each format has the same values, and the values are right."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time

from prometheus_client.parser import text_string_to_metric_families as parse_text
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from cacheservice.ops.stall import BOUNDS_S, TICK_S, StallWatch
from tests.kit.daemon import PRODUCTS
from tests.kit.metrics import of_monitor_lines, of_openmetrics, of_text, place
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
        """Refreshes and rows of the database, reads of both ports by result, and rejected clients."""
        daemon = self.started(self.configuration(STEADY, PRICES, REFUSED, "[limits]\nmax_connections = 50\n"))
        wait_until(lambda: daemon.json()["datasets"]["refused"]["last_attempt"], "a failure")
        wait_until(
            lambda: (daemon.json()["datasets"]["products"]["last_attempt"] or {}).get("outcome") == "unchanged",
            "a second refresh",
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
        """Too many clients, wrong passwords and tokens, and invalid requests, by port and reason."""
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
        """gzip on request, HEAD without a body, 405 for other methods, text for whatever else is accepted."""
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
        """Metrics are served beyond the machine without a token, when data is not, and to clients without the token."""
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
