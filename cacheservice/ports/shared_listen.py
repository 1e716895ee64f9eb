"""Listening ports of several processes: each accepts from a socket of its own, with the same address.

The kernel spreads new connections evenly over the sockets (SO_REUSEPORT). All processes have all sockets, so that the
others can accept the connections of a process that has ended or hangs: none waits for its restart, and none is lost.
`benchmarks.spread` compares this with one socket for all.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any, cast

from twisted.internet import tcp
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory, ServerFactory
from zope.interface import implementer

from cacheservice.base.interfaces import Reactor
from cacheservice.ports.listen import BACKLOG, interface_of
from cacheservice.ports.readers import Port, StandbyPort


@implementer(IListeningPort)
class HeldPort:
    """Sockets of one address that other processes accept from. This process keeps them open, and accepts nothing.

    :param count: the number of sockets.
    """

    def __init__(self, reactor: Reactor, host: str, port: int, count: int) -> None:
        nothing: Any = Factory()
        self._template: Any = Port(port, nothing, BACKLOG, interface_of(host), cast("Any", reactor))
        self._count = count
        self._sockets: list[socket.socket] = []

    def startListening(self) -> None:
        """Bind the sockets.

        :raises CannotListenError: if the address is in use, even by a socket that would share it.
        """
        interface, port = self._template.interface, self._template.port
        try:
            for number in range(self._count):
                made = self._template.createInternetSocket()
                self._sockets.append(made)
                made.setblocking(False)
                # Sockets may share an address if all of them have this option. The first one gets it after it was
                # bound, so that a second service cannot share the address of the first.
                if number:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                made.bind(self._address(interface, port))
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                port = made.getsockname()[1]
            for each in self._sockets:
                each.listen(BACKLOG)
        except OSError as error:
            self._close()
            raise CannotListenError(interface, self._template.port, error) from error

    def descriptors(self) -> Sequence[int]:
        """Return the descriptors of the sockets."""
        return [each.fileno() for each in self._sockets]

    def getHost(self) -> Any:
        """Return the address in Twisted's form."""
        return self._template._buildAddr(self._sockets[0].getsockname())

    def stopListening(self) -> Deferred[None]:
        """Close the sockets, which stay open in other processes."""
        return maybeDeferred(self._close)

    def _address(self, interface: str, port: int) -> Any:
        if self._template.addressFamily == socket.AF_INET6:
            return tcp._resolveIPv6(interface, port)
        return interface, port

    def _close(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets.clear()


def held(reactor: Reactor, host: str, port: int, count: int) -> HeldPort:
    """Bind an IP address for so many other processes; see `listen.tcp` for the meaning of `host`.

    :raises CannotListenError: if it is in use, or needs a privilege.
    """
    listening = HeldPort(reactor, host, port, count)
    listening.startListening()
    return listening


@implementer(IListeningPort)
class AdoptedPort:
    """The sockets of a `HeldPort` in a process that accepts from some of them.

    :param descriptors: the sockets by the numbers of their processes. They are closed with this port.
    """

    def __init__(
        self, reactor: Reactor, descriptors: Mapping[int, int], factory: ServerFactory, most_accepted: int
    ) -> None:
        self._ports: dict[int, StandbyPort] = {}
        for number, descriptor in descriptors.items():
            with socket.socket(fileno=descriptor) as inherited:
                port: Any = StandbyPort._fromListeningDescriptor(reactor, descriptor, inherited.family, factory)
            port.accept_at_most(most_accepted)
            self._ports[number] = port

    def startListening(self) -> None:
        for port in self._ports.values():
            port.startListening()

    def accept_from(self, numbers: Sequence[int]) -> None:
        """Accept from the sockets with these numbers, and from no other."""
        for number, port in self._ports.items():
            port.accept(number in numbers)

    def getHost(self) -> Any:
        """Return the address in Twisted's form."""
        return next(iter(self._ports.values())).getHost()

    def stopListening(self) -> Deferred[Any]:
        """Close the sockets, which stay open in other processes."""
        return DeferredList([maybeDeferred(port.stopListening) for port in self._ports.values()])
