"""Laws of the metrics that are pushed: over real UDP sockets, with or without a listener."""

from __future__ import annotations

import gc
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import TestCase

from cacheservice.base.errors import DatabaseUnavailable
from cacheservice.config import StatsdSettings
from cacheservice.ops.statsd import MOST_PACKET_BYTES, StatsD
from tests.kit.daemon import DaemonTestCase
from tests.kit.datasets import declared
from tests.kit.logs import Log
from tests.kit.metrics import World
from tests.kit.waiting import GIVE_UP_S, until, wait_until

INTERVAL_S = 0.02


class Listener(DatagramProtocol):
    """A StatsD server: keeps the last value of each gauge, and adds up what comes of each counter."""

    noisy = False

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.gauges: dict[str, float] = {}
        self.counters: Counter[str] = Counter()

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self.packets.append(datagram)
        for line in datagram.decode().split("\n"):
            name, _, rest = line.partition(":")
            value, _, kind = rest.partition("|")
            if kind == "g":
                self.gauges[name] = float(value)
            else:
                assert kind == "c", line
                self.counters[name] += float(value)  # type: ignore[assignment]


class PushTestCase(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.world = World()
        self.log = Log()
        self.asked = 0
        self.address: str | None = "127.0.0.1"

    async def resolve(self, name: str) -> Sequence[str]:
        self.asked += 1
        await deferLater(reactor, 0)
        if self.address is None:
            raise DatabaseUnavailable(f'the name look-up of "{name}" found no address')
        return [self.address]

    def listen(self, port: int = 0, interface: str = "127.0.0.1") -> tuple[Listener, int]:
        listener = Listener()
        listening = reactor.listenUDP(port, listener, interface=interface)
        self.addCleanup(lambda: listening.stopListening() if listener.transport is not None else None)
        return listener, listening.getHost().port

    def start(self, port: int, host: str = "127.0.0.1", prefix: str = "cacheservice") -> StatsD:
        statsd = StatsD(
            self.world.metrics,
            StatsdSettings(host=host, port=port, prefix=prefix),
            self.resolve,
            reactor,
            self.log,
            INTERVAL_S,
        )
        statsd.startService()
        self.addCleanup(lambda: statsd.stopService() if statsd.running else None)
        return statsd


class Push(PushTestCase):
    async def test_gauges_and_counters(self) -> None:
        """Gauges arrive as they are, and what arrives of a counter adds up to the counter, however often it is sent."""
        listener, port = self.listen()
        products = self.world.cache.dataset("products")
        self.world.publish(products, 5)
        self.start(port)
        for _ in range(5):
            self.world.attempt(products, "published", 0.5)
            products.counts.resp.hits += 3
            before = len(listener.packets)
            await until(lambda before=before: len(listener.packets) > before + 2)
        await until(lambda: listener.counters["cacheservice.reads_total.products.resp.hit"] >= 15)
        before = len(listener.packets)
        await until(lambda: len(listener.packets) > before + 10)
        self.assertEqual(listener.gauges["cacheservice.dataset_rows.products"], 5)
        self.assertEqual(listener.gauges["cacheservice.dataset_state.products.fresh"], 1)
        self.assertEqual(listener.gauges["cacheservice.connections.resp"], 2)
        self.assertEqual(listener.counters["cacheservice.reads_total.products.resp.hit"], 15)
        self.assertEqual(listener.counters["cacheservice.refresh_total.products.published"], 5)
        self.assertEqual(listener.counters["cacheservice.refresh_duration_seconds_count.products"], 5)
        self.assertEqual(listener.counters["cacheservice.refresh_duration_seconds_sum.products"], 2.5)
        self.assertGreater(listener.gauges["cacheservice.process_resident_memory_bytes"], 1e6)
        self.assertNotIn("cacheservice.reads_total.prices.http.hit", listener.counters, "nothing grew")
        self.assertFalse([name for name in (*listener.gauges, *listener.counters) if "_bucket" in name])
        self.assertEqual(self.log.events, [])

    async def test_every_gauge_and_counter(self) -> None:
        """What is on the page of metrics is pushed, except buckets and versions; the datasets of a reload as well."""
        listener, port = self.listen()
        for dataset in self.world.cache.datasets.values():
            self.world.publish(dataset)
            for what in ("published", "unchanged", "held", "failed", "count", "read"):
                self.world.do(dataset, what, 3)
        self.start(port, prefix="")
        self.world.cache.declare([declared("prices"), declared("flags")])
        await until(lambda: "dataset_rows.flags" in listener.gauges)
        expected = {
            ".".join([sample.name.removeprefix("cacheservice_"), *sample.labels.values()])
            for kind, sample in self.world.metrics.samples()
            if not sample.name.endswith(("_bucket", "_info")) and (kind == "gauge" or sample.value)
        }
        found = {name for name in (*listener.gauges, *listener.counters) if "products" not in name}
        self.assertEqual(found, expected)

    async def test_many_datasets(self) -> None:
        """What does not fit in one packet arrives in several, each of a size that networks carry whole."""
        self.world = World(*(f"dataset{number}" for number in range(200)))
        for dataset in self.world.cache.datasets.values():
            self.world.publish(dataset)
        listener, port = self.listen()
        self.start(port)
        await until(lambda: "cacheservice.dataset_rows.dataset199" in listener.gauges)
        self.assertGreater(len(listener.packets), 10)
        self.assertLessEqual(max(map(len, listener.packets)), MOST_PACKET_BYTES)
        self.assertGreater(sorted(map(len, listener.packets))[-5], MOST_PACKET_BYTES - 200)


class Problems(PushTestCase):
    async def test_nobody_listens(self) -> None:
        """It goes on, reports that once, and once when somebody listens; then all arrives again."""
        listener, port = self.listen()
        await listener.transport.stopListening()
        self.start(port)
        await until(self.log.names)
        await deferLater(reactor, 10 * INTERVAL_S)
        ((event, fields),) = self.log.events
        self.assertEqual((event, fields["error"]), ("statsd_unreachable", "connection refused"))
        listener, _ = self.listen(port)
        await until(lambda: listener.gauges)
        await until(lambda: len(self.log.events) > 1)
        listener.packets.clear()
        await until(lambda: len(listener.packets) > 5)
        self.assertEqual(self.log.names(), ["statsd_unreachable", "statsd_recovered"])

    async def test_an_unknown_name(self) -> None:
        """An unknown name is reported once and looked up again each time, off the reactor; then metrics are sent."""
        listener, port = self.listen()
        self.address = None
        self.start(port, "metrics.example")
        await until(lambda: self.asked > 5)
        ((event, fields),) = self.log.events
        self.assertEqual((event, fields["host"]), ("statsd_unreachable", "metrics.example"))
        self.assertIn("found no address", fields["error"])
        self.address = "127.0.0.1"
        await until(lambda: listener.gauges)
        await until(lambda: len(self.log.events) > 1)
        self.assertEqual(self.log.names(), ["statsd_unreachable", "statsd_recovered"])

    async def test_a_name_that_moves(self) -> None:
        """Metrics go to the address that the name has now."""
        first, port = self.listen()
        second, _ = self.listen(port, "127.0.0.2")
        self.start(port, "metrics.example")
        await until(lambda: first.packets)
        self.assertEqual(second.packets, [])
        self.address = "127.0.0.2"
        await until(lambda: second.packets)

    async def test_no_way_there(self) -> None:
        """An address that this machine may not send to is a problem as any other, reported once."""
        self.start(8125, "255.255.255.255")
        await until(self.log.names)
        await deferLater(reactor, 10 * INTERVAL_S)
        self.assertEqual(self.log.names(), ["statsd_unreachable"])

    async def test_over_ipv6(self) -> None:
        """An address of IPv6 works as well."""
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        listener, port = self.listen(0, "::1")
        self.start(port, "::1")
        await until(lambda: listener.gauges)
        self.assertEqual(self.log.events, [])

    async def test_a_mistake_of_ours(self) -> None:
        """Whatever goes wrong within one push, the next one comes."""
        listener, port = self.listen()
        statsd = self.start(port)
        await until(lambda: listener.packets)
        broken = self.world.cache.dataset("products")
        counts, broken.counts = broken.counts, None
        await until(lambda: "internal_error" in self.log.names())
        broken.counts = counts
        listener.packets.clear()
        await until(lambda: len(listener.packets) > 3)
        await statsd.stopService()


class Stop(PushTestCase):
    async def test_it_leaves_nothing(self) -> None:
        """At whatever moment it is stopped, no socket, timer or failure is left, and nothing is sent any more."""
        for number in range(10):
            listener, port = self.listen()
            statsd = self.start(port, "127.0.0.1" if number % 2 else "metrics.example")
            await deferLater(reactor, number * INTERVAL_S / 5)
            await statsd.stopService()
            await listener.transport.stopListening()
            listener.packets.clear()
        await deferLater(reactor, 3 * INTERVAL_S)
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertEqual(self.log.events, [])

    def test_while_a_name_is_looked_up(self) -> None:
        """A look-up that never ends does not hold the stop, and no timer is left."""
        clock = Clock()

        def resolve(_: str) -> Deferred[Sequence[str]]:
            return Deferred()

        statsd = StatsD(self.world.metrics, StatsdSettings(host="metrics.example"), resolve, clock, self.log)
        statsd.startService()
        clock.advance(100)
        self.successResultOf(statsd.stopService())
        self.assertEqual(clock.getDelayedCalls(), [])
        self.assertEqual(self.log.events, [])


class RealService(DaemonTestCase):
    def test_to_a_real_socket(self) -> None:
        """The service pushes at its start already, in one packet as long as it fits, and not if no host is set."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            server.settimeout(GIVE_UP_S)
            port = server.getsockname()[1]
            table = f'[statsd]\nhost = "localhost"\nport = {port}\nprefix = "test.shop"\n'
            daemon = self.started(self.configuration() + table)
            packet = server.recv(65_536)
            self.assertLessEqual(len(packet), MOST_PACKET_BYTES)
            self.assertIn(b"test.shop.ready:", packet)
            daemon.wait_until_ready()
            daemon.end()
            self.assert_ended(daemon, -15)
            self.assertNotIn("statsd", daemon.output)

    def test_a_name_that_does_not_exist(self) -> None:
        """It is reported once, and starts, serves and stops as without."""
        daemon = self.started(self.configuration() + '[statsd]\nhost = "no-such-name.invalid"\n')
        daemon.wait_until_ready()
        told = daemon.event("statsd_unreachable")
        self.assertEqual((told["level"], told["host"]), ("warning", "no-such-name.invalid"))
        daemon.end()
        self.assert_ended(daemon, -15)

    def test_a_reload(self) -> None:
        """Another server takes effect at the next start, and a reload reports that."""
        daemon = self.started()
        daemon.wait_until_ready()
        (self.directory / "cacheservice.toml").write_text(self.configuration() + '[statsd]\nhost = "127.0.0.1"\n')
        daemon.process.send_signal(1)
        self.assertEqual(daemon.event("config_reloaded")["needs_restart"], ["statsd.host"])
        wait_until(lambda: daemon.ask("ruok") == "imok", "an answer")
