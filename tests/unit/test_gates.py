"""Laws of the gates: which results are held, and until when."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.refresh.gates import refusal
from tests.kit.datasets import numbered_rows, snapshot_of
from tests.kit.refreshes import RefreshTestCase
from tests.kit.views import show, status_table, why


def settings_with(**keys: Any) -> DatasetSettings:
    return DatasetSettings(name="products", query="SELECT 1 AS id", key="id", **keys)


def snapshot(count: int, columns: tuple[str, ...] = ("id",)) -> Snapshot:
    return snapshot_of(numbered_rows(count), columns=columns)


class Refusals(SynchronousTestCase):
    def test_by_default(self) -> None:
        """A first load passes; half of the rows may go, not more; rows may be added without end."""
        usual = settings_with()
        self.assertIsNone(refusal(None, 0, ("id",), usual))
        served = snapshot(1000)
        self.assertIsNone(refusal(served, 500, ("id",), usual))
        self.assertEqual(refusal(served, 499, ("id",), usual), "would drop 1,000 to 499 rows, limit 50 %")
        self.assertEqual(refusal(served, 0, ("id",), usual), "would drop 1,000 to 0 rows, limit 50 %")
        self.assertIsNone(refusal(served, 10**9, ("id",), usual))
        self.assertIsNone(refusal(snapshot(0), 0, ("id",), usual))

    @given(st.integers(0, 300), st.integers(0, 300), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.999, 1.0]))
    def test_shrinking(self, before: int, after: int, max_shrink: float) -> None:
        """It is refused exactly if more than that share of the rows would go: with 0 any loss, with 1 none."""
        refused = refusal(snapshot(before), after, ("id",), settings_with(max_shrink=max_shrink)) is not None
        self.assertEqual(refused, before > 0 and (before - after) / before > max_shrink)

    def test_few_rows(self) -> None:
        """Fewer rows than min_rows are refused, of a first load too."""
        for served in (None, snapshot(10)):
            self.assertEqual(refusal(served, 9, ("id",), settings_with(min_rows=10)), "has 9 rows, min_rows is 10")
            self.assertIsNone(refusal(served, 10, ("id",), settings_with(min_rows=10)))

    def test_columns(self) -> None:
        """A column that is gone is refused unless it may go; a new one, and another order, never are."""
        served = snapshot(1, ("id", "name", "price"))
        self.assertEqual(refusal(served, 1, ("id", "name"), settings_with()), "has no column price any more")
        self.assertEqual(refusal(served, 1, ("id",), settings_with()), "has the columns name, price no more")
        self.assertIsNone(refusal(served, 1, ("id",), settings_with(on_column_removed="publish")))
        self.assertIsNone(refusal(served, 1, ("price", "new", "name", "id"), settings_with()))


class Holding(RefreshTestCase):
    def test_held_until_one_passes(self) -> None:
        """A refused result changes nothing that readers see; the next interval tries again; a good one clears it."""
        world = self.started()
        world.database.last.complete(rows=100)
        served = world.dataset.snapshot
        for held_for in (1, 2):
            world.advance(60)
            world.database.last.complete(rows=12)
            self.assertIs(world.dataset.snapshot, served)
            held = world.dataset.held
            assert held is not None
            self.assertEqual((held.reason, held.rows), ("would drop 100 to 12 rows, limit 50 %", 12))
            self.assertEqual([attempt.outcome for attempt in world.dataset.attempts][-held_for:], ["held"] * held_for)
            self.assertEqual(world.dataset.consecutive_failures, 0)
            self.assertEqual(world.log.lines[-1][:2], ("warning", "refresh_held"))
        first_since = held.since
        world.advance(60)
        world.database.last.complete(rows=11)
        self.assertEqual(world.dataset.held.since if world.dataset.held else None, first_since)
        world.advance(60)
        world.database.last.complete(rows=90)
        self.assertIsNone(world.dataset.held)
        assert world.dataset.snapshot is not None
        self.assertEqual((world.dataset.snapshot.generation, world.dataset.snapshot.rows.count), (2, 90))
        self.assertEqual(world.dataset.snapshot.change, (0, 0, 10))

    def test_accepted_once(self) -> None:
        """What an operator accepts is let through, and the one after it is not."""
        world = self.started()
        world.database.last.complete(rows=100)
        world.service.accept_next("products")
        world.advance(60)
        world.database.last.complete(rows=12)
        assert world.dataset.snapshot is not None
        self.assertEqual((world.dataset.snapshot.rows.count, world.dataset.held), (12, None))
        self.assertEqual(world.log.lines[-1][2]["accepted"], "would drop 100 to 12 rows, limit 50 %")
        world.advance(60)
        world.database.last.complete(rows=1)
        self.assertEqual(world.dataset.snapshot.rows.count, 12)

    def test_accepted_in_vain(self) -> None:
        """An acceptance is used up by the next result even if no gate had anything against it, but not by a failure."""
        world = self.started()
        world.database.last.complete(rows=100)
        world.service.accept_next("products")
        world.service.refresh_now("products")
        world.database.last.fail()
        self.assertTrue(world.dataset.accepts_next)
        world.service.refresh_now("products")
        world.database.last.complete(rows=99)
        self.assertFalse(world.dataset.accepts_next)
        world.advance(60)
        world.database.last.complete(rows=1)
        self.assertIsNotNone(world.dataset.held)

    def test_what_operators_read(self) -> None:
        """status, show and why report that it is held, since when, why, and what to do."""
        world = self.started()
        world.database.last.complete(rows=100)
        world.advance(60)
        world.database.last.complete(rows=12)
        self.assertIn("fresh, held", status_table(world.cache))
        self.assertIn("held: the result would drop 100 to 12 rows, limit 50 %", status_table(world.cache))
        self.assertIn('held: {"reason": "would drop 100 to 12 rows, limit 50 %"', show(world.dataset, world.cache))
        words = why(world.dataset, world.cache)
        self.assertIn("The newest result has been held for 0.0", words)
        self.assertIn(" s: it would drop 100 to 12 rows, limit 50 %.", words)
        self.assertIn("send 'accept products' to the admin socket", words)
        world.service.accept_next("products")
        self.assertIn("because an operator accepted it", why(world.dataset, world.cache))
