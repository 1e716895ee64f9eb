"""A listening port as a service: it says plainly why it cannot listen, and when it stops nobody is left connected."""

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

from cacheservice import file_errors
from cacheservice.errors import PortUnavailable
from cacheservice.ports.readers import Port

BACKLOG = 511
"""Twisted's 50 makes 5,000 clients wait 75 s; 511 makes it 0.4 s (measured), and is what Redis takes."""

_ALL, _ALL_IPV4 = "::", "0.0.0.0"  # noqa: S104  # for who sets it
_SOCKET_UMASK = 0o177


class PortService(Service):
    """Listens while it runs.

    :param listen: binds and gives the listening port; see `tcp` and `unix`.
    :param setting: what to change in the configuration if it cannot.
    """

    def __init__(self, setting: str, listen: Callable[[], IListeningPort], close_clients: Callable[[], None]) -> None:
        self._setting = setting
        self._listen = listen
        self._close_clients = close_clients
        self._port: Any = None

    @property
    def address(self) -> Any:
        """Where it listens, as Twisted tells it; None before it does."""
        return None if self._port is None else self._port.getHost()

    def privilegedStartService(self) -> None:
        """:raises PortUnavailable: in one line, for a port that is taken or not ours to take."""
        try:
            self._port = self._listen()
        except CannotListenError as error:
            reason = error.socketError if isinstance(error.socketError, OSError) else OSError(str(error.socketError))
            where = _where(error)
            why = file_errors.of_tcp(reason) if isinstance(error.port, int) else file_errors.of_socket(where, reason)
            raise PortUnavailable(f"{self._setting}: cannot listen on {where}: {why}") from error

    def stopService(self) -> Deferred[Any]:
        """Stop accepting, then close what is connected; fires when the port is closed."""
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
    reactor: Any, host: str, port: int, factory: ServerFactory, most_accepted: int = Port.most_accepted
) -> Callable[[], IListeningPort]:
    """Listen on an IP address ("localhost" is 127.0.0.1: a look-up would block).

    "::" is all addresses, IPv4 ones too, whatever the system's default is; those alone where there is no IPv6.
    """
    address = "127.0.0.1" if host == "localhost" else host

    def listen() -> IListeningPort:
        interface = _ALL_IPV4 if host == _ALL and not _has_ipv6() else address
        listening: Any = Port(port, factory, BACKLOG, interface, reactor)  # type: ignore[arg-type]
        listening.most_accepted = most_accepted
        listening.startListening()
        return listening  # type: ignore[no-any-return]

    return listen


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def unix(reactor: Any, path: str, factory: ServerFactory) -> Callable[[], IListeningPort]:
    """Listen on a unix socket that only its owner may open (mode 600); one left over by a crash is replaced."""

    def listen() -> IListeningPort:
        _remove_stale(path)
        # The mode argument of listenUNIX comes after the bind: too late for the first moment.
        mask = os.umask(_SOCKET_UMASK)
        try:
            return reactor.listenUNIX(path, factory, backlog=BACKLOG, mode=0o600)  # type: ignore[no-any-return]
        finally:
            os.umask(mask)

    return listen


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # not ours to remove: the bind will say that it is in the way
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
