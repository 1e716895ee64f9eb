"""Change capture by logical decoding, over real servers and the real reactor."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from cacheservice.base.interfaces import Log
from cacheservice.cache.cache import Cache
from cacheservice.refresh.service import CacheService
from cacheservice.sources.postgres.capturing import Mode
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.listening.opening import Access
from cacheservice.sources.postgres.logical.service import Capture
from cacheservice.sources.postgres.logical.streaming import CaptureObserver, Surroundings
from cacheservice.sources.postgres.notifications import Notifications
from cacheservice.sources.postgres.target import parse

PUBLICATION = "cacheservice"
LOGICAL = {"wal_level": "logical", "wal_writer_delay": "10ms"}
"""Settings of a server whose log can be decoded, and reaches the disk soon."""


def capturing(
    test: TestCase,
    dsn: str,
    cache: Cache,
    database: Database,
    service: CacheService,
    log: Log,
    mode: Mode = "logical",
    publication: str = PUBLICATION,
) -> Capture:
    """Return a capture that runs until the end of the test, for all datasets of a cache."""
    notifications = Notifications(cache)
    notifications.deliver_to(service)
    observer = CaptureObserver(notifications.captured, notifications.missed, notifications.bases)
    access = Access(parse(dsn), database.connector, 30.0)
    capture = Capture(access, Surroundings(database, observer, reactor, log), cache.database)
    database.capturing.configure(mode, capture)
    capture.startService()
    test.addCleanup(capture.stopService)
    capture.capture(publication, notifications.watching())
    return capture


def slots(rows: list[tuple[Any, ...]]) -> list[str]:
    """Return the first column."""
    return [name for name, *_ in rows]
