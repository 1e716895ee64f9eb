"""Laws of the probes, on the real service: alive as long as it runs, ready when clients should be sent to it."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from http.client import HTTPConnection, HTTPException

from tests.kit.daemon import PRODUCTS, SLOW, STOP_LIMIT_S, Daemon
from tests.kit.metrics import place
from tests.kit.real_service import ProbesTestCase
from tests.kit.waiting import GIVE_UP_S, wait_until

LARGE = """
[datasets.large]
query = "SELECT id, repeat('x', 1000) AS text FROM generate_series(1, 20000) AS id"
key = "id"
interval_s = 1
max_age_s = 600
"""
# Takes its time to stop, after all others but the ports that probes ask: what a slow disk does to a save.
SLOW_STOP = """
from twisted.application.service import IServiceCollection, Service
from twisted.internet.task import deferLater
class Slow(Service):
    def stopService(self):
        return deferLater(reactor, 1.5, lambda: None)
(root,) = IServiceCollection(application)
root.services.insert(0, Slow())
"""


class Probes(ProbesTestCase):
    def test_before_the_first_load(self) -> None:
        """At the start it is alive, and not ready for as long as a required dataset has not been loaded."""
        daemon = self.started(self.configuration(PRODUCTS, SLOW))
        wait_until(lambda: daemon.generation() == 1, "the one that is quick")
        self.assert_not_ready(daemon, {"slow": "never_loaded"})

    def test_what_is_not_required(self) -> None:
        """A dataset that is not required keeps nobody away."""
        daemon = self.started(self.configuration(PRODUCTS, f"{SLOW}required = false\n"))
        self.wait_ready(daemon)

    def test_a_database_that_is_frozen_or_down(self) -> None:
        """It stays alive, and ready for as long as what it serves may be served; and is ready again by itself."""
        quick = PRODUCTS.replace("max_age_s = 600", 'max_age_s = 2\ntimeout_s = 1\non_expired = "refuse"')
        lasting = '[datasets.lasting]\nquery = "SELECT 1 AS id"\nkey = "id"\ninterval_s = 0.3\nmax_age_s = 600\n'
        daemon = self.started(self.configuration(quick, lasting))
        self.wait_ready(daemon)
        freeze = partial(self.server.freeze, backends=True)  # a kept session works on without the postmaster
        for begin, end in ((freeze, self.server.thaw), (self.server.stop, self.server.start)):
            begin()
            self.addCleanup(end)
            wait_until(lambda: self.readyz(daemon)[0] == 503, "the end of its age")
            self.assert_not_ready(daemon, {"products": "expired"})
            self.assertEqual(self.now(daemon)[place("cacheservice_postgres_up")], 0)
            end()
            self.wait_ready(daemon)

    def test_an_outage_longer_than_max_age(self) -> None:
        """Expired data that may be served keep it ready, on both ports and in the metrics: they are for alerts."""
        daemon = self.started(self.configuration(PRODUCTS.replace("max_age_s = 600", "max_age_s = 1\ntimeout_s = 1")))
        self.wait_ready(daemon)
        self.server.stop()
        self.addCleanup(self.server.start)
        wait_until(lambda: daemon.json()["datasets"]["products"]["state"] == "expired", "the end of its age")
        self.wait_ready(daemon)
        self.assertEqual(self.now(daemon)[place("cacheservice_ready")], 1)
        self.assertEqual(self.get(daemon, "/v1/datasets/products/rows/1").status, 200)

    def test_under_load(self) -> None:
        """While clients pipe thousands of GETs and download whole datasets, and datasets are refreshed, probes are
        answered, with the same answers as at rest.
        """
        daemon = self.started(self.configuration(PRODUCTS, LARGE))
        self.wait_ready(daemon)
        done = threading.Event()
        loads = [Load(daemon, work, done) for work in (self.pipe, self.pipe, self.download, self.download)]
        try:
            wait_until(lambda: all(load.rounds > 1 for load in loads), "the load")
            for _ in range(100):
                self.assertEqual(self.livez(daemon)[0], 200)
                self.assertEqual(self.readyz(daemon), (200, {"status": "ready"}))
                self.assertEqual(daemon.ask("ready"), "ready")
        finally:
            done.set()
            for load in loads:
                load.join()
        self.assertEqual([load.error for load in loads], [None] * 4)

    def pipe(self, daemon: Daemon) -> None:
        gets = b"".join(b"GET large:%d\r\n" % number for number in range(1, 1001))
        self.resp(daemon, gets, until_bytes=b"$7\r\nthe-end\r\n")

    def download(self, daemon: Daemon) -> None:
        assert len(self.get(daemon, "/v1/datasets/large").body) > 20_000_000


class Load(threading.Thread):
    """Does `work` again and again, until `done`; `error` is what went wrong."""

    def __init__(self, daemon: Daemon, work: Callable[[Daemon], None], done: threading.Event) -> None:
        super().__init__()
        self.of, self.work, self.done = daemon, work, done
        self.rounds = 0
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self.done.is_set():
                self.work(self.of)
                self.rounds += 1
        except Exception as error:
            self.error = error


class Stopping(ProbesTestCase):
    def stopping(self, *tables: str) -> Daemon:
        """One that has begun to stop, and has closed what it does not need."""
        daemon = self.started(self.configuration(*tables), tac=self.tac_with(SLOW_STOP))
        daemon.wait_until_ready()
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.readyz(daemon)[0] == 503, "the stop")
        return daemon

    def test_what_it_says(self) -> None:
        """From the moment at which the stop begins, both ports report that it is stopping, for as long as it takes; it
        is alive until it ends, and goes on to serve what needs no refresh, while the RESP port is closed.
        """
        daemon = self.stopping(PRODUCTS)
        self.assertEqual(self.readyz(daemon), (503, {"status": "stopping", "not_ready": {}}))
        self.assertEqual(daemon.ask("ready"), "notready stopping")
        self.assertIn(": stopping, ", daemon.ask("status").splitlines()[0])
        self.assertIs(daemon.json()["service"]["ready"], False)
        self.assertEqual(self.livez(daemon), (200, {"status": "alive"}))
        self.assertEqual(self.now(daemon)[place("cacheservice_ready")], 0)
        self.assertEqual(self.get(daemon, "/v1/datasets/products/rows/1").status, 200)
        answer = self.get(daemon, "/v1/datasets/products/rows/1?max_age=0")
        self.assertEqual((answer.status, json.loads(answer.body)["detail"]), (503, "the service is stopping"))
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port_of(daemon, "resp")), timeout=GIVE_UP_S)
        daemon.process.wait(STOP_LIMIT_S)
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_until_the_end(self) -> None:
        """On a connection that was there before, and on new ones, each answer is that it is stopping, until there is
        none: never is it ready again.
        """
        daemon = self.stopping(PRODUCTS)
        said = set()
        while daemon.process.poll() is None:
            try:
                said.add(self.readyz(daemon)[0])
            except (OSError, HTTPException):
                break
        self.assertEqual(said, {503})
        daemon.process.wait(STOP_LIMIT_S)
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_an_outage_longer_than_max_age(self) -> None:
        """Expired data that may be served keep it ready, on both ports and in the metrics: they are for alerts."""
        daemon = self.started(self.configuration(PRODUCTS.replace("max_age_s = 600", "max_age_s = 1\ntimeout_s = 1")))
        self.wait_ready(daemon)
        self.server.stop()
        self.addCleanup(self.server.start)
        wait_until(lambda: daemon.json()["datasets"]["products"]["state"] == "expired", "the end of its age")
        self.wait_ready(daemon)
        self.assertEqual(self.now(daemon)[place("cacheservice_ready")], 1)
        self.assertEqual(self.get(daemon, "/v1/datasets/products/rows/1").status, 200)

    def test_under_load(self) -> None:
        """It reports that in the midst of downloads and pipelines, too, and ends in time."""
        daemon = self.started(self.configuration(PRODUCTS, LARGE), tac=self.tac_with(SLOW_STOP))
        daemon.wait_until_ready()
        port = self.port_of(daemon, "http")
        clients = [socket.create_connection(("127.0.0.1", port), timeout=GIVE_UP_S) for _ in range(20)]
        for client in clients:
            client.sendall(b"GET /v1/datasets/large HTTP/1.1\r\nHost: test\r\n\r\n")
        with closing(HTTPConnection("127.0.0.1", port, timeout=GIVE_UP_S)) as kept:
            kept.request("GET", "/readyz")
            self.assertEqual(kept.getresponse().read(), b'{"status": "ready"}\n')
            daemon.process.send_signal(signal.SIGTERM)
            daemon.event("service_stopping")
            kept.request("GET", "/readyz")
            answer = kept.getresponse()
            self.assertEqual((answer.status, json.loads(answer.read())["status"]), (503, "stopping"))
        daemon.process.wait(STOP_LIMIT_S)
        self.assert_ended(daemon, -signal.SIGTERM)
        for client in clients:
            client.close()
