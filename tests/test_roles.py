"""Laws of the halves of the service: each can be built alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any
from unittest import mock
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cacheservice import app
from cacheservice.app.roles import Role
from cacheservice.app.root import CacheServiceRoot
from cacheservice.ops import logs
from cacheservice.ports.listen import PortService
from tests.kit.datasets import rows_of, snapshot_of
from tests.kit.logs import Log
from tests.kit.paths import ROOT
from tests.kit.resp import Client

ADMIN_TOKEN = "operators-7c1f0e5b"
ENVIRON = {
    "CACHESERVICE_POSTGRES__DSN": "postgresql://reader@127.0.0.1:1/shop",
    "CACHESERVICE_STATUS__PORT": "0",
    "CACHESERVICE_RESP__PORT": "0",
    "CACHESERVICE_HTTP__PORT": "0",
    "CACHESERVICE_HTTP__ADMIN_TOKEN": ADMIN_TOKEN,
    "CACHESERVICE_DATASETS__PRODUCTS__QUERY": "TABLE products",
    "CACHESERVICE_DATASETS__PRODUCTS__KEY": "id",
}


class Halves(TestCase):
    def service(self, role: Role) -> CacheServiceRoot:
        """A service with these halves, which runs until the end of the test."""
        writer = logs.LineWriter(logs.destination("/dev/null"), logs.lost_line, "/dev/null")
        with mock.patch.dict("os.environ", ENVIRON):
            settings = app.load_settings(ENVIRON)
            service = app.make_service(settings, reactor, writer, logs.Threshold("info"), Log(), role)
        service.privilegedStartService()
        service.startService()
        self.addCleanup(service.stopService)
        return service

    def names(self, service: CacheServiceRoot) -> set[str]:
        return {str(child.name) for child in service}

    async def test_a_half_that_serves(self) -> None:
        """Without a database it serves what is published into its cache, and refuses what only refreshes can do."""
        service = self.service(Role.SERVE)
        self.assertEqual(self.names(service) & {"postgres", "refresh", "listener", "pruning", "signals"}, set())
        service.cache.dataset("products").publish(snapshot_of(rows_of({b"7": b'{"id":7}'})))
        ports = {child.name: child.address.port for child in service if isinstance(child, PortService)}

        def ask() -> tuple[Any, Any]:
            with socket.create_connection(("127.0.0.1", ports["resp"])) as connection:
                found = Client(connection).ask("GET", "products:7")
            with urlopen(f"http://127.0.0.1:{ports['http']}/v1/datasets/products/rows/7") as response:
                return found, json.loads(response.read())

        self.assertEqual(await deferToThread(ask), (b'{"id":7}', {"id": 7}))

    async def test_a_half_that_does_not_refresh(self) -> None:
        """Whatever needs a refresh is refused there with the reason, and is not an internal error."""
        service = self.service(Role.SERVE)
        service.cache.dataset("products").publish(snapshot_of(rows_of({b"7": b'{"id":7}'})))
        ports = {child.name: child.address.port for child in service if isinstance(child, PortService)}
        url = f"http://127.0.0.1:{ports['http']}/v1/datasets/products"

        def post(command: str) -> tuple[int, str]:
            request = Request(f"{url}/{command}", method="POST", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
            return refused(request)

        def refused(request: Request | str) -> tuple[int, str]:
            with self.assertRaises(HTTPError) as caught, urlopen(request):
                pass
            with caught.exception as error:
                return error.code, json.loads(error.read())["detail"]

        def ask() -> tuple[str, list[tuple[int, str]], Any, list[str]]:
            with socket.create_connection(("127.0.0.1", ports["resp"])) as connection:
                client = Client(connection)
                waited = str(client.ask("CACHE.WAIT", "products", 10**9, 10_000))
                found = client.ask("GET", "products:7")
            commands = [post(name) for name in ("refresh", "accept", "pin", "unpin", "rollback")]
            lines = []
            for line in (b"refresh products", b"refresh all"):
                with socket.create_connection(("127.0.0.1", ports["status"])) as connection:
                    connection.sendall(line + b"\n")
                    lines.append(connection.makefile().readline())
            return waited, [refused(f"{url}?max_age=0"), *commands], found, lines

        reason = "this process does not refresh its datasets; ask the one that does"
        waited, answers, found, lines = await deferToThread(ask)
        self.assertEqual(waited, f"ERR {reason}")
        self.assertEqual(answers, [(503, reason)] * 6)
        self.assertEqual(found, b'{"id":7}')
        self.assertEqual(lines, ["ERROR refresh is an admin command\n"] * 2)

    async def test_a_half_that_reads(self) -> None:
        """It has no port for readers, and the status port that reports on it."""
        service = self.service(Role.READ)
        self.assertEqual(self.names(service) & {"resp", "http", "status", "refresh"}, {"status", "refresh"})


class Modules(SynchronousTestCase):
    def test_a_service_imports_only_what_it_uses(self) -> None:
        """A service without workers and a fleet does not load their modules, which make a start a quarter longer."""
        names = "cacheservice.app.fleet", "cacheservice.app.workers", "cacheservice.replication", "txredisapi"
        program = f"import cacheservice.app, sys; print(*(name for name in sys.modules if name.startswith({names})))"
        ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
        self.assertEqual(ran.stdout.split(), [])
