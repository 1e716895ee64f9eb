"""The composition root: builds the parts of the service and connects them.

`start` runs before there is a service, `reads` and `ports` build its two halves, and `root` starts and stops them.
"""

from __future__ import annotations

import os

from twisted.application.service import Service

from cacheservice import config
from cacheservice.app.no_reads import NoReads
from cacheservice.app.ports import Ports, Shared
from cacheservice.app.reads import Reads
from cacheservice.app.reload import Both, Process, Reload
from cacheservice.app.roles import WHOLE, Role
from cacheservice.app.root import CacheServiceRoot
from cacheservice.app.signals import Signals
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.cache.cache import Cache
from cacheservice.config import Settings
from cacheservice.ops import logs
from cacheservice.ops.exposition import Metrics
from cacheservice.ops.stall import StallWatch
from cacheservice.ops.statsd import StatsD
from cacheservice.ports.held import HeldSnapshots


def make_service(
    settings: Settings,
    reactor: Reactor,
    writer: logs.LineWriter,
    threshold: logs.Threshold,
    log: Log,
    role: Role = WHOLE,
) -> CacheServiceRoot:
    """Return the service, not yet started.

    :param reactor: its `seconds` must be monotonic. If the wall clock were set back by an hour, every timer would be an
        hour late.
    :param role: the halves that it has. A half can be built alone.
    """
    cache = Cache(settings.datasets.values(), reactor.seconds, config.config_file(os.environ))
    root = CacheServiceRoot(cache, reactor, writer, log)
    reads = Reads(settings, cache, reactor, log) if Role.READ in role else NoReads()
    stalls = StallWatch(reactor)
    held = HeldSnapshots(cache, reactor, log, settings.limits.max_old_generations, settings.limits.max_answer_s)
    metrics = Metrics(cache, stalls.lateness, reactor, held.superseded)
    ports = Ports(settings, Shared(cache, reads.requests, metrics, held, reactor, log))
    ports.add_status()
    services: list[Service] = [stalls, *reads.services()]
    workers = None
    if role == WHOLE and settings.workers.processes:
        # As for a fleet: only a service with workers needs these modules.
        from cacheservice.app.workers import composition  # noqa: PLC0415  # see above

        workers = composition.make_workers(settings, cache, reads.requests, metrics, ports.secrets, reactor, log)
    if isinstance(reads, Reads):
        served = ports if workers is None else Both(ports, workers)
        reload = Reload(settings, cache, reads, served, Process(reactor, threshold, log))
        ports.add_admin(reload.reload)
        services = [Signals(reactor, reload.reload, writer.reopen, log), *services]
        if settings.statsd.host:
            services.append(StatsD(metrics, settings.statsd, reads.database.resolve, reactor, log))
    if workers is None and Role.SERVE in role:
        ports.add_resp()
        ports.add_http()
    for service in (*services, *ports.services(), *(() if workers is None else workers.services())):
        service.setServiceParent(root)
    return root
