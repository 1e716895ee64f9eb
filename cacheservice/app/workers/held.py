"""The sockets of the ports that workers serve. The main process binds them, and accepts nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from twisted.internet.interfaces import IListeningPort

from cacheservice.app.workers import descriptors
from cacheservice.base.interfaces import Reactor
from cacheservice.config import Settings
from cacheservice.ports.listen import PortService
from cacheservice.ports.shared_listen import HeldPort, held


class HeldSockets:
    """Binds a socket of each enabled port for each worker."""

    def __init__(self, settings: Settings, reactor: Reactor) -> None:
        self._reactor = reactor
        self._count = settings.workers.processes
        self._addresses = {}
        if settings.resp.enabled:
            self._addresses["resp"] = settings.resp.host, settings.resp.port
        if settings.http.enabled:
            self._addresses["http"] = settings.http.host, settings.http.port
        self._bound: dict[str, HeldPort] = {}

    def services(self, stop_resp: Callable[[], None]) -> list[PortService]:
        """Return a service for each port, which binds its sockets.

        :param stop_resp: is called when the RESP port has to close.
        """
        made = []
        for name in self._addresses:
            # Workers close the HTTP port last, so that probes can see that the service is stopping.
            close_clients = stop_resp if name == "resp" else _nothing
            service = PortService(f"{name}.port", partial(self._bind, name), close_clients)
            service.setName(name)
            made.append(service)
        return made

    def descriptors(self) -> dict[int, int]:
        """Return the descriptors of the bound sockets by those that they have in a worker."""
        return {
            descriptors.of_port(name, number): descriptor
            for name, bound in self._bound.items()
            for number, descriptor in enumerate(bound.descriptors(), 1)
        }

    def _bind(self, name: str) -> IListeningPort:
        self._bound[name] = held(self._reactor, *self._addresses[name], self._count)
        return self._bound[name]  # type: ignore[return-value]  # it implements the zope.interface


def _nothing() -> None:
    """Do nothing."""
