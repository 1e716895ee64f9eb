"""The faulty network in a process of its own, so that its caller needs no reactor."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.stdio import StandardIO
from twisted.protocols.basic import LineReceiver

from tests.kit.chaos import FaultyNetwork
from tests.kit.paths import ROOT
from tests.kit.waiting import GIVE_UP_S


class Network:
    """The faulty network in a process of its own, so that its caller needs no reactor.

    :param host: the address that it listens on.
    """

    def __init__(self, target_port: int, host: str = "127.0.0.1") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.faulty_network", str(target_port), host],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._answer())

    def order(self, *words: object) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        answer = self._answer()
        assert answer == "ok", answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(GIVE_UP_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class _Orders(LineReceiver):
    delimiter = b"\n"

    def __init__(self, network: FaultyNetwork) -> None:
        self._network = network

    def lineReceived(self, line: bytes) -> None:
        verb, *numbers = line.decode().split()
        done = maybeDeferred(getattr(self._network, verb), *[json.loads(number) for number in numbers])
        done.addCallbacks(lambda _: self.sendLine(b"ok"), lambda failure: self.sendLine(repr(failure).encode()))

    def connectionLost(self, reason: Any = None) -> None:
        reactor.stop()


def main() -> None:
    network = FaultyNetwork(int(sys.argv[1]), host=sys.argv[2])

    def begin() -> None:
        started = Deferred.fromCoroutine(network.start())
        orders = _Orders(network)
        started.addCallback(lambda _: StandardIO(orders))
        started.addCallback(lambda _: orders.sendLine(b"%d" % network.port))

    reactor.callWhenRunning(begin)
    reactor.run()


if __name__ == "__main__":
    main()
