"""The real service as a child process, under twistd, and the questions that are put to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.products import QUERY

ROOT = Path(__file__).parent.parent
TAC = ROOT / "tac" / "cacheservice.tac"

_START_LIMIT_S = 120
_REFRESH_LIMIT_S = 120
_POLL_INTERVAL_S = 0.02
_EVENT_INTERVAL_S = 0.002

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
{dataset}
"""
_DATASET = {"key": "id", "interval_s": 1_000_000, "timeout_s": 120}


class RunningService:
    """A service that refreshes `products` when it starts and when it is asked to.

    :param ports: on 127.0.0.1, by name: status, resp, http.
    :param admin: the path of its admin socket.
    :param log: the file that its log goes to.
    """

    def __init__(self, pid: int, ports: dict[str, int], admin: Path, log: Path) -> None:
        self.pid = pid
        self.port, self.resp_port, self.http_port = ports["status"], ports["resp"], ports["http"]
        self._admin = admin
        self._log = log
        self._read_bytes = 0

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

        :raises RuntimeError: if it failed.
        """
        limit = time.monotonic() + _REFRESH_LIMIT_S
        while (products := self.products())["refreshing"]:
            if time.monotonic() > limit:
                raise RuntimeError("the refresh does not end")
            time.sleep(_POLL_INTERVAL_S)
        attempt: dict[str, Any] = products["last_attempt"]
        if attempt["outcome"] not in ("published", "unchanged"):
            raise RuntimeError(f"the refresh failed: {attempt['error']}")
        return attempt

    def events(self) -> list[dict[str, Any]]:
        """The lines of its log that were written since the last call."""
        with self._log.open("rb") as log:
            log.seek(self._read_bytes)
            text = log.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(text)
        return [json.loads(line) for line in text.splitlines() if line.startswith(b"{")]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of that name; those before it, and those that came with it, are passed over.

        :raises RuntimeError: if there is none within two minutes.
        """
        limit = time.monotonic() + _REFRESH_LIMIT_S
        while time.monotonic() < limit:
            for event in self.events():
                if event["event"] == name:
                    return event
            time.sleep(_EVENT_INTERVAL_S)
        raise RuntimeError(f"no {name} within {_REFRESH_LIMIT_S} s")


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


def scheduled_s(pid: int) -> float:
    """Seconds that a process of one thread, or the first thread of another one, has computed."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextmanager
def running_service(
    dsn: str,
    query: str = QUERY,
    *,
    max_connections: int = 10_000,
    tac: Path = TAC,
    dataset: Mapping[str, Any] = MappingProxyType({}),
    more: str = "",
    python: Path = Path(sys.executable),
    wait: bool = True,
    **environment: str,
) -> Iterator[RunningService]:
    """The service, with its first snapshot loaded.

    :param dataset: more keys of the dataset, or others in place of ours.
    :param more: tables for the end of the configuration.
    :param python: of the environment whose twistd runs it.
    :param wait: whether to wait for the end of the first refresh, which a process that follows does not have.
    """
    with tempfile.TemporaryDirectory(prefix="cacheservice-benchmark-") as name:
        directory = Path(name)
        admin, config, log = directory / "admin.sock", directory / "cacheservice.toml", directory / "log"
        keys = {"query": query, **_DATASET, **dataset}
        values = {
            "dsn": _toml(dsn),
            "admin": _toml(str(admin)),
            "dataset": "\n".join(f"{key} = {_toml(value)}" for key, value in keys.items()),
        }
        config.write_text(_CONFIG.format(**values, max_connections=max_connections) + more)
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("CACHESERVICE_", "PG"))}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [python.with_name("twistd"), "-noy", tac, "--pidfile="],
                env={**ours, "PYTHONPATH": str(ROOT), "CACHESERVICE_CONFIG": str(config), **environment},
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            service = RunningService(process.pid, _ports(process, log), admin, log)
            if wait:
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


def _toml(value: Any) -> str:
    """A value as TOML has it: JSON's, except for tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _exchange(client: socket.socket, command: str) -> str:
    client.sendall(command.encode() + b"\n")
    reply = b""
    while part := client.recv(65536):
        reply += part
    return reply.decode().rstrip("\n")
