"""Applies a changed configuration while the service runs.

It applies every key that can change, or nothing if any key is invalid.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pydantic import SecretStr
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice import config
from cacheservice.base.errors import ConfigError
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.threads import in_thread
from cacheservice.cache.cache import Cache, Rejection, Reloaded
from cacheservice.config import ConfigFile, Settings
from cacheservice.ops.logs import Threshold
from cacheservice.ports.admission import Room
from cacheservice.ports.rotation import ClientSecrets, Rotation
from cacheservice.refresh.service import CacheService
from cacheservice.sources.postgres import target
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.listener import Listener

_AT_ONCE = frozenset(
    {
        "postgres.dsn",
        "postgres.connect_timeout_s",
        "postgres.max_connections",
        "postgres.max_load",
        "postgres.search_path",
        "postgres.settings",
        "limits.max_connections",
        "limits.idle_timeout_s",
        "log.level",
    }
)
"""Keys outside `datasets` that take effect without a restart."""
_AT_ONCE_IF_SET = frozenset(config.CLIENT_SECRETS)
"""Keys that take effect without a restart if a new secret replaces an old one."""
_SECRET_INTERVAL_S = 5.0
_OF_DATASETS = frozenset({"defaults", "datasets"})


class Limited(Protocol):
    """The factory of a port, whose limits a reload changes."""

    def set_limits(self, *, max_connections: int, idle_timeout_s: float) -> None:
        """Apply other limits from now on."""


class Reload:
    """Reads the configuration again on request, one read at a time.

    :param started: the settings with which the service was started.
    :param load: reads the configuration (it blocks) and returns its file too; raises `ConfigError`.
    :param ports: the factories, which get the new limits.
    :param room: the descriptors for clients, whatever the configured limits are.
    :param rotation: gets the new secrets of the ports.
    :param reactor: `IReactorThreads`.
    """

    def __init__(
        self,
        started: Settings,
        load: Callable[[], tuple[Settings, ConfigFile]],
        cache: Cache,
        refresh: CacheService,
        database: Database,
        listener: Listener,
        ports: Sequence[Limited],
        room: Room,
        rotation: Rotation,
        threshold: Threshold,
        reactor: Reactor,
        log: Log,
    ) -> None:
        self._started = started
        self._dsn = started.postgres.dsn
        self._load = load
        self._cache = cache
        self._refresh = refresh
        self._database = database
        self._listener = listener
        self._ports = ports
        self._room = room
        self._rotation = rotation
        self._threshold = threshold
        self._reactor = reactor
        self._log = log
        self._connect_timeout_s = started.postgres.connect_timeout_s
        self._asked: list[Deferred[Reloaded]] = []
        self._running = False
        self._secret_read_at = -math.inf

    def reload(self) -> Deferred[Reloaded]:
        """Read the configuration in a thread, then apply it in one turn of the reactor.

        The Deferred fires when it is in effect. Requests that arrive during a read share the next one.

        :raises ConfigError: with every problem; in this case nothing has changed.
        :raises Stopped: if the service is stopping.
        """
        asked: Deferred[Reloaded] = Deferred()
        self._asked.append(asked)
        self._begin()
        return asked

    def login_refused(self) -> None:
        """Read the file of the secret again, at most every 5 s, without a reload.

        The secret may have been rotated.
        """
        now = self._reactor.seconds()
        if self._running or now - self._secret_read_at < _SECRET_INTERVAL_S:
            return
        self._secret_read_at = now
        reading = in_thread(self._reactor, config.dsn_in_file, os.environ)
        reading.addCallback(self._use_secret).addErrback(self._not_used)

    def _use_secret(self, dsn: SecretStr | None) -> None:
        if dsn is None or dsn == self._dsn or self._running or target.problem(dsn.get_secret_value()) is not None:
            return
        self._log.info(
            "dsn_read_again", reason="the server refused the login, and the file of postgres.dsn has changed"
        )
        self._dsn = dsn
        parsed = target.parse(dsn.get_secret_value())
        self._database.configure(parsed, self._connect_timeout_s)
        self._listener.configure(parsed, self._connect_timeout_s)
        # All datasets are read at once, as after a reload that changes the DSN.
        self._refresh.redeclare([dataset.settings for dataset in self._cache.datasets.values()], moved=True)

    def _not_used(self, failure: Failure) -> None:
        self._log.error("internal_error", error=failure.getErrorMessage(), traceback=failure.getTraceback())

    def _begin(self) -> None:
        if self._running or not self._asked:
            return
        self._running = True
        asked, self._asked = self._asked, []
        Deferred.fromCoroutine(self._reload()).addBoth(self._ended, asked)

    def _ended(self, result: Any, asked: Sequence[Deferred[Reloaded]]) -> None:
        self._running = False
        self._begin()
        for each in asked:
            each.callback(result)

    async def _reload(self) -> Reloaded:
        try:
            settings, file = await in_thread(self._reactor, self._load)
        except ConfigError as error:
            self._cache.rejection = Rejection(error.problems, self._cache.now())
            self._log.error("config_rejected", error="; ".join(error.problems))
            raise
        return self._apply(settings, file)

    def _apply(self, settings: Settings, file: ConfigFile) -> Reloaded:
        postgres, dsn = settings.postgres, settings.postgres.dsn
        # Before the datasets, because refreshes that start at once use it.
        parsed = target.parse(dsn.get_secret_value())
        self._database.configure(parsed, postgres.connect_timeout_s)
        self._listener.configure(parsed, postgres.connect_timeout_s)
        self._refresh.slots.budget.share = postgres.max_load
        self._refresh.slots.set_limit(postgres.max_connections)
        datasets = self._refresh.redeclare(list(settings.datasets.values()), moved=dsn != self._dsn)
        self._listener.listen_to(self._refresh.channels())
        self._dsn, self._connect_timeout_s = dsn, postgres.connect_timeout_s
        self._threshold.set(settings.log.level)
        for port in self._ports:
            port.set_limits(
                max_connections=self._room.limit(settings.limits.max_connections),
                idle_timeout_s=settings.limits.idle_timeout_s,
            )
        self._rotation.take(ClientSecrets.of(settings).by_key())
        reloaded = Reloaded(datasets, _needs_restart(self._started, settings), file)
        self._cache.configured_by(file)
        self._cache.rejection = None
        self._log.info(
            "config_reloaded",
            added=datasets.added,
            changed=datasets.changed,
            removed=datasets.removed,
            needs_restart=reloaded.needs_restart,
            file=str(file),
        )
        return reloaded


def _needs_restart(started: Settings, settings: Settings) -> list[str]:
    """Return the changed keys that need a restart; they keep their old values."""
    return [
        f"{table}.{key}"
        for table in Settings.model_fields
        if table not in _OF_DATASETS
        for key in type(getattr(settings, table)).model_fields
        if f"{table}.{key}" not in _AT_ONCE
        if _differ(f"{table}.{key}", getattr(getattr(started, table), key), getattr(getattr(settings, table), key))
    ]


def _differ(key: str, started: Any, now: Any) -> bool:
    return bool(started) != bool(now) if key in _AT_ONCE_IF_SET else started != now
