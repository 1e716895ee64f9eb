"""Laws of reloading: what has changed takes effect, what has not notices nothing, and what is wrong changes nothing."""

from __future__ import annotations

import gc
import itertools
import json
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache, Declared, Rejection, Reloaded
from cacheservice.cache.dataset import State
from cacheservice.config import ConfigFile
from cacheservice.errors import ConfigError, QueryFailed, Stopped, UnknownDataset
from cacheservice.ports import report
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.resp.commands import Commands as RespCommands
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.status import Commands
from cacheservice.refresh.budget import Budget
from cacheservice.refresh.slots import Slots
from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.postgres import PRIMARY, fresh_database, query, sessions
from tests.kit.refreshes import RefreshTestCase, World, without_jitter
from tests.kit.slots import Job
from tests.kit.waiting import GIVE_UP_S, wait_until

FILE = ConfigFile("/etc/cacheservice.toml", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), False)


class Refreshes(RefreshTestCase):
    """What the refreshes do with other datasets."""

    def loaded(self, *names: str, rows: int = 1, **options: Any) -> World:
        world = self.started(*names, **options)
        while world.database.running:
            world.database.running[0].complete(rows)
        return world

    def refresh(self, world: World, name: str, rows: int = 1) -> None:
        world.service.refresh_now(name)
        world.database.last.complete(rows)

    def test_unchanged(self) -> None:
        """What has not changed is the same object, with the same snapshot, pin, loop and next start."""
        world = self.loaded("a", "b", "c", random=lambda: 0.5, jitter=0.1)
        world.advance(70)
        while world.database.running:
            world.database.running[0].complete()
        world.service.pin("a")
        self.refresh(world, "a")
        self.refresh(world, "b", rows=0)
        datasets = dict(world.cache.datasets)

        def state() -> list[tuple[Any, ...]]:
            return [
                (id(d), id(d.snapshot), id(d.candidate), id(d.held), d.pinned, d.next_refresh_at, len(d.attempts))
                for d in datasets.values()
            ]

        before = state()
        self.assertTrue(datasets["a"].candidate)
        self.assertTrue(datasets["b"].held)
        loops = {name: world.service._refreshers[name]._loop for name in datasets}
        told = world.service.redeclare(without_jitter("c", "new", "b", "a", jitter=0.1))
        self.assertEqual(told, Declared(["new"], [], [], ["c", "b", "a"]))
        self.assertEqual(list(world.cache.datasets), ["c", "new", "b", "a"])
        self.assertEqual({name: world.cache.dataset(name) for name in "abc"}, datasets)
        self.assertEqual(state(), before)
        self.assertEqual({name: world.service._refreshers[name]._loop for name in datasets}, loops)
        self.assertTrue(all(loop.running for loop in loops.values()))
        self.assertEqual([read.name for read in world.database.running], ["new"])

    def test_unchanged_while_it_is_read(self) -> None:
        """A refresh that runs goes on and is published."""
        world = self.started("products")
        world.service.redeclare(without_jitter("products", "new"))
        world.database.reads[0].complete(rows=3)
        assert world.dataset.snapshot is not None
        self.assertEqual(world.dataset.snapshot.rows.count, 3)

    def test_another_interval(self) -> None:
        """The snapshot stays, nothing is read at once, and the next start is one new interval after the last one."""
        world = self.loaded()
        snapshot = world.dataset.snapshot
        world.advance(20)
        world.service.redeclare(without_jitter("products", interval_s=30.0))
        self.assertIs(world.dataset.snapshot, snapshot)
        self.assertEqual(world.dataset.next_refresh_in_s(), 10)
        for _ in range(3):
            world.advance(30)
            world.database.last.complete()
        self.assertEqual([at for _, at in world.starts], [0, 30, 60, 80 + 10])
        world.service.redeclare(without_jitter("products", interval_s=100.0))
        world.advance_to(500)
        for read in world.database.running:
            read.complete()
        self.assertEqual([at for _, at in world.starts][4:], [190])
        self.assertEqual(world.dataset.missed_ticks, 3)

    def test_an_interval_that_is_over(self) -> None:
        """If the new interval has passed since the last start, the next one is now."""
        world = self.loaded()
        world.advance(50)
        world.service.redeclare(without_jitter("products", interval_s=30.0))
        world.advance(0)
        self.assertEqual([at for _, at in world.starts], [0, 50])

    def test_another_interval_while_it_is_read(self) -> None:
        """A refresh that runs is not disturbed by other timers, and the loop counts nothing that it missed."""
        world = self.loaded()
        world.advance(60)
        world.service.redeclare(without_jitter("products", interval_s=20.0))
        world.advance(10)
        world.database.last.complete(rows=2)
        assert world.dataset.snapshot is not None
        self.assertEqual((world.dataset.snapshot.rows.count, world.dataset.missed_ticks), (2, 0))
        world.advance(10)
        self.assertEqual([at for _, at in world.starts], [0, 60, 80])

    def test_another_interval_while_a_retry_waits(self) -> None:
        """What failed is still tried again soon."""
        world = self.loaded()
        world.advance(60)
        world.database.last.fail()
        world.service.redeclare(without_jitter("products", interval_s=3000.0, max_age_s=9000.0))
        world.advance(2)
        self.assertEqual([at for _, at in world.starts], [0, 60, 61])

    def test_limits_at_once(self) -> None:
        """max_age_s and required count from now on; expiry is told by the new limit, and so is recovery."""
        world = self.loaded()
        world.advance(50)
        events = ["dataset_expired", "dataset_recovered"]
        world.service.redeclare(without_jitter("products", max_age_s=40.0, on_expired="refuse"))
        world.advance(0.002)
        self.assertEqual((world.dataset.state(), world.log.names(*events)), (State.EXPIRED, events[:1]))
        self.assertEqual(world.cache.not_ready(), {"products": State.EXPIRED})
        world.service.redeclare(without_jitter("products", max_age_s=40.0, on_expired="refuse", required=False))
        self.assertEqual(world.cache.not_ready(), {})
        world.service.redeclare(without_jitter("products", max_age_s=55.0))
        self.assertEqual((world.dataset.state(), world.log.names(*events)), (State.FRESH, events))
        world.advance(5.001)
        self.assertEqual(world.log.names(*events), [*events, "dataset_expired"])
        self.assertEqual(len(world.database.reads), 1)

    def test_on_expired_at_once(self) -> None:
        """Whether an expired snapshot is served is as declared now, also for what is looked up without a question."""
        world = self.loaded()
        commands = RespCommands(world.cache, Freshness(world.service, world.cache.database, world.clock), "")
        get = [[b"GET", b"products:0"]]
        world.advance(50)
        for on_expired, answers in (("serve", 1), ("refuse", 0), ("serve", 1)):
            world.service.redeclare(without_jitter("products", max_age_s=40.0, on_expired=on_expired))
            self.assertEqual(len(commands.hits(get)), answers)
        world.service.redeclare(without_jitter("products", max_age_s=40.0, on_expired="refuse"))
        with self.assertRaisesRegex(CommandError, "^STALE products is 50 s old, limit 40 s$"):
            commands.rows(b"products")

    def test_another_query(self) -> None:
        """The old result is served until the new one is there, which is read at once and compared with nothing."""
        for change in ({"query": "SELECT 2 AS id"}, {"key": "other"}):
            world = self.loaded(rows=100)
            before = world.dataset.snapshot
            assert before is not None
            world.service.redeclare(without_jitter("products", **change))
            assert world.dataset.snapshot is not None
            self.assertIs(world.dataset.snapshot.rows, before.rows)
            self.assertIn("before the last reload", report.why(world.dataset, world.cache))
            self.assertIsNotNone(world.database.last.expect)
            world.database.last.complete(rows=1)
            after = world.dataset.snapshot
            assert after is not None
            self.assertEqual((after.generation, after.rows.count, world.dataset.held), (2, 1, None))
            self.assertEqual(after.change, (0, 0, 99))
            self.assertNotIn("before the last reload", report.why(world.dataset, world.cache))
            # From here on it is compared as ever.
            self.refresh(world, "products", rows=0)
            self.assertIsNotNone(world.dataset.held)

    def test_another_query_and_back(self) -> None:
        """A result that the definition of now gave is compared again, whatever was declared in between."""
        world = self.loaded(rows=100)
        world.service.redeclare(without_jitter("products", query="SELECT 2 AS id"))
        world.service.redeclare(without_jitter("products"))
        world.database.last.complete(rows=1)
        self.assertIsNotNone(world.dataset.held)

    def test_another_query_and_min_rows(self) -> None:
        """min_rows holds for the first result of another query, too."""
        world = self.loaded(rows=100)
        world.service.redeclare(without_jitter("products", query="SELECT 2 AS id", min_rows=10))
        world.database.last.complete(rows=9)
        self.assertIsNotNone(world.dataset.held)
        self.assertEqual(world.dataset.last_generation, 1)

    def test_another_query_of_a_failing_dataset(self) -> None:
        """Its failures were those of the query before: it is tried at once, and as one that works."""
        world = self.started()
        for at in (1, 3, 7):
            world.database.last.fail()
            world.advance_to(at)
        world.database.last.fail()
        world.service.redeclare(without_jitter("products", query="SELECT 2 AS id"))
        self.assertEqual((len(world.database.running), world.dataset.consecutive_failures), (1, 0))

    def test_another_query_while_the_old_one_is_read(self) -> None:
        """The old read is ended, what it gives nevertheless is not published, and only then the new one begins."""
        world = World()
        ended: Deferred[Any] = Deferred()
        world.database.after_failure = lambda _: ended
        world.service.startService()
        world.service.redeclare(without_jitter("products", query="SELECT 2 AS id"))
        world.service.redeclare(without_jitter("products", query="SELECT 3 AS id"))
        self.assertTrue(world.service.refresh_now("products"))
        self.assertEqual(len(world.database.reads), 1)
        world.database.after_failure = lambda failure: failure
        ended.errback(QueryFailed("too late"))
        self.assertEqual((len(world.database.reads), world.dataset.last_generation), (2, 0))
        world.database.last.complete()
        self.assertEqual(world.dataset.last_generation, 1)
        self.stop(world)

    def test_another_query_of_a_pinned_dataset(self) -> None:
        """The pin stays; the candidate of the query before is dropped, so that unpin never publishes it."""
        world = self.loaded(rows=100)
        world.service.pin("products")
        self.refresh(world, "products", rows=99)
        world.service.redeclare(without_jitter("products", query="SELECT 2 AS id"))
        self.assertEqual((world.dataset.pinned, world.dataset.candidate), (True, None))
        world.database.last.complete(rows=1)
        assert world.dataset.candidate is not None
        self.assertEqual((world.dataset.candidate.rows.count, world.dataset.last_generation), (1, 1))
        world.service.unpin("products")
        self.assertEqual((world.dataset.last_generation, world.dataset.redefined), (2, False))

    def test_removed(self) -> None:
        """Its refresh is ended, its rows are freed, its timers are gone, and it is unknown."""
        world = self.loaded("a", "products", rows=1000)
        world.advance(60)
        dataset = world.dataset
        told = world.service.redeclare(without_jitter("a"))
        self.assertEqual(told, Declared([], [], ["products"], ["a"]))
        self.assertEqual([read.name for read in world.database.running], ["a"])
        self.assertEqual((dataset.removed, dataset.snapshot, dataset.refreshing), (True, None, False))
        self.assertIsNone(dataset.next_refresh_in_s())
        for ask in (world.cache.dataset, world.service.refresh_now, world.service.accept_next):
            with self.assertRaises(UnknownDataset):
                ask("products")
        world.database.running[0].complete(rows=1000)
        world.advance(1000)
        self.assertEqual({read.name for read in world.database.reads[4:]}, {"a"})

    def test_nothing_keeps_what_is_removed(self) -> None:
        """Its rows go as soon as nobody reads them, whatever port has served them."""
        world = self.loaded("a", "products", rows=10)
        commands = RespCommands(world.cache, Freshness(world.service, world.cache.database, world.clock), "")
        self.assertEqual(commands.hits([[b"GET", b"products:1"]]), [b"$2\r\n{}\r\n"])
        assert world.dataset.snapshot is not None
        rows = weakref.ref(world.dataset.snapshot.rows)
        world.service.redeclare(without_jitter("a"))
        gc.collect()
        self.assertIsNone(rows())
        self.assertEqual(commands.hits([[b"GET", b"products:1"]]), [])

    def test_removed_and_added_again(self) -> None:
        """It is loaded as a new one, and its generations go on, so that none is ever two different results."""
        world = self.loaded("a", "products")
        self.refresh(world, "products")
        world.service.redeclare(without_jitter("a"))
        world.service.redeclare(without_jitter("a", "products"))
        self.assertEqual((world.dataset.state(), world.dataset.last_generation), (State.NEVER_LOADED, 2))
        world.database.last.complete()
        self.assertEqual(world.dataset.last_generation, 3)

    def test_who_waits_for_one_that_is_removed(self) -> None:
        """Who waits for a newer snapshot of it, or for a transaction in it, is told at once that it is unknown."""
        world = self.loaded()
        freshness = Freshness(world.service, world.cache.database, world.clock)
        world.advance(10)
        waiting = [
            Deferred.fromCoroutine(freshness.at_most(world.dataset, 5.0)),
            Deferred.fromCoroutine(freshness.includes(world.dataset, 10, 20.0)),
        ]
        world.service.redeclare(without_jitter("other"))
        for each in waiting:
            self.failureResultOf(each, UnknownDataset)

    def test_who_waits_for_one_whose_query_changes(self) -> None:
        """Who waits for a newer snapshot gets that of the new query."""
        world = self.loaded()
        world.advance(10)
        waiting = Deferred.fromCoroutine(
            Freshness(world.service, world.cache.database, world.clock).at_most(world.dataset, 5.0)
        )
        world.service.redeclare(without_jitter("products", query="SELECT 2 AS id"))
        self.assertNoResult(waiting)
        world.database.last.complete()
        self.assertTrue(self.successResultOf(waiting))

    def test_another_database(self) -> None:
        """All go on being served, are read anew at once, and nothing served includes a transaction of the new one."""
        world = self.loaded("a", "b", rows=100)
        before = [dataset.snapshot for dataset in world.cache.datasets.values()]
        told = world.service.redeclare(without_jitter("a", "b"), moved=True)
        self.assertEqual(told, Declared([], ["a", "b"], [], []))
        for dataset, old in zip(world.cache.datasets.values(), before, strict=True):
            assert dataset.snapshot is not None
            assert old is not None
            self.assertIs(dataset.snapshot.rows, old.rows)
            self.assertFalse(dataset.snapshot.includes(3, PRIMARY))
            self.assertIsNone(dataset.snapshot.server)
        # An empty database that was named by mistake does not empty the cache.
        world.database.running[0].complete(rows=0)
        self.assertIsNotNone(world.cache.dataset("a").held)

    def test_after_the_stop(self) -> None:
        """A service that does not run takes nothing over."""
        world = World()
        with self.assertRaises(Stopped):
            world.service.redeclare(without_jitter("other"))
        self.assertEqual(list(world.cache.datasets), ["products"])

    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["advance", "complete", "fail", "refresh", "reload", "reload", "pin", "move"]),
                st.integers(0, 80),
            ),
            max_size=50,
        )
    )
    def test_whatever_happens(self, steps: list[tuple[str, int]]) -> None:
        """In whatever order: no refresh overlaps itself, no generation comes twice, unchanged ones are the same, and
        in the end all that is declared is fresh and a stop leaves nothing behind."""
        world = World("a", "b", jitter=0.1, random=lambda: 0.5)
        world.service.startService()
        generations: dict[str, int] = {}
        for step, number in steps:
            running = world.database.running
            before = dict(world.cache.datasets)
            if step == "advance":
                world.advance(number)
            elif step == "complete" and running:
                running[number % len(running)].complete(rows=number % 3)
            elif step == "fail" and running:
                running[number % len(running)].fail()
            elif step == "refresh":
                world.service.refresh_now(list(before)[number % len(before)])
            elif step == "pin":
                for name, dataset in before.items():
                    if dataset.pinned:
                        world.service.unpin(name)
                    elif dataset.snapshot:
                        world.service.pin(name)
            elif step in ("reload", "move"):
                bits = f"{number:07b}"
                chosen = [
                    without_jitter(name, query=f"SELECT {bits[0]} AS id", interval_s=(60.0, 40.0)[number % 2])[0]
                    for name, bit in zip("abc", bits[1:], strict=False)
                    if bit == "1"
                ] or without_jitter("c")
                told = world.service.redeclare(chosen, moved=step == "move")
                for name in told.unchanged:
                    self.assertIs(world.cache.dataset(name), before[name])
            for name, dataset in world.cache.datasets.items():
                self.assertGreaterEqual(dataset.last_generation, generations.get(name, 0))
                generations[name] = dataset.last_generation
        for name in world.cache.datasets:
            world.service.unpin(name)
            world.service.accept_next(name)
        for interval_s in (60, 0):
            while world.database.running:
                world.database.running[0].complete()
            world.advance(interval_s)
        self.assertEqual({dataset.state() for dataset in world.cache.datasets.values()}, {State.FRESH})
        self.stop(world)


class Limits(SynchronousTestCase):
    def test_slots(self) -> None:
        """A higher limit lets more run at once; a lower one lets those that run end, and then fewer."""
        slots = Slots(1, lambda: True, Budget(0.0, Clock()))
        jobs = [Job(str(number)).ask(slots) for number in range(6)]
        self.assertEqual(sum(job.running for job in jobs), 1)
        slots.set_limit(3)
        self.assertEqual(sum(job.running for job in jobs), 3)
        slots.set_limit(1)
        for left in (2, 1, 1, 1, 1, 0):
            next(job for job in jobs if job.running).end()
            self.assertEqual(sum(job.running for job in jobs), left)


class Scans(RefreshTestCase):
    def test_datasets_come_and_go(self) -> None:
        """A scan amid which datasets are removed and added returns all keys that were there all along."""
        world = self.started("a", "b", "c", "d")
        while world.database.running:
            world.database.running[0].complete(rows=20)
        commands = RespCommands(world.cache, Freshness(world.service, world.cache.database, world.clock), "")

        def scan(cursor: bytes) -> tuple[bytes, set[bytes]]:
            answer = commands.scan(None, [b"SCAN", cursor, b"COUNT", b"5"])  # type: ignore[arg-type]
            words = (answer if isinstance(answer, bytes) else b"".join(answer)).split(b"\r\n")  # type: ignore[arg-type]
            return words[2], set(words[5::2])

        for names in (["b", "c"], ["new", "c", "b", "a"], ["b", "c", "d", "e", "f"]):
            cursor, seen = scan(b"0")
            for _ in range(3):
                cursor, more = scan(cursor)
                seen |= more
            world.service.redeclare(without_jitter(*names))
            while cursor != b"0":
                cursor, more = scan(cursor)
                seen |= more
            self.assertLessEqual({b"%b:%d" % (name, row) for name in (b"b", b"c") for row in range(20)}, seen)
            self.assertLessEqual({b"b", b"c"}, seen)
            while world.database.running:
                world.database.running[0].complete(rows=20)


class Telling(SynchronousTestCase):
    """The admin socket's `reload`, and what the status says of a rejection."""

    def setUp(self) -> None:
        self.now_s = 100.0
        self.cache = Cache(without_jitter("products"), lambda: self.now_s)
        self.result: Deferred[Reloaded] = Deferred()

    def ask(self) -> Deferred[str]:
        answer = Commands(self.cache, object(), lambda: self.result).answer("reload")  # type: ignore[arg-type]
        assert isinstance(answer, Deferred)
        return answer

    def test_done(self) -> None:
        """The reply comes when it is done, and counts what became of the datasets."""
        answer = self.ask()
        self.assertNoResult(answer)
        self.result.callback(Reloaded(Declared(["x"], ["a", "b"], [], list("12345")), [], FILE))
        self.assertEqual(
            self.successResultOf(answer), f"OK reloaded: 1 added, 2 changed, 0 removed, 5 unchanged; from {FILE}"
        )

    def test_done_but_for_a_restart(self) -> None:
        """What takes effect only at the next start is named."""
        answer = self.ask()
        self.result.callback(Reloaded(Declared([], [], [], ["a"]), ["resp.port", "http.token"], FILE))
        expected = "OK reloaded: 0 added, 0 changed, 0 removed, 1 unchanged; at the next start: resp.port, http.token"
        self.assertEqual(self.successResultOf(answer), f"{expected}; from {FILE}")

    def test_a_file_that_was_replaced_where_it_is_mounted_from(self) -> None:
        """The reply says that what was read is an old file, and what to do."""
        answer = self.ask()
        self.result.callback(Reloaded(Declared([], [], [], ["a"]), [], FILE._replace(is_replaced=True)))
        self.assertIn(
            "is an old one: it was replaced where it is mounted from; mount its folder", self.successResultOf(answer)
        )

    def test_refused(self) -> None:
        """The first line has the first problem, and how many more there are; then each has a line."""
        for problems, words in (
            (["a.toml: x"], "ERROR a.toml: x"),
            (["a", "b", "c"], "ERROR a (and 2 more)\na\nb\nc"),
        ):
            self.result = Deferred()
            answer = self.ask()
            self.result.errback(ConfigError(problems))
            self.assertEqual(self.successResultOf(answer), words)

    def test_stopping(self) -> None:
        """A service that stops says so."""
        answer = self.ask()
        self.result.errback(Stopped("the service is stopping"))
        self.assertEqual(self.successResultOf(answer), "ERROR the service is stopping")

    def test_on_the_status_port(self) -> None:
        """It is an admin command."""
        self.assertEqual(Commands(self.cache).answer("reload"), "ERROR reload is an admin command")

    def test_a_rejection(self) -> None:
        """The head line of status and each `why` tell a rejection, and since when, until it is over."""
        dataset = self.cache.dataset("products")
        problem = "cacheservice.toml: datasets.x.interval_s: must be greater than 0"
        self.cache.rejection = Rejection((problem, "b", "c"), self.now_s)
        self.now_s += 12
        told = f"rejected 12 s ago: {problem} (and 2 more)"
        head = report.status_table(self.cache).splitlines()[0]
        self.assertTrue(head.endswith(f", up 12 s, configuration {told}"), head)
        self.assertIn(f"It was {told}.", report.why(dataset, self.cache))
        self.cache.rejection = None
        self.assertNotIn("rejected", report.status_table(self.cache) + report.why(dataset, self.cache))


def table(name: str, rows: str = "generate_series(1, 3) AS id", **keys: Any) -> str:
    """A dataset's table, whose rows have an `n`."""
    every = {
        "query": f"SELECT id, 'row of {name}' AS text{', at' if ' AS at' in rows else ''} FROM {rows}",
        "key": "id",
        "interval_s": 3600,
        "retry_initial_s": 0.1,
        "retry_max_s": 0.3,
    } | keys
    return f"\n[datasets.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in every.items())


class UnderTwistd(DaemonTestCase):
    """The whole service, its configuration rewritten and reloaded while clients are connected."""

    def configured(self, *tables: str, more: str = "", **options: Any) -> str:
        return self.configuration(*tables, f'\n[admin]\nsocket = "{self.directory}/admin"\n{more}', **options)

    def begun(self, *tables: str, **options: Any) -> Daemon:
        daemon = self.started(self.configured(*tables, **options))
        daemon.wait_until_ready()
        return daemon

    def write(self, *tables: str, **options: Any) -> None:
        (self.directory / "cacheservice.toml").write_text(self.configured(*tables, **options))

    def admin(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(GIVE_UP_S)
            client.connect(f"{self.directory}/admin")
            client.sendall(f"{line}\n".encode())
            with client.makefile("r", encoding="utf-8") as reply:
                return reply.read().removesuffix("\n")

    def reload(self, *tables: str, **options: Any) -> str:
        self.write(*tables, **options)
        return self.admin("reload")

    def connected(self, daemon: Daemon) -> redis.Redis:
        host, _, port = daemon.event("service_started")["resp"].rpartition(":")
        client = redis.Redis(host=host, port=int(port), socket_timeout=GIVE_UP_S, single_connection_client=True)
        self.addCleanup(client.close)
        return client

    def fetch(self, daemon: Daemon, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(f"http://{daemon.event('service_started')['http']}{path}") as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def reading(self, read: Callable[[], object]) -> Callable[[], int]:
        """Have `read` done all the time; gives what ends it and tells how often it was done. A raise fails the test."""
        over = threading.Event()
        counts = itertools.count()
        raised: list[Exception] = []

        def go_on() -> None:
            while not over.wait(0.002) and not raised:
                try:
                    read()
                    next(counts)
                except Exception as error:
                    raised.append(error)

        thread = threading.Thread(target=go_on)
        thread.start()

        def end() -> int:
            over.set()
            thread.join(GIVE_UP_S)
            self.assertEqual(raised, [])
            return next(counts)

        self.addCleanup(end)
        return end

    def dataset(self, daemon: Daemon, name: str) -> dict[str, Any]:
        described: dict[str, Any] = daemon.json()["datasets"][name]
        return described

    def test_add_change_remove(self) -> None:
        """One dataset comes, one changes, one goes, while clients of both ports read the one that stays."""
        daemon = self.begun(table("stays"), table("changes"), table("goes"))
        client, other = self.connected(daemon), self.connected(daemon)
        subscriber = self.connected(daemon).pubsub()
        subscriber.subscribe("cache:goes", "cache:changes")
        opened = {each.client_id() for each in (client, other)}
        end_resp = self.reading(lambda: self.assertIn(b"row of stays", client.get("stays:2")))
        end_http = self.reading(
            lambda: self.assertEqual(self.fetch(daemon, "/v1/datasets/stays/rows/2")[1]["text"], "row of stays")
        )
        before = self.dataset(daemon, "stays")
        changing = "generate_series(1, {}) AS id, clock_timestamp() AS at"
        reply = self.reload(table("stays"), table("changes", changing.format(30)), table("comes", changing.format(3)))
        self.assertRegex(reply, "^OK reloaded: 1 added, 1 changed, 1 removed, 1 unchanged; from .*, modified ")
        with self.assertRaisesRegex(redis.ResponseError, "unknown dataset 'goes'"):
            other.get("goes:1")
        self.assertEqual(self.fetch(daemon, "/v1/datasets/goes/rows/1")[0], 404)
        wait_until(lambda: self.dataset(daemon, "changes")["rows"] == 30, "the new query's rows")
        wait_until(lambda: self.dataset(daemon, "comes")["rows"] == 3, "the new dataset")
        self.assertEqual(other.hlen("comes"), 3)
        self.assertEqual(other.execute_command("CACHE.LIST"), [b"stays", b"changes", b"comes"])
        subscriber.subscribe("cache:comes")
        self.admin("refresh comes")
        self.admin("refresh changes")
        messages = iter(lambda: subscriber.get_message(timeout=GIVE_UP_S), None)
        told = [
            json.loads(each["data"])["dataset"] for each in itertools.islice(messages, 6) if each["type"] == "message"
        ]
        self.assertEqual(set(told), {"changes", "comes"})
        after = self.dataset(daemon, "stays")
        self.assertEqual((after["generation"], after["as_of"]), (before["generation"], before["as_of"]))
        self.assertLess(after["next_refresh_in_s"], before["next_refresh_in_s"])
        self.assertGreater(min(end_resp(), end_http()), 0)
        self.assertEqual({each.client_id() for each in (client, other)}, opened)
        event = daemon.event("config_reloaded")
        fields = {name: event[name] for name in ("added", "changed", "removed", "needs_restart")}
        self.assertEqual(fields, {"added": ["comes"], "changed": ["changes"], "removed": ["goes"], "needs_restart": []})
        # And the log's level.
        count = len(daemon.lines)
        everything = table("stays"), table("changes"), table("comes")
        self.reload(*everything, log='level = "error"')
        wait_until(lambda: self.dataset(daemon, "changes")["rows"] == 3, "the query's rows")
        self.assertEqual(len(daemon.lines), count)
        self.reload(*everything)
        wait_until(lambda: len(daemon.lines) > count, "the next line")
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_other_limits_of_what_is_served(self) -> None:
        """Another interval is in the next answer over HTTP, which says how long it may be kept."""
        daemon = self.begun(table("products"))
        for interval_s in (3600, 60):
            self.reload(table("products", interval_s=interval_s))
            with urllib.request.urlopen(
                f"http://{daemon.event('service_started')['http']}/v1/datasets/products"
            ) as answer:
                self.assertIn(f"max-age={interval_s},", answer.headers["Cache-Control"])
        self.assertEqual(self.dataset(daemon, "products")["generation"], 1)

    def test_whoever_reads_what_changes(self) -> None:
        """While a query is replaced again and again, readers find the old or the new result, never none."""
        daemon = self.begun(table("products"))
        client = self.connected(daemon)
        end = self.reading(lambda: self.assertIn(client.hlen("products"), range(3, 10)))
        for count in range(4, 9):
            rows = f"generate_series(1, {count}) AS id, LATERAL pg_sleep(0.02)"
            self.assertIn("1 changed", self.reload(table("products", rows)))
            wait_until(lambda: self.dataset(daemon, "products")["rows"] == count, "the new rows")  # noqa: B023  # called before it changes
        self.assertEqual(self.dataset(daemon, "products")["generation"], 6)
        self.assertGreater(end(), 0)

    def test_regroup(self) -> None:
        """Datasets that come to a group are read together; one that leaves it is alone; the others notice nothing."""
        daemon = self.begun(table("a", group="g"), table("b", group="g"), table("c"), table("d"))
        wait_until(lambda: self.dataset(daemon, "d")["rows"], "the load")
        before = self.dataset(daemon, "d")
        as_of = {name: self.dataset(daemon, name)["as_of"] for name in "abc"}
        self.assertEqual(as_of["a"], as_of["b"])
        reply = self.reload(table("a"), table("b", group="g"), table("c", group="g"), table("d"))
        self.assertRegex(reply, "^OK reloaded: 0 added, 2 changed, 0 removed, 2 unchanged; from ")
        wait_until(lambda: all(self.dataset(daemon, name)["as_of"] > as_of[name] for name in "abc"), "the refreshes")
        self.assertEqual(self.dataset(daemon, "b")["as_of"], self.dataset(daemon, "c")["as_of"])
        self.assertNotEqual(self.dataset(daemon, "a")["as_of"], self.dataset(daemon, "c")["as_of"])
        self.assertEqual(self.dataset(daemon, "d")["as_of"], before["as_of"])

    def test_a_bad_file(self) -> None:
        """Whatever is wrong, nothing changes, the log and the status say so, and a good file clears it."""
        daemon = self.begun(table("products"), table("other"))
        before = {name: self.dataset(daemon, name)["as_of"] for name in ("products", "other")}
        good = self.configured(table("products"), table("other"))
        path = self.directory / "cacheservice.toml"
        for number, (text, words) in enumerate(
            [
                (good + "\n[datasets.x\n", "cacheservice.toml: line "),
                (good + table("third", intervall_s=1), "unknown key"),
                (good + table("third", interval_s=0, timeout_s=-1), "must be greater than 0 (and 1 more)"),
                (None, "not found in the working directory"),
                (good.replace("[postgres]", "[postgres]\nmax_connections = 0"), "must be at least 1"),
            ],
            1,
        ):
            path.unlink() if text is None else path.write_text(text)
            reply = self.admin("reload")
            self.assertTrue(reply.startswith("ERROR "), reply)
            self.assertIn(words, reply)
            reply, *problems = reply.splitlines()
            more = re.search(r" \(and (\d+) more\)$", reply)
            self.assertEqual(len(problems), int(more[1]) + 1 if more else 0)
            head = daemon.ask("status").splitlines()[0]
            self.assertIn(f"ago: {reply.removeprefix('ERROR ')}", head)
            self.assertIn("configuration rejected ", head)
            self.assertIn("is not in effect", daemon.ask("why products"))
            self.assertEqual({name: self.dataset(daemon, name)["as_of"] for name in before}, before)
            self.assertEqual(len(daemon.json()["datasets"]), 2)
            self.until_told(daemon, "config_rejected", number)
        path.write_text(good)
        self.assertRegex(self.admin("reload"), "^OK reloaded: 0 added, 0 changed, 0 removed, 2 unchanged; from ")
        self.assertNotIn("rejected", daemon.ask("status"))

    def until_told(self, daemon: Daemon, event: str, times: int) -> None:
        """Lines are written off the reactor, and so may come after a reply."""
        wait_until(lambda: [line["event"] for line in daemon.lines].count(event) >= times, f"{event}, {times} times")
        self.assertEqual([line["event"] for line in daemon.lines].count(event), times)

    def test_what_needs_a_restart(self) -> None:
        """Ports, secrets and folders are named and stay as they are; the datasets take effect nevertheless."""
        daemon = self.begun(table("products"))
        for _ in range(2):
            reply = self.reload(
                table("products"),
                table("new"),
                more="[limits]\nidle_timeout_s = 30\n[persistence]\nkeep_generations = 9\n",
            )
            self.assertIn("; at the next start: persistence.keep_generations; from ", reply)
        self.assertEqual(daemon.event("config_reloaded")["needs_restart"], ["persistence.keep_generations"])
        wait_until(lambda: daemon.ask("ready") == "ready" and "new" in daemon.json()["datasets"], "the new dataset")

    def test_amid_other_commands(self) -> None:
        """What follows `reload` is answered after it, on the same line, at a prompt, and without a line's end."""
        daemon = self.begun(table("products"))
        reloaded, version = self.admin("reload"), daemon.ask("version")
        self.assertRegex(reloaded, "^OK reloaded: 0 added, 0 changed, 0 removed, 1 unchanged; from ")
        for sent, received in (
            ("version;reload;version\n", [version, reloaded, version]),
            ("reload;reload", [reloaded, reloaded]),
            (
                "prompt\nreload\nversion\nreload;version\nquit\n",
                ["", reloaded, "", version, "", reloaded, "", version, ""],
            ),
            ("prompt\nreload", ["", reloaded, ""]),
            ("reload;quit;version\n", [reloaded]),
        ):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(GIVE_UP_S)
                client.connect(f"{self.directory}/admin")
                client.sendall(sent.encode())
                client.shutdown(socket.SHUT_WR)
                with client.makefile("r", encoding="utf-8") as reply:
                    self.assertEqual(reply.read().splitlines(), received)
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{self.directory}/admin")
                client.sendall(b"reload\n")  # and is gone before the reply
        self.assertEqual(self.admin("reload"), reloaded)
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_many_hang_ups(self) -> None:
        """Fifty SIGHUPs, each after another change of the file: in the end the last one is in effect."""
        daemon = self.begun(table("products"))
        for number in range(1, 51):
            self.write(table("products"), table(f"d{number}"))
            daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: list(daemon.json()["datasets"]) == ["products", "d50"], "the last configuration")
        wait_until(lambda: daemon.ask("ready") == "ready", "readiness")
        self.assertEqual(self.dataset(daemon, "products")["generation"], 1)
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_while_a_refresh_runs(self) -> None:
        """A refresh in flight of an unchanged dataset goes on; that of a removed or changed one is ended."""
        slow = "generate_series(1, 3) AS id, LATERAL pg_sleep({})"
        daemon = self.started(
            self.configured(
                table("kept", slow.format(1)),
                table("changed", slow.format(500), timeout_s=600),
                table("removed", slow.format(600), timeout_s=600),
                more="[defaults]\nrequired = false\n",
            ).replace("[postgres]", "[postgres]\nmax_connections = 4")
        )
        wait_until(
            lambda: len([s for s in sessions(self.server, self.database) if s.state == "active"]) == 3, "the reads"
        )
        [kept] = [s.pid for s in sessions(self.server, self.database) if "kept" in s.application_name]
        self.reload(table("kept", slow.format(1)), table("changed"), more="[defaults]\nrequired = false\n")
        wait_until(lambda: self.dataset(daemon, "changed")["rows"] == 3, "the new query's rows")
        wait_until(
            lambda: not [s for s in sessions(self.server, self.database) if s.pid != kept], "the end of the others"
        )
        wait_until(lambda: self.dataset(daemon, "kept")["generation"] == 1, "the load of what was kept")
        self.assertEqual(self.dataset(daemon, "kept")["last_attempt"]["outcome"], "published")
        self.assertEqual([line for line in daemon.lines if line["event"] == "refresh_failed"], [])

    def test_another_database(self) -> None:
        """With another dsn what is served stays, and is then read from there."""
        other = fresh_database(self.server, self.addCleanup)
        for database, count in ((self.database, 3), (other, 4)):
            query(self.server, database, f"CREATE TABLE things AS SELECT id FROM generate_series(1, {count}) AS id")
        daemon = self.begun(table("products", "things"))
        self.assertIn("1 changed", self.reload(table("products", "things"), dsn=self.server.dsn(database=other)))
        wait_until(lambda: self.dataset(daemon, "products")["rows"] == 4, "the other database's rows")
        self.assertEqual(self.dataset(daemon, "products")["generation"], 2)

    def test_waiting_readers_of_what_is_removed(self) -> None:
        """CACHE.WAIT and ?max_age= end with an error that says so, on the connection that they were asked on."""
        slow = "generate_series(1, 2) AS id, LATERAL pg_sleep(1)"
        daemon = self.begun(table("stays"), table("goes", slow, timeout_s=100))
        client = self.connected(daemon)
        answers: list[Any] = []

        def wait() -> None:
            try:
                client.execute_command("CACHE.WAIT", "goes", 2**40, 60_000)
            except redis.ResponseError as error:
                answers.append(str(error))

        def fetch() -> None:
            answers.append(self.fetch(daemon, "/v1/datasets/goes?max_age=0")[0])

        threads = [threading.Thread(target=each) for each in (wait, fetch)]
        for thread in threads:
            thread.start()
        other = self.connected(daemon)
        wait_until(lambda: other.info("clients")["blocked_clients"] == 1, "the wait")
        wait_until(lambda: self.dataset(daemon, "goes")["refreshing"], "the refresh")
        self.reload(table("stays"))
        for thread in threads:
            thread.join(GIVE_UP_S)
        self.assertEqual(sorted(map(str, answers)), ["404", "unknown dataset 'goes'"])
        self.assertIn(b"row of stays", client.get("stays:1"))

    def test_saved_files(self) -> None:
        """A dataset that comes back has its saved rows before the database answers; another query's are never used."""
        more = f'[persistence]\ndirectory = "{self.directory}/saved"\nmin_save_interval_s = 0\n'
        daemon = self.begun(table("stays"), table("products"), more=more)
        wait_until(lambda: len([line for line in daemon.lines if line["event"] == "snapshot_saved"]) == 2, "the saves")
        self.reload(table("stays"), more=more)
        self.assertEqual(len(list((self.directory / "saved").glob("products.*"))), 1)
        self.reload(table("stays"), table("products"), more=more)
        restored = daemon.event("snapshot_restored")
        self.assertEqual((restored["dataset"], restored["generation"], restored["rows"]), ("products", 2, 3))
        wait_until(lambda: self.dataset(daemon, "products")["source"] == "postgres", "the refresh after it")
        self.assertEqual(self.dataset(daemon, "products")["generation"], 2)  # with the same rows
        wait_until(lambda: len([line for line in daemon.lines if line["event"] == "snapshot_saved"]) == 3, "the save")
        # Of another query: it is not restored, nor rolled back to.
        self.reload(table("stays"), table("products", "generate_series(1, 7) AS id"), more=more)
        wait_until(lambda: self.dataset(daemon, "products")["rows"] == 7, "the new query's rows")
        self.admin("rollback products")
        self.assertIn("was changed since it was saved", daemon.event("rollback_failed")["error"])
        self.assertEqual(self.dataset(daemon, "products")["rows"], 7)
