"""Ports under attack: what mutated requests and structured nonsense may get from a port, and what they may cost it.

The inputs are the same in every run. FUZZ_SEED selects others, as `benchmarks.soak` does, and FUZZ_INPUTS
how many a port gets.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.interfaces import IListeningPort
from twisted.internet.threads import deferToThread
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import TestCase

from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http import AccessSettings, HttpFactory, Served
from cacheservice.ports.listen import tcp
from cacheservice.ports.operator_commands import Commands as StatusCommands
from cacheservice.ports.resp.connection import RespFactory
from cacheservice.ports.status import StatusFactory
from cacheservice.ports.throttle import Throttle
from tests.kit.clocks import started_clock
from tests.kit.descriptors import open_files
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.fuzz import Found, Input, Orders, Talk, exchange
from tests.kit.http import read_to_the_end
from tests.kit.paths import ROOT
from tests.kit.resp import encode
from tests.kit.resp_peer import document, filled_cache
from tests.kit.waiting import GIVE_UP_S, until

INPUTS = int(os.environ.get("FUZZ_INPUTS", "100000"))
SEED = os.environ.get("FUZZ_SEED") or "66f4657a"
SECRET = "secret"
WITH_SECRET = 0.2  # of the inputs go to a port that wants a password or a token
MAX_GROWTH_BYTES = 32 * 1024 * 1024
"""Between a fifth of the attack and its end: half a kilobyte an input."""
MAX_AT_ONCE_BYTES = 2 * 1024**3
WARM_UP_INPUTS = 2000
MOST_SHOWN = 3
ROWS = 600
MAX_CONNECTIONS = 1000
EXAMPLES = 300

nonsense = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def address_space_bytes() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def delayed_calls() -> list[str]:
    return sorted(repr(call.func) for call in reactor.getDelayedCalls())  # type: ignore[attr-defined]


class UnderAttack:
    """What every port must withstand; the class of each port defines the port and its usual answers."""

    timeout = 240
    kind = ""
    most_events = 0
    """Of the log, for one connection."""
    make_factory: Callable[[str], Any]
    in_peace: Callable[[socket.socket], None]
    """A normal client gets its right answers."""

    async def setUp(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        # A process that makes a port take gigabytes gets a MemoryError of it, not the machine.
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes() + MAX_AT_ONCE_BYTES, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        self.now = started_clock()  # of the datasets' ages only
        self.cache = filled_cache(self.now.seconds, ROWS)
        self.events: list[str] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)

    def observe(self, event: LogEvent) -> None:
        """Remember what was logged, and what was just being read; not the event, which holds the connection."""
        failure = event.get("log_failure")
        frames = traceback.walk_tb(failure.getTracebackObject()) if failure else ()
        read = [frame.f_locals.get("data") for frame, _ in frames if frame.f_code.co_name == "dataReceived"]
        self.events.append(" ".join([str(event.get("log_format")), *(f"while {data!r} was read" for data in read)]))

    def talk(self, secret: str) -> Talk:
        return self.orders(None, secret, 0).talk()

    def replies(self) -> dict[str, str]:
        """What is known of the answers beforehand."""
        return {}

    def orders(self, port: IListeningPort | None, secret: str, inputs: int) -> Orders:
        number = port.getHost().port if port else 0
        return Orders(self.kind, number, f"{SEED} {self.kind} {bool(secret)} {inputs}", inputs, secret, self.replies())

    async def listen(self, secret: str = "") -> tuple[Any, IListeningPort]:
        factory = self.make_factory(secret)
        port = tcp(reactor, "127.0.0.1", 0, factory)()

        async def close() -> None:
            await port.stopListening()
            factory.close_clients()
            await until(lambda: not factory.clients)

        self.addCleanup(close)
        return factory, port

    async def attacked(self, port: IListeningPort, secret: str, inputs: int) -> Found:
        def run() -> Found:
            ended = subprocess.run(
                [sys.executable, "-m", "tests.kit.fuzz"],
                input=json.dumps(asdict(self.orders(port, secret, inputs))),
                capture_output=True,
                text=True,
                check=False,
                timeout=self.timeout,
                cwd=ROOT,
            )
            assert not ended.returncode, f"seed {SEED}: {ended.stderr}"
            return Found(**json.loads(ended.stdout))

        return await deferToThread(run)

    async def converse(self, port: IListeningPort) -> None:
        def run() -> None:
            with closing(socket.create_connection(("127.0.0.1", port.getHost().port), GIVE_UP_S)) as client:
                self.in_peace(client)

        await deferToThread(run)

    def assert_nothing_logged(self, where: str, connections: int) -> None:
        """No traceback, and no more lines than the peers are."""
        gc.collect()  # a Deferred reports its failure when it is collected
        errors = self.flushLoggedErrors()
        if errors:
            told = [event for event in self.events if "was read" in event]
            self.fail("\n".join([where, errors[0].getTraceback(), *told[:MOST_SHOWN]]))
        self.assertLessEqual(len(self.events), self.most_events * connections, f"{where}: {self.events[:MOST_SHOWN]}")

    async def stand(self, secret: str, inputs: int) -> None:
        where = f"FUZZ_SEED={SEED} FUZZ_INPUTS={INPUTS}"
        factory, port = await self.listen(secret)
        subscriptions_before = self.cache.events.subscription_count
        if not secret:
            await self.converse(port)
        await until(lambda: not factory.clients)
        self.events.clear()
        # The thread pool and the bodies that are kept are there from the first answers on.
        await self.attacked(port, secret, WARM_UP_INPUTS)
        await until(lambda: not factory.clients)
        open_before, calls_before = open_files(), delayed_calls()
        connections, sizes_bytes = 0, []
        for share in (inputs // 5, inputs - inputs // 5):
            found = await self.attacked(port, secret, share)
            if found.failures:
                self.fail("\n\n".join([where, *found.failures]))
            self.assertGreaterEqual(found.inputs, share, where)
            connections += found.connections
            await until(lambda: not factory.clients)
            sizes_bytes.append(resident_bytes())
        self.assert_nothing_logged(where, connections)
        await until(lambda: len(open_files()) <= len(open_before))
        await until(lambda: len(delayed_calls()) <= len(calls_before))
        self.assertEqual((open_files(), delayed_calls()), (open_before, calls_before), where)
        # A compressed body is kept, and watches its dataset, until the next generation; which bodies are asked for,
        # and when first, is up to the seed. At most one watch for each dataset, and none once the bodies are dropped.
        # A watch is of two kinds of events.
        most = subscriptions_before + 2 * len(self.cache.datasets)
        self.assertLessEqual(self.cache.events.subscription_count, most)
        self.assertLess(sizes_bytes[1] - sizes_bytes[0], MAX_GROWTH_BYTES, where)
        if not secret:
            await self.converse(port)
        self.assert_nothing_logged(where, connections)
        factory.close_clients()
        await until(lambda: not factory.clients)
        self.assertEqual(self.cache.events.subscription_count, subscriptions_before, where)

    async def assert_stands_nonsense(self, lists: st.SearchStrategy[list[bytes]], secret: str = "") -> None:
        factory, port = await self.listen(secret)
        self.events.clear()
        talk, number, connections = self.talk(secret), port.getHost().port, 0

        @nonsense
        @given(lists, st.lists(st.floats(0, 1), max_size=3))
        def attack(inputs: list[bytes], cuts: Sequence[float]) -> None:
            nonlocal connections
            connections += 1
            exchange(talk, number, [Input(each) for each in inputs], cuts)

        await deferToThread(attack)
        await until(lambda: not factory.clients)
        self.assert_nothing_logged("nonsense", connections)
        await self.converse(port)


word = st.one_of(
    st.sampled_from(b"GET MGET MULTI EXEC HELLO 3 SUBSCRIBE cache:products products products:1 0 -1 INFO".split()),
    st.sampled_from(b"SCAN HSCAN COUNT MATCH [a- CLIENT SETNAME COMMAND DOCS CACHE.INFO EXISTS TTL TYPE".split()),
    st.sampled_from([b"", b"\r\n", b"\xff\xfe"]),
    st.binary(max_size=12),
)
length = st.one_of(st.none(), st.integers(-3, 20), st.sampled_from([2**31, 2**63, 10**6, 10**30]))


@st.composite
def bulks(draw: st.DrawFn) -> bytes:
    """A word, or something that stands for one; now and then its length is a lie, or its end is not CRLF."""
    text, lie = draw(word), draw(st.one_of(st.none(), st.none(), st.none(), length))
    kind = draw(st.sampled_from([b"$"] * 9 + [b"=", b"!"]))
    end = draw(st.sampled_from([b"\r\n"] * 9 + [b"xx"]))
    return b"%b%d\r\n%b%b" % (kind, len(text) if lie is None else lie, text, end)


scalar = st.sampled_from([b"+OK\r\n", b":5\r\n", b"_\r\n", b"#t\r\n", b",1.5\r\n", b"(99\r\n", b"-ERR\r\n", b"$-1\r\n"])


@st.composite
def aggregates(draw: st.DrawFn, children: st.SearchStrategy[bytes]) -> bytes:
    items, lie = draw(st.lists(children, max_size=5)), draw(st.one_of(st.none(), st.none(), length))
    kind = draw(st.sampled_from([b"*"] * 5 + [b"~", b"%", b">", b"|"]))
    return b"%b%d\r\n%b" % (kind, len(items) if lie is None else lie, b"".join(items))


resp_requests = st.one_of(
    st.lists(word, min_size=1, max_size=5).map(lambda words: encode(*words)),
    st.lists(word, min_size=1, max_size=5).map(lambda words: b" ".join(words) + b"\r\n"),
    aggregates(bulks()),
    st.recursive(st.one_of(bulks(), scalar), aggregates, max_leaves=12),
    st.lists(st.sampled_from([b'"', b"'", b"\\x4", b"\\", b" ", b"a", b"\n"]), max_size=12).map(b"".join),
)


FORGIVING = 10_000
"""How much faster than the clock the throttle forgets failures."""

FOUND = [
    # A simple string behind a word that does not end with CRLF, and then bytes that are not a request.
    b"*2\r\n$1\r\naxx+b\r\n*1\r\n:1\r\n",
    # Gigabytes that are announced as something else than an array.
    b"*1\r\n>4000000000\r\n",
    b"*2\r\n$1\r\naxx>4000000000\r\n",
    b"*2\r\n$1\r\naxx~4000000000\r\n",
    b"*2\r\n$1\r\naxx|4000000000\r\n",
]


class Resp(UnderAttack, TestCase):
    kind = "resp"
    most_events = 1  # that it spoke another protocol

    def make_factory(self, secret: str) -> RespFactory:
        factory = RespFactory(
            cache=self.cache,
            freshness=Freshness(FakeRefreshes(), self.cache.database, reactor),
            limits=Limits(MAX_CONNECTIONS, 300),
            clock=reactor,
            password=secret,
        )
        # All of the many wrong passwords come from one address; they are forgiven at once, and so each waits briefly.
        factory.server.passwords.throttle = Throttle(lambda: reactor.seconds() * FORGIVING)
        return factory

    def in_peace(self, client: socket.socket) -> None:
        row = document(7, 1)
        client.sendall(encode("PING") + encode("GET", "products:7") + encode("HLEN", "products") + encode("QUIT"))
        expected = b"+PONG\r\n$%d\r\n%b\r\n:%d\r\n+OK\r\n" % (len(row), row, ROWS)
        self.assertEqual(read_to_the_end(client), expected)

    async def test_mutated_requests(self) -> None:
        """Replies are whole and in step; at most one is a protocol error, and then it is the last; nobody else's
        connection, memory or log notices. So it is with a password.
        """
        await self.stand("", int(INPUTS * (1 - WITH_SECRET)))
        await self.stand(SECRET, int(INPUTS * WITH_SECRET))

    async def test_nonsense(self) -> None:
        """Nested, mistyped and mismeasured values, however they are cut, are answered as well as requests are."""
        await self.assert_stands_nonsense(st.lists(resp_requests, min_size=1, max_size=5))

    async def test_found(self) -> None:
        """What an attack once broke it with is answered as every request is."""
        factory, port = await self.listen()
        self.events.clear()
        for data in FOUND:
            await deferToThread(exchange, self.talk(""), port.getHost().port, [Input(data)])
            await until(lambda: not factory.clients)
            self.assert_nothing_logged(repr(data), 1)


header_names = st.one_of(
    st.sampled_from(["Host", "Accept", "Accept-Encoding", "If-None-Match", "If-Modified-Since", "Range", "Upgrade"]),
    st.sampled_from(["Content-Length", "Transfer-Encoding", "Connection", "Expect", "Authorization"]),
    st.sampled_from(["X-A", "é", ":", "", "a b"]),
)
header_values = st.one_of(
    st.sampled_from(["a", "*", "gzip", "gzip;q=0.0", "gzip,,;q=", "*/*;q=2", "application/x-ndjson", "a/b;c", '"x"']),
    st.sampled_from(["keep-alive, close", "close", "Fri, 02 Jan 2026 03:04:05 GMT", "chunked", "100-continue", 'W/"']),
    st.sampled_from(["0", "5", "-1", "1, 1", "9" * 30, "[::1", "Bearer secret", "Bearer", "q" * 2000, "\0", "a\r\n b"]),
    st.text(st.characters(max_codepoint=255), max_size=12),
)
targets = st.lists(
    st.one_of(
        st.sampled_from(["/", "v1", "datasets", "products", "rows", "1", "status", "/livez", "/v1/datasets/products/"]),
        st.sampled_from(["%", "%2F", "%ff", "?", "max_age=", "1e400", "nan", "#", "http://", "*", "..", "é", "&"]),
    ),
    max_size=6,
).map("".join)


@st.composite
def http_requests(draw: st.DrawFn) -> bytes:
    method = draw(st.sampled_from(["GET"] * 6 + ["HEAD", "POST", "get", "", "G T", "\x00"]))
    version = draw(st.sampled_from(["HTTP/1.1"] * 8 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "", "http/1.1"]))
    end = draw(st.sampled_from(["\r\n"] * 8 + ["\n", "\r", "\r\r\n"]))
    headers = draw(st.lists(st.tuples(header_names, header_values), max_size=5))
    lines = [f"{method} {draw(targets)} {version}", *draw(st.sampled_from([["Host: a"], ["Host: a"], []]))]
    lines += [f"{name}:{value}" for name, value in headers]
    body = draw(st.sampled_from(["", "", "", "5\r\nhello\r\n0\r\n\r\n", "hello", "ffffffffffffffff\r\n", "\r\n"]))
    return (end.join([*lines, "", ""]) + body).encode("latin-1")


class Http(UnderAttack, TestCase):
    kind = "http"

    def make_factory(self, secret: str) -> HttpFactory:
        freshness = Freshness(FakeRefreshes(), self.cache.database, reactor)
        return HttpFactory(
            Served(self.cache, freshness, FakeRefreshes()),
            AccessSettings(token=secret),
            Limits(MAX_CONNECTIONS, 300),
            reactor,
        )

    def in_peace(self, client: socket.socket) -> None:
        path = b"/v1/datasets/products/rows/7"
        client.sendall(b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path)
        head, _, body = read_to_the_end(client).partition(b"\r\n\r\n")
        self.assertEqual((head[:15], body), (b"HTTP/1.1 200 OK", document(7, 1)))

    async def test_mutated_requests(self) -> None:
        """Answers are whole and in step, each with a status, headers and a body that is framed; one that refuses what
        cannot be understood closes, and is the last; no other client, memory or log notices. So it is with a token.
        """
        await self.stand("", int(INPUTS * (1 - WITH_SECRET)))
        await self.stand(SECRET, int(INPUTS * WITH_SECRET))

    async def test_nonsense(self) -> None:
        """Heads of odd parts, and bodies that nobody announced, are answered or refused as every request is."""
        await self.assert_stands_nonsense(st.lists(http_requests(), min_size=1, max_size=4))


class Status(UnderAttack, TestCase):
    kind = "status"

    def make_factory(self, secret: str) -> StatusFactory:
        return StatusFactory(StatusCommands(self.cache), Limits(MAX_CONNECTIONS, 300), reactor)

    def replies(self) -> dict[str, str]:
        commands = StatusCommands(self.cache)
        names = ["ruok", "ready", "status", "json", "mntr", "version", "help"]
        names += [f"{name} {dataset}" for name in ("show", "why", "status") for dataset in self.cache.datasets]
        return {name: commands.answer(name) for name in names}

    def in_peace(self, client: socket.socket) -> None:
        client.sendall(b"prompt\nruok\nready\nquit\n")
        self.assertEqual(read_to_the_end(client), b"\nimok\n\nnotready prices:never_loaded\n\n")

    async def test_mutated_requests(self) -> None:
        """Each line gets exactly its commands' replies, or one line of ERROR for what is none, and the port closes
        where it is to; no other client, memory or log notices.
        """
        await self.stand("", INPUTS)

    async def test_nonsense(self) -> None:
        """So it is with lines of commands, separators, control characters and no UTF-8, however they are cut."""
        words = ["ruok", "prompt", "quit", "show", "why", "products", "nope", ";", "refresh", "json", "mntr", "'", "é"]
        words += [" ", "\n", "\r\n", "\r", "\t", "\0", "\u2028", "a" * 200, "\x1b[2J", "{}", "%s"]
        parts = st.sampled_from(words).map(str.encode)
        lines = st.lists(st.one_of(parts, parts, st.binary(max_size=4)), max_size=12).map(b"".join)
        await self.assert_stands_nonsense(st.lists(lines, min_size=1, max_size=5))
