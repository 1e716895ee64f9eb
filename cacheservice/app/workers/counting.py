"""The counts of workers: collected in the worker, added up in the main process.

A worker sends its counts once a second, and when the main process asks for them. They only increase while it lives, so
the main process adds the differences to its own counters: the metrics are of the whole service, and no counter goes
back when a worker ends. The counts of its last second are lost if a worker is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self, cast

from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Histogram
from cacheservice.ports.rejected import Rejected
from cacheservice.ports.resp.whole import Totals
from cacheservice.replication.messages import Plain

COUNT_S = 1.0
"""The time between two messages with counts."""


class CountedPort(Protocol):
    """The factory of a port in a worker."""

    @property
    def clients(self) -> Collection[object]: ...

    @property
    def rejected(self) -> Rejected: ...


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """The counts of one worker since its start, as a message.

    :param clients: connected now, by port.
    :param rejected: by port and reason.
    :param reads: for each dataset whose reads have changed since the message before, those of the RESP port and of the
        HTTP port, each as `Reads.values`.
    :param stalls: the counts of the histogram of the reactor's lateness, and their sum.
    :param superseded: the superseded generations that answers keep in memory, and their bytes.
    """

    clients: Mapping[str, int]
    rejected: Mapping[str, Mapping[str, int]]
    totals: Totals
    reads: Mapping[str, Sequence[Sequence[int]]]
    stalls: tuple[Sequence[int], float]
    superseded: tuple[int, int]

    def plain(self) -> dict[str, Plain]:
        """Return the fields of a message."""
        return {
            "clients": dict(self.clients),
            "rejected": {port: dict(reasons) for port, reasons in self.rejected.items()},
            "totals": plain_totals(self.totals),
            "reads": dict(self.reads),
            "stalls": list(self.stalls),
            "superseded": list(self.superseded),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Plain]) -> Self:
        """Return the counts in the fields of a message."""
        fields = cast("dict[str, Any]", plain)
        stalls, superseded = tuple(fields["stalls"]), tuple(fields["superseded"])
        return cls(**(fields | {"totals": totals_in(fields["totals"]), "stalls": stalls, "superseded": superseded}))


def plain_totals(totals: Totals) -> dict[str, Plain]:
    """Return totals as a field of a message; `totals_in` reads it."""
    return asdict(totals) | {"channels": sorted(totals.channels)}


def totals_in(plain: Plain) -> Totals:
    """Return the totals of a message."""
    fields = cast("dict[str, Any]", plain)
    return Totals(**(fields | {"channels": frozenset(fields["channels"])}))


class Counting:
    """Collects the counts of a worker.

    :param ports: the factories by port.
    :param totals: returns those of the RESP port, if there is one, or else of the process.
    :param lateness: of the ticks of the reactor.
    :param superseded: returns the bytes of each superseded generation in memory.
    """

    def __init__(
        self,
        cache: Cache,
        ports: Mapping[str, CountedPort],
        totals: Callable[[], Totals],
        lateness: Histogram,
        superseded: Callable[[], Mapping[tuple[str, int], int]],
    ) -> None:
        self._cache = cache
        self._ports = ports
        self._totals = totals
        self._lateness = lateness
        self._superseded = superseded
        self._sent: dict[str, tuple[tuple[int, ...], ...]] = {}

    def collect(self) -> WorkerCounts:
        """Return the counts of now. Reads that have been returned before, and have not changed since, are left out."""
        reads = {
            name: (dataset.counts.resp.values(), dataset.counts.http.values())
            for name, dataset in self._cache.datasets.items()
        }
        changed = {name: values for name, values in reads.items() if values != self._sent.get(name)}
        self._sent = dict(reads)
        superseded = self._superseded()
        return WorkerCounts(
            clients={name: len(port.clients) for name, port in self._ports.items()},
            rejected={name: cast("dict[str, int]", dict(port.rejected)) for name, port in self._ports.items()},
            totals=self._totals(),
            reads=changed,
            stalls=(list(self._lateness.counts), self._lateness.total),
            superseded=(len(superseded), sum(superseded.values())),
        )


_NO_READS = ((0, 0, 0, 0), (0, 0, 0, 0))


class WorkerLedger:
    """The counts of one worker in the main process, over all its restarts.

    `clients` are those connected now, by port. `superseded` are the superseded generations that the answers of the
    worker keep in memory, and their bytes. `stalls` are of all its lives.

    :param rejected: the counters of the whole service, by port.
    :param bounds: of the stalls.
    """

    def __init__(self, cache: Cache, rejected: Mapping[str, Rejected], bounds: Sequence[float]) -> None:
        self._cache = cache
        self._rejected = rejected
        self._ended = Totals()
        self.stalls = Histogram(bounds)
        self._forget()

    def _forget(self) -> None:
        self.clients: Mapping[str, int] = {}
        self.superseded = (0, 0)
        self._totals = Totals()
        self._last_rejected: Mapping[str, Mapping[str, int]] = {}
        self._last_reads: dict[str, Sequence[Sequence[int]]] = {}
        self._last_stalls: tuple[Sequence[int], float] = ([0] * len(self.stalls.counts), 0.0)

    def totals(self) -> Totals:
        """Return the totals of the worker, including those of its lives that have ended."""
        return self._ended + self._totals

    @property
    def memory_bytes(self) -> int:
        return self._totals.resident_bytes

    @property
    def cpu_s(self) -> float:
        """The CPU time of all lives of the worker."""
        totals = self.totals()
        return totals.user_s + totals.system_s

    def counted(self, counts: WorkerCounts) -> None:
        """Add the differences to the last counts of the worker to the counters of the service."""
        self.clients, self.superseded, self._totals = counts.clients, counts.superseded, counts.totals
        for port, reasons in counts.rejected.items():
            last, counters = self._last_rejected.get(port, {}), self._rejected[port]
            for reason in counters:
                counters[reason] += reasons.get(reason, 0) - last.get(reason, 0)
        self._last_rejected = counts.rejected
        for name, reads in counts.reads.items():
            dataset = self._cache.datasets.get(name)
            if dataset is not None:
                before = self._last_reads.get(name, _NO_READS)
                for counter, now, then in zip((dataset.counts.resp, dataset.counts.http), reads, before, strict=True):
                    counter.add(*(more - less for more, less in zip(now, then, strict=True)))
        self._last_reads.update(counts.reads)
        (numbers, total), (last_numbers, last_total) = counts.stalls, self._last_stalls
        self.stalls.add([more - less for more, less in zip(numbers, last_numbers, strict=True)], total - last_total)
        self._last_stalls = counts.stalls

    def ended(self) -> None:
        """Note that the worker has ended: the counts of the next one begin at 0."""
        gone = self._totals
        self._ended += replace(gone, clients=0, blocked=0, channels=frozenset(), resident_bytes=0, peak_bytes=0)
        self._forget()
