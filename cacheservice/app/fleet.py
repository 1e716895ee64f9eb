"""Builds the part of the service that leads and follows in a fleet."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from twisted.application.service import Service

from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache
from cacheservice.cache.drain import Drain
from cacheservice.cache.events import Event, Noted
from cacheservice.config import ClusterSettings, valkey_url
from cacheservice.refresh.service import CacheService
from cacheservice.replication.cluster import Carried, Cluster
from cacheservice.replication.leading import Fleet
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.publisher import Here
from cacheservice.sources.frames.clocks import Clocks
from cacheservice.sources.postgres.leads import LeadObserver, Leads, LeadSettings
from cacheservice.sources.postgres.listening.opening import Access
from cacheservice.sources.postgres.target import Target


class Process(NamedTuple):
    """The parts of the process that a fleet uses."""

    cache: Cache
    drain: Drain
    reactor: Reactor
    log: Log


class FleetPart:
    """The services of a process of a fleet.

    :param access: how sessions are opened, for the leads.
    :param refresh: refreshes what this process leads.
    :param changed: called when this process begins or ends to refresh a dataset.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        access: Access,
        refresh: CacheService,
        process: Process,
        changed: Callable[[], None],
    ) -> None:
        cache, drain, reactor, log = process
        self._leads = leads = Leads(LeadSettings(settings.prefix), access, cache.database, reactor, log)
        name = settings.name or f"{socket.gethostname()}:{os.getpid()}"
        valkey = Valkey(valkey_url.parse(settings.valkey_url.get_secret_value()), reactor)
        here = Here(name, cache, Clocks(reactor), reactor, log, random.random)
        fleet = Fleet(
            refresh,
            lambda: leads.can_refresh,
            leads.resign,
            settings.fallback_after_s,
            time.time,
            lambda: leads.problem,
        )
        self._cluster = Cluster(Carried(valkey, settings.prefix, drain.add, reactor), here, fleet, leads)
        leads.notify(LeadObserver(self._cluster.gained, self._cluster.lost))
        refresh.follow_leaders(self._cluster.ask)
        self._cache = cache
        self._changed = changed
        self._refreshed: set[str] = set()
        cache.events.subscribe(self._noted, Noted)

    def services(self) -> Iterator[Service]:
        """Return the services in the order of their start."""
        yield self._cluster
        yield self._leads

    def _noted(self, event: Event) -> None:
        dataset = self._cache.datasets.get(event.dataset)
        if dataset is not None and dataset.is_refreshed_here is not (dataset.name in self._refreshed):
            self._refreshed ^= {dataset.name}
            self._changed()

    def connect_to(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions with these settings from now on."""
        self._leads.configure(target, connect_timeout_s)

    def redeclared(self) -> None:
        """Lead and follow the datasets that are declared now."""
        self._cluster.redeclared()
