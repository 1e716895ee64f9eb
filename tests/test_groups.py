"""Laws of datasets that are read and published together."""

from __future__ import annotations

import gc
import json
import random
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import closing
from operator import lt
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import DeferredList
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.cache.cache import Cache
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.listen import tcp
from cacheservice.ports.resp.connection import RespFactory
from cacheservice.refresh.service import CacheService
from tests.kit.postgres import connect
from tests.kit.resp import Client, encode
from tests.kit.service import ServiceTestCase, declare
from tests.kit.waiting import until

ACCOUNTS = 40
START = 100
READINGS = 10_000
PUBLISHES = 30
"""Of both, at the least, while the readers read; and a failure."""

LOST = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND state = 'active'
  AND pid <> pg_backend_pid()"""


class Together(ServiceTestCase):
    timeout = 300

    async def setUp(self) -> None:
        await super().setUp()
        for name in ("checking", "savings"):
            self.sql(f"CREATE TABLE {name} AS SELECT i AS id, {START} AS n FROM generate_series(1, {ACCOUNTS}) AS i")

    def declared(self, **settings: Any) -> list[Any]:
        return [declare(name, f"TABLE {name}", group="bank", **settings) for name in ("checking", "savings")]

    async def test_one_moment(self) -> None:
        """Both are of one transaction: one as_of, one snapshot of the database, and one session for both."""
        service, cache = self.make_service(*self.declared(interval_s=3600.0))
        await self.start_and_load(service, cache)
        one, other = (cache.dataset(name).snapshot for name in ("checking", "savings"))
        assert one is not None
        assert other is not None
        self.assertEqual(
            (one.as_of, one.read_at, one.database_snapshot), (other.as_of, other.read_at, other.database_snapshot)
        )
        self.sql("UPDATE savings SET n = n + 1")
        service.refresh_now("savings")
        await until(lambda: cache.dataset("checking").snapshot is not one)
        one, other = (cache.dataset(name).snapshot for name in ("checking", "savings"))
        assert one is not None
        assert other is not None
        # The one that has not changed keeps its generation, and is of the new moment all the same.
        self.assertEqual((one.as_of, one.generation, other.generation), (other.as_of, 1, 2))

    async def test_all_or_none_when_one_fails(self) -> None:
        """If one of them cannot be read, the other one is not published either, and both report why."""
        service, cache = self.make_service(*self.declared(interval_s=3600.0))
        await self.start_and_load(service, cache)
        served = [dataset.snapshot for dataset in cache.datasets.values()]
        self.sql("UPDATE checking SET n = 1")
        self.sql("ALTER TABLE savings RENAME TO gone")
        service.refresh_now("checking")
        await until(lambda: all(dataset.consecutive_failures for dataset in cache.datasets.values()))
        self.assertEqual([dataset.snapshot for dataset in cache.datasets.values()], served)
        self.assertIn("savings", str(cache.dataset("checking").attempts[-1].error))
        self.sql("ALTER TABLE gone RENAME TO savings")
        await until(lambda: all(dataset.consecutive_failures == 0 for dataset in cache.datasets.values()))

    async def test_what_a_failure_holds(self) -> None:
        """A read that failed keeps no snapshot that is replaced later, not even until the garbage collector comes."""
        settings = {"group": "bank", "interval_s": 0.1, "probe": "SELECT clock_timestamp()"}
        slow = "SELECT id, n, pg_sleep(0.005)::text FROM savings"
        service, cache = self.make_service(
            declare("checking", "TABLE checking", **settings), declare("savings", slow, **settings)
        )
        await self.start_and_load(service, cache)
        datasets = [cache.dataset(name) for name in ("checking", "savings")]
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        replaced = []
        for trouble, end in (("ALTER TABLE savings RENAME TO gone", "ALTER TABLE gone RENAME TO savings"), (LOST, "")):
            replaced += [weakref.ref(dataset.snapshot.rows) for dataset in datasets if dataset.snapshot]
            failed = datasets[0].counts.outcomes["failed"]
            self.sql(trouble)
            while datasets[0].counts.outcomes["failed"] < failed + 3:
                await deferLater(reactor, 0.05)
                if not end:
                    self.sql(trouble)
            before = [dataset.last_generation for dataset in datasets]
            self.sql(f"{end}; UPDATE checking SET n = n + 1; UPDATE savings SET n = n + 1")
            while not all(map(lt, before, [dataset.last_generation for dataset in datasets])):
                await deferLater(reactor, 0.05)
        await service.stopService()
        await deferLater(reactor, 0.1)
        self.assertEqual([rows() for rows in replaced], [None] * 4)

    async def test_all_or_none_when_one_is_held(self) -> None:
        """If a gate refuses one of them, all are held; accepting that one lets all through."""
        service, cache = self.make_service(*self.declared(interval_s=3600.0))
        await self.start_and_load(service, cache)
        checking, savings = cache.dataset("checking"), cache.dataset("savings")
        served = checking.snapshot
        self.sql("UPDATE checking SET n = 1")
        self.sql("DELETE FROM savings WHERE id > 1")
        service.refresh_now("checking")
        await until(lambda: checking.held is not None)
        assert checking.held is not None
        assert savings.held is not None
        self.assertIs(checking.snapshot, served)
        self.assertEqual(savings.held.reason, f"would drop {ACCOUNTS} to 1 rows, limit 50 %")
        self.assertEqual(
            checking.held.reason,
            f"is of one group with savings, whose result would drop {ACCOUNTS} to 1 rows, limit 50 %",
        )
        self.assertIn("send 'accept savings'", str(checking.attempts[-1].advice))
        service.accept_next("savings")
        service.refresh_now("savings")
        await until(lambda: checking.held is None and checking.snapshot is not served)
        assert savings.snapshot is not None
        self.assertEqual((savings.snapshot.rows.count, savings.held), (1, None))

    async def test_money_is_never_made(self) -> None:
        """Money moves between two tables; a client that adds both up in one MULTI finds it all, 10,000 times out of
        10,000, through publishes and sessions that are lost."""
        service, cache = self.make_service(*self.declared(interval_s=0.05))
        await self.start_and_load(service, cache)
        outcomes = cache.dataset("checking").counts.outcomes
        ended = await self.move_money(service, cache, 1000, READINGS, lambda: outcomes["published"] >= PUBLISHES)
        self.assertGreater(ended, 0)

    async def test_money_is_never_made_in_kept_sessions(self) -> None:
        """The same where a session is kept for the next refresh, and is lost in the middle of it: it is read again."""
        slow = "SELECT id, n, pg_sleep(0.001)::text AS slept FROM {}"
        declared = [
            declare(name, slow.format(name), group="bank", interval_s=0.05, probe="SELECT clock_timestamp()")
            for name in ("checking", "savings")
        ]
        service, cache = self.make_service(*declared)
        await self.start_and_load(service, cache)
        outcomes = cache.dataset("checking").counts.outcomes
        ended = await self.move_money(service, cache, 300, 1000, lambda: outcomes["published"] >= 10)
        self.assertGreater(ended, 3)

    async def move_money(
        self, service: CacheService, cache: Cache, end_sessions_each: int, readings: int, enough: Callable[[], object]
    ) -> int:
        """Check the sum while money moves; end the service's sessions after so many transactions. Returns how many."""
        freshness = Freshness(service, cache.database, reactor)
        factory = RespFactory(cache=cache, freshness=freshness, limits=Limits(100, 60.0), clock=reactor)
        port: Any = tcp(reactor, "127.0.0.1", 0, factory)()
        stop = threading.Event()
        self.addCleanup(stop.set)

        def write() -> tuple[int, int]:
            choose = random.Random(1)
            moved = ended = 0
            with closing(connect(self.server, self.database_name)) as connection, connection.cursor() as cursor:
                while not stop.is_set():
                    source, target = choose.sample(("checking", "savings"), 2)
                    amount = choose.randrange(1, 50)
                    cursor.execute("BEGIN")
                    cursor.execute(f"UPDATE {source} SET n = n - {amount} WHERE id = {choose.randrange(1, ACCOUNTS)}")
                    cursor.execute(f"UPDATE {target} SET n = n + {amount} WHERE id = {choose.randrange(1, ACCOUNTS)}")
                    cursor.execute("COMMIT" if choose.random() < 0.9 else "ROLLBACK")
                    moved += 1
                    if moved % end_sessions_each == 0:
                        # A read that is under way loses its session.
                        cursor.execute(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                            "WHERE application_name LIKE 'cacheservice%' AND pid <> pg_backend_pid()"
                        )
                        ended += len(cursor.fetchall())
            return moved, ended

        def read(count: int) -> tuple[set[int], int]:
            sums, moments = set(), set()
            block = b"".join(
                encode(*words) for words in (("MULTI",), ("HVALS", "checking"), ("HVALS", "savings"), ("EXEC",))
            )
            with closing(socket.create_connection(("127.0.0.1", port.getHost().port), timeout=60)) as connection:
                client = Client(connection)
                while (count > 0 or not enough()) and not stop.is_set():
                    count -= 1
                    connection.sendall(block)
                    *_, (checking, savings) = [client.read() for _ in range(4)]
                    values = [json.loads(document)["n"] for document in (*checking, *savings)]
                    sums.add(sum(values))
                    moments.add(tuple(values))
            return sums, len(moments)

        writing = deferToThread(write)
        readers = 4
        answers = await DeferredList([deferToThread(read, readings // readers) for _ in range(readers)])
        stop.set()
        moved, ended = await writing
        self.assertGreater(moved, 100)
        await port.stopListening()
        factory.close_clients()
        await until(lambda: not factory.clients)
        for succeeded, answer in answers:
            self.assertTrue(succeeded, answer)
            sums, moments = answer
            self.assertEqual(sums, {2 * ACCOUNTS * START})
            self.assertGreater(moments, 1, "publishes happened meanwhile")
        return ended
