"""The metrics of the service: those that are not of a dataset."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import twisted
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from cacheservice import __version__
from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Histogram
from cacheservice.cache.workers import WorkerStatus
from cacheservice.ops.capture_metrics import of_capture
from cacheservice.ops.dataset_metrics import bucket_names, histogram_values

Superseded = Callable[[], Mapping[tuple[str, int], int]]
"""Bytes by dataset and generation."""


class Counted(Protocol):
    """Counts by reason."""

    def items(self) -> Iterable[tuple[str, int]]: ...


class ServedPort(Protocol):
    """The factory of a port. `rejected` counts clients by reason."""

    @property
    def clients(self) -> Collection[object]: ...

    @property
    def rejected(self) -> Counted: ...

    @property
    def max_connections(self) -> int: ...


class ServiceMetrics:
    """Collects the metrics that are not of a dataset, for prometheus-client."""

    def __init__(
        self, cache: Cache, lateness: Histogram, ports: Mapping[str, ServedPort], superseded: Superseded
    ) -> None:
        self._superseded = superseded
        self._cache = cache
        self._lateness = lateness
        self._ports = ports

    def describe(self) -> Sequence[Metric]:
        """Return nothing, so that registration checks nothing.

        The ports do not exist yet at that time.
        """
        return ()

    def collect(self) -> Iterator[Metric]:
        cache, database = self._cache, self._cache.database
        yield InfoMetricFamily(
            "cacheservice_build",
            "Versions of the service, of Python and of Twisted.",
            {"version": __version__, "python": platform.python_version(), "twisted": twisted.__version__},
        )
        yield GaugeMetricFamily(
            "cacheservice_uptime_seconds", "Seconds since the start.", round(cache.now() - cache.started_at, 3)
        )
        yield GaugeMetricFamily(
            "cacheservice_ready",
            "1 while every required dataset can be read, and the service is not stopping.",
            int(cache.is_ready),
        )
        yield GaugeMetricFamily(
            "cacheservice_config_rejected",
            "1 while a changed configuration is not in effect, because it has a problem.",
            int(cache.rejection is not None),
        )
        yield GaugeMetricFamily(
            "cacheservice_postgres_up", "1 if PostgreSQL answered the last time.", int(database.state == "up")
        )
        yield GaugeMetricFamily(
            "cacheservice_postgres_connections", "Sessions that are open now.", database.connections
        )
        if database.listening_wanted:
            yield GaugeMetricFamily(
                "cacheservice_listening",
                "1 while notifications of PostgreSQL arrive; not there if no dataset waits for any.",
                int(database.listening),
            )
        yield from of_capture(database.capture)
        if database.server is not None and database.server.in_recovery:
            yield GaugeMetricFamily(
                "cacheservice_standby_lag_seconds",
                "How far the standby that is read may be behind its primary at most; not there for a primary.",
                round(database.lag.seconds, 3),
            )
            yield GaugeMetricFamily(
                "cacheservice_standby_lag_known",
                "0 while it is not known whether the standby hears from its primary; not there for a primary.",
                int(database.lag.known),
            )
        if any(dataset.settings.watch for dataset in cache.datasets.values()):
            yield GaugeMetricFamily(
                "cacheservice_prune_failing",
                "1 while old recorded changes are not deleted; not there if no dataset has watch.",
                int(database.prune_problem is not None),
            )
            if database.recorded_changes is not None:
                yield GaugeMetricFamily(
                    "cacheservice_recorded_changes",
                    "Recorded changes that the database keeps, by its statistics; not there before the first pruning.",
                    database.recorded_changes,
                )
            if database.oldest_change_s is not None:
                yield GaugeMetricFamily(
                    "cacheservice_recorded_changes_age_seconds",
                    "Age of the oldest recorded change that the database keeps, 0 without any; not there if unknown.",
                    round(database.oldest_change_s, 3),
                )
        yield GaugeMetricFamily(
            "cacheservice_refresh_queue_depth",
            "Refreshes that are due and wait for a connection, or for postgres.max_load.",
            database.queued(),
        )
        connections = GaugeMetricFamily("cacheservice_connections", "Clients that are connected.", labels=["port"])
        limits = GaugeMetricFamily(
            "cacheservice_connections_limit", "Clients that the port takes at once.", labels=["port"]
        )
        rejected = CounterMetricFamily(
            "cacheservice_rejected", "Clients that were turned away.", labels=["port", "reason"]
        )
        for name, port in self._ports.items():
            connections.add_metric([name], len(port.clients))
            limits.add_metric([name], port.max_connections)
            for reason, count in port.rejected.items():
                rejected.add_metric([name, reason], count)
        yield from (connections, limits, rejected)
        workers = self._cache.workers()
        if workers:
            yield from _of_workers(workers)
        superseded = self._superseded()
        yield GaugeMetricFamily(
            "cacheservice_reader_generations",
            "Superseded generations that answers in progress keep in memory.",
            len(superseded) + sum(each.superseded[0] for each in workers),
        )
        yield GaugeMetricFamily(
            "cacheservice_reader_bytes",
            "Size of these generations; those made by deltas share most of it.",
            sum(superseded.values()) + sum(each.superseded[1] for each in workers),
        )
        *cumulative, _, total = histogram_values(self._lateness)
        yield HistogramMetricFamily(
            "cacheservice_reactor_stall_seconds",
            "How late each tick of the reactor came; there is one every 31 ms.",
            list(zip(bucket_names(self._lateness.bounds), cumulative, strict=True)),
            total,
        )


def _of_workers(workers: Sequence[WorkerStatus]) -> Iterator[Metric]:
    """Yield the metrics of the workers; a service without workers does not have them."""
    up = GaugeMetricFamily(
        "cacheservice_worker_up", "1 while the worker serves clients; not there without workers.", labels=["worker"]
    )
    restarts = CounterMetricFamily(
        "cacheservice_worker_restarts", "How often the worker was started again.", labels=["worker"]
    )
    memory = GaugeMetricFamily(
        "cacheservice_worker_memory_bytes", "Memory of the worker in RAM; 0 if it is not known.", labels=["worker"]
    )
    cpu = CounterMetricFamily("cacheservice_worker_cpu_seconds", "CPU time of the worker.", labels=["worker"])
    connections = GaugeMetricFamily(
        "cacheservice_worker_connections", "Clients that are connected to the worker.", labels=["worker", "port"]
    )
    stalls = HistogramMetricFamily(
        "cacheservice_worker_stall_seconds",
        "How late each tick of the worker's reactor came; there is one every 31 ms.",
        labels=["worker"],
    )
    for each in workers:
        label = str(each.number)
        up.add_metric([label], int(each.state == "serving"))
        restarts.add_metric([label], each.restarts)
        memory.add_metric([label], each.memory_bytes)
        cpu.add_metric([label], each.cpu_s)
        for port, count in each.connections.items():
            connections.add_metric([label, port], count)
        *cumulative, _, total = histogram_values(each.stalls)
        buckets = list(zip(bucket_names(each.stalls.bounds), cumulative, strict=True))
        stalls.add_metric([label], buckets, total)
    yield from (up, restarts, memory, cpu, connections, stalls)
