"""The half of the service that reads: the database, the saved snapshots, and the refreshes that fill the cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Protocol

from pydantic import SecretStr
from twisted.application.service import Service

from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.cache.drain import Drain
from cacheservice.config import PersistenceSettings, PostgresSettings, Settings
from cacheservice.refresh.process import Process
from cacheservice.refresh.service import CacheService, Limits
from cacheservice.sources.disk.store import SnapshotStore
from cacheservice.sources.postgres import target
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.listening.calls import Observer
from cacheservice.sources.postgres.listening.listener import Listener
from cacheservice.sources.postgres.listening.opening import Access
from cacheservice.sources.postgres.logical.service import Capture
from cacheservice.sources.postgres.logical.streaming import CaptureObserver, Surroundings
from cacheservice.sources.postgres.notifications import Notifications
from cacheservice.sources.postgres.pruning import Pruning
from cacheservice.sources.postgres.target import Target


class DatabaseService(Service):
    """Closes the sessions that the database layer keeps between reads."""

    name = "postgres"

    def __init__(self, database: Database) -> None:
        self._database = database

    def stopService(self) -> None:
        super().stopService()
        self._database.stop()


class Fleet(Protocol):
    """The part of the service that leads and follows in a fleet: ``cacheservice.app.fleet.FleetPart``."""

    def services(self) -> Iterator[Service]:
        """Return the services in the order of their start."""

    def connect_to(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions with these settings from now on."""

    def redeclared(self) -> None:
        """Lead and follow the datasets that are declared now."""


class Reads:
    """Builds the parts that fill `cache`, and reconfigures them."""

    def __init__(self, settings: Settings, cache: Cache, reactor: Reactor, log: Log) -> None:
        postgres = settings.postgres
        parsed = target.parse(postgres.dsn.get_secret_value())
        drain = Drain(reactor)
        self.database = Database(reactor, parsed, postgres.connect_timeout_s, cache.database)
        self._notifications = Notifications(cache)
        access = Access(parsed, self.database.connector, postgres.connect_timeout_s)
        observer = Observer(self._notifications.heard, self._notifications.missed)
        self._listener = Listener(access, observer, cache.database, reactor, log)
        around = Surroundings(
            self.database,
            CaptureObserver(self._notifications.captured, self._notifications.missed, self._notifications.bases),
            reactor,
            log,
        )
        self._capture = Capture(access, around, cache.database)
        self._use_capture(postgres)
        self._store = _store(settings.persistence, cache, drain, reactor, log)
        self.refresh = CacheService(
            cache,
            self.database,
            _limits(postgres),
            Process(reactor, random.random, log, drain),
            self._store,
            self._listener.heard_all,
        )
        self.requests: Refreshes = self.refresh
        self._fleet: Fleet | None = None
        if settings.cluster.enabled:
            # Only a process of a fleet needs these modules, which take a tenth of the time of a start, and 4 MiB.
            from cacheservice.app import fleet  # noqa: PLC0415  # see above

            process = fleet.Process(cache, drain, reactor, log)
            self._fleet = fleet.FleetPart(settings.cluster, access, self.refresh, process, self._listen)
        self._pruning = Pruning(cache, self.database, reactor, log)
        self._notifications.deliver_to(self.refresh)
        if self._fleet is None:
            self._listen()
        self.database.make_room_by(self._listener.give_up_session)  # with few connections, refreshes have priority

    def services(self) -> Iterator[Service]:
        """Return the services in the order of their start."""
        yield DatabaseService(self.database)
        if self._store is not None:
            yield self._store
        yield self._pruning
        yield self._capture  # before the first reads, which wait for its stream
        yield self.refresh
        yield self._listener
        if self._fleet is not None:
            yield from self._fleet.services()

    def connect_to(self, dsn: SecretStr, connect_timeout_s: float) -> None:
        """Open sessions with these settings from now on."""
        parsed = target.parse(dsn.get_secret_value())
        self.database.configure(parsed, connect_timeout_s)
        self._listener.configure(parsed, connect_timeout_s)
        self._capture.configure(parsed, connect_timeout_s)
        if self._fleet is not None:
            self._fleet.connect_to(parsed, connect_timeout_s)

    def limit(self, postgres: PostgresSettings) -> None:
        """Apply changed limits of the refreshes, and the way in which changes are captured."""
        self.refresh.set_limits(_limits(postgres))
        self._use_capture(postgres)

    def listen(self) -> None:
        """Listen to the channels, and capture the changes, that the declared datasets need now."""
        if self._fleet is not None:
            self._fleet.redeclared()
        self._listen()

    def _listen(self) -> None:
        self._listener.listen_to(self._notifications.channels())
        self._capture.capture(self._publication, self._notifications.watching())

    def _use_capture(self, postgres: PostgresSettings) -> None:
        self.database.capturing.configure(postgres.capture, self._capture)
        self._notifications.use_triggers(postgres.capture != "logical")
        self._publication = "" if postgres.capture == "triggers" else postgres.publication


def _limits(postgres: PostgresSettings) -> Limits:
    return Limits(postgres.max_connections, postgres.max_load)


def _store(
    settings: PersistenceSettings, cache: Cache, drain: Drain, reactor: Reactor, log: Log
) -> SnapshotStore | None:
    if not settings.directory:
        return None
    return SnapshotStore(cache, settings, release=drain.add, reactor=reactor, log=log)
