"""Assembles the HTTP port from the handlers of its routes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from cacheservice.base.interfaces import Reactor
from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http import assets
from cacheservice.ports.http.access import Access, AccessSettings
from cacheservice.ports.http.bodies import GzipBodies
from cacheservice.ports.http.commands import Commands
from cacheservice.ports.http.connection import HEAD_TIMEOUT_S, HttpClients
from cacheservice.ports.http.data import Data
from cacheservice.ports.http.digests import Digests
from cacheservice.ports.http.events import Feed
from cacheservice.ports.http.guard import Guard
from cacheservice.ports.http.messages import WallClock
from cacheservice.ports.http.monitors import Exposition, MetricsPage, Probes
from cacheservice.ports.http.pages import Pages
from cacheservice.ports.http.reads import Reads
from cacheservice.ports.http.reports import Reports
from cacheservice.ports.http.routes import Handlers, Main, Routes, table


@dataclass(frozen=True, slots=True)
class Served:
    """The parts of the service behind the port.

    :param freshness: serves ``?max_age=``.
    :param refreshes: the target of commands.
    :param exposition: renders /metrics; None for no such page.
    :param main: the main process, if this one is only a part of the service.
    """

    cache: Cache
    freshness: Freshness
    refreshes: Refreshes
    exposition: Exposition | None = None
    main: Main | None = None


class Assembled(NamedTuple):
    """The routes with their handlers, and the parts that have to be stopped."""

    routes: Routes
    feed: Feed
    bodies: GzipBodies

    def stop(self) -> None:
        """Send no more events, and free the compressed bodies."""
        self.feed.stop()
        self.bodies.forget()


def assembled(served: Served, access: Access, reactor: Reactor, wall_s: WallClock = time.time) -> Assembled:
    """Build the handlers of all routes.

    :param reactor: `IReactorTime`, monotonic, and `IReactorThreads`.
    :param wall_s: returns seconds since the epoch, for dates.
    """
    bodies, feed = GzipBodies(reactor), Feed(served.cache, reactor)
    reads = Reads(served.cache, served.freshness, wall_s)
    exposition = served.exposition
    handlers = Handlers(
        data=Data(reads, bodies, Digests(reactor)),
        reports=Reports(served.cache, reads, wall_s),
        commands=Commands(reads, served.refreshes, wall_s),
        probes=Probes(served.cache, wall_s),
        pages=Pages(assets.load(), feed, access, wall_s),
        metrics=None if exposition is None else MetricsPage(exposition, bodies, wall_s),
    )
    routes = Routes(table(handlers, has_commands=access.has_commands), access, wall_s, served.main)
    return Assembled(routes, feed, bodies)


class HttpFactory(HttpClients):
    """Creates the connections of the HTTP port.

    :param reactor: `IReactorTime`, monotonic, and `IReactorThreads`.
    :param head_timeout_s: from the first byte of a request's head to its last.
    :param wall_s: returns seconds since the epoch, for dates.
    """

    def __init__(
        self,
        served: Served,
        access: AccessSettings,
        limits: Limits,
        reactor: Reactor,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        wall_s: WallClock = time.time,
    ) -> None:
        super().__init__(limits, reactor, head_timeout_s)
        self.guard = None
        if access.token or access.admin_token:
            self.guard = Guard(access.token, access.admin_token, self.rejected, reactor, look=access.look)
        checked = Access(self.guard, access.allow_data)
        self._assembled = assembled(served, checked, reactor, wall_s)
        self.routes, self.feed, self.bodies = self._assembled

    def replace_tokens(self, token: str, admin_token: str) -> None:
        """Require these tokens from now on. Open event streams continue."""
        if self.guard is not None:
            self.guard.replace(token, admin_token)

    def close_clients(self) -> None:
        """Close every connection now. Event streams end, other replies in progress are aborted."""
        super().close_clients()
        self._assembled.stop()
