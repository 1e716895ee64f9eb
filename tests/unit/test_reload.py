"""Laws of reloading, over fakes: what has changed takes effect, and what has not notices nothing."""

from __future__ import annotations

import gc
import weakref
from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import ConfigError, QueryFailed, Stopped, UnknownDataset
from cacheservice.cache.cache import Cache, Declared, Rejection, Reloaded
from cacheservice.cache.dataset import State
from cacheservice.config import ConfigFile
from cacheservice.ports.freshness import Freshness, Wanted
from cacheservice.ports.operator_commands import Commands
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.fast_get import FastGets
from cacheservice.ports.resp.reply import CommandError
from cacheservice.refresh.budget import Budget
from cacheservice.refresh.slots import Slots
from tests.kit import views
from tests.kit.postgres import PRIMARY
from tests.kit.refreshes import RefreshTestCase, World, without_jitter
from tests.kit.resp_session import FakeLink, make_server
from tests.kit.slots import Job

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
                (id(d), id(d.snapshot), id(d.candidate), id(d.held), d.pinned, d.refresh.next_at, len(d.attempts))
                for d in datasets.values()
            ]

        before = state()
        self.assertTrue(datasets["a"].candidate)
        self.assertTrue(datasets["b"].held)
        loops = {name: world.service._refreshers.find(name)._starts._loop for name in datasets}
        told = world.service.redeclare(without_jitter("c", "new", "b", "a", jitter=0.1))
        self.assertEqual(told, Declared(["new"], [], [], ["c", "b", "a"]))
        self.assertEqual(list(world.cache.datasets), ["c", "new", "b", "a"])
        self.assertEqual({name: world.cache.dataset(name) for name in "abc"}, datasets)
        self.assertEqual(state(), before)
        self.assertEqual({name: world.service._refreshers.find(name)._starts._loop for name in datasets}, loops)
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
        self.assertEqual(world.dataset.counts.missed_ticks, 3)

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
        self.assertEqual((world.dataset.snapshot.rows.count, world.dataset.counts.missed_ticks), (2, 0))
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
        """max_age_s and required count from now on; expiry is reported by the new limit, and so is recovery."""
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
        fast, datasets = FastGets(world.cache), Datasets(world.cache)
        get = [[b"GET", b"products:0"]]
        world.advance(50)
        for on_expired, answers in (("serve", 1), ("refuse", 0), ("serve", 1)):
            world.service.redeclare(without_jitter("products", max_age_s=40.0, on_expired=on_expired))
            self.assertEqual(len(fast.hits(get)), answers)
        world.service.redeclare(without_jitter("products", max_age_s=40.0, on_expired="refuse"))
        with self.assertRaisesRegex(CommandError, "^STALE products is 50 s old, limit 40 s$"):
            datasets.rows(b"products")

    def test_another_query(self) -> None:
        """The old result is served until the new one is there, which is read at once and compared with nothing."""
        for change in ({"query": "SELECT 2 AS id"}, {"key": "other"}):
            world = self.loaded(rows=100)
            before = world.dataset.snapshot
            assert before is not None
            world.service.redeclare(without_jitter("products", **change))
            assert world.dataset.snapshot is not None
            self.assertIs(world.dataset.snapshot.rows, before.rows)
            self.assertIn("before the last reload", views.why(world.dataset, world.cache))
            self.assertIsNotNone(world.database.last.expect)
            world.database.last.complete(rows=1)
            after = world.dataset.snapshot
            assert after is not None
            self.assertEqual((after.generation, after.rows.count, world.dataset.held), (2, 1, None))
            self.assertEqual(after.change, (0, 0, 99))
            self.assertNotIn("before the last reload", views.why(world.dataset, world.cache))
            # From here on it is compared as usual.
            self.refresh(world, "products", rows=0)
            self.assertIsNotNone(world.dataset.held)

    def test_another_query_and_back(self) -> None:
        """A result of the present definition is compared again, whatever was declared in between."""
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
        """The old read is ended, what it returns nevertheless is not published, and only then the new one begins."""
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
        self.assertEqual((dataset.removed, dataset.snapshot, dataset.refresh.is_running), (True, None, False))
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
        client = FakeLink(make_server(world.cache, world.clock))
        self.assertEqual(client.ask("GET", "products:1"), b"$2\r\n{}\r\n")
        assert world.dataset.snapshot is not None
        rows = weakref.ref(world.dataset.snapshot.rows)
        world.service.redeclare(without_jitter("a"))
        gc.collect()
        self.assertIsNone(rows())
        self.assertEqual(client.ask("GET", "products:1"), b"-ERR unknown dataset 'products'\r\n")

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
        """A wait for a newer snapshot of it, or for a transaction in it, ends at once: the dataset is unknown."""
        world = self.loaded()
        freshness = Freshness(world.service, world.cache.database, world.clock)
        world.advance(10)
        waiting = [
            Deferred.fromCoroutine(freshness.meets(world.dataset, Wanted(5.0))),
            Deferred.fromCoroutine(freshness.includes(world.dataset, 10, 20.0)),
        ]
        world.service.redeclare(without_jitter("other"))
        for each in waiting:
            self.failureResultOf(each, UnknownDataset)

    def test_who_waits_for_one_whose_query_changes(self) -> None:
        """A client that waits for a newer snapshot gets that of the new query."""
        world = self.loaded()
        world.advance(10)
        waiting = Deferred.fromCoroutine(
            Freshness(world.service, world.cache.database, world.clock).meets(world.dataset, Wanted(5.0))
        )
        world.service.redeclare(without_jitter("products", query="SELECT 2 AS id"))
        self.assertNoResult(waiting)
        world.database.last.complete()
        self.assertTrue(self.successResultOf(waiting))

    def test_another_database(self) -> None:
        """All go on being served, are read again at once, and nothing served includes a transaction of the new one."""
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
        """A scan during which datasets are removed and added returns all keys that were there all along."""
        world = self.started("a", "b", "c", "d")
        while world.database.running:
            world.database.running[0].complete(rows=20)
        client = FakeLink(make_server(world.cache, world.clock))

        def scan(cursor: bytes) -> tuple[bytes, set[bytes]]:
            ((following, page),) = client.ask_all(("SCAN", cursor, "COUNT", 5))
            return following, set(page)

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
    """The admin socket's `reload`, and the status of a rejection."""

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
        """The reply is that what was read is an old file, and what to do."""
        answer = self.ask()
        self.result.callback(Reloaded(Declared([], [], [], ["a"]), [], FILE._replace(is_replaced=True)))
        self.assertIn(
            "has been replaced where it is mounted from; mount its folder to get the new file",
            self.successResultOf(answer),
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
        """A service that stops replies that."""
        answer = self.ask()
        self.result.errback(Stopped("the service is stopping"))
        self.assertEqual(self.successResultOf(answer), "ERROR the service is stopping")

    def test_on_the_status_port(self) -> None:
        """It is an admin command."""
        self.assertEqual(Commands(self.cache).answer("reload"), "ERROR reload is an admin command")

    def test_a_rejection(self) -> None:
        """The head line of status and each `why` report a rejection, and since when, until it is over."""
        dataset = self.cache.dataset("products")
        problem = "cacheservice.toml: datasets.x.interval_s: must be greater than 0"
        self.cache.rejection = Rejection((problem, "b", "c"), self.now_s)
        self.now_s += 12
        told = f"rejected 12 s ago: {problem} (and 2 more)"
        head = views.status_table(self.cache).splitlines()[0]
        self.assertTrue(head.endswith(f", up 12 s, configuration {told}"), head)
        self.assertIn(f"It was {told}.", views.why(dataset, self.cache))
        self.cache.rejection = None
        self.assertNotIn("rejected", views.status_table(self.cache) + views.why(dataset, self.cache))
