"""Laws of a fleet with workers in which any one process is killed at any moment: readers of the others see nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from random import Random

from tests.kit.daemon import Daemon
from tests.kit.fleet_readers import WHOLE_PRODUCTS, Killed, OverHttp, OverResp, PatientReader, Process
from tests.kit.processes import FleetTestCase, Publishes, Seen
from tests.kit.waiting import wait_until
from tests.kit.workers import workers_of

ROUNDS = int(os.environ.get("TESTS_FLEET_ROUNDS", "4"))
"""How many processes are killed; the soak sets more."""
SEED = int(os.environ.get("TESTS_FLEET_SEED", "20261130"))
WORKERS = 2
LONGEST_PAUSE_S = 0.7
"""A little more than an interval, so that a process is killed in each phase of a refresh and of a publish."""
LEADER, REPLICA, WORKER_OF_LEADER, WORKER_OF_REPLICA = KINDS = (
    "the leader", "a replica", "a worker of the leader", "a worker of a replica"
)  # fmt: skip


def kinds(random: Random) -> Iterator[str]:
    """All kinds in random order, again and again."""
    while True:
        yield from random.sample(KINDS, len(KINDS))


class Kills(FleetTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.killed = Killed()
        self.readers: dict[Daemon, list[PatientReader]] = {}

    def serving(self, daemon: Daemon) -> int:
        return len(self.events(daemon, "worker_serving"))

    def begin(self, daemon: Daemon) -> None:
        """Wait until a process and its workers serve, and read from it from then on."""
        daemon.wait_until_ready()
        wait_until(lambda: self.serving(daemon) >= WORKERS, "workers")
        ports = {name: ("127.0.0.1", self.port_of(daemon, name)) for name in ("http", "resp")}
        process = Process(daemon.process.pid, **ports)
        self.readers[daemon] = [
            PatientReader(process, way, self.killed) for way in (OverHttp(), OverResp()) for _ in range(WORKERS)
        ]
        for reader in self.readers[daemon]:
            self.addCleanup(reader.end)

    def check_readers(self) -> None:
        """No reader has seen a problem, and all are served new rows."""
        moment = self.moment()
        for reader in [reader for daemon in self.fleet for reader in self.readers[daemon]]:
            wait_until(lambda r=reader: r.problem or r.last.n > moment, "new rows for a reader")
            self.assertIsNone(reader.problem)

    def strike(self, kind: str, random: Random) -> None:
        """Kill a process at a random moment; return when another one serves in its place."""
        leader = self.leader()
        daemon = leader if kind in (LEADER, WORKER_OF_LEADER) else random.choice(self.others(leader))
        time.sleep(random.uniform(0, LONGEST_PAUSE_S))
        if kind in (LEADER, REPLICA):
            self.strike_main(daemon)
            return
        serving = self.serving(daemon)
        victim = random.choice(workers_of(daemon.process.pid))
        self.killed.add(victim)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: self.serving(daemon) > serving, "the next worker")

    def strike_main(self, daemon: Daemon) -> None:
        epoch = self.epoch(daemon)
        was_leader = self.role(daemon) == "leader"
        self.killed.add(daemon.process.pid, *workers_of(daemon.process.pid))
        self.kill_now(daemon)
        for reader in self.readers.pop(daemon):
            reader.stop()
        rest = self.others(daemon)
        if was_leader:
            self.leader(among=rest, after=epoch)
        self.fleet = [*rest, self.start_process(self.configured())]
        self.begin(self.fleet[-1])

    def configured(self) -> str:
        return self.fleet_configuration(WHOLE_PRODUCTS, more=f"[workers]\nprocesses = {WORKERS}\n")

    def test_any_process_at_any_moment(self) -> None:
        """No error, no half or wrong rows, no way back on a connection; another process serves in its place."""
        random = Random(SEED)
        self.fleet = [self.start_process(self.configured()) for _ in range(3)]
        for daemon in self.fleet:
            self.begin(daemon)
        self.wait_healed()
        publishes = Publishes(self.valkey)
        for _, kind in zip(range(ROUNDS), kinds(random), strict=False):
            self.strike(kind, random)
            self.wait_healed()
            self.check_readers()
        remaining = [reader for readers in self.readers.values() for reader in readers]
        for reader in remaining:
            reader.stop()
        # A generation of the killed leader may have been seen there only.
        self.assert_one_content([[Seen(*sight) for sight in reader.seen if sight.generation] for reader in remaining])
        self.assert_in_order(publishes.stop())
