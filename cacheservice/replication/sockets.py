"""Gives a link its socket."""

from __future__ import annotations

import socket
from typing import Any, TypeVar, cast

from twisted.internet import unix
from twisted.internet.protocol import Factory, Protocol

from cacheservice.base.interfaces import Reactor

AnyProtocol = TypeVar("AnyProtocol", bound=Protocol)


class _One(Factory):
    noisy = False

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: object) -> Protocol:
        return self._protocol


def adopt(reactor: Reactor, connected: socket.socket, protocol: AnyProtocol) -> AnyProtocol:
    """Connect `protocol` to a unix stream socket, which is closed with the connection.

    :param connected: a connected socket that nothing else in this process uses.
    """
    connected.setblocking(False)
    # Twisted duplicates the descriptor.
    unix.Server._fromConnectedSocket(connected.fileno(), cast("Any", _One(protocol)), cast("Any", reactor))
    connected.close()
    return protocol
