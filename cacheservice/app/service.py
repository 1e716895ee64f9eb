"""The composition root: builds the parts of the service and connects them."""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from cacheservice import __version__, config
from cacheservice.app import signals
from cacheservice.app.reload import Reload
from cacheservice.app.signals import Signals
from cacheservice.base.errors import ConfigError, PortUnavailable
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache, ConnectionCap
from cacheservice.cache.describe import seconds
from cacheservice.cache.drain import Drain
from cacheservice.config import ConfigFile, PersistenceSettings, Settings
from cacheservice.ops import logs
from cacheservice.ops.metrics import Metrics, ServedPort
from cacheservice.ops.stall import StallWatch
from cacheservice.ops.statsd import StatsD
from cacheservice.ports import admission
from cacheservice.ports.admission import Door, Room
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.held import HeldSnapshots
from cacheservice.ports.http import AccessSettings, HttpFactory, Served
from cacheservice.ports.listen import PortService, tcp, unix
from cacheservice.ports.resp.connection import RespFactory
from cacheservice.ports.rotation import ClientSecrets, Rotation
from cacheservice.ports.status import Commands, StatusFactory
from cacheservice.refresh.service import CacheService
from cacheservice.sources.disk.store import SnapshotStore
from cacheservice.sources.postgres import target
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.listener import Listener

_STOP_TIMEOUT_S = 4.0
"""docs/deployment.md promises that a clean stop, including the last lines of the log, takes at most 5 s."""
_MANY_DESCRIPTORS = 1 << 20
"""The number of descriptors to plan for if the process has no limit of open files."""
_STOPPED_LAST = frozenset({"status", "http"})
"""Ports that serve probes. They close last, so that probes can see that the service is stopping."""


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Load the configuration of this environment.

    :raises ConfigError: with every problem of the configuration.
    """
    return config.load(environ, target.problem)


def load_settings_or_exit(environ: Mapping[str, str]) -> Settings:
    """Load the configuration, or print its problems and exit with code 1.

    Each problem is one line on standard error. Used at the start of a program.
    """
    try:
        return load_settings(environ)
    except ConfigError as error:
        _tell(str(error))
        raise SystemExit(1) from None


class CacheServiceRoot(MultiService):
    """Runs all parts: starts them in order and stops them one by one in reverse order.

    `MultiService` would stop all children at the same time. Here ports close before the refreshes that they may
    request. The ports that serve probes are an exception: they report that the service is stopping until everything
    else has stopped.
    """

    def __init__(self, cache: Cache, reactor: Reactor, writer: logs.LineWriter, log: Log) -> None:
        super().__init__()
        self._cache = cache
        self._reactor = reactor
        self._writer = writer
        self._log = log
        self._started_at = reactor.seconds()

    def privilegedStartService(self) -> None:
        """Bind the ports, or print one line about a port in use and exit.

        twistd would show the exception with a traceback.
        """
        try:
            super().privilegedStartService()
        except PortUnavailable as error:
            _tell(f"cacheservice: {error}")
            raise SystemExit(1) from None

    def startService(self) -> None:
        # Imported modules stay for good. The first full collection over them would block the reactor for 40 ms.
        gc.collect()
        gc.freeze()
        self._writer.start()
        self._reactor.addSystemEventTrigger("after", "shutdown", self._writer.stop)
        ports = {
            str(port.name): _address(port.address)
            for port in self
            if isinstance(port, PortService) and port.address is not None
        }
        self._log.info("service_started", version=__version__, pid=os.getpid(), **ports)
        super().startService()

    def stopService(self) -> Deferred[Any]:
        """Stop all children. The Deferred fires when all have stopped, or after 4 s."""
        Service.stopService(self)
        self._cache.stopping = True
        self._log.info("service_stopping")
        stopped = Deferred.fromCoroutine(self._stop_in_order())
        stopped.addTimeout(_STOP_TIMEOUT_S, cast("IReactorTime", self._reactor))
        return stopped.addBoth(self._tell_stopped)

    async def _stop_in_order(self) -> None:
        last_first = list(self)[::-1]
        children = sorted(last_first, key=lambda child: child.name in _STOPPED_LAST)
        try:
            while children:
                await maybeDeferred(children.pop(0).stopService)
        finally:
            for child in children:  # the time is up: stop the remaining children without waiting for them
                maybeDeferred(child.stopService).addErrback(self._tell_broken)

    def _tell_broken(self, failure: Failure) -> None:
        self._log.error("internal_error", error=failure.getErrorMessage(), traceback=failure.getTraceback())

    def _tell_stopped(self, result: object) -> None:
        clean = result is None
        self._log.info("service_stopped", clean=clean, uptime_s=seconds(self._reactor.seconds() - self._started_at))


class DatabaseService(Service):
    """Closes the sessions that the database layer keeps between reads."""

    name = "postgres"

    def __init__(self, database: Database, listener: Listener) -> None:
        self._database = database
        self._database.make_room_by(listener.give_up_session)  # with few connections, refreshes have priority

    def stopService(self) -> None:
        super().stopService()
        self._database.stop()


def make_service(
    settings: Settings, reactor: Reactor, writer: logs.LineWriter, threshold: logs.Threshold, log: Log
) -> CacheServiceRoot:
    """Return the whole service, not yet started.

    :param reactor: its `seconds` must be monotonic. If the wall clock were set back by an hour, every timer would be an
        hour late.
    """
    cache = Cache(settings.datasets.values(), reactor.seconds)
    cache.configured_by(config.config_file(os.environ))
    room = _make_room(settings, cache, log)
    root = CacheServiceRoot(cache, reactor, writer, log)
    parsed = target.parse(settings.postgres.dsn.get_secret_value())
    database = Database(
        reactor,
        parsed,
        settings.postgres.connect_timeout_s,
        cache.database,
    )
    drain = Drain(reactor)
    store = _store(settings.persistence, cache, drain, reactor, log)

    async def heard_all() -> bool:
        return await listener.heard_all()

    refresh = CacheService(
        cache,
        database,
        settings.postgres.max_connections,
        reactor,
        random.random,
        log,
        drain,
        store,
        settings.postgres.max_load,
        heard_all,
    )
    listener = Listener(
        parsed,
        database.connector,
        settings.postgres.connect_timeout_s,
        refresh.channels(),
        refresh.heard,
        refresh.missed,
        cache.database,
        reactor,
        random.random,
        log,
    )
    ports: list[Any] = []
    rotation = Rotation(
        ClientSecrets.of(settings),
        partial(config.client_secrets_in_files, os.environ),
        has_files=bool(config.client_secret_files(os.environ)),
        reactor=reactor,
        log=log,
    )
    reloader = Reload(
        settings,
        _load_with_file,
        cache,
        refresh,
        database,
        listener,
        ports,
        room,
        rotation,
        threshold,
        reactor,
        log,
    )
    cache.database.watch_refused_logins(reloader.login_refused)
    served: dict[str, ServedPort] = {}
    stalls = StallWatch(reactor)
    held = HeldSnapshots(cache, reactor, log, settings.limits.max_old_generations, settings.limits.max_answer_s)
    metrics = Metrics(cache, stalls.lateness, served, reactor, held.superseded)
    Signals(reactor, reloader.reload, writer.reopen, log).setServiceParent(root)
    for child in (stalls, DatabaseService(database, listener), store, refresh, listener):
        if child is not None:
            child.setServiceParent(root)
    if (statsd := settings.statsd).host:
        StatsD(metrics, statsd.host, statsd.port, statsd.prefix, database.resolve, reactor, log).setServiceParent(root)

    limits = settings.limits
    max_connections, accepted = room.limit(limits.max_connections), room.plan.accepted

    def clients(port: str, reserve: int = room.plan.reserve, silence_timeout_s: float = 0.0) -> Limits:
        door = Door(port, room, reserve, log, reactor.seconds)
        return Limits(max_connections, limits.idle_timeout_s, silence_timeout_s, door, held)

    freshness = Freshness(refresh, cache.database, reactor)
    questions = Commands(cache, monitor=metrics.monitor_lines)
    served["status"] = status = StatusFactory(questions, clients("status"), reactor)
    ports.append(status)
    listen = tcp(reactor, settings.status.host, settings.status.port, status, accepted)
    _add_port(root, "status", "status.port", listen, status)
    if settings.admin.socket:
        all_commands = Commands(cache, refresh, reloader.reload, metrics.monitor_lines)
        served["admin"] = admin = StatusFactory(all_commands, clients("admin"), reactor)
        ports.append(admin)
        _add_port(root, "admin", "admin.socket", unix(reactor, settings.admin.socket, admin), admin)
    if settings.resp.enabled:
        served["resp"] = resp = RespFactory(
            cache=cache,
            freshness=freshness,
            limits=clients("resp", reserve=0, silence_timeout_s=settings.resp.idle_timeout_s),
            clock=reactor,
            password=settings.resp.password.get_secret_value(),
            look=rotation.look,
        )
        rotation.watch(lambda secrets: resp.replace_password(secrets.password))
        ports.append(resp)
        _add_port(root, "resp", "resp.port", tcp(reactor, settings.resp.host, settings.resp.port, resp, accepted), resp)
    if settings.http.enabled:
        served["http"] = http = HttpFactory(
            Served(cache, freshness, refresh, metrics),
            AccessSettings(
                token=settings.http.token.get_secret_value(),
                admin_token=settings.http.admin_token.get_secret_value(),
                allow_data=config.is_loopback(settings.http.host) or limits.allow_anonymous,
                look=rotation.look,
            ),
            clients("http"),
            reactor,
        )
        rotation.watch(lambda secrets: http.replace_tokens(secrets.token, secrets.admin_token))
        ports.append(http)
        _add_port(root, "http", "http.port", tcp(reactor, settings.http.host, settings.http.port, http, accepted), http)
    return root


def _load_with_file() -> tuple[Settings, ConfigFile]:
    """Return the current settings and the file that they were read from.

    :raises ConfigError: with every problem of the configuration.
    """
    file = config.config_file(os.environ)  # first: a version that is written during the load must not count as read
    return load_settings(os.environ), file


def _make_room(settings: Settings, cache: Cache, log: Log) -> Room:
    """Return the descriptors that the ports may use.

    Log a warning if the limit of open files allows fewer connections than the configuration.
    """
    ports = 2 + bool(settings.admin.socket) + settings.resp.enabled + settings.http.enabled
    room = Room(admission.plan(_raise_descriptor_limit(), settings.postgres.max_connections, ports))
    configured, open_files = settings.limits.max_connections, room.plan.descriptors
    limit = room.limit(configured)
    if limit < configured:
        cache.cap_connections(ConnectionCap(limit, configured, open_files))
        advice = "raise the limit of open files, or lower limits.max_connections"
        log.warning("connections_capped", limit=limit, configured=configured, open_files=open_files, advice=advice)
    return room


def _store(
    settings: PersistenceSettings, cache: Cache, drain: Drain, reactor: Reactor, log: Log
) -> SnapshotStore | None:
    if not settings.directory:
        return None
    directory = Path(settings.directory)
    interval_s, keep = settings.min_save_interval_s, settings.keep_generations
    return SnapshotStore(cache, directory, interval_s, keep, drain.add, reactor, log)


def make_log(settings: Settings, arguments: Sequence[str] = ()) -> tuple[logs.LineWriter, logs.Threshold, Any]:
    """Return the log writer (not started), the log threshold and the logger.

    :param arguments: those of twistd, which may name a log file. Without one the log goes to standard output.
    """
    path = signals.log_file(arguments)
    try:
        writer = logs.LineWriter(logs.destination(path), logs.lost_line, path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        _tell(f"cacheservice: --logfile: {path}: {reason}; name a file that can be written")
        raise SystemExit(1) from None
    threshold = logs.Threshold(settings.log.level)
    log = logs.make_logger(threshold, settings.log.format, writer.write, colors=path is None and os.isatty(1))
    return writer, threshold, log


def _add_port(root: MultiService, name: str, setting: str, listen: Any, factory: Any) -> None:
    port = PortService(setting, listen, factory.close_clients)
    port.setName(name)
    port.setServiceParent(root)


def _address(address: Any) -> str:
    if hasattr(address, "port"):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{host}:{address.port}"
    return os.fsdecode(address.name)


def _raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return it.

    Ten thousand clients need more descriptors than the usual soft limit of 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard


def _tell(text: str) -> None:
    # twistd replaces sys.stderr by an object that logs.
    print(text, file=sys.__stderr__, flush=True)  # for a person at a terminal, before there is a log
