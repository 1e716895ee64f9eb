"""The parts of the main process that run the workers.

Only a service with workers imports this module and what it imports.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from twisted.application.service import Service

from cacheservice.app.workers import descriptors
from cacheservice.app.workers.center import Center, Shared
from cacheservice.app.workers.connections import SharedMemory
from cacheservice.app.workers.held import HeldSockets
from cacheservice.app.workers.member import Feed, Surroundings, Timing
from cacheservice.app.workers.spawn import Spawner
from cacheservice.app.workers.supervisor import Supervisor
from cacheservice.base.backoff import full_jitter
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.config import Settings
from cacheservice.ops.exposition import Metrics
from cacheservice.ports.rotation import Secrets
from cacheservice.replication.encoder import Encoder
from cacheservice.replication.link import Link
from cacheservice.replication.sender import RESEND, TAKEN, Sender
from cacheservice.sources.frames.clocks import Clocks

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0


class Workers:
    """Builds the sockets of the workers and their supervisor.

    :param center: answers the workers; None for workers without answers.
    """

    def __init__(
        self,
        settings: Settings,
        cache: Cache,
        reactor: Reactor,
        log: Log,
        timing: Timing | None = None,
        center: Center | None = None,
    ) -> None:
        self._center = center
        self._memory = SharedMemory() if center is None else center.memory
        self._cache = cache
        self._reactor = reactor
        self._log = log
        self._encoder = Encoder(Clocks(reactor))
        self._sockets = HeldSockets(settings, reactor)
        surroundings = Surroundings(
            spawn=Spawner(reactor, self._descriptors),
            attach=self._attach,
            pause_s=full_jitter(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, random.random),
            timing=timing or Timing(),
            reactor=reactor,
            log=log,
        )
        self.supervisor = Supervisor(settings, surroundings)
        if center is not None:
            center.whole.follow(self.supervisor.members)

    def _descriptors(self) -> dict[int, int]:
        return {descriptors.MEMORY: self._memory.descriptor, **self._sockets.descriptors()}

    def services(self) -> Iterator[Service]:
        """Return the services in the order of their start."""
        yield from self._sockets.services(self.supervisor.stop_resp)
        yield self.supervisor

    def apply(self, settings: Settings) -> None:
        """Apply a changed configuration in all workers."""
        self.supervisor.apply(settings)
        if self._center is not None:
            self._center.apply(settings)

    def _attach(self, number: int, link: Link) -> Feed:
        """Return the feed of a worker: all that the cache publishes."""
        sender = Sender(self._cache, link, self._encoder, self._reactor, self._log.bind(worker=number))
        link.handle(TAKEN, sender.taken)
        link.handle(RESEND, sender.resend)
        return sender if self._center is None else self._center.attached(number, link, sender)


def make_workers(
    settings: Settings,
    cache: Cache,
    refreshes: Refreshes,
    metrics: Metrics,
    secrets: Secrets,
    reactor: Reactor,
    log: Log,
) -> Workers:
    """Return the workers of a service, and what answers them.

    :param refreshes: carries out what clients request of the refreshes.
    :param metrics: the ports of the workers are added to it.
    :param secrets: the present secrets of the ports.
    """
    center = Center(settings, Shared(cache, refreshes, metrics, secrets, reactor))
    return Workers(settings, cache, reactor, log, center=center)
