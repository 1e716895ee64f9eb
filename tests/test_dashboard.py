"""Laws of the dashboard: its files, its events, its commands, and the hour that it charts."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from html.parser import HTMLParser
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from cacheservice import config
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Attempt, Snapshot
from cacheservice.cache.history import MOST_POINTS, SLOT_S, LastHour, Point
from cacheservice.errors import ConfigError, NothingToPin, NothingToRollBackTo
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http import HttpFactory
from cacheservice.ports.http.bodies import PIECE_BYTES
from cacheservice.ports.http.events import HEARTBEAT_S, PERIOD_S, Feed
from tests.kit.daemon import DaemonTestCase
from tests.kit.datasets import MOMENT_WITH_MS, declared
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.http import Answer, ask_on, read_to_the_end
from tests.kit.http_port import PortTestCase, buffered, encoded
from tests.kit.waiting import GIVE_UP_S, until, wait_until

WORST_LAST = ("unchanged", "published", "held", "failed")
MANY = 500

attempts = st.tuples(
    st.floats(0, 2000), st.floats(0, 100), st.none() | st.floats(0, 10_000), st.sampled_from(WORST_LAST)
)


class Hour(SynchronousTestCase):
    @given(st.lists(attempts, max_size=60), st.floats(0, 5000))
    def test_each_attempt_of_the_hour_counts(self, told: list[Any], later_s: float) -> None:
        """A point is all attempts of its 10 s: the longest time, the greatest age, the worst outcome, the last end; no
        attempt of the hour is missing, none before it is there."""
        hour, now, expected = LastHour(), 0.0, dict[int, Point]()
        for gap_s, took_s, age_s, outcome in told:
            now += gap_s
            hour.add(now, took_s, age_s, outcome)
            slot = math.floor(now / SLOT_S)
            before = expected.get(slot, Point(slot, now, took_s, age_s, outcome))
            ages = [age for age in (before.age_s, age_s) if age is not None]
            expected[slot] = Point(
                slot,
                now,
                max(before.took_s, took_s),
                max(ages) if ages else None,
                max(before.outcome, outcome, key=WORST_LAST.index),
            )
        last = list(expected.values())[-1:]
        self.assertEqual([hour.newest()], last or [None])
        now += later_s
        first = math.floor(now / SLOT_S) - MOST_POINTS
        self.assertEqual(hour.points(now), [point for slot, point in expected.items() if slot > first])

    def test_it_is_bounded(self) -> None:
        """However often something is refreshed, an hour is at most 360 points."""
        hour = LastHour()
        for number in range(40_000):
            hour.add(number / 3, 0.1, 1.0, "published")
        self.assertEqual(len(hour.points(40_000 / 3)), MOST_POINTS)
        self.assertLessEqual(max(len(column) for column in vars(hour).values()), MOST_POINTS)

    def test_the_age_is_the_greatest_that_was_served(self) -> None:
        """With each attempt goes the greatest age since the one before: that of what was replaced, or of what stays."""
        clock = Clock()
        clock.advance(1000)
        dataset = Cache([declared("products")], clock.seconds).dataset("products")

        def attempt(outcome: Any, generation: int = 0) -> float | None:
            if generation:
                dataset.publish(Snapshot(generation, encoded({}), MOMENT_WITH_MS, clock.seconds(), "1:1:"))
            dataset.attempted(Attempt(outcome, "interval", MOMENT_WITH_MS, 0.1))
            newest = dataset.last_hour.newest()
            assert newest is not None
            return newest.age_s

        self.assertIsNone(attempt("failed"))
        clock.advance(10)
        self.assertEqual(attempt("published", 1), 0.0)
        clock.advance(60)
        self.assertEqual(attempt("published", 2), 60.0)
        clock.advance(90)
        self.assertEqual(attempt("failed"), 90.0)
        clock.advance(30)
        self.assertEqual(attempt("published", 3), 120.0)
        clock.advance(20)
        self.assertEqual(attempt("held"), 20.0)


class Page(HTMLParser):
    """What a page refers to, and what its policy would not allow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.links |= {value for name in ("src", "href") if (value := names.get(name)) and value[:1] != "#"}
        self.inline += [name for name in names if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)


class Files(PortTestCase):
    async def test_the_page_and_its_files(self) -> None:
        """The page and all that it and its scripts refer to are there, from here, each under its own type."""
        page = await self.ask("/", Accept="text/html")
        self.assertEqual((page.status, page.headers["content-type"]), (200, "text/html; charset=utf-8"))
        parsed = Page(page.body.decode())
        self.assertEqual(parsed.inline, [])
        found = set(parsed.links)
        for script in [link for link in parsed.links if link.endswith("dashboard.js")]:
            text = (await self.ask(f"/{script}")).body.decode()
            found |= {f"assets/{name}" for name in re.findall(r'from "\./(\w+\.js)"', text)}
        found |= {f"assets/icon-{level}.svg" for level in ("fine", "warning", "alarm", "waiting", "lost")}
        found.add("assets/uPlot-LICENSE.txt")
        self.assertGreater(len(found), 12)
        types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}
        for link in found:
            answer = await self.ask(f"/{link}")
            self.assertEqual(answer.status, 200, link)
            self.assertEqual(answer.headers["content-type"].partition(";")[0], types[link.rpartition(".")[2]])
            self.assertGreater(len(answer.body), 100)

    async def test_nothing_is_left_to_the_browser(self) -> None:
        """Each file forbids what the dashboard does not need, and sets no cookie."""
        for path in ("/", "/assets/dashboard.js", "/assets/dashboard.css"):
            headers = (await self.ask(path)).headers
            policy = headers["content-security-policy"].split("; ")
            self.assertIn("default-src 'none'", policy)
            self.assertIn("frame-ancestors 'none'", policy)
            self.assertNotIn("unsafe", headers["content-security-policy"])
            self.assertNotIn("http", headers["content-security-policy"])
            self.assertEqual(headers["x-content-type-options"], "nosniff")
            self.assertEqual(headers["x-frame-options"], "DENY")
            self.assertEqual(headers["referrer-policy"], "no-referrer")
            self.assertEqual(headers["cross-origin-resource-policy"], "same-origin")
            self.assertEqual(headers["cross-origin-opener-policy"], "same-origin")
            self.assertNotIn("set-cookie", headers)

    async def test_caching(self) -> None:
        """A browser asks each time, and gets what it has not got yet; plain and compressed have tags of their own."""
        for path in ("/", "/assets/uPlot.iife.min.js"):
            plain = await self.ask(path)
            zipped = await self.ask(path, Accept_Encoding="gzip")
            self.assertEqual(plain.headers["cache-control"], "no-cache")
            self.assertEqual((zipped.headers["content-encoding"], gzip.decompress(zipped.body)), ("gzip", plain.body))
            self.assertNotEqual(plain.headers["etag"], zipped.headers["etag"])
            again = await self.ask(path, Accept_Encoding="gzip", If_None_Match=zipped.headers["etag"])
            self.assertEqual((again.status, again.body), (304, b""))
            other = await self.ask(path, If_None_Match=zipped.headers["etag"])
            self.assertEqual(other.status, 200)

    async def test_no_other_file(self) -> None:
        """Nothing but the dashboard's own files is under /assets/, and nobody writes there."""
        for name in ("", "../answers.py", "..%2fanswers.py", "nothing.js", "dashboard.js/", "%00", "index"):
            await self.assert_problem(f"/assets/{name}", 404, "no such file")
        for path in ("/", "/assets/dashboard.js", "/events"):
            await self.assert_problem(path, 405, "only reads", "POST")
            self.assertEqual((await self.ask(path, "HEAD")).body, b"")

    async def test_history(self) -> None:
        """/history tells the points of the last hour, a list for each field."""
        self.assertEqual((await self.ask("/v1/datasets/prices/history")).json()["slot"], [])
        self.products.attempted(Attempt("published", "interval", MOMENT_WITH_MS, 0.25, 5))
        self.clock.advance(30)
        self.products.attempted(Attempt("failed", "retry", MOMENT_WITH_MS, 4.0, None, "no"))
        self.clock.advance(2.5)
        self.assertEqual(
            (await self.ask("/v1/datasets/products/history")).json(),
            {
                "slot": [101, 104],
                "ago_s": [32.5, 2.5],
                "took_s": [0.25, 4.0],
                "age_s": [12.3, 42.3],
                "outcome": ["published", "failed"],
            },
        )

    async def test_why(self) -> None:
        """/why is what the status port says, as sentences or as text."""
        sentences = (await self.ask("/v1/datasets/products/why")).json()["sentences"]
        self.assertTrue(sentences[0].startswith("products is fresh: it is 12 s old"))
        text = await self.ask("/v1/datasets/products/why", Accept="text/plain")
        self.assertEqual(text.headers["content-type"], "text/plain; charset=utf-8")
        self.assertEqual(text.body.decode().splitlines(), sentences)
        await self.assert_problem("/v1/datasets/nothing/why", 404, "unknown dataset")


class Listener:
    """A client of /events, in a thread of its own; what it got so far is in `events`."""

    def __init__(self, port: int, **headers: str) -> None:
        self.events: list[tuple[str, Any]] = []
        self.comments = 0
        self.ended = False
        self._connection = HTTPConnection("127.0.0.1", port, timeout=GIVE_UP_S)
        lines = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request("GET", "/events", headers=lines)
        self._socket = self._connection.sock
        self.response: HTTPResponse = self._connection.getresponse()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        name = ""
        try:
            for line in self.response:
                text = line.decode().rstrip("\n")
                if text.startswith(":"):
                    self.comments += 1
                elif text.startswith("event: "):
                    name = text[7:]
                elif text.startswith("data: "):
                    self.events.append((name, json.loads(text[6:])))
        except (OSError, ValueError, AttributeError):  # it was ended in between
            pass
        self.ended = True

    def states(self) -> list[Any]:
        return [data for name, data in list(self.events) if name == "state"]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the service may have been first
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.response.close()
        self._connection.close()


class EventsTestCase(PortTestCase):
    async def listen(self, **headers: str) -> Listener:
        listener: Listener = await deferToThread(Listener, self.port.getHost().port, **headers)
        self.addCleanup(deferToThread, listener.close)
        return listener


class Events(EventsTestCase):
    idle_timeout_s = 1.0

    async def test_the_whole_state_and_then_what_changes(self) -> None:
        """Who comes is told everything, in the shape of the status port's json; after it, only what has changed."""
        listener = await self.listen(Accept="text/event-stream", Accept_Encoding="gzip")
        headers = listener.response.headers
        self.assertEqual(headers["Content-Type"], "text/event-stream")
        self.assertEqual(headers["Cache-Control"], "no-store")
        self.assertIsNone(headers["Content-Encoding"])
        await until(listener.states)
        self.assertEqual(listener.events[0], ("hello", {"access": "read", "admin": False}))
        (whole,) = listener.states()
        self.assertEqual(whole["names"], ["products", "prices"])
        products = whole["datasets"]["products"]
        status = (await self.ask("/v1/datasets/products/status")).json()
        self.assertEqual({key: products[key] for key in status}, status)
        self.assertEqual(whole["datasets"]["prices"]["state"], "never_loaded")
        self.assertEqual((whole["service"]["ready"], whole["postgres"]["state"]), (False, "unknown"))

        self.publish(encoded({}), 1, self.prices)
        await until(lambda: len(listener.states()) > 1)
        change = listener.states()[1]
        self.assertEqual(list(change["datasets"]), ["prices"])
        self.assertEqual((change["datasets"]["prices"]["state"], change["service"]["ready"]), ("fresh", True))
        self.assertNotIn("names", change)

        self.cache.declare([declared("prices"), declared("stock")])
        await until(lambda: len(listener.states()) > 2)
        change = listener.states()[2]
        self.assertEqual((change["names"], list(change["datasets"])), (["prices", "stock"], ["stock"]))

        self.cache.database.failed("PostgreSQL is away")
        await until(lambda: len(listener.states()) > 3)
        self.assertEqual(listener.states()[3]["postgres"]["error"], "PostgreSQL is away")

    async def test_a_listener_that_reads_stays(self) -> None:
        """No idle timeout ends a stream whose client takes what it is sent, though that is little."""
        listener = await self.listen()
        await deferLater(reactor, 3 * self.idle_timeout_s)
        self.publish(encoded({}), 1, self.prices)
        await until(lambda: len(listener.states()) > 1)
        self.assertFalse(listener.ended)

    async def test_one_that_does_not_read_is_dropped(self) -> None:
        """A client that takes nothing costs a few pieces of memory, however much changes, until it is dropped."""
        self.cache.declare([declared(f"dataset_{number}") for number in range(2 * MANY)])
        client = self.connect(receive_bytes=4096)
        with closing(client):
            client.sendall(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: self.factory.clients)
            (channel,) = self.factory.clients
            generation = 0
            while channel in self.factory.clients:
                generation += 1
                for dataset in self.cache.datasets.values():
                    self.publish(encoded({}), generation, dataset)
                self.assertLessEqual(buffered(channel), 4 * PIECE_BYTES)
                await deferLater(reactor, 0.1)
        self.assertEqual(self.factory.feed._listeners, 0)

    async def test_who_closes_is_forgotten(self) -> None:
        """With the last listener the looking ends, also if it only says that it will send no more."""
        for how in (socket.SHUT_RDWR, socket.SHUT_WR):
            client = self.connect()
            with closing(client):
                client.sendall(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
                await until(lambda: self.factory.feed._listeners == 1)
                client.shutdown(how)
                await until(lambda: self.factory.feed._listeners == 0)
                if how == socket.SHUT_WR:
                    rest: bytes = await deferToThread(read_to_the_end, client)
                    self.assertTrue(rest.endswith(b"\r\n0\r\n\r\n"))
            await until(lambda: not self.factory.clients)
            self.assertIsNone(self.factory.feed._timer)

    async def test_http_1_0(self) -> None:
        """Where there are no chunks, the stream is framed by the connection's end."""
        client = self.connect()
        with closing(client):
            client.sendall(b"GET /events HTTP/1.0\r\n\r\n")
            await until(lambda: self.factory.feed._listeners == 1)
            text: bytes = await deferToThread(client.recv, 65_536)
            while b"event: state" not in text:
                text += await deferToThread(client.recv, 65_536)
        self.assertIn(b"Connection: close", text)
        self.assertNotIn(b"Transfer-Encoding", text)
        self.assertIn(b"\r\n\r\nretry: ", text)

    async def test_the_stop_ends_it(self) -> None:
        """When the port closes, listeners are disconnected and nothing looks any more."""
        listeners = [await self.listen() for _ in range(3)]
        await until(lambda: all(listener.states() for listener in listeners))
        self.factory.close_clients()
        await until(lambda: all(listener.ended for listener in listeners))
        await until(lambda: not self.factory.clients)
        self.assertIsNone(self.factory.feed._timer)

    async def test_it_wants_what_is_served(self) -> None:
        """A client that takes no events is told so."""
        await self.assert_problem("/events", 406, "text/event-stream", Accept="application/json")


class FewEvents(EventsTestCase):
    max_connections = 2

    async def test_listeners_count_as_clients(self) -> None:
        """limits.max_connections counts those who listen."""
        for _ in range(2):
            await self.listen()
        self.assertEqual((await self.ask("/v1/datasets")).status, 503)
        self.assertEqual((await self.ask("/livez")).status, 200)


class FeedRules(SynchronousTestCase):
    """The feed alone, on a clock that a test turns."""

    turn_s = 60.0

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.cache = Cache([declared("products"), declared("prices")], self.clock.seconds)
        self.feed = Feed(self.cache, self.clock, self.turn_s)

    def publish(self, name: str, generation: int) -> None:
        self.cache.dataset(name).publish(
            Snapshot(generation, encoded({}), MOMENT_WITH_MS, self.clock.seconds(), "1:1:")
        )

    def advance(self, seconds: float) -> None:
        self.clock.pump([0.25] * round(seconds / 0.25))

    def taken(self, stream: Iterator[Any]) -> list[bytes]:
        """What a listener that reads all gets now: the events, until it has to wait."""
        told = bytearray()
        while not isinstance(piece := next(stream), Deferred):
            told += piece
        return [block for block in bytes(told).split(b"\n\n") if b"event: state" in block]

    def test_at_most_one_event_a_second(self) -> None:
        """What changes ten times a second is told once a second, in one event, as it is then."""
        stream = self.feed.follow("read", False)
        self.taken(stream)
        self.advance(0.25)
        self.assertEqual(len(self.taken(stream)), 1)
        events = []
        for generation in range(1, 41):
            self.publish("products", generation)
            self.advance(0.25)
            events += self.taken(stream)
        self.assertLessEqual(len(events), 40 * 0.25 / PERIOD_S + 1)
        self.assertIn(b'"generation":40', events[-1])
        stream.close()

    def test_an_event_at_least_every_15_s(self) -> None:
        """While nothing changes there is a sign of life, with the service's clock and no dataset."""
        stream = self.feed.follow("read", False)
        self.taken(stream)
        self.advance(0.25)
        self.taken(stream)
        self.assertLess(HEARTBEAT_S, 15)
        for _ in range(4):
            self.advance(15)
            event = self.taken(stream)[-1]
            self.assertTrue(event.startswith(b": "))
            self.assertIn(b'"datasets":{}', event)
            uptime_s = self.clock.seconds() - self.cache.started_at
            told_s = json.loads(event.partition(b"data: ")[2])["service"]["uptime_s"]
            self.assertLess(abs(told_s - uptime_s), HEARTBEAT_S)
        stream.close()

    def test_all_get_the_same_bytes(self) -> None:
        """However many listen, an event is made once; and one dataset is described once a change."""
        made = []
        make = self.feed._make_event

        def counted(seen: int) -> bytes:
            made.append(seen)
            return make(seen)

        self.feed._make_event = counted  # type: ignore[method-assign]
        streams = [self.feed.follow("read", False) for _ in range(50)]
        for stream in streams:
            self.taken(stream)
        told: list[list[bytes]] = [[] for _ in streams]
        for generation in range(1, 6):
            self.publish("products", generation)
            self.advance(1)
            for events, stream in zip(told, streams, strict=True):
                events.extend(self.taken(stream))
        self.assertGreaterEqual(len(told[0]), 5)
        self.assertTrue(all(events == told[0] for events in told))
        self.assertEqual(len(made), len(told[0]))
        for stream in streams:
            stream.close()

    def test_who_is_slow_misses_nothing(self) -> None:
        """Who does not read for a while gets what has changed meanwhile, once, in one event."""
        slow = self.feed.follow("read", False)
        quick = self.feed.follow("read", False)
        for stream in (slow, quick):
            self.taken(stream)
        self.advance(0.25)
        for stream in (slow, quick):
            self.taken(stream)
        for generation in range(1, 6):
            self.publish("products", generation)
            self.advance(1)
            self.taken(quick)
        self.publish("prices", 1)
        self.advance(1)
        self.assertIn(b'"prices"', self.taken(quick)[-1])
        (event,) = self.taken(slow)
        datasets = json.loads(event.partition(b"data: ")[2])["datasets"]
        self.assertEqual({name: told["generation"] for name, told in datasets.items()}, {"products": 5, "prices": 1})
        for stream in (slow, quick):
            stream.close()

    def test_the_state_goes_by_the_clock(self) -> None:
        """That a dataset grows stale and expires is told although nobody touched it."""
        self.publish("products", 1)
        stream = self.feed.follow("read", False)
        self.taken(stream)
        states = []
        for _ in range(200):
            self.advance(1)
            for event in self.taken(stream):
                datasets = json.loads(event.partition(b"data: ")[2])["datasets"]
                states += [datasets["products"]["state"]] if "products" in datasets else []
        self.assertEqual(states, ["fresh", "stale", "expired"])
        stream.close()

    def test_nothing_runs_while_nobody_listens(self) -> None:
        """No timer before the first listener and after the last; who comes later is told what is true then."""
        self.assertEqual(self.clock.getDelayedCalls(), [])
        stream = self.feed.follow("read", False)
        self.taken(stream)
        self.advance(1)
        stream.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.publish("products", 7)
        stream = self.feed.follow("read", False)
        self.assertEqual(self.taken(stream), [])
        self.advance(0.25)
        (event,) = self.taken(stream)
        self.assertIn(b'"generation":7', event)
        stream.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class FeedInTurns(FeedRules):
    """The same laws when each dataset takes a turn of the reactor."""

    turn_s = 0.0

    def test_a_look_gives_way(self) -> None:
        """When its time is up, a look at the datasets goes on in the next turn, and tells nothing before its end."""
        self.cache.declare([declared(f"dataset_{number}") for number in range(MANY)])
        stream = self.feed.follow("read", False)
        self.taken(stream)
        turns = 0
        while not (events := self.taken(stream)):
            (call,) = self.clock.getDelayedCalls()
            self.assertEqual(call.getTime(), self.clock.seconds())
            self.clock.calls.remove(call)
            call.called = True
            call.func(*call.args, **call.kw)
            turns += 1
        self.assertGreaterEqual(turns, MANY)
        self.assertEqual(len(json.loads(events[0].partition(b"data: ")[2])["datasets"]), MANY)
        stream.close()


class WithToken(EventsTestCase):
    token = "s3cret-äö"

    async def test_the_page_asks_for_it(self) -> None:
        """A browser without the token gets the page, which asks for it, as 401; another client gets the problem."""
        page = await self.ask("/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
        self.assertEqual((page.status, page.headers["content-type"]), (401, "text/html; charset=utf-8"))
        self.assertEqual(page.headers["www-authenticate"], 'Bearer realm="cacheservice"')
        self.assertEqual(page.headers["cache-control"], "no-store")
        self.assertIn("content-security-policy", page.headers)
        self.assertNotIn(self.token.encode(), page.body)
        for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
            await self.assert_problem("/", 401, "token of http.token", **headers)
        await self.assert_problem("/events", 401, "token of http.token")
        await self.assert_problem("/", 401, "not the token", Authorization="Bearer x", Accept="text/html")
        await self.assert_problem("/events", 401, "not the token", Authorization="Bearer x")

    async def test_the_files_need_none(self) -> None:
        """There is nothing secret in the assets."""
        self.assertEqual((await self.ask("/assets/dashboard.js")).status, 200)

    async def test_who_has_it_sees_all(self) -> None:
        """The token opens the page and the events."""
        authorization = f"Bearer {self.token}".encode().decode("latin-1")
        self.assertEqual((await self.ask("/", Authorization=f"Bearer {self.token}")).status, 200)
        listener = await self.listen(Authorization=authorization)
        await until(listener.states)
        self.assertEqual(listener.events[0], ("hello", {"access": "read", "admin": False}))

    async def test_it_may_not_command(self) -> None:
        """Without http.admin_token nobody changes anything."""
        for command in ("refresh", "accept", "pin", "unpin", "rollback"):
            path = f"/v1/datasets/products/{command}"
            await self.assert_problem(path, 405, "only reads", "POST", Authorization=f"Bearer {self.token}")
            await self.assert_problem(path, 401, "http.token", "POST")
            await self.assert_problem(path, 405, "only reads", "PUT", Authorization=f"Bearer {self.token}")
            await self.assert_problem(path, 404, "nothing at this path", Authorization=f"Bearer {self.token}")


class OnlyProbes(PortTestCase):
    allow_data = False

    async def test_no_dashboard(self) -> None:
        """On another machine's address without a token there is no dashboard either."""
        for path in ("/", "/events", "/assets/dashboard.js"):
            await self.assert_problem(path, 403, "set http.token", Accept="text/html")


class Operators(FakeRefreshes):
    """Remembers what it was told to do, and does not do some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, str]] = []
        self.running = False

    def refresh_now(self, name: str) -> bool:
        self.done.append(("refresh", name))
        return not self.running

    def accept_next(self, name: str) -> None:
        self.done.append(("accept", name))

    def pin(self, name: str) -> list[str]:
        if name == "prices":
            raise NothingToPin("prices has not been loaded yet")
        self.done.append(("pin", name))
        return [name]

    def unpin(self, name: str) -> list[str]:
        self.done.append(("unpin", name))
        return [name]

    def roll_back(self, name: str) -> dict[str, int]:
        if name == "prices":
            raise NothingToRollBackTo("prices has not been loaded yet")
        self.done.append(("rollback", name))
        return {name: 16}


class CommandsTestCase(EventsTestCase):
    admin_token = "operate"

    def make_factory(self) -> HttpFactory:
        self.operators = Operators()
        return HttpFactory(
            cache=self.cache,
            freshness=Freshness(self.refreshes, self.cache.database, self.clock),
            refreshes=self.operators,
            max_connections=self.max_connections,
            idle_timeout_s=self.idle_timeout_s,
            reactor=reactor,
            token=self.token,
            admin_token=self.admin_token,
            allow_data=self.allow_data,
        )

    async def command(self, path: str, token: str = "operate", method: str = "POST", **headers: str) -> Answer:
        return await self.ask(f"/v1/datasets/{path}", method, Authorization=f"Bearer {token}", **headers)


class Commands(CommandsTestCase):
    async def test_what_the_admin_socket_does(self) -> None:
        """With the admin token each command does what it does there, and says what it did."""
        answers = {
            "refresh": (202, {"dataset": "products", "refresh": "started"}),
            "accept": (200, {"dataset": "products", "accepts_next": True}),
            "pin": (200, {"dataset": "products", "pinned": ["products"]}),
            "unpin": (200, {"dataset": "products", "unpinned": ["products"]}),
            "rollback": (202, {"dataset": "products", "going_back_to": {"products": 16}}),
        }
        for command, expected in answers.items():
            answer = await self.command(f"products/{command}", Content_Length="0")
            self.assertEqual((answer.status, answer.json()), expected)
            self.assertEqual(answer.headers["cache-control"], "no-store")
            self.assertEqual(self.operators.done.pop(), (command, "products"))
        self.operators.running = True
        answer = await self.command("products/refresh")
        self.assertEqual(answer.json()["refresh"], "follows the one that is running")

    async def test_what_cannot_be_done(self) -> None:
        """A command that is not possible now is 409 with the reason; an unknown dataset is 404."""
        for command in ("pin", "rollback"):
            answer = await self.command(f"prices/{command}")
            self.assertEqual((answer.status, answer.json()["detail"]), (409, "prices has not been loaded yet"))
        self.assertEqual((await self.command("nothing/refresh")).status, 404)
        self.assertEqual((await self.command("products/reload")).status, 404)
        self.assertEqual((await self.command("products/refresh", method="GET")).headers["allow"], "POST")
        self.assertEqual((await self.command("products/refresh", method="DELETE")).status, 405)
        self.assertEqual(self.operators.done, [])

    async def test_who_may(self) -> None:
        """No token is 401, a wrong one is 401 after a while, and nothing happens; reading needs none."""
        await self.assert_problem("/v1/datasets/products/refresh", 401, "token of http.admin_token", "POST")
        for wrong in ("Bearer x", "Bearer", "Bearer ", "Basic operate", "operate"):
            problem = await self.assert_problem(
                "/v1/datasets/products/refresh", 401, "not the token of http.admin_token", "POST", Authorization=wrong
            )
            self.assertNotIn(b"operate", problem.body)
        await self.assert_problem("/events", 401, "not the token of http.admin_token", Authorization="Bearer x")
        self.assertEqual(self.operators.done, [])
        self.assertEqual((await self.ask("/v1/datasets")).status, 200)
        self.assertEqual((await self.ask("/")).status, 200)

    async def test_no_body(self) -> None:
        """What another site's form could send, a body, is refused with the right token, too."""
        for headers in ("Content-Length: 3", "Transfer-Encoding: chunked"):
            request = (
                f"POST /v1/datasets/products/refresh HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer operate\r\n{headers}"
            )
            text = await self.exchange(f"{request}\r\n\r\nabc".encode())
            self.assertIn(b"413", text.partition(b"\r\n")[0])
        self.assertEqual(self.operators.done, [])

    async def test_events_tell_who_may(self) -> None:
        """Who listens learns whether there is an admin token, and whether it has sent it."""
        for headers, access in (({}, "read"), ({"Authorization": "Bearer operate"}, "admin")):
            listener = await self.listen(**headers)
            await until(lambda listener=listener: listener.events)
            self.assertEqual(listener.events[0], ("hello", {"access": access, "admin": True}))


class TwoTokens(CommandsTestCase):
    token = "read"

    async def test_one_reads_and_one_does_both(self) -> None:
        """The admin token also reads; the other one is 403 for a command."""
        for token in ("read", "operate"):
            authorization = f"Bearer {token}"
            self.assertEqual((await self.ask("/v1/datasets", Authorization=authorization)).status, 200)
        answer = await self.command("products/refresh", "read")
        self.assertEqual((answer.status, self.operators.done), (403, []))
        self.assertEqual((await self.command("products/refresh")).status, 202)
        await self.assert_problem("/v1/datasets", 401, "http.token")


class OnlyAnAdminToken(CommandsTestCase):
    allow_data = False

    async def test_it_opens_a_port_to_other_machines(self) -> None:
        """Where reading needs a token and there is only the admin token, that one reads, and nobody else does."""
        await self.assert_problem("/v1/datasets", 401, "token")
        await self.assert_problem("/events", 401, "token")
        self.assertEqual((await self.ask("/v1/datasets", Authorization="Bearer operate")).status, 200)
        for empty in ("Bearer", "Bearer "):
            await self.assert_problem("/v1/datasets", 401, "not the token", Authorization=empty)


class Configuration(SynchronousTestCase):
    def load(self, **variables: str) -> Any:
        environ = {
            "CACHESERVICE_POSTGRES__DSN": "host=db",
            "CACHESERVICE_DATASETS__ONE__QUERY": "SELECT 1 AS id",
            "CACHESERVICE_DATASETS__ONE__KEY": "id",
        }
        return config.load(environ | variables, lambda _: None)

    def test_the_admin_token_is_a_secret(self) -> None:
        """It comes from the environment or from a file, and shows itself nowhere."""
        with tempfile.TemporaryDirectory() as folder:
            secret = Path(folder) / "token"
            secret.write_text("operate\n")
            for variables in (
                {"CACHESERVICE_HTTP__ADMIN_TOKEN": "operate"},
                {"CACHESERVICE_HTTP__ADMIN_TOKEN_FILE": str(secret)},
            ):
                settings = self.load(**variables)
                self.assertEqual(settings.http.admin_token.get_secret_value(), "operate")
                self.assertNotIn("operate", repr(settings))

    def test_it_is_not_the_token_for_reading(self) -> None:
        """One token for both would let everybody who reads change something."""
        with self.assertRaises(ConfigError) as caught:
            self.load(CACHESERVICE_HTTP__TOKEN="swordfish", CACHESERVICE_HTTP__ADMIN_TOKEN="swordfish")
        (problem,) = [line for line in caught.exception.problems if "ADMIN_TOKEN" in line]
        self.assertIn("must be another than http.token", problem)
        self.assertNotIn("swordfish", str(caught.exception))


HELD = """
[http]
port = 0
admin_token = "operate"
[datasets.products]
query = "SELECT id FROM products"
key = "id"
interval_s = 600
"""


class RealService(DaemonTestCase):
    def test_accepting_a_held_result(self) -> None:
        """Over HTTP alone, an operator sees that a result is held, and why, accepts it, and sees it published."""
        self.server.run_sql("CREATE TABLE products AS SELECT generate_series(1, 100) AS id", self.database)
        service = self.started(self.configuration(HELD).replace("[http]\nport = 0\n", "", 1))
        port = int(service.event("service_started")["http"].rpartition(":")[2])
        service.wait_until_ready()
        listener = Listener(port, Authorization="Bearer operate")
        self.addCleanup(listener.close)
        told: dict[str, Any] = {}

        def products() -> dict[str, Any]:
            for state in listener.states():
                told.update(state["datasets"].get("products", {}))
            return told

        wait_until(lambda: products().get("generation") == 1, "the first generation")
        self.server.run_sql("DELETE FROM products WHERE id > 3", self.database)

        def post(command: str) -> int:
            with closing(socket.create_connection(("127.0.0.1", port), GIVE_UP_S)) as client:
                path = f"/v1/datasets/products/{command}"
                return ask_on(client, path, "POST", Authorization="Bearer operate").status

        self.assertEqual(post("refresh"), 202)
        wait_until(lambda: products()["held"], "the held result")
        self.assertIn("100 to 3 rows", products()["held"]["reason"])
        self.assertEqual(products()["newest_point"]["outcome"], "held")
        self.assertEqual((post("accept"), post("refresh")), (200, 202))
        wait_until(lambda: products()["generation"] == 2, "the accepted result")
        self.assertEqual((products()["held"], products()["rows"]), (None, 3))
        self.assertEqual(products()["last_change"], {"added": 0, "changed": 0, "removed": 97})
        service.end()
        wait_until(lambda: listener.ended, "the end of the stream")
