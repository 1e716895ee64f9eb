"""Laws of the refreshing service on a real server: faults change ages and nothing else, and every stop is clean."""

from __future__ import annotations

import gc
import random
from contextlib import closing
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import LoopingCall, deferLater
from twisted.internet.threads import deferToThread

from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.config import DatasetSettings
from cacheservice.refresh.service import CacheService
from tests.kit.guard import LONGEST_GAP_S, ONE_SLOW_ROW, held, our_timers
from tests.kit.postgres import connect, sessions_left
from tests.kit.service import SLOW_THINGS, THINGS, ServiceTestCase, declare
from tests.kit.waiting import until


class OutageTests(ServiceTestCase):
    """The server fails for a while."""

    async def test_an_immediate_restart_during_a_refresh(self) -> None:
        """The old snapshot stays until the next refresh, which succeeds by itself."""
        self.addCleanup(self.server.start)
        service, cache = self.make_service(declare("things", SLOW_THINGS))
        dataset = cache.dataset("things")
        await self.start_and_load(service, cache)
        self.sql("UPDATE things SET n = 1")
        # From here on only a refresh that began after the update can be published.
        await self.until_read(dataset, 2)
        for n in (2, 3, 4):
            await self.until_busy(1)
            old = dataset.snapshot
            self.assertEqual(self.n(dataset), n - 1)
            await deferToThread(self.server.stop, "immediate")
            await self.until_failed(dataset)
            self.assertIs(dataset.snapshot, old)
            self.assertEqual(cache.database.state, "down")
            await deferToThread(self.server.start)
            self.side.close()
            self.side = connect(self.server)
            self.sql(f"UPDATE things SET n = {n}")
            await self.until_read(dataset, 2)
            self.assertEqual(self.n(dataset), n)
            self.assertEqual((cache.database.state, dataset.consecutive_failures), ("up", 0))

    async def test_a_server_frozen_for_ten_seconds(self) -> None:
        """Ages rise, nothing else changes for a reader, the reactor turns on, and it recovers by itself."""
        service, cache = self.make_service(
            declare("first", timeout_s=1.0), declare("second", SLOW_THINGS.replace("0.005", "0"), timeout_s=1.0)
        )
        await self.start_and_load(service, cache)
        datasets = list(cache.datasets.values())
        self.server.freeze(backends=True)
        self.thaw_later([process.pid for process in self.server._frozen])
        for dataset in datasets:
            await self.until_failed(dataset)  # what had been answered by then is published by now
        served = [dataset.snapshot for dataset in datasets]
        ages = [dataset.age_s() for dataset in datasets]
        failures = sum(dataset.counts.outcomes["failed"] for dataset in datasets)
        self.ticker.longest_gap_s = 0.0
        frozen_until = reactor.seconds() + 7
        while reactor.seconds() < frozen_until:
            await deferLater(reactor, 0.05)
            self.assertEqual([dataset.snapshot for dataset in datasets], served)
            older = [dataset.age_s() for dataset in datasets]
            self.assertTrue(all(now > before for now, before in zip(older, ages, strict=True)))
            ages = older
            self.assertEqual(cache.database.state, "down")
            self.assertEqual(cache.not_ready(), {})
            self.assertLessEqual(cache.database.connections, 2)
        self.assertLess(self.ticker.longest_gap_s, LONGEST_GAP_S)
        self.assertGreater(sum(dataset.counts.outcomes["failed"] for dataset in datasets), failures)
        self.server.thaw()
        for dataset in datasets:
            await self.until_read(dataset, 1)
            self.assertLess(dataset.age_s(), ages[0])
        self.assertEqual(cache.database.state, "up")

    async def test_a_terminated_session(self) -> None:
        """The attempt fails, the old snapshot stays, the retry succeeds."""
        service, cache = self.make_service(declare("things", SLOW_THINGS, interval_s=3600.0))
        dataset = cache.dataset("things")
        await self.start_and_load(service, cache)
        old = dataset.snapshot
        for _ in range(3):
            self.assertTrue(service.refresh_now("things"))
            for pid in await self.until_busy(1):
                self.ask("SELECT pg_terminate_backend(%s)", pid)
            await self.until_failed(dataset)
            self.assertIs(dataset.snapshot, old)
            self.assertIn("terminat", dataset.attempts[-1].error)
            await self.until_read(dataset, 1)
            self.assertEqual(dataset.attempts[-1].trigger, "retry")
            old = dataset.snapshot

    async def test_a_server_that_is_down_at_the_start(self) -> None:
        """The service loads once it is there."""
        await self.network.refuse()
        service, cache = self.make_service(declare("things"))
        service.startService()
        await self.until_failed(cache.dataset("things"), 3)
        self.assertEqual(cache.not_ready(), {"things": "never_loaded"})
        self.network.accept()
        await until(lambda: cache.dataset("things").snapshot)
        self.assertEqual((cache.not_ready(), self.n(cache.dataset("things"))), ({}, 0))

    async def test_readers_see_whole_snapshots_whatever_happens(self) -> None:
        """During all faults of the network and a busy writer, the generation only rises; all rows are of one moment."""
        service, cache = self.make_service(
            declare("things", timeout_s=0.5, interval_s=0.05), connect_timeout_s=0.5, max_connections=1
        )
        dataset = cache.dataset("things")
        await self.start_and_load(service, cache)
        chance = random.Random(20240229)
        seen = [(0, 0)]
        for strike in [self.network.reset, self.network.truncate, self.network.silence] * 10:
            strike(chance.randrange(8000))
            for _ in range(20):
                await deferLater(reactor, 0.01)
                self.ask("SELECT 1")
            self.sql("UPDATE things SET n = n + 1")
            seen.append((dataset.snapshot.generation, self.n(dataset)))
            self.network.heal()
            if chance.random() < 0.5:
                await self.until_read(dataset, 1)
            seen.append((dataset.snapshot.generation, self.n(dataset)))
        self.assertEqual(seen, sorted(seen))
        self.assertGreater(dataset.counts.outcomes["failed"], 0)
        self.network.heal()
        await self.until_read(dataset, 2)
        self.assertEqual(self.n(dataset), 30)


def reads(dataset: Dataset) -> int:
    """How many attempts have read it whole, whether or not its content had changed."""
    return dataset.counts.outcomes["published"] + dataset.counts.outcomes["unchanged"]


class FairnessTests(ServiceTestCase):
    """One dataset's trouble is its own."""

    async def test_a_locked_dataset_does_not_delay_the_others(self) -> None:
        """With two connections, one always waiting for a lock, the others are refreshed as usual."""
        self.sql("CREATE TABLE locked AS SELECT 1 AS id")
        service, cache = self.make_service(
            declare("locked", "TABLE locked", timeout_s=3.0), declare("first"), declare("second"), max_connections=2
        )
        locked, first, second = cache.datasets.values()
        with closing(connect(self.server, self.database_name)) as holder, holder.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE locked IN ACCESS EXCLUSIVE MODE")
            cursor.execute("SELECT pg_backend_pid()")
            ((pid,),) = cursor.fetchall()
            service.startService()
            await until(lambda: first.snapshot and second.snapshot)
            # They go on while it waits, and while it fails again and again.
            for _ in range(2):
                await until(lambda: locked.refresh.is_running and locked.refresh.progress is not None)
                attempts = locked.counts.outcomes["failed"]
                counts = reads(first), reads(second)
                await self.until_failed(locked)
                self.assertEqual(locked.counts.outcomes["failed"], attempts + 1)
                self.assertGreater(reads(first), counts[0] + 1)
                self.assertGreater(reads(second), counts[1] + 1)
            self.assertEqual((first.counts.outcomes["failed"], second.counts.outcomes["failed"]), (0, 0))
            self.assertEqual([blocker.pid for blocker in locked.attempts[-1].blockers], [pid])
            cursor.execute("COMMIT")
        await until(lambda: locked.snapshot)

    async def test_a_refresh_never_overlaps_itself(self) -> None:
        """However often refreshes are requested: at most one transaction per dataset, and max_connections in all."""
        names = ("first", "second", "third")
        service, cache = self.make_service(
            *(declare(name, SLOW_THINGS.replace("0.005", "0.0005"), interval_s=0.05) for name in names),
            max_connections=2,
        )
        service.startService()
        # A kept session has the name of its last dataset until its next transaction has set its own, with the attempt.
        sql = """
            SELECT regexp_replace(application_name, ' [0-9a-f]{8}$', ''), count(*) FROM pg_stat_activity
            WHERE datname = %s AND application_name ~ '^cacheservice .* [0-9a-f]{8}$' AND xact_start IS NOT NULL
            GROUP BY 1
        """
        seen: set[str] = set()
        counts = dict.fromkeys(names, 0)
        while min(counts.values()) < 8:
            for name in names:
                service.refresh_now(name)
            open_now = dict(self.ask(sql, self.database_name))
            self.assertLessEqual(max(open_now.values(), default=0), 1, open_now)
            self.assertLessEqual(len(open_now), 2, open_now)
            self.assertLessEqual(cache.database.connections, 2)
            seen |= open_now.keys()
            for name, dataset in cache.datasets.items():
                self.assertIn(reads(dataset) - counts[name], (0, 1))
                counts[name] = reads(dataset)
            await deferLater(reactor, 0.002)
        self.assertEqual(seen, {f"cacheservice {name}" for name in names})


class StopTests(ServiceTestCase):
    """stopService fires in any state, and nothing is left in the reactor, nor starts later."""

    async def check_stop(self, service: CacheService, cache: Cache, before: dict[str, Any]) -> None:
        attempts = {name: len(dataset.attempts) for name, dataset in cache.datasets.items()}
        await service.stopService()
        self.assertEqual(our_timers(), [])
        self.assertEqual([str(c) for c in reactor.getDelayedCalls() if is_loop_of(service, c)], [])
        self.assertEqual(cache.database.connections, 0)
        self.assertFalse(any(dataset.refresh.is_running for dataset in cache.datasets.values()))
        self.server.thaw()
        await deferLater(reactor, 0.5)
        self.assertEqual({name: len(dataset.attempts) for name, dataset in cache.datasets.items()}, attempts)
        gc.collect()
        await self.until_held(before)
        self.assertEqual(await sessions_left(self.server, self.database_name), [])
        self.assertLess(self.ticker.longest_gap_s, LONGEST_GAP_S)

    async def until_held(self, before: dict[str, Any]) -> None:
        limit = reactor.seconds() + 30
        while held() != before and reactor.seconds() < limit:
            await deferLater(reactor, 0.02)
        self.assertEqual(held(), before)

    async def prepare(self, *datasets: DatasetSettings, **options: Any) -> tuple[CacheService, Cache, dict[str, Any]]:
        await deferLater(reactor, 0)  # the reactor's own parts come when it runs
        service, cache = self.make_service(*datasets, **options)
        gc.collect()
        return service, cache, held()

    async def test_idle(self) -> None:
        """Nothing runs, everything waits for its interval."""
        service, cache, before = await self.prepare(*(declare(f"d{i}", interval_s=3600.0) for i in range(5)))
        await self.start_and_load(service, cache)
        await until(lambda: not any(dataset.refresh.is_running for dataset in cache.datasets.values()))
        await self.check_stop(service, cache, before)

    async def test_right_after_the_start(self) -> None:
        """In the same turn of the reactor."""
        service, cache, before = await self.prepare(declare("first"), declare("second"), declare("third"))
        service.startService()
        await self.check_stop(service, cache, before)

    async def test_at_any_moment(self) -> None:
        """After 0, 5, 10 … ms of work."""
        _, _, before = await self.prepare(declare("none"))
        for number in range(40):
            service, cache = self.make_service(declare("first", interval_s=0.05), declare("second", SLOW_THINGS))
            service.startService()
            await deferLater(reactor, number * 0.005)
            await service.stopService()
            self.assertEqual(our_timers(), [])
            self.assertEqual(cache.database.connections, 0)
        await self.until_held(before)

    async def test_queued(self) -> None:
        """Most of them wait for a connection, and one was asked for again meanwhile."""
        service, cache, before = await self.prepare(
            *(declare(f"d{i}", ONE_SLOW_ROW) for i in range(5)), max_connections=1
        )
        service.startService()
        await self.until_busy(1)
        self.assertEqual(cache.database.queued(), 4)
        for name in cache.datasets:
            self.assertFalse(service.refresh_now(name))
        await self.check_stop(service, cache, before)

    async def test_connecting_to_a_silent_host(self) -> None:
        """The connection is accepted, and then the server sends nothing."""
        self.network.silence()
        service, cache, before = await self.prepare(declare("first"), declare("second"))
        service.startService()
        await until(lambda: self.network.connections == 2)
        await self.check_stop(service, cache, before)

    async def test_amid_a_read(self) -> None:
        """Rows are on their way."""
        service, cache, before = await self.prepare(declare("first", SLOW_THINGS), declare("second", SLOW_THINGS))
        service.startService()
        await until(lambda: all(d.refresh.progress and d.refresh.progress.rows.count for d in cache.datasets.values()))
        await self.check_stop(service, cache, before)
        self.assertEqual([dataset.snapshot for dataset in cache.datasets.values()], [None, None])

    async def test_amid_a_freeze(self) -> None:
        """The whole server is under SIGSTOP, some sessions are open, others open now."""
        service, cache, before = await self.prepare(
            declare("first", ONE_SLOW_ROW), declare("second", THINGS, interval_s=0.05), declare("third", THINGS)
        )
        service.startService()
        await self.until_busy(1)
        self.server.freeze(backends=True)
        self.thaw_later([process.pid for process in self.server._frozen])
        await deferLater(reactor, 0.5)
        self.assertEqual(cache.database.connections, 2)
        await self.check_stop(service, cache, before)

    async def test_waiting_to_retry(self) -> None:
        """The last attempt failed, and the next one is planned."""
        await self.network.refuse()
        slowly = {"interval_s": 3600.0, "retry_initial_s": 1800.0, "retry_max_s": 1800.0}
        service, cache, before = await self.prepare(declare("first", **slowly), declare("second", **slowly))
        service.startService()
        for dataset in cache.datasets.values():
            await until(lambda dataset=dataset: dataset.attempts and not dataset.refresh.is_running)
        await self.check_stop(service, cache, before)

    async def test_waiting_for_a_lock(self) -> None:
        """A session holds the table, and the service is asking which."""
        with closing(connect(self.server, self.database_name)) as holder, holder.cursor() as cursor:
            service, cache, before = await self.prepare(declare("things", timeout_s=4.0))
            cursor.execute("BEGIN; LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
            service.startService()
            await until(lambda: cache.database.connections == 2)  # the second one asks
            await self.check_stop(service, cache, before)
            cursor.execute("COMMIT")

    async def test_stopped_and_asked_again(self) -> None:
        """A refresh asked for after the stop is not begun."""
        service, cache, before = await self.prepare(declare("things", interval_s=3600.0))
        await self.start_and_load(service, cache)
        await service.stopService()
        generation = cache.dataset("things").snapshot.generation
        service.refresh_now("things")
        await deferLater(reactor, 0.3)
        self.assertEqual(cache.dataset("things").snapshot.generation, generation)
        self.assertEqual(cache.database.connections, 0)
        await self.until_held(before)


def is_loop_of(service: CacheService, call: Any) -> bool:
    loops = [refresher._starts._loop for refresher in service._refreshers.each()]
    return isinstance(call.func, LoopingCall) and call.func in loops
