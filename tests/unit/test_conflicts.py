"""Laws of what only another try helps against, as the refreshes see it."""

from __future__ import annotations

from cacheservice.base.errors import Deadlock, SerializationFailed, StandbyConflict
from tests.kit import views
from tests.kit.refreshes import RefreshTestCase


class Retries(RefreshTestCase):
    def test_each_is_retried_and_told(self) -> None:
        """Each is retried with the ordinary backoff, leaves the database up, and has words and advice of its own."""
        told = set()
        for kind in (StandbyConflict, SerializationFailed, Deadlock):
            world = self.started(interval_s=60.0)
            world.database.last.fail(kind(f"words of {kind.__name__}", "40001"))
            why = views.why(world.dataset, world.cache)
            self.assertIn(f"words of {kind.__name__}", why)
            self.assertIn(kind.advice, why)
            told.add(kind.advice)
            self.assertEqual(world.cache.database.state, "up")
            world.advance(1)
            self.assertEqual([at for _, at in world.starts], [0, 1])
            world.database.last.complete()
            self.assertEqual(world.triggers, ["start", "retry"])
        self.assertEqual(len(told), 3)
