"""Laws of a whole service that captures changes from the log: at once, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator

import pytest

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.capturing import LOGICAL
from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.faulty_network import Network
from tests.kit.postgres import query
from tests.kit.resp import Client
from tests.kit.versions import MakeServer, running_server
from tests.kit.waiting import wait_until

DATASET = """
[datasets.products]
query = "SELECT id, n FROM products"
key = "id"
interval_s = 3600
watch = [{table = "public.products", key = "id"}]
"""
KILLS = int(os.environ.get("TESTS_CAPTURE_KILLS", "6"))
"""Services, walsenders and connections that are ended, in turns; the soak sets more."""


@pytest.fixture(scope="class")
def server(request: pytest.FixtureRequest, make_server: MakeServer) -> Iterator[EmbeddedPostgres]:
    with running_server(make_server, **LOGICAL) as request.cls.server:
        yield request.cls.server


class CaptureProcesses(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.sql(
            "CREATE TABLE products (id int PRIMARY KEY, n int);"
            "INSERT INTO products SELECT i, 0 FROM generate_series(1, 100) AS i;"
            "CREATE PUBLICATION cacheservice FOR TABLE products"
        )

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        return query(self.server, self.database, statement)

    def slots(self) -> list[tuple[object, ...]]:
        return self.sql(
            "SELECT slot_name, temporary, active, plugin FROM pg_replication_slots WHERE database = current_database()"
        )

    def capturing(self, port: int | None = None) -> Daemon:
        dsn = self.server.dsn(database=self.database, **({} if port is None else {"port": port}))
        admin = f'[admin]\nsocket = "{self.directory}/admin"\n'
        configuration = self.configuration(DATASET, admin, dsn=dsn)
        daemon = self.started(configuration.replace("[status]", 'capture = "logical"\n[status]', 1))
        daemon.wait_until_ready()
        self.until_streaming(daemon)
        return daemon

    def until_streaming(self, daemon: Daemon) -> None:
        wait_until(lambda: self.is_streaming(daemon), "a stream")

    def is_streaming(self, daemon: Daemon) -> bool:
        everything = daemon.json()
        capture = everything["postgres"]["capture"]
        return (
            capture is not None
            and capture["state"] == "streaming"
            and everything["datasets"]["products"]["capture"] == "logical"
        )

    def change(self, daemon: Daemon, n: int) -> None:
        """What is written is served, without an interval and without a NOTIFY."""
        host, _, port = daemon.event("service_started")["resp"].rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            client = Client(connection)
            self.sql(f"UPDATE products SET n = {n} WHERE id = 42")
            served = b'{"id":42,"n":%d}' % n
            wait_until(lambda: client.ask("GET", "products:42") == served, served.decode())

    def test_a_service(self) -> None:
        """There is one temporary slot while the service runs; none after its end, however that comes."""
        for number, end in enumerate((signal.SIGKILL, signal.SIGTERM)):
            daemon = self.capturing()
            ((_, *slot),) = self.slots()
            self.assertEqual(slot, [True, True, "pgoutput"])
            self.change(daemon, 10 + number)
            daemon.end(end)
            wait_until(lambda: not self.slots(), "the end of the slot")

    def test_kills(self) -> None:
        """After each loss another stream begins, its slot is the only one, and no change is missed."""
        choose = random.Random(20261130)
        network = Network(self.server.port)
        self.addCleanup(network.close)
        daemon = self.capturing(network.port)
        for number in range(KILLS):
            ((lost, *_),) = self.slots()
            match number % 3:
                case 0:
                    daemon.end(signal.SIGKILL)
                case 1:
                    self.sql(
                        f"SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{lost}'"
                    )
                case 2:
                    network.order("reset")
            # While nothing captures.
            self.sql(f"UPDATE products SET n = {1000 + number} WHERE id = {choose.randint(43, 100)}")
            wait_until(lambda lost=lost: lost not in [name for name, *_ in self.slots()], "the end of the slot")
            network.order("heal")
            if number % 3 == 0:
                daemon = self.capturing(network.port)
            self.until_streaming(daemon)
            self.change(daemon, 2000 + number)
            self.assertEqual(len(self.slots()), 1)
        self.check(daemon)

    def check(self, daemon: Daemon) -> None:
        """A full read finds nothing that deltas have missed."""
        before = daemon.generation()
        self.admin("refresh products")
        wait_until(lambda: "a check of the deltas" in daemon.ask("why products"), "the check")
        self.assertEqual(daemon.generation(), before)
        self.assertNotIn("delta_differences", daemon.output)
