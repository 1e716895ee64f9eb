"""The RESP port of a filled cache, for clients in other processes, and what the tests of that port share.

    python -m tests.kit.resp_peer [PASSWORD [ROWS]]

prints its port; PASSWORD may be empty. `publish NAME ROWS` on standard input publishes the next generation of a
dataset and prints its number; the program ends with its standard input.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet import reactor
from twisted.internet.stdio import StandardIO
from twisted.protocols.basic import LineReceiver

from cacheservice.cache.cache import Cache
from cacheservice.cache.history import Attempt
from cacheservice.cache.lag import NO_LAG
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.listen import tcp
from cacheservice.ports.resp.connection import RespFactory
from tests.kit.datasets import MOMENT, declared, rows_builder
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.postgres import PRIMARY

ROWS = 1000


def document(number: int, generation: int) -> bytes:
    return b'{"id":%d,"generation":%d,"name":"row %d"}' % (number, generation, number)


def publish(cache: Cache, name: str, keys: Iterator[bytes] | range, database_snapshot: str = "1:1:") -> int:
    """Publish the next generation of a dataset, its documents naming it; a number stands for its digits."""
    dataset = cache.dataset(name)
    generation = (dataset.snapshot.generation if dataset.snapshot else 0) + 1
    rows = rows_builder()
    for number, key in enumerate(keys):
        rows.add([(b"%d" % key if isinstance(key, int) else key, document(number, generation))])
    dataset.publish(Snapshot(generation, rows.finish(), MOMENT, cache.now(), database_snapshot, server=PRIMARY))
    return generation


def failed_attempt() -> Attempt:
    return Attempt(outcome="failed", trigger="interval", started_at=MOMENT, took_s=0.1, error="it does not work")


def filled_cache(now: Callable[[], float], row_count: int = ROWS) -> Cache:
    """products: 1,000 rows. empty: none. strict: 3 rows, refused when expired. prices: never loaded."""
    names = [declared("products"), declared("empty"), declared("strict", on_expired="refuse"), declared("prices")]
    cache = Cache(names, now)
    cache.database.seen(PRIMARY, NO_LAG)
    publish(cache, "products", range(row_count))
    publish(cache, "empty", range(0))
    publish(cache, "strict", range(3))
    return cache


class Orders(LineReceiver):
    delimiter = b"\n"

    def __init__(self, cache: Cache, factory: RespFactory) -> None:
        self._cache = cache
        self._factory = factory

    def lineReceived(self, line: bytes) -> None:
        order, name, rows = line.decode().split()
        if order == "cut":
            self._factory.close_clients()
            self.sendLine(b"0")
        elif order == "fail":
            self._cache.dataset(name).attempted(failed_attempt())
            self.sendLine(b"0")
        else:
            assert order == "publish"
            self.sendLine(b"%d" % publish(self._cache, name, range(int(rows))))

    def connectionLost(self, reason: Any = None) -> None:
        reactor.stop()


def main() -> None:
    reactor.seconds = time.monotonic
    password = sys.argv[1] if len(sys.argv) > 1 else ""
    row_count = sys.argv[2] if len(sys.argv) > 2 else ROWS
    cache = filled_cache(reactor.seconds, int(row_count))
    factory = RespFactory(
        cache=cache,
        freshness=Freshness(FakeRefreshes(), cache.database, reactor),
        limits=Limits(10_000, 300),
        clock=reactor,
        password=password,
    )
    port = tcp(reactor, "127.0.0.1", 0, factory)()
    orders = Orders(cache, factory)
    StandardIO(orders)
    orders.sendLine(b"%d" % port.getHost().port)
    reactor.run()


if __name__ == "__main__":
    main()
