"""The status port of a filled cache."""

from __future__ import annotations

from cacheservice.base.errors import Blocker
from cacheservice.cache.cache import Cache
from cacheservice.cache.history import Attempt
from cacheservice.cache.snapshot import Snapshot
from tests.kit.clocks import started_clock
from tests.kit.datasets import MOMENT, declared, planned, rows_builder

BLOCKER = Blocker(42, "app", "psql", "AccessExclusiveLock", "public.products", MOMENT, "idle in transaction", "UPDATE")


def filled_cache(more: int = 0) -> Cache:
    """products: loaded 12 s ago. prices: failed twice, never loaded. `more` that nobody has tried yet."""
    clock = started_clock()
    names = ["products", "prices", *(f"more_{number}" for number in range(more))]
    cache = Cache([declared(name) for name in names], clock.seconds)
    rows = rows_builder()
    rows.add([(b"1", b'{"id":1}'), (b"2", b'{"id":2}')])
    products, prices = cache.dataset("products"), cache.dataset("prices")
    products.attempted(Attempt("failed", "start", MOMENT, 1.0, None, "connection refused", "look"))
    products.publish(Snapshot(3, rows.finish(), MOMENT, 1000.0, "1:1:"))
    products.attempted(Attempt("published", "retry", MOMENT, 0.5, 2))
    planned(products, 1060.0)
    for _ in range(2):
        lock = Attempt("failed", "retry", MOMENT, 27.0, None, "a lock was not granted", "end that session", (BLOCKER,))
        prices.attempted(lock)
    planned(prices, 1016.0)
    cache.database.failed("connection refused")
    clock.advance(12.3456)
    return cache
