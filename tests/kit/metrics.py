"""Metrics as their readers parse them, and a small world that has some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from twisted.internet.defer import Deferred

from cacheservice.cache.cache import Cache
from cacheservice.cache.changes import Change
from cacheservice.cache.counts import Histogram
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.cache.history import Attempt
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ops.exposition import Metrics
from cacheservice.ops.stall import BOUNDS_S
from cacheservice.ports.rejected import none_yet
from tests.kit.clocks import CountingClock
from tests.kit.datasets import MOMENT_WITH_MS, declared, numbered_rows

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(families: Iterable[Any], *, process: bool = False) -> Series:
    """Each sample's value by its name and labels; those of the process, which change as one looks, only if wanted."""
    found: Series = {}
    for family in families:
        for sample in family.samples:
            if process or not sample.name.startswith("process_"):
                place = sample.name, tuple(sorted(sample.labels.items()))
                assert place not in found, f"{place} is there twice"
                found[place] = sample.value
    return found


def of_text(text: bytes) -> Series:
    return series(parse_text(text.decode()))


def of_openmetrics(text: bytes) -> Series:
    """By the parser of OpenMetrics, which refuses what is out of order."""
    return series(parse_openmetrics(text.decode()))


def of_monitor_lines(text: str) -> Series:
    """`key<TAB>value` lines, read as the text format once the tab is a space."""
    assert all(line.count("\t") == 1 for line in text.split("\n"))
    return series(parse_text(text.replace("\t", " ") + "\n"))


def place(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


class Port(NamedTuple):
    clients: set[int]
    max_connections: int
    rejected: dict[Any, int]


class World:
    """Two datasets before a clock that stands still; `do` has something happen to one of them."""

    def __init__(self, *names: str) -> None:
        self.clock = CountingClock()
        self.cache = Cache(map(declared, names or ("products", "prices")), self.clock.seconds)
        self.lateness = Histogram(BOUNDS_S)
        self.metrics = Metrics(self.cache, self.lateness, self.clock)
        self.metrics.add_port("resp", Port({1, 2}, 10, none_yet()))

    def text(self, *, openmetrics: bool = False) -> bytes:
        coming = Deferred.fromCoroutine(self.metrics.exposition(openmetrics=openmetrics))
        self.clock.advance(0)
        text: bytes = coming.result
        return text

    def monitor_lines(self) -> str:
        coming = Deferred.fromCoroutine(self.metrics.monitor_lines())
        self.clock.advance(0)
        lines: str = coming.result
        return lines

    def publish(self, dataset: Dataset, count: int = 3) -> None:
        change = Change(count, 1, 2)
        dataset.publish(
            Snapshot(
                dataset.last_generation + 1,
                numbered_rows(count),
                MOMENT_WITH_MS,
                self.clock.seconds(),
                "1:1:",
                change=change,
            )
        )

    def attempt(self, dataset: Dataset, outcome: Any, took_s: float = 0.3) -> None:
        dataset.attempted(Attempt(outcome, "interval", MOMENT_WITH_MS, took_s))

    def do(self, dataset: Dataset, what: str, number: int) -> None:
        counts = dataset.counts
        match what:
            case "publish":
                self.publish(dataset, number)
            case "published" | "unchanged" | "held" | "failed":
                self.attempt(dataset, what, number / 7)
            case "hold":
                dataset.hold("has 0 rows", 0, MOMENT_WITH_MS)
            case "renew" if dataset.snapshot is not None:
                dataset.renew(replace(dataset.snapshot, read_at=self.clock.seconds()))
            case "pin":
                if dataset.pinned:
                    dataset.unpin()
                elif dataset.snapshot is not None:
                    dataset.pin()
            case "age":
                self.clock.advance(number * 10)
            case "count":
                name = ("rows_read", "missed_ticks", "differences", "save_failures")[number % 4]
                setattr(counts, name, getattr(counts, name) + 1 + number)
            case "read":
                reads = counts.resp if number % 2 else counts.http
                name = ("hits", "misses", "loading", "stale")[number // 2 % 4]
                setattr(reads, name, getattr(reads, name) + 1 + number)
            case "fleet":
                role = ("leader", "replica", "alone")[number % 3]
                heard_at = None if role == "leader" else self.clock.seconds() - number
                dataset.note_fleet(
                    FleetStatus(
                        role,  # type: ignore[arg-type]  # it is one of the three
                        "cache-1",
                        epoch=number or None,
                        lag=number or None,
                        heard_at=heard_at,
                        valkey_problem="refused" if number % 2 else None,
                        lead_changes=dataset.fleet.lead_changes + 1 if dataset.fleet is not None else 0,
                    )
                )
            case "declare":
                dataset.change(declared(dataset.name, max_age_s=100.0 + number, query=f"SELECT {number}"))
