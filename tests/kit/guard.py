"""Test cases of guarded sessions, with a faulty network before the server."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from psycopg2.extensions import parse_dsn
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList, ensureDeferred
from twisted.internet.task import LoopingCall, deferLater
from twisted.trial.unittest import TestCase

from cacheservice.base.errors import RefreshFailed
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.target import parse
from tests.kit.chaos import FaultyNetwork
from tests.kit.datasets import rows_builder
from tests.kit.postgres import connect, fresh_database, sessions_left
from tests.kit.readings import read_one
from tests.kit.waiting import until

ROUNDS = 50
LONG_S = 60.0  # never reached: what ends the read is the fault
FREEZE_S = 10  # afterwards another process thaws what is frozen, so that a reactor that hangs is seen to have hung
LONGEST_GAP_S = 5.0
QUICK = "SELECT i AS id, repeat('x', 100) AS filler FROM generate_series(1, 200) i"
ONE_SLOW_ROW = "SELECT 1 AS id, pg_sleep(60)"
MANY_SLOW_ROWS = "SELECT i AS id, pg_sleep(0.01) FROM generate_series(1, 100000) i"
Fault = Callable[[int], Awaitable[object]]


def settings(query: str = QUICK, timeout_s: float = LONG_S) -> DatasetSettings:
    return DatasetSettings(name="things", query=query, key=("id",), timeout_s=timeout_s)


class Ticker:
    """Ticks every 10 ms; its longest gap is how long the reactor was held, at most."""

    def __init__(self) -> None:
        self.longest_gap_s = 0.0
        self.last_at = time.monotonic()
        self.loop = LoopingCall(self.tick)
        self.loop.start(0.01)

    def tick(self) -> None:
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self.last_at)
        self.last_at = now

    def stop(self) -> None:
        if self.loop.running:
            self.loop.stop()


def our_timers() -> list[str]:
    """Delayed calls of the package; the proxy of the test has some of its own."""
    return [str(call) for call in reactor.getDelayedCalls() if "cacheservice" in (call.func.__module__ or "")]


def held() -> dict[str, Any]:
    """What the process and its reactor hold, except the ticker."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "readers": sorted(map(repr, reactor.getReaders())),
        "writers": sorted(map(repr, reactor.getWriters())),
        "delayed calls": sorted(
            repr(call.func) for call in reactor.getDelayedCalls() if not isinstance(call.func, LoopingCall)
        ),
    }


@pytest.mark.usefixtures("server")
class GuardTestCase(TestCase):
    """A database of its own, the faulty network before the server, and a session at the side."""

    server: EmbeddedPostgres
    timeout = 240

    async def setUp(self) -> None:
        self.database_name = fresh_database(self.server, self.addCleanup)
        self.side = connect(self.server)
        self.addCleanup(self.close_side)
        self.network = FaultyNetwork(self.server.port)
        await self.network.start()
        self.addCleanup(self.network.stop)
        self.password = parse_dsn(self.server.dsn())["password"]
        self.status = DatabaseStatus()
        self.direct = self.make_database(self.server.port)
        self.database = self.make_database(self.network.port)
        self.ticker = Ticker()
        self.addCleanup(self.ticker.stop)

    def close_side(self) -> None:
        self.side.close()

    def make_database(self, port: int | None = None, **dsn: Any) -> Database:
        dsn = {"database": self.database_name, "port": port, **dsn}
        database = Database(reactor, parse(self.server.dsn(**dsn)), LONG_S, self.status)
        self.addCleanup(database.stop)
        return database

    def read(self, query: str = QUICK, timeout_s: float = LONG_S, database: Database | None = None) -> Deferred[Any]:
        """Through the faulty network unless another `database` is given."""
        return read_one(database or self.database, settings(query, timeout_s), rows_builder)

    def guard(self, timeout_s: float = LONG_S, host: str = "127.0.0.1", port: int | None = None) -> GuardedConnection:
        target = parse(self.server.dsn(database=self.database_name, host=host, port=port))
        return GuardedConnection(reactor, target, reactor.seconds() + timeout_s)

    async def open(self, timeout_s: float = LONG_S, port: int | None = None) -> GuardedConnection:
        """A session that is past its connecting, and that its user has closed."""
        guard = self.guard(timeout_s, port=port)
        await guard.connect(self.direct.connector, "test", LONG_S)
        return guard

    def ask(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self.side.cursor() as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchall()

    def busy(self) -> list[int]:
        """The backends of our database that are at work on what takes long."""
        sql = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event = 'PgSleep'"
        return [pid for (pid,) in self.ask(sql, self.database_name)]

    async def until_busy(self, number: int) -> list[int]:
        while len(pids := self.busy()) != number:
            await deferLater(reactor, 0.005)
        return pids

    def thaw_later(self, pids: list[int]) -> None:
        """Thaw after `FREEZE_S` from outside: libpq's cancel would hold our threads as well."""
        words = " ".join(map(str, pids))
        guardian = subprocess.Popen(["sh", "-c", f"sleep {FREEZE_S}; kill -CONT {words}"], stderr=subprocess.DEVNULL)
        self.addCleanup(guardian.wait)
        self.addCleanup(guardian.kill)

    def check(self, error: BaseException, expected: type[BaseException]) -> None:
        self.assertIs(type(error), expected, repr(error))
        if not isinstance(error, RefreshFailed):
            return
        for text in (str(error), error.advice):
            self.assertTrue(text.strip())
            self.assertEqual(len(text.splitlines()), 1, text)
            self.assertNotIn(self.password, text)
            self.assertNotIn("postgresql://", text)

    async def outlive(
        self, fault: Fault, expected: type[BaseException], *, at_once: int = 1, mend: Callable[[], object] | None = None
    ) -> None:
        """Let `fault` fail `ROUNDS` reads, `at_once` at a time; then repair it, and check that nothing is left."""
        await self.read()  # whatever is made once is made by now
        await until(lambda: not self.network.ends)
        gc.collect()
        before = held()
        kept = []  # with their tracebacks, and so with all that the reads held: nothing may be closed by the collector
        self.ticker.longest_gap_s = 0.0
        self.ticker.tick()
        for first in range(0, ROUNDS, at_once):
            attempts = [ensureDeferred(fault(number)) for number in range(first, first + at_once)]
            for succeeded, result in await DeferredList(attempts, consumeErrors=True):
                self.assertFalse(succeeded, result)
                self.check(result.value, expected)
                kept.append((result, result.value))
            self.assertEqual(our_timers(), [])
            self.assertEqual(self.status.connections, 0)
        self.assertLess(self.ticker.longest_gap_s, LONGEST_GAP_S)
        if mend is not None:
            await ensureDeferred(as_awaitable(mend))
        await self.check_nothing_left(before)

    async def check_nothing_left(self, before: dict[str, Any]) -> None:
        gc.collect()
        limit = time.monotonic() + 30  # the proxy's own ends need a moment; ours would stay for a minute
        while held() != before and time.monotonic() < limit:
            await deferLater(reactor, 0.02)
        self.assertEqual(held(), before)
        self.assertEqual(await sessions_left(self.server, self.database_name), [])
        self.network.heal()
        await self.read()
        self.assertEqual(self.status.connections, 0)
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])


async def as_awaitable(call: Callable[[], object]) -> None:
    result = call()
    if isinstance(result, Deferred):
        await result
