"""A fleet of real service processes on a real Valkey and a real PostgreSQL, with what watches its laws."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.kit.daemon import Daemon
from tests.kit.http import ask_on
from tests.kit.postgres import query
from tests.kit.real_service import RealServiceTestCase
from tests.kit.valkey import ValkeyServer, running_valkey
from tests.kit.waiting import GIVE_UP_S, wait_until

PREFIX = "fleet"
HEAD = f"{PREFIX}:{{dataset/products}}:head"
ONE_MOMENT = "(SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint AS n OFFSET 0) AS one_read"
"""In a FROM clause: the moment of the read, in microseconds, the same one in all rows."""


def products(query: str, interval_s: float = 0.5, timeout_s: float = 20) -> str:
    """The table of a dataset that is read often, and again soon after a failure.

    :param timeout_s: less than GIVE_UP_S, because a read from a server that has been stopped hangs for so long.
    """
    return f"""
[datasets.products]
query = '''{query}'''
key = "id"
interval_s = {interval_s}
timeout_s = {timeout_s}
max_age_s = 600
retry_initial_s = 0.1
retry_max_s = 0.3
"""


# Each read returns a later moment.
PRODUCTS = products("SELECT id, (extract(epoch FROM clock_timestamp()) * 1e6)::bigint AS n FROM things")
_PUBLISHED = re.compile(rb'lua\] "HSET" "([^"]+)" "epoch" "(\d+)" "moment" "(\d+)" "manifest"')


class Seen(NamedTuple):
    """What a reader was served: the generation, and the moment of its read."""

    generation: int
    n: int


class Reader(threading.Thread):
    """Reads a dataset on one connection until it is stopped, and keeps each generation that it has seen.

    `problem` is the first answer that breaks a law: an error, or a generation that is less than one before.
    """

    def __init__(self, port: int, name: str = "products") -> None:
        super().__init__(daemon=True)
        self.seen: list[Seen] = []
        self.problem: str | None = None
        self._path = f"/v1/datasets/{name}/rows/1"
        self._address = ("127.0.0.1", port)
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        with suppress(OSError), closing(socket.create_connection(self._address, GIVE_UP_S)) as client:
            while not self._stopping.wait(0.005) and self.problem is None:
                answer = ask_on(client, self._path)
                if answer.status != 200:
                    self.problem = f"{answer.status} {answer.body!r}"
                    return
                seen = Seen(int(answer.headers["x-cache-generation"]), answer.json()["n"])
                if self.seen and seen < self.seen[-1]:
                    self.problem = f"{seen} after {self.seen[-1]}"
                if not self.seen or seen != self.seen[-1]:
                    self.seen.append(seen)

    def stop(self) -> list[Seen]:
        """Return what it has seen.

        :raises AssertionError: if a law was broken.
        """
        self._stopping.set()
        self.join(GIVE_UP_S)
        assert self.problem is None, self.problem
        return self.seen


class Publishes(threading.Thread):
    """Records each publish that a Valkey carries out, as pairs of epoch and moment; ends with its connection."""

    def __init__(self, server: ValkeyServer, head: str = HEAD) -> None:
        super().__init__(daemon=True)
        self.all: list[tuple[int, int]] = []
        self._head = head.encode()
        self._client = socket.create_connection(("127.0.0.1", server.port), GIVE_UP_S)
        self._client.sendall(b"MONITOR\r\n")
        assert self._client.recv(5) == b"+OK\r\n"
        self._client.settimeout(None)
        self.start()

    def run(self) -> None:
        with suppress(OSError), self._client.makefile("rb") as lines:
            for line in lines:
                found = _PUBLISHED.search(line)
                if found and found[1] == self._head:
                    self.all.append((int(found[2]), int(found[3])))

    def stop(self) -> list[tuple[int, int]]:
        self._client.shutdown(socket.SHUT_RDWR)
        self.join(GIVE_UP_S)
        self._client.close()
        return self.all


def events_of(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    return [line for line in daemon.lines if line["event"] == name]


def role_of(daemon: Daemon, unit: str = "dataset/products") -> str:
    """Return the role that a process has logged last."""
    roles = [line["role"] for line in events_of(daemon, "role_changed") if line["unit"] == unit]
    return str(roles[-1]) if roles else "replica"


def epoch_of(daemon: Daemon, unit: str = "dataset/products") -> int:
    """Return the epoch of the last lead of a process, 0 if it has had none."""
    epochs = [line["epoch"] for line in events_of(daemon, "lead_began") if line["unit"] == unit]
    return int(epochs[-1]) if epochs else 0


class FleetTestCase(RealServiceTestCase):
    """Processes that lead and follow; at the end none has logged an internal error."""

    def setUp(self) -> None:
        super().setUp()
        query(self.server, self.database, "CREATE TABLE things AS SELECT 1 AS id")
        servers = ExitStack()
        self.addCleanup(servers.close)
        self.valkey = servers.enter_context(running_valkey())
        self.fleet: list[Daemon] = []
        self._places: dict[Daemon, Path] = {}

    def directory_of(self, daemon: Daemon) -> Path:
        return self._places[daemon]

    def fleet_configuration(
        self, *tables: str, valkey: str = "", fallback_s: float = 600, more: str = "", dsn: str | None = None
    ) -> str:
        url = valkey or f"redis://{self.valkey.address}"
        cluster = f'[cluster]\nenabled = true\nvalkey_url = "{url}"\nprefix = "{PREFIX}"\n'
        return self.configuration(
            f"{cluster}fallback_after_s = {fallback_s}\n{more}\n", *(tables or (PRODUCTS,)), dsn=dsn
        )

    def start_process(self, configuration: str, *, directory: str = "") -> Daemon:
        place = self.directory / (directory or f"process-{len(list(self.directory.iterdir()))}")
        place.mkdir(exist_ok=True)
        daemon = Daemon(place, configuration.replace("{place}", str(place)))
        self._places[daemon] = place
        self.addCleanup(daemon.kill)
        self.addCleanup(self.check_log, daemon)
        self.addCleanup(self.go_on, daemon)
        return daemon

    def start_fleet(self, *tables: str, processes: int = 3, **options: Any) -> list[Daemon]:
        """Start processes with the same configuration; return them once all are ready."""
        configuration = self.fleet_configuration(*tables, **options)
        self.fleet = [self.start_process(configuration) for _ in range(processes)]
        for daemon in self.fleet:
            daemon.wait_until_ready()
        return self.fleet

    def check_log(self, daemon: Daemon) -> None:
        bugs = [line for line in daemon.lines if line["event"] in ("internal_error", "refresh_broke")]
        self.assertEqual(bugs, [])
        self.assertEqual(daemon.errors, "")

    def pause(self, daemon: Daemon) -> None:
        daemon.process.send_signal(signal.SIGSTOP)

    def go_on(self, daemon: Daemon) -> None:
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGCONT)

    def events(self, daemon: Daemon, name: str) -> list[dict[str, Any]]:
        return events_of(daemon, name)

    def role(self, daemon: Daemon, unit: str = "dataset/products") -> str:
        return role_of(daemon, unit)

    def epoch(self, daemon: Daemon, unit: str = "dataset/products") -> int:
        return epoch_of(daemon, unit)

    def leader(self, *, among: list[Daemon] | None = None, after: int = 0, unit: str = "dataset/products") -> Daemon:
        """Wait for the leader whose epoch is greater than one before; return it."""

        def found() -> Daemon | None:
            leads = [
                daemon
                for daemon in (self.fleet if among is None else among)
                if daemon.process.poll() is None and self.role(daemon, unit) == "leader"
            ]
            return next((daemon for daemon in leads if self.epoch(daemon, unit) > after), None)

        daemon: Daemon = wait_until(found, "a leader")
        return daemon

    def others(self, daemon: Daemon) -> list[Daemon]:
        return [each for each in self.fleet if each is not daemon]

    def reader(self, daemon: Daemon, name: str = "products") -> Reader:
        return Reader(self.port_of(daemon, "http"), name)

    def served(self, daemon: Daemon, name: str = "products") -> Seen:
        answer = self.get(daemon, f"/v1/datasets/{name}/rows/1")
        self.assertEqual(answer.status, 200, answer.body)
        return Seen(int(answer.headers["x-cache-generation"]), json.loads(answer.body)["n"])

    def wait_healed(self, daemons: list[Daemon] | None = None, name: str = "products") -> None:
        """Wait until all processes serve what was read after this call, and then one generation with one content."""
        daemons = self.fleet if daemons is None else daemons
        now = self.moment()
        for daemon in daemons:
            wait_until(lambda daemon=daemon: self.served(daemon, name).n > now, "a new read")
        wait_until(lambda: len({self.served(daemon, name) for daemon in daemons}) == 1, "one generation everywhere")
        roles = sorted(self.role(daemon, f"dataset/{name}") for daemon in daemons)
        wait_until(
            lambda: (
                sorted(self.role(daemon, f"dataset/{name}") for daemon in daemons)
                == ["leader"] + ["replica"] * (len(daemons) - 1)
            ),
            f"one leader instead of {roles}",
        )

    def moment(self) -> int:
        """Return the moment of the database, as reads return it."""
        ((moment,),) = query(self.server, self.database, "SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint")
        return int(moment)

    def assert_one_content(self, readers: list[list[Seen]]) -> None:
        """A generation has the same content in all processes."""
        content: dict[int, int] = {}
        for seen in readers:
            for generation, n in seen:
                self.assertEqual(content.setdefault(generation, n), n, f"generation {generation}")

    def assert_in_order(self, publishes: list[tuple[int, int]]) -> None:
        """No publish of an epoch follows one of a later epoch."""
        epochs = [epoch for epoch, _ in publishes]
        self.assertEqual(epochs, sorted(epochs))

    def kill_now(self, daemon: Daemon) -> None:
        """End a process at once, as a crash does."""
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()
