"""The half of the service that serves: the ports, and what they share."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import ServerFactory

from cacheservice import config
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache, ConnectionCap, Refreshes, Reloaded
from cacheservice.config import Settings
from cacheservice.ops.exposition import Metrics
from cacheservice.ops.service_metrics import ServedPort
from cacheservice.ports import admission
from cacheservice.ports.admission import Door, Room, Tally
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.held import HeldSnapshots
from cacheservice.ports.http import AccessSettings, HttpFactory, Served
from cacheservice.ports.http.routes import Main
from cacheservice.ports.listen import PortService, tcp, unix
from cacheservice.ports.operator_commands import Commands
from cacheservice.ports.resp.connection import RespFactory
from cacheservice.ports.resp.whole import Whole
from cacheservice.ports.rotation import ClientSecrets, Rotation, Secrets
from cacheservice.ports.status import StatusFactory

_MANY_DESCRIPTORS = 1 << 20
"""The number of descriptors to plan for if the process has no limit of open files."""


class Factory(ServedPort, Protocol):
    """The factory of a port, as the composition uses it."""

    def set_limits(self, *, max_connections: int, idle_timeout_s: float) -> None:
        """Apply changed limits; existing connections stay."""

    async def end_replies(self) -> None:
        """End the replies that have no end by themselves; return once they are sent, or after a second."""

    def close_clients(self) -> None:
        """Close every connection now."""


class MainProcess(Refreshes, Whole, Main, Protocol):
    """The main process, as the ports of a worker ask it."""


class Part(Protocol):
    """Connects the ports of a worker with the main process: ``cacheservice.app.workers.part.Part``."""

    @property
    def main(self) -> MainProcess:
        """The main process."""

    def tally(self, port: str) -> Tally:
        """Return the numbers of clients of a port in all workers."""

    def secrets(self, started: ClientSecrets, log: Log) -> Secrets:
        """Return the secrets of the ports, which the main process replaces."""

    def add_resp(self, factory: RespFactory) -> None:
        """Make the RESP port a part of that of the service."""

    def add_http(self, factory: HttpFactory) -> None:
        """Make the HTTP port a part of that of the service."""


class _Port(NamedTuple):
    name: str
    setting: str
    factory: Factory
    listen: Callable[[], IListeningPort]


class Shared(NamedTuple):
    """The objects that all ports share.

    :param refreshes: carries out what clients request of the refreshes.
    :param metrics: renders the metrics; the ports are added to it.
    :param part: connects the ports with the main process; None if this process is not a worker.
    """

    cache: Cache
    refreshes: Refreshes
    metrics: Metrics
    held: HeldSnapshots
    reactor: Reactor
    log: Log
    part: Part | None = None


class Listen(Protocol):
    """Returns the function that opens a TCP port of the service.

    :param name: of the port: status, resp or http.
    :param most_accepted: connections that are accepted in one turn.
    """

    def __call__(
        self, name: str, host: str, port: int, factory: ServerFactory, most_accepted: int
    ) -> Callable[[], IListeningPort]: ...


class Ports:
    """Builds the ports of a configuration, and applies changed limits and secrets to them.

    :param listen: opens the TCP ports; None to bind them in this process.
    """

    def __init__(self, settings: Settings, shared: Shared, listen: Listen | None = None) -> None:
        self._listen = listen or partial(_bind, shared.reactor)
        self._settings = settings
        self._shared = shared
        part = shared.part
        self._room = _make_room(settings, shared.cache, shared.log) if part is None else room_of_worker(settings)
        self._freshness = Freshness(shared.refreshes, shared.cache.database, shared.reactor)
        self._ports: list[_Port] = []
        started = ClientSecrets.of(settings)
        self.secrets: Secrets = (
            _rotation(started, shared.reactor, shared.log) if part is None else part.secrets(started, shared.log)
        )

    def services(self) -> Iterator[PortService]:
        """Return the services of the ports, in the order in which they were added."""
        for port in self._ports:
            service = PortService(port.setting, port.listen, port.factory.close_clients, port.factory.end_replies)
            service.setName(port.name)
            yield service

    def apply(self, settings: Settings) -> None:
        """Apply changed limits and secrets to every port."""
        limits = settings.limits
        for port in self._ports:
            most = self._room.limit(limits.max_connections)
            port.factory.set_limits(max_connections=most, idle_timeout_s=limits.idle_timeout_s)
        if self._shared.part is None:  # the main process sends its workers the secrets that it takes
            self.secrets.take(ClientSecrets.of(settings).by_key())

    def add_status(self) -> None:
        """Add the status port."""
        shared, status = self._shared, self._settings.status
        factory = self._status_factory("status", Commands(shared.cache, monitor=shared.metrics.monitor_lines))
        self._add("status", "status.port", factory, self._tcp("status", status.host, status.port, factory))

    def add_admin(self, reload: Callable[[], Deferred[Reloaded]]) -> None:
        """Add the admin socket, if it is configured.

        :param reload: reads the configuration again.
        """
        shared, path = self._shared, self._settings.admin.socket
        if path:
            commands = Commands(shared.cache, shared.refreshes, reload, shared.metrics.monitor_lines)
            factory = self._status_factory("admin", commands)
            self._add("admin", "admin.socket", factory, unix(shared.reactor, path, factory))

    def add_resp(self) -> None:
        """Add the RESP port, if it is enabled."""
        shared, resp = self._shared, self._settings.resp
        if not resp.enabled:
            return
        factory = RespFactory(
            cache=shared.cache,
            freshness=self._freshness,
            limits=self._limits("resp", silence_timeout_s=resp.idle_timeout_s, reserve=0),
            clock=shared.reactor,
            password=resp.password.get_secret_value(),
            look=self.secrets.look,
        )
        if shared.part is not None:
            shared.part.add_resp(factory)
        self.secrets.watch(lambda secrets: factory.replace_password(secrets.password))
        self._add("resp", "resp.port", factory, self._tcp("resp", resp.host, resp.port, factory))

    def add_http(self) -> None:
        """Add the HTTP port, if it is enabled."""
        shared, http = self._shared, self._settings.http
        if not http.enabled:
            return
        access = AccessSettings(
            token=http.token.get_secret_value(),
            admin_token=http.admin_token.get_secret_value(),
            allow_data=config.is_loopback(http.host) or self._settings.limits.allow_anonymous,
            look=self.secrets.look,
        )
        part = shared.part
        main = None if part is None else part.main
        served = Served(shared.cache, self._freshness, shared.refreshes, shared.metrics, main)
        factory = HttpFactory(served, access, self._limits("http"), shared.reactor)
        if part is not None:
            part.add_http(factory)
        self.secrets.watch(lambda secrets: factory.replace_tokens(secrets.token, secrets.admin_token))
        self._add("http", "http.port", factory, self._tcp("http", http.host, http.port, factory))

    def _add(self, name: str, setting: str, factory: Factory, listen: Callable[[], IListeningPort]) -> None:
        self._ports.append(_Port(name, setting, factory, listen))
        self._shared.metrics.add_port(name, factory)

    def _status_factory(self, name: str, commands: Commands) -> StatusFactory:
        return StatusFactory(commands, self._limits(name), self._shared.reactor)

    def _limits(self, name: str, *, silence_timeout_s: float = 0.0, reserve: int | None = None) -> Limits:
        limits = self._settings.limits
        return Limits(
            self._room.limit(limits.max_connections),
            limits.idle_timeout_s,
            silence_timeout_s,
            door=self._door(name, reserve),
            held=self._shared.held,
        )

    def _door(self, name: str, reserve: int | None = None) -> Door:
        reserve = self._room.plan.reserve if reserve is None else reserve
        part = self._shared.part
        tally = admission.ALONE if part is None else part.tally(name)
        return Door(name, self._room, reserve, self._shared.log, self._shared.reactor.seconds, tally)

    def _tcp(self, name: str, host: str, port: int, factory: ServerFactory) -> Callable[[], IListeningPort]:
        return self._listen(name, host, port, factory, self._room.plan.accepted)


def _bind(
    reactor: Reactor, name: str, host: str, port: int, factory: ServerFactory, most_accepted: int
) -> Callable[[], IListeningPort]:
    return tcp(reactor, host, port, factory, most_accepted)


def _rotation(started: ClientSecrets, reactor: Reactor, log: Log) -> Rotation:
    return Rotation(
        started,
        partial(config.client_secrets_in_files, os.environ),
        has_files=bool(config.client_secret_files(os.environ)),
        reactor=reactor,
        log=log,
    )


def room_of_worker(settings: Settings) -> Room:
    """Return the descriptors that the ports of a worker may use; the main process reports a cap."""
    processes = settings.workers.processes
    ports = settings.resp.enabled + settings.http.enabled
    return Room(admission.plan(_raise_descriptor_limit(), admission.OF_A_WORKER * processes, ports), processes)


def _make_room(settings: Settings, cache: Cache, log: Log) -> Room:
    """Return the descriptors that the ports may use.

    Log a warning if the limit of open files allows fewer connections than the configuration.
    """
    ports = 2 + bool(settings.admin.socket) + settings.resp.enabled + settings.http.enabled
    others = settings.postgres.max_connections + admission.OF_A_WORKER * settings.workers.processes
    room = Room(admission.plan(_raise_descriptor_limit(), others, ports))
    configured, open_files = settings.limits.max_connections, room.plan.descriptors
    limit = (room_of_worker(settings) if settings.workers.processes else room).limit(configured)
    if limit < configured:
        cache.cap_connections(ConnectionCap(limit, configured, open_files))
        advice = "raise the limit of open files, or lower limits.max_connections"
        log.warning("connections_capped", limit=limit, configured=configured, open_files=open_files, advice=advice)
    return room


def _raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return it.

    Ten thousand clients need more descriptors than the usual soft limit of 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
