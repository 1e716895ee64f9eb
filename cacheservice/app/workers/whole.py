"""The whole service, as its main process sees it: all workers, their counts, and what they share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

from twisted.internet.defer import Deferred, DeferredList

from cacheservice.app.workers.connections import PORTS, SharedConnections
from cacheservice.app.workers.counting import WorkerCounts, WorkerLedger
from cacheservice.app.workers.guesses import AllGuesses
from cacheservice.app.workers.member import State
from cacheservice.app.workers.plans import PlanSender
from cacheservice.app.workers.questions import Questions, Sources
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache
from cacheservice.cache.workers import WorkerStatus
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


class Life(Protocol):
    """The process of one worker, as its supervisor knows it."""

    @property
    def pid(self) -> int | None:
        """The ID of the process; None if there is none."""

    @property
    def restarts(self) -> int:
        """The number of processes after the first."""

    @property
    def state(self) -> State:
        """The state of the worker."""


class _Worker:
    """One worker in the main process. `link` is None while it is down."""

    def __init__(self, number: int, ledger: WorkerLedger) -> None:
        self.number = number
        self.ledger = ledger
        self.link: Link | None = None
        self.is_silent = False
        self._parts: tuple[Questions, PlanSender] | None = None

    def status(self, life: Life) -> WorkerStatus:
        return WorkerStatus(
            number=self.number,
            pid=life.pid,
            state=life.state.shown,
            connections={port: self.ledger.clients.get(port, 0) for port in PORTS},
            restarts=life.restarts,
            memory_bytes=self.ledger.memory_bytes,
            cpu_s=self.ledger.cpu_s,
            superseded=self.ledger.superseded,
            stalls=self.ledger.stalls,
        )

    def started(self, link: Link, questions: Questions, plans: PlanSender) -> None:
        self.link, self.is_silent = link, False
        self._parts = questions, plans
        link.handle("counts", partial(self._counted, link))
        plans.start()

    def ended(self) -> None:
        if self._parts is not None:
            for part in self._parts:
                part.stop()
        self.link = self._parts = None
        self.ledger.ended()

    def _counted(self, link: Link, **counts: Plain) -> None:
        if link is self.link:
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
        self._lives: Sequence[Life] = ()
        self.ports = {name: WholePort(name, connections, most) for name, most in limits.items()}
        counters = {name: port.rejected for name, port in self.ports.items()}
        self._workers = {
            number: _Worker(number, WorkerLedger(cache, counters, BOUNDS_S)) for number in range(1, processes + 1)
        }
        self._guesses = AllGuesses(self.ports, clock.seconds, self.links)
        self._counting = False
        self._waiting: list[Deferred[None]] = []

    # The lives of the workers

    def follow(self, lives: Sequence[Life]) -> None:
        """Report the states of these workers, which are in the order of their numbers."""
        self._lives = lives
        self._cache.see_workers_by(self.statuses)

    def started(self, number: int, link: Link, sources: Sources) -> None:
        """Serve a worker that has its settings. Call it before snapshots are sent over `link`."""
        self._connections.clear(number)
        plans, questions = PlanSender(self._cache, link, self._clock), Questions(sources, link, self._clock)
        self._workers[number].started(link, questions, plans)
        self._guesses.add(link)

    def ended(self, number: int) -> None:
        """Note that a worker has ended or is about to, and its connections with it."""
        self._workers[number].ended()
        self._connections.clear(number)

    def links(self) -> Iterator[Link]:
        """Yield the links of the workers that live."""
        yield from (each.link for each in self._workers.values() if each.link is not None)

    # The facts

    def statuses(self) -> Sequence[WorkerStatus]:
        """Return the workers for the status and the metrics."""
        return [each.status(life) for each, life in zip(self._workers.values(), self._lives, strict=True)]

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
