"""Laws of the refreshes: when they start, what a failure does, and how they stop.

The database is a fake whose reads end when a test wants it; the time is a Clock's.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed

from cacheservice.base.errors import DatabaseUnavailable, LockTimeout, QueryFailed, UnknownDataset
from cacheservice.cache.dataset import Dataset, State
from cacheservice.cache.events import Ended, Published, Renewed
from cacheservice.cache.refresh_status import Phase
from cacheservice.sources.base import Moment, ReadResult, Unchanged
from tests.kit.datasets import MOMENT, rows_of, snapshot_of
from tests.kit.refreshes import BLOCKER, START_S, Read, RefreshTestCase, World


class EqualContent(RefreshTestCase):
    """A full read that returns what is served."""

    def loaded(self, rows: int = 3) -> World:
        world = self.started()
        world.database.last.complete(rows, columns=1)
        return world

    def read_again(self, world: World, rows: int = 3, columns: int = 1) -> Dataset:
        world.advance(60)
        world.database.last.complete(rows, columns)
        return world.dataset

    def test_it_is_unchanged(self) -> None:
        """It keeps its generation and its rows, is not announced or counted as a publish, and its age restarts."""
        world = self.loaded()
        served, notified, followed = world.dataset.snapshot, [], []
        assert served is not None
        world.dataset.subscribe(lambda event: notified.append(event.dataset), Published, Ended)
        world.dataset.subscribe(lambda event: followed.append(event.dataset), Published, Renewed, Ended)
        for number in (2, 3):
            dataset = self.read_again(world)
            renewed = dataset.snapshot
            assert renewed is not None
            self.assertIs(renewed.rows, served.rows)
            self.assertEqual((renewed.generation, dataset.attempts[-1].outcome), (1, "unchanged"))
            self.assertEqual((dataset.age_s(), renewed.modified_as_of), (0.0, served.as_of))
            self.assertEqual((notified, len(followed)), ([], number - 1))
        self.assertEqual(dict(dataset.counts.outcomes), {"published": 1, "unchanged": 2})
        self.assertEqual(world.log.lines[-1][1], "refresh_unchanged")
        dataset = self.read_again(world, rows=4)
        assert dataset.snapshot is not None
        self.assertEqual((dataset.snapshot.generation, len(notified)), (2, 1))

    def test_other_columns_without_a_row(self) -> None:
        """An empty result of other columns is another content, although no row differs."""
        world = self.loaded(rows=0)
        dataset = self.read_again(world, rows=0, columns=1)
        self.assertEqual(dataset.attempts[-1].outcome, "unchanged")
        dataset = self.read_again(world, rows=0, columns=2)
        self.assertEqual(dataset.attempts[-1].outcome, "published")

    def test_another_query(self) -> None:
        """If another query returns the same rows, they are those of the new query, under the same generation."""
        world = self.loaded()
        settings = world.dataset.settings
        world.service.redeclare([settings.model_copy(update={"query": "SELECT 1 AS id, 2 AS other"})])
        self.assertTrue(world.dataset.redefined)
        world.database.last.complete(3, columns=1)
        self.assertEqual((world.dataset.last_generation, world.dataset.redefined), (1, False))

    def test_pinned(self) -> None:
        """A pinned dataset's age rises all the same; unpin then renews it, and publishes nothing."""
        world = self.loaded()
        notified: list[str] = []
        world.dataset.subscribe(lambda event: notified.append(event.dataset), Published, Ended)
        world.service.pin("products")
        dataset = self.read_again(world)
        self.assertEqual((dataset.age_s(), dataset.attempts[-1].outcome), (60.0, "held"))
        world.service.unpin("products")
        self.assertEqual((dataset.age_s(), dataset.last_generation, notified), (0.0, 1, []))

    def test_what_was_rolled_back_from(self) -> None:
        """What is read again behind a rollback is the candidate that there was: the same rows since the same moment."""
        world = self.loaded()
        first = world.dataset.snapshot
        assert first is not None
        second = self.read_again(world, rows=4).snapshot
        assert second is not None
        world.dataset.roll_back(first)
        candidate = self.read_again(world, rows=4).candidate
        assert candidate is not None
        self.assertIs(candidate.rows, second.rows)
        world.service.unpin("products")
        self.assertEqual((world.dataset.last_generation, len(world.dataset.snapshot.rows)), (4, 4))  # type: ignore[union-attr]

    def test_other_shards(self) -> None:
        """With a layout that patches need the new rows are taken, under the same generation."""
        world = self.loaded()
        served = world.dataset.snapshot
        assert served is not None
        settings = world.dataset.settings
        world.service.redeclare([settings.model_copy(update={"notify": "changes"})])
        dataset = self.read_again(world)
        assert dataset.snapshot is not None
        self.assertIsNot(dataset.snapshot.rows, served.rows)
        self.assertEqual((dataset.last_generation, dataset.attempts[-1].outcome), (1, "unchanged"))


class Starts(RefreshTestCase):
    def test_nothing_before_start(self) -> None:
        """A service that is made and not started reads nothing and plans nothing."""
        world = World()
        self.assertEqual((world.database.reads, world.clock.getDelayedCalls()), ([], []))

    def test_the_first_load(self) -> None:
        """All are loaded at once at the start, as many together as there are connections, in the declared order."""
        world = self.started("a", "b", "c", "d")
        self.assertEqual(world.starts, [("a", 0), ("b", 0)])
        world.database.reads[1].complete()
        world.database.reads[0].complete()
        self.assertEqual(world.starts, [("a", 0), ("b", 0), ("c", 0), ("d", 0)])

    def test_who_needs_it_most(self) -> None:
        """Those that wait for a connection go in the order of their need at that moment."""
        world = self.started("a", "b", "c", max_connections=1)
        for _ in range(3):
            world.advance(1)
            world.database.last.complete()
        world.advance_to(59)
        world.service.refresh_now("c")
        world.advance_to(61)
        world.database.last.complete()
        for _ in range(2):
            world.database.last.complete()
        self.assertEqual([name for name, _ in world.starts], ["a", "b", "c", "c", "a", "b"])

    def test_a_fixed_phase(self) -> None:
        """Starts are exactly one interval apart, however long each refresh takes."""
        world = self.started()
        for took_s in (1, 30, 59, 0):
            world.advance(took_s)
            world.database.last.complete()
            world.advance(60 - took_s)
        self.assertEqual(world.starts, [("products", at) for at in (0, 60, 120, 180, 240)])
        self.assertEqual(world.dataset.counts.missed_ticks, 0)

    def test_jitter_is_earlier_and_fixed(self) -> None:
        """The share drawn once moves the first start of an interval earlier; after it they are one interval apart."""
        draws = iter([0.5, 1.0])
        world = self.started("a", "b", jitter=0.1, random=lambda: next(draws))
        for at in (54, 57, 114, 117, 174, 177):
            for read in world.database.running:
                read.complete()
            world.advance_to(at)
        self.assertEqual(world.starts[2:], [("b", 54), ("a", 57), ("b", 114), ("a", 117), ("b", 174), ("a", 177)])

    @settings(deadline=None)
    @given(st.floats(0, 1), st.floats(0, 0.99), st.floats(0.01, 1e5))
    def test_jitter_never_makes_it_late(self, share: float, jitter: float, interval_s: float) -> None:
        """Whatever is drawn, the first interval is at least (1 - jitter) of a whole one and at most a whole one."""
        world = World(jitter=jitter, interval_s=interval_s, random=lambda: share)
        world.service.startService()
        world.database.last.complete()
        next_in_s = world.dataset.next_refresh_in_s()
        assert next_in_s is not None
        self.assertLessEqual(next_in_s, interval_s * 1.000001)
        self.assertGreaterEqual(next_in_s, interval_s * (1 - jitter) * 0.999)
        self.stop(world)

    def test_the_next_start_is_planned(self) -> None:
        """At any time next_refresh_in_s counts down to the start that then happens."""
        world = self.started(interval_s=60.0, jitter=0.1, random=lambda: 0.5)
        self.assertEqual(world.dataset.next_refresh_in_s(), 57)
        world.database.last.complete()
        world.advance(20)
        self.assertEqual(world.dataset.next_refresh_in_s(), 37)
        world.advance(37)
        self.assertEqual(world.starts[1:], [("products", 57)])
        self.assertEqual(world.dataset.next_refresh_in_s(), 60)


class Notified(RefreshTestCase):
    """The keys that an application notifies, and the transactions that read them."""

    def asked(self, world: World) -> frozenset[str] | None:
        """The keys that the read which runs now gets when it asks for them."""
        assert world.database.last.notified is not None
        return self.successResultOf(Deferred.fromCoroutine(world.database.last.notified()))

    def notified(self) -> World:
        """A read that was begun for the key 1."""
        world = self.started(notify="things", heard_all=lambda: succeed(True))
        world.database.last.complete()
        world.advance(5)
        world.heard("things", '["1"]')
        world.advance(1)
        return world

    def test_a_session_that_is_lost(self) -> None:
        """A read that begins again in another session gets the keys of the first try, and those heard meanwhile."""
        world = self.notified()
        self.assertEqual(self.asked(world), {"1"})
        world.heard("things", '["2"]')
        self.assertEqual(self.asked(world), {"1", "2"})
        self.assertEqual(self.asked(world), {"1", "2"})
        world.heard("things", "")
        self.assertEqual(self.asked(world), None)
        self.assertEqual(self.asked(world), None)

    def test_heard_after_the_transaction_began(self) -> None:
        """The transaction may not see the change of a key that is heard meanwhile: the next one reads it, too."""
        world = self.notified()
        world.heard("things", '["2"]')
        world.advance(1)
        self.assertEqual(self.asked(world), {"1", "2"})
        world.database.last.complete_nothing()
        world.advance(1)
        self.assertEqual(len(world.database.reads), 3)
        self.assertEqual(self.asked(world), {"2"})
        world.database.last.complete_nothing()
        world.heard("things", '["3"]')
        world.advance(1)
        self.assertEqual(self.asked(world), {"3"})

    def assert_all_is_read_once(self, world: World) -> None:
        """The read that runs reads all rows, and after it keys are enough again."""
        if world.database.last.notified is not None:  # a notification has begun it, not the retry
            self.assertIsNone(self.asked(world))
        world.database.last.complete(rows=4)
        world.heard("things", '["2"]')
        world.advance(5)
        self.assertEqual(self.asked(world), {"2"})
        world.database.last.complete_nothing()

    def test_keys_of_a_failed_read(self) -> None:
        """The keys are lost with the read that took them: the retry reads all rows, even if the probe is the same."""
        world = self.notified()
        world.database.last.fail()
        world.advance(30)
        self.assertEqual(len(world.database.reads), 3)
        self.assertFalse(world.database.last.trust_probe)
        self.assert_all_is_read_once(world)

    def test_keys_of_a_held_result(self) -> None:
        """What was held is not served, so the next read is of all rows."""
        world = self.started(notify="things", heard_all=lambda: succeed(True), min_rows=3)
        world.database.last.complete(rows=4)
        world.advance(5)
        world.heard("things", '["1"]')
        world.advance(1)
        self.assertEqual(self.asked(world), {"1"})
        world.database.last.complete(rows=2)
        self.assertIsNotNone(world.dataset.held)
        world.heard("things", '["2"]')
        world.advance(60)
        self.assert_all_is_read_once(world)

    def test_a_stop_while_keys_are_read(self) -> None:
        """Stop ends the read, and a notification that arrives afterwards begins none."""
        world = self.notified()
        world.heard("things", '["2"]')
        self.stop(world)
        reads = len(world.database.reads)
        world.heard("things", '["3"]')
        world.clock.advance(100)
        self.assertEqual(len(world.database.reads), reads)
        self.assertEqual(world.log.names("refresh_failed"), [])


class Overlaps(RefreshTestCase):
    def test_a_start_that_comes_too_early_is_skipped(self) -> None:
        """A start that comes while a refresh still runs is skipped and counted; the next one is at its usual time."""
        world = self.started()
        world.advance(60)
        world.advance(60)
        world.advance(10)
        self.assertEqual((len(world.database.reads), world.dataset.counts.missed_ticks), (1, 2))
        world.database.last.complete()
        world.advance_to(180)
        self.assertEqual(world.starts, [("products", 0), ("products", 180)])
        self.assertEqual(world.dataset.counts.missed_ticks, 2)

    def test_starts_missed_while_the_reactor_was_held(self) -> None:
        """Starts that nobody could run are counted and made up for by one, not by all."""
        world = self.started()
        world.database.last.complete()
        world.advance(60)
        world.database.last.complete()
        world.hold(60 * 4 + 1)
        self.assertEqual((len(world.database.reads), world.dataset.counts.missed_ticks), (3, 3))
        world.database.last.complete()
        world.advance_to(360)
        self.assertEqual(world.starts[3:], [("products", 360)])

    def test_a_first_start_that_comes_late(self) -> None:
        """If the reactor is held when the first interval ends, later starts, logged and real, are counted from then."""
        world = self.started()
        world.database.last.complete()
        world.hold(65)
        world.database.last.complete()
        self.assertEqual(world.dataset.next_refresh_in_s(), 60)
        world.advance(60)
        self.assertEqual(world.starts, [("products", 0), ("products", 65), ("products", 125)])

    @settings(deadline=None)
    @given(
        st.integers(1, 3),
        st.lists(
            st.tuples(
                st.sampled_from(["advance", "advance", "complete", "fail", "break", "refresh"]), st.floats(0, 100)
            ),
            max_size=60,
        ),
    )
    def test_never_itself(self, connections: int, steps: list[tuple[str, float]]) -> None:
        """Whatever happens in whatever order, no refresh overlaps itself, and each dataset is tried again in time."""
        draws = iter([share / 10 for _ in range(1000) for share in (3, 9, 0, 7, 5)])
        world = World("a", "b", "c", max_connections=connections, jitter=0.1, random=lambda: next(draws))
        world.service.startService()
        generations = dict.fromkeys("abc", 0)
        for step, share in steps:
            running = world.database.running
            if step == "advance":
                world.advance(share)
            elif step == "refresh":
                world.service.refresh_now("abc"[int(share) % 3])
            elif running:
                read = running[int(share) % len(running)]
                if step == "complete":
                    read.complete()
                else:
                    read.fail(ZeroDivisionError() if step == "break" else None)
            self.assertLessEqual(len(world.database.running), connections)
            for name, dataset in world.cache.datasets.items():
                generation = dataset.snapshot.generation if dataset.snapshot else 0
                self.assertGreaterEqual(generation, generations[name])
                generations[name] = generation
                self.assertLessEqual(dataset.next_refresh_in_s() or 0, 60.001)
        # Left alone with a database that answers, everything is fresh after an interval.
        for interval_s in (60, 0):
            while world.database.running:
                world.database.running[0].complete()
            world.advance(interval_s)
        self.assertEqual({dataset.state() for dataset in world.cache.datasets.values()}, {State.FRESH})
        self.stop(world)


class Bursts(RefreshTestCase):
    """Notifications of a dataset with `notify`, one after the other."""

    def burst(self, world: World, count: int, pause_s: float, read_s: float) -> int:
        """How many reads begin while so many come and until all is quiet, each done in `read_s`."""
        before = len(world.database.reads)
        end_at: dict[int, float] = {}

        def work() -> None:
            for read in world.database.running:
                if world.now_s >= end_at.setdefault(id(read), world.now_s + read_s):
                    read.complete()

        for _ in range(count):
            world.heard("changes", "")
            for _ in range(max(1, round(pause_s / 0.001))):
                world.advance(min(pause_s, 0.001))
                work()
        for _ in range(1000):
            world.advance(0.001)
            work()
        return len(world.database.reads) - before

    def loaded(self, **options: Any) -> World:
        world = self.started(**({"notify": "changes"} | options))
        world.advance(0.0)
        world.database.reads[0].complete()
        world.advance(10.0)
        return world

    def test_ten_thousand(self) -> None:
        """10,000 in a second, each of a transaction of its own, cost two reads: at the first, and after the last."""
        for read_s in (0.001, 0.02, 0.3):
            world = self.loaded()
            self.assertEqual(self.burst(world, 10_000, 0.0001, read_s), 2)
            self.stop(world)

    def test_the_first_and_those_far_apart(self) -> None:
        """One that comes alone is read at once, and so is each of some that are not of a burst."""
        world = self.loaded()
        self.assertEqual(self.burst(world, 10, 0.03, 0.001), 10)

    def test_without_end(self) -> None:
        """A stream that never pauses is read every two seconds all the same."""
        world = self.loaded()
        self.assertIn(self.burst(world, 10_000, 0.001, 0.01), range(5, 8))

    def test_of_triggers(self) -> None:
        """What triggers notify costs little to read, so each change is read as soon as it can be."""
        world = self.loaded(notify="", watch=[{"table": "public.products", "key": "id"}])
        before = len(world.database.reads)
        for _ in range(100):
            world.heard("cacheservice", "changed 1")
            world.advance(0.001)
            for read in world.database.running:
                read.complete()
        self.assertGreater(len(world.database.reads) - before, 90)

    def test_while_it_fails(self) -> None:
        """Notifications do not drive a dataset that fails past its backoff."""
        world = self.loaded(retry_initial_s=4.0)
        world.heard("changes", "")
        world.advance(0.001)
        world.heard("changes", "")
        world.database.running[0].fail()
        before = len(world.database.reads)
        for _ in range(100):
            world.heard("changes", "")
            world.advance(0.01)
        self.assertEqual(len(world.database.reads), before)
        world.advance(4.0)
        self.assertEqual(len(world.database.reads), before + 1)
        world.database.running[0].complete()

    def test_stop_amid_a_burst(self) -> None:
        """What waits for the end of a burst is dropped at the stop."""
        world = self.loaded()
        for _ in range(50):
            world.heard("changes", "")
            world.advance(0.001)
            for read in world.database.running:
                read.complete()
        self.assertEqual(world.database.running, [])
        self.stop(world)

    def test_stop_amid_a_burst_while_a_read_runs(self) -> None:
        """The running read is ended, and none follows it."""
        world = self.loaded()
        for _ in range(50):
            world.heard("changes", "")
            world.advance(0.001)
        self.assertEqual(len(world.database.running), 1)
        reads = len(world.database.reads)
        self.stop(world)
        world.advance(100)
        self.assertEqual(len(world.database.reads), reads)


class Failures(RefreshTestCase):
    def test_backoff_up_to_the_next_start(self) -> None:
        """Retries come after 1, 2, 4 … seconds (the largest draws), and the next start is never put off by one."""
        world = self.started()
        for at in (1, 3, 7, 15, 31, 60, 120):
            world.database.last.fail()
            world.advance_to(at)
        self.assertEqual([at for _, at in world.starts], [0, 1, 3, 7, 15, 31, 60, 120])
        self.assertEqual(world.triggers, ["start", *["retry"] * 5, "interval"])

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=1, max_size=30))
    def test_a_retry_is_never_past_the_next_start(self, failures: list[tuple[float, float]]) -> None:
        """However long attempts take and whatever is drawn, the next one starts at the next start or before it."""
        draws = iter([0.0, *(share for share, _ in failures)])
        world = World(random=lambda: next(draws), retry_initial_s=5.0, retry_max_s=300.0)
        world.service.startService()
        for _, took_s in failures:
            world.advance(took_s)
            attempts = len(world.database.reads)
            world.database.last.fail()
            _, event, fields = world.log.lines[-1]
            self.assertEqual(event, "refresh_failed")
            to_the_next_start_s = 60 - world.now_s % 60
            self.assertLessEqual(fields["retry_in_s"], to_the_next_start_s + 0.001)
            world.advance(fields["retry_in_s"] + 0.001)
            self.assertEqual(len(world.database.reads), attempts + 1)
        self.stop(world)

    def test_success_resets_the_backoff(self) -> None:
        """After a success the count of failures is 0, and the first retry of the next failure is as soon as before."""
        world = self.started()
        world.database.last.fail()
        world.advance(1)
        world.database.last.fail()
        self.assertEqual(world.dataset.consecutive_failures, 2)
        world.advance(2)
        world.database.last.complete()
        self.assertEqual(world.dataset.consecutive_failures, 0)
        world.advance_to(60)
        world.database.last.fail()
        world.advance(1)
        self.assertEqual([at for _, at in world.starts], [0, 1, 3, 60, 61])

    def test_no_failure_ends_the_loop(self) -> None:
        """Whatever is raised, at once or later, expected or a bug, the next start comes."""
        world = self.started(retry_initial_s=100.0, retry_max_s=100.0)
        errors = [ZeroDivisionError(), DatabaseUnavailable("refused"), QueryFailed("no"), KeyError("x"), OSError(5)]
        for number, error in enumerate(errors, 1):
            world.database.last.fail(error)
            world.advance_to(number * 60)
        world.database.last.complete()
        for number, error in enumerate(errors, 6):
            world.database.raising = error
            world.advance_to(number * 60)
        world.database.raising = None
        world.advance_to(660)
        world.database.last.complete()
        self.assertEqual([at for _, at in world.starts], [60 * number for number in range(12)])
        self.assertEqual(world.dataset.counts.outcomes, {"failed": 10, "published": 2})

    def test_an_unexpected_error_is_logged_with_its_traceback(self) -> None:
        """A bug is a failed attempt that names its kind, and an error in the log with the traceback."""
        world = self.started()
        world.database.last.fail(ZeroDivisionError("secret"))
        self.assertEqual(world.log.lines[-2][:2], ("error", "refresh_broke"))
        self.assertTrue(world.log.lines[-2][2]["exc_info"])
        attempt = world.dataset.attempts[-1]
        self.assertEqual(attempt.error, "an internal error, ZeroDivisionError; its traceback is in the log")
        self.assertEqual((attempt.outcome, world.log.lines[-1][1]), ("failed", "refresh_failed"))

    def test_the_last_good_snapshot_stays(self) -> None:
        """A failed attempt changes nothing of what readers see, and what it had read is gone."""
        world = self.started()
        world.database.last.complete(rows=3)
        snapshot = world.dataset.snapshot
        world.advance(60)
        read = world.database.last
        read.into.add([(b"7", b"{}")])
        read.fail()
        self.assertIs(world.dataset.snapshot, snapshot)
        assert snapshot is not None
        self.assertEqual([key for key, _ in sorted(snapshot.rows.items())], [b"0", b"1", b"2"])
        self.assertEqual((snapshot.generation, world.dataset.state()), (1, State.FRESH))

    def test_a_failing_dataset_delays_no_other(self) -> None:
        """While two datasets fail and hang for their whole deadline, the third is read at each of its starts."""
        world = self.started("bad", "worse", "good")
        for read in list(world.database.running):
            read.fail()
        world.database.last.complete()
        for number in range(1, 6):
            world.advance_to(number * 60)
            good = [read for read in world.database.running if read.name == "good"]
            self.assertEqual([read.began_at - START_S for read in good], [number * 60])
            good[0].complete()
            for read in world.database.running:
                if number % 2:
                    read.fail(DatabaseUnavailable("PostgreSQL did not answer within 30 s"))
        dataset = world.cache.dataset("good")
        self.assertEqual((dataset.counts.outcomes, dataset.counts.missed_ticks), ({"published": 6}, 0))

    def test_what_is_known_of_the_database(self) -> None:
        """A database that cannot be reached is down, one that refuses a query is up, and at first nothing is known."""
        world = self.started()
        status = world.cache.database
        self.assertEqual((status.state, status.error), ("unknown", None))
        world.database.last.fail(DatabaseUnavailable("connection refused"))
        self.assertEqual((status.state, status.error), ("down", "connection refused"))
        world.advance(1)
        world.database.last.fail(QueryFailed("syntax error"))
        self.assertEqual((status.state, status.error), ("up", None))
        world.advance(2)
        world.database.last.fail(DatabaseUnavailable("gone"))
        world.advance(4)
        world.database.last.complete()
        self.assertEqual((status.state, status.error), ("up", None))


class Manual(RefreshTestCase):
    def test_at_once_when_idle(self) -> None:
        """Asked for while nothing runs, a refresh begins at once and the usual starts stay as they are."""
        world = self.started()
        world.database.last.complete()
        world.advance(10)
        self.assertTrue(world.service.refresh_now("products"))
        world.database.last.complete()
        world.advance_to(60)
        self.assertEqual([at for _, at in world.starts], [0, 10, 60])
        self.assertEqual(world.triggers, ["start", "manual"])

    def test_exactly_one_more(self) -> None:
        """Asked for while one runs, however often, exactly one more begins when that has ended, well or not."""
        world = self.started()
        for end in (Read.complete, Read.fail):
            before = len(world.database.reads)
            for _ in range(3):
                self.assertFalse(world.service.refresh_now("products"))
            end(world.database.last)
            self.assertEqual(len(world.database.reads), before + 1)
            world.database.last.complete()
            self.assertEqual(len(world.database.running), 0)
            self.assertTrue(world.service.refresh_now("products"))
        self.assertEqual(world.triggers, ["start", "manual", "manual", "manual"])

    def test_instead_of_a_retry(self) -> None:
        """Asked for while a retry waits, it takes its place."""
        world = self.started()
        world.database.last.fail()
        self.assertTrue(world.service.refresh_now("products"))
        world.database.last.complete()
        world.advance(30)
        self.assertEqual([at for _, at in world.starts], [0, 0])

    def test_unknown(self) -> None:
        """A dataset that is not declared is an error."""
        world = self.started()
        with self.assertRaisesRegex(UnknownDataset, "^unknown dataset 'absent'$"):
            world.service.refresh_now("absent")


class Progress(RefreshTestCase):
    def test_waiting_and_reading(self) -> None:
        """Refreshing is true from its start to its end; what is loading is there only while it is read."""
        world = self.started("a", "products", max_connections=1)
        dataset = world.dataset
        self.assertEqual((dataset.refresh.phase, dataset.refresh.progress), (Phase.WAITING, None))
        world.database.last.complete()
        self.assertTrue(dataset.refresh.is_running)
        assert dataset.refresh.progress is not None
        world.database.last.into.add([(b"1", b"{}"), (b"2", b"{}")])
        self.assertEqual(dataset.refresh.progress.rows.count, 2)
        world.database.last.fail()
        self.assertEqual((dataset.refresh.is_running, dataset.refresh.progress), (False, None))

    def test_how_many_rows_to_expect(self) -> None:
        """The planner is asked for the first load; later the snapshot that is served is the better guess."""
        world = self.started()
        first = world.database.last
        assert first.expect is not None
        first.expect(1000)
        self.assertEqual(world.dataset.refresh.progress.expected, 1000)
        first.complete(rows=7)
        world.advance(60)
        self.assertIsNone(world.database.last.expect)
        self.assertEqual(world.dataset.refresh.progress.expected, 7)


class Expiry(RefreshTestCase):
    def test_logged_once_each(self) -> None:
        """dataset_expired is logged once when the age passes its limit, dataset_recovered once with a new snapshot."""
        world = self.started(retry_initial_s=60.0)
        world.database.last.complete()
        for at in range(60, 600, 60):
            world.advance_to(at)
            world.database.last.fail()
        self.assertEqual(world.log.names("dataset_expired", "dataset_recovered"), ["dataset_expired"])
        world.advance_to(600)
        world.database.last.complete()
        events = ["dataset_expired", "dataset_recovered"]
        self.assertEqual(world.log.names(*events), events)
        self.assertIn(("info", "dataset_recovered", {"dataset": "products"}), world.log.lines)
        for at in (660, 720, 780):
            world.advance_to(at)
            world.database.last.complete()
        self.assertEqual(world.log.names(*events), events)

    def test_when_and_how(self) -> None:
        """It is logged when the state changes, with the age and the limit."""
        world = self.started()
        world.database.last.complete()
        world.advance(180)
        self.assertEqual((world.dataset.state(), world.log.names("dataset_expired")), (State.STALE, []))
        world.advance(0.001)
        self.assertEqual(world.dataset.state(), State.EXPIRED)
        expired = {"dataset": "products", "age_s": 180.001, "max_age_s": 180.0}
        self.assertIn(("warning", "dataset_expired", expired), world.log.lines)

    def test_of_another_process(self) -> None:
        """What a leader publishes expires and recovers in the log of a process that never reads, too."""
        world = World()
        world.service.follow_leaders(lambda name: None)
        world.service.startService()
        self.addCleanup(self.stop, world)
        world.dataset.publish(snapshot_of(rows_of({}), 1, world.clock.seconds()))
        world.advance(181)
        world.dataset.publish(snapshot_of(rows_of({}), 2, world.clock.seconds()))
        self.assertEqual(world.log.names(), ["dataset_expired", "dataset_recovered"])
        self.assertEqual(world.database.reads, [])

    def test_no_recovery_by_what_has_expired(self) -> None:
        """A snapshot that took longer to read than it may be old is not a recovery; only a good one is."""
        world = self.started(max_age_s=10.0)
        events = ["dataset_expired", "dataset_recovered"]
        for at in (60, 120):
            world.advance(20)
            world.database.last.complete()
            world.advance_to(at)
        self.assertEqual(world.log.names(*events), events[:1])
        world.database.last.complete()
        self.assertEqual(world.log.names(*events), events)


class Lines(RefreshTestCase):
    """One canonical line per refresh."""

    def test_published(self) -> None:
        """refresh_published has the fields of the contract, durations to the millisecond."""
        world = self.started("a", "products", max_connections=1)
        world.advance(0.25)
        world.database.last.complete()
        world.advance(1.00049)
        world.database.last.complete(rows=2)
        self.assert_last_line(
            world,
            "info",
            "refresh_published",
            {
                "dataset": "products",
                "trigger": "start",
                "generation": 1,
                "rows": 2,
                "read": "all rows",
                "bytes": 6,
                "added": 2,
                "changed": 0,
                "removed": 0,
                "accepted": None,
                "took_s": 1.0,
                "queued_s": 0.25,
            },
        )

    def test_failed(self) -> None:
        """refresh_failed has the reason, the duration, the time of the retry, and how many failed in a row."""
        world = self.started()
        world.advance(2)
        world.database.last.fail()
        expected = {
            "dataset": "products",
            "trigger": "start",
            "error": "column absent does not exist",
            "blocked_by": None,
            "took_s": 2.0,
            "retry_in_s": 1.0,
            "consecutive_failures": 1,
        }
        self.assert_last_line(world, "warning", "refresh_failed", expected)
        world.advance(1)
        world.database.last.fail()
        again = {"trigger": "retry", "took_s": 0.0, "retry_in_s": 2.0, "consecutive_failures": 2}
        self.assert_last_line(world, "warning", "refresh_failed", expected | again)

    def test_who_blocked_it(self) -> None:
        """A refresh that waited for a lock reports the session that held it, in the log and in the attempt."""
        world = self.started()
        world.database.last.fail(LockTimeout("a lock was not granted", "55P03", [BLOCKER]))
        self.assertEqual(world.dataset.attempts[-1].blockers, (BLOCKER,))
        self.assertEqual(
            world.log.lines[-1][2]["blocked_by"],
            [
                "session 42 of app (psql) holds AccessExclusiveLock on public.products, "
                "in a transaction since 2026-01-02T03:04:05Z, idle in transaction"
            ],
        )

    def test_one_a_refresh(self) -> None:
        """Each refresh that ends has exactly one line of its own, and a snapshot knows where it is from."""
        world = self.started(retry_initial_s=60.0)
        for at, end in ((60, Read.complete), (120, Read.fail), (180, Read.complete)):
            end(world.database.last)
            world.advance_to(at)
        events = ["refresh_published", "refresh_failed", "refresh_published"]
        self.assertEqual([event for _, event, _ in world.log.lines], events)
        snapshot = world.dataset.snapshot
        assert snapshot is not None
        self.assertEqual((snapshot.generation, snapshot.as_of, snapshot.read_at), (2, MOMENT, START_S + 120))
        self.assertEqual((snapshot.source, snapshot.database_snapshot), ("postgres", "1:1:"))


class Stopping(RefreshTestCase):
    def assert_stops(self, world: World) -> None:
        lines = len(world.log.names("refresh_failed", "refresh_published"))
        self.stop(world)
        reads = len(world.database.reads)
        world.advance(1000)
        self.assertEqual(len(world.database.reads), reads)
        self.assertEqual(len(world.log.names("refresh_failed", "refresh_published")), lines)
        for dataset in world.cache.datasets.values():
            self.assertEqual((dataset.refresh.is_running, dataset.refresh.progress), (False, None))
            self.assertIsNone(dataset.next_refresh_in_s())

    def test_never_started(self) -> None:
        """Stop before start is done at once."""
        self.successResultOf(World().service.stopService())

    def test_between_refreshes(self) -> None:
        """Between two refreshes stop takes the plans back."""
        world = self.started()
        world.database.last.complete()
        world.advance(100)
        world.database.last.complete()
        self.assert_stops(world)

    def test_while_reading_and_queued(self) -> None:
        """A running read is cancelled and a waiting one is sent away; neither is logged as a failure."""
        world = self.started("a", "b", "products", max_connections=1)
        self.assert_stops(world)
        self.assertEqual(sum(world.dataset.counts.outcomes.values()), 0)

    def test_with_one_more_asked_for(self) -> None:
        """A refresh asked for while one runs does not begin when stop ends that one."""
        world = self.started("a", "products", max_connections=1)
        world.service.refresh_now("a")
        world.service.refresh_now("products")
        self.assert_stops(world)
        self.assertEqual(len(world.database.reads), 1)

    def test_while_a_retry_waits(self) -> None:
        """A retry that waits is taken back."""
        world = self.started()
        world.database.last.fail()
        self.assert_stops(world)

    def test_when_expired(self) -> None:
        """An expired dataset stops as any other, and so does one that is about to expire."""
        world = self.started(interval_s=1000.0, max_age_s=10.0)
        world.database.last.complete()
        world.advance(9)
        world.service.refresh_now("products")
        world.database.last.fail()
        world.advance(5)
        self.assertEqual(world.log.names("dataset_expired"), ["dataset_expired"])
        self.assert_stops(world)

    def test_waits_for_what_runs(self) -> None:
        """Stop fires only when the read that it cancels has ended."""
        world = World()
        ended: Deferred[ReadResult] = Deferred()
        world.database.after_failure = lambda _: ended
        world.service.startService()
        stopped = world.service.stopService()
        self.assertNoResult(stopped)
        ended.errback(DatabaseUnavailable("the session was closed"))
        self.successResultOf(stopped)
        self.assertEqual(world.clock.getDelayedCalls(), [])
        self.assertIsNone(world.dataset.next_refresh_in_s())

    def test_a_read_that_ends_well_nevertheless(self) -> None:
        """A read whose result comes in spite of the cancellation leaves no timer behind."""
        world = World()
        world.database.after_failure = lambda _: Unchanged(moment=Moment(MOMENT, START_S, "1:1:"))
        world.service.startService()
        self.stop(world)

    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(["advance", "complete", "fail", "break", "refresh"]), st.floats(0, 100)),
            max_size=30,
        )
    )
    def test_in_every_state(self, steps: list[tuple[str, float]]) -> None:
        """Wherever it stands, stop fires and leaves no delayed call and no read."""
        world = World("a", "b", "c", jitter=0.1, random=lambda: 0.5, max_age_s=70.0)
        world.service.startService()
        for step, share in steps:
            running = world.database.running
            if step == "advance":
                world.advance(share)
            elif step == "refresh":
                world.service.refresh_now("abc"[int(share) % 3])
            elif running and step == "complete":
                running[-1].complete()
            elif running:
                running[0].fail(ZeroDivisionError() if step == "break" else None)
        self.assert_stops(world)
