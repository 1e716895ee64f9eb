"""A listening port as a service.

It reports why it cannot listen, and disconnects all clients when it stops.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import ServerFactory

from cacheservice.base import file_errors
from cacheservice.base.errors import PortUnavailable
from cacheservice.base.interfaces import Reactor
from cacheservice.ports.readers import Port

BACKLOG = 511
"""With Twisted's backlog of 50, 5,000 clients wait 75 s; with 511, the backlog of Redis, 0.4 s (measured)."""

_ALL, _ALL_IPV4 = "::", "0.0.0.0"  # noqa: S104  # only if configured
_SOCKET_UMASK = 0o177


class PortService(Service):
    """Listens while it runs.

    :param setting: the key to change in the configuration if the port cannot be opened.
    :param listen: binds and returns the listening port; see `tcp` and `unix`.
    """

    def __init__(self, setting: str, listen: Callable[[], IListeningPort], close_clients: Callable[[], None]) -> None:
        self._setting = setting
        self._listen = listen
        self._close_clients = close_clients
        self._port: Any = None

    @property
    def address(self) -> Any:
        """The address in Twisted's form; None before the port listens."""
        return None if self._port is None else self._port.getHost()

    def privilegedStartService(self) -> None:
        """Bind the port.

        :raises PortUnavailable: in one line, if the port is in use or needs a privilege.
        """
        try:
            self._port = self._listen()
        except CannotListenError as error:
            reason = error.socketError if isinstance(error.socketError, OSError) else OSError(str(error.socketError))
            where = _where(error)
            why = file_errors.of_tcp(reason) if isinstance(error.port, int) else file_errors.of_socket(where, reason)
            raise PortUnavailable(f"{self._setting}: cannot listen on {where}: {why}") from error

    def stopService(self) -> Deferred[Any]:
        """Stop accepting, then close the clients; fires when the port is closed."""
        super().stopService()
        port, self._port = self._port, None
        if port is None:
            return maybeDeferred(lambda: None)
        stopped = maybeDeferred(port.stopListening)
        self._close_clients()
        return DeferredList([stopped], consumeErrors=True)


def _where(error: CannotListenError) -> str:
    if isinstance(error.port, int):
        return f"{error.interface}:{error.port}"
    return os.fsdecode(error.port)


def tcp(
    reactor: Reactor, host: str, port: int, factory: ServerFactory, most_accepted: int = Port.most_accepted
) -> Callable[[], IListeningPort]:
    """Return a function that listens on an IP address.

    "localhost" means 127.0.0.1, because a look-up would block. "::" means all addresses including IPv4, whatever the
    default of the system, or all IPv4 addresses on a system without IPv6.
    """

    def listen() -> IListeningPort:
        listening: Any = Port(port, factory, BACKLOG, interface_of(host), reactor)  # type: ignore[arg-type]
        listening.accept_at_most(most_accepted)
        listening.startListening()
        return listening  # type: ignore[no-any-return]

    return listen


def interface_of(host: str) -> str:
    """Return the IP address to bind for a configured host."""
    if host == _ALL and not _has_ipv6():
        return _ALL_IPV4
    return "127.0.0.1" if host == "localhost" else host


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def unix(reactor: Reactor, path: str, factory: ServerFactory) -> Callable[[], IListeningPort]:
    """Return a function that listens on a unix socket with mode 600.

    It replaces a socket file that a crash left behind.
    """

    def listen() -> IListeningPort:
        _remove_stale(path)
        # listenUNIX applies its mode argument after the bind, so other users could connect in between.
        mask = os.umask(_SOCKET_UMASK)
        try:
            return reactor.listenUNIX(path, factory, backlog=BACKLOG, mode=0o600)  # type: ignore[no-any-return]
        finally:
            os.umask(mask)

    return listen


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # another program may use it: the bind will report it
    except OSError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return
