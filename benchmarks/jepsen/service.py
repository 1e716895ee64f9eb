"""The services that are read."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.jepsen.judge import Life
from benchmarks.jepsen.money import GROUPS, INTERVAL_S, SLOW, TABLES, WATCHED
from benchmarks.service import ROOT, TAC
from cacheservice.cli.embedded import free_port

CONFIGURATION = """
[postgres]
dsn = "{dsn}"
connect_timeout_s = 15
max_connections = 6
[status]
port = {status}
[resp]
port = {resp}
[http]
port = {http}
[admin]
socket = "{admin}"
[persistence]
directory = "{saved}"
{datasets}
"""
DATASET = """
[datasets.{name}]
query = "{query}"
key = "id"
interval_s = {interval_s}
timeout_s = 20
max_age_s = 90
retry_initial_s = 0.1
retry_max_s = 1
{more}
"""


class Service:
    """One service, through all its lives."""

    def __init__(self, name: str, directory: Path, dsn: str) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir()
        self.ports = {"status": free_port(), "resp": free_port(), "http": free_port()}
        self.life = Life(0)
        self._process: subprocess.Popen[bytes] | None = None
        self.admin = self.directory / "admin.sock"
        datasets = "".join(DATASET.format(name=table, interval_s=INTERVAL_S, **_query(table)) for table in TABLES)
        (self.directory / "cacheservice.toml").write_text(
            CONFIGURATION.format(
                dsn=dsn, admin=self.admin, saved=self.directory / "saved", datasets=datasets, **self.ports
            )
        )

    def start(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CACHESERVICE_", "PG"))}
        environment = {**inherited, "PYTHONPATH": str(ROOT)}
        environment["CACHESERVICE_CONFIG"] = str(self.directory / "cacheservice.toml")
        self.life = Life(self.life.number + 1)
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [Path(sys.executable).with_name("twistd"), "-noy", TAC, "--pidfile="],
                env=environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def fresh(self, since_s: float = math.inf) -> bool:
        """Whether every dataset has been read within so many seconds."""
        try:
            told = json.loads(self.ask("json"))
        except (OSError, ValueError):
            if self._process is not None and self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended: {(self.directory / 'log').read_text()[-3000:]}") from None
            return False
        return all(each["age_s"] is not None and each["age_s"] < since_s for each in told["datasets"].values())

    def ask(self, line: str) -> str:
        with socket.create_connection(("127.0.0.1", self.ports["status"]), timeout=10) as client:
            return _exchange(client, line)

    def order(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(self.admin))
            return _exchange(client, line)


def _query(table: str) -> dict[str, str]:
    more = [f'watch = [{{table = "public.{table}", key = "id"}}]\nfull_interval_s = 20'] if table in WATCHED else []
    more += [f'group = "{group}"' for group, members in GROUPS.items() if table in members]
    if table == "probed":
        more.append('probe = "SELECT ARRAY[count(*), sum(v), max(beat)]::text FROM probed"')
    return {"query": SLOW.format(name=table), "more": "\n".join(more)}


def _exchange(client: socket.socket, line: str) -> str:
    client.sendall(f"{line}\n".encode())
    reply = b""
    while part := client.recv(65536):
        reply += part
    return reply.decode()
