"""The composition root: builds the parts of the service and connects them."""

from __future__ import annotations

import os
import resource
from functools import partial
from typing import Any

from twisted.application.service import MultiService

from cacheservice import config
from cacheservice.app.reads import Reads
from cacheservice.app.reload import Reload
from cacheservice.app.root import CacheServiceRoot
from cacheservice.app.signals import Signals
from cacheservice.app.start import load_with_file
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache, ConnectionCap
from cacheservice.config import Settings, StatsdSettings
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
from cacheservice.ports.operator_commands import Commands
from cacheservice.ports.resp.connection import RespFactory
from cacheservice.ports.rotation import ClientSecrets, Rotation
from cacheservice.ports.status import StatusFactory
from cacheservice.sources.postgres.target import Resolve

_MANY_DESCRIPTORS = 1 << 20
"""The number of descriptors to plan for if the process has no limit of open files."""


def make_service(
    settings: Settings, reactor: Reactor, writer: logs.LineWriter, threshold: logs.Threshold, log: Log
) -> CacheServiceRoot:
    """Return the whole service, not yet started.

    :param reactor: its `seconds` must be monotonic. If the wall clock were set back by an hour, every timer would be an
        hour late.
    """
    cache = Cache(settings.datasets.values(), reactor.seconds, config.config_file(os.environ))
    room = _make_room(settings, cache, log)
    root = CacheServiceRoot(cache, reactor, writer, log)
    reads = Reads(settings, cache, reactor, log)
    refresh = reads.refresh
    ports: list[Any] = []
    rotation = Rotation(
        ClientSecrets.of(settings),
        partial(config.client_secrets_in_files, os.environ),
        has_files=bool(config.client_secret_files(os.environ)),
        reactor=reactor,
        log=log,
    )
    reloader = Reload(settings, load_with_file, cache, reads, ports, room, rotation, threshold, reactor, log)
    cache.database.watch_refused_logins(reloader.login_refused)
    served: dict[str, ServedPort] = {}
    stalls = StallWatch(reactor)
    held = HeldSnapshots(cache, reactor, log, settings.limits.max_old_generations, settings.limits.max_answer_s)
    metrics = Metrics(cache, stalls.lateness, served, reactor, held.superseded)
    Signals(reactor, reloader.reload, writer.reopen, log).setServiceParent(root)
    statsd = _statsd(settings.statsd, metrics, reads.database.resolve, reactor, log)
    for child in (stalls, *reads.services(), statsd):
        if child is not None:
            child.setServiceParent(root)

    limits = settings.limits
    max_connections, accepted = room.limit(limits.max_connections), room.plan.accepted

    def door(port: str, reserve: int = room.plan.reserve) -> Door:
        return Door(port, room, reserve, log, reactor.seconds)

    freshness = Freshness(refresh, cache.database, reactor)
    questions = Commands(cache, monitor=metrics.monitor_lines)
    served["status"] = status = StatusFactory(
        questions, max_connections, limits.idle_timeout_s, reactor, door("status")
    )
    ports.append(status)
    listen = tcp(reactor, settings.status.host, settings.status.port, status, accepted)
    _add_port(root, "status", "status.port", listen, status)
    if settings.admin.socket:
        all_commands = Commands(cache, refresh, reloader.reload, metrics.monitor_lines)
        served["admin"] = admin = StatusFactory(
            all_commands, max_connections, limits.idle_timeout_s, reactor, door("admin")
        )
        ports.append(admin)
        _add_port(root, "admin", "admin.socket", unix(reactor, settings.admin.socket, admin), admin)
    if settings.resp.enabled:
        silence_timeout_s = settings.resp.idle_timeout_s
        served["resp"] = resp = RespFactory(
            cache=cache,
            freshness=freshness,
            limits=Limits(
                max_connections, limits.idle_timeout_s, silence_timeout_s, door=door("resp", reserve=0), held=held
            ),
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
            Limits(max_connections, limits.idle_timeout_s, door=door("http"), held=held),
            reactor,
        )
        rotation.watch(lambda secrets: http.replace_tokens(secrets.token, secrets.admin_token))
        ports.append(http)
        _add_port(root, "http", "http.port", tcp(reactor, settings.http.host, settings.http.port, http, accepted), http)
    return root


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


def _statsd(settings: StatsdSettings, metrics: Metrics, resolve: Resolve, reactor: Reactor, log: Log) -> StatsD | None:
    if not settings.host:
        return None
    return StatsD(metrics, settings, resolve, reactor, log)


def _add_port(root: MultiService, name: str, setting: str, listen: Any, factory: Any) -> None:
    port = PortService(setting, listen, factory.close_clients)
    port.setName(name)
    port.setServiceParent(root)


def _raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return it.

    Ten thousand clients need more descriptors than the usual soft limit of 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
