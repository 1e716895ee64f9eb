"""Laws of postgres.max_load: how much of a connection's time refreshes use, and who waits for it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.refresh_status import Phase
from cacheservice.config import DatasetSettings
from cacheservice.refresh.budget import WINDOW_S, Budget
from cacheservice.refresh.slots import Slots
from tests.kit import views
from tests.kit.refreshes import RefreshTestCase, World


class Counting(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.budget = Budget(0.5, self.clock)

    def use(self, seconds: float, expected_s: float = 0.0) -> None:
        use = self.budget.begin(expected_s)
        self.clock.advance(seconds)
        self.budget.end(use)

    def test_what_is_used(self) -> None:
        """Each session counts from its begin to its end, as far as that was in the last minute."""
        self.use(10)
        self.assertEqual(self.budget.used_s(), 10)
        self.clock.advance(50)
        self.assertEqual(self.budget.used_s(), 10)
        self.clock.advance(4)
        self.assertEqual(self.budget.used_s(), 6)
        self.use(2)
        self.assertEqual(self.budget.used_s(), 6)
        self.clock.advance(100)
        self.assertEqual(self.budget.used_s(), 0)

    def test_what_runs(self) -> None:
        """What runs counts as what it was expected to take, and as more once it has taken more."""
        use = self.budget.begin(10.0)
        self.assertEqual(self.budget.used_s(), 10)
        self.clock.advance(8)
        self.assertEqual(self.budget.used_s(), 10)
        self.clock.advance(8)
        self.assertEqual(self.budget.used_s(), 16)
        self.clock.advance(100)
        self.assertEqual(self.budget.used_s(), 60)
        self.budget.end(use)
        self.clock.advance(59)
        self.assertEqual(self.budget.used_s(), 1)

    def test_what_fits(self) -> None:
        """What was used and what is expected must not pass the share of a minute."""
        self.assertTrue(self.budget.fits(30.0))
        self.use(10)
        self.assertEqual([self.budget.fits(20.0), self.budget.fits(20.1)], [True, False])
        self.assertAlmostEqual(self.budget.fits_in_s(25.0), 55.0)
        self.clock.advance(55)
        self.assertTrue(self.budget.fits(25.0))

    def test_more_than_there_is(self) -> None:
        """What takes more than the whole budget fits when nothing was used for a minute."""
        self.assertTrue(self.budget.fits(1000.0))
        self.use(5)
        self.assertFalse(self.budget.fits(1000.0))
        self.assertAlmostEqual(self.budget.fits_in_s(1000.0), WINDOW_S)
        self.clock.advance(WINDOW_S)
        self.assertTrue(self.budget.fits(1000.0))

    def test_no_limit(self) -> None:
        """Without a share everything fits."""
        self.budget.set_share(0.0)
        self.use(1000)
        self.assertTrue(self.budget.fits(1e9))

    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30), st.floats(0, 20)), max_size=12),
        st.floats(0.01, 2),
        st.floats(0, 100),
    )
    def test_when_it_fits(self, uses: list[tuple[float, float, float]], share: float, expected_s: float) -> None:
        """Whatever was used, overlapping or not: just before the reported moment it does not fit, then it does."""
        self.setUp()
        self.budget.set_share(share)
        for pause_s, took_s, overlap_s in uses:
            self.clock.advance(pause_s)
            first, second = self.budget.begin(0.0), self.budget.begin(0.0)
            self.clock.advance(took_s)
            self.budget.end(first)
            self.clock.advance(overlap_s)
            self.budget.end(second)
        if self.budget.fits(expected_s):
            return
        in_s = self.budget.fits_in_s(expected_s)
        self.assertGreater(in_s, 0)
        self.assertLessEqual(in_s, WINDOW_S + 0.001)
        self.clock.advance(max(0.0, in_s - 0.001))
        if in_s > 0.001:
            self.assertFalse(self.budget.fits(expected_s))
        self.clock.advance(0.001 + 1e-9)
        self.assertTrue(self.budget.fits(expected_s))


class Waiting(SynchronousTestCase):
    """The order of slots when the budget is used up."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.slots = Slots(2, lambda: True, Budget(0.5, self.clock))
        self.begun: list[str] = []
        self.put_off: list[str] = []

    def run_for(
        self, name: str, took_s: float, *, need: float = 1.0, expected_s: float = 0.0, urgent: bool = False
    ) -> Deferred[Any]:
        def use() -> Deferred[None]:
            self.begun.append(name)
            done: Deferred[None] = Deferred()
            self.clock.callLater(took_s, done.callback, None)
            return done

        return self.slots.run(
            lambda: need,
            lambda: False,
            use,
            urgent=lambda: urgent,
            expected_s=lambda: expected_s,
            put_off=lambda: self.put_off.append(name),
        )

    def use_up(self) -> None:
        self.run_for("first", 30)
        self.clock.advance(30)
        self.begun.clear()

    def test_it_waits_for_the_window(self) -> None:
        """What does not fit begins by itself as soon as it does, not before."""
        self.use_up()
        self.run_for("next", 5, expected_s=5)
        self.assertEqual((self.begun, self.put_off), ([], ["next"]))
        self.clock.advance(34.9)
        self.assertEqual(self.begun, [])
        self.clock.advance(0.11)
        self.assertEqual(self.begun, ["next"])
        self.clock.advance(100)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_the_greatest_need_first(self) -> None:
        """A use with less need does not overtake one whose turn has not come, however little it takes."""
        self.use_up()
        self.run_for("small", 1, need=0.5, expected_s=1)
        self.run_for("large", 20, need=0.9, expected_s=20)
        self.clock.advance(49)
        self.assertEqual(self.begun, [])
        self.clock.advance(1.1)
        self.assertEqual(self.begun, ["large"])
        self.clock.pump([1] * 100)
        self.assertEqual(self.begun, ["large", "small"])

    def test_urgent_ones(self) -> None:
        """What is urgent does not wait for the budget, but is counted."""
        self.use_up()
        self.run_for("waits", 5, need=9.0, expected_s=5)
        self.run_for("urgent", 10, urgent=True, expected_s=10)
        self.assertEqual(self.begun, ["urgent"])
        self.clock.advance(10)
        self.assertEqual(self.slots.budget.used_s(), 40)

    def test_two_at_once(self) -> None:
        """Two that fit alone and not together do not begin together."""
        self.run_for("one", 20, expected_s=20)
        self.run_for("other", 20, expected_s=20)
        self.assertEqual(self.begun, ["one"])
        self.clock.advance(20)
        self.assertEqual(self.begun, ["one"])
        self.clock.advance(50.1)
        self.assertEqual(self.begun, ["one", "other"])

    def test_who_gives_up(self) -> None:
        """A use that gives up does not hold back those behind it any more, and leaves no timer."""
        self.use_up()
        large = self.run_for("large", 30, need=2.0, expected_s=30)
        self.clock.advance(20)
        large.addErrback(lambda _: None)
        self.run_for("small", 1, expected_s=0)
        self.assertEqual(self.begun, [])
        large.cancel()
        self.clock.advance(15)
        self.assertEqual(self.begun, ["small"])
        self.clock.advance(1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop(self) -> None:
        """A stop leaves no timer."""
        self.use_up()
        self.run_for("next", 5, expected_s=5).addErrback(lambda _: None)
        self.slots.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_another_share(self) -> None:
        """A larger share counts at once."""
        self.use_up()
        self.run_for("next", 5, expected_s=5)
        self.slots.budget.set_share(0.6)
        self.slots.set_limit(2)
        self.assertEqual(self.begun, ["next"])

    @settings(deadline=None)
    @given(
        st.floats(0.05, 1.5),
        st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 40), st.floats(0, 10)), min_size=1, max_size=30),
    )
    def test_never_over_it(self, share: float, asked: list[tuple[float, float, float]]) -> None:
        """Whenever and for however long it is used, if uses take what was expected: in no minute is more than the share
        used, except by a single use that takes more than all of it; and all have their turn."""
        self.setUp()
        self.slots.budget.set_share(share)
        uses: list[list[float]] = []
        pending = []
        for pause_s, took_s, need in asked:
            self.clock.advance(pause_s)

            def use(took_s: float = took_s) -> Deferred[None]:
                uses.append([self.clock.seconds(), took_s])
                return deferLater(self.clock, took_s, lambda: None)

            pending.append(
                self.slots.run(lambda need=need: need, lambda: False, use, expected_s=lambda took_s=took_s: took_s)  # type: ignore[misc]
            )
        for _ in range(20 * len(asked)):
            for call in sorted(self.clock.getDelayedCalls(), key=lambda call: call.getTime())[:1]:
                self.clock.advance(max(0.0, call.getTime() - self.clock.seconds()))
        for each in pending:
            self.successResultOf(each)
        most_s = share * WINDOW_S
        for ends_at in (begun + took_s for begun, took_s in uses):
            starts_at = ends_at - WINDOW_S
            within = [max(0.0, min(b + t, ends_at) - max(b, starts_at)) for b, t in uses]
            too_large = [t for b, t in uses if t > most_s and b + t > starts_at and b < ends_at]
            if not too_large:
                self.assertLessEqual(sum(within), most_s + 0.001)


class Refreshes(RefreshTestCase):
    def limited(self, *names: str, max_load: float, **options: Any) -> World:
        world = World(*names, max_load=max_load, **options)
        world.service.startService()
        self.addCleanup(self.stop, world)
        return world

    def complete_after(self, world: World, seconds: float) -> None:
        world.advance(seconds)
        world.database.last.complete()

    def test_the_interval_stretches(self) -> None:
        """A dataset that takes half of its interval is refreshed half as often with a quarter of a connection."""
        world = self.limited(max_load=0.25, interval_s=20.0, max_age_s=600.0)
        for _ in range(5):
            self.complete_after(world, 10)
            until_next = len(world.database.reads) + 1
            while len(world.database.reads) < until_next:
                world.advance(1)
        starts = [at for _, at in world.starts]
        # Of each minute 15 s: 10 s of one and, as soon as the one before has left the window, of the next.
        self.assertTrue(all(later - earlier >= 40 for earlier, later in pairwise(starts)), starts)
        self.assertTrue(all(later - earlier <= 66 for earlier, later in pairwise(starts)), starts)

    def test_told(self) -> None:
        """status and why show how far behind it is, and why reports afterwards how late it began."""
        world = self.limited(max_load=0.25, interval_s=20.0, max_age_s=600.0)
        self.complete_after(world, 12)
        world.advance(20)
        self.assertIn("waits for postgres.max_load, 12 s behind its interval", views.status_table(world.cache))
        self.assertIn("A refresh has been due for 12 s and waits", views.why(world.dataset, world.cache))
        self.assertEqual(world.cache.database.queued(), 1)
        while len(world.database.reads) < 2:
            world.advance(1)
        self.assertIn("late, delayed by postgres.max_load", views.why(world.dataset, world.cache))
        self.assertNotIn("behind its interval", views.status_table(world.cache))
        self.assertEqual(world.cache.database.queued(), 0)

    def test_what_is_not_put_off(self) -> None:
        """A first load, a refresh by hand, and one that a reader waits for begin at once, also if one was put off."""
        world = self.limited("a", "products", max_load=0.1, max_connections=1, interval_s=30.0, max_age_s=600.0)
        self.complete_after(world, 10)
        self.assertEqual([name for name, _ in world.starts], ["a", "products"])
        self.complete_after(world, 10)
        self.assertTrue(world.service.refresh_now("a"))
        self.complete_after(world, 1)
        world.advance(20)
        self.assertIs(world.dataset.refresh.phase, Phase.PUT_OFF)
        reads = len(world.database.reads)
        world.service.refresh_since("products", world.clock.seconds())
        self.assertEqual((len(world.database.reads), world.database.last.name), (reads + 1, "products"))
        self.assertIs(world.dataset.refresh.phase, Phase.READING)

    def test_fairly(self) -> None:
        """The stalest relative to its own limit goes first, so that ages stretch in proportion to the limits."""
        world = World("quick", "slow", max_connections=1, max_load=0.1)
        declared = [
            DatasetSettings(name="quick", query="q", key="id", interval_s=10.0, max_age_s=30.0, jitter=0.0),
            DatasetSettings(name="slow", query="q", key="id", interval_s=10.0, max_age_s=90.0, jitter=0.0),
        ]
        world.service.startService()
        world.service.redeclare(declared)
        self.addCleanup(self.stop, world)
        oldest = {"quick": 0.0, "slow": 0.0}
        for _ in range(3600):
            for read in world.database.running:
                if world.clock.seconds() - read.began_at >= 2:
                    read.complete()
            world.advance(0.5)
            for name, dataset in world.cache.datasets.items():
                if world.now_s > 200:
                    oldest[name] = max(oldest[name], dataset.need())
        ratio = oldest["quick"] / oldest["slow"]
        self.assertTrue(1 / 3 < ratio < 3, oldest)  # a slot every 20 s is a coarse measure
        counts = {name: world.cache.dataset(name).counts.outcomes["published"] for name in oldest}
        self.assertGreater(counts["quick"], counts["slow"])
        self.assertLessEqual(sum(counts.values()) * 2, 0.1 * 1800 + 6)
