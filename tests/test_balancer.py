"""A real HAProxy before two services, whose readiness decides which of them gets requests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.ports import free_port
from tests.kit.postgres import connect
from tests.kit.waiting import GIVE_UP_S, wait_until

PROGRAM = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
NEEDED = "needs HAProxy: apt-get install haproxy"

PRODUCTS = """
[datasets.products]
query = "SELECT id, n FROM products"
key = "id"
interval_s = 0.3
max_age_s = 1.5
timeout_s = 10
retry_initial_s = 0.1
retry_max_s = 0.3
"""

_CONFIGURATION = """
global
    stats socket {directory}/stats mode 600 level admin
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend cache
    bind 127.0.0.1:{port}
    default_backend caches
backend caches
    option httpchk GET /readyz
    http-check expect status 200
    default-server inter 100ms fall 2 rise 1
    server one 127.0.0.1:{one} check
    server two 127.0.0.1:{two} check
"""


class Balanced(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        assert PROGRAM is not None, NEEDED
        with self.connected() as cursor:
            cursor.execute("CREATE TABLE products AS SELECT i AS id, 0 AS n FROM generate_series(1, 10) AS i")
        self.daemons = [self.service(name) for name in ("one", "two")]
        for daemon in self.daemons:
            daemon.wait_until_ready()
        self.port = free_port()
        self.proxy()
        wait_until(lambda: self.states() == ["UP", "UP"], "two servers that are up")

    @contextmanager
    def connected(self) -> Iterator[Any]:
        connection = connect(self.server, self.database)
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def service(self, name: str) -> Daemon:
        directory = self.directory / name
        directory.mkdir()
        daemon = Daemon(directory, self.configuration(PRODUCTS))
        self.addCleanup(daemon.kill)
        return daemon

    def proxy(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, directory)
        ports = [int(daemon.event("service_started")["http"].rpartition(":")[2]) for daemon in self.daemons]
        self.stats = directory / "stats"
        configuration = directory / "haproxy.cfg"
        configuration.write_text(_CONFIGURATION.format(directory=directory, port=self.port, one=ports[0], two=ports[1]))
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen([str(PROGRAM), "-db", "-f", configuration], stdout=log, stderr=log)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)

    def states(self) -> list[str]:
        """Of both servers, as HAProxy sees them."""
        if not self.stats.exists():
            return []
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.stats))
            client.sendall(b"show stat\n")
            with client.makefile() as answer:
                rows = [line.split(",") for line in answer if line.startswith("caches,")]
        return [row[17].partition(" ")[0] for row in rows if row[1] in ("one", "two")]

    def get(self) -> tuple[int, bytes]:
        client = HTTPConnection("127.0.0.1", self.port, timeout=GIVE_UP_S)
        try:
            client.request("GET", "/v1/datasets/products/rows/7")
            response = client.getresponse()
            return response.status, response.read()
        finally:
            client.close()

    def test_an_outage_longer_than_the_greatest_age(self) -> None:
        """While the database is down, for longer than `max_age_s`, both stay in the balancer, and every request is
        answered; afterwards the new rows come."""
        self.server.stop("immediate")
        states, statuses = set(), set()

        def all_expired() -> bool:
            states.update(self.states())
            statuses.add(self.get())
            return all(daemon.json()["datasets"]["products"]["state"] == "expired" for daemon in self.daemons)

        wait_until(all_expired, "expired data")
        checks = [0]

        def some_more() -> bool:
            states.update(self.states())
            statuses.add(self.get())
            checks[0] += 1
            return checks[0] > 50  # a second and more: HAProxy has checked several times

        wait_until(some_more, "more answers")
        self.assertEqual((states, statuses), ({"UP"}, {(200, b'{"id":7,"n":0}')}))
        self.server.start()
        with self.connected() as cursor:
            cursor.execute("UPDATE products SET n = 1")
        wait_until(lambda: {self.get() for _ in range(4)} == {(200, b'{"id":7,"n":1}')}, "the new rows")

    def test_one_that_is_gone(self) -> None:
        """A service that has ended gets no request; the other one answers all."""
        self.daemons[1].kill()
        wait_until(lambda: self.states() == ["UP", "DOWN"], "one server that is down")
        self.assertEqual({self.get() for _ in range(10)}, {(200, b'{"id":7,"n":0}')})
