"""Laws of pinned datasets."""

from __future__ import annotations

from cacheservice.base.errors import NothingToPin, UnknownDataset
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Ended, Published
from cacheservice.ports.operator_commands import Commands
from tests.kit.refreshes import RefreshTestCase, World
from tests.kit.views import show, status_table, why


class Pinning(RefreshTestCase):
    def loaded(self, rows: int = 100) -> World:
        world = self.started()
        world.database.last.complete(rows)
        return world

    def refreshed(self, world: World, rows: int) -> Dataset:
        world.advance(60)
        world.database.last.complete(rows)
        return world.dataset

    def test_what_is_served_stays(self) -> None:
        """A pinned dataset refreshes on, publishes nothing, notifies nobody, and its age goes on."""
        world = self.loaded()
        served, told = world.dataset.snapshot, []
        world.dataset.subscribe(lambda event: told.append(event.dataset), Published, Ended)
        self.assertEqual(world.service.pin("products"), ["products"])
        for rows in (99, 98):
            dataset = self.refreshed(world, rows)
            self.assertIs(dataset.snapshot, served)
            self.assertEqual((dataset.attempts[-1].outcome, dataset.held, told), ("held", None, []))
        self.assertGreaterEqual(dataset.age_s() or 0, 120)
        candidate = dataset.candidate
        assert candidate is not None
        self.assertEqual(candidate.rows.count, 98)

    def test_unpinned(self) -> None:
        """unpin publishes the newest result at once, under the next generation, and later ones as they come."""
        world = self.loaded()
        world.service.pin("products")
        self.refreshed(world, 99)
        self.refreshed(world, 98)
        told: list[int] = []
        world.dataset.subscribe(lambda event: told.append(world.dataset.last_generation), Published, Ended)
        self.assertEqual(world.service.unpin("products"), ["products"])
        snapshot = world.dataset.snapshot
        assert snapshot is not None
        self.assertEqual((snapshot.generation, snapshot.rows.count, snapshot.change), (2, 98, (0, 0, 2)))
        self.assertEqual((world.dataset.candidate, world.dataset.pinned), (None, False))
        self.refreshed(world, 97)
        self.assertEqual(told, [2, 3])

    def test_the_change_of_a_candidate(self) -> None:
        """What unpin publishes differs from what is served, even if it equals the candidate before it."""
        world = self.loaded(rows=2)
        world.service.pin("products")
        for _ in range(2):
            world.advance(60)
            world.database.last.into.add([(b"0", b"{}"), (b"1", b"[]")])
            world.database.last.complete(rows=0)
        world.service.unpin("products")
        self.assertEqual(world.dataset.snapshot.change, (0, 1, 0))

    def test_twice_and_in_vain(self) -> None:
        """To pin twice is to pin once; to unpin what is not pinned, or has read nothing since, publishes nothing."""
        world = self.loaded()
        served = world.dataset.snapshot
        world.service.unpin("products")
        world.service.pin("products")
        world.service.pin("products")
        world.service.unpin("products")
        self.assertIs(world.dataset.snapshot, served)

    def test_rolled_back_while_pinned(self) -> None:
        """What was served stays the way back, whether it was pinned before the rollback or not."""
        for pinned in (False, True):
            dataset = self.loaded().dataset
            served = dataset.snapshot
            assert served is not None
            dataset.pin() if pinned else dataset.unpin()
            dataset.roll_back(served)
            dataset.unpin()
            assert dataset.snapshot is not None
            self.assertIs(dataset.snapshot.rows, served.rows)
            self.assertEqual((dataset.snapshot.generation, dataset.snapshot.rolled_back_to), (3, None))

    def test_bad_results_stay_bad(self) -> None:
        """The gates hold a pinned dataset's results as well: what they refuse is not a candidate."""
        world = self.loaded()
        world.service.pin("products")
        dataset = self.refreshed(world, 1)
        self.assertIsNone(dataset.candidate)
        self.assertIsNotNone(dataset.held)
        dataset = self.refreshed(world, 99)
        self.assertIsNotNone(dataset.candidate)
        self.assertIsNone(dataset.held)

    def test_it_expires(self) -> None:
        """A pin does not hide how old the snapshot is: it expires, is reported, and recovers with the candidate."""
        world = self.loaded()
        world.service.pin("products")
        for _ in range(4):
            self.refreshed(world, 99)
        self.assertEqual(world.dataset.state(), "expired")
        self.assertEqual(world.log.names("dataset_expired", "dataset_recovered"), ["dataset_expired"])
        world.service.unpin("products")
        self.assertEqual(world.dataset.state(), "fresh")
        self.assertEqual(world.log.names("dataset_expired", "dataset_recovered")[-1], "dataset_recovered")

    def test_nothing_to_pin(self) -> None:
        """What has never been loaded, or is not there, cannot be pinned."""
        world = self.started()
        with self.assertRaises(NothingToPin):
            world.service.pin("products")
        with self.assertRaises(UnknownDataset):
            world.service.pin("nope")
        self.assertFalse(world.dataset.pinned)

    def test_what_operators_read(self) -> None:
        """The commands report what is served; status, show and why that it is pinned and what waits."""
        world = self.loaded()
        commands = Commands(world.cache, world.service)
        self.assertEqual(commands.answer("pin products"), "OK products: pinned, generation 1 is served")
        self.refreshed(world, 99)
        self.assertIn("fresh, pinned", status_table(world.cache))
        self.assertIn("pinned: true", show(world.dataset, world.cache))
        self.assertIn(
            "nothing newer is served; a result with 99 rows waits for 'unpin products'.",
            why(world.dataset, world.cache),
        )
        self.assertEqual(commands.answer("unpin products"), "OK products: not pinned, generation 2 is served")
        self.assertEqual(commands.answer("pin nope"), "ERROR unknown dataset 'nope'; status lists them")
        self.assertEqual(Commands(world.cache).answer("pin products"), "ERROR pin is an admin command")
