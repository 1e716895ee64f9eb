"""What it takes to collect and render all metrics of 500 datasets, and what the tick costs that measures stalls.

The peer is prometheus_client's own `generate_latest` over a registry of its Gauges with as many series, labelled alike.
All times are CPU of this process; each pair of values is measured one after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from benchmarks.figures import limit, ms, print_figures, spread
from cacheservice.cache.cache import Cache
from cacheservice.cache.changes import Change
from cacheservice.cache.counts import Histogram
from cacheservice.cache.history import Attempt
from cacheservice.cache.rows import RowsBuilder
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.ops.exposition import Metrics
from cacheservice.ops.stall import BOUNDS_S, StallWatch

MOST_CPU_S = 0.005
MOST_TURN_S = 0.010


class Turns:
    """Keeps what is to be called in the next turn of the reactor."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def callLater(self, _: float, call: Callable[..., object], *arguments: object) -> None:
        self.calls.append(partial(call, *arguments))


class Service:
    """Datasets with snapshots, and their metrics."""

    def __init__(self, count: int) -> None:
        self._turns = Turns()
        declared = [DatasetSettings(name=f"dataset_{number:03}", query="-", key="id") for number in range(count)]
        self._cache = Cache(declared, time.monotonic)
        builder = RowsBuilder(lambda _: None)
        builder.add([(b"1", b"{}")])
        self._rows = builder.finish()
        self.metrics = Metrics(self._cache, Histogram(BOUNDS_S), self._turns)
        self.refresh()

    def refresh(self) -> None:
        """Every dataset has been refreshed since the last scrape."""
        for dataset in self._cache.datasets.values():
            now = datetime.now(UTC)
            read_at, generation = time.monotonic(), dataset.next_generation()
            dataset.counts.rows_read += 1
            dataset.publish(Snapshot(generation, self._rows, now, read_at, "1:1:", change=Change(0, 1, 0)))
            dataset.attempted(Attempt("published", "interval", now, 0.2, 1))

    def read(self) -> None:
        """Every dataset has been read since the last scrape."""
        for dataset in self._cache.datasets.values():
            dataset.counts.resp.hits += 7

    def expose(self, openmetrics: bool = False) -> tuple[bytes, float]:
        """The page, and the CPU seconds of the longest turn."""
        return self._run(self.metrics.exposition(openmetrics=openmetrics))

    def monitor_lines(self) -> float:
        """The CPU seconds of the longest turn of `mntr`."""
        return self._run(self.metrics.monitor_lines())[1]

    def _run(self, making: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
        turns = [time.process_time()]
        coming = Deferred.fromCoroutine(making)
        turns.append(time.process_time())
        while self._turns.calls:
            self._turns.calls.pop()()
            turns.append(time.process_time())
        return coming.result, max(end - begin for begin, end in pairwise(turns))


def cpu_s(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def peer(series: int) -> CollectorRegistry:
    """As many series, of 49 gauges with a label for the dataset and one more."""
    registry = CollectorRegistry()
    gauges = [Gauge(f"peer_{number}", "A gauge.", ["dataset", "state"], registry=registry) for number in range(49)]
    for number in range(series):
        gauges[number % 49].labels(f"dataset_{number // 49:03}", "fresh").set(number)
    return registry


def tick_cpu(seconds: float) -> float:
    """The share of a core that the tick takes, beside nothing else."""

    def run(watch: StallWatch | None) -> float:
        if watch is not None:
            watch.startService()
        done: list[float] = []
        begin = time.process_time()

        def end() -> None:
            done.append(time.process_time() - begin)
            if watch is not None:
                watch.stopService()
            reactor.callLater(0, reactor.crash)

        reactor.callLater(seconds, end)
        reactor.run(installSignalHandlers=False)
        return done[0]

    return (run(StallWatch(reactor)) - run(None)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10, help="of watching the tick")
    options = parser.parse_args()
    service = Service(options.datasets)
    page, _ = service.expose()
    series = sum(not line.startswith(b"#") for line in page.splitlines())
    registry = peer(series)
    for _ in range(3):  # the heap has to have room for some pages first
        service.expose()
    rows: list[tuple[str, str, str, str]] = [("series", f"{series:,}", f"{len(page):,} bytes", "")]
    ages, turns, theirs = [], [], []
    for _ in range(options.rounds):
        ages.append(cpu_s(service.expose))
        theirs.append(cpu_s(lambda: generate_latest(registry)))
    rows.append(("only ages have changed", spread(ages, ms), f"generate_latest {spread(theirs, ms)}", most(ages)))
    ratios = [their / our for our, their in zip(ages, theirs, strict=True)]
    rows.append(("ratio of each pair", spread(ratios, "{:.0f}".format), "", ""))
    read, refreshed, openmetrics, lines = [], [], [], []
    for _ in range(options.rounds):
        service.read()
        read.append(cpu_s(service.expose))
        service.refresh()
        begin = time.process_time()
        turns.append(service.expose()[1])
        refreshed.append(time.process_time() - begin)
        openmetrics.append(cpu_s(lambda: service.expose(openmetrics=True)))
        lines.append(service.monitor_lines())
    rows.append(("all have been read", spread(read, ms), "", most(read)))
    rows.append(("all have been refreshed", spread(refreshed, ms), "", ""))
    rows.append(("its longest turn", spread(turns, ms), "", limit(median(turns) * 1000, MOST_TURN_S * 1000, " ms")))
    rows.append(("OpenMetrics, only ages", spread(openmetrics, ms), "", most(openmetrics)))
    rows.append(
        ("mntr, only ages, longest turn", spread(lines, ms), "", limit(median(lines) * 1000, MOST_TURN_S * 1000, " ms"))
    )
    rows.append(
        ("prometheus_client on the same numbers", spread([cpu_s(lambda: generate_latest(service.metrics))], ms), "", "")
    )
    rows.append(("the tick, share of a core", f"{tick_cpu(options.seconds):.2%}", "", ""))
    print_figures(rows)


def most(values: list[float]) -> str:
    return limit(median(values) * 1000, MOST_CPU_S * 1000, " ms")


if __name__ == "__main__":
    main()
