"""Laws of the status port and the admin socket, over real sockets; their clients are plain blocking ones in threads."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import socket
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice import __version__
from cacheservice.base.errors import PortUnavailable, UnknownDataset
from cacheservice.cache.counts import Histogram
from cacheservice.cache.history import Attempt
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ops.exposition import Metrics
from cacheservice.ops.stall import BOUNDS_S
from cacheservice.ports.clients import Limits
from cacheservice.ports.listen import PortService, tcp, unix
from cacheservice.ports.operator_commands import Commands
from cacheservice.ports.status import MAX_LINE_BYTES, StatusFactory, StatusProtocol
from tests.kit.datasets import MOMENT, declared, reading, rows_builder, rows_of
from tests.kit.http import read_to_the_end
from tests.kit.status_port import BLOCKER, filled_cache
from tests.kit.waiting import GIVE_UP_S, until

# What a connected client does with its socket.
Conversation = Callable[[socket.socket], Any]


class AdminRefreshes:
    """Remembers the requested datasets; `running` are those that one follows."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.running: set[str] = set()
        self.accepted: list[str] = []

    def refresh_now(self, name: str) -> bool:
        if name == "gone":
            raise UnknownDataset("unknown dataset 'gone'")
        self.asked.append(name)
        return name not in self.running

    def accept_next(self, name: str) -> None:
        self.accepted.append(name)


def read_text(client: socket.socket) -> str:
    return read_to_the_end(client).decode()


def sending(data: bytes, *, half_close: bool = False) -> Conversation:
    """Send, then read all there is; a connection that is reset raises."""

    def converse(client: socket.socket) -> str:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        return read_text(client)

    return converse


class PortTestCase(TestCase):
    max_connections = 50
    idle_timeout_s = 120.0
    more_datasets = 0

    async def setUp(self) -> None:
        self.cache = filled_cache(self.more_datasets)
        metrics = Metrics(self.cache, Histogram(BOUNDS_S), reactor)
        self.factory = self.make_factory(Commands(self.cache, monitor=metrics.monitor_lines))
        metrics.add_port("status", self.factory)
        self.port = self.listen()
        self.addCleanup(self.close)

    def make_factory(self, commands: Commands) -> StatusFactory:
        return StatusFactory(commands, Limits(self.max_connections, self.idle_timeout_s), reactor)

    def listen(self) -> IListeningPort:
        return tcp(reactor, "127.0.0.1", 0, self.factory)()

    async def close(self) -> None:
        await self.port.stopListening()
        self.factory.close_clients()
        await until(lambda: not self.factory.clients)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port.getHost().port), timeout=GIVE_UP_S)

    def converse(self, conversation: Conversation) -> Deferred[Any]:
        def run() -> Any:
            with closing(self.connect()) as client:
                return conversation(client)

        return deferToThread(run)

    async def ask(self, line: str) -> str:
        """The reply to a line, without its end; the connection closes behind it."""
        reply = await self.converse(sending(f"{line}\n".encode()))
        assert reply.endswith("\n")
        return str(reply[:-1])

    async def assert_asks(self, line: str, reply: str) -> None:
        self.assertEqual(await self.ask(line), reply)


class Replies(PortTestCase):
    async def test_ruok(self) -> None:
        """ruok is answered imok, whatever state the datasets are in."""
        await self.assert_asks("ruok", "imok")

    async def test_ready(self) -> None:
        """`ready` replies ready, or notready with each dataset that is why, and its state."""
        await self.assert_asks("ready", "notready prices:never_loaded")
        self.cache.dataset("prices").publish(Snapshot(1, rows_of({}), MOMENT, 1000.0, ""))
        await self.assert_asks("ready", "ready")
        self.cache.dataset("prices").publish(Snapshot(2, rows_of({}), MOMENT, 1.0, ""))
        await self.assert_asks("ready", "ready")
        self.cache.dataset("prices").change(declared("prices").model_copy(update={"on_expired": "refuse"}))
        await self.assert_asks("ready", "notready prices:expired")

    async def test_version(self) -> None:
        """version is the name and the version."""
        await self.assert_asks("version", f"cacheservice {__version__}")

    async def test_status_of_one(self) -> None:
        """status NAME is the head line and that dataset's line."""
        head, *lines = (await self.ask("status products")).split("\n")
        self.assertTrue(head.startswith("cacheservice "))
        self.assertEqual([line.split()[0] for line in lines], ["products"])

    async def test_status(self) -> None:
        """status is a head line and then a line a dataset, in columns."""
        head, products, prices = (await self.ask("status")).split("\n")
        self.assertEqual(head, f"cacheservice {__version__}: not ready, PostgreSQL down, up 12 s")
        self.assertRegex(
            products,
            r"^products  fresh {9}age 12 s of 3 min {3,}2 rows  generation 3  next in 48 s {4}published in 0\.50 s$",
        )
        self.assertRegex(
            prices,
            r"^prices {4}never_loaded  no age yet, limit 3 min  no rows  generation 0  "
            r"next in 3\.65 s  failed twice: a lock was not granted$",
        )

    async def test_status_while_refreshing(self) -> None:
        """The table shows what is read, how far, and what waits for a connection."""
        products, prices = self.cache.dataset("products"), self.cache.dataset("prices")
        rows = rows_builder()
        rows.add([(b"%d" % number, b"{}") for number in range(1500)])
        reading(products, rows, 2000)
        reading(prices, None)
        _, first, waiting = (await self.ask("status")).split("\n")
        self.assertIn("  reading, 1,500 of 2,000 rows  ", first)
        self.assertIn("  waiting for a connection  ", waiting)

    async def test_status_is_a_line_a_dataset(self) -> None:
        """Whatever a result's key or an error holds, the table has one line for each dataset."""
        rows = rows_builder()
        bad = b"a\nb\r\n\x85\xe2\x80\xa8\x1b[2J\t|"
        try:
            rows.add([(bad, b"1"), (bad, b"2")])
        except Exception as error:
            self.cache.dataset("prices").attempted(Attempt("failed", "start", MOMENT, 1.0, None, str(error)))
        lines = (await self.ask("status")).splitlines()
        self.assertEqual([line.split()[0] for line in lines], ["cacheservice", "products", "prices"])
        self.assertTrue(all(line.isprintable() for line in lines))

    async def test_json(self) -> None:
        """json is one line, an object with exactly the contract's fields and types."""
        line = await self.ask("json")
        self.assertEqual(line.splitlines(), [line])
        everything = json.loads(line)
        self.assertEqual(
            everything,
            {
                "service": {
                    "version": __version__,
                    "pid": os.getpid(),
                    "uptime_s": 12.346,
                    "ready": False,
                    "not_ready": {"prices": "never_loaded"},
                    "connection_cap": None,
                    "configuration_rejected": None,
                },
                "postgres": {
                    "state": "down",
                    "error": "connection refused",
                    "connections": 0,
                    "listening": False,
                    "listening_wanted": False,
                    "listening_problem": None,
                    "standby": None,
                    "recorded_changes": None,
                    "oldest_recorded_change_s": None,
                    "prune_problem": None,
                    "capture": None,
                },
                "datasets": {
                    "products": {
                        "state": "fresh",
                        "refreshing": False,
                        "held": None,
                        "pinned": False,
                        "rows": 2,
                        "bytes": 18,
                        "generation": 3,
                        "as_of": "2026-01-02T03:04:05Z",
                        "age_s": 12.346,
                        "age_uncertain": None,
                        "interval_s": 60.0,
                        "timeout_s": 30.0,
                        "max_age_s": 180.0,
                        "source": "postgres",
                        "progress": None,
                        "consecutive_failures": 0,
                        "next_refresh_in_s": 47.654,
                        "last_attempt": {
                            "outcome": "published",
                            "trigger": "retry",
                            "started_at": "2026-01-02T03:04:05Z",
                            "took_s": 0.5,
                            "rows": 2,
                            "error": None,
                            "advice": None,
                            "blocked_by": [],
                        },
                        "last_change": None,
                        "standby": None,
                        "save_problem": None,
                        "without_deltas_s": None,
                        "capture": None,
                        "not_logical": None,
                    },
                    "prices": {
                        "state": "never_loaded",
                        "refreshing": False,
                        "held": None,
                        "pinned": False,
                        "rows": 0,
                        "bytes": 0,
                        "generation": 0,
                        "as_of": None,
                        "age_s": None,
                        "age_uncertain": None,
                        "interval_s": 60.0,
                        "timeout_s": 30.0,
                        "max_age_s": 180.0,
                        "source": None,
                        "progress": None,
                        "consecutive_failures": 2,
                        "next_refresh_in_s": 3.654,
                        "last_attempt": {
                            "outcome": "failed",
                            "trigger": "retry",
                            "started_at": "2026-01-02T03:04:05Z",
                            "took_s": 27.0,
                            "rows": None,
                            "error": "a lock was not granted",
                            "advice": "end that session",
                            "blocked_by": [str(BLOCKER)],
                        },
                        "last_change": None,
                        "standby": None,
                        "save_problem": None,
                        "without_deltas_s": None,
                        "capture": None,
                        "not_logical": None,
                    },
                },
            },
        )
        counts = [everything["postgres"]["connections"]]
        counts += [everything["datasets"]["products"][name] for name in ("rows", "bytes", "generation")]
        self.assertEqual({type(count) for count in counts}, {int})
        flags = [everything["service"]["ready"], everything["postgres"]["listening"]]
        flags += [everything["datasets"]["products"][name] for name in ("refreshing", "pinned")]
        self.assertEqual({type(flag) for flag in flags}, {bool})

    async def test_json_while_reading(self) -> None:
        """progress is there while a dataset is read: the rows so far, and those expected if anybody knows."""
        products = self.cache.dataset("products")
        for expected in (None, 7):
            reading(products, rows_builder(), expected)
            progress = json.loads(await self.ask("json"))["datasets"]["products"]["progress"]
            self.assertEqual(progress, {"rows": 0, "expected_rows": expected})

    async def test_mntr(self) -> None:
        """mntr is a name, a tab and a number a line, under the names of the metrics page, each name once."""
        lines = (await self.ask("mntr")).split("\n")
        metrics = {}
        for line in lines:
            name, value = line.split("\t")
            metrics[name] = float(value)
            self.assertRegex(name, r'^(cacheservice|process)_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})?$')
        self.assertEqual(len(metrics), len(lines))
        expected = {
            "cacheservice_uptime_seconds": 12.346,
            "cacheservice_ready": 0,
            "cacheservice_postgres_up": 0,
            'cacheservice_connections{port="status"}': 1,
            'cacheservice_dataset_age_seconds{dataset="products"}': 12.346,
            'cacheservice_dataset_last_success_timestamp_seconds{dataset="products"}': MOMENT.timestamp(),
            'cacheservice_dataset_rows{dataset="products"}': 2,
            'cacheservice_dataset_bytes{dataset="products"}': 18,
            'cacheservice_dataset_generation{dataset="products"}': 3,
            'cacheservice_dataset_state{dataset="products",state="fresh"}': 1,
            'cacheservice_dataset_state{dataset="products",state="stale"}': 0,
            'cacheservice_dataset_state{dataset="prices",state="never_loaded"}': 1,
            'cacheservice_dataset_held{dataset="prices"}': 0,
            'cacheservice_refresh_total{dataset="products",outcome="published"}': 1,
            'cacheservice_refresh_total{dataset="prices",outcome="failed"}': 2,
        }
        self.assertEqual({name: metrics.get(name) for name in expected}, expected)
        self.assertNotIn('cacheservice_dataset_age_seconds{dataset="prices"}', metrics)

    async def test_show(self) -> None:
        """show is a field a line, and the last 10 attempts, newest first."""
        products = self.cache.dataset("products")
        for number in range(12):
            products.attempted(Attempt("failed", "interval", MOMENT, 1.0, None, f"failure {number}"))
        lines = (await self.ask("show products")).split("\n")
        fields = [line.split(": ", 1) for line in lines]
        self.assertTrue(all(len(field) == 2 for field in fields), lines)
        shown = dict(field for field in fields if field[0] != "attempt")
        expected = {"dataset": "products", "state": "fresh", "rows": "2", "generation": "3", "held": "-"}
        expected |= {"as_of": "2026-01-02T03:04:05Z", "age_s": "12.346", "key": "id", "required": "true"}
        self.assertEqual({name: shown.get(name) for name in expected}, expected)
        attempts = [value for name, value in fields if name == "attempt"]
        self.assertEqual([words.rsplit(" ", 1)[1] for words in attempts], [str(n) for n in range(11, 1, -1)])
        self.assertEqual(attempts[0], "2026-01-02T03:04:05Z interval failed in 1.00 s: failure 11")

    async def test_why(self) -> None:
        """why is sentences: the state and its limit, the last error, the blockers, what to do, and the next attempt."""
        await self.assert_asks(
            "why prices",
            "prices has never been loaded, so readers get nothing from it yet.\n"
            "The last attempt failed 12 s ago, after 27 s: a lock was not granted.\n"
            "It has failed twice in a row.\n"
            "It was blocked: session 42 of app (psql) holds AccessExclusiveLock on public.products, in a transaction "
            "since 2026-01-02T03:04:05Z, idle in transaction, last ran UPDATE.\n"
            "What to do: end that session.\n"
            "The next attempt starts in 3.65 s.",
        )
        self.assertEqual(
            (await self.ask("why products")).split("\n"),
            [
                "products is fresh: it is 12 s old, the limit is 3 min.",
                "Generation 3 with 2 rows is served, as of 2026-01-02T03:04:05+00:00 by the database's clock.",
                "The next attempt starts in 48 s.",
            ],
        )

    async def test_help(self) -> None:
        """help has a line for each command of this port and for none of the other."""
        lines = (await self.ask("help")).split("\n")
        words = [line.split()[0] for line in lines]
        commands = ["ruok", "ready", "status", "json", "mntr", "show", "why", "version", "help", "prompt", "quit"]
        self.assertEqual(words, [*commands, "A;B"])

    async def test_no_secret_and_no_row(self) -> None:
        """No reply shows a row or the query."""
        said = await self.ask("status;json;mntr;show products;why products;help")
        for secret in ('{"id":1}', "SELECT"):
            self.assertNotIn(secret, said)


class Lines(PortTestCase):
    async def test_ends_of_lines(self) -> None:
        """LF and CRLF both end a line, and blanks around a command do not matter."""
        for line in (b"ruok\n", b"ruok\r\n", b"  ruok\t \n"):
            self.assertEqual(await self.converse(sending(line)), "imok\n")

    async def test_several_on_one_line(self) -> None:
        """Commands separated by ; are answered one after the other, empty ones are nothing, an error stops none."""
        await self.assert_asks(
            "ruok;version ; ; nonsense;ready;",
            "\n".join(
                [
                    "imok",
                    f"cacheservice {__version__}",
                    "ERROR unknown command 'nonsense'; try help",
                    "notready prices:never_loaded",
                ]
            ),
        )
        await self.assert_asks("ruok;quit;ruok", "imok")

    async def test_prompt(self) -> None:
        """After prompt the connection stays open, each reply ends with an empty line, and quit closes."""

        def converse(client: socket.socket) -> list[str]:
            with client.makefile("rw", encoding="utf-8", newline="\n") as stream:
                replies = []
                for line in ("prompt", "ruok", "nonsense", "ready;ruok\r"):
                    stream.write(f"{line}\n")
                    stream.flush()
                    count = 2 if ";" in line else 1
                    for _ in range(count):
                        replies.append("".join(iter(stream.readline, "\n")))
                stream.write("quit\n")
                stream.flush()
                return [*replies, stream.read()]

        self.assertEqual(
            await self.converse(converse),
            [
                "",
                "imok\n",
                "ERROR unknown command 'nonsense'; try help\n",
                "notready prices:never_loaded\n",
                "imok\n",
                "",
            ],
        )

    async def test_two_lines_without_prompt(self) -> None:
        """Without prompt all after the first line is ignored, but its reply is never lost by a reset."""
        for more in (b"ready\n", b"quit\n", b"x" * 1_000_000):
            self.assertEqual(await self.converse(sending(b"ruok\n" + more)), "imok\n")

    async def test_unknown_commands(self) -> None:
        """An unknown command gets one line that names it, with the nearest known one if there is any."""
        await self.assert_asks("rouk", "ERROR unknown command 'rouk'; did you mean 'ruok'?")
        await self.assert_asks("nonsense", "ERROR unknown command 'nonsense'; try help")
        shown = "x" * 40
        await self.assert_asks("x" * 200, f"ERROR unknown command '{shown}'; try help")
        await self.assert_asks("\x1b[2J\u20ac", "ERROR unknown command '\\x1b[2J\\u20ac'; try help")

    async def test_bad_arguments(self) -> None:
        """A missing, wrong or superfluous argument gets one line that names the mistake."""
        for line, reply in (
            ("show", "ERROR show takes one argument: show NAME"),
            ("why a b", "ERROR why takes one argument: why NAME"),
            ("ruok 1", "ERROR ruok takes no argument: ruok"),
            ("status products prices", "ERROR status takes at most one argument: status [NAME]"),
            ("status nope", "ERROR unknown dataset 'nope'; status lists them"),
            ("prompt 1", "ERROR prompt takes no argument: prompt"),
            ("quit now", "ERROR quit takes no argument: quit"),
            ("show product", "ERROR unknown dataset 'product'; did you mean 'products'?"),
            ("why nonsense", "ERROR unknown dataset 'nonsense'; status lists them"),
            ("", "ERROR no command; try help"),
            (" ; ;", "ERROR no command; try help"),
        ):
            await self.assert_asks(line, reply)

    async def test_admin_commands_are_refused(self) -> None:
        """On the status port a command that changes something is answered as an admin command."""
        for line in ("refresh products", "refresh all", "refresh"):
            await self.assert_asks(line, "ERROR refresh is an admin command")

    async def test_the_longest_line(self) -> None:
        """256 bytes are a line, whichever way it ends; 257 are refused, also before the line has an end."""
        too_long = f"ERROR the line is longer than {MAX_LINE_BYTES} bytes\n"
        self.assertEqual(MAX_LINE_BYTES, 256)
        for end in (b"\n", b"\r\n"):
            self.assertEqual(await self.converse(sending(b"ruok" + b" " * 252 + end)), "imok\n")
            self.assertEqual(await self.converse(sending(b"ruok" + b" " * 253 + end)), too_long)
        self.assertEqual(await self.converse(sending(b"ruok" + b" " * 252, half_close=True)), "imok\n")
        self.assertEqual(await self.converse(sending(b"ruok" + b" " * 253, half_close=True)), too_long)
        for size in (258, 1000, 1_000_000):
            self.assertEqual(await self.converse(sending(b"x" * size)), too_long)

    async def test_too_long_after_prompt(self) -> None:
        """After prompt, too, a line too long is reported and ends the connection."""
        reply = await self.converse(sending(b"prompt\nruok\n" + b"x" * 300 + b"\nruok\n"))
        self.assertEqual(reply, f"\nimok\n\nERROR the line is longer than {MAX_LINE_BYTES} bytes\n\n")

    async def test_half_closed(self) -> None:
        """A client that closes its side first, as `printf status | nc -N` does, gets its reply, newline or not."""
        for data, reply in (
            (b"ruok\n", "imok\n"),
            (b"ruok", "imok\n"),
            (b"ruok\r", "imok\n"),
            (b"", ""),
            (b"prompt\nruok", "\nimok\n\n"),
            (b"prompt\nruok\nready\n", "\nimok\n\nnotready prices:never_loaded\n\n"),
            (b"prompt\n" + b"ruok\n" * 100, "\n" + "imok\n\n" * 100),
        ):
            self.assertEqual(await self.converse(sending(data, half_close=True)), reply)

    async def test_a_half_closed_client_is_let_go(self) -> None:
        """When both sides have sent all, the connection is closed at once, though the client never closes it."""
        held = await deferToThread(self.connect)
        self.addCleanup(held.close)
        await deferToThread(sending(b"ruok", half_close=True), held)
        await until(lambda: not self.factory.clients)

    async def test_one_byte_at_a_time(self) -> None:
        """A line that comes byte by byte is a line."""

        def converse(client: socket.socket) -> str:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"ruok;version\r\n":
                client.sendall(bytes([byte]))
                time.sleep(0.001)
            return read_text(client)

        self.assertEqual(await self.converse(converse), f"imok\ncacheservice {__version__}\n")


class Strangers(PortTestCase):
    """Clients that speak something else."""

    async def test_http(self) -> None:
        """An HTTP request gets one ERROR line and the end of the connection."""
        reply = await self.converse(sending(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"))
        self.assertEqual(reply, "ERROR unknown command 'GET'; try help\n")

    async def test_binary(self) -> None:
        """Binary garbage, whole or cut off, gets ERROR lines at most, and nothing is logged."""
        garbage = random.Random(7)
        for size in (1, 10, 300, 5000, 200_000):
            reply = await self.converse(sending(garbage.randbytes(size), half_close=True))
            self.assertTrue(all(line.startswith("ERROR ") for line in reply.splitlines()), reply)
        tls_hello = bytes.fromhex("16030100c8010000c40303") + garbage.randbytes(193)
        self.assertTrue((await self.converse(sending(tls_hello, half_close=True))).startswith("ERROR "))
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_connect_and_leave(self) -> None:
        """Clients that connect and leave, politely or by a reset, leave nothing behind."""

        def reset(client: socket.socket) -> None:
            client.sendall(b"prompt\njson\n" * 10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        for conversation in (lambda client: None, reset):
            for _ in range(10):
                await self.converse(conversation)
        await until(lambda: not self.factory.clients)
        self.assertEqual(self.flushLoggedErrors(), [])


class Load(PortTestCase):
    more_datasets = 300  # makes a json of 150 kB

    async def test_a_client_that_never_reads(self) -> None:
        """For a client that asks and never reads a reply or two are held; others are answered; it loses nothing."""
        lines = 1000
        sent = threading.Event()

        def flood(client: socket.socket) -> int:
            data = b"prompt\n" + b"json\n" * lines + b"quit\n"
            client.sendall(data)
            sent.wait()
            replies = read_text(client)
            return replies.count("\n\n")

        def held_bytes(client: StatusProtocol) -> int:
            transport = client.transport
            return len(transport.dataBuffer) + sum(map(len, transport._tempDataBuffer))

        self.addCleanup(sent.set)
        flooding = self.converse(flood)
        await until(lambda: any(client.is_choked for client in self.factory.clients))
        one_reply = len(await self.ask("json"))
        for _ in range(20):
            self.assertEqual(await self.ask("ruok"), "imok")
            self.assertLess(sum(map(held_bytes, self.factory.clients)), 3 * one_reply + 65_536)
        sent.set()
        self.assertEqual(await flooding, lines)

    async def test_a_slow_reader(self) -> None:
        """A reply that is read slowly is never cut off, however long it takes, as long as it is read in time."""

        def read_slowly(client: socket.socket) -> str:
            client.sendall(b";".join([b"json"] * 50) + b"\n")
            time.sleep(3)
            return read_text(client)

        replies = (await self.converse(read_slowly)).splitlines()
        self.assertEqual([len(json.loads(reply)["datasets"]) for reply in replies], [302] * 50)

    async def test_many_lines_in_one_write(self) -> None:
        """13,000 lines in one write are all answered, and another client is answered before they are through."""
        done: list[str] = []
        flooding = self.converse(sending(b"prompt\n" + b"ruok\n" * 13_000 + b"quit\n")).addCallback(done.append)
        await until(lambda: self.factory.clients)
        self.assertEqual(await self.ask("ruok"), "imok")
        self.assertEqual(done, [])
        await flooding
        self.assertEqual(done, ["\n" + "imok\n\n" * 13_000])

    async def test_many_lines_without_prompt(self) -> None:
        """Of 13,000 lines without prompt the first is answered, and the connection ends in order."""
        self.assertEqual(await self.converse(sending(b"ruok\n" * 13_000)), "imok\n")


class FewConnections(PortTestCase):
    max_connections = 2

    async def test_the_limit(self) -> None:
        """One client too many is answered if it asks at once, and otherwise rejected in a line; however many wait."""
        held = [await deferToThread(self.connect) for _ in range(2)]
        for client in held:
            self.addCleanup(client.close)
        await until(lambda: len(self.factory.clients) == 2)
        self.assertEqual(await self.converse(read_text), "ERROR too many connections, the limit is 2\n")
        waiting = [await deferToThread(self.connect) for _ in range(50)]
        for client in waiting:
            self.addCleanup(client.close)
        for _ in range(3):
            await self.assert_asks("ruok", "imok")
            await self.assert_asks("ready", "notready prices:never_loaded")
        self.assertEqual(await deferToThread(read_text, waiting[0]), "ERROR too many connections, the limit is 2\n")
        await until(lambda: len(self.factory.clients) <= 2 + 16)
        self.assertGreaterEqual(self.factory.rejected["too_many_connections"], 35)


class ShortPatience(PortTestCase):
    idle_timeout_s = 0.3

    async def test_silence(self) -> None:
        """A client that sends nothing, at first or after prompt, or never ends its line, is dropped."""

        def wait(first: bytes) -> Conversation:
            def converse(client: socket.socket) -> bool:
                client.sendall(first)
                with contextlib.suppress(ConnectionResetError):
                    read_text(client)
                return True

            return converse

        for first in (b"", b"prompt\n", b"ru"):
            self.assertTrue(await self.converse(wait(first)))

    async def test_bytes_without_a_line(self) -> None:
        """Bytes that make no line do not count as asking: a slow sender is dropped as well."""

        def trickle(client: socket.socket) -> bool:
            try:
                for _ in range(250):
                    client.sendall(b" ")
                    time.sleep(0.02)
            except (ConnectionResetError, BrokenPipeError):
                return True
            return False

        self.assertTrue(await self.converse(trickle))

    async def test_a_client_that_never_reads(self) -> None:
        """A client that floods and never reads is dropped, whether or not it still sends."""
        self.factory.commands = Commands(filled_cache(300))
        for data in (b"prompt\n" + b"json;" * 50 + b"\n", b"json;" * 50 + b"\n"):
            held = await deferToThread(self.connect)
            self.addCleanup(held.close)
            held.setblocking(False)
            gone = False
            while not gone:
                try:
                    held.send(data)
                except BlockingIOError:
                    pass
                except (ConnectionResetError, BrokenPipeError):
                    gone = True
                await deferLater(reactor, 0.01)
            await until(lambda: not self.factory.clients)


class Admin(PortTestCase):
    def make_factory(self, commands: Commands) -> StatusFactory:
        self.refreshes = AdminRefreshes()
        return super().make_factory(Commands(self.cache, self.refreshes))

    def listen(self) -> IListeningPort:
        self.directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.path = self.directory / "admin.sock"
        self.service = PortService(
            "admin.socket", unix(reactor, str(self.path), self.factory), self.factory.close_clients
        )
        self.service.privilegedStartService()
        self.service.startService()
        return self.service

    async def close(self) -> None:
        await self.service.stopService()
        await until(lambda: not self.factory.clients)
        for left in self.directory.iterdir():
            left.unlink()
        self.directory.rmdir()

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(GIVE_UP_S)
        client.connect(str(self.path))
        return client

    async def test_refresh(self) -> None:
        """refresh starts a refresh, or replies that it follows the one that runs, for one dataset or for all."""
        self.refreshes.running.add("prices")
        await self.assert_asks("refresh products", "OK products: refresh started")
        await self.assert_asks("refresh prices", "OK prices: refresh follows the one that is running")
        both = "OK products: refresh started\nOK prices: refresh follows the one that is running"
        await self.assert_asks("refresh all", both)
        self.assertEqual(self.refreshes.asked, ["products", "prices", "products", "prices"])

    async def test_accept(self) -> None:
        """accept lets the next result of one dataset through, and replies how to have it now."""
        await self.assert_asks(
            "accept products",
            "OK products: the next result is published even if a gate refuses it; 'refresh products' reads it now",
        )
        self.assertEqual(self.refreshes.accepted, ["products"])
        await self.assert_asks("accept nope", "ERROR unknown dataset 'nope'; status lists them")

    async def test_bad_arguments(self) -> None:
        """An unknown dataset is an error line and starts nothing."""
        await self.assert_asks("refresh product", "ERROR unknown dataset 'product'; did you mean 'products'?")
        await self.assert_asks("refresh", "ERROR refresh takes one argument: refresh NAME")
        await self.assert_asks("refrsh all", "ERROR unknown command 'refrsh'; did you mean 'refresh'?")
        self.assertEqual(self.refreshes.asked, [])

    async def test_questions_too(self) -> None:
        """The admin socket answers every question of the status port, and its help names what it has more."""
        await self.assert_asks("ruok;ready", "imok\nnotready prices:never_loaded")
        self.assertIn("\nrefresh NAME ", await self.ask("help"))

    async def test_only_its_owner(self) -> None:
        """The socket has mode 600 and is gone after stop, with its clients."""
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        held = await deferToThread(self.connect)
        self.addCleanup(held.close)
        await until(lambda: self.factory.clients)
        await self.service.stopService()
        await until(lambda: not self.factory.clients)
        self.assertFalse(self.path.exists())

    def test_only_its_owner_from_the_first_moment(self) -> None:
        """Already when the socket is bound, and not only after, the umask keeps everybody else out."""

        class Binding:
            def listenUNIX(self, *_: object, **__: object) -> int:
                mask = os.umask(0o777)
                os.umask(mask)
                return mask

        mask: Any = unix(Binding(), str(self.directory / "other"), self.factory)()
        self.assertEqual(0o666 & ~mask, 0o600)

    async def test_the_umask_is_as_before(self) -> None:
        """Making the socket leaves the process's umask as it was."""
        mask = os.umask(0o022)
        os.umask(mask)
        again = PortService(
            "admin.socket", unix(reactor, str(self.directory / "other"), self.factory), self.factory.close_clients
        )
        again.privilegedStartService()
        self.assertEqual(os.umask(mask), mask)
        await again.stopService()


class InTheWay(TestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(self.directory.rmdir)
        self.path = self.directory / "admin.sock"
        self.addCleanup(lambda: self.path.unlink(missing_ok=True))
        self.factory = StatusFactory(Commands(filled_cache()), Limits(10, 60.0), reactor)

    def service(self, path: Path) -> PortService:
        return PortService("admin.socket", unix(reactor, str(path), self.factory), self.factory.close_clients)

    def refused(self, service: PortService) -> str:
        with self.assertRaises(PortUnavailable) as caught:
            service.privilegedStartService()
        self.assertIsNone(service.address)
        self.successResultOf(service.stopService())
        message = str(caught.exception)
        del caught
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()  # Twisted leaves it to this to close the socket that it could not bind
        self.assertEqual(message.splitlines(), [message])
        return message

    async def test_a_stale_socket(self) -> None:
        """A socket that nobody listens on any more, left by a crash, is replaced."""
        with socket.socket(socket.AF_UNIX) as crashed:
            crashed.bind(str(self.path))
        service = self.service(self.path)
        service.privilegedStartService()
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        await service.stopService()

    async def test_a_live_socket(self) -> None:
        """A socket that somebody listens on is left to him, and the start refused in one line."""
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(self.path))
            other.listen(1)
            message = self.refused(self.service(self.path))
            self.assertIn(f"admin.socket: cannot listen on {self.path}: address already in use", message)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.path))

    def test_a_file(self) -> None:
        """A regular file in the way is left alone, and the start refused in one line."""
        self.path.write_text("mine")
        self.assertIn(f"cannot listen on {self.path}: address already in use", self.refused(self.service(self.path)))
        self.assertEqual(self.path.read_text(), "mine")

    def test_no_such_directory(self) -> None:
        """A socket in a directory that is not there is refused in one line."""
        self.assertIn(
            f"no such file or directory; make the folder {self.directory}/absent, or set another",
            self.refused(self.service(self.directory / "absent" / "sock")),
        )

    def test_too_long_a_path(self) -> None:
        """A path that no socket can have is refused in one line."""
        self.assertIn("path too long", self.refused(self.service(self.directory / ("x" * 200))))

    def test_a_port_that_is_taken(self) -> None:
        """A TCP port that is taken is refused in one line that names the setting and what to do."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            service = PortService("status.port", tcp(reactor, "localhost", port, self.factory), lambda: None)
            self.assertEqual(
                self.refused(service),
                f"status.port: cannot listen on 127.0.0.1:{port}: address already in use; "
                "end what uses it, or set another",
            )

    async def test_a_port_that_was_just_left(self) -> None:
        """A port can be listened on again at once after a stop with clients connected."""
        service = PortService("status.port", tcp(reactor, "127.0.0.1", 0, self.factory), self.factory.close_clients)
        service.privilegedStartService()
        port = service.address.port
        with socket.create_connection(("127.0.0.1", port)):
            await until(lambda: self.factory.clients)
            await service.stopService()
            again = PortService("status.port", tcp(reactor, "127.0.0.1", port, self.factory), lambda: None)
            again.privilegedStartService()
            await again.stopService()
        await until(lambda: not self.factory.clients)
