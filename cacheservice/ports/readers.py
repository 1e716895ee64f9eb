"""TCP ports that read all their clients in one event of the reactor.

For each event a reactor calls through Twisted's logger, which first sets up a context: 1.25 µs, a tenth of the time of
a GET. So the clients of a port are in an epoll set of their own, and the reactor watches only that set. Writes, broken
connections and all other events take Twisted's usual path.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from twisted.internet import tcp
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.base.interfaces import Reactor

_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""Seconds of idle time, seconds between keepalive probes, and the number of unanswered probes."""


def _no_rounds() -> None:
    """Do nothing, for a factory without hooks for rounds."""


@implementer(IReadDescriptor)
class Readers:
    """Reads the clients of one port.

    :param reactor: `IReactorFDSet`; this object is among its readers until `close`.
    :param factory: its `begin_round` and `end_round`, if it has them, are called around each round of reads.
    """

    _log = Logger()

    def __init__(self, reactor: Reactor, factory: object = None) -> None:
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
        """Return the remaining clients to the reactor."""
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
        """Read every client that has sent data."""
        self._begin_round()
        try:
            self._read()
        finally:
            # An exception here would end the reads of the whole port.
            try:
                self._end_round()
            except Exception:
                self._log.failure("a round of reads could not be ended")

    def _read(self) -> None:
        for descriptor, _ in self._epoll.poll(0, len(self._clients) or 1):
            client = self._clients.get(descriptor)
            if client is None:
                continue  # closed meanwhile, by a request of another client
            try:
                reason: Exception | None = client.doRead()
            except Exception as error:
                self._log.failure("a client could not be read")
                reason = error
            if reason is not None:
                # An exception here would end the reads of all other clients, too.
                try:
                    client.end(reason)
                except Exception:
                    self._log.failure("a client could not be ended")

    def connectionLost(self, reason: Failure) -> None:
        """Close the epoll set, because the reactor has stopped."""
        self._epoll.close()


class Client(tcp.Server):
    """One client's connection; its port reads all of its clients together."""

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
        """Close the connection as a reactor does when a read returns a reason."""
        self.stopReading()
        if isinstance(reason, ConnectionDone):
            self.readConnectionLost(Failure(reason))
        else:
            self.stopWriting()
            self.connectionLost(Failure(reason))


class Port(tcp.Port):
    """A listening port that reads all its clients in one event."""

    transport = Client
    readers: Readers
    most_accepted = 100
    """The connections accepted in one turn. A refused connection, too, holds a descriptor until it is closed."""

    def accept_at_most(self, connections: int) -> None:
        """Limit the connections accepted in one turn."""
        self.most_accepted = connections

    def startListening(self) -> None:
        super().startListening()
        self.readers = Readers(self.reactor, self.factory)

    def createInternetSocket(self) -> socket.socket:
        made: socket.socket = super().createInternetSocket()
        # Accepted sockets inherit it (Linux). A client whose machine has gone is detected within two minutes, and load
        # balancers and firewalls on the path see that a silent connection is alive.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.addressFamily == socket.AF_INET6 and self.interface == "::":
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option, value in _KEEPALIVE.items():
            made.setsockopt(socket.IPPROTO_TCP, option, value)
        return made

    def doRead(self) -> None:
        """Accept the connections in the backlog."""
        # Without a free descriptor, Twisted accepts and closes a connection with its reserved one. If another thread
        # takes that first, Twisted does not reserve it again, and every turn would try to accept in vain.
        tcp._reservedFD.reserve()
        self.numberAccepts = min(self.numberAccepts, self.most_accepted)
        super().doRead()

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        self.readers.close()


class StandbyPort(Port):
    """A listening port that accepts connections only while it is asked to: another process accepts them otherwise.

    Its clients stay when it does not accept any more.
    """

    _is_accepting = False

    def accept(self, accepting: bool) -> None:
        """Begin or cease to accept connections."""
        self._is_accepting = accepting
        if not accepting:
            self.stopReading()
        elif self.connected:
            self.startReading()

    def startReading(self) -> None:
        if self._is_accepting:
            super().startReading()
