"""Laws of what a manual refresh may leave unread."""

from __future__ import annotations

from tests.kit.refreshes import RefreshTestCase


class Manual(RefreshTestCase):
    def test_a_refresh_that_fails(self) -> None:
        """What an operator asked for is read whole by the retry, by whatever begins first, and once."""
        world = self.started(probe="SELECT 1")
        world.database.last.complete()
        world.advance(5)
        world.service.refresh_now("products")
        self.assertIsNone(world.database.last.since)
        for _ in range(3):
            world.database.last.fail()
            world.advance(60)
            self.assertIsNone(world.database.last.since, "a retry, or the next interval")
        world.database.last.complete()
        world.advance(60)
        self.assertIsNotNone(world.database.last.since)
