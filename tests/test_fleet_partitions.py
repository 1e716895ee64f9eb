"""Laws of a fleet that the network divides: one process is cut off from PostgreSQL, or from all servers."""

from __future__ import annotations

import os
from random import Random

from psycopg2.extensions import parse_dsn

from tests.kit.daemon import Daemon
from tests.kit.faulty_network import Network
from tests.kit.processes import FleetTestCase, Publishes
from tests.kit.waiting import wait_until

ROUNDS = int(os.environ.get("TESTS_FLEET_ROUNDS", "1"))
SEED = int(os.environ.get("TESTS_FLEET_SEED", "20261130"))
FAULTS = ("silence", "reset", "half_open")


class Partitions(FleetTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.networks: dict[Daemon, dict[str, Network]] = {}
        ports = {"postgres": int(parse_dsn(self.server.dsn())["port"]), "valkey": self.valkey.port}
        for _ in range(3):
            networks = {name: Network(port) for name, port in ports.items()}
            for network in networks.values():
                self.addCleanup(network.close)
            configuration = self.fleet_configuration(
                dsn=self.server.dsn(database=self.database, port=networks["postgres"].port),
                valkey=f"redis://127.0.0.1:{networks['valkey'].port}",
            )
            self.fleet.append(daemon := self.start_process(configuration))
            self.networks[daemon] = networks
        for daemon in self.fleet:
            daemon.wait_until_ready()
        self.readers = [self.reader(daemon) for daemon in self.fleet]
        for reader in self.readers:
            self.addCleanup(reader.stop)
        self.publishes = Publishes(self.valkey)
        self.wait_healed()

    def cut(self, daemon: Daemon, fault: str, *names: str) -> None:
        for name in names:
            self.networks[daemon][name].order(fault)

    def heal(self, daemon: Daemon) -> None:
        for network in self.networks[daemon].values():
            network.order("heal")
        self.wait_healed()

    def check(self) -> None:
        """No reader has seen any of it, and no publish came late."""
        self.assert_one_content([reader.stop() for reader in self.readers])
        self.assert_in_order(self.publishes.stop())

    def test_leader_without_postgresql(self) -> None:
        """It gives up its lead, follows the next leader at once, and is a candidate again once it can be one."""
        random = Random(SEED)
        for _ in range(ROUNDS):
            leader = self.leader()
            epoch = self.epoch(leader)
            self.cut(leader, random.choice(FAULTS), "postgres")
            self.leader(among=self.others(leader), after=epoch)
            self.wait_healed()  # the one that is cut off follows, too
            self.assertEqual(self.role(leader), "replica")
            self.heal(leader)
        self.check()

    def test_replica_without_postgresql(self) -> None:
        """It notices nothing: a replica needs the Valkey only."""
        leader = self.leader()
        epoch = self.epoch(leader)
        for replica in self.others(leader):
            self.cut(replica, "silence", "postgres")
        self.wait_healed()
        self.assertEqual((self.leader(), self.epoch(leader)), (leader, epoch))
        for replica in self.others(leader):
            self.heal(replica)
        self.check()

    def test_leader_alone_in_the_world(self) -> None:
        """A leader that reaches no server serves what it has; the others have another one, which it follows later."""
        random = Random(SEED)
        for _ in range(ROUNDS):
            leader = self.leader()
            rest = self.others(leader)
            epoch = self.epoch(leader)
            self.cut(leader, random.choice(FAULTS), "postgres", "valkey")
            self.leader(among=rest, after=epoch)
            self.wait_healed(rest)
            wait_until(lambda d=leader: self.role(d) == "replica", "the end of its lead")
            kept = self.served(leader)
            moment = self.moment()
            for daemon in rest:
                wait_until(lambda d=daemon, m=moment: self.served(d).n > m, "new rows")
            self.assertEqual(self.served(leader), kept)
            self.heal(leader)
        self.check()
