"""Several hosts, or several addresses of one: the first that will do, whatever the others do."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from threading import Event
from typing import Any

import psycopg2
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread

from cacheservice.base.errors import DatabaseUnavailable, DeadlineExceeded
from cacheservice.sources.postgres.connector import Connector
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.resolve import Resolver
from cacheservice.sources.postgres.target import parse
from tests.kit.guard import LONG_S, GuardTestCase, our_timers
from tests.kit.standby import running_standby


class Silent(Factory):
    """Accepts connections, counts them, and never sends anything."""

    protocol = Protocol
    noisy = False

    def __init__(self) -> None:
        self.accepted = 0
        self.open: set[Any] = set()

    def buildProtocol(self, addr: Any) -> Protocol:
        self.accepted += 1
        return Protocol()


class HostsTestCase(GuardTestCase):
    async def setUp(self) -> None:
        await super().setUp()
        self.silent = Silent()
        self.silent_port = reactor.listenTCP(0, self.silent, interface="127.0.0.1")
        self.addCleanup(self.silent_port.stopListening)
        self.resolver = Resolver(reactor)
        self.addCleanup(self.resolver.stop)
        self.connector = Connector(reactor, self.resolver.resolve)

    @property
    def hangs(self) -> tuple[str, int]:
        return "127.0.0.1", self.silent_port.getHost().port

    @property
    def works(self) -> tuple[str, int]:
        return "127.0.0.1", self.server.port

    def dsn(self, *hosts: tuple[str, int], more: str = "", user: str = "postgres", password: str | None = None) -> str:
        names, ports = ",".join(host for host, _ in hosts), ",".join(str(port) for _, port in hosts)
        return (
            f"host={names} port={ports} dbname={self.database_name} user={user} "
            f"password={self.password if password is None else password} {more}"
        )

    async def port_of(self, dsn: str, timeout_s: float = LONG_S, connector: Connector | None = None) -> int:
        """Of the server that a session is opened to."""
        guard = GuardedConnection(reactor, parse(dsn), reactor.seconds() + timeout_s)
        try:
            await guard.connect(connector or self.connector, "test", timeout_s)
            cursor = await guard.execute("SELECT current_setting('port')::int")
            port: int = cursor.fetchone()[0]
            return port
        finally:
            guard.close_and_passthrough(None)

    async def fails(self, dsn: str, timeout_s: float = LONG_S) -> DatabaseUnavailable:
        error = await self.assertFailure(Deferred.fromCoroutine(self.port_of(dsn, timeout_s)), DatabaseUnavailable)
        self.assertEqual(len(str(error).splitlines()), 1)
        self.assertNotIn(self.password, str(error))
        self.assertEqual(our_timers(), [])
        assert isinstance(error, DatabaseUnavailable)
        return error


class SeveralHostsTests(HostsTestCase):
    """One after the other, each with its share of the time."""

    async def test_a_first_host_that_hangs(self) -> None:
        """It leaves enough time for the next, and the next session does not pay for it again."""
        for _ in range(5):
            self.assertEqual(await self.port_of(self.dsn(self.hangs, self.works), 4.0), self.server.port)
        self.assertEqual(self.silent.accepted, 1)

    async def test_all_hang(self) -> None:
        """All of them are tried and named before the time is over."""
        error = await self.fails(self.dsn(self.hangs, ("localhost", self.hangs[1])), 1.0)
        self.assertIsInstance(error, DeadlineExceeded)
        self.assertIn("did not accept a session within", str(error))
        self.assertEqual(str(error).count("did not answer within"), self.silent.accepted)
        self.assertGreaterEqual(self.silent.accepted, 2)

    async def test_connect_timeout_of_the_connection_string(self) -> None:
        """It limits the time of each address, as libpq applies it."""
        dsn = self.dsn(self.hangs, self.works, more="connect_timeout=1")
        self.assertEqual(await self.port_of(dsn), self.server.port)

    async def test_each_failure_is_told(self) -> None:
        """Each address with its own cause, and advice about the most informative one."""
        await self.network.refuse()
        error = await self.fails(self.dsn(("127.0.0.1", self.network.port), self.works, password="wr0ng-s3cret"))
        self.assertRegex(str(error), rf"port {self.network.port}: Connection refused; .*port {self.server.port}: FATAL")
        self.assertIn("password", error.advice)
        self.assertNotIn("wr0ng-s3cret", str(error))

    async def test_a_refused_login_ends_the_search(self) -> None:
        """As in libpq: the next host is not asked to overrule it."""
        error = await self.fails(self.dsn(self.works, self.hangs, password="wr0ng-s3cret"))
        self.assertIn("password authentication failed", str(error))
        self.assertEqual(self.silent.accepted, 0)

    async def test_a_server_that_starts_is_passed_over(self) -> None:
        """One that answers "not yet" is not the end of the search."""
        with closing(socket.create_server(("127.0.0.1", 0))) as listening:
            starting = deferToThread(self.answer_not_yet, listening)
            dsn = self.dsn(("127.0.0.1", listening.getsockname()[1]), self.works, more="sslmode=disable")
            self.assertEqual(await self.port_of(dsn), self.server.port)
            await starting

    def answer_not_yet(self, listening: socket.socket) -> None:
        client, _ = listening.accept()
        with client:
            client.recv(8192)
            fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
            client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
            client.recv(8192)

    async def test_a_random_order(self) -> None:
        """load_balance_hosts=random shuffles hosts; without it the order is kept."""
        connector = Connector(reactor, self.resolver.resolve, shuffle=list.reverse)
        dsn = self.dsn(self.hangs, self.works, more="load_balance_hosts=random")
        self.assertEqual(await self.port_of(dsn, connector=connector), self.server.port)
        self.assertEqual(self.silent.accepted, 0)


class NamesTests(HostsTestCase):
    """Names that resolve to several addresses, or to none."""

    def connector_with(self, getaddrinfo: Callable[..., Any]) -> Connector:
        resolver = Resolver(reactor, getaddrinfo)
        self.addCleanup(resolver.stop)
        return Connector(reactor, resolver.resolve)

    async def test_a_first_address_that_hangs(self) -> None:
        """One name with two addresses is two addresses."""

        def two(host: str, port: int, *_: Any) -> list[Any]:
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.7", "127.0.0.1")
            ]

        deaf = reactor.listenTCP(self.network.port, self.silent, interface="127.0.0.7")
        self.addCleanup(deaf.stopListening)
        dsn = self.dsn(("db.example", self.network.port))
        port = await self.port_of(dsn, 4.0, self.connector_with(two))
        self.assertEqual((port, self.silent.accepted), (self.server.port, 1))

    async def test_names_that_do_not_resolve(self) -> None:
        """One fails, one hangs, one works: the last is used, and a hanging one is not waited for again."""
        released = Deferred[None]()
        asked: list[str] = []

        async def resolve(name: str) -> list[str]:
            asked.append(name)
            if name == "absent.example":
                raise DatabaseUnavailable(f'the name look-up of "{name}" found no address')
            if name == "hangs.example":
                await released
            return ["127.0.0.1"]

        connector = Connector(reactor, resolve)
        port = self.server.port
        dsn = self.dsn(("absent.example", port), ("hangs.example", port), ("db.example", port))
        self.assertEqual(await self.port_of(dsn, 1.0, connector), port)
        # Waited for again, it would take the share of a minute.
        self.assertEqual(await self.port_of(dsn, LONG_S, connector), port)
        self.assertEqual(sorted(asked[:3]), ["absent.example", "db.example", "hangs.example"])
        released.callback(None)

    async def test_a_name_that_hangs_takes_one_thread(self) -> None:
        """However often it is looked up, other names are looked up, too."""
        let_go = Event()
        self.addCleanup(let_go.set)
        hanging: list[str] = []

        def getaddrinfo(host: str, port: int, *_: Any) -> list[Any]:
            if host == "hangs.example":
                hanging.append(host)
                let_go.wait()
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        connector = self.connector_with(getaddrinfo)
        port = self.server.port
        dsn = self.dsn(("hangs.example", port), ("db.example", port))
        for _ in range(30):
            self.assertEqual(await self.port_of(dsn, 3.0, connector), port)
        self.assertEqual(len(hanging), 1)

    async def test_nothing_resolves(self) -> None:
        """Each name is in the error."""

        async def resolve(name: str) -> list[str]:
            raise DatabaseUnavailable(f'the name look-up of "{name}" found no address')

        guard = Deferred.fromCoroutine(
            self.port_of(self.dsn(("a.example", 1), ("b.example", 1)), LONG_S, Connector(reactor, resolve))
        )
        error = await self.assertFailure(guard, DatabaseUnavailable)
        self.assertRegex(str(error), "a.example.*b.example")
        self.assertIn("name server", error.advice)


ATTRS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")


class SessionAttrsTests(HostsTestCase):
    """target_session_attrs means what it means to libpq."""

    timeout = 240

    async def test_as_libpq(self) -> None:
        """Primary and standby in both orders, with a host that refuses: the one that libpq itself chooses."""
        standby = running_standby(self.server)
        dsn = await deferToThread(standby.__enter__)
        self.addCleanup(deferToThread, standby.__exit__, None, None, None)
        port = int(psycopg2.extensions.parse_dsn(dsn())["port"])
        await self.network.refuse()
        refuses, replica = ("127.0.0.1", self.network.port), ("127.0.0.1", port)
        for hosts in (self.works, replica), (replica, self.works), (refuses, self.works), (self.works,), (replica,):
            for attrs in ATTRS:
                wanted = self.dsn(*hosts, more=f"target_session_attrs={attrs}")
                libpq = await deferToThread(self.chosen_by_libpq, wanted)
                try:
                    # What is remembered of one value is not to change the order for the next.
                    ours = await self.port_of(wanted, connector=Connector(reactor, self.resolver.resolve))
                except DatabaseUnavailable as error:
                    self.assertIn("port", str(error))
                    ours = None
                self.assertEqual(ours, libpq, (hosts, attrs))

    def chosen_by_libpq(self, dsn: str) -> int | None:
        try:
            with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT current_setting('port')::int")
                port: int = cursor.fetchone()[0]
                return port
        except psycopg2.OperationalError:
            return None

    async def test_a_reader_never_is_read_write(self) -> None:
        """A role whose transactions are read-only by default, as `migrate` makes it: the error names what to use."""
        role = f"reader_{self.database_name}"
        with self.side.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'reads'")
            cursor.execute(f"ALTER ROLE {role} SET default_transaction_read_only = on")
        self.addCleanup(self.drop, role)
        attrs = {"user": role, "password": "reads"}
        error = await self.fails(self.dsn(self.works, more="target_session_attrs=read-write", **attrs))
        self.assertIn("session is read-only", str(error))
        self.assertIn("target_session_attrs=primary", error.advice)
        primary = self.dsn(self.works, more="target_session_attrs=primary", **attrs)
        self.assertEqual(await self.port_of(primary), self.server.port)

    def drop(self, role: str) -> None:
        with self.side.cursor() as cursor:
            cursor.execute(f"DROP ROLE {role}")
