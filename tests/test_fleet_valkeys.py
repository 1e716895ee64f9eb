"""Laws of a fleet on other Valkeys than one small server: large snapshots, failovers that lose writes, and TLS."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.kit.certificates import make_certificates
from tests.kit.daemon import Daemon
from tests.kit.fleet_readers import Sampled
from tests.kit.processes import HEAD, ONE_MOMENT, FleetTestCase, products
from tests.kit.resp import Client
from tests.kit.tls import TlsFront
from tests.kit.valkey import LossyFailover, ValkeyServer, running_cluster, running_node, running_sentinel
from tests.kit.waiting import GIVE_UP_S, wait_until

ROWS = 200_000
# Digests do not compress well, so that the rows of a snapshot take tens of parts.
LARGE = products(
    f"SELECT id, n, md5(n::text || id) AS digest FROM generate_series(1, {ROWS}) AS id, {ONE_MOMENT}", interval_s=2
)
# One row of many changes, so that the leader publishes deltas, which need the publishes before them.
LITTLE = products(
    "SELECT id, CASE id WHEN 1 THEN (extract(epoch FROM clock_timestamp()) * 1e6)::bigint END AS n "
    "FROM generate_series(1, 5000) AS id"
)
SOME_KEYS = [1, *range(ROWS // 20, ROWS + 1, ROWS // 20)]
PARTS = 3
"""So many parts of a snapshot are written, of many more, when the Valkey is killed."""
TRIES = 100


class Large(FleetTestCase):
    def written_in_part(self) -> bool:
        """Let the leader write a whole snapshot; return True in the middle of it, False if it is over."""
        self.valkey.cli("FLUSHALL")
        with closing(socket.create_connection(("127.0.0.1", self.valkey.port), GIVE_UP_S)) as connection:
            client = Client(connection)

            def state() -> tuple[bool, bool]:
                *_, (published, keys) = client.ask_all(
                    [("MULTI",), ("HEXISTS", HEAD, "manifest"), ("DBSIZE",), ("EXEC",)]
                )
                return bool(published), keys > PARTS

            while not any(found := state()):
                pass
            return found == (False, True)

    def test_killed_while_it_is_written(self) -> None:
        """The leader publishes again once the Valkey is back; no process ever serves rows of two reads."""
        self.start_fleet(LARGE)
        self.wait_healed()
        readers = [Sampled(self.port_of(daemon, "resp"), SOME_KEYS) for daemon in self.fleet]
        for reader in readers:
            self.addCleanup(reader.end)
        for _ in range(2):
            self.assertTrue(any(self.written_in_part() for _ in range(TRIES)), "the write was never seen")
            leader = self.leader()
            count = len(self.events(leader, "publish_failed"))
            self.valkey.kill()
            wait_until(lambda d=leader, c=count: len(self.events(d, "publish_failed")) > c, "the end of the write")
            self.valkey.start()
            self.wait_healed()
        for reader in readers:
            reader.stop()
        tags = self.tags()
        wait_until(lambda: len(self.tags()) == 1, f"one content everywhere instead of {tags}")

    def tags(self) -> set[str]:
        """Return the digests of the rows that the processes serve."""
        return {self.get(daemon, "/v1/datasets/products", "HEAD").headers["etag"] for daemon in self.fleet}


class Failovers(FleetTestCase):
    """A primary fails over to a replica that lacks its last writes."""

    def watched(self, url: str) -> None:
        """Start a fleet with readers."""
        self.url = url
        self.start_fleet(LITTLE, valkey=url)
        self.readers = [self.reader(daemon) for daemon in self.fleet]
        for reader in self.readers:
            self.addCleanup(reader.stop)
        self.wait_healed()

    def generations(self, daemon: Daemon, more: int = 3) -> None:
        """Wait until a process serves some further generations."""
        generation = self.served(daemon).generation
        wait_until(lambda: self.served(daemon).generation >= generation + more, "generations")

    def check(self, failover: LossyFailover) -> None:
        self.wait_healed()
        self.assertGreater(failover.lost_bytes(), 0)
        late = self.start_process(self.fleet_configuration(LITTLE, valkey=self.url))
        late.wait_until_ready()
        self.fleet.append(late)
        self.wait_healed()
        self.assertEqual(self.events(late, "cluster_unreadable"), [])
        self.assert_one_content([reader.stop() for reader in self.readers])

    def test_a_cluster(self) -> None:
        """Generations that only the lost primary had go on, and are not served again with other rows."""
        with ExitStack() as stack:
            servers = stack.enter_context(running_cluster())
            slot = int(servers[0].cli("CLUSTER", "KEYSLOT", HEAD))
            primary = next(server for server in servers if slot in slots(server))
            replica = stack.enter_context(running_node())
            number, bus = primary.cli("CLUSTER", "MYID"), of_itself(primary)[1].partition("@")[2]
            replica.cli("CLUSTER", "MEET", "127.0.0.1", str(primary.port), bus)
            replica.wait("CLUSTER", "NODES", until=number)
            replica.cli("CLUSTER", "REPLICATE", number)
            failover = LossyFailover(primary, replica)
            self.watched("redis://" + ",".join(server.address for server in servers))
            failover.begin()
            for daemon in self.fleet:
                self.generations(daemon)
            failover.end()
            replica.cli("CLUSTER", "FAILOVER", "TAKEOVER")
            self.check(failover)

    def test_between_two_publishes(self) -> None:
        """A leader that has noticed nothing finds that its last publishes are lost, and publishes a whole snapshot."""
        seldom = LITTLE.replace("interval_s = 0.5", "interval_s = 600")
        with running_sentinel("shop") as (primary, replica, sentinel):
            failover = LossyFailover(primary, replica)
            url = f"redis+sentinel://{sentinel.address}/shop"
            self.start_fleet(seldom, valkey=url)
            self.refresh()
            failover.begin()
            for _ in range(3):
                self.refresh()
            failover.end()
            sentinel.wait("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "shop", until=str(replica.port))
            replica.wait("ROLE", until="master")
            self.refresh()
            self.assertGreater(failover.lost_bytes(), 0)
            late = self.start_process(self.fleet_configuration(seldom, valkey=url))
            late.wait_until_ready()
            self.assertEqual(self.served(late), self.served(self.leader()))
            self.assertEqual(self.events(late, "cluster_unreadable"), [])

    def refresh(self) -> None:
        """Let the leader refresh; return when all processes serve that."""
        moment = self.moment()
        self.assertEqual(self.get(self.leader(), "/v1/datasets/products/rows/1?max_age=0").status, 200)
        for daemon in self.fleet:
            wait_until(lambda d=daemon: self.served(d).n > moment, "the refresh")

    def test_sentinels(self) -> None:
        """The epoch of a leader is lost, and the one before it, which was suspended, does not publish by its own."""
        with running_sentinel("shop") as (primary, replica, sentinel):
            failover = LossyFailover(primary, replica)
            self.watched(f"redis+sentinel://{sentinel.address}/shop")
            first = self.leader()
            epoch = self.epoch(first)
            failover.begin()
            self.pause(first)
            rest = self.others(first)
            self.generations(self.leader(among=rest, after=epoch))
            failover.end()
            sentinel.wait("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "shop", until=str(replica.port))
            replica.wait("ROLE", until="master")
            self.go_on(first)
            self.check(failover)


def of_itself(server: ValkeyServer) -> list[str]:
    """Return the words by which a node of a cluster describes itself."""
    (words,) = [line.split() for line in server.cli("CLUSTER", "NODES").splitlines() if "myself" in line]
    return list(words)


def slots(server: ValkeyServer) -> range:
    first, _, last = of_itself(server)[-1].partition("-")
    return range(int(first), int(last) + 1)


class Tls(FleetTestCase):
    def test_a_certificate(self) -> None:
        """Processes that trust the authority are a fleet over TLS; one that does not reports why, and is alone."""
        with TemporaryDirectory() as place:
            folder = Path(place)
            make_certificates(folder)
            front = TlsFront(folder, self.valkey.port)
            self.addCleanup(front.close)
            url = f"rediss://localhost:{front.port}"
            self.trusting(folder / "ca.crt", lambda: self.start_fleet(valkey=url, processes=2))
            readers = [self.reader(daemon) for daemon in self.fleet]
            self.wait_healed()
            self.assert_one_content([reader.stop() for reader in readers])
            stranger = self.trusting(
                folder / "other.crt", lambda: self.start_process(self.fleet_configuration(valkey=url, fallback_s=1))
            )
            problem = stranger.event("cluster_unreadable")
            self.assertIn("certificate verify failed", problem["error"])
            self.assertIn("SSL_CERT_FILE", problem["error"])
            stranger.wait_until_ready()
            self.assertEqual(self.role(stranger), "alone")

    def trusting(self, file: Path, start: Callable[[], Any]) -> Any:
        """Start processes that trust the authorities of a file."""
        os.environ["SSL_CERT_FILE"] = str(file)
        try:
            return start()
        finally:
            del os.environ["SSL_CERT_FILE"]
