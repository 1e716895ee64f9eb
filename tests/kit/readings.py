"""What a read returned, in the words of the tests."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from random import random
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Log
from cacheservice.cache.cache import Cache
from cacheservice.cache.drain import Drain
from cacheservice.cache.rows import RowsBuilder
from cacheservice.config import DatasetSettings
from cacheservice.refresh.process import Process
from cacheservice.refresh.service import CacheService, Limits
from cacheservice.sources.base import AllRows, ChangedRows, ReadPlan, ReadResult, Source
from cacheservice.sources.postgres.database import Database


def kind_of(result: ReadResult) -> str:
    """Return "all", "delta" or "unchanged"."""
    if isinstance(result, AllRows):
        return "all"
    return "delta" if isinstance(result, ChangedRows) else "unchanged"


def because_of(result: ReadResult) -> str | None:
    """Return the reason for a full read; None for other results."""
    return result.because if isinstance(result, AllRows) else None


def how_read(result: ReadResult) -> tuple[str, str | None]:
    """Return `kind_of` and `because_of`."""
    return kind_of(result), because_of(result)


def read_one(
    database: Database, dataset: DatasetSettings, build: Callable[[], RowsBuilder], **plan: Any
) -> Deferred[ReadResult]:
    """Read one dataset."""
    return database.read([ReadPlan(dataset, build, **plan)]).addCallback(itemgetter(0))


def refreshes_of(cache: Cache, source: Source, log: Log, *, max_connections: int = 2) -> CacheService:
    """Return the refreshes of a cache on the real reactor, not started."""
    process = Process(reactor, random, log, Drain(reactor))
    return CacheService(cache, source, Limits(max_connections), process)
