"""Applies a changed configuration while the service runs.

It applies every key that can change, or nothing if any key is invalid.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pydantic import SecretStr
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice import config
from cacheservice.app.effective import needs_restart
from cacheservice.app.reads import Reads
from cacheservice.app.start import load_with_file
from cacheservice.base.errors import ConfigError
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.threads import in_thread
from cacheservice.cache.cache import Cache, Reloaded
from cacheservice.config import ConfigFile, Settings
from cacheservice.ops.logs import Threshold
from cacheservice.sources.postgres import target

_SECRET_INTERVAL_S = 5.0


class Process(NamedTuple):
    """The parts of the process that a reload uses.

    :param reactor: `IReactorThreads`.
    """

    reactor: Reactor
    threshold: Threshold
    log: Log


class Served(Protocol):
    """The parts that serve clients."""

    def apply(self, settings: Settings, /) -> None:
        """Apply changed limits and secrets."""


class Both:
    """Applies a changed configuration in this process and in the workers."""

    def __init__(self, here: Served, workers: Served) -> None:
        self._here = here
        self._workers = workers

    def apply(self, settings: Settings) -> None:
        self._here.apply(settings)
        self._workers.apply(settings)


class Reload:
    """Reads the configuration again on request, one read at a time.

    :param started: the settings with which the service was started.
    """

    def __init__(self, started: Settings, cache: Cache, reads: Reads, ports: Served, process: Process) -> None:
        self._started = started
        self._dsn = started.postgres.dsn
        self._connect_timeout_s = started.postgres.connect_timeout_s
        self._cache = cache
        self._reads = reads
        self._ports = ports
        self._reactor, self._threshold, self._log = process
        self._asked: list[Deferred[Reloaded]] = []
        self._running = False
        self._secret_read_at = -math.inf
        cache.database.watch_refused_logins(self.login_refused)

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
        if dsn is None or dsn == self._dsn or target.problem(dsn.get_secret_value()) is not None:
            return
        if self._running or self._cache.stopping:
            return
        self._log.info(
            "dsn_read_again", reason="the server refused the login, and the file of postgres.dsn has changed"
        )
        self._dsn = dsn
        self._reads.connect_to(dsn, self._connect_timeout_s)
        # All datasets are read at once, as after a reload that changes the DSN.
        self._reads.refresh.redeclare([dataset.settings for dataset in self._cache.datasets.values()], moved=True)

    def _not_used(self, failure: Failure) -> None:
        log_internal_error(self._log, failure)

    def _begin(self) -> None:
        if self._running or not self._asked:
            return
        self._running = True
        asked, self._asked = self._asked, []
        Deferred.fromCoroutine(self._reload()).addBoth(self._ended, asked)

    def _ended(self, result: Reloaded | Failure, asked: Sequence[Deferred[Reloaded]]) -> None:
        self._running = False
        self._begin()
        for each in asked:
            each.callback(result)

    async def _reload(self) -> Reloaded:
        try:
            settings, file = await in_thread(self._reactor, load_with_file)
        except ConfigError as error:
            self._cache.reject(error.problems)
            self._log.error("config_rejected", error="; ".join(error.problems))
            raise
        return self._apply(settings, file)

    def _apply(self, settings: Settings, file: ConfigFile) -> Reloaded:
        postgres, dsn = settings.postgres, settings.postgres.dsn
        # Before the datasets, because refreshes that start at once use it.
        self._reads.connect_to(dsn, postgres.connect_timeout_s)
        self._reads.limit(postgres)
        datasets = self._reads.refresh.redeclare(list(settings.datasets.values()), moved=dsn != self._dsn)
        self._reads.listen()
        self._dsn, self._connect_timeout_s = dsn, postgres.connect_timeout_s
        self._threshold.set(settings.log.level)
        self._ports.apply(settings)
        reloaded = Reloaded(datasets, needs_restart(self._started, settings), file)
        self._cache.configured_by(file)
        self._log.info(
            "config_reloaded",
            added=datasets.added,
            changed=datasets.changed,
            removed=datasets.removed,
            needs_restart=reloaded.needs_restart,
            file=str(file),
        )
        return reloaded
