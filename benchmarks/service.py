"""The real service as a child process, under twistd, and the questions that are put to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.products import QUERY

ROOT = Path(__file__).parent.parent
TAC = ROOT / "tac" / "cacheservice.tac"

_START_LIMIT_S = 30
_REFRESH_LIMIT_S = 120
_POLL_INTERVAL_S = 0.02

_CONFIG = """\
[postgres]
dsn = {dsn}
[status]
port = 0
[resp]
port = 0
[http]
port = 0
[admin]
socket = {admin}
[limits]
max_connections = {max_connections}
[datasets.products]
query = {query}
key = "id"
interval_s = 1000000
timeout_s = 120
"""


class RunningService:
    """A service that refreshes `products` when it starts and when it is asked to.

    :param ports: on 127.0.0.1, by name: status, resp, http.
    :param admin: the path of its admin socket.
    """

    def __init__(self, pid: int, ports: dict[str, int], admin: Path) -> None:
        self.pid = pid
        self.port, self.resp_port, self.http_port = ports["status"], ports["resp"], ports["http"]
        self._admin = admin

    def ask(self, command: str) -> str:
        """The status port's reply, on a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            return _exchange(client, command)

    def products(self) -> dict[str, Any]:
        """The dataset's part of `json`."""
        described: dict[str, Any] = json.loads(self.ask("json"))["datasets"]["products"]
        return described

    def start_refresh(self) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._admin))
            reply = _exchange(client, "refresh products")
        if not reply.startswith("OK products: refresh started"):
            raise RuntimeError(reply)

    def wait_refreshed(self) -> dict[str, Any]:
        """Wait until no refresh runs; how the last one ended.

        :raises RuntimeError: if it did not publish.
        """
        limit = time.monotonic() + _REFRESH_LIMIT_S
        while (products := self.products())["refreshing"]:
            if time.monotonic() > limit:
                raise RuntimeError("the refresh does not end")
            time.sleep(_POLL_INTERVAL_S)
        attempt: dict[str, Any] = products["last_attempt"]
        if attempt["outcome"] != "published":
            raise RuntimeError(f"the refresh failed: {attempt['error']}")
        return attempt


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """Of /proc/PID/status: VmRSS now, VmHWM at its highest."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"no {field} of process {pid}")


def cpu_s(pid: int) -> float:
    """Seconds that the process has computed, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running_service(
    dsn: str, query: str = QUERY, *, max_connections: int = 10_000, tac: Path = TAC, **environment: str
) -> Iterator[RunningService]:
    """The service, with its first snapshot loaded."""
    with tempfile.TemporaryDirectory(prefix="cacheservice-benchmark-") as name:
        directory = Path(name)
        admin, config, log = directory / "admin.sock", directory / "cacheservice.toml", directory / "log"
        values = {"dsn": json.dumps(dsn), "admin": json.dumps(str(admin)), "query": json.dumps(query)}
        config.write_text(_CONFIG.format(**values, max_connections=max_connections))
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("CACHESERVICE_", "PG"))}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("twistd"), "-noy", tac, "--pidfile="],
                env={**ours, "PYTHONPATH": str(ROOT), "CACHESERVICE_CONFIG": str(config), **environment},
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            service = RunningService(process.pid, _ports(process, log), admin)
            service.wait_refreshed()
            yield service
        finally:
            process.terminate()
            process.wait()


def _ports(process: subprocess.Popen[bytes], log: Path) -> dict[str, int]:
    limit = time.monotonic() + _START_LIMIT_S
    while process.poll() is None and time.monotonic() < limit:
        for line in log.read_text().splitlines():
            if '"service_started"' in line:
                started = json.loads(line)
                return {name: int(started[name].rpartition(":")[2]) for name in ("status", "resp", "http")}
        time.sleep(_POLL_INTERVAL_S)
    raise RuntimeError(f"the service did not start:\n{log.read_text()}")


def _exchange(client: socket.socket, command: str) -> str:
    client.sendall(command.encode() + b"\n")
    reply = b""
    while part := client.recv(65536):
        reply += part
    return reply.decode().rstrip("\n")
