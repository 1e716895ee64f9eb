"""Laws of what may be served: without a snapshot, expired, and newer than a reader's limit."""

from __future__ import annotations

from typing import Literal

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.dataset import Dataset
from cacheservice.cache.reading import NotLoaded, NotReached, TooOld, not_fresh, not_reached, served
from tests.kit.clocks import started_clock
from tests.kit.datasets import declared, rows_of, snapshot_of


class Reading(SynchronousTestCase):
    def dataset(self, age_s: float | None, on_expired: Literal["serve", "refuse"] = "refuse") -> Dataset:
        """A dataset that expires after 100 s; None for one that was never loaded."""
        clock = started_clock()
        dataset = Dataset(declared(max_age_s=100, on_expired=on_expired), clock.seconds)
        if age_s is not None:
            dataset.publish(snapshot_of(rows_of({}), 1, clock.seconds() - age_s))
        return dataset

    def test_served(self) -> None:
        """A snapshot is served up to its limit, and at any age with `on_expired = "serve"`."""
        for dataset in (self.dataset(0), self.dataset(100), self.dataset(1e9, "serve")):
            self.assertIs(served(dataset, dataset.counts.http), dataset.snapshot)
            self.assertEqual((dataset.counts.http.loading, dataset.counts.http.stale), (0, 0))

    def test_refused(self) -> None:
        """Without a snapshot, and expired, a read is refused and counted; other requests are not counted."""
        missing, expired = self.dataset(None), self.dataset(100.5)
        error = self.assertRaises(NotLoaded, served, missing, missing.counts.resp)
        self.assertEqual(str(error), "products has not been loaded yet")
        error = self.assertRaises(TooOld, served, expired, expired.counts.resp)
        self.assertEqual((str(error), error.age_s, error.limit_s), ("products is 100 s old, limit 100 s", 100.5, 100.0))
        for dataset in (missing, expired):
            self.assertRaises((NotLoaded, TooOld), served, dataset)
        self.assertEqual((missing.counts.resp.loading, missing.counts.resp.stale), (1, 0))
        self.assertEqual((expired.counts.resp.loading, expired.counts.resp.stale), (0, 1))

    def test_not_fresh(self) -> None:
        """A reader whose limit was not met in time gets the age and its limit, or that there is nothing at all."""
        missing, old = self.dataset(None), self.dataset(7.25)
        self.assertIsInstance(not_fresh(missing, 5.0, missing.counts.http), NotLoaded)
        error = not_fresh(old, 5.0, old.counts.http)
        assert isinstance(error, TooOld)
        self.assertEqual((str(error), error.age_s), ("products is 7.2 s old; max_age=5 was requested", 7.25))
        self.assertEqual((missing.counts.http.loading, old.counts.http.stale), (1, 1))

    def test_not_reached(self) -> None:
        """A reader whose generation did not come in time gets the one that is served, or that there is nothing."""
        missing, served_one = self.dataset(None), self.dataset(7.25)
        self.assertIsInstance(not_reached(missing, 2, missing.counts.http), NotLoaded)
        error = not_reached(served_one, 2, served_one.counts.http)
        assert isinstance(error, NotReached)
        self.assertEqual(str(error), "products is at generation 1; min_generation=2 was requested")
        self.assertEqual((error.generation, error.wanted), (1, 2))
        self.assertEqual((missing.counts.http.loading, served_one.counts.http.stale), (1, 1))
