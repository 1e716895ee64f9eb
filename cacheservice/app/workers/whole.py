"""The whole service, as its main process sees it: all workers, their counts, and what they share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from twisted.internet.defer import Deferred, DeferredList

from cacheservice.app.workers.connections import PORTS, SharedConnections
from cacheservice.app.workers.counting import WorkerCounts, WorkerLedger
from cacheservice.app.workers.guesses import AllGuesses
from cacheservice.app.workers.plans import PlanSender
from cacheservice.app.workers.questions import Questions, Sources
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache
from cacheservice.cache.workers import WorkerState, WorkerStatus
from cacheservice.ops.stall import BOUNDS_S
from cacheservice.ports import rejected
from cacheservice.ports.resp.server import own_usage
from cacheservice.ports.resp.whole import Totals
from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain

COUNTED_WITHIN_S = 1.0
"""The time that a worker has to send its counts when it is asked for them."""


class WholePort:
    """A port whose clients all workers serve; a `ServedPort` of the metrics.

    :param max_connections: of the whole service.
    """

    def __init__(self, name: str, connections: SharedConnections, max_connections: int) -> None:
        self._name = name
        self._connections = connections
        self.max_connections = max_connections
        self.rejected = rejected.none_yet()

    @property
    def clients(self) -> Collection[object]:
        """As many items as there are clients."""
        return range(self._connections.total(self._name))

    def set_limits(self, *, max_connections: int, idle_timeout_s: float) -> None:
        """Note a changed limit; the workers apply it."""
        self.max_connections = max_connections

    def close_clients(self) -> None:
        """Do nothing: the clients are those of the workers."""


class _Worker:
    """One worker in the main process. `link` is None before its first start, and while it is down."""

    def __init__(self, number: int, ledger: WorkerLedger) -> None:
        self.number = number
        self.ledger = ledger
        self.starts = 0
        self.state: WorkerState = "down"
        self.pid: int | None = None
        self.link: Link | None = None
        self.is_silent = False
        self._parts: tuple[Questions, PlanSender] | None = None

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            number=self.number,
            pid=self.pid,
            state=self.state,
            connections={port: self.ledger.clients.get(port, 0) for port in PORTS},
            restarts=max(0, self.starts - 1),
            memory_bytes=self.ledger.memory_bytes,
            cpu_s=self.ledger.cpu_s,
            stalls=self.ledger.stalls,
        )

    def started(self, pid: int, link: Link, questions: Questions, plans: PlanSender) -> None:
        self.starts += 1
        self.pid, self.link, self.state, self.is_silent = pid, link, "starting", False
        self._parts = questions, plans
        link.handle("counts", self._counted)
        plans.start()

    def serving(self) -> None:
        self.state = "serving"

    def ended(self) -> None:
        if self._parts is not None:
            for part in self._parts:
                part.stop()
        self.pid = self.link = self._parts = None
        self.state = "down"
        self.ledger.ended()

    def _counted(self, **counts: Plain) -> None:
        self.is_silent = False
        self.ledger.counted(WorkerCounts.of(counts))

    async def count(self) -> None:
        """Have the worker send its counts; do not wait again for one that has not answered."""
        if self.link is None or self.is_silent:
            return
        try:
            await self.link.call("count", COUNTED_WITHIN_S)
        except Exception:
            self.is_silent = True

    async def client_list(self) -> list[tuple[int, bytes]]:
        """Return the lines of its clients, with their ids; none if it does not answer."""
        if self.link is None or self.is_silent:
            return []
        try:
            return [(number, line) for number, line in cast("Any", await self.link.call("clients", COUNTED_WITHIN_S))]
        except Exception:
            self.is_silent = True
            return []


class Whole:
    """All workers of the service.

    :param processes: how many workers there are.
    :param connections: shared with the workers.
    :param limits: the greatest number of clients by port, for each port that the workers serve.
    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(
        self,
        processes: int,
        cache: Cache,
        connections: SharedConnections,
        limits: Mapping[str, int],
        clock: Clock,
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._connections = connections
        self._next_incarnation = 1
        self.ports = {name: WholePort(name, connections, most) for name, most in limits.items()}
        counters = {name: port.rejected for name, port in self.ports.items()}
        self._workers = {
            number: _Worker(number, WorkerLedger(cache, counters, BOUNDS_S)) for number in range(1, processes + 1)
        }
        self._guesses = AllGuesses(self.ports, clock.seconds, self.links)
        self._counting = False
        self._waiting: list[Deferred[None]] = []
        cache.see_workers_by(self.statuses)

    # The lives of the workers

    def incarnation(self) -> int:
        """Return a number that no worker has had: the ids of its clients begin at `first_id` of it."""
        number, self._next_incarnation = self._next_incarnation, self._next_incarnation + 1
        return number

    def started(self, number: int, pid: int, link: Link, sources: Sources) -> None:
        """Serve a worker that was started. Call it before snapshots are sent over `link`."""
        plans, questions = PlanSender(self._cache, link, self._clock), Questions(sources, link, self._clock)
        self._workers[number].started(pid, link, questions, plans)
        self._guesses.add(link)

    def serving(self, number: int) -> None:
        """Note that a worker serves clients."""
        self._workers[number].serving()

    def ended(self, number: int) -> None:
        """Note that a worker has ended, and its connections with it."""
        self._workers[number].ended()
        self._connections.clear(number)

    def links(self) -> Iterator[Link]:
        """Yield the links of the workers that live."""
        yield from (each.link for each in self._workers.values() if each.link is not None)

    # The facts

    def statuses(self) -> Sequence[WorkerStatus]:
        """Return the workers for the status and the metrics."""
        return [each.status() for each in self._workers.values()]

    def superseded(self) -> Mapping[tuple[str, int], int]:
        """Return the bytes of the superseded generations in the workers, in one sum for each of them."""
        found: dict[tuple[str, int], int] = {}
        for each in self._workers.values():
            count, size_bytes = each.ledger.superseded
            # Each worker has its own copies. Only their number and their sum matter.
            found |= {(f"@{each.number}", place): size_bytes if place == 0 else 0 for place in range(count)}
        return found

    async def totals(self) -> Totals:
        """Return the totals of all processes, as of now."""
        await self.updated()
        total = own_usage()
        for each in self._workers.values():
            total += each.ledger.totals()
        return replace(total, clients=self._connections.total("resp") if "resp" in self.ports else 0)

    async def client_list(self) -> bytes:
        """Return the lines of CLIENT LIST, in the order of the ids."""
        listed = [Deferred.fromCoroutine(each.client_list()) for each in self._workers.values()]
        lines: list[tuple[int, bytes]] = []
        for coming in listed:
            lines += await coming
        return b"".join(line for _, line in sorted(lines))

    def updated(self) -> Deferred[None]:
        """Have all workers send their counts. The Deferred never fails.

        Requests that arrive meanwhile share the next round, because their own effects must be counted.
        """
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        self._count()
        return waiting

    def _count(self) -> None:
        if self._counting or not self._waiting:
            return
        self._counting = True
        waiting, self._waiting = self._waiting, []
        counted = DeferredList([Deferred.fromCoroutine(each.count()) for each in self._workers.values()])
        counted.addCallback(self._counted, waiting)

    def _counted(self, _: object, waiting: Sequence[Deferred[None]]) -> None:
        self._counting = False
        self._count()
        for each in waiting:
            each.callback(None)
