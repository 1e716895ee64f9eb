"""The part of the service that one worker is, as its ports see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from twisted.application.service import Service

from cacheservice.app.workers import descriptors
from cacheservice.app.workers.connections import SharedConnections, SharedTally
from cacheservice.app.workers.counting import COUNT_S, CountedPort, Counting
from cacheservice.app.workers.guesses import SharedGuesses
from cacheservice.app.workers.main_process import AskedSecrets, MainProcess
from cacheservice.app.workers.plans import follow_plans
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.timers import looping
from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Histogram
from cacheservice.ports.http import HttpFactory
from cacheservice.ports.resp import client_list
from cacheservice.ports.resp.connection import RespFactory
from cacheservice.ports.resp.server import own_usage
from cacheservice.ports.resp.whole import Totals
from cacheservice.ports.rotation import ClientSecrets
from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain

FIRST_IDS = 1 << 32
"""The ids for the clients of one worker process, more than it can use up."""


class Incarnation(NamedTuple):
    """One process of one worker.

    :param number: of the worker, from 1.
    :param start: how often the worker has been started, with this process.
    :param processes: how many workers there are.
    """

    number: int
    start: int
    processes: int

    @property
    def first_id(self) -> int:
        """The CLIENT ID of the first client of this process, so that no id is used twice.

        Clients in JavaScript read ids up to 2**53 exactly: those of the first two million processes of a service.
        """
        return ((self.start - 1) * self.processes + self.number) * FIRST_IDS + 1


def inherited_connections() -> SharedConnections:
    """Return the numbers of clients of all workers, from the memory that a worker inherits."""
    connections = SharedConnections(descriptors.MEMORY)
    os.close(descriptors.MEMORY)
    return connections


class Part:
    """Connects the ports of a worker with the main process.

    :param connections: of all workers.
    :param cache: of this process.
    """

    def __init__(self, incarnation: Incarnation, connections: SharedConnections, cache: Cache, link: Link) -> None:
        self.incarnation = incarnation
        self.main = MainProcess(cache, link)
        self._connections = connections
        self._link = link
        self._guesses = SharedGuesses(link)
        self._factories: dict[str, RespFactory | HttpFactory] = {}
        follow_plans(cache, link)
        link.handle("clients", self._clients)

    def tally(self, port: str) -> SharedTally:
        """Return the numbers of clients of a port in all workers."""
        return self._connections.tally(self.incarnation.number, port)

    def secrets(self, started: ClientSecrets, log: Log) -> AskedSecrets:
        """Return the secrets of the ports, which the main process replaces."""
        return AskedSecrets(started, self._link, log)

    def add_resp(self, factory: RespFactory) -> None:
        """Make the RESP port a part of that of the service."""
        self._factories["resp"] = factory
        factory.join(self.main, self.incarnation.first_id)
        self._guesses.add("resp", factory.server.passwords.throttle)

    def add_http(self, factory: HttpFactory) -> None:
        """Make the HTTP port a part of that of the service. Its `Served` has `main`."""
        self._factories["http"] = factory
        if factory.guard is not None:
            self._guesses.add("http", factory.guard.passwords.throttle)

    def totals(self) -> Totals:
        """Return the totals of this process."""
        resp = self._factories.get("resp")
        return resp.server.totals() if isinstance(resp, RespFactory) else own_usage()

    @property
    def factories(self) -> Mapping[str, CountedPort]:
        """The factories of the ports by name."""
        return self._factories

    def _clients(self) -> Plain:
        resp = self._factories.get("resp")
        if not isinstance(resp, RespFactory):
            return []
        return [[client.id, client_list.line(client)] for client in resp.server.sessions.values()]


class CountsService(Service):
    """Sends the counts of a worker to the main process: once a second, when it asks for them, and at the end.

    :param lateness: of the ticks of the reactor.
    :param superseded: returns the bytes of each superseded generation in memory.
    """

    name = "counts"

    def __init__(
        self,
        cache: Cache,
        part: Part,
        lateness: Histogram,
        superseded: Callable[[], Mapping[tuple[str, int], int]],
        link: Link,
        clock: Clock,
    ) -> None:
        self._counting = Counting(cache, part.factories, part.totals, lateness, superseded)
        self._link = link
        self._loop = looping(clock, self._send)
        link.handle("count", self._send)

    def startService(self) -> None:
        super().startService()
        self._loop.start(COUNT_S)

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        self._send()

    def _send(self) -> None:
        self._link.send("counts", **self._counting.collect().plain())
