"""Laws of a service with workers: the answers do not depend on the worker that gives them."""

from __future__ import annotations

import json
import os
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.app.workers.main_process import ANSWER_S
from cacheservice.app.workers.streams import SILENCE_S
from cacheservice.cache.events import Published
from cacheservice.cache.identity import ServerIdentity
from cacheservice.ports.rotation import ClientSecrets
from cacheservice.ports.throttle import LONG_WAIT_S
from tests.kit.clocks import started_clock
from tests.kit.datasets import numbered_rows, planned, snapshot_of
from tests.kit.fleet import MOST, SECRETS, Fleet, request
from tests.kit.http import statuses
from tests.kit.resp import encode
from tests.kit.resp_peer import failed_attempt
from tests.kit.resp_session import parsed
from tests.kit.wire import Wire

OPEN = ClientSecrets("", "", "")


class FleetTestCase(SynchronousTestCase):
    secrets = OPEN
    processes = 2

    def setUp(self) -> None:
        self.clock = started_clock()
        self.fleet = Fleet(self.clock, self.processes, self.secrets)
        self.addCleanup(self.fleet.close)
        self.first, self.second = self.fleet.workers[1], self.fleet.workers[2]

    def publish(self, generation: int = 1) -> None:
        """Publish in the main process and, as the frames do, in each worker."""
        for cache in (self.fleet.cache, *(worker.cache for worker in self.fleet.workers.values())):
            cache.dataset("products").publish(snapshot_of(numbered_rows(3), generation, self.clock.seconds()))

    def ask(self, wire: Wire, *words: bytes | str | int) -> Any:
        """The reply to a command, once nothing more comes."""
        wire.take()
        wire.receive(encode(*words))
        self.fleet.settle()
        (reply,) = parsed(wire.take())
        return reply

    def info(self, wire: Wire) -> dict[str, str]:
        text = self.ask(wire, "INFO").decode()
        return dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)

    def json(self, response: bytes) -> Any:
        return json.loads(response.partition(b"\r\n\r\n")[2])

    def metrics(self) -> dict[str, float]:
        text = self.first.get("/metrics").partition(b"\r\n\r\n")[2].decode()
        if "\r\n" in text:  # in chunks
            raise AssertionError("the page has a length")
        pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}


class Resp(FleetTestCase):
    def test_info(self) -> None:
        """Every worker reports the clients and the commands of all, up to the moment of the question."""
        one, two, three = self.first.connect_resp(), self.second.connect_resp(), self.second.connect_resp()
        self.ask(two, "PING")
        found = [self.info(one), self.info(two)]
        self.assertEqual([each["connected_clients"] for each in found], ["3", "3"])
        self.assertEqual([each["total_connections_received"] for each in found], ["3", "3"])
        self.assertEqual([each["total_commands_processed"] for each in found], ["2", "3"])
        self.assertEqual({each["process_id"] for each in found}, {str(os.getpid())})
        self.ask(three, "SUBSCRIBE", "cache:products")
        self.assertEqual(self.info(one)["pubsub_channels"], "1")

    def test_a_worker_that_ends_takes_no_count_along(self) -> None:
        """Its clients are gone, and the totals go on."""
        one, two = self.first.connect_resp(), self.second.connect_resp()
        self.ask(two, "PING")
        before = self.info(one)
        self.fleet.kill(2)
        after = self.info(one)
        self.assertEqual((before["connected_clients"], after["connected_clients"]), ("2", "1"))
        self.assertEqual(after["total_connections_received"], "2")
        self.assertEqual(int(after["total_commands_processed"]), int(before["total_commands_processed"]) + 1)

    def test_client_list(self) -> None:
        """It has the clients of all workers, in the order of their ids; no id is used twice."""
        wires = [self.first.connect_resp(), self.second.connect_resp(), self.first.connect_resp()]
        ids = [self.ask(wire, "CLIENT", "ID") for wire in wires]
        lists = [self.ask(wire, "CLIENT", "LIST") for wire in wires]
        listed = [[int(line.split()[0].removeprefix(b"id=")) for line in each.splitlines()] for each in lists]
        self.assertEqual(listed, [sorted(ids)] * 3)
        self.assertEqual([each.count(b"flags=N") for each in lists], [3, 3, 3])
        self.fleet.kill(2)
        new = self.ask(self.fleet.start(2).connect_resp(), "CLIENT", "ID")
        self.assertGreater(new, max(ids))
        self.assertLess(new, 2**53)

    def test_cache_info(self) -> None:
        """It is that of the main process, which knows the attempts."""
        self.publish()
        self.fleet.cache.dataset("products").attempted(failed_attempt())
        fields = self.ask(self.second.connect_resp(), "CACHE.INFO", "products")
        self.assertEqual(fields[fields.index(b"consecutive_failures") + 1], 1)

    def test_a_main_process_that_is_busy(self) -> None:
        """The client gets an error after 5 s, and then its other replies."""
        wire = self.first.connect_resp()
        wire.receive(encode("INFO") + encode("PING"))
        self.clock.advance(ANSWER_S)
        self.fleet.settle()
        error, pong = parsed(wire.take())
        self.assertIn("the main process did not answer", error)
        self.assertEqual(pong, b"PONG")

    def test_a_silent_worker(self) -> None:
        """It is waited for once; the others answer for the rest."""
        wire = self.first.connect_resp()
        self.second.pair.deliver()
        self.fleet.workers.pop(2)  # its messages are not delivered any more
        self.addCleanup(self.fleet.workers.setdefault, 2, self.second)
        wire.receive(encode("INFO"))
        self.fleet.settle()
        self.assertEqual(wire.take(), b"")
        self.clock.advance(1.0)
        self.fleet.settle()
        self.assertIn(b"connected_clients:1", wire.take())
        self.assertEqual(self.info(wire)["connected_clients"], "1")

    def test_loading(self) -> None:
        """Whether a first attempt has ended, and when the next one is due, is known in each worker."""
        wire = self.second.connect_resp()
        self.assertIn("LOADING", self.ask(wire, "GET", "products:1"))
        for name in ("products", "prices"):
            self.fleet.cache.dataset(name).attempted(failed_attempt())
        planned(self.fleet.cache.dataset("products"), self.clock.seconds() + 17.5)
        self.fleet.settle()
        self.assertIn("NOTLOADED", self.ask(wire, "GET", "products:1"))
        self.assertIn(b"\r\nRetry-After: 18\r\n", self.second.get("/v1/datasets/products/rows/1"))

    def test_the_server(self) -> None:
        """A worker knows the server that was read last before it gets the snapshot."""
        server = ServerIdentity("shop", 5, "reader", False, 12345, system_identifier="77")
        self.fleet.cache.database.seen(server, self.fleet.cache.database.lag)
        order: list[object] = []
        self.first.pair.worker.handle("server", lambda identity: order.append(identity["database"]))
        self.fleet.cache.events.subscribe(lambda _: self.first.pair.main.send_frames(b"frame"), Published)
        self.fleet.cache.dataset("products").publish(snapshot_of(numbered_rows(1)))
        self.fleet.settle()
        self.assertEqual((order, self.first.pair.frames), (["shop"], [b"frame"]))
        self.assertEqual(self.second.cache.database.server, server)


class Refreshes(FleetTestCase):
    def test_max_age(self) -> None:
        """A reader's wish reaches the refreshes with its moment, and the next publish answers the reader."""
        self.publish()
        self.clock.advance(10)
        wire = self.second.connect_http()
        wire.receive(request("/v1/datasets/products/rows/1?max_age=1"))
        self.fleet.settle()
        self.assertEqual(self.fleet.refreshes.asked, [("products", self.clock.seconds() - 1)])
        self.assertEqual(wire.take(), b"")
        self.publish(2)
        self.fleet.settle()
        self.assertEqual(statuses(wire.take()), [200])


class Http(FleetTestCase):
    def test_reports(self) -> None:
        """They are the main process's, whichever worker is asked, and so are their refusals."""
        self.publish()
        for worker in (self.first, self.second):
            for path, status in (
                ("/v1/datasets", 200),
                ("/v1/datasets/products/status", 200),
                ("/v1/datasets/products/why", 200),
                ("/v1/datasets/products/history", 200),
                ("/v1/datasets/nope/status", 404),
                ("/v1/datasets/%ff/status", 400),
                ("/readyz", 503),
                ("/livez", 200),
                ("/metrics", 200),
                ("/v1/datasets/products/rows/1", 200),
                ("/v1/datasets/products", 200),
                ("/", 200),
            ):
                self.assertEqual(statuses(worker.get(path)), [status], path)
        listed = self.json(self.second.get("/v1/datasets"))["datasets"]
        self.assertEqual([each["name"] for each in listed], ["products", "prices"])
        self.assertEqual(self.json(self.second.get("/readyz"))["not_ready"], {"prices": "never_loaded"})

    def test_head(self) -> None:
        """HEAD has the head of GET and no body, and leaves nothing in the main process."""
        for path in ("/v1/datasets", "/metrics", "/events"):
            head, _, body = self.first.get(path, method="HEAD").partition(b"\r\n\r\n")
            self.assertIn(b"200 OK", head)
            self.assertEqual(body, b"")
        self.assertEqual(self.fleet.assembled.feed._listeners, 0)

    def test_form(self) -> None:
        """The worker refuses a wrong method and a wrong parameter itself."""
        self.fleet.kill(1)
        self.second.pair.cut()
        self.assertEqual(statuses(self.second.get("/v1/datasets", method="POST")), [405])
        self.assertEqual(statuses(self.second.get("/v1/datasets?x=1")), [400])

    def test_a_main_process_that_is_busy(self) -> None:
        """503 with Retry-After, also for /readyz; what the worker has itself is served."""
        self.publish()
        for path, status in (("/v1/datasets", 503), ("/readyz", 503), ("/livez", 200), ("/v1/datasets/products", 200)):
            wire = self.first.connect_http()
            wire.receive(request(path))
            self.clock.advance(ANSWER_S)
            self.assertEqual(statuses(wire.sent), [status], path)
            if status == 503:
                self.assertIn(b"\r\nRetry-After: 1\r\n", wire.sent)
                self.assertIn("the main process did not answer", self.json(wire.sent)["detail"])

    def test_a_large_page(self) -> None:
        """It comes in pieces, whole and with its length."""
        self.patch(self.fleet.metrics, "exposition", self.exposition)
        response = self.first.get("/metrics")
        head, _, body = response.partition(b"\r\n\r\n")
        self.assertIn(b"\r\nContent-Length: 3000000", head)
        self.assertEqual(body, b"x" * 3_000_000)

    async def exposition(self, *, openmetrics: bool) -> bytes:
        return b"x" * 3_000_000


class Events(FleetTestCase):
    def follow(self) -> Wire:
        wire = self.second.connect_http()
        wire.receive(request("/events"))
        self.fleet.settle()
        return wire

    def test_events(self) -> None:
        """They arrive as they happen, and the stream outlives the silence between them."""
        wire = self.follow()
        self.assertIn(b"event: hello", wire.take())
        for _ in range(20):
            self.clock.advance(SILENCE_S / 2)
            self.fleet.settle()
        wire.take()
        self.publish()
        self.clock.advance(1.0)
        self.fleet.settle()
        self.assertIn(b'"generation":1', wire.take())
        self.assertTrue(wire.is_open)

    def test_workers(self) -> None:
        """A worker that ends is an event, although no dataset has changed."""
        wire = self.first.connect_http()
        wire.receive(request("/events"))
        self.fleet.settle()
        self.clock.advance(1.0)
        self.fleet.settle()
        self.assertEqual(wire.take().count(b'"state":"serving"'), 2)
        self.fleet.kill(2)
        self.clock.advance(1.0)
        self.fleet.settle()
        self.assertIn(b'"state":"down"', wire.take())

    def test_a_client_that_goes(self) -> None:
        """The main process forgets the stream at once."""
        wire = self.follow()
        self.assertEqual(self.fleet.assembled.feed._listeners, 1)
        wire.client_leaves()
        self.fleet.settle()
        self.assertEqual(self.fleet.assembled.feed._listeners, 0)

    def test_a_client_that_goes_before_the_answer(self) -> None:
        """The answer that nobody wants is freed."""
        wire = self.second.connect_http()
        wire.receive(request("/events"))
        wire.client_leaves()
        self.fleet.settle()
        self.assertEqual(self.fleet.assembled.feed._listeners, 0)

    def test_a_client_that_closes_its_side(self) -> None:
        """It is considered gone as without workers, also if it closes its side before the answer."""
        for early in (True, False):
            wire = self.second.connect_http()
            wire.receive(request("/events"))
            if not early:
                self.fleet.settle()
            wire.client_closes_its_side()
            self.fleet.settle()
            self.assertTrue(wire.sent.endswith(b"0\r\n\r\n"), early)
            self.assertEqual(self.fleet.assembled.feed._listeners, 0)

    def test_a_late_answer(self) -> None:
        """The main process forgets a stream that no worker has begun to pull."""
        wire = self.second.connect_http()
        wire.receive(request("/events"))
        self.clock.advance(ANSWER_S)
        self.assertEqual(statuses(wire.sent), [503])
        self.fleet.settle()
        self.clock.advance(60.0)
        self.fleet.settle()
        self.assertEqual(self.fleet.assembled.feed._listeners, 0)

    def test_a_slow_client(self) -> None:
        """Nothing is pulled for a client that does not read."""
        wire = self.second.connect_http()
        wire.room_bytes = 0
        wire.receive(request("/events"))
        self.fleet.settle()
        pulls: list[str] = []
        call = self.second.pair.worker.call

        def observed(name: str, *rest: Any, **fields: Any) -> Any:
            pulls.append(name)
            return call(name, *rest, **fields)

        self.patch(self.second.pair.worker, "call", observed)
        for _ in range(5):
            self.clock.advance(1.0)
            self.fleet.settle()
        self.assertNotIn("pull", pulls)

    def test_a_lost_link(self) -> None:
        """The stream ends, so that the client connects again."""
        wire = self.follow()
        self.second.pair.cut()
        self.fleet.settle()
        self.assertTrue(wire.sent.endswith(b"0\r\n\r\n"))
        self.fleet.kill(2)
        self.assertEqual(self.fleet.assembled.feed._listeners, 0)


class Counts(FleetTestCase):
    def test_metrics(self) -> None:
        """They are of all workers up to the moment of the scrape, and no counter goes back."""
        self.publish()
        for worker, number in ((self.first, 2), (self.second, 3)):
            wire = worker.connect_resp()
            for _ in range(number):
                self.ask(wire, "GET", "products:1")
        self.second.get("/v1/datasets/products/rows/nope")
        wire = self.second.connect_resp()
        wire.receive(b"POST / HTTP/1.1\r\nHost: x\r\n\r\n")
        hits = 'cacheservice_reads_total{dataset="products",port="resp",result="hit"}'
        misses = 'cacheservice_reads_total{dataset="products",port="http",result="miss"}'
        refused = 'cacheservice_rejected_total{port="resp",reason="protocol_error"}'
        found = self.metrics()
        self.assertEqual((found[hits], found[misses], found[refused]), (5, 1, 1))
        self.assertEqual(found['cacheservice_connections{port="resp"}'], 2)
        self.assertEqual(found['cacheservice_connections_limit{port="http"}'], MOST)
        self.flushLoggedErrors()
        self.fleet.kill(2)
        self.assertEqual(self.metrics()[hits], 5)
        wire = self.fleet.start(2).connect_resp()
        self.publish(2)
        self.ask(wire, "GET", "products:1")
        found = self.metrics()
        self.assertEqual((found[hits], found[misses], found[refused]), (6, 1, 1))

    def test_of_the_workers(self) -> None:
        """Each worker has its own series, which continue when it is started again."""
        self.second.lateness.observe(0.2)
        self.first.connect_resp()
        found = self.metrics()
        self.assertEqual([found[f'cacheservice_worker_up{{worker="{number}"}}'] for number in (1, 2)], [1, 1])
        self.assertEqual(found['cacheservice_worker_connections{port="resp",worker="1"}'], 1)
        self.assertEqual(found['cacheservice_worker_stall_seconds_count{worker="2"}'], 1)
        self.assertGreater(found['cacheservice_worker_memory_bytes{worker="2"}'], 1 << 20)
        self.fleet.kill(2)
        self.assertEqual(self.metrics()['cacheservice_worker_up{worker="2"}'], 0)
        self.fleet.start(2).lateness.observe(0.3)
        found = self.metrics()
        self.assertEqual(found['cacheservice_worker_restarts_total{worker="2"}'], 1)
        self.assertEqual(found['cacheservice_worker_stall_seconds_count{worker="2"}'], 2)

    def test_counted_once_a_second(self) -> None:
        """Without a question, too; a dataset is sent only if its reads have changed."""
        self.publish()
        self.ask(self.second.connect_resp(), "GET", "products:1")
        self.assertEqual(self.fleet.cache.dataset("products").counts.resp.hits, 0)
        self.clock.advance(1.0)
        self.fleet.settle()
        self.assertEqual(self.fleet.cache.dataset("products").counts.resp.hits, 1)
        sent: list[Any] = []
        self.patch(self.second.pair.worker, "send", lambda name, **fields: sent.append(fields))
        self.clock.advance(1.0)
        self.assertEqual([each["reads"] for each in sent], [{}])

    def test_counts_that_come_late(self) -> None:
        """What a worker sends after its end was noted is not counted again."""
        self.publish()
        self.ask(self.second.connect_resp(), "GET", "products:1")
        self.clock.advance(1.0)
        self.fleet.settle()
        self.fleet.whole.ended(2)
        self.second.counts.stopService()
        self.fleet.settle()
        self.assertEqual(self.fleet.cache.dataset("products").counts.resp.hits, 1)

    def test_the_last_counts(self) -> None:
        """A worker that stops in order sends its last counts."""
        self.publish()
        self.ask(self.second.connect_resp(), "GET", "products:1")
        self.second.counts.stopService()
        self.fleet.settle()
        self.assertEqual(self.fleet.cache.dataset("products").counts.resp.hits, 1)

    def test_limit(self) -> None:
        """The limit of connections is of all workers together, and is free again when one ends."""
        for _ in range(MOST // 2):
            for worker in (self.first, self.second):
                worker.connect_resp()
        for worker in (self.first, self.second):
            wire = worker.connect_resp()
            self.assertEqual(wire.sent, b"-ERR max number of clients reached\r\n")
        ((_, fields),) = self.second.log.events
        self.assertEqual(fields["clients"], MOST)
        self.fleet.kill(1)
        self.assertEqual(self.ask(self.second.connect_resp(), "PING"), b"PONG")


class Secrets(FleetTestCase):
    secrets = SECRETS

    def test_guesses(self) -> None:
        """A guess at one worker counts at all of them, and at one that starts later."""
        for number in range(32):
            worker = (self.first, self.second)[number % 2]
            wire = worker.connect_resp("192.0.2.66")
            wire.receive(encode("AUTH", f"guess {number}"))
            self.fleet.settle()
            wire.client_leaves()
        for worker in (self.first, self.second, self.restarted(2)):
            self.assertTrue(worker.resp.server.passwords.is_full("192.0.2.66"))
            self.assertFalse(worker.resp.server.passwords.is_full("192.0.2.1"))
        self.clock.advance(LONG_WAIT_S)
        self.fleet.settle()

    def restarted(self, number: int) -> Any:
        self.fleet.kill(number)
        return self.fleet.start(number)

    def test_a_proven_address(self) -> None:
        """It is proven at all workers."""
        wire = self.first.connect_resp("192.0.2.9")
        wire.receive(encode("AUTH", self.secrets.password))
        self.fleet.settle()
        self.assertEqual(wire.take(), b"+OK\r\n")
        for worker in (self.first, self.second, self.restarted(2)):
            self.assertTrue(worker.resp.server.passwords.throttle.is_proven("192.0.2.9", "resp.password"))

    def test_access(self) -> None:
        """The worker checks it; the main process sees no token."""
        seen: list[Any] = []
        call = self.first.pair.worker.call

        def observed(name: str, *rest: Any, **fields: Any) -> Any:
            seen.append(fields)
            return call(name, *rest, **fields)

        self.patch(self.first.pair.worker, "call", observed)
        path = "/v1/datasets/products/refresh"
        self.assertEqual(statuses(self.first.get("/v1/datasets")), [401])
        self.assertEqual(statuses(self.first.get("/v1/datasets/nope/why")), [401])
        self.assertEqual(statuses(self.first.get(path, "read", "POST")), [403])
        self.assertEqual(seen, [])
        self.assertEqual(statuses(self.first.get("/v1/datasets", "read")), [200])
        self.assertEqual(statuses(self.first.get(path, "operate", "POST")), [202])
        self.assertEqual(self.fleet.refreshes.at_once, ["products"])
        self.assertNotIn("operate", str(seen))

    def test_rights(self) -> None:
        """The event stream has the rights of its token."""
        for token, rights in (("read", b'{"access": "read", "admin": true}'), ("operate", b'"access": "admin"')):
            wire = self.second.connect_http()
            wire.receive(request("/events", token))
            self.fleet.settle()
            self.assertIn(rights, wire.take())
            wire.client_leaves()

    def test_rotation(self) -> None:
        """Before a worker refuses a secret, the main process reads the files, and all workers get the new ones."""
        self.fleet.looking = Deferred()
        wire = self.first.connect_resp()
        wire.receive(encode("AUTH", "new password"))
        self.fleet.settle()
        self.assertEqual(wire.take(), b"")
        new = {"resp.password": "new password", "http.token": "new", "http.admin_token": "operate"}
        for link in self.fleet.whole.links():
            link.send("secrets", secrets=new)
        self.fleet.looking.callback(None)
        self.fleet.settle()
        self.assertEqual(wire.take(), b"+OK\r\n")
        self.fleet.looking = None
        self.assertEqual(statuses(self.second.get("/v1/datasets", "new")), [200])
        self.assertEqual(self.first.resp.rejected["auth_failed"], 0)

    def test_a_main_process_that_is_busy(self) -> None:
        """A wrong secret is refused, and a right one accepted, without it."""
        wire = self.first.connect_resp()
        wire.receive(encode("AUTH", "wrong"))
        self.clock.advance(ANSWER_S)
        self.clock.advance(LONG_WAIT_S)
        self.assertIn(b"WRONGPASS", wire.take())
        wire.receive(encode("AUTH", self.secrets.password))
        self.clock.advance(0)
        self.assertEqual(wire.take(), b"+OK\r\n")
