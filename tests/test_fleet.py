"""Laws of a fleet of service processes, whatever happens to its processes, its Valkey and its PostgreSQL."""

from __future__ import annotations

import os
import signal
import socket

from psycopg2.extensions import parse_dsn

from tests.kit import status
from tests.kit.daemon import Daemon
from tests.kit.faulty_network import Network
from tests.kit.postgres import query
from tests.kit.processes import HEAD, PRODUCTS, FleetTestCase, Publishes
from tests.kit.resp import Client
from tests.kit.waiting import GIVE_UP_S, wait_until

ADMIN = '[admin]\nsocket = "{place}/admin"\n'
SAVED = '[persistence]\ndirectory = "{place}/saved"\n'

ROUNDS = int(os.environ.get("TESTS_FLEET_ROUNDS", "2"))
"""How often a leader is stopped and continued; the soak sets more."""


class Reading(FleetTestCase):
    def test_one_process(self) -> None:
        """One process reads the database once for each publish, and a second one adds no reads."""
        self.check_reads(1)

    def test_three_processes(self) -> None:
        """Three processes read the database as often as one publishes, and a starting process does not read it."""
        self.check_reads(3)

    def test_five_processes(self) -> None:
        """The same for five."""
        self.check_reads(5)

    def check_reads(self, processes: int) -> None:
        self.start_fleet(processes=processes)
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
            self.assertEqual(self.events(daemon, "refresh_published"), [])
        last = self.served(leader).generation
        for daemon in [*self.fleet, late]:
            daemon.end()
        scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'things'"
        wait_until(lambda: query(self.server, self.database, scans)[0][0] >= last, "the statistics")
        ((reads,),) = query(self.server, self.database, scans)
        published = [line for daemon in [*self.fleet, late] for line in self.events(daemon, "refresh_published")]
        self.assertGreaterEqual(len(published), last)
        # A process that stops may end a read before its publish: the leader, or the one that has the lead after it.
        self.assertLessEqual(len(published), reads)
        self.assertLessEqual(reads, len(published) + processes + 1)

    def test_sessions(self) -> None:
        """Of five processes the leader listens, and it and one that waits have a session for leads."""
        sessions = (
            "SELECT application_name, count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name IN ('cacheservice leads', 'cacheservice listens') GROUP BY 1 ORDER BY 1"
        )
        expected = [("cacheservice leads", 2), ("cacheservice listens", 1)]
        self.start_fleet(PRODUCTS + 'notify = "things"\n', processes=5)
        for _ in range(2):
            self.wait_healed()
            wait_until(lambda: query(self.server, self.database, sessions) == expected, "the sessions")
            leader = self.leader()
            self.kill_now(leader)
            self.fleet.remove(leader)
            wait_until(lambda: any(self.role(daemon) == "leader" for daemon in self.fleet), "the next leader")


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


class NetworkFaults(FleetTestCase):
    """Faults of the network between the processes and the Valkey."""

    def networks(self) -> list[Network]:
        """Start a fleet, each whose processes has a network of its own; return the networks."""
        networks = []
        for _ in range(3):
            networks.append(network := Network(self.valkey.port))
            self.addCleanup(network.close)
            url = f"redis://127.0.0.1:{network.port}"
            self.fleet.append(self.start_process(self.fleet_configuration(valkey=url, fallback_s=2)))
        for daemon in self.fleet:
            daemon.wait_until_ready()
        return networks

    def test_faults(self) -> None:
        """Connections that are silent, reset, cut short or slow; all heals, and readers see nothing of it."""
        networks = self.networks()
        readers = [self.reader(daemon) for daemon in self.fleet]
        for fault in (("silence", 0), ("reset", 0), ("truncate", 700), ("delay", 0.3), ("slice", 3)):
            for network in networks:
                network.order(*fault)
            generation = self.served(self.leader()).generation
            wait_until(lambda g=generation: self.served(self.leader()).generation > g, "the leader's own refreshes")
            for network in networks:
                network.order("heal")
            self.wait_healed()
        for reader in readers:
            reader.stop()

    def test_leader_without_the_valkey(self) -> None:
        """The leader goes on for itself, the others do so after some time, and follow it again at last."""
        networks = self.networks()
        readers = [self.reader(daemon) for daemon in self.fleet]
        leader = self.leader()
        network = networks[self.fleet.index(leader)]
        network.order("silence")
        moment = self.moment()
        for daemon in self.fleet:
            wait_until(lambda d=daemon: self.served(d).n > moment, "a refresh of its own")
        self.assertEqual(sorted(map(self.role, self.fleet)), ["alone", "alone", "leader"])
        network.order("heal")
        self.wait_healed()
        for reader in readers:
            reader.stop()


class Database(FleetTestCase):
    def test_gone_for_some_time(self) -> None:
        """While PostgreSQL cannot be reached nobody leads, and the fleet heals afterwards."""
        network = Network(int(parse_dsn(self.server.dsn())["port"]))
        self.addCleanup(network.close)
        self.start_fleet(dsn=self.server.dsn(database=self.database, port=network.port))
        readers = [self.reader(daemon) for daemon in self.fleet]
        publishes = Publishes(self.valkey)
        for fault in ("silence", "reset"):
            leader = self.leader()
            network.order(fault)
            wait_until(lambda d=leader: self.role(d) == "replica", "the end of the lead")
            network.order("heal")
            self.wait_healed()
        self.assert_one_content([reader.stop() for reader in readers])
        self.assert_in_order(publishes.stop())


class Operators(FleetTestCase):
    def test_pins_and_rollbacks(self) -> None:
        """A pin or a rollback at the leader holds for all; at another process it is refused."""
        self.start_fleet(more=f"{ADMIN}{SAVED}")
        leader = self.leader()
        for daemon in self.others(leader):
            self.assertIn("another process refreshes products", self.admin_of(daemon, "pin products"))
        wait_until(lambda: self.served(leader).generation > 5, "generations")

        def rolled_back() -> bool:
            self.admin_of(leader, "rollback products")
            return bool(leader.json()["datasets"]["products"]["pinned"])

        wait_until(rolled_back, "a saved generation")
        rolled = self.served(leader)
        for daemon in self.fleet:
            wait_until(lambda d=daemon: self.served(d) == rolled, "the rollback")
        self.admin_of(leader, "unpin products")
        self.wait_healed()

    def admin_of(self, daemon: Daemon, line: str) -> str:
        return status.ask(self.directory_of(daemon) / "admin", line)

    def test_readers_that_need_newer_rows(self) -> None:
        """`max_age`, `CACHE.WAIT` and `refresh` at a process that follows work through the leader."""
        slow = PRODUCTS.replace("interval_s = 0.5", "interval_s = 600")
        self.start_fleet(slow, more=ADMIN)
        follower = self.others(self.leader())[0]
        moment = self.moment()
        answer = self.get(follower, "/v1/datasets/products/rows/1?max_age=0")
        self.assertEqual(answer.status, 200, answer.body)
        self.assertGreater(answer.json()["n"], moment)
        self.assertEqual(self.events(follower, "refresh_published"), [])
        ((xid,),) = query(self.server, self.database, "SELECT pg_current_xact_id()::text")
        with socket.create_connection(("127.0.0.1", self.port_of(follower, "resp")), GIVE_UP_S) as client:
            self.assertEqual(Client(client).ask("CACHE.WAIT", "products", xid, 50_000), 1)
        moment = self.moment()
        self.admin_of(follower, "refresh products")
        for daemon in self.fleet:
            wait_until(lambda d=daemon: self.served(d).n > moment, "the refresh")


class Whole(FleetTestCase):
    def test_rolling_restart(self) -> None:
        """With workers, a group and saved snapshots: a restart of one process after the other shows at none of them."""
        group = PRODUCTS + 'group = "shop"\n'
        tables = (group, group.replace("datasets.products", "datasets.prices"))
        options = {"more": f"[workers]\nprocesses = 2\n{SAVED}"}
        self.start_fleet(*tables, **options)
        unit = "group/shop"
        publishes = Publishes(self.valkey, HEAD.replace("dataset/products", unit))
        for number, daemon in enumerate(list(self.fleet)):
            rest = self.others(daemon)
            readers = [self.reader(each, name) for each in rest for name in ("products", "prices")]
            daemon.end()
            self.leader(among=rest, unit=unit)
            self.fleet[number] = self.start_process(
                self.fleet_configuration(*tables, **options), directory=self.directory_of(daemon).name
            )
            self.fleet[number].wait_until_ready()
            moment = self.moment()
            for each in self.fleet:
                wait_until(lambda d=each, m=moment: self.served(d, "prices").n > m, "a new read")
            self.assert_one_content([reader.stop() for reader in readers[::2]])
            self.assert_one_content([reader.stop() for reader in readers[1::2]])
        self.assert_in_order(publishes.stop())


class Definitions(FleetTestCase):
    def reload(self, daemon: Daemon, *tables: str) -> None:
        number = len(self.events(daemon, "config_reloaded"))
        (self.directory_of(daemon) / "cacheservice.toml").write_text(self.fleet_configuration(*tables))
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(self.events(daemon, "config_reloaded")) > number, "the reload")

    def differs(self, daemon: Daemon) -> None:
        """Wait until a process has logged that the leader has another definition."""
        wait_until(
            lambda: [each for each in self.events(daemon, "cluster_unreadable") if "definition" in each["error"]],
            "the difference",
        )

    def test_redefined_one_after_the_other(self) -> None:
        """A process serves rows of its own definition only, and the fleet heals once all have the new one."""
        self.start_fleet()
        leader = self.leader()
        early, late = self.others(leader)
        new = PRODUCTS.replace("SELECT id,", "SELECT id, 'new' AS kind,")
        self.reload(early, new)
        self.differs(early)
        kept = self.served(early)
        generation = self.served(leader).generation
        wait_until(lambda: self.served(late).generation > generation + 2, "generations of the old definition")
        self.assertEqual(self.served(early), kept)
        self.reload(leader, new)
        self.differs(late)
        kept = self.served(late)
        moment = self.moment()
        for daemon in (leader, early):
            wait_until(lambda d=daemon: self.served(d).n > moment, "rows of the new definition")
            self.assertIn("kind", self.row(daemon))
        self.assertNotIn("kind", self.row(late))
        self.assertEqual(self.served(late), kept)
        self.reload(late, new)
        self.wait_healed()
        self.assertIn("kind", self.row(late))

    def row(self, daemon: Daemon) -> str:
        return self.get(daemon, "/v1/datasets/products/rows/1").body.decode()

    def test_lead_by_another_definition(self) -> None:
        """A new leader with another definition goes on with greater generations."""
        self.start_fleet()
        leader = self.leader()
        generation, epoch = self.served(leader).generation, self.epoch(leader)
        rest = self.others(leader)
        new = PRODUCTS.replace("SELECT id,", "SELECT id, 'new' AS kind,")
        for daemon in rest:
            self.reload(daemon, new)
            self.differs(daemon)
        readers = [self.reader(daemon) for daemon in rest]
        self.kill_now(leader)
        self.leader(among=rest, after=epoch)
        self.wait_healed(rest)
        for daemon in rest:
            self.assertIn("kind", self.row(daemon))
            self.assertGreater(self.served(daemon).generation, generation)
        self.assert_one_content([reader.stop()[1:] for reader in readers])

    def test_added_and_removed(self) -> None:
        """A dataset that processes get one after the other, and lose so."""
        self.start_fleet()
        more = PRODUCTS.replace("datasets.products", "datasets.prices")
        for daemon in self.fleet:
            self.reload(daemon, PRODUCTS, more)
            wait_until(lambda d=daemon: self.get(d, "/v1/datasets/prices/rows/1").status == 200, "the new dataset")
        self.wait_healed(name="prices")
        leader = self.leader(unit="dataset/prices")
        rest = self.others(leader)
        self.reload(leader, PRODUCTS)
        self.wait_healed(rest, name="prices")
        for daemon in rest:
            self.reload(daemon, PRODUCTS)
        for daemon in self.fleet:
            self.assertEqual(self.get(daemon, "/v1/datasets/prices/rows/1").status, 404)
        self.wait_healed()
