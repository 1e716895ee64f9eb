"""The service as twistd runs it: its parts start in order, and stop one by one."""

from __future__ import annotations

import gc
import os
from typing import Any, cast

from twisted.application.service import MultiService, Service
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IReactorTime

from cacheservice import __version__
from cacheservice.app.start import print_error
from cacheservice.base.errors import PortUnavailable
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.text import seconds
from cacheservice.cache.cache import Cache
from cacheservice.ops import logs
from cacheservice.ports.listen import PortService

_STOP_TIMEOUT_S = 4.0
"""docs/deployment.md promises that a clean stop, including the last lines of the log, takes at most 5 s."""
_STOPPED_LAST = frozenset({"status", "http", "workers"})
"""Ports that serve probes, and the workers, which may have one of them. They close last, so that probes can see that
the service is stopping."""


class CacheServiceRoot(MultiService):
    """Runs all parts: starts them in order and stops them one by one in reverse order.

    `MultiService` would stop all children at the same time. Here ports close before the refreshes that they may
    request. The ports that serve probes are an exception: they report that the service is stopping until everything
    else has stopped.
    """

    def __init__(self, cache: Cache, reactor: Reactor, writer: logs.LineWriter, log: Log) -> None:
        super().__init__()
        self.cache = cache
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
            print_error(f"cacheservice: {error}")
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
        self.cache.stop()
        self._log.info("service_stopping")
        stopped = Deferred.fromCoroutine(self._stop_in_order())
        stopped.addTimeout(_STOP_TIMEOUT_S, cast("IReactorTime", self._reactor))
        return stopped.addBoth(self._log_stop)

    async def _stop_in_order(self) -> None:
        last_first = list(self)[::-1]
        children = sorted(last_first, key=lambda child: child.name in _STOPPED_LAST)
        try:
            while children:
                await maybeDeferred(children.pop(0).stopService)
        finally:
            for child in children:  # the time is up: stop the remaining children without waiting for them
                maybeDeferred(child.stopService).addErrback(lambda failure: log_internal_error(self._log, failure))

    def _log_stop(self, result: object) -> None:
        clean = result is None
        self._log.info("service_stopped", clean=clean, uptime_s=seconds(self._reactor.seconds() - self._started_at))


def _address(address: object) -> str:
    if isinstance(address, IPv4Address | IPv6Address):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{host}:{address.port}"
    assert isinstance(address, UNIXAddress), "ports listen on IP addresses and unix sockets"
    return os.fsdecode(address.name or b"")
