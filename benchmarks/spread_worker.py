"""A worker of `benchmarks.spread`: echoes on inherited sockets.

Arguments: the connections accepted in one turn, the place of its own socket, and the descriptors of all sockets. For
the line `count` it prints the number of its connections; for `all` it accepts from all sockets.
"""

from __future__ import annotations

import sys

from twisted.internet import reactor, stdio
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.protocols.basic import LineReceiver

from cacheservice.ports.shared_listen import AdoptedPort


class Echo(Protocol):
    def connectionMade(self) -> None:
        self.factory.count += 1

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class Counter(ServerFactory):
    protocol = Echo
    noisy = False
    count = 0


class Questions(LineReceiver):
    delimiter = b"\n"

    def __init__(self, port: AdoptedPort, factory: Counter, sockets: int) -> None:
        self._port = port
        self._factory = factory
        self._sockets = sockets

    def lineReceived(self, line: bytes) -> None:
        if line == b"all":
            self._port.accept_from(range(self._sockets))
        self.sendLine(str(self._factory.count).encode())


def main() -> None:
    accepted, own, *descriptors = map(int, sys.argv[1:])
    factory = Counter()
    port = AdoptedPort(reactor, dict(enumerate(descriptors)), factory, accepted)
    port.accept_from([own])
    port.startListening()
    stdio.StandardIO(Questions(port, factory, len(descriptors)))
    reactor.run()


if __name__ == "__main__":
    main()
