"""Laws of when snapshots are saved, which saved ones are kept, and of a warm start; no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from weakref import ref

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import Stopped
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Event, Noted
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.refresh.restore import restore
from cacheservice.sources.disk.failures import SaveFailures
from cacheservice.sources.disk.generations import Generations, of_one_moment
from cacheservice.sources.disk.lock import DirectoryLock
from cacheservice.sources.disk.schedule import LEAST_RETRY_S, Schedule
from cacheservice.sources.disk.work import Work
from cacheservice.sources.disk.writer import Writer
from cacheservice.sources.frames.header import Header
from tests.kit.datasets import declared, numbered_rows, snapshot_of
from tests.kit.logs import Log
from tests.kit.saved_files import AS_OF, header_of

PRODUCTS, PRICES = ("products",), ("prices",)


class Schedules(SynchronousTestCase):
    def test_the_first_that_is_due(self) -> None:
        """A group that was never saved is due at once, and goes before one that has to wait."""
        schedule = Schedule(60.0)
        self.assertIsNone(schedule.first())
        schedule.began(PRICES, 100.0, renews=False)
        schedule.want(PRICES, renews=False)
        self.assertEqual(schedule.first(), (160.0, PRICES))
        schedule.want(PRODUCTS, renews=False)
        first = schedule.first()
        assert first is not None
        self.assertEqual(first[1], PRODUCTS)
        schedule.begin(PRODUCTS)
        self.assertEqual(schedule.first(), (160.0, PRICES))

    def test_a_save_does_not_wait_for_renewals(self) -> None:
        """A renewal delays the next renewal, not the next save of rows; a save delays both."""
        schedule = Schedule(60.0)
        schedule.began(PRODUCTS, 100.0, renews=True)
        schedule.want(PRODUCTS, renews=True)
        self.assertEqual(schedule.first(), (160.0, PRODUCTS))
        schedule.want(PRODUCTS, renews=False)
        first = schedule.first()
        assert first is not None
        self.assertLess(first[0], 100.0)
        schedule.begin(PRODUCTS)
        self.assertIsNone(schedule.first())
        schedule.began(PRODUCTS, 200.0, renews=False)
        schedule.want(PRODUCTS, renews=False)
        self.assertEqual(schedule.first(), (260.0, PRODUCTS))

    def test_a_failure(self) -> None:
        """After a failure both wait for the interval, and for a second at least."""
        for interval_s, retry_in_s in ((0.0, LEAST_RETRY_S), (60.0, 60.0)):
            schedule = Schedule(interval_s)
            self.assertEqual(schedule.failed(PRODUCTS, 100.0), retry_in_s)
            for renews in (True, False):
                schedule.want(PRODUCTS, renews=renews)
                self.assertEqual(schedule.first(), (100.0 + retry_in_s, PRODUCTS))
                schedule.clear()
            self.assertIsNone(schedule.first())


class Failures(SynchronousTestCase):
    """What a failed save and its end notify and log."""

    def setUp(self) -> None:
        clock = Clock()
        self.log = Log()
        self.cache = Cache([declared("products"), declared("prices")], clock.seconds)
        self.noted: list[str] = []
        self.cache.events.subscribe(self.note, Noted)
        directory = Path("/nowhere")
        writer = Writer(Generations(directory, 1), DirectoryLock(directory), Work(clock))
        self.failures = SaveFailures(self.cache, Schedule(60.0), writer, clock, self.log)

    def note(self, event: Event) -> None:
        self.noted.append(event.dataset)

    def test_a_save_without_a_problem_before_it(self) -> None:
        """No observer is notified and nothing is logged, because nothing has changed."""
        self.failures.succeeded("products")
        self.assertEqual((self.noted, self.log.lines), ([], []))

    def test_the_end_of_a_problem(self) -> None:
        """The end of a problem is notified and logged once, for the dataset that had it."""
        self.failures.failed(PRODUCTS, OSError(28, "No space left on device"))
        self.assertEqual(self.log.names(), ["snapshot_save_failed"])
        for _ in range(2):
            self.failures.succeeded("products")
            self.failures.succeeded("prices")
        self.assertEqual(self.noted, ["products", "products"])
        self.assertEqual(self.log.names(), ["snapshot_save_failed", "snapshot_save_recovered"])
        self.assertIsNone(self.cache.dataset("products").save_problem)

    def test_a_dataset_that_was_removed_meanwhile(self) -> None:
        """It has no problem any more: nothing is notified."""
        self.cache.declare([declared("prices")])
        self.noted.clear()
        self.failures.failed(PRODUCTS, OSError(28, "No space left on device"))
        self.failures.succeeded("products")
        self.assertEqual((self.noted, self.log.lines), ([], []))


class Moments(SynchronousTestCase):
    def served(self, since_s: float, until_s: float, **more: object) -> Header:
        """The header of rows that were served from one moment to another."""
        since, until = (AS_OF + timedelta(seconds=seconds) for seconds in (since_s, until_s))
        return header_of(numbered_rows(1), as_of=until, content_since=since, **more)

    def test_of_one_moment(self) -> None:
        """The generations of a group combine wherever all of them were served at a moment, newest first."""
        products = {2: self.served(10, 20), 1: self.served(0, 5)}
        prices = {3: self.served(15, 15), 2: self.served(10, 10), 1: self.served(0, 0)}
        self.assertEqual(of_one_moment([products, prices]), [(2, 3), (2, 2), (1, 1)])
        self.assertEqual(of_one_moment([products, {7: self.served(6, 9)}]), [])
        self.assertEqual(of_one_moment([products, {1: None}]), [])


class Kept(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path("/saved")
        self.generations = Generations(self.directory, keep=2)

    def saved(self, generation: int, rows: Rows) -> Snapshot:
        """Note a generation as saved, with all that were saved before it."""
        snapshot = snapshot_of(rows, generation)
        kept = self.generations.to_keep(PRODUCTS, [snapshot])["products"]
        self.generations.note_saved(header_of(rows, generation=generation), ref(rows), kept)
        return snapshot

    def test_the_newest(self) -> None:
        """The new generation and those before it are kept, as many as configured; the other files go."""
        each = [numbered_rows(count) for count in range(1, 5)]
        for generation, rows in enumerate(each, 1):
            self.saved(generation, rows)
        self.assertEqual(self.generations.of("products"), [4, 3])
        removed = self.generations.to_remove({"products": {4}})
        self.assertEqual(
            [path.name for path in removed], ["products.000000000003.snapshot", "products.000000000003.renewal"]
        )

    def test_the_same_rows(self) -> None:
        """Of two generations with the same rows the older is not kept, so that one with others is."""
        first, second = numbered_rows(1), numbered_rows(2)
        self.saved(1, first)
        self.saved(2, second)
        self.saved(3, second)
        self.assertEqual(self.generations.of("products"), [3, 1])

    def test_a_higher_number(self) -> None:
        """A file of a higher number, which could not be read, would be restored as the newest; it is not kept."""
        self.generations.note_found({"products": {9: None, 1: header_of(numbered_rows(1), generation=1)}})
        self.assertEqual(self.generations.unreadable("products"), [9])
        kept = self.generations.to_keep(PRODUCTS, [snapshot_of(numbered_rows(1), 2)])
        self.assertEqual(kept, {"products": {2, 1}})

    def test_what_is_found(self) -> None:
        """What was found later adds datasets, and does not replace what is known."""
        rows = numbered_rows(1)
        self.saved(5, rows)
        self.generations.note_found({"products": {}, "prices": {1: header_of(rows, dataset="prices", generation=1)}})
        self.assertEqual((self.generations.of("products"), self.generations.of("prices")), ([5], [1]))
        self.generations.forget("products", 5)
        self.assertEqual(
            str(self.generations.unknown("prices", 3)), "generation 3 of prices is not on disk; there are: 1"
        )
        self.assertIn("there are: none", str(self.generations.unknown("products", 5)))

    def test_held(self) -> None:
        """Rows are on disk if a file of their generation has them, as of an earlier moment or a later one."""
        rows = numbered_rows(1)
        self.saved(5, rows)
        header = header_of(rows, generation=5, content_since=AS_OF, as_of=AS_OF + timedelta(seconds=9))
        self.assertTrue(self.generations.holds(header))
        self.assertFalse(self.generations.holds(replace(header, generation=6)))
        self.assertFalse(self.generations.holds(replace(header, fingerprint="another")))


class Works(SynchronousTestCase):
    def test_a_stop(self) -> None:
        """A stop fires once no work runs; work that runs ends, and more is refused until it is opened again."""
        work = Work(Clock())
        stopped = work.stop()
        self.successResultOf(stopped)
        with self.assertRaises(Stopped), work.counted():
            raise AssertionError("no work may begin")
        work.open()
        with self.assertRaises(Stopped), work.counted():
            stopped = work.stop()
            self.assertNoResult(stopped)
            work.go_on()
        self.successResultOf(stopped)
        self.assertEqual(work.running, 0)


class Saved:
    """Saved snapshots of these generations, in place of the store."""

    def __init__(self, **generations: int) -> None:
        self.generations = generations
        self.readable = True
        self.meanwhile: Callable[[], object] = lambda: None

    async def find(self) -> bool:
        return self.readable

    async def newest(self, members: Sequence[DatasetSettings], wanted: Callable[[], bool]) -> list[Snapshot]:
        if not wanted():
            return []
        self.meanwhile()
        found = [generation for each in members if (generation := self.generations.get(each.name))]
        return (
            [snapshot_of(numbered_rows(3), each, source="disk") for each in found] if len(found) == len(members) else []
        )

    def saved(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        return [(self.generations[name],) for name in names if name in self.generations]

    async def load(self, name: str, generation: int) -> Snapshot:
        raise AssertionError("a warm start loads the newest")


class WarmStarts(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.log = Log()

    def restored(self, history: Saved, *datasets: DatasetSettings) -> dict[str, int | None]:
        """The generation of each dataset that is served after a warm start."""
        self.cache = Cache(datasets, self.clock.seconds)
        self.successResultOf(restore(history, self.cache, self.clock, self.log))
        return {name: each.snapshot and each.snapshot.generation for name, each in self.cache.datasets.items()}

    def test_each_dataset(self) -> None:
        """What is saved is published and logged; what is not is left to the first refresh."""
        restored = self.restored(Saved(products=7), declared("products"), declared("prices"))
        self.assertEqual(restored, {"products": 7, "prices": None})
        (event,) = self.log.named("snapshot_restored")
        self.assertEqual((event["dataset"], event["generation"], event["rows"]), ("products", 7, 3))
        self.assertEqual(self.log.names(), ["snapshot_restored"])

    def test_what_was_read_meanwhile(self) -> None:
        """A snapshot that was published while the file was read stays; one that is served is not loaded."""
        history = Saved(products=7, prices=7)
        history.meanwhile = lambda: self.cache.dataset("products").publish(snapshot_of(numbered_rows(1), 1))
        self.assertEqual(self.restored(history, declared("products")), {"products": 1})
        self.assertEqual(self.log.names(), [])

    def test_a_reload_meanwhile(self) -> None:
        """What was loaded by settings that have changed since is not published."""
        history = Saved(products=7)
        history.meanwhile = lambda: self.cache.declare([declared("products", key="sku")])
        self.assertEqual(self.restored(history, declared("products")), {"products": None})
        history.meanwhile = lambda: self.cache.declare([declared("prices")])
        self.assertEqual(self.restored(history, declared("products")), {"prices": None})

    def test_a_group(self) -> None:
        """A group is published together or not at all, and a group that is saved only in part is logged."""
        members = [declared(name, group="g") for name in ("products", "prices")]
        self.assertEqual(self.restored(Saved(products=7, prices=8), *members), {"products": 7, "prices": 8})
        self.log.lines.clear()
        self.assertEqual(self.restored(Saved(products=7), *members), {"products": None, "prices": None})
        self.assertEqual(
            self.log.events,
            [("group_not_restored", {"error": "no saved snapshots of products, prices are of one moment"})],
        )
        self.log.lines.clear()
        self.restored(Saved(), *members)
        self.assertEqual(self.log.events, [])

    def test_nothing_can_be_restored(self) -> None:
        """A history that cannot be read, or a stop, ends a warm start quietly; the history has logged the reason."""
        history = Saved(products=7)
        history.readable = False
        self.assertEqual(self.restored(history, declared("products")), {"products": None})

        def stop() -> None:
            raise Stopped("the service is stopping")

        history.readable, history.meanwhile = True, stop
        self.assertEqual(self.restored(history, declared("products")), {"products": None})
        self.assertEqual(self.log.events, [])
