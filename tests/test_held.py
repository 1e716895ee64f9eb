"""Laws of slow readers: what they keep in memory is bounded, and reported."""

from __future__ import annotations

import gc
import socket
from weakref import ref

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from cacheservice.cache.cache import Cache
from cacheservice.config import DatasetSettings
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.held import HeldSnapshots
from cacheservice.ports.http import AccessSettings, HttpFactory, Served
from cacheservice.ports.listen import tcp
from cacheservice.ports.resp.connection import RespFactory
from tests.kit.datasets import rows_of, snapshot_of
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.logs import Log
from tests.kit.resp import encode
from tests.kit.waiting import until

ROWS = 4000
DOCUMENT = b'"' + b"x" * 1000 + b'"'


def cache_of(*names: str) -> Cache:
    return Cache([DatasetSettings(name=name, query="SELECT 1", key=("id",)) for name in names], reactor.seconds)


def publish(cache: Cache, name: str) -> ref[object]:
    """The next generation, of 4 MB; a weak reference to its rows."""
    dataset = cache.dataset(name)
    rows = rows_of((b"%d" % number, DOCUMENT) for number in range(ROWS))
    dataset.publish(snapshot_of(rows, dataset.last_generation + 1, cache.now()))
    return ref(rows)


class OnThePorts(TestCase):
    timeout = 120

    def setUp(self) -> None:
        self.cache, self.log = cache_of("a"), Log()
        self.held = HeldSnapshots(self.cache, reactor, self.log, 2, 600.0)
        freshness = Freshness(FakeRefreshes(), self.cache.database, reactor)  # type: ignore[arg-type]
        limits = Limits(100, 60, held=self.held)
        self.resp = RespFactory(cache=self.cache, freshness=freshness, limits=limits, clock=reactor)
        self.http = HttpFactory(
            Served(self.cache, freshness, FakeRefreshes()),  # type: ignore[arg-type]
            AccessSettings(),
            Limits(100, 60, held=self.held),
            reactor,
        )
        self.ports = {}
        for name, factory in (("resp", self.resp), ("http", self.http)):
            port = tcp(reactor, "127.0.0.1", 0, factory)()
            self.addCleanup(port.stopListening)
            self.addCleanup(factory.close_clients)
            self.ports[name] = port.getHost().port

    def connect(self, port: str, request: bytes) -> socket.socket:
        client = socket.socket()
        self.addCleanup(client.close)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", self.ports[port]))
        client.sendall(request)
        return client

    async def test_slow_readers(self) -> None:
        """Clients that read each another generation, in every way that streams, keep two besides the served."""
        requests = [
            ("resp", encode("HGETALL", "a")),
            ("resp", encode("HVALS", "a")),
            ("resp", encode("MULTI") + encode("HGETALL", "a") + encode("EXEC")),
            ("resp", encode("MGET", *(f"a:{number}" for number in range(ROWS)))),
            ("resp", encode("HMGET", "a", *range(ROWS))),
            ("http", b"GET /v1/datasets/a HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("http", b"GET /v1/datasets/a HTTP/1.1\r\nHost: a\r\nAccept: application/x-ndjson\r\n\r\n"),
            ("http", b"GET /v1/datasets/a/changes HTTP/1.1\r\nHost: a\r\n\r\n"),
        ]
        rows = []
        for number in range(2 * len(requests)):
            rows.append(publish(self.cache, "a"))
            self.connect(*requests[number % len(requests)])
            began = number + 1
            await until(lambda began=began: len(self.log.lines) + len(self.held._holds) >= began)
        publish(self.cache, "a")
        gc.collect()
        self.assertEqual(len(self.held.superseded()), 2)
        await until(lambda: gc.collect() >= 0 and sum(each() is not None for each in rows) <= 2)
        ended = self.resp.rejected["slow_client"] + self.http.rejected["slow_client"]
        dropped = 2 * len(requests) - 2
        self.assertEqual((len(self.log.lines), ended), (dropped, dropped))
