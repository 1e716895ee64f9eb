"""The parts of the main process that answer its workers."""

from __future__ import annotations

from typing import NamedTuple

from cacheservice.app.ports import room_of_worker
from cacheservice.app.workers.connections import SharedConnections, SharedMemory
from cacheservice.app.workers.member import Feed
from cacheservice.app.workers.questions import Sources
from cacheservice.app.workers.whole import Whole
from cacheservice.base.interfaces import Reactor
from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.config import Settings
from cacheservice.ops.exposition import Metrics
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http.factory import Served, assembled
from cacheservice.ports.http.whole import Answers, CheckedElsewhere
from cacheservice.ports.rotation import ClientSecrets, Secrets
from cacheservice.replication.link import Link


class Shared(NamedTuple):
    """The objects of the main process that the workers need.

    :param refreshes: carries out what clients request of the refreshes.
    :param metrics: renders the metrics; the ports of the workers are added to it.
    :param secrets: the present secrets of the ports.
    """

    cache: Cache
    refreshes: Refreshes
    metrics: Metrics
    secrets: Secrets
    reactor: Reactor


class Center:
    """Answers the workers, adds up their counts, and sends them secrets and guesses.

    `memory` has the numbers of the clients of all workers.
    """

    def __init__(self, settings: Settings, shared: Shared) -> None:
        cache, reactor = shared.cache, shared.reactor
        self._secrets = shared.secrets
        self._room = room_of_worker(settings)
        self.memory = SharedMemory()
        most = self._room.limit(settings.limits.max_connections)
        ports = {"resp": settings.resp.enabled, "http": settings.http.enabled}
        limits = {name: most for name, is_enabled in ports.items() if is_enabled}
        connections = SharedConnections(self.memory.descriptor)
        self.whole = Whole(settings.workers.processes, cache, connections, limits, reactor)
        shared.metrics.prepare_by(self.whole.updated)
        for name, port in self.whole.ports.items():
            shared.metrics.add_port(name, port)
        served = Served(cache, Freshness(shared.refreshes, cache.database, reactor), shared.refreshes, shared.metrics)
        access = CheckedElsewhere(has_commands=bool(settings.http.admin_token.get_secret_value()))
        self._assembled = assembled(served, access, reactor)
        answers = Answers(self._assembled.routes)
        self._sources = Sources(cache, shared.refreshes, answers, shared.secrets.look, self.whole)
        self._secrets.watch(self._send_secrets)

    def attached(self, number: int, link: Link, snapshots: Feed) -> Feed:
        """Return the feed of a worker, which answers it, too.

        :param snapshots: sends it the snapshots.
        """
        return _WorkerFeed(self, number, link, snapshots)

    def started(self, number: int, link: Link) -> None:
        """Serve a worker that has its settings."""
        # The files may have changed since the configuration was read.
        link.send("secrets", secrets=self._secrets.current.by_key())
        self.whole.started(number, link, self._sources)

    def apply(self, settings: Settings) -> None:
        """Apply changed limits."""
        limits = settings.limits
        for port in self.whole.ports.values():
            most = self._room.limit(limits.max_connections)
            port.set_limits(max_connections=most, idle_timeout_s=limits.idle_timeout_s)

    def stop(self) -> None:
        """Free everything, after the workers have ended."""
        self._assembled.stop()

    def _send_secrets(self, secrets: ClientSecrets) -> None:
        for link in self.whole.links():
            link.send("secrets", secrets=secrets.by_key())


class _WorkerFeed:
    def __init__(self, center: Center, number: int, link: Link, snapshots: Feed) -> None:
        self._center = center
        self._number = number
        self._link = link
        self._snapshots = snapshots

    def start(self) -> None:
        self._center.started(self._number, self._link)
        self._snapshots.start()

    def stop(self) -> None:
        self._snapshots.stop()
        self._center.whole.ended(self._number)
