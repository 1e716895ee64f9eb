"""Test cases of the HTTP port, over real sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.cache.dataset import Dataset, Snapshot
from cacheservice.cache.rows import Rows
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http import AccessSettings, HttpFactory, Served
from cacheservice.ports.listen import tcp
from tests.kit.clocks import started_clock
from tests.kit.datasets import MOMENT_WITH_MS, declared, rows_of
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.http import Answer, ask_on, read_to_the_end
from tests.kit.waiting import GIVE_UP_S, until

ROWS = {
    "1": '{"id":1,"name":"hammer"}',
    "2": '{"id":2,"name":"Säge"}',
    "a/b:c d%": '{"id":3}',
    'quo"te\\\n\x01é': "[1,\n 2]",
    "": "null",
    "large": json.dumps({"text": "x" * 3000}),
}


def encoded(rows: dict[str, str]) -> Rows:
    return rows_of((key.encode(), document.encode()) for key, document in rows.items())


class PortTestCase(TestCase):
    """products: loaded 12.3 s ago. prices: never loaded, its next try is in 15.2 s. Their clock stands still."""

    max_connections = 50
    idle_timeout_s = 120.0
    head_timeout_s = 120.0
    token = ""
    admin_token = ""
    allow_data = True
    on_expired = "serve"

    async def setUp(self) -> None:
        self.clock = started_clock()
        settings = [declared("products", on_expired=self.on_expired), declared("prices", on_expired=self.on_expired)]
        self.cache = Cache(settings, self.clock.seconds)
        self.products, self.prices = self.cache.dataset("products"), self.cache.dataset("prices")
        self.publish(encoded(ROWS), 17)
        self.clock.advance(12.3)
        self.products.next_refresh_at = 1060.0
        self.prices.next_refresh_at = self.clock.seconds() + 15.2
        self.refreshes = FakeRefreshes()
        self.factory = self.make_factory()
        self.port = tcp(reactor, "127.0.0.1", 0, self.factory)()
        self.addCleanup(self.close)

    def make_factory(self) -> HttpFactory:
        freshness = Freshness(self.refreshes, self.cache.database, self.clock)
        return HttpFactory(
            Served(self.cache, freshness, self.commanded()),
            AccessSettings(self.token, self.admin_token, self.allow_data),
            Limits(self.max_connections, self.idle_timeout_s),
            reactor,
            head_timeout_s=self.head_timeout_s,
        )

    def commanded(self) -> Refreshes:
        """Return the refreshes that commands reach."""
        return self.refreshes

    def publish(self, rows: Rows, generation: int, dataset: Dataset | None = None) -> None:
        (dataset or self.products).publish(Snapshot(generation, rows, MOMENT_WITH_MS, self.clock.seconds(), "1:1:"))

    async def close(self) -> None:
        await self.port.stopListening()
        self.factory.close_clients()
        await until(lambda: not self.factory.clients)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.refreshes.at_once, [], "a read port asks for a moment")

    def connect(self, receive_bytes: int = 0) -> socket.socket:
        client = socket.socket()
        client.settimeout(GIVE_UP_S)
        if receive_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.connect(("127.0.0.1", self.port.getHost().port))
        return client

    def converse(self, conversation: Callable[[socket.socket], Any]) -> Deferred[Any]:
        def run() -> Any:
            with closing(self.connect()) as client:
                return conversation(client)

        return deferToThread(run)

    async def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        answer: Answer = await self.converse(lambda client: ask_on(client, path, method, **headers))
        return answer

    async def exchange(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Send, then read until the port closes; a connection that is reset raises."""

        def conversation(client: socket.socket) -> bytes:
            client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return read_to_the_end(client)

        text: bytes = await self.converse(conversation)
        return text

    async def assert_problem(self, path: str, status: int, detail: str, method: str = "GET", **headers: str) -> Answer:
        answer = await self.ask(path, method, **headers)
        self.assertEqual((answer.status, answer.headers["content-type"]), (status, "application/problem+json"))
        problem = answer.json()
        self.assertLessEqual({"type", "title", "status", "detail", "instance"}, set(problem))
        self.assertEqual((problem["status"], problem["instance"]), (status, path.partition("?")[0]))
        self.assertIn(detail, problem["detail"])
        self.assertEqual(answer.headers["cache-control"], "no-store")
        return answer


def buffered(connection: Any) -> int:
    """Bytes that wait in memory for a client, or came from it too early."""
    transport = connection.transport
    waiting = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
    return waiting + connection._parser.waiting_bytes
