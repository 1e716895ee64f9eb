"""Faults of a fleet for as long as is asked: three processes with two workers each, a Valkey and a PostgreSQL.

Each process is in a network namespace of its own. Processes are killed and suspended; the Valkey is killed, flushed and
suspended; the network separates a process from the servers: its packets get lost, or a relay before the servers fails.
Readers of each process check each answer (`tests/kit/fleet_readers.py`). After each fault all processes must serve new
rows, and there must be one leader. It needs root. `benchmarks.soak` runs it, and it is a command of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

from tabulate import tabulate

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.daemon import Daemon
from tests.kit.faulty_network import Network
from tests.kit.fleet_readers import WHOLE_PRODUCTS, Killed, OverHttp, OverResp, PatientReader, Process
from tests.kit.processes import PREFIX, Publishes, events_of, role_of
from tests.kit.valkey import ValkeyServer, running_valkey
from tests.kit.waiting import GIVE_UP_S
from tests.kit.workers import workers_of

PROCESSES, WORKERS = 3, 2
FALLBACK_S = 6.0
MOST_HOLD_S = 12.0
"""Longer than a takeover, and than `FALLBACK_S`."""
SERVERS = ("postgres", "valkey")
NO_NEIGHBOUR = "02:00:00:00:00:01"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Place:
    """A network namespace with a process; the servers have an address each there, behind a relay that can fail."""

    def __init__(self, number: int, ports: dict[str, int], stack: ExitStack) -> None:
        self.name = f"soak-{os.getpid()}-{number}"
        net, outside = f"10.77.{number}", f"soak{os.getpid() % 10_000}-{number}"
        self.address = f"{net}.10"
        self._servers = {"postgres": f"{net}.2", "valkey": f"{net}.3"}
        ip("netns", "add", self.name)
        stack.callback(ip, "netns", "delete", self.name)
        ip("link", "add", outside, "type", "veth", "peer", "name", "inside", "netns", self.name)
        for host in (f"{net}.1", *self._servers.values()):
            ip("address", "add", f"{host}/24", "dev", outside)
        ip("link", "set", outside, "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "inside")
        for device in ("inside", "lo"):
            ip("-n", self.name, "link", "set", device, "up")
        self._relays = {name: Network(port, self._servers[name]) for name, port in ports.items()}
        for relay in self._relays.values():
            stack.callback(relay.close)

    def server(self, name: str) -> tuple[str, int]:
        return self._servers[name], self._relays[name].port

    def cut(self, random: Random, *names: str) -> None:
        """Separate the process from servers: by packets that get lost, or by a relay that fails."""
        fault = random.choice(["lost", "lost", "lost", "silence", "reset", "half_open"])
        for name in names:
            if fault == "lost":
                address = self._servers[name]
                ip(
                    "-n",
                    self.name,
                    "neigh",
                    "replace",
                    address,
                    "lladdr",
                    NO_NEIGHBOUR,
                    "dev",
                    "inside",
                    "nud",
                    "permanent",
                )
            else:
                self._relays[name].order(fault)

    def heal(self) -> None:
        ip("-n", self.name, "neigh", "flush", "dev", "inside", "nud", "permanent")
        for relay in self._relays.values():
            relay.order("heal")


class Struck(NamedTuple):
    """A fault, and the seconds from its end until the fleet was whole; None if that did not come."""

    name: str
    recovery_s: float | None


class Fleet:
    """The processes with their readers; `problems` are broken laws."""

    def __init__(self, stack: ExitStack, server: EmbeddedPostgres, database: str) -> None:
        self.problems: list[str] = []
        self.struck: list[Struck] = []
        self.answers: Counter[str] = Counter()
        self.valkey: ValkeyServer = stack.enter_context(running_valkey())
        self._server, self._database = server, database
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cacheservice-soak-")))
        self._numbers = count()
        self._killed = Killed()
        self._readers: dict[Daemon, list[PatientReader]] = {}
        self._epochs: list[tuple[int, int]] = []
        ports = {"postgres": server.port, "valkey": self.valkey.port}
        self.places: dict[Daemon, Place] = {}
        self._publishes = Publishes(self.valkey)
        stack.callback(self._end)
        for place in [Place(number, ports, stack) for number in range(PROCESSES)]:
            self._start(place)
        for daemon in list(self.places):
            self._read(daemon)

    # Processes

    def _start(self, place: Place) -> Daemon:
        directory = self._directory / f"{next(self._numbers)}"
        directory.mkdir()
        host, port = place.server("postgres")
        ports = "".join(f'[{name}]\nhost = "{place.address}"\nport = 0\n' for name in ("status", "resp", "http"))
        valkey = "redis://{}:{}".format(*place.server("valkey"))
        configuration = (
            f'[postgres]\ndsn = "{self._server.dsn(database=self._database, host=host, port=port)}"\n{ports}'
            f"[limits]\nallow_anonymous = true\n[workers]\nprocesses = {WORKERS}\n"
            f'[cluster]\nenabled = true\nvalkey_url = "{valkey}"\nprefix = "{PREFIX}"\nname = "{place.name}"\n'
            f"fallback_after_s = {FALLBACK_S}\n{WHOLE_PRODUCTS}"
        )
        daemon = Daemon(directory, configuration, before=("ip", "netns", "exec", place.name))
        self.places[daemon] = place
        return daemon

    def _read(self, daemon: Daemon) -> None:
        """Read from a process from now on, once it and its workers serve."""
        daemon.wait_until_ready()
        self.wait(lambda: len(events_of(daemon, "worker_serving")) >= WORKERS, "workers")
        started = daemon.event("service_started")
        ports = {
            name: (self.places[daemon].address, int(started[name].rpartition(":")[2])) for name in ("http", "resp")
        }
        process = Process(daemon.process.pid, **ports)
        self._readers[daemon] = [
            PatientReader(process, way, self._killed) for way in (OverHttp(), OverResp()) for _ in range(2)
        ]

    def kill(self, daemon: Daemon) -> None:
        """Kill a main process, and start another one in its place."""
        self._killed.add(daemon.process.pid, *workers_of(daemon.process.pid))
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()
        self._judge(daemon)
        self._read(self._start(self.places.pop(daemon)))

    def kill_worker(self, daemon: Daemon, random: Random) -> None:
        serving = len(events_of(daemon, "worker_serving"))
        victim = random.choice(workers_of(daemon.process.pid))
        self._killed.add(victim)
        os.kill(victim, signal.SIGKILL)
        self.wait(lambda: len(events_of(daemon, "worker_serving")) > serving, "the next worker")

    def restart_valkey(self) -> None:
        self._epochs += self._publishes.stop()
        self.valkey.start()
        self.valkey.wait("PING", until="PONG")
        self._publishes = Publishes(self.valkey)

    def leader(self) -> Daemon:
        return self.wait(lambda: next((each for each in self.places if role_of(each) == "leader"), None), "a leader")

    def replica(self, random: Random) -> Daemon:
        leader = self.leader()
        return random.choice([daemon for daemon in self.places if daemon is not leader])

    # Laws

    def wait(self, true: Callable[[], object], what: str) -> object:
        """Wait for something true, and return it.

        :raises RuntimeError: if it does not come; `what` names it.
        """
        ends_at = time.monotonic() + GIVE_UP_S
        while not (result := true()):
            if time.monotonic() > ends_at:
                raise RuntimeError(f"{what} did not come")
            time.sleep(0.05)
        return result

    def is_whole(self, since_us: int) -> bool:
        roles = sorted(role_of(daemon) for daemon in self.places)
        new = all(reader.last.n > since_us for readers in self._readers.values() for reader in readers)
        return new and roles == ["leader"] + ["replica"] * (PROCESSES - 1)

    def has_problems(self) -> bool:
        return bool(self.problems) or any(reader.problem for readers in self._readers.values() for reader in readers)

    def recovered(self, name: str) -> Struck:
        """Wait until all is as it was, after a fault has ended."""
        ended_at, since_us = time.monotonic(), time.time_ns() // 1000
        while not self.is_whole(since_us) and time.monotonic() < ended_at + GIVE_UP_S and not self.has_problems():
            time.sleep(0.05)
        whole = self.is_whole(since_us)
        self.struck.append(Struck(name, time.monotonic() - ended_at if whole else None))
        if not whole:
            states = {self.places[daemon].name: role_of(daemon) for daemon in self.places}
            self.problems.append(f"{name}: not whole again: {states}")
        return self.struck[-1]

    def _judge(self, daemon: Daemon) -> None:
        """Note the broken laws of a process that has ended, or is about to."""
        for reader in self._readers.pop(daemon, ()):
            reader.end()
            self.answers[type(reader).__name__] += reader.answers
            self.problems += [reader.problem] if reader.problem else []
        bugs = [
            str(line) for line in daemon.lines if line["event"] in ("internal_error", "refresh_broke", "feed_differs")
        ]
        self.problems += [*bugs, *([daemon.errors] if daemon.errors else [])]

    def finish(self) -> None:
        """Judge all processes."""
        for daemon in list(self.places):
            self._judge(daemon)
        epochs = [epoch for epoch, _ in (*self._epochs, *self._publishes.stop())]
        self.problems += [] if epochs == sorted(epochs) else [f"publishes of an older epoch: {epochs}"]

    def _end(self) -> None:
        for daemon in self.places:
            for reader in self._readers.get(daemon, ()):
                reader.end()
            daemon.kill()


def hold(random: Random) -> None:
    time.sleep(random.uniform(0.2, MOST_HOLD_S))


def suspended(fleet: Fleet, daemon: Daemon, random: Random) -> None:
    daemon.process.send_signal(signal.SIGSTOP)
    hold(random)
    daemon.process.send_signal(signal.SIGCONT)


def separated(fleet: Fleet, daemon: Daemon, random: Random, *servers: str) -> None:
    place = fleet.places[daemon]
    place.cut(random, *servers)
    hold(random)
    place.heal()


def valkey_killed(fleet: Fleet, random: Random) -> None:
    fleet.valkey.kill()
    hold(random)
    fleet.restart_valkey()


def valkey_suspended(fleet: Fleet, random: Random) -> None:
    fleet.valkey.pause()
    hold(random)
    fleet.valkey.go_on()


FLEET_HEADERS = ("fault", "times", "whole again, median", "longest")
Fault = Callable[[Fleet, Random], object]
FAULTS: dict[str, Fault] = {
    "leader: killed": lambda fleet, random: fleet.kill(fleet.leader()),
    "replica: killed": lambda fleet, random: fleet.kill(fleet.replica(random)),
    "worker of the leader: killed": lambda fleet, random: fleet.kill_worker(fleet.leader(), random),
    "worker of a replica: killed": lambda fleet, random: fleet.kill_worker(fleet.replica(random), random),
    "leader: suspended": lambda fleet, random: suspended(fleet, fleet.leader(), random),
    "replica: suspended": lambda fleet, random: suspended(fleet, fleet.replica(random), random),
    "Valkey: killed, then empty": valkey_killed,
    "Valkey: flushed": lambda fleet, random: fleet.valkey.cli("FLUSHALL"),
    "Valkey: suspended": valkey_suspended,
    "leader: without PostgreSQL": lambda fleet, random: separated(fleet, fleet.leader(), random, "postgres"),
    "leader: without the Valkey": lambda fleet, random: separated(fleet, fleet.leader(), random, "valkey"),
    "leader: without both": lambda fleet, random: separated(fleet, fleet.leader(), random, *SERVERS),
    "replica: without the Valkey": lambda fleet, random: separated(fleet, fleet.replica(random), random, "valkey"),
    "replica: without both": lambda fleet, random: separated(fleet, fleet.replica(random), random, *SERVERS),
}


def fleet_faults(minutes: float, random: Random) -> Fleet:
    """Strike a fleet again and again, each fault as often as the others; stop at the first broken law."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("network namespaces need root and the program ip: apt-get install iproute2")
    with ExitStack() as stack:
        server = EmbeddedPostgres(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cacheservice-soak-"))))
        stack.callback(server.stop, "immediate")
        server.start()
        server.create_database("fleet")
        fleet = Fleet(stack, server, "fleet")
        fleet.recovered("start")
        ends_at, left = time.monotonic() + minutes * 60, list[str]()
        while time.monotonic() < ends_at and not fleet.has_problems():
            left = left or random.sample(list(FAULTS), len(FAULTS))
            name = left.pop()
            time.sleep(random.uniform(0, 1))
            FAULTS[name](fleet, random)
            struck = fleet.recovered(name)
            print(
                f"{name}: whole again {'never' if struck.recovery_s is None else f'after {struck.recovery_s:.2f} s'}",
                flush=True,
            )
        fleet.finish()
    return fleet


def fleet_table(fleet: Fleet) -> list[tuple[str, ...]]:
    by_name: dict[str, list[float]] = {}
    for name, recovery_s in fleet.struck:
        by_name.setdefault(name, []).append(float("inf") if recovery_s is None else recovery_s)
    return [
        (name, str(len(times)), f"{median(times):.2f} s", f"{max(times):.2f} s")
        for name, times in sorted(by_name.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    fleet = fleet_faults(options.minutes, Random(options.seed))
    print(tabulate(fleet_table(fleet), FLEET_HEADERS, disable_numparse=True))
    print(f"{sum(fleet.answers.values()):,} answers checked")
    print(*fleet.problems, sep="\n")
    sys.exit(1 if fleet.problems else 0)


if __name__ == "__main__":
    main()
