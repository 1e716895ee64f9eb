"""A login never holds the reactor, however much there is to compute, and leaves nothing behind."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import time
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from cacheservice.base.errors import DeadlineExceeded
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.target import parse
from tests.kit.guard import LONG_S, GuardTestCase, held, our_timers
from tests.kit.waiting import until

ITERATIONS = 1_000_000
PASSWORD = "correct horse battery staple"


def scram_verifier(password: str, iterations: int) -> str:
    """What PostgreSQL keeps of a password (RFC 5803), as `SET scram_iterations` of PostgreSQL 16 makes it."""
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    stored, server, salted_by = (
        base64.b64encode(each).decode() for each in (hashlib.sha256(client_key).digest(), server_key, salt)
    )
    return f"SCRAM-SHA-256${iterations}:{salted_by}${stored}:{server}"


class Turns:
    """Counts the turns of the reactor, and the most CPU time that its thread used between two of them."""

    def __init__(self) -> None:
        self.count = 0
        self.longest_s = 0.0
        self._cpu_s = time.thread_time()
        self._running = True
        self._turn()

    def _turn(self) -> None:
        cpu_s = time.thread_time()
        self.longest_s = max(self.longest_s, cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        self.count += 1
        if self._running:
            reactor.callLater(0.001, self._turn)

    def stop(self) -> None:
        self._running = False


class SlowScramTests(GuardTestCase):
    """A role whose verifier has a million iterations."""

    async def setUp(self) -> None:
        await super().setUp()
        self.role = f"slow_{self.database_name}"
        with self.side.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {self.role} LOGIN PASSWORD '{scram_verifier(PASSWORD, ITERATIONS)}'")
        self.addCleanup(self.drop_role)

    def drop_role(self) -> None:
        with self.side.cursor() as cursor:
            cursor.execute(f"DROP ROLE {self.role}")

    def log_in(self, timeout_s: float = LONG_S) -> tuple[GuardedConnection, Deferred[Any]]:
        dsn = self.server.dsn(user=self.role, password=PASSWORD, database=self.database_name)
        guard = GuardedConnection(reactor, parse(dsn), reactor.seconds() + timeout_s)
        return guard, Deferred.fromCoroutine(guard.connect(self.direct.connector, "test", LONG_S))

    async def test_the_reactor_turns_meanwhile(self) -> None:
        """A login that computes for a second takes none of that from the reactor."""
        began_cpu_s = time.process_time()
        turns = Turns()
        guard, connecting = self.log_in()
        await connecting
        turns.stop()
        computed_s = time.process_time() - began_cpu_s
        cursor = await guard.execute("SELECT current_user::text")
        self.assertEqual(cursor.fetchall(), [(self.role.encode(),)])
        guard.close_and_passthrough(None)
        self.assertGreater(computed_s, 0.2)  # otherwise it was not a slow login
        self.assertLess(turns.longest_s, 0.05)
        self.assertGreater(turns.count, 50)

    async def test_abandoned_while_it_computes(self) -> None:
        """A deadline in the middle of it is answered at once; the session is closed when the thread returns."""
        guard, connecting = self.log_in()
        await connecting  # whatever is made once is made by now
        guard.close_and_passthrough(None)
        await until(lambda: not self.ask("SELECT 1 FROM pg_stat_activity WHERE usename = %s", self.role))
        before = held()
        for _ in range(3):
            guard, connecting = self.log_in(timeout_s=0.1)
            turns = Turns()
            await self.assertFailure(connecting.addBoth(guard.close_and_passthrough), DeadlineExceeded)
            turns.stop()
            self.assertLess(turns.longest_s, 0.05)
        self.assertEqual(our_timers(), [])
        await until(lambda: held() == before)
        await deferLater(reactor, 0.1)
        self.assertEqual(self.flushLoggedErrors(), [])
