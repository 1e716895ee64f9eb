"""Laws of worker processes: who serves, what survives, and how they end."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from twisted.application.service import MultiService
from twisted.internet import reactor
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import ServerFactory
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.app.workers.composition import Workers
from cacheservice.app.workers.member import Member, State, Timing
from cacheservice.base.errors import PortUnavailable
from cacheservice.base.scheduling import SHORTEST_S, ask_for_slices
from cacheservice.cache.cache import Cache
from cacheservice.cache.patch import RowsPatch
from cacheservice.config import Settings
from cacheservice.ports.listen import PortService, tcp
from cacheservice.ports.shared_listen import held
from tests.kit.daemon import PRODUCTS, QUICK, Daemon
from tests.kit.datasets import rows_of, snapshot_of
from tests.kit.logs import Log
from tests.kit.real_service import RealServiceTestCase
from tests.kit.resp import Client
from tests.kit.waiting import GIVE_UP_S, until, wait_until
from tests.kit.workers import Address, client_of_each, is_over, livez, ping, server_of, slice_ns, workers_of

SECRET = "known only to clients"


class RealWorkers(TestCase):
    """Two real workers, whose main process is the test's."""

    timeout = 300

    def settings(self, **tables: Any) -> Settings:
        everything: dict[str, Any] = {
            "postgres": {"dsn": "postgresql://reader:hidden@127.0.0.1:1/shop"},
            "resp": {"port": 0},
            "http": {"port": 0},
            "workers": {"processes": 2},
            "datasets": {"products": {"name": "products", "query": "TABLE products", "key": "id"}},
        }
        return Settings.model_validate(everything | tables)

    async def begin(self, timing: Timing | None = None, **tables: Any) -> None:
        self.log = Log()
        settings = self.settings(**tables)
        self.cache = Cache(settings.datasets.values(), reactor.seconds)
        self.workers = Workers(settings, self.cache, reactor, self.log, timing)
        self.service = MultiService()
        for part in self.workers.services():
            part.setServiceParent(self.service)
        self.service.privilegedStartService()
        self.addresses: dict[str, Address] = {
            str(part.name): ("127.0.0.1", part.address.port) for part in self.service if isinstance(part, PortService)
        }
        self.service.startService()
        self.addCleanup(self.service.stopService)
        await self.until_serving()

    @property
    def members(self) -> list[Member]:
        return list(self.workers.supervisor.members)

    @property
    def pids(self) -> list[int]:
        return [member.pid for member in self.members if member.pid is not None]

    async def until_serving(self) -> None:
        await until(lambda: all(member.state is State.SERVING for member in self.members), seen=lambda: self.log.lines)

    async def clients(self, name: str = "resp", connect: Callable[[Address], socket.socket] = ping) -> Any:
        """A client of each worker, by the ID of the process."""
        clients = await deferToThread(client_of_each, self.addresses[name], self.pids, connect)
        for client in clients.values():
            self.addCleanup(client.close)
        return clients

    async def test_all_serve(self) -> None:
        """Each worker answers on both ports; a dataset that has not arrived is not served."""
        await self.begin()
        self.assertEqual(set(self.pids), set(await self.clients()))
        self.assertEqual(set(self.pids), set(await self.clients("http", livez)))

        def get() -> Any:
            with socket.create_connection(self.addresses["resp"], timeout=GIVE_UP_S) as client:
                return Client(client).ask("GET", "products:1")

        self.assertIn("products has not been loaded yet", await deferToThread(get))
        self.assertEqual(
            {name: len(self.log.named(name)) for name in ("worker_started", "worker_serving", "worker_ended")},
            {"worker_started": 2, "worker_serving": 2, "worker_ended": 0},
        )

    async def test_slices(self) -> None:
        """Workers have the slices that a thread gets that asks for the shortest ones, so that they get a core soon."""

        def shortest_ns() -> int | None:
            ask_for_slices(SHORTEST_S)
            return slice_ns("thread-self")

        await self.begin()
        self.assertEqual({slice_ns(pid) for pid in self.pids}, {await deferToThread(shortest_ns)})

    async def test_an_address_in_use(self) -> None:
        """A second service cannot share the address of the first, whether that has workers or not."""
        await self.begin()
        (host, port), settings = self.addresses["resp"], {"port": self.addresses["resp"][1]}
        for listen in (partial(held, reactor, host, port, 2), tcp(reactor, host, port, ServerFactory())):
            with self.assertRaises(CannotListenError) as caught:
                listen()
            self.assertEqual(caught.exception.socketError.errno, errno.EADDRINUSE)
        workers = Workers(self.settings(resp=settings), self.cache, reactor, self.log)
        resp, *_ = workers.services()
        with self.assertRaises(PortUnavailable) as refused:
            resp.privilegedStartService()
        self.assertEqual(
            str(refused.exception),
            f"resp.port: cannot listen on 127.0.0.1:{port}: address already in use; end what uses it, or set another",
        )

    async def test_one_address_of_ipv6(self) -> None:
        """Both workers serve "::", by IPv6 and by IPv4."""
        await self.begin(resp={"port": 0, "host": "::", "password": SECRET}, limits={"allow_anonymous": True})

        def connect() -> list[Any]:
            replies = []
            for host in ("127.0.0.1", "::1")[: 1 + socket.has_ipv6]:
                with socket.create_connection((host, self.addresses["resp"][1]), timeout=GIVE_UP_S) as client:
                    replies.append(Client(client).ask("AUTH", SECRET))
            return replies

        self.assertEqual(set(await deferToThread(connect)), {b"OK"})

    async def test_snapshots(self) -> None:
        """All workers serve what the main process publishes, and so does one that is started later."""
        await self.begin()
        dataset = self.cache.dataset("products")
        rows = rows_of({b"%d" % number: b'{"n":1}' for number in range(1000)})
        dataset.publish(snapshot_of(rows, read_at=reactor.seconds()))
        clients = await self.clients()

        def read(key: str) -> list[Any]:
            return [Client(client).ask("GET", f"products:{key}") for client in clients.values()]

        await until(lambda: read("999") == [b'{"n":1}'] * 2)
        changed = RowsPatch(dataset.snapshot.rows)
        changed.put(b"999", b'{"n":2}')
        changed.remove(b"0")
        dataset.publish(snapshot_of(changed.finish(), 2, reactor.seconds()), changed.delta)
        await until(lambda: read("999") == [b'{"n":2}'] * 2)
        self.assertEqual(read("0"), [None] * 2)
        os.kill(self.pids[0], signal.SIGKILL)
        await until(lambda: self.log.named("worker_ended"))
        await self.until_serving()
        # It accepts no client before it has all snapshots.
        clients = await self.clients()
        self.assertEqual((read("999"), read("998"), read("0")), ([b'{"n":2}'] * 2, [b'{"n":1}'] * 2, [None] * 2))

    async def test_nothing_secret_is_shown(self) -> None:
        """The command line and the environment of a worker contain no secret, and it has only what it needs open."""
        os.environ["CACHESERVICE_TESTS_SECRET"] = SECRET
        self.addCleanup(os.environ.pop, "CACHESERVICE_TESTS_SECRET")
        await self.begin(resp={"port": 0, "password": SECRET})
        for pid in self.pids:
            shown = shown_of(pid)
            for secret in (SECRET, "hidden"):
                self.assertNotIn(secret.encode(), shown)
            connections = psutil.Process(pid).net_connections("tcp")
            self.assertEqual(sorted({each.laddr.port for each in connections}), sorted(
                port for _, port in self.addresses.values()
            ))  # fmt: skip
            self.assertEqual(os.readlink(f"/proc/{pid}/fd/0"), "/dev/null")
            self.assertEqual([each for each in files_of(pid) if "/dev/" not in each and "/memfd:" not in each], [])

    async def test_one_is_killed(self) -> None:
        """The clients of the others notice nothing, new ones are served at once, and it is back."""
        await self.begin()
        clients = await self.clients()
        victim, survivor = self.pids
        os.kill(victim, signal.SIGKILL)
        await until(lambda: is_over(victim))

        def connect_often() -> list[Any]:
            answers = [Client(clients[survivor]).ask("PING")]
            for _ in range(100):
                with ping(self.addresses["resp"]), livez(self.addresses["http"]):
                    answers.append(b"PONG")
            return answers

        self.assertEqual(set(await deferToThread(connect_often)), {b"PONG"})
        self.assertTrue(await deferToThread(Client(clients[victim]).is_closed))
        await until(lambda: self.log.named("worker_ended"))
        self.assertEqual(
            self.log.named("worker_ended"), [{"worker": 1, "pid": victim, "exit_code": None, "signal": "SIGKILL"}]
        )
        await self.until_serving()
        self.assertNotIn(victim, self.pids)
        self.assertEqual([member.restarts for member in self.members], [1, 0])
        self.assertEqual(set(await self.clients()), set(self.pids))

    async def test_one_hangs(self) -> None:
        """It is detected, killed and replaced; the others serve meanwhile."""
        await self.begin(Timing(ping_interval_s=0.1, hung_after_s=2.0))
        victim, survivor = self.pids
        os.kill(victim, signal.SIGSTOP)
        await until(lambda: self.log.named("worker_hung"), seen=lambda: self.log.lines)
        await self.until_serving()
        self.assertEqual(self.log.named("worker_hung"), [{"worker": 1, "pid": victim, "state": "serving"}])
        self.assertTrue(is_over(victim))
        self.assertEqual(self.members[1].pid, survivor)
        self.assertEqual(set(await self.clients()), set(self.pids))

    async def test_one_is_frozen_for_a_while(self) -> None:
        """The other one serves the clients that the frozen one would have got, and then both serve again."""
        await self.begin(Timing(ping_interval_s=0.1, hung_after_s=3600.0))
        victim, survivor = self.pids
        os.kill(victim, signal.SIGSTOP)
        # Until then it may accept a client, which would wait for its first reply.
        await until(lambda: psutil.Process(victim).status() == psutil.STATUS_STOPPED)

        def connect_often() -> set[int | None]:
            servers = set()
            for _ in range(50):
                with ping(self.addresses["resp"]) as client:
                    servers.add(server_of(client, [victim, survivor]))
            return servers

        self.assertEqual(await deferToThread(connect_often), {survivor})
        os.kill(victim, signal.SIGCONT)
        self.assertEqual(set(await self.clients()), {victim, survivor})
        self.assertEqual(self.log.names("worker_hung", "worker_ended"), [])

    async def test_one_hangs_during_the_stop(self) -> None:
        """It is killed, and the stop ends when all processes have ended."""
        await self.begin(Timing(stop_limit_s=1.0))
        pids = self.pids
        os.kill(pids[0], signal.SIGSTOP)
        await self.service.stopService()
        self.assertEqual([is_over(pid) for pid in pids], [True, True])
        endings = {line["worker"]: (line["exit_code"], line["signal"]) for line in self.log.named("worker_ended")}
        self.assertEqual(endings, {1: (None, "SIGKILL"), 2: (0, None)})
        for address in self.addresses.values():
            with self.assertRaises(ConnectionRefusedError), socket.create_connection(address):
                pass

    async def test_one_gets_sigterm(self) -> None:
        """It ends in order, and is replaced. Signals that a terminal sends to all processes do not reach it."""
        await self.begin()
        victim, other = self.pids
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(other, number)
        os.kill(victim, signal.SIGTERM)
        await until(lambda: self.log.named("worker_ended"))
        await self.until_serving()
        self.assertEqual(self.log.named("worker_ended"), [{"worker": 1, "pid": victim, "exit_code": 0, "signal": None}])
        self.assertEqual(self.members[1].pid, other)

    async def test_its_log(self) -> None:
        """What a worker logs is in the log of the main process, with its number."""
        await self.begin(limits={"max_connections": 1})

        def connect_many() -> None:
            for _ in range(10):
                client = socket.create_connection(self.addresses["resp"], timeout=GIVE_UP_S)
                self.addCleanup(client.close)

        await deferToThread(connect_many)
        await until(lambda: self.log.named("clients_turned_away"))
        (first, *_) = self.log.named("clients_turned_away")
        self.assertEqual((first["port"], first["limit"]), ("resp", 1))
        self.assertIn(first["worker"], (1, 2))


class UnderTwistd(RealServiceTestCase):
    """The whole service with two workers."""

    def configured(self, *tables: str, more: str = "") -> str:
        admin = f'\n[admin]\nsocket = "{self.directory}/admin"\n'
        return self.configuration(*(tables or (PRODUCTS,)), admin, "[workers]\nprocesses = 2\n", more)

    def begun(self, *tables: str, more: str = "") -> Daemon:
        daemon = self.started(self.configured(*tables, more=more))
        wait_until(lambda: len(self.serving(daemon)) == 2, "two workers")
        return daemon

    def serving(self, daemon: Daemon) -> list[int]:
        return [line["pid"] for line in daemon.lines if line["event"] == "worker_serving"]

    def resp_of(self, daemon: Daemon) -> Address:
        return "127.0.0.1", self.port_of(daemon, "resp")

    def assert_gone(self, daemon: Daemon, pids: list[int]) -> None:
        """No worker is left, and the ports are free for the next service."""
        wait_until(lambda: all(is_over(pid) for pid in pids), "the end of all workers")
        ports = {name: self.port_of(daemon, name) for name in ("resp", "http")}
        for port in ports.values():
            with self.assertRaises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                pass
        text = self.configured().replace("[resp]\nport = 0", f"[resp]\nport = {ports['resp']}")
        again = self.started(text.replace("[http]\nport = 0", f"[http]\nport = {ports['http']}"))
        wait_until(lambda: len(self.serving(again)) == 2, "two workers")
        self.assertEqual(self.resp_of(again)[1], ports["resp"])
        again.end()
        self.assertEqual(again.errors, "")

    def test_rows(self) -> None:
        """Each worker serves what the main process reads, generation after generation, and none goes back."""
        daemon = self.begun()
        clients = client_of_each(self.resp_of(daemon), workers_of(daemon.process.pid))
        for client in clients.values():
            self.addCleanup(client.close)
        seen: dict[int, list[bytes]] = {pid: [] for pid in clients}

        def all_new() -> bool:
            for pid, client in clients.items():
                document = Client(client).ask("GET", "products:1")
                if isinstance(document, bytes) and document not in seen[pid][-1:]:
                    seen[pid].append(document)
            return all(len(documents) >= 4 for documents in seen.values())

        wait_until(all_new, "four generations in each worker")
        for documents in seen.values():
            self.assertEqual(documents, sorted(documents, key=lambda each: json.loads(each)["read_at"]))
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_sigterm(self) -> None:
        """All end in order within 5 s, and the main process as it does without workers."""
        daemon = self.begun()
        pids = workers_of(daemon.process.pid)
        self.assertEqual(sorted(self.serving(daemon)), pids)
        client = ping(self.resp_of(daemon))
        self.addCleanup(client.close)
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)
        self.assertTrue(Client(client).is_closed())
        endings = [line for line in daemon.lines if line["event"] == "worker_ended"]
        self.assertEqual([(line["level"], line["exit_code"]) for line in endings], [("info", 0)] * 2)
        self.assert_gone(daemon, pids)

    def test_sigterm_at_once(self) -> None:
        """A service that is stopped while its workers start leaves none behind."""
        daemon = self.started(self.configured())
        daemon.event("worker_started")
        daemon.end()
        self.assertEqual(daemon.process.returncode, -signal.SIGTERM)
        self.assertEqual(workers_of(daemon.process.pid), [])

    def test_the_main_process_is_killed(self) -> None:
        """Its workers end, even one that hangs, and another service can start on the same ports."""
        daemon = self.begun()
        pids = workers_of(daemon.process.pid)
        os.kill(pids[0], signal.SIGSTOP)
        daemon.process.kill()
        daemon.process.wait()
        self.assert_gone(daemon, pids)
        self.assertEqual(daemon.errors, "")

    def test_signals_to_all(self) -> None:
        """Signals to the whole process group, such as a terminal sends, mean what they mean without workers."""
        daemon = self.begun()
        pids = workers_of(daemon.process.pid)
        for each in (daemon.process.pid, *pids):
            os.kill(each, signal.SIGHUP)
        daemon.event("config_reloaded")
        self.assertEqual(workers_of(daemon.process.pid), pids)
        for each in (daemon.process.pid, *pids):
            os.kill(each, signal.SIGINT)
        daemon.process.wait(GIVE_UP_S)
        self.assert_gone(daemon, pids)

    def test_reload(self) -> None:
        """A reload reaches all workers: datasets and the secrets of clients."""
        secret = '\n[resp]\nport = 0\npassword = "{}"\n'
        text = self.configured(QUICK).replace("\n[resp]\nport = 0\n", secret.format("first"))
        daemon = self.started(text)
        wait_until(lambda: len(self.serving(daemon)) == 2, "two workers")
        pids = workers_of(daemon.process.pid)
        address = self.resp_of(daemon)

        def replies(password: str) -> list[list[Any]]:
            """The replies of all workers to a client with this password that reads the new dataset."""
            clients = client_of_each(address, pids, connected_to)
            found = [Client(client).ask_all([("AUTH", password), ("GET", "others:1")]) for client in clients.values()]
            for client in clients.values():
                client.close()
            return found

        self.assertEqual(replies("first"), [[b"OK", "ERR unknown dataset 'others'"]] * 2)
        changed = text.replace("first", "second") + '\n[datasets.others]\nquery = "SELECT 1 AS id"\nkey = "id"\n'
        (self.directory / "cacheservice.toml").write_text(changed)
        self.assertIn("1 added", self.admin("reload"))

        def know() -> bool:
            return all(first == b"OK" and "unknown" not in str(second) for first, second in replies("second"))

        # The workers get it at once, and apply it in their next turn.
        wait_until(know, "the new settings in both workers")

    def test_a_worker_after_a_reload(self) -> None:
        """A worker that is started after a reload has the settings that are in effect."""
        daemon = self.begun(QUICK)
        text = self.configured(QUICK, '\n[datasets.others]\nquery = "SELECT 1 AS id"\nkey = "id"\n')
        (self.directory / "cacheservice.toml").write_text(text.replace("processes = 2", "processes = 1"))
        self.assertIn("workers.processes", self.admin("reload"))
        for pid in workers_of(daemon.process.pid):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(self.serving(daemon)) == 4, "two new workers")
        pids = workers_of(daemon.process.pid)
        self.assertEqual(len(pids), 2)
        for client in client_of_each(self.resp_of(daemon), pids).values():
            self.assertNotIn("unknown", str(Client(client).ask("GET", "others:1")))
            client.close()


def shown_of(pid: int) -> bytes:
    """Return what other processes of the user can read about a process: its environment and its command line."""
    return Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()


def files_of(pid: int) -> list[str]:
    """Return the paths of the open files of a process, besides its standard streams."""
    targets = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if int(each.name) > 2]
    return [each for each in targets if each.startswith("/")]


def connected_to(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=GIVE_UP_S)
