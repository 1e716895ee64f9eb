"""Laws of change streams over real sockets: of the port, behind nginx, and of the whole service."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.cache.changes import ChangeCount
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.http import changes
from cacheservice.ports.http.bodies import PIECE_BYTES
from cacheservice.ports.listen import PortService
from tests.kit.browser import running_browser
from tests.kit.daemon import Daemon
from tests.kit.datasets import MOMENT_WITH_MS, rows_of
from tests.kit.http_port import PortTestCase, buffered, encoded
from tests.kit.mirror import Mirror, Parser
from tests.kit.nginx import start_nginx
from tests.kit.paths import ROOT
from tests.kit.ports import free_port
from tests.kit.real_service import RealServiceTestCase
from tests.kit.waiting import GIVE_UP_S, until, wait_until
from tests.kit.workers import server_at, workers_of

PATH = "/v1/datasets/products/changes"
SSE, NDJSON = "text/event-stream", "application/x-ndjson"


class Follower:
    """A client of a change stream, with a thread of its own, until the stream ends or `close`."""

    def __init__(self, port: int, path: str = PATH, mirror: Mirror | None = None, **headers: str) -> None:
        self.mirror = mirror or Mirror()
        self.mirror.connected()
        self.is_over = self.is_complete = False
        self.size_bytes = 0
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GIVE_UP_S)
        lines = {"Accept": NDJSON} | {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request("GET", path, headers=lines)
        self._socket = self._connection.sock
        self.address = self._socket.getsockname()
        self.response = self._connection.getresponse()
        self.headers = {name.lower(): value for name, value in self.response.getheaders()}
        assert self.response.status == 200, self.response.read()
        self.parser = Parser(self.headers["content-type"])
        self._zip = zlib.decompressobj(31) if self.headers.get("content-encoding") == "gzip" else None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := self.response.read1(65_536):
                self.size_bytes += len(data)
                for event in self.parser.feed(self._zip.decompress(data) if self._zip else data):
                    self.mirror.apply(event)
            self.is_complete = self.parser.is_between_events and (self._zip is None or self._zip.eof)
        except (OSError, ValueError, AttributeError, http.client.HTTPException):  # it was ended in between
            pass
        self.is_over = True

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the service may have been first
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.response.close()
        self._connection.close()


def _request(**headers: str) -> bytes:
    lines = [
        f"GET {PATH} HTTP/1.1",
        "Host: a",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def numbered(count: int, document: bytes = b'{"n":1}', first: int = 0) -> Rows:
    return rows_of((b"%d" % number, document) for number in range(first, first + count))


class ChangesTestCase(PortTestCase):
    async def follow(self, path: str = PATH, mirror: Mirror | None = None, port: int = 0, **headers: str) -> Follower:
        port = port or self.port.getHost().port
        follower: Follower = await deferToThread(Follower, port, path, mirror, **headers)
        self.addCleanup(deferToThread, follower.close)
        return follower

    def publish_changes(self, rows: Rows) -> None:
        """Publish the next generation with the rows that differ."""
        before = self.products.snapshot
        assert before is not None
        count = ChangeCount(before.rows, rows)
        for _ in count:
            pass
        snapshot = Snapshot(before.generation + 1, rows, MOMENT_WITH_MS, self.clock.seconds(), "1:1:")
        self.products.publish(snapshot, count.delta)

    def rows(self) -> dict[str, Any]:
        assert self.products.snapshot is not None
        return {key.decode(): json.loads(document) for key, document in self.products.snapshot.rows.items()}

    async def until_current(self, follower: Follower) -> None:
        await until(lambda: follower.mirror.generation == self.products.last_generation)
        self.assertEqual(follower.mirror.rows, self.rows())


class Streams(ChangesTestCase):
    idle_timeout_s = 1.0

    async def test_both_forms(self) -> None:
        """Both forms, plain and as gzip, have the same events, each as soon as it happens."""
        asked = [
            (accept, coding)
            for accept in (SSE, NDJSON, "*/*", "application/x-ndjson;q=0.5, text/event-stream;q=0.4")
            for coding in ("identity", "gzip")
        ]
        followers = [await self.follow(Accept=accept, Accept_Encoding=coding) for accept, coding in asked]
        for follower, (accept, coding) in zip(followers, asked, strict=True):
            headers = follower.headers
            self.assertEqual(headers["content-type"], SSE if accept in (SSE, "*/*") else NDJSON)
            self.assertEqual(headers.get("content-encoding"), "gzip" if coding == "gzip" else None)
            self.assertEqual((headers["cache-control"], headers["vary"]), ("no-store", "Accept, Accept-Encoding"))
            self.assertEqual((headers["x-accel-buffering"], headers["connection"]), ("no", "close"))
            await self.until_current(follower)
        for number in range(5):
            self.publish_changes(numbered(1000 + 10 * number, first=number))
            for follower in followers:
                await self.until_current(follower)
        events = followers[0].mirror.events
        self.assertEqual(events[0], {"event": "snapshot", "dataset": "products", "generation": 17, "rows": 6})
        for follower in followers:
            self.assertEqual(follower.mirror.events, events)
        self.assertLess(followers[1].size_bytes, followers[0].size_bytes / 3)
        self.assertEqual(self.products.counts.http.hits, len(followers))

    async def test_head(self) -> None:
        """HEAD has GET's status and headers, and no stream."""
        for headers in ({}, {"Accept": NDJSON}, {"Accept_Encoding": "gzip"}):
            get = await self.follow(**{"Accept": SSE} | headers)
            head = await self.ask(PATH, "HEAD", **{"Accept": SSE} | headers)
            for name in ("date", "transfer-encoding"):
                get.headers.pop(name)
                head.headers.pop(name, None)
            self.assertEqual((head.status, head.headers, head.body), (200, get.headers, b""))
        self.assertEqual(self.factory.changes.count, 3)

    async def test_http_1_0(self) -> None:
        """Where there are no chunks, the stream is framed by the connection's end."""
        with closing(self.connect()) as client:
            client.sendall(f"GET {PATH} HTTP/1.0\r\n\r\n".encode())
            text = b""
            while b"event: generation" not in text:
                text += await deferToThread(client.recv, 65_536)
        self.assertNotIn(b"Transfer-Encoding", text)
        self.assertIn(b"\r\n\r\nretry: ", text)

    async def test_resume(self) -> None:
        """`after` and Last-Event-ID are where a client was; the header wins, as browsers keep their first URL."""
        first = await self.follow()
        await self.until_current(first)
        position = first.mirror.position
        self.publish_changes(encoded({"1": "18"}))
        for path, headers in (
            (f"{PATH}?after={position}", {}),
            (f"{PATH}?after=17", {}),
            (f"{PATH}?after=17", {"Last_Event_ID": ""}),
            (f"{PATH}?after=3", {"Last_Event_ID": position}),
            (PATH, {"Last_Event_ID": "17"}),
        ):
            mirror = Mirror()
            mirror.rows = dict.fromkeys(first.mirror.states[0][1], 0)
            follower = await self.follow(path, mirror, **headers)
            await self.until_current(follower)
            self.assertEqual(mirror.kinds(), ["rows", "rows", "generation"], path)
        for text in ("16", "18-1", "x", "-1", "9" * 30, "é"):
            follower = await self.follow(Last_Event_ID=text)
            await self.until_current(follower)
            self.assertEqual(follower.mirror.kinds()[0], "snapshot", text)

    async def test_refusals(self) -> None:
        """What cannot be streamed is refused as other reads are."""
        await self.assert_problem("/v1/datasets/nope/changes", 404, "unknown dataset 'nope'")
        await self.assert_problem(f"{PATH}/", 404, "nothing at this path")
        await self.assert_problem(PATH, 405, "this port only reads", "POST")
        answer = await self.assert_problem("/v1/datasets/prices/changes", 503, "prices has not been loaded yet")
        self.assertIn("retry-after", answer.headers)
        for value in ("", "-1", "x", "1.5", "1-", "9" * 20, "1&after=2", "%31%00", "1-2-3"):
            await self.assert_problem(f"{PATH}?after={value}", 400, "after must be given once")
        await self.assert_problem(f"{PATH}?afte=1", 400, "did you mean 'after'?")
        await self.assert_problem(f"{PATH}?max_age=1", 400, "this path takes after")
        await self.assert_problem(PATH, 406, "text/event-stream or application/x-ndjson", Accept="application/json")
        await self.assert_problem(PATH, 406, "plain or as gzip", Accept_Encoding="identity;q=0, br")
        self.assertEqual(self.factory.changes.count, 0)

    async def test_heartbeats(self) -> None:
        """They keep a client that reads, also longer than its idle timeout, through gzip too."""
        self.patch(changes, "HEARTBEAT_S", 0.1)
        followers = [await self.follow(Accept=form, Accept_Encoding="gzip") for form in (SSE, NDJSON)]
        await until(lambda: followers[0].parser.comments > 15)
        await until(lambda: followers[1].mirror.kinds().count("alive") > 15)
        self.publish_changes(encoded({"1": "18"}))
        for follower in followers:
            await self.until_current(follower)

    async def test_a_client_that_does_not_read(self) -> None:
        """It costs a few pieces of memory, however much is published, until it is dropped."""
        for accept in (SSE, NDJSON):
            for coding in ("identity", "gzip"):
                with closing(self.connect(receive_bytes=4096)) as client:
                    client.sendall(_request(Accept=accept, Accept_Encoding=coding))
                    await until(lambda: self.factory.clients)
                    (connection,) = self.factory.clients
                    number = 0
                    while connection in self.factory.clients:
                        number += 1
                        # Random documents, because others would be too small as gzip.
                        rows = rows_of((b"%d" % key, b'"%b"' % os.urandom(50).hex().encode()) for key in range(5000))
                        self.publish(rows, self.products.last_generation + 1)
                        self.assertLessEqual(buffered(connection), 4 * PIECE_BYTES)
                        await deferLater(reactor, 0.02)
                self.assertEqual(self.factory.changes.count, 0)
        self.assertEqual(self.factory.rejected["slow_client"], 4)

    async def test_clients_that_leave(self) -> None:
        """Nothing is left of a client that resets, closes or half-closes, while it waits or during a snapshot."""
        document = b'"%b"' % (b"x" * 1000)
        for rows in (encoded({"1": "1"}), numbered(20_000, document)):
            self.publish(rows, self.products.last_generation + 1)
            for how in ("reset", "close", "half-close"):
                client = self.connect(receive_bytes=4096)
                client.sendall(_request(Accept_Encoding="gzip"))
                await until(lambda: self.factory.changes.count == 1)
                await deferToThread(client.recv, 1000)
                if how == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if how == "half-close":
                    client.shutdown(socket.SHUT_WR)
                    await deferToThread(lambda: [None for _ in iter(lambda: client.recv(1 << 20), b"")])  # noqa: B023
                client.close()
                await until(lambda: not self.factory.clients)
                self.assertEqual(self.factory.changes.count, 0)

    async def test_a_large_change(self) -> None:
        """A generation with many rows and large documents arrives whole, to many clients at once."""
        followers = [
            await self.follow(Accept=form, Accept_Encoding="gzip") for form in (SSE, NDJSON) for _ in range(10)
        ]
        table = {b"%d" % number: b'{"n":%d}' % number for number in range(900)}
        self.publish_changes(rows_of(table | {b"large": b'"%b"' % (b"x" * 3_000_000)}))
        for follower in followers:
            await self.until_current(follower)
            self.assertEqual([generation for generation, _ in follower.mirror.states], [17, 18])


class Stop(ChangesTestCase):
    async def close(self) -> None:
        """The test has stopped the port."""
        self.assertEqual(self.factory.clients, set())

    async def stopped(self) -> None:
        """Stop the port as the service does."""
        service = PortService("http.port", lambda: self.port, self.factory.close_clients, self.factory.end_replies)
        service.privilegedStartService()
        service.startService()
        await service.stopService()
        await until(lambda: not self.factory.clients)

    async def test_after_a_whole_event(self) -> None:
        """A stream ends after a whole event, with the end of its body, whether it waits or receives a snapshot."""
        self.publish(numbered(50_000, b'"%b"' % (b"x" * 100)), 18)
        waiting = [
            await self.follow(Accept=form, Accept_Encoding=coding)
            for form in (SSE, NDJSON)
            for coding in ("gzip", "identity")
        ]
        for follower in waiting:
            await self.until_current(follower)
        during = [
            await self.follow(Accept=form, Accept_Encoding=coding)
            for form in (SSE, NDJSON)
            for coding in ("gzip", "identity")
        ]
        await self.stopped()
        for follower in (*waiting, *during):
            await until(lambda follower=follower: follower.is_over)
            self.assertTrue(follower.is_complete)
        self.assertEqual(self.factory.changes.count, 0)

    async def test_one_that_does_not_read(self) -> None:
        """It does not hold up the stop for longer than its second, and nor do other endless replies at all."""
        self.publish(numbered(50_000, b'"%b"' % (b"x" * 100)), 18)
        with closing(self.connect(receive_bytes=4096)) as client, closing(self.connect()) as dashboard:
            dashboard.sendall(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
            client.sendall(_request())
            await until(lambda: self.factory.changes.count == 1)
            await self.stopped()
        self.assertEqual(self.factory.changes.count, 0)


class WithToken(ChangesTestCase):
    token = "secret"

    async def test_access(self) -> None:
        """A stream needs the token for reading."""
        await self.assert_problem(PATH, 401, "token")
        await self.assert_problem("/v1/datasets/nope/changes", 401, "token")
        await self.until_current(await self.follow(Authorization="Bearer secret"))


class Few(ChangesTestCase):
    max_connections = 2

    async def test_streams_count_as_clients(self) -> None:
        """limits.max_connections counts them."""
        for _ in range(2):
            await self.follow()
        self.assertEqual((await self.ask("/v1/datasets")).status, 503)


class BehindNginx(ChangesTestCase):
    async def test_it_lets_events_through(self) -> None:
        """With nginx in front, each event arrives as soon as it happens, and a client that leaves is noticed."""
        port: int = await deferToThread(start_nginx, self.addCleanup, self.port.getHost().port, ROOT / "examples")
        followers = [
            await self.follow(port=port, Accept=form, Accept_Encoding=coding)
            for form in (SSE, NDJSON)
            for coding in ("identity", "gzip")
        ]
        for number in range(18, 28):
            self.publish_changes(encoded({"1": f"{number}"}))
            for follower in followers:
                await self.until_current(follower)
        for follower in followers:
            self.assertEqual(len(follower.mirror.states), 11)
            await deferToThread(follower.close)
        await until(lambda: self.factory.changes.count == 0)


SHOP = """
[datasets.products]
query = "TABLE products"
key = "id"
interval_s = 0.2
max_age_s = 600
retry_initial_s = 0.1
retry_max_s = 0.3
"""


class Service(RealServiceTestCase):
    """The whole service, whose table a test changes."""

    def setUp(self) -> None:
        super().setUp()
        self.sql("CREATE TABLE products AS SELECT i AS id, 0 AS n FROM generate_series(1, 3000) AS i")
        self.port = free_port()

    def sql(self, statement: str) -> None:
        self.server.run_sql(statement, self.database)

    def serve(self, *, saved: bool = False, workers: int = 0) -> Daemon:
        more = f'[persistence]\ndirectory = "{self.directory / "saved"}"\nmin_save_interval_s = 0\n' if saved else ""
        more += f"[workers]\nprocesses = {workers}\n" if workers else ""
        text = self.configuration(more, SHOP).replace("[http]\nport = 0\n", f"[http]\nport = {self.port}\n", 1)
        daemon = self.started(text)
        daemon.wait_until_ready()
        return daemon

    def follow(self, mirror: Mirror | None = None) -> Follower:
        position = "" if mirror is None else mirror.position
        follower = Follower(self.port, PATH, mirror, Last_Event_ID=position)
        self.addCleanup(follower.close)
        return follower

    def until_n(self, rows: Callable[[], dict[str, Any]], key: str, n: int) -> None:
        wait_until(lambda: rows().get(key) == {"id": int(key), "n": n}, f"{key} with n = {n}")

    def served(self) -> dict[str, Any]:
        rows: dict[str, Any] = self.get_json(self.port, "/v1/datasets/products")
        return rows

    def get_json(self, port: int, path: str) -> Any:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=GIVE_UP_S)) as client:
            client.request("GET", path)
            return json.loads(client.getresponse().read())

    def until_same(self, rows: Callable[[], dict[str, Any]]) -> None:
        wait_until(lambda: rows() == self.served(), "the same rows")

    def test_changes_of_the_table(self) -> None:
        """Few changed rows arrive as a delta; a replaced table as a snapshot; an unchanged one as renewals."""
        self.serve()
        follower = self.follow()
        self.until_n(lambda: follower.mirror.rows, "5", 0)
        wait_until(lambda: follower.mirror.kinds().count("renewed") > 2, "renewals")
        self.sql("UPDATE products SET n = 1 WHERE id = 5; DELETE FROM products WHERE id = 6")
        self.until_n(lambda: follower.mirror.rows, "5", 1)
        self.assertEqual(follower.mirror.kinds().count("snapshot"), 1)
        self.sql("UPDATE products SET n = 2")
        self.until_n(lambda: follower.mirror.rows, "5", 2)
        self.assertEqual(follower.mirror.kinds().count("snapshot"), 2)
        self.until_same(lambda: follower.mirror.rows)

    def test_a_restart(self) -> None:
        """With saved snapshots, a client goes on where it was. Without, it gets a snapshot, although another
        generation of the same number is served. A stop ends the stream whole; a kill loses nothing."""
        for saved in (True, False):
            for number in (signal.SIGTERM, signal.SIGKILL):
                daemon = self.serve(saved=saved)
                first = self.follow()
                self.until_n(lambda: first.mirror.rows, "5", 0)  # noqa: B023
                if saved:
                    wait_until(lambda: "snapshot_saved" in daemon.output, "saved")  # noqa: B023
                daemon.process.send_signal(number)
                daemon.process.wait(GIVE_UP_S)
                wait_until(lambda: first.is_over, "the end of the stream")  # noqa: B023
                self.assertLessEqual(number == signal.SIGTERM, first.is_complete)
                if number == signal.SIGTERM:
                    self.assert_ended(daemon, daemon.process.returncode)
                self.sql("UPDATE products SET n = 7 WHERE id = 7")
                daemon, before = self.serve(saved=saved), len(first.mirror.events)
                again = self.follow(first.mirror)
                self.until_n(lambda: again.mirror.rows, "7", 7)  # noqa: B023
                self.until_same(lambda: again.mirror.rows)  # noqa: B023
                kinds = again.mirror.kinds()[before:]
                self.assertEqual("snapshot" in kinds, not saved, kinds)
                again.close()
                daemon.kill()
                self.sql("UPDATE products SET n = 0")
                shutil.rmtree(self.directory / "saved", ignore_errors=True)

    def test_workers(self) -> None:
        """A client that comes back to another worker goes on where it was, without a snapshot."""
        daemon = self.serve(workers=2)
        workers = workers_of(daemon.process.pid)
        follower, served_by = self.follow(), set()
        for n in itertools.count(1):
            served_by.add(server_at(follower.address, workers))
            self.sql(f"UPDATE products SET n = {n} WHERE id = 5")
            self.until_n(lambda f=follower: f.mirror.rows, "5", n)
            follower.close()
            self.sql(f"UPDATE products SET n = {n} WHERE id = 6")
            if n > 3 and served_by == set(workers):
                break
            follower = self.follow(follower.mirror)
        self.assertEqual(follower.mirror.kinds().count("snapshot"), 1)
        self.until_same(lambda: self.follow(follower.mirror).mirror.rows)

    def test_the_python_example(self) -> None:
        """examples/mirror.py keeps a file in step, also across a restart of the service, and ends with the dataset."""
        daemon = self.serve()
        file = self.directory / "products.json"
        url = f"http://127.0.0.1:{self.port}/v1/datasets/products"
        script = str(ROOT / "examples" / "mirror.py")
        example = subprocess.Popen([sys.executable, script, url, str(file)], stdout=subprocess.DEVNULL)
        self.addCleanup(example.wait)
        self.addCleanup(example.kill)

        def rows() -> dict[str, Any]:
            return json.loads(file.read_text()) if file.exists() else {}

        self.until_n(rows, "5", 0)
        self.sql("UPDATE products SET n = 1 WHERE id = 5; DELETE FROM products WHERE id = 6")
        self.until_n(rows, "5", 1)
        self.until_same(rows)
        daemon.kill()
        self.sql("UPDATE products SET n = 2 WHERE id = 5")
        daemon = self.serve()
        self.until_n(rows, "5", 2)
        self.until_same(rows)
        configuration = self.directory / "cacheservice.toml"
        configuration.write_text(configuration.read_text().replace("[datasets.products]", "[datasets.others]"))
        daemon.process.send_signal(signal.SIGHUP)
        self.assertEqual(example.wait(GIVE_UP_S), 0)

    def test_the_browser_example(self) -> None:
        """examples/mirror.html, behind nginx, shows the rows in step, also after a restart of the service."""
        daemon = self.serve()
        port = start_nginx(self.addCleanup, self.port, ROOT / "examples")
        browser = running_browser(self.addCleanup)
        browser.get(f"http://127.0.0.1:{port}/mirror.html?dataset=products")

        def rows() -> dict[str, Any]:
            text = browser.execute_script("return document.getElementById('table').textContent")
            return {key: json.loads(row) for key, _, row in (line.partition(" ") for line in text.splitlines())}

        self.until_n(rows, "5", 0)
        self.sql("UPDATE products SET n = 1 WHERE id = 5; DELETE FROM products WHERE id = 6")
        self.until_n(rows, "5", 1)
        self.until_same(rows)
        daemon.kill()
        self.sql("UPDATE products SET n = 2 WHERE id = 5")
        self.serve()
        self.until_n(rows, "5", 2)
        self.until_same(rows)
