"""Seconds to restore a million rows from the disk, against reading them from PostgreSQL in the same process, in turns.

And how long saving and restoring keep the reactor from everything else: the longest turn, by what the reactor's thread
computed in it, because on a busy machine the wall clock includes the others.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from benchmarks.figures import limit, mib, print_figures, spread
from benchmarks.products import QUERY, server_with_products
from benchmarks.stall import ms
from cacheservice.cache.cache import Cache
from cacheservice.cache.drain import Drain
from cacheservice.cache.rows import RowsBuilder
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings, PersistenceSettings
from cacheservice.refresh.restore import restore
from cacheservice.sources.base import ReadPlan
from cacheservice.sources.disk.store import SnapshotStore
from cacheservice.sources.postgres import target
from cacheservice.sources.postgres.database import Database

MOST_RATIO = 0.5
MOST_TURN_S = 0.010

SETTINGS = DatasetSettings(name="products", query=QUERY, key=("id",), timeout_s=120.0)
_TICK_S = 0.001
_SETTLE_S = 1.0
"""Long enough for rows that were dropped to be freed."""


class Turns:
    """Notes every millisecond how much this thread computed since the last time."""

    def begin(self) -> None:
        self.longest_s = 0.0
        self._cpu_s = time.thread_time()

    def tick(self) -> None:
        cpu_s = time.thread_time()
        self.longest_s = max(self.longest_s, cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        reactor.callLater(_TICK_S, self.tick)


class Run:
    """Refreshes, saves and restores in turns.

    The store's log is this object: it waits for what the store logs.
    """

    def __init__(self, dsn: str, rows: int, directory: Path) -> None:
        self.rows = rows
        self.directory = directory
        self.drain = Drain(reactor)
        self.turns = Turns()
        self.cache = Cache([SETTINGS], reactor.seconds)
        self.database = Database(reactor, target.parse(dsn), 10.0, self.cache.database)
        self.told: dict[str, Any] = {}
        self.generation = 0
        self.refresh_s: list[float] = []
        self.restore_s: list[float] = []
        self.save_s: list[float] = []
        self.file_bytes = 0
        self.longest_s: dict[str, list[float]] = {"refresh": [], "save": [], "restore": []}

    def bind(self, **_: Any) -> Run:
        return self

    def info(self, event: str, **fields: Any) -> None:
        self.told[event] = fields

    def warning(self, event: str, **fields: Any) -> None:
        raise RuntimeError(f"{event}: {fields}")

    error = warning

    def store(self) -> SnapshotStore:
        settings = PersistenceSettings(directory=str(self.directory), min_save_interval_s=0, keep_generations=2)
        return SnapshotStore(self.cache, settings, self.drain.add, reactor, self)

    async def pairs(self, count: int) -> None:
        # The first full pass over what the imports made takes 30 ms; it belongs to no save.
        gc.collect()
        self.turns.begin()
        self.turns.tick()
        for _ in range(count):
            self.refresh_s.append(await self.measured("refresh", self.refresh))
            await self.measured("save", self.save)
            self.cache = Cache([SETTINGS], reactor.seconds)
            await deferLater(reactor, _SETTLE_S)
            self.restore_s.append(await self.measured("restore", self.restore))
            self.cache = Cache([SETTINGS], reactor.seconds)
            await deferLater(reactor, _SETTLE_S)
            print(
                f"refresh {self.refresh_s[-1]:.2f} s   save {self.save_s[-1]:.2f} s   "
                f"restore {self.restore_s[-1]:.2f} s   {self.restore_s[-1] / self.refresh_s[-1]:.2f}   longest turn: "
                + ", ".join(f"{what} {ms(longest_s[-1])}" for what, longest_s in self.longest_s.items()),
                flush=True,
            )

    async def measured(self, what: str, do: Callable[[], Awaitable[None]]) -> float:
        self.turns.begin()
        began_at = time.perf_counter()
        await do()
        took_s = time.perf_counter() - began_at
        self.longest_s[what].append(self.turns.longest_s)
        return took_s

    async def refresh(self) -> None:
        builder = RowsBuilder(self.drain.add)
        (reading,) = await self.database.read([ReadPlan(SETTINGS, lambda: builder)])
        self.generation += 1
        snapshot = Snapshot(
            self.generation,
            builder.finish(),
            reading.moment.as_of,
            reading.moment.read_at,
            reading.moment.database_snapshot,
            reading.columns,
        )
        assert snapshot.rows.count == self.rows
        self.cache.dataset("products").publish(snapshot)

    async def save(self) -> None:
        store = self.store()
        self.told.clear()
        store.startService()
        dataset = self.cache.dataset("products")
        assert dataset.snapshot is not None
        dataset.renew(dataset.snapshot)  # which plans a save, because the rows are not on disk
        while "snapshot_saved" not in self.told:
            await deferLater(reactor, 0.005)
        self.save_s.append(self.told["snapshot_saved"]["took_s"])
        self.file_bytes = self.told["snapshot_saved"]["bytes"]
        await store.stopService()

    async def restore(self) -> None:
        store = self.store()
        await restore(store, self.cache, reactor, self)
        await store.stopService()
        snapshot = self.cache.dataset("products").snapshot
        assert snapshot is not None
        assert (snapshot.generation, snapshot.rows.count) == (self.generation, self.rows)
        assert datetime.now(UTC) > snapshot.as_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    reactor.seconds = time.monotonic
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-benchmark-"))
    try:
        with server_with_products(options.rows) as server:
            run = Run(server.dsn(), options.rows, directory)
            failed = []

            def begin() -> None:
                ended = Deferred.fromCoroutine(run.pairs(options.pairs))
                ended.addErrback(failed.append)
                ended.addBoth(lambda _: reactor.stop())

            reactor.callWhenRunning(begin)
            reactor.run()
    finally:
        shutil.rmtree(directory)
    if failed:
        sys.exit(failed[0].getTraceback())
    print()
    print_figures(figures(run))


def figures(run: Run) -> list[tuple[str, str, str, str]]:
    ratios = [restore_s / refresh_s for restore_s, refresh_s in zip(run.restore_s, run.refresh_s, strict=True)]
    longest = [
        (
            f"longest turn of a {what}, CPU",
            spread(longest_s, ms),
            "",
            limit(median(longest_s) * 1000, MOST_TURN_S * 1000, " ms"),
        )
        for what, longest_s in run.longest_s.items()
        if what != "refresh"
    ]
    return [
        ("restore, s", spread(run.restore_s), f"refresh {spread(run.refresh_s)}", ""),
        ("ratio of each pair", spread(ratios), "refresh", limit(median(ratios), MOST_RATIO, "")),
        ("save, s", spread(run.save_s), f"a file of {mib(run.file_bytes)}", ""),
        *longest,
    ]


if __name__ == "__main__":
    main()
