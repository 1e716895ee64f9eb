"""Laws of the whole service with real workers: the answers do not depend on the worker that gives them."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import closing
from typing import Any

from tests.kit.daemon import PRODUCTS, QUICK, Daemon
from tests.kit.http import Answer, ask_on
from tests.kit.metrics import of_text, place
from tests.kit.postgres import query
from tests.kit.real_service import RealServiceTestCase
from tests.kit.resp import Client
from tests.kit.waiting import GIVE_UP_S, wait_until
from tests.kit.workers import client_of_each, is_over, livez, ping, workers_of

COUNTED = ("connected_clients", "total_connections_received", "process_id", "uptime_in_days")


class WorkersTestCase(RealServiceTestCase):
    def begun(self, *tables: str, environ: dict[str, str] | None = None) -> Daemon:
        admin = f'\n[admin]\nsocket = "{self.directory}/admin"\n'
        text = self.configuration(*(tables or (PRODUCTS,)), admin, "[workers]\nprocesses = 2\n")
        daemon = self.started(text, environ=environ)
        self.until_serving(daemon)
        wait_until(lambda: daemon.ask("ready") == "ready", "readiness")
        return daemon

    def workers(self, daemon: Daemon) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = daemon.json()["service"]["workers"]
        return found

    def until_serving(self, daemon: Daemon) -> None:
        wait_until(lambda: [each["state"] for each in self.workers(daemon)] == ["serving"] * 2, "two workers")

    def clients(self, daemon: Daemon, name: str = "resp") -> dict[int, socket.socket]:
        """A client of each worker, by the ID of its process."""
        address = ("127.0.0.1", self.port_of(daemon, name))
        connect = ping if name == "resp" else livez
        found = client_of_each(address, workers_of(daemon.process.pid), connect)
        for client in found.values():
            self.addCleanup(client.close)
        return found

    def info(self, client: socket.socket) -> dict[str, str]:
        text = Client(client).ask("INFO").decode()
        return dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)

    def ask_each(self, clients: dict[int, socket.socket], path: str, **headers: str) -> list[Answer]:
        return [ask_on(client, path, **headers) for client in clients.values()]


class RespPort(WorkersTestCase):
    def test_info_and_clients(self) -> None:
        """INFO and CLIENT LIST have the clients of all workers, before and after one of them is killed."""
        daemon = self.begun()
        clients = self.clients(daemon)
        one, other = clients.values()
        found = [self.info(one), self.info(other)]
        self.assertEqual(*({name: each[name] for name in COUNTED} for each in found))
        self.assertEqual(found[0]["connected_clients"], "2")
        self.assertEqual(found[0]["process_id"], str(daemon.process.pid))
        ids = [Client(each).ask("CLIENT", "ID") for each in (one, other)]
        for each in (one, other):
            lines = Client(each).ask("CLIENT", "LIST").splitlines()
            self.assertEqual([int(line.split()[0].removeprefix(b"id=")) for line in lines], sorted(ids))
        victim, survivor = clients
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: is_over(victim), "its end")
        wait_until(lambda: self.info(clients[survivor])["connected_clients"] == "1", "one client")
        received = int(self.info(clients[survivor])["total_connections_received"])
        self.assertGreaterEqual(received, int(found[0]["total_connections_received"]))
        self.until_serving(daemon)
        new = self.clients(daemon)
        self.assertGreater(max(Client(each).ask("CLIENT", "ID") for each in new.values()), max(ids))

    def test_cache_info_and_wait(self) -> None:
        """Each worker knows the attempts, and the server whose transactions CACHE.WAIT waits for."""
        daemon = self.begun()
        transaction_id = self.transaction()
        for client in self.clients(daemon).values():
            fields = Client(client).ask("CACHE.INFO", "products")
            last = fields[fields.index(b"last_attempt") + 1]
            self.assertEqual(last[last.index(b"outcome") + 1], b"published")
            self.assertEqual(Client(client).ask("CACHE.WAIT", "products", transaction_id, 60_000), 1)

    def transaction(self) -> int:
        ((number,),) = query(self.server, self.database, "SELECT pg_current_xact_id()::text::bigint")
        return int(number)


class HttpPort(WorkersTestCase):
    def test_reports(self) -> None:
        """What only the main process knows is the same from each worker; commands reach it."""
        daemon = self.begun(QUICK, environ={"CACHESERVICE_HTTP__ADMIN_TOKEN": "operate"})
        clients = self.clients(daemon, "http")
        for path in ("/v1/datasets", "/v1/datasets/products/status", "/v1/datasets/products/why", "/readyz"):
            self.assertEqual([answer.status for answer in self.ask_each(clients, path)], [200, 200], path)
        status = self.ask_each(clients, "/v1/datasets/products/status")[0].json()
        self.assertEqual(status["last_attempt"]["outcome"], "unchanged")
        for client in clients.values():
            token = {"Authorization": "Bearer operate"}
            self.assertEqual(ask_on(client, "/v1/datasets/products/pin", "POST", **token).status, 200)
            self.assertTrue(daemon.json()["datasets"]["products"]["pinned"])
            self.assertEqual(ask_on(client, "/v1/datasets/products/unpin", "POST", **token).status, 200)
            self.assertEqual(ask_on(client, "/v1/datasets/products/nope", "POST", **token).status, 404)

    def test_max_age(self) -> None:
        """A reader that wants newer data gets it, although its worker cannot refresh."""
        slow = PRODUCTS.replace("interval_s = 0.3", "interval_s = 3600").replace("max_age_s = 600", "max_age_s = 7200")
        daemon = self.begun(slow)
        for client in self.clients(daemon, "http").values():
            before = ask_on(client, "/v1/datasets/products/rows/1").headers["x-cache-generation"]
            answer = ask_on(client, "/v1/datasets/products/rows/1?max_age=0")
            self.assertEqual(answer.status, 200)
            self.assertGreater(int(answer.headers["x-cache-generation"]), int(before))

    def test_events(self) -> None:
        """The event stream goes on while its client stays, in either worker."""
        daemon = self.begun()
        for client in self.clients(daemon, "http").values():
            client.sendall(b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
            received = b""
            while received.count(b"event: state") < 3:
                part = client.recv(65_536)
                assert part, received
                received += part
            self.assertIn(b"event: hello", received)
            self.assertIn(b'"workers":[{"number":1,', received)

    def test_a_main_process_that_hangs(self) -> None:
        """Rows are served, /readyz and reports are 503 within seconds, and all is well when it goes on."""
        daemon = self.begun()
        clients = self.clients(daemon, "http")
        os.kill(daemon.process.pid, signal.SIGSTOP)
        self.addCleanup(os.kill, daemon.process.pid, signal.SIGCONT)
        for answer in self.ask_each(clients, "/readyz") + self.ask_each(clients, "/v1/datasets"):
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
        for path in ("/livez", "/v1/datasets/products/rows/1"):
            self.assertEqual([answer.status for answer in self.ask_each(clients, path)], [200, 200])
        os.kill(daemon.process.pid, signal.SIGCONT)
        self.assertEqual([answer.status for answer in self.ask_each(clients, "/readyz")], [200, 200])


class Operators(WorkersTestCase):
    def test_metrics(self) -> None:
        """Reads of all workers are counted up to the scrape, and kept when a worker is killed."""
        daemon = self.begun()
        clients = self.clients(daemon)
        for number, client in enumerate(clients.values(), 1):
            for _ in range(10 * number):
                Client(client).ask("GET", "products:1")
        hits = place("cacheservice_reads_total", dataset="products", port="resp", result="hit")
        scraped = self.now(daemon)
        self.assertEqual(scraped[hits], 30)
        self.assertEqual(scraped[place("cacheservice_connections", port="resp")], 2)
        for number in ("1", "2"):
            self.assertEqual(scraped[place("cacheservice_worker_up", worker=number)], 1)
            self.assertEqual(scraped[place("cacheservice_worker_connections", worker=number, port="resp")], 1)
            self.assertGreater(scraped[place("cacheservice_worker_memory_bytes", worker=number)], 1 << 20)
        lines = dict(line.split("\t") for line in daemon.ask("mntr").splitlines())
        self.assertEqual(lines['cacheservice_reads_total{dataset="products",port="resp",result="hit"}'], "30")
        os.kill(next(iter(clients)), signal.SIGKILL)
        wait_until(lambda: sum(each["restarts"] for each in self.workers(daemon)) == 1, "a restart")
        self.until_serving(daemon)
        scraped = self.now(daemon)
        self.assertEqual(scraped[hits], 30)
        restarts = [scraped[place("cacheservice_worker_restarts_total", worker=number)] for number in ("1", "2")]
        self.assertEqual(sorted(restarts), [0, 1])

    def test_status(self) -> None:
        """`status` has a line of the workers, and `json` a member with their processes."""
        daemon = self.begun()
        pids = [each["pid"] for each in self.workers(daemon)]
        self.assertEqual(sorted(pids), workers_of(daemon.process.pid))
        head, line, *_ = daemon.ask("status").splitlines()
        self.assertIn("ready", head)
        self.assertRegex(line, r"^2 of 2 workers serving: 1 with 0 resp and 0 http clients, [\d.]+ MiB; 2 with ")

    def test_limit(self) -> None:
        """limits.max_connections is of both workers together, and the log has the number of all clients."""
        daemon = self.begun(PRODUCTS, "[limits]\nmax_connections = 6\n")
        address = ("127.0.0.1", self.port_of(daemon, "resp"))
        inside = [ping(address) for _ in range(6)]
        for client in inside:
            self.addCleanup(client.close)
        for _ in range(10):
            with closing(socket.create_connection(address, timeout=GIVE_UP_S)) as client:
                self.assertEqual(client.recv(100), b"-ERR max number of clients reached\r\n")
        self.assertEqual(daemon.event("clients_turned_away")["clients"], 6)
        refused = place("cacheservice_rejected_total", port="resp", reason="too_many_connections")
        self.assertEqual(self.now(daemon)[refused], 10)
        inside.pop().close()

        def is_free() -> bool:
            with closing(socket.create_connection(address, timeout=GIVE_UP_S)) as client:
                client.sendall(b"PING\r\n")
                return client.recv(100) == b"+PONG\r\n"

        wait_until(is_free, "a free place")

    def test_rotation(self) -> None:
        """A client that sends a new secret is served by each worker, and the old secret is refused by each."""
        file = self.directory / "token"
        file.write_text("one")
        daemon = self.begun(QUICK, environ={"CACHESERVICE_HTTP__TOKEN_FILE": str(file)})
        clients = self.clients(daemon, "http")

        def statuses(token: str) -> list[int]:
            answers = self.ask_each(clients, "/v1/datasets", Authorization=f"Bearer {token}")
            return [answer.status for answer in answers]

        self.assertEqual(statuses("one"), [200, 200])
        file.write_text("two")
        self.assertEqual(statuses("two"), [200, 200])
        self.assertEqual(statuses("one"), [401, 401])
        os.kill(next(iter(clients)), signal.SIGKILL)
        wait_until(lambda: sum(each["restarts"] for each in self.workers(daemon)) == 1, "a restart")
        self.until_serving(daemon)
        clients = self.clients(daemon, "http")
        self.assertEqual((statuses("two"), statuses("one")), ([200, 200], [401, 401]))
        self.assertNotIn("internal_error", daemon.output)

    def test_a_secret_that_a_reload_leaves_out(self) -> None:
        """As without workers, the one in effect stays, not the one of the start; a new worker has it, too."""
        file = self.directory / "token"
        file.write_text("one")
        daemon = self.begun(QUICK, environ={"CACHESERVICE_HTTP__TOKEN_FILE": str(file)})
        clients = self.clients(daemon, "http")
        for secret, reply in (("two", "OK reloaded"), ("", "at the next start: http.token")):
            file.write_text(secret)
            self.assertIn(reply, self.admin("reload"))
        victim, survivor = clients

        def statuses(client: socket.socket) -> list[int]:
            return [ask_on(client, "/v1/datasets", Authorization=f"Bearer {token}").status for token in ("two", "one")]

        wait_until(lambda: statuses(clients[survivor]) == [200, 401], "the new token")
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: sum(each["restarts"] for each in self.workers(daemon)) == 1, "a restart")
        self.until_serving(daemon)
        self.assertEqual([statuses(client) for client in self.clients(daemon, "http").values()], [[200, 401]] * 2)

    def test_guesses(self) -> None:
        """Guesses at one worker lock their address out of the other, until their delays have ended."""
        daemon = self.begun(QUICK, environ={"CACHESERVICE_HTTP__TOKEN": "secret"})
        one, other = self.clients(daemon, "http").values()
        address = one.getpeername()
        wrong = b"GET /v1/datasets HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer wrong\r\n\r\n"

        refused = place("cacheservice_rejected_total", port="http", reason="auth_failed")

        def guesses() -> float:
            return of_text(ask_on(one, "/metrics").body)[refused]

        def is_locked_out() -> bool:
            before = guesses()
            for _ in range(50):
                client = socket.create_connection(address, timeout=GIVE_UP_S)
                self.addCleanup(client.close)
                client.sendall(wrong)
            # A guess occupies its place from when it is counted. Earlier, this one would only be another guess.
            wait_until(lambda: guesses() >= before + 40, "the guesses")
            return ask_on(other, "/v1/datasets", Authorization="Bearer wrong").status == 429

        wait_until(is_locked_out, "the lock")
        self.assertGreaterEqual(guesses(), 2)
        self.assertEqual(json.loads(ask_on(other, "/livez").body), {"status": "alive"})
