"""TCP ports that have all their clients read in one go.

For each event a reactor calls through Twisted's logger, which sets up a context first: a microsecond and a quarter, a
tenth of all that a GET takes. So the clients of a port are in an epoll set of their own, and that is what is
in the reactor. What is to be written, connections that break and everything else goes Twisted's way.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import tcp
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""Seconds of silence, seconds between probes, and how many go unanswered."""


def _no_rounds() -> None:
    """Do nothing, for a factory that does not ask about rounds."""


@implementer(IReadDescriptor)
class Readers:
    """The clients of one port that want to be read.

    :param reactor: `IReactorFDSet`; it has this among its readers until `close`.
    :param factory: is called before and after each round of reads, if it has `begin_round` and `end_round`.
    """

    _log = Logger()

    def __init__(self, reactor: Any, factory: object = None) -> None:
        self._reactor = reactor
        self._begin_round: Callable[[], None] = getattr(factory, "begin_round", _no_rounds)
        self._end_round: Callable[[], None] = getattr(factory, "end_round", _no_rounds)
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}
        reactor.addReader(self)

    def add(self, client: Client) -> None:
        descriptor = client.fileno()
        if descriptor not in self._clients:
            self._epoll.register(descriptor, select.EPOLLIN)
            self._clients[descriptor] = client

    def remove(self, client: Client) -> None:
        if self._clients.pop(client.fileno(), None) is not None:
            self._epoll.unregister(client.fileno())

    def close(self) -> None:
        """Leave the clients that are still there to the reactor."""
        self._reactor.removeReader(self)
        self._epoll.close()
        for client in self._clients.values():
            self._reactor.addReader(client)
        self._clients.clear()

    @property
    def closed(self) -> bool:
        return self._epoll.closed

    def fileno(self) -> int:
        return -1 if self.closed else self._epoll.fileno()

    def logPrefix(self) -> str:
        return type(self).__name__

    def doRead(self) -> None:
        """Read every client that has sent something."""
        self._begin_round()
        try:
            self._read()
        finally:
            self._end_round()

    def _read(self) -> None:
        for descriptor, _ in self._epoll.poll(0, len(self._clients) or 1):
            client = self._clients.get(descriptor)
            if client is None:
                continue  # closed meanwhile, for what another one said
            try:
                reason: Exception | None = client.doRead()
            except Exception as error:
                self._log.failure("a client could not be read")
                reason = error
            if reason is not None:
                # What is raised here would end the reading of all the others, too.
                try:
                    client.end(reason)
                except Exception:
                    self._log.failure("a client could not be ended")

    def connectionLost(self, reason: Failure) -> None:
        """The reactor is done."""
        self._epoll.close()


class Client(tcp.Server):
    """One client's connection, read with the others of its port."""

    server: Port

    def startReading(self) -> None:
        if self.server.readers.closed:
            super().startReading()
        else:
            self.server.readers.add(self)

    def stopReading(self) -> None:
        if self.server.readers.closed:
            super().stopReading()
        else:
            self.server.readers.remove(self)

    def end(self, reason: Exception) -> None:
        """What a reactor does when a read gives a reason to end."""
        self.stopReading()
        if isinstance(reason, ConnectionDone):
            self.readConnectionLost(Failure(reason))
        else:
            self.stopWriting()
            self.connectionLost(Failure(reason))


class Port(tcp.Port):
    """A listening port whose clients are read in one go."""

    transport = Client
    readers: Readers
    most_accepted = 100
    """Connections that are accepted in one turn: each may hold a descriptor until its end, though it is turned away."""

    def startListening(self) -> None:
        super().startListening()
        self.readers = Readers(self.reactor, self.factory)

    def createInternetSocket(self) -> socket.socket:
        made: socket.socket = super().createInternetSocket()
        # What is accepted inherits it (Linux). A client whose machine is gone is noticed in two minutes, and a balancer
        # or a firewall between sees that a silent connection is alive.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.addressFamily == socket.AF_INET6 and self.interface == "::":
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option, value in _KEEPALIVE.items():
            made.setsockopt(socket.IPPROTO_TCP, option, value)
        return made

    def doRead(self) -> None:
        """Accept what has come."""
        # With no descriptor left Twisted accepts and closes by the one that it keeps in reserve. If another thread is
        # quicker to take that, it is not reserved again, and every turn would try to accept in vain.
        tcp._reservedFD.reserve()
        self.numberAccepts = min(self.numberAccepts, self.most_accepted)
        super().doRead()

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        self.readers.close()
