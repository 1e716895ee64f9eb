"""Laws of the guarded session: whatever the server or the network does, a read ends with the right error,
in time, without holding the reactor, and leaves nothing behind.

Each fault strikes 50 reads. Deadlines are short only where the deadline is what ends the read; elsewhere they are so
long that a timer left over would still be there at the end, and be found.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, DeferredList, TimeoutError, ensureDeferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.base.errors import (
    DatabaseUnavailable,
    DeadlineExceeded,
    LockTimeout,
    LoginRefused,
    NoSessionLeft,
    QueryFailed,
    QueryTimeout,
    ServerTooOld,
)
from cacheservice.sources.postgres import oldest
from cacheservice.sources.postgres.connector import Connector
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.resolve import Resolver
from cacheservice.sources.postgres.target import parse
from tests.kit.guard import LONG_S, MANY_SLOW_ROWS, ONE_SLOW_ROW, QUICK, ROUNDS, GuardTestCase
from tests.kit.postgres import connect
from tests.kit.waiting import until


class ServerFaultTests(GuardTestCase):
    """What the server does to a session."""

    async def test_a_read_of_many_slow_rows_ends_at_our_deadline(self) -> None:
        """Each statement is in time, all of them are not: the deadline is of the whole read."""
        await self.outlive(lambda _: self.read(MANY_SLOW_ROWS, 0.3), DeadlineExceeded, at_once=10)

    async def test_a_slow_statement_ends_at_our_deadline(self) -> None:
        """A statement without a limit of its own ends at the deadline of its session."""

        async def slow(_: int) -> None:
            guard = await self.open(0.3)
            await Deferred.fromCoroutine(sleep(guard)).addBoth(guard.close_and_passthrough)

        async def sleep(guard: GuardedConnection) -> None:
            await guard.execute("SET client_connection_check_interval = 100")
            await guard.execute("SELECT pg_sleep(60)")

        await self.outlive(slow, DeadlineExceeded, at_once=10)

    async def test_a_statement_timeout_is_a_query_timeout(self) -> None:
        """The server's statement_timeout is reported as QueryTimeout, never as the service's own cancellation."""

        async def slow(_: int) -> None:
            guard = await self.open()
            d = guard.execute("SET statement_timeout = 20; SELECT pg_sleep(60)")
            await d.addBoth(guard.close_and_passthrough)

        await self.outlive(slow, QueryTimeout, at_once=5)

    async def test_the_server_ends_one_slow_statement_before_our_deadline_does(self) -> None:
        """A read of one row that takes too long fails by the server's word."""
        await self.outlive(lambda _: self.read(ONE_SLOW_ROW, 24.0), QueryTimeout, at_once=ROUNDS)

    async def test_a_lock_timeout_is_a_lock_timeout(self) -> None:
        """The server's lock_timeout is reported as LockTimeout."""
        with closing(connect(self.server, self.database_name)) as holder, holder.cursor() as cursor:
            cursor.execute("CREATE TABLE locked ()")
            cursor.execute("BEGIN; LOCK TABLE locked")

            async def blocked(_: int) -> None:
                guard = await self.open()
                d = guard.execute("SET lock_timeout = 20; SELECT * FROM locked")
                await d.addBoth(guard.close_and_passthrough)

            await self.outlive(blocked, LockTimeout, at_once=5)

    async def test_a_wrong_query_is_a_failed_query(self) -> None:
        """What the server answers with an error is QueryFailed, with its SQLSTATE."""
        await self.outlive(lambda _: self.read("SELECT nothing AS id FROM nowhere"), QueryFailed, at_once=5)
        error = await self.assertFailure(self.read("SELECT 1/0 AS id"), QueryFailed)
        self.assertEqual(error.sqlstate, "22012")

    async def test_frozen_backends_hold_nothing_but_themselves(self) -> None:
        """Backends under SIGSTOP: each read ends at its deadline, and the reactor turns on."""
        frozen: list[int] = []

        async def freeze() -> None:
            frozen.extend(await self.until_busy(ROUNDS))
            self.thaw_later(frozen)
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)

        def thaw() -> None:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)

        async def read(number: int) -> None:
            if number == 0:
                freezing = ensureDeferred(freeze())
            try:
                await self.read(MANY_SLOW_ROWS, 6.0)
            finally:
                if number == 0:
                    await freezing

        await self.outlive(read, DeadlineExceeded, at_once=ROUNDS, mend=thaw)

    async def test_a_frozen_postmaster_accepts_nobody_and_holds_nobody(self) -> None:
        """With the postmaster under SIGSTOP a connect ends at its deadline, and the reactor turns on."""

        async def read(number: int) -> None:
            if number == 0:
                self.thaw_later([self.server.pid])
                self.server.freeze()
            await self.read(QUICK, 0.2, self.direct)

        await self.outlive(read, DeadlineExceeded, at_once=10, mend=self.server.thaw)

    async def test_a_busy_session_is_abandoned_while_the_postmaster_is_frozen(self) -> None:
        """Ending a session never asks the postmaster (libpq's cancel would, without limit)."""
        reads: list[Deferred[Any]] = []

        async def freeze_and_cancel() -> None:
            await self.until_busy(ROUNDS)
            self.thaw_later([self.server.pid])
            self.server.freeze()
            for d in reads:
                d.cancel()

        async def read(number: int) -> None:
            if number == 0:
                freezing = ensureDeferred(freeze_and_cancel())
            reads.append(self.read(ONE_SLOW_ROW, database=self.direct))
            try:
                await reads[-1]
            finally:
                if number == 0:
                    await freezing

        await self.outlive(read, CancelledError, at_once=ROUNDS, mend=self.server.thaw)

    async def test_a_frozen_server_ends_busy_reads_at_their_deadline(self) -> None:
        """With the whole server under SIGSTOP, reads under way end at their deadline."""

        async def freeze() -> None:
            await self.until_busy(ROUNDS)
            self.server.freeze(backends=True)
            self.thaw_later([process.pid for process in self.server._frozen])

        async def read(number: int) -> None:
            if number == 0:
                freezing = ensureDeferred(freeze())
            try:
                await self.read(MANY_SLOW_ROWS, 6.0)
            finally:
                if number == 0:
                    await freezing

        await self.outlive(read, DeadlineExceeded, at_once=ROUNDS, mend=self.server.thaw)

    async def test_a_terminated_busy_session_is_unavailable(self) -> None:
        """pg_terminate_backend during a statement: DatabaseUnavailable."""

        async def terminated(_: int) -> None:
            d = self.read(ONE_SLOW_ROW)
            for pid in await self.until_busy(1):
                self.ask("SELECT pg_terminate_backend(%s)", pid)
            await d

        await self.outlive(terminated, DatabaseUnavailable)

    async def test_a_session_terminated_while_idle_in_transaction_is_unavailable(self) -> None:
        """pg_terminate_backend between two statements: nothing is logged, and the next statement reports it."""

        async def terminated(_: int) -> None:
            guard = await self.open()
            cursor = await guard.execute("BEGIN; SELECT pg_backend_pid()")
            ((pid,),) = cursor.fetchall()
            self.ask("SELECT pg_terminate_backend(%s)", pid)
            await until(lambda: not self.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid))
            await guard.execute("SELECT 1").addBoth(guard.close_and_passthrough)

        await self.outlive(terminated, DatabaseUnavailable)

    async def test_a_cancelled_statement_is_no_timeout_and_no_shutdown(self) -> None:
        """pg_cancel_backend is QueryFailed: neither QueryTimeout nor the service's own cancellation."""

        async def cancelled(_: int) -> None:
            d = self.read(ONE_SLOW_ROW)
            for pid in await self.until_busy(1):
                self.ask("SELECT pg_cancel_backend(%s)", pid)
            await d

        await self.outlive(cancelled, QueryFailed)

    async def test_an_immediate_restart_ends_reads_as_unavailable(self) -> None:
        """The server is restarted in immediate mode while reads are under way."""

        async def restart() -> None:
            await self.until_busy(10)
            await deferToThread(self.server.restart, "immediate")
            self.side.close()
            self.side = connect(self.server)

        async def read(number: int) -> None:
            restarting = ensureDeferred(restart()) if number % 10 == 0 else None
            try:
                await self.read(ONE_SLOW_ROW)
            finally:
                if restarting is not None:
                    await restarting

        await self.outlive(read, DatabaseUnavailable, at_once=10)

    async def test_a_server_that_dies_amid_every_stage_of_many_reads(self) -> None:
        """Sessions that connect, wait and fetch when the server dies: each is unavailable, and the reactor's own books
        stay right (libpq closes sockets by itself; the kernel reuses their descriptors at once)."""
        self.addCleanup(self.server.start)
        for _ in range(10):
            reads: list[Deferred[Any]] = []

            def more(reads: list[Deferred[Any]] = reads) -> None:
                sql = MANY_SLOW_ROWS if len(reads) % 2 else "SELECT i AS id FROM generate_series(1, 100000) AS i"
                reads.append(self.read(sql))

            while len(reads) < 20:
                more()
                await deferLater(reactor, 0.003)
            stopping = deferToThread(self.server.stop, "immediate")
            while not stopping.called:
                if len(reads) < ROUNDS:
                    more()
                await deferLater(reactor, 0.001)
            await stopping
            for succeeded, result in await DeferredList(reads, consumeErrors=True):
                if not succeeded:
                    self.check(result.value, DatabaseUnavailable)
            if hasattr(reactor, "_selectables"):  # epoll
                self.assertEqual(reactor._reads | reactor._writes, set(reactor._selectables))
            await deferToThread(self.server.start)
        self.side.close()
        self.side = connect(self.server)
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])


class NoSessionTests(GuardTestCase):
    """What keeps a session from opening."""

    async def test_refused(self) -> None:
        """A refused connection is reported at once, not at the deadline."""
        await self.read()

        async def refused(number: int) -> None:
            if number == 0:
                await self.network.refuse()
            await self.read()

        await self.outlive(refused, DatabaseUnavailable, mend=self.network.accept, at_once=1)

    async def test_a_server_that_is_too_old(self) -> None:
        """It is refused after the login, with the version that is needed, and nothing is left of the session."""
        self.patch(oldest, "OLDEST_VERSION", 990_000)
        error = await self.assertFailure(self.read(), ServerTooOld)
        self.assertRegex(str(error), r"^PostgreSQL \d+\.\d+ is too old; use PostgreSQL 99 or later$")
        self.assertEqual(self.status.connections, 0)
        guard = self.guard()
        with self.assertRaises(ServerTooOld):
            await guard.connect(self.direct.connector, "test", LONG_S)
        await self.assertFailure(guard.execute("SELECT 1"), ServerTooOld)

    async def test_wrong_password(self) -> None:
        """A refused password is LoginRefused, shows neither password, and advises to check it."""
        wrong = self.make_database(self.network.port, password="wr0ng s3cret")

        async def read(_: int) -> None:
            await self.read(database=wrong).addErrback(told)

        def told(failure: Any) -> Any:
            self.assertNotIn("wr0ng", str(failure.value))
            self.assertIn("password authentication failed", str(failure.value))
            return failure

        await self.outlive(read, LoginRefused, at_once=10)

    async def test_no_such_database(self) -> None:
        """A database that is not there is DatabaseUnavailable, and named."""
        absent = self.make_database(self.network.port, database="absent")

        async def read(_: int) -> None:
            await self.read(database=absent).addErrback(told)

        def told(failure: Any) -> Any:
            self.assertIn('"absent"', str(failure.value))
            return failure

        await self.outlive(read, DatabaseUnavailable, at_once=10)

    async def test_too_many_clients(self) -> None:
        """A role whose CONNECTION LIMIT is used up gets NoSessionLeft, with the statement that raises it."""
        role = f"few_{self.database_name}"
        with self.side.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'few' CONNECTION LIMIT 0")
        self.addCleanup(self.drop_role, role)
        limited = self.make_database(self.network.port, user=role, password="few")

        async def read(_: int) -> None:
            await self.read(database=limited)

        await self.outlive(read, NoSessionLeft, at_once=10)
        error = await self.assertFailure(self.read(database=limited), NoSessionLeft)
        self.assertIn(f"ALTER ROLE {role} CONNECTION LIMIT", error.advice)

    def drop_role(self, role: str) -> None:
        with self.side.cursor() as cursor:
            cursor.execute(f"DROP ROLE {role}")

    async def test_an_advice_fits_what_the_server_refused(self) -> None:
        """Where the server answered, nobody is sent to see whether it runs."""
        for dsn, words in ({"password": "wrong"}, "password"), ({"database": "absent"}, "database"):
            refused = self.make_database(self.network.port, **dsn)
            error = await self.assertFailure(self.read(database=refused), DatabaseUnavailable)
            self.assertIn(words, error.advice)

    async def test_a_connect_that_hangs(self) -> None:
        """An accepted connection that hears nothing ends at the deadline."""

        async def read(number: int) -> None:
            self.network.silence()
            await self.read(QUICK, 0.2)

        await self.outlive(read, DeadlineExceeded, at_once=10)

    async def test_connecting_has_a_deadline_of_its_own(self) -> None:
        """A connect that hangs ends after connect_timeout_s, however long the read's own deadline is."""
        hasty = Database(
            reactor, parse(self.server.dsn(database=self.database_name, port=self.network.port)), 0.2, self.status
        )
        self.addCleanup(hasty.stop)

        async def read(_: int) -> None:
            self.network.silence()
            await self.read(database=hasty)

        await self.outlive(read, DeadlineExceeded, at_once=10)


class NetworkFaultTests(GuardTestCase):
    """What the network does to a session, at every stage of it: byte 0 to 7,350 of what the server sends."""

    def sweep(self, number: int) -> int:
        return number * 150

    async def test_reset(self) -> None:
        """A RST at any byte is DatabaseUnavailable."""

        async def read(number: int) -> None:
            self.network.reset(self.sweep(number))
            await self.read()

        await self.outlive(read, DatabaseUnavailable)

    async def test_truncated(self) -> None:
        """A FIN at any byte is DatabaseUnavailable."""

        async def read(number: int) -> None:
            self.network.truncate(self.sweep(number))
            await self.read()

        await self.outlive(read, DatabaseUnavailable)

    async def test_reset_between_two_statements(self) -> None:
        """A RST while nobody waits is reported by the next statement, whether the reactor or libpq saw it first."""

        async def lost(number: int) -> None:
            self.network.heal()
            guard = await self.open(port=self.network.port)
            await guard.execute("BEGIN")
            self.network.reset()
            for _ in range(1 + number % 4):  # the RST is sent in the first turn, before its events are polled for
                await deferLater(reactor, 0)
            await guard.execute("SELECT 1").addBoth(guard.close_and_passthrough)

        await self.outlive(lost, DatabaseUnavailable)

    async def test_silence(self) -> None:
        """Silence at any byte, before a result or within it, ends at the deadline."""

        async def read(number: int) -> None:
            # All that connect at once fall silent at the same byte.
            self.network.silence(self.sweep(number // 5 * 5))
            await self.read(QUICK, 0.3)

        await self.outlive(read, DeadlineExceeded, at_once=5)

    async def test_slices(self) -> None:
        """A network that hands over a few bytes at a time is not a fault."""
        self.network.slice(7)
        await self.read()
        self.assertEqual(self.flushLoggedErrors(), [])


class GivenUpTests(GuardTestCase):
    """The caller of a read does not want it any more."""

    async def test_cancelled_at_any_moment(self) -> None:
        """Cancelling ends a read at once with CancelledError, whatever it is waiting for."""

        async def read(number: int) -> None:
            d = self.read(ONE_SLOW_ROW)
            reactor.callLater(number * 0.001, d.cancel)
            await d

        await self.outlive(read, CancelledError, at_once=5)

    async def test_cancelled_in_the_turn_it_was_asked_for(self) -> None:
        """Cancelling before the reactor turned makes no difference."""

        async def read(_: int) -> None:
            d = self.read(ONE_SLOW_ROW)
            d.cancel()
            await d

        await self.outlive(read, CancelledError)

    async def test_cancelled_turn_by_turn(self) -> None:
        """Cancelling in the first, second, … fiftieth turn of the reactor makes no difference."""

        async def read(number: int) -> None:
            d = self.read(ONE_SLOW_ROW)
            for _ in range(number):
                await deferLater(reactor, 0)
            d.cancel()
            await d

        await self.outlive(read, CancelledError)

    async def test_timed_out_by_the_caller(self) -> None:
        """`addTimeout` on a read works as on any Deferred."""

        async def read(number: int) -> None:
            await self.read(ONE_SLOW_ROW).addTimeout(0.02 + number * 0.002, reactor)

        await self.outlive(read, TimeoutError, at_once=5)

    async def test_closed_amid_a_statement(self) -> None:
        """Closing a session that still works leaves nothing, and may be done twice."""

        async def close(_: int) -> None:
            guard = await self.open()
            guard.execute("SET client_connection_check_interval = 100; SELECT pg_sleep(60)")
            guard.close_and_passthrough(None)
            guard.close_and_passthrough(None)
            await guard.execute("SELECT 1")

        await self.outlive(close, DatabaseUnavailable)


class LookUpTests(GuardTestCase):
    """The name server is at fault."""

    def resolver(self, getaddrinfo: Callable[..., Any]) -> Resolver:
        resolver = Resolver(reactor, getaddrinfo)
        self.addCleanup(resolver.stop)
        return resolver

    async def connect_by_name(self, resolver: Resolver, timeout_s: float, host: str = "db.example") -> None:
        guard = self.guard(timeout_s, host)
        connecting = Deferred.fromCoroutine(guard.connect(Connector(reactor, resolver.resolve), "test", LONG_S))
        await connecting.addBoth(guard.close_and_passthrough)

    async def test_a_name_that_is_known(self) -> None:
        """A host name is looked up, and its addresses are tried in order."""
        asked = []

        def known(host: str, port: int, *_: Any) -> list[Any]:
            asked.append(host)
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.9", port)),  # nobody there
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
            ]

        await self.connect_by_name(self.resolver(known), LONG_S)
        self.assertEqual(asked, ["db.example"])

    async def test_a_look_up_that_hangs(self) -> None:
        """A look-up that hangs ends at the deadline; once it ends, its thread does."""
        let_go = threading.Event()
        self.addCleanup(let_go.set)

        def hang(*_: Any) -> list[Any]:
            let_go.wait()
            return []

        resolver = self.resolver(hang)

        def mend() -> Deferred[None]:
            let_go.set()
            resolver.stop()
            return ensureDeferred(until(lambda: not any("look-ups" in t.name for t in threading.enumerate())))

        await self.outlive(lambda _: self.connect_by_name(resolver, 0.1), DeadlineExceeded, at_once=10, mend=mend)

    async def test_a_look_up_that_fails(self) -> None:
        """A name that has no address is DatabaseUnavailable, reported at once, and names it."""

        def fail(*_: Any) -> list[Any]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        resolver = self.resolver(fail)

        async def connect_by_name(_: int) -> None:
            try:
                await self.connect_by_name(resolver, LONG_S)
            except DatabaseUnavailable as error:
                self.assertIn("db.example", str(error))
                raise

        await self.outlive(connect_by_name, DatabaseUnavailable, at_once=5)

    async def test_a_name_that_cannot_be_one(self) -> None:
        """A name that getaddrinfo refuses with an error of another kind is DatabaseUnavailable at once, too."""
        resolver = self.resolver(socket.getaddrinfo)
        for impossible in "db..example", "x" * 64 + ".example":
            with self.assertRaises(DatabaseUnavailable) as caught:
                await self.connect_by_name(resolver, LONG_S, impossible)
            self.check(caught.exception, DatabaseUnavailable)
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_the_process_ends_while_a_look_up_hangs(self) -> None:
        """A look-up that never ends does not keep the process from ending."""
        program = """
            import sys, time
            from twisted.internet import reactor
            from twisted.internet.defer import Deferred
            from cacheservice.sources.postgres.connector import Connector
            from cacheservice.sources.postgres.guard import GuardedConnection
            from cacheservice.sources.postgres.resolve import Resolver
            from cacheservice.sources.postgres.target import parse

            resolver = Resolver(reactor, lambda *_: time.sleep(3600))
            guard = GuardedConnection(reactor, parse("postgresql://me@db.example/x"), reactor.seconds() + 0.2)

            def told(failure):
                sys.stdout.write(type(failure.value).__name__)
                resolver.stop()
                reactor.stop()

            d = Deferred.fromCoroutine(guard.connect(Connector(reactor, resolver.resolve), "test", 60))
            d.addBoth(guard.close_and_passthrough).addBoth(told)
            reactor.run()
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "DeadlineExceeded", ""))
