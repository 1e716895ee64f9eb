"""The faulty network in a process of its own, for tests that block: each line of its input is a method to call."""

from __future__ import annotations

import subprocess
import sys

from twisted.internet import reactor
from twisted.internet.defer import ensureDeferred
from twisted.internet.stdio import StandardIO
from twisted.protocols.basic import LineOnlyReceiver

from tests.kit.chaos import FaultyNetwork
from tests.kit.paths import ROOT


class NetworkProcess:
    """A network before a port of this machine; `port` is its own."""

    def __init__(self, target_port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.faulty_network", str(target_port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def call(self, name: str, *words: float) -> None:
        """Call a method of `FaultyNetwork` with numbers; return once it has returned."""
        assert self._process.stdin is not None
        print(name, *words, file=self._process.stdin, flush=True)
        assert self._read() == "done\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class _Calls(LineOnlyReceiver):
    delimiter = b"\n"

    def __init__(self, network: FaultyNetwork) -> None:
        self._network = network

    def lineReceived(self, line: bytes) -> None:
        name, *words = line.decode().split()
        getattr(self._network, name)(*[float(word) if "." in word else int(word) for word in words])
        self.sendLine(b"done")


async def _main() -> None:
    network = FaultyNetwork(int(sys.argv[1]))
    await network.start()
    sys.stdout.write(f"{network.port}\n")
    sys.stdout.flush()
    StandardIO(_Calls(network))


if __name__ == "__main__":
    reactor.callWhenRunning(lambda: ensureDeferred(_main()))
    reactor.run()
