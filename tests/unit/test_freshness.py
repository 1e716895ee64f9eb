"""Laws of waiting for a generation, without a socket."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import UnknownDataset
from cacheservice.cache.cache import Cache
from cacheservice.ports.freshness import Freshness, Wanted
from tests.kit.clocks import started_clock
from tests.kit.datasets import declared, rows_of, snapshot_of
from tests.kit.fake_refreshes import FakeRefreshes

TIMEOUT_S = 10.0


class Generations(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = started_clock()
        self.cache = Cache([declared("products", timeout_s=TIMEOUT_S), declared("prices")], self.clock.seconds)
        self.dataset = self.cache.dataset("products")
        self.refreshes = FakeRefreshes()
        self.freshness = Freshness(self.refreshes, self.cache.database, self.clock)
        self.publish(7)
        self.subscriptions = self.cache.events.subscription_count
        self.addCleanup(self.check_clean)

    def check_clean(self) -> None:
        """No wait leaves a timer or a subscription."""
        self.assertEqual((self.clock.getDelayedCalls(), self.cache.events.subscription_count), ([], self.subscriptions))

    def publish(self, generation: int, age_s: float = 0.0) -> None:
        self.dataset.publish(snapshot_of(rows_of({}), generation, self.clock.seconds() - age_s))

    def start(self, waiting: Coroutine[Deferred[Any], Any, bool]) -> Deferred[bool]:
        return Deferred.fromCoroutine(waiting)

    def test_reached(self) -> None:
        """What is served is enough at once, also without any time; what is not comes with the publish that reaches
        it, whichever number that has."""
        for generation in (0, 1, 7):
            self.assertTrue(self.successResultOf(self.start(self.freshness.reaches(self.dataset, generation, 0.0))))
        self.assertFalse(self.successResultOf(self.start(self.freshness.reaches(self.dataset, 8, 0.0))))
        waiting = self.start(self.freshness.reaches(self.dataset, 9, 60.0))
        self.publish(8)
        self.clock.advance(59.0)
        self.assertNoResult(waiting)
        self.publish(12)
        self.assertTrue(self.successResultOf(waiting))
        self.assertEqual(self.refreshes.asked, [])

    def test_not_reached(self) -> None:
        """The limit is of the whole wait, however many generations come meanwhile."""
        waiting = self.start(self.freshness.reaches(self.dataset, 100, TIMEOUT_S))
        for generation in range(8, 17):
            self.clock.advance(1.0)
            self.publish(generation)
        self.assertNoResult(waiting)
        self.clock.advance(1.0)
        self.assertFalse(self.successResultOf(waiting))

    def test_no_snapshot(self) -> None:
        """A dataset that is not loaded, or whose snapshot was withdrawn, is waited for; its numbers go on."""
        self.dataset.withdraw()
        waiting = self.start(self.freshness.reaches(self.dataset, 7, 60.0))
        self.assertNoResult(waiting)
        self.publish(8)
        self.assertTrue(self.successResultOf(waiting))

    def test_removed(self) -> None:
        """A removed dataset ends the wait."""
        waiting = self.start(self.freshness.reaches(self.dataset, 8, 60.0))
        self.cache.declare([declared("prices")])
        self.failureResultOf(waiting, UnknownDataset)
        self.failureResultOf(self.start(self.freshness.reaches(self.dataset, 8, 60.0)), UnknownDataset)

    def test_a_client_that_leaves(self) -> None:
        """A cancelled wait is over at once."""
        waiting = self.start(self.freshness.reaches(self.dataset, 8, 60.0))
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)

    def test_with_an_age(self) -> None:
        """Both hold for one snapshot, within one limit. Only the age asks for a refresh."""
        moment = self.clock.seconds()
        waiting = self.start(self.freshness.meets(self.dataset, Wanted(5.0, 9)))
        self.assertEqual(self.refreshes.asked, [])  # generation 7 is young enough
        self.clock.advance(4.0)
        self.publish(9, age_s=60.0)  # after a rollback
        self.assertNoResult(waiting)
        self.assertEqual(self.refreshes.asked, [("products", moment - 5.0)])
        self.clock.advance(4.0)
        self.publish(10)
        self.assertTrue(self.successResultOf(waiting))
        for wanted in (Wanted(5.0, 11), Wanted(min_generation=11)):
            waiting = self.start(self.freshness.meets(self.dataset, wanted))
            self.clock.advance(TIMEOUT_S - 0.1)
            self.assertNoResult(waiting)
            self.clock.advance(0.1)
            self.assertFalse(self.successResultOf(waiting))
