"""Laws of the dashboard: its files, its events and its commands."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
from contextlib import closing
from html.parser import HTMLParser
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.base.errors import NothingToPin, NothingToRollBackTo
from cacheservice.cache.history import Attempt
from cacheservice.ports.http.bodies import PIECE_BYTES
from tests.kit.daemon import DaemonTestCase
from tests.kit.datasets import MANY, MOMENT_WITH_MS, declared
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.http import Answer, ask_on, read_to_the_end
from tests.kit.http_port import PortTestCase, buffered, encoded
from tests.kit.waiting import GIVE_UP_S, until, wait_until


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
        """/history has the points of the last hour, a list for each field."""
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
        """/why is the reply of the status port, as sentences or as text."""
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
        """A new client gets everything, in the shape of the status port's json; after it, only what has changed."""
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
        """With the last listener the checks for changes end, also if it has only ended its sending side."""
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

    async def test_the_stop_ends_the_body(self) -> None:
        """When the port closes, the body of a stream that was read so far ends as complete, not in a chunk."""
        client = self.connect()
        with closing(client):
            client.sendall(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: self.factory.feed._listeners == 1)
            text: bytes = await deferToThread(client.recv, 65_536)
            while b"event: state" not in text or not text.endswith(b"\n\n\r\n"):
                text += await deferToThread(client.recv, 65_536)
            self.factory.close_clients()
            text += await deferToThread(read_to_the_end, client)
        self.assertTrue(text.endswith(b"\n\n\r\n0\r\n\r\n"), text[-50:])

    async def test_it_wants_what_is_served(self) -> None:
        """A client that accepts no events gets an error."""
        await self.assert_problem("/events", 406, "text/event-stream", Accept="application/json")


class FewEvents(EventsTestCase):
    max_connections = 2

    async def test_listeners_count_as_clients(self) -> None:
        """limits.max_connections counts the listeners."""
        for _ in range(2):
            await self.listen()
        self.assertEqual((await self.ask("/v1/datasets")).status, 503)
        self.assertEqual((await self.ask("/livez")).status, 200)


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
    """Remembers the commands it got, and does not do some of them."""

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

    def commanded(self) -> Operators:
        self.operators = Operators()
        return self.operators

    async def command(self, path: str, token: str = "operate", method: str = "POST", **headers: str) -> Answer:
        return await self.ask(f"/v1/datasets/{path}", method, Authorization=f"Bearer {token}", **headers)


class Commands(CommandsTestCase):
    async def test_what_the_admin_socket_does(self) -> None:
        """With the admin token each command has its usual effect, and its response reports it."""
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

    async def test_the_first_event_names_the_access(self) -> None:
        """A listener learns whether there is an admin token, and whether it has sent it."""
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
        latest: dict[str, Any] = {}

        def products() -> dict[str, Any]:
            for state in listener.states():
                latest.update(state["datasets"].get("products", {}))
            return latest

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
