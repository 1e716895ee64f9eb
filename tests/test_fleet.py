"""Laws of a fleet of service processes, whatever happens to its processes, its Valkey and its PostgreSQL."""

from __future__ import annotations

import os
import signal

from tests.kit.daemon import Daemon
from tests.kit.postgres import query
from tests.kit.processes import HEAD, PRODUCTS, FleetTestCase, Publishes
from tests.kit.waiting import wait_until

ROUNDS = int(os.environ.get("TESTS_FLEET_ROUNDS", "3"))
"""How often a leader is stopped and continued; the soak sets more."""


class Reading(FleetTestCase):
    def test_the_database_sees_one_process(self) -> None:
        """Three processes read the database as often as one publishes, and a starting process does not read it."""
        self.start_fleet()
        leader = self.leader()
        followers = self.others(leader)
        readers = [self.reader(daemon) for daemon in self.fleet]
        wait_until(lambda: len(readers[0].seen) > 5, "generations")
        late = self.start_process(self.fleet_configuration())
        late.wait_until_ready()
        readers.append(self.reader(late))
        for reader in readers:
            wait_until(lambda reader=reader: len(reader.seen) > 5, "generations")
        served = [reader.stop() for reader in readers]
        self.assert_one_content(served)
        for daemon in [*followers, late]:
            self.assertEqual(self.events(daemon, "role_changed"), [])
        last = self.served(leader).generation
        for daemon in [*self.fleet, late]:
            daemon.end()
        scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'things'"
        wait_until(lambda: query(self.server, self.database, scans)[0][0] >= last, "the statistics")
        ((reads,),) = query(self.server, self.database, scans)
        published = [line for daemon in [*self.fleet, late] for line in self.events(daemon, "refresh_published")]
        self.assertGreaterEqual(len(published), last)
        # Each process may have ended a read when it stopped.
        self.assertLessEqual(len(published), reads)
        self.assertLessEqual(reads, len(published) + 4)


class Leaders(FleetTestCase):
    def test_killed(self) -> None:
        """When the leader is killed, another one goes on with its generations."""
        self.start_fleet()
        publishes = Publishes(self.valkey)
        first = self.leader()
        rest = self.others(first)
        readers = [self.reader(daemon) for daemon in rest]
        epoch = self.epoch(first)
        self.kill_now(first)
        second = self.leader(among=rest, after=epoch)
        self.wait_healed(rest)
        self.fleet = [*rest, self.start_process(self.fleet_configuration())]
        self.fleet[-1].wait_until_ready()
        self.wait_healed()
        self.assertEqual(self.role(second), "leader")
        self.assert_one_content([reader.stop() for reader in readers])
        self.assert_in_order(publishes.stop())

    def test_stopped_and_continued(self) -> None:
        """A leader that is suspended loses its lead, and publishes nothing when it wakes up."""
        self.start_fleet()
        publishes = Publishes(self.valkey)
        for _ in range(ROUNDS):
            leader = self.leader()
            rest = self.others(leader)
            epoch = self.epoch(leader)
            readers = [self.reader(daemon) for daemon in rest]
            self.pause(leader)
            self.leader(among=rest, after=epoch)
            self.go_on(leader)
            readers.append(self.reader(leader))
            self.wait_healed()
            self.assert_one_content([reader.stop() for reader in readers])
        self.assert_in_order(publishes.stop())

    def test_lead_session_killed(self) -> None:
        """A leader whose session is ended by PostgreSQL loses its lead, and one of the processes has it next."""
        self.start_fleet()
        publishes = Publishes(self.valkey)
        readers = [self.reader(daemon) for daemon in self.fleet]
        epoch = self.epoch(self.leader())
        ended = query(
            self.server,
            self.database,
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())",
        )
        self.assertEqual(ended, [(True,)])
        self.leader(after=epoch)
        self.wait_healed()
        self.assert_one_content([reader.stop() for reader in readers])
        self.assert_in_order(publishes.stop())


class Carrier(FleetTestCase):
    """Faults of the Valkey: readers see nothing of them, and all heals without help."""

    def setUp(self) -> None:
        super().setUp()
        self.start_fleet()
        self.readers = [self.reader(daemon) for daemon in self.fleet]

    def check(self) -> None:
        self.wait_healed()
        self.assert_one_content([reader.stop() for reader in self.readers])

    def unreadable(self, daemon: Daemon, count: int = 0) -> None:
        """Wait until a process has logged that the Valkey fails."""
        names = ("cluster_unreadable", "publish_failed")
        wait_until(lambda: sum(len(self.events(daemon, name)) for name in names) > count, "a problem")

    def test_killed(self) -> None:
        """The Valkey is killed, and starts empty."""
        for _ in range(2):
            counts = [len(self.events(daemon, "cluster_unreadable")) for daemon in self.fleet]
            self.valkey.kill()
            for daemon, count in zip(self.fleet, counts, strict=True):
                if self.role(daemon) != "leader":
                    wait_until(lambda d=daemon, c=count: len(self.events(d, "cluster_unreadable")) > c, "a problem")
            self.valkey.start()
            self.wait_healed()
        self.check()

    def test_flushed(self) -> None:
        """The Valkey loses all keys, or some."""
        for _ in range(5):
            self.valkey.cli("FLUSHALL")
        self.wait_healed()
        for key in self.valkey.cli("KEYS", "*").split():
            self.valkey.cli("DEL", key)
            self.wait_healed()
        self.check()

    def test_flushed_while_the_leader_changes(self) -> None:
        """The Valkey forgets the epoch while a suspended leader does not know that it is none any more."""
        first = self.leader()
        self.pause(first)
        self.leader(among=self.others(first), after=self.epoch(first))
        self.valkey.cli("FLUSHALL")
        self.go_on(first)
        self.check()

    def test_parts_lost_before_a_takeover(self) -> None:
        """The next leader publishes although nothing of the leader before it can be loaded."""
        first = self.leader()
        for reader in self.readers:
            reader.stop()
        generation = self.served(first).generation
        for daemon in self.fleet:
            self.kill_now(daemon)
        for key in self.valkey.cli("KEYS", "*").split():
            if key != HEAD:
                self.valkey.cli("DEL", key)
        self.start_fleet()
        self.wait_healed()
        self.assertGreater(self.served(self.fleet[0]).generation, generation)

    def test_refusals(self) -> None:
        """The Valkey is a read-only replica, has no memory left, or asks for a password."""
        leader = self.leader()
        other = self.others(leader)[0]
        self.valkey.cli("REPLICAOF", "127.0.0.1", "1")
        self.unreadable(leader)
        self.valkey.cli("REPLICAOF", "NO", "ONE")
        self.wait_healed()
        count = len(self.events(leader, "publish_failed"))
        self.valkey.cli("CONFIG", "SET", "maxmemory", "1")
        wait_until(lambda: len(self.events(leader, "publish_failed")) > count, "a refusal")
        self.valkey.cli("CONFIG", "SET", "maxmemory", "0")
        self.wait_healed()
        count = len(self.events(other, "cluster_unreadable"))
        self.valkey.cli("CONFIG", "SET", "requirepass", "secret")
        self.valkey.cli("-a", "secret", "CLIENT", "KILL", "TYPE", "normal")
        wait_until(lambda: len(self.events(other, "cluster_unreadable")) > count, "a refusal")
        self.valkey.cli("-a", "secret", "CONFIG", "SET", "requirepass", "")
        self.check()

    def test_suspended(self) -> None:
        """The Valkey does not answer."""
        self.valkey.process.send_signal(signal.SIGSTOP)
        self.addCleanup(self.valkey.process.send_signal, signal.SIGCONT)
        for daemon in self.fleet:
            self.unreadable(daemon)
        self.valkey.process.send_signal(signal.SIGCONT)
        self.check()


class Definitions(FleetTestCase):
    def redefine(self, daemon: Daemon, *tables: str) -> None:
        number = len(self.events(daemon, "config_reloaded"))
        directory = self.directory_of(daemon)
        (directory / "cacheservice.toml").write_text(self.fleet_configuration(*tables, fallback_s=5))
        daemon.process.send_signal(1)
        wait_until(lambda: len(self.events(daemon, "config_reloaded")) > number, "the reload")

    def test_redefined_one_after_the_other(self) -> None:
        """A process serves rows of its own definition only, and the whole fleet heals once all have the new one."""
        self.start_fleet(fallback_s=5)
        leader = self.leader()
        new = PRODUCTS.replace("SELECT id,", "SELECT id, 'new' AS kind,")
        for daemon in [leader, *self.others(leader)]:
            self.redefine(daemon, new)
            wait_until(lambda d=daemon: "kind" in self.get(d, "/v1/datasets/products/rows/1").json(), "the new rows")
        self.wait_healed()
