"""Laws of the halves of the service: each can be built alone."""

from __future__ import annotations

import json
import socket
from typing import Any
from unittest import mock
from urllib.request import urlopen

from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice import app
from cacheservice.app.roles import Role
from cacheservice.app.root import CacheServiceRoot
from cacheservice.ops import logs
from cacheservice.ports.listen import PortService
from tests.kit.datasets import rows_of, snapshot_of
from tests.kit.logs import Log
from tests.kit.resp import Client

ENVIRON = {
    "CACHESERVICE_POSTGRES__DSN": "postgresql://reader@127.0.0.1:1/shop",
    "CACHESERVICE_STATUS__PORT": "0",
    "CACHESERVICE_RESP__PORT": "0",
    "CACHESERVICE_HTTP__PORT": "0",
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

    async def test_a_half_that_reads(self) -> None:
        """It has no port for readers, and the status port that reports on it."""
        service = self.service(Role.READ)
        self.assertEqual(self.names(service) & {"resp", "http", "status", "refresh"}, {"status", "refresh"})
