"""Laws of saved snapshots, on real files and the real reactor."""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SkipTest, TestCase

from cacheservice.base import clock
from cacheservice.base.errors import (
    CacheServiceError,
    OfAnotherDatabase,
    SnapshotRejected,
    Stopped,
    UnknownDataset,
    UnknownGeneration,
)
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.lag import NO_LAG
from cacheservice.cache.rows import Groups
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings, PersistenceSettings
from cacheservice.refresh.restore import restore
from cacheservice.sources.disk.format import MAGIC
from cacheservice.sources.disk.store import SnapshotStore
from cacheservice.sources.frames.clocks import Clocks
from tests.kit.datasets import Table, rows_of
from tests.kit.logs import Log
from tests.kit.persistence_child import killed_after, killed_while_renewing
from tests.kit.postgres import PRIMARY
from tests.kit.saved_files import AS_OF, file_of, noise, rows_of_generation, saved_dataset, table_of
from tests.kit.waiting import GIVE_UP_S, until

KILLS = int(os.environ.get("CACHESERVICE_TEST_KILLS", "30"))
KILL_ROWS = 20_000
GROUP = ("products", "prices")


class SavingLog(Log):
    def saved(self) -> list[int]:
        return [fields["generation"] for fields in self.named("snapshot_saved")]


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Running(TestCase):
    timeout = 300

    def setUp(self) -> None:
        # Its own folder is missing at first: the store makes it.
        self.parent = Path(tempfile.mkdtemp(prefix="cacheservice-test-"))
        self.addCleanup(shutil.rmtree, self.parent)
        self.directory = self.parent / "snapshots"
        self.log = SavingLog()
        self.wall_s = time.time

    snapshots: SnapshotStore | None = None

    def store(
        self,
        *datasets: DatasetSettings,
        interval_s: float = 0.0,
        keep: int = 3,
        start: bool = True,
        host: clock.Host | None = None,
        release: Callable[[Groups], None] = lambda _: None,
    ) -> Dataset:
        """The first of those datasets, in a new cache with a new store; the previous store unlocks the directory."""
        if self.snapshots is not None:
            self.snapshots.stopService()
        self.cache = Cache(datasets or [saved_dataset()], reactor.seconds)
        settings = PersistenceSettings(
            directory=str(self.directory), min_save_interval_s=interval_s, keep_generations=keep
        )
        clocks = Clocks(reactor, self.wall_clock_s, host)
        self.snapshots = SnapshotStore(self.cache, settings, release, reactor, self.log, clocks)
        self.addCleanup(self.snapshots.stopService)
        if start:
            self.snapshots.startService()
        return next(iter(self.cache.datasets.values()))

    def publish(self, dataset: Dataset, generation: int, table: Table | None = None, **more: Any) -> None:
        rows = rows_of(rows_of_generation(generation, 10) if table is None else table.items())
        fields: dict[str, Any] = {"as_of": AS_OF, "read_at": reactor.seconds(), "database_snapshot": "1:1:"}
        dataset.publish(Snapshot(generation=generation, rows=rows, **fields | more))

    async def save(self, dataset: Dataset, *generations: int) -> None:
        for generation in generations:
            self.publish(dataset, generation)
            await until(lambda generation=generation: generation in self.log.saved())

    async def restore(self) -> None:
        await restore(self.snapshots, self.cache, reactor, self.log)

    @property
    def problems(self) -> dict[str, str]:
        """The datasets whose last save failed, and why."""
        return {name: each.save_problem for name, each in self.cache.datasets.items() if each.save_problem}

    def saved(self, name: str) -> list[int]:
        return [generation for (generation,) in self.snapshots.saved([name])]

    def wall_clock_s(self) -> float:
        return self.wall_s()

    def path(self, generation: int, name: str = "products") -> Path:
        return self.directory / f"{name}.{generation:012}.snapshot"

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir()) if self.directory.exists() else []

    def generation_of(self, snapshot: Snapshot | None, count: int = 10) -> int:
        """Which one it is, whole."""
        assert snapshot is not None
        self.assertEqual(dict(snapshot.rows.items()), dict(rows_of_generation(snapshot.generation, count)))
        return snapshot.generation


class Saving(Running):
    async def test_a_saved_snapshot_comes_back(self) -> None:
        """What was published is published again by the next start, all but where it is from."""
        dataset = self.store()
        table = noise(5000, 50)
        self.publish(dataset, 12, table, columns=("id", "name"), database_snapshot="730:735:730,732")
        await until(self.log.saved)
        before, size_bytes = dataset.snapshot, self.path(12).stat().st_size
        assert before is not None
        (told,) = self.log.named("snapshot_saved")
        del told["took_s"]
        self.assertEqual(told, {"dataset": "products", "generation": 12, "rows": 5000, "bytes": size_bytes})
        again = self.store(start=False)
        await self.restore()
        after = again.snapshot
        assert after is not None
        self.assertEqual(dict(after.rows.items()), table)
        for field in ("generation", "as_of", "database_snapshot", "columns"):
            self.assertEqual(getattr(after, field), getattr(before, field))
        self.assertEqual((after.source, after.rows.size_bytes), ("disk", before.rows.size_bytes))
        (told,) = self.log.named("snapshot_restored")
        self.assertEqual((told["dataset"], told["generation"], told["rows"]), ("products", 12, 5000))

    async def test_who_may_read_it(self) -> None:
        """Folder and files are for the service's own user only; nothing else lies there."""
        dataset = self.store()
        await self.save(dataset, 1)
        self.assertEqual(stat.S_IMODE(self.directory.stat().st_mode), 0o700)
        self.assertEqual(stat.S_IMODE(self.path(1).stat().st_mode), 0o600)
        self.assertEqual(self.files(), [self.path(1).name])

    async def test_what_is_not_from_postgres_is_not_saved(self) -> None:
        """What came from the disk is not written again."""
        dataset = self.store()
        self.publish(dataset, 1, source="disk")
        await self.save(dataset, 2)
        self.assertEqual(self.log.saved(), [2])

    async def test_the_newest_wins(self) -> None:
        """Whatever is published while a save runs or within the interval, one more save comes, and is of the newest."""
        dataset = self.store(interval_s=0.5)
        began_at = time.monotonic()
        self.publish(dataset, 1)
        await until(self.log.saved)
        for generation in range(2, 6):
            self.publish(dataset, generation)
        await until(lambda: 5 in self.log.saved())
        self.assertGreaterEqual(time.monotonic() - began_at, 0.5)
        self.assertEqual(self.log.saved(), [1, 5])

    async def test_one_save_at_a_time(self) -> None:
        """However many datasets are published at once, there is one temporary file at a time, and each is saved."""
        names = ["a", "b", "c", "d"]
        self.store(*map(saved_dataset, names))
        for dataset in self.cache.datasets.values():
            self.publish(dataset, 1, noise(3000, 100))
        most = 0
        give_up_at = time.monotonic() + GIVE_UP_S
        while len(self.log.saved()) < len(names) and time.monotonic() < give_up_at:
            most = max(most, sum(name.endswith(".tmp") for name in self.files()))
            await deferLater(reactor, 0)
        self.assertLessEqual(most, 1)
        self.assertEqual(self.files(), [self.path(1, name).name for name in names])

    async def test_keep_generations(self) -> None:
        """Of each dataset the newest ones are kept, of the others' none is touched."""
        dataset = self.store(saved_dataset(), saved_dataset("prices"), keep=2)
        await self.save(dataset, 1)
        self.publish(self.cache.dataset("prices"), 1)
        await until(lambda: len(self.log.saved()) == 2)
        await self.save(dataset, 2, 3, 4)
        self.assertEqual(self.files(), [self.path(1, "prices").name, self.path(3).name, self.path(4).name])
        self.assertEqual((self.saved("products"), self.saved("prices")), ([4, 3], [1]))
        self.assertEqual(self.saved("nothing"), [])

    async def test_a_higher_number_is_no_newer(self) -> None:
        """Once a generation is saved the next start loads it, even if a file of a higher number was left unread."""
        await self.save(self.store(), 8, 9)
        self.store(start=False)
        dataset = self.store()
        self.snapshots._generations.note_found(
            {"products": {9: None, 8: None}}
        )  # as after a restore that could not read them
        await self.save(dataset, 1)
        self.assertEqual(self.files(), [self.path(1).name])

    async def test_nothing_is_kept(self) -> None:
        """When a save has ended, well or not, it holds no rows any more."""
        dataset = self.store()
        gc.disable()
        self.addCleanup(gc.enable)
        self.publish(dataset, 1)
        assert dataset.snapshot is not None
        first = weakref.ref(dataset.snapshot.rows)
        await until(self.log.saved)
        self.directory.rename(self.parent / "away")
        self.directory.write_bytes(b"")
        self.publish(dataset, 2)
        self.assertIsNone(first())
        second = weakref.ref(dataset.snapshot.rows)
        await until(lambda: self.problems)
        self.publish(dataset, 3)
        self.assertIsNone(second())
        self.directory.unlink()


class Renewing(Running):
    """Of a content that comes again."""

    def renew(self, dataset: Dataset, seconds: float) -> None:
        """The same rows, read so long after AS_OF."""
        served = dataset.snapshot
        assert served is not None
        as_of = AS_OF + timedelta(seconds=seconds)
        since, transactions = served.modified_as_of, f"{100 + int(seconds)}:{100 + int(seconds)}:"
        read_at = reactor.seconds()
        dataset.renew(
            replace(served, as_of=as_of, read_at=read_at, database_snapshot=transactions, content_since=since)
        )

    async def renewed(self, count: int = 1) -> None:
        await until(lambda: len(self.log.named("snapshot_renewed")) == count)

    async def restored(self, *datasets: DatasetSettings) -> Snapshot:
        await self.snapshots.stopService()
        dataset = self.store(*datasets, start=False)
        await self.restore()
        assert dataset.snapshot is not None
        return dataset.snapshot

    async def test_the_age_counts_from_the_last_read(self) -> None:
        """After a restart: the moment, the transactions and the age of the last read, the content since the first.

        The rows were not written again.
        """
        dataset = self.store()
        self.publish(dataset, 3, read_at=reactor.seconds() - 100)
        await until(lambda: 3 in self.log.saved())
        before = self.path(3).stat()
        self.renew(dataset, 50)
        await self.renewed()
        self.assertEqual(self.files(), [self.path(3).with_suffix(".renewal").name, self.path(3).name])
        self.assertEqual(self.path(3).stat(), before)
        self.assertLess(self.path(3).with_suffix(".renewal").stat().st_size, 1000)
        snapshot = await self.restored()
        self.assertEqual(self.generation_of(snapshot), 3)
        self.assertEqual((snapshot.as_of, snapshot.modified_as_of), (AS_OF + timedelta(seconds=50), AS_OF))
        self.assertEqual(snapshot.database_snapshot, "150:150:")
        self.assertLess(reactor.seconds() - snapshot.read_at, 40)
        self.assertEqual(self.log.saved(), [3])

    async def test_at_most_each_interval(self) -> None:
        """However often it is renewed, one file comes with each min_save_interval_s, and a publish does not wait."""
        dataset = self.store(interval_s=2.0)
        self.publish(dataset, 1)
        await until(self.log.saved)
        for number in range(1, 200):
            self.renew(dataset, number)
            await deferLater(reactor, 0.005)
        self.assertLessEqual(len(self.log.named("snapshot_renewed")), 1)

    async def test_a_renewal_that_is_bad(self) -> None:
        """A renewal that is damaged or of other rows counts for nothing; its file serves on."""
        dataset = self.store()
        await self.save(dataset, 1)
        self.renew(dataset, 50)
        await self.renewed()
        path = self.path(1).with_suffix(".renewal")
        good = path.read_bytes()
        damaged = [good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :] for place in range(0, len(good), 7)]
        for content in (*damaged, good[:-1], b"", good + b"x", self.path(1).read_bytes()):
            path.write_bytes(content)
            self.assertEqual((await self.restored()).as_of, AS_OF)
        path.write_bytes(good)
        self.assertEqual((await self.restored()).as_of, AS_OF + timedelta(seconds=50))
        dataset = self.store()
        self.path(1).unlink()
        await self.restore()
        self.assertEqual(self.files(), [])
        self.publish(dataset, 1, as_of=AS_OF + timedelta(seconds=7))
        await until(lambda: self.log.saved() == [1, 1])
        path.write_bytes(good)
        self.assertEqual((await self.restored()).as_of, AS_OF + timedelta(seconds=7))

    async def test_good_ones_are_not_pushed_out(self) -> None:
        """However often the same is read, and a rollback undone, the generations before it stay to go back to."""
        dataset = self.store(keep=3)
        await self.save(dataset, 1, 2)
        for number in range(1, 6):
            self.renew(dataset, number)
            await self.renewed(number)
        self.assertEqual(self.saved("products"), [2, 1])
        for generation in (4, 6, 8):
            dataset.roll_back(await self.snapshots.load("products", 1))
            dataset.unpin()
            await until(lambda generation=generation: generation in self.log.saved())
            self.assertEqual(self.saved("products"), [generation, 1])
        self.assertEqual(self.files(), [self.path(1).name, self.path(8).name])

    async def test_another_definition(self) -> None:
        """The result of another query is saved again under its generation, or the next start would refuse the file."""
        dataset = self.store()
        await self.save(dataset, 1)
        other = saved_dataset(query="SELECT * FROM products -- all of them")
        self.cache.declare([other])
        self.renew(dataset, 5)
        await until(lambda: self.log.saved() == [1, 1])
        self.assertEqual((await self.restored(other)).as_of, AS_OF + timedelta(seconds=5))

    async def test_a_group(self) -> None:
        """Where one of a group changes and another does not, both moments can be restored and gone back to."""
        self.store(*(saved_dataset(name, group="g") for name in GROUP))
        products, prices = (self.cache.dataset(name) for name in GROUP)
        for dataset in (products, prices):
            self.publish(dataset, 1)
        await until(lambda: self.log.saved() == [1, 1])
        for seconds in (10, 20):
            self.renew(products, seconds)
            self.publish(prices, 1 + seconds // 10, as_of=AS_OF + timedelta(seconds=seconds))
            await until(lambda seconds=seconds: 1 + seconds // 10 in self.log.saved())
        self.assertEqual(self.snapshots.saved(GROUP), [(1, 3), (1, 2), (1, 1)])
        await self.restored(*(saved_dataset(name, group="g") for name in GROUP))
        snapshots = [dataset.snapshot for dataset in self.cache.datasets.values()]
        self.assertEqual([snapshot and self.generation_of(snapshot) for snapshot in snapshots], [1, 3])
        self.assertEqual({snapshot and snapshot.as_of for snapshot in snapshots}, {AS_OF + timedelta(seconds=20)})
        self.assertEqual(self.snapshots.saved(GROUP), [(1, 3), (1, 2), (1, 1)])

    async def test_the_digest(self) -> None:
        """What was computed of the rows is not computed again after a restart."""
        dataset = self.store()
        self.publish(dataset, 1)
        assert dataset.snapshot is not None
        for _ in dataset.snapshot.rows.digesting():
            pass
        await until(self.log.saved)
        self.assertEqual((await self.restored()).rows.digest, dataset.snapshot.rows.digest)


class Failing(Running):
    def mount_small(self) -> None:
        self.directory.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", self.directory]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            raise SkipTest("a small file system cannot be mounted here")
        self.addCleanup(subprocess.run, ["umount", self.directory], check=True)

    async def test_a_disk_that_fills(self) -> None:
        """A full disk is reported once, no partial file stays, the old file is whole; with room again it is saved."""
        self.mount_small()
        dataset = self.store()
        await self.save(dataset, 1)
        filler = self.directory / "filler"
        filler.write_bytes(bytes(100 * 1024))
        self.publish(dataset, 2, noise(400, 500))
        await until(lambda: self.problems)
        self.assertEqual(
            self.problems,
            {
                "products": f"persistence.directory: {self.directory}: no space left on device; "
                "free some space, or name a folder on another file system"
            },
        )
        self.assertEqual(self.files(), ["filler", self.path(1).name])
        self.assertEqual(table_of(self.path(1))[1], dict(rows_of_generation(1, 10)))
        self.publish(dataset, 3, noise(401, 500))
        await deferLater(reactor, 1.5)
        self.assertEqual(len(self.log.named("snapshot_save_failed")), 1)
        filler.unlink()
        await until(lambda: 3 in self.log.saved())
        self.assertEqual((self.problems, len(self.log.named("snapshot_save_recovered"))), ({}, 1))
        self.assertEqual(self.saved("products"), [3, 1])

    async def test_a_folder_that_goes(self) -> None:
        """A folder removed while a save runs is a problem of that save; the next one makes it again."""
        dataset = self.store()
        await self.save(dataset, 1)
        self.publish(dataset, 2, noise(20_000, 100))
        await until(lambda: any(name.endswith(".tmp") for name in self.files()))
        self.directory.rename(self.parent / "away")
        await until(lambda: self.problems)
        self.assertEqual(
            self.problems,
            {
                "products": f"persistence.directory: {self.directory}: no such file or directory; "
                "make the folder, or name another one"
            },
        )
        self.assertEqual(table_of(self.parent / "away" / self.path(1).name)[1], dict(rows_of_generation(1, 10)))
        await until(lambda: 2 in self.log.saved())
        self.assertEqual((self.problems, self.files()), ({}, [self.path(2).name]))
        with self.assertRaisesRegex(UnknownGeneration, "^generation 1 of products is not on disk; there are: 2$"):
            await self.snapshots.load("products", 1)

    async def test_each_kind_is_told(self) -> None:
        """Another failure than the last one is reported again; of another dataset as well."""
        dataset = self.store(saved_dataset(), saved_dataset("prices"))
        self.directory.write_bytes(b"a file where the folder should be")
        self.publish(dataset, 1)
        self.publish(self.cache.dataset("prices"), 1)
        await until(lambda: len(self.problems) == 2)
        self.directory.unlink()
        with no_descriptor_left():
            await until(lambda: "too many open files" in self.problems["products"])
        await until(lambda: not self.problems)
        told = [fields["error"] for fields in self.log.named("snapshot_save_failed") if fields["dataset"] == "products"]
        self.assertEqual(len(told), len(set(told)))
        self.assertEqual(sorted(self.log.saved()), [1, 1])

    async def test_a_group_is_saved_whole_or_not_at_all(self) -> None:
        """If one of a group cannot be saved, nothing of the others' new moment is left, and what was saved stays."""
        self.store(*(saved_dataset(name, group="g") for name in GROUP))
        for name in GROUP:
            self.publish(self.cache.dataset(name), 1)
        await until(lambda: len(self.log.saved()) == len(GROUP))
        # What stands in the way of the last one to be written.
        self.path(2, GROUP[-1]).mkdir()
        for name in GROUP:
            self.publish(self.cache.dataset(name), 2, as_of=AS_OF + timedelta(seconds=1))
        await until(lambda: len(self.problems) == len(GROUP))
        self.assertEqual(
            self.files(), sorted([*(self.path(1, name).name for name in GROUP), self.path(2, GROUP[-1]).name])
        )
        self.path(2, GROUP[-1]).rmdir()
        await until(lambda: not self.problems)
        self.assertEqual(self.snapshots.saved(GROUP), [(2, 2), (1, 1)])


class Restoring(Running):
    async def refused(self, change: Callable[[], object], *datasets: DatasetSettings, left: int | None = 1) -> str:
        """Of generations 1 and 2 the second is changed: what is reported about it, while the first is served."""
        await self.save(self.store(), 1, 2)
        self.path(2).with_suffix(".snapshot.rejected").write_bytes(b"an older one")
        change()
        refused = self.path(2).read_bytes()
        dataset = self.store(*datasets, start=False)
        await self.restore()
        self.assertEqual(dataset.snapshot and self.generation_of(dataset.snapshot), left)
        self.assertEqual(self.path(2).with_suffix(".snapshot.rejected").read_bytes(), refused)
        self.assertFalse(self.path(2).exists())
        self.assertEqual(self.saved("products"), [] if left is None else [left])
        told = self.log.named("snapshot_rejected")[0]
        self.assertEqual((told["dataset"], told["file"]), ("products", self.path(2).name))
        message: str = told["error"]
        return message

    async def test_damaged(self) -> None:
        """A damaged file is moved aside, over one that was, and the older generation is served."""

        def damage() -> None:
            content = bytearray(self.path(2).read_bytes())
            content[len(content) // 2] ^= 1
            self.path(2).write_bytes(content)

        self.assertIn("it is damaged", await self.refused(damage))

    async def save_group(self, *generations: int) -> list[DatasetSettings]:
        """Each generation is of a moment of its own."""
        members = [saved_dataset(name, group="g") for name in GROUP]
        self.store(*members, keep=5)
        for generation in generations:
            for dataset in self.cache.datasets.values():
                self.publish(dataset, generation, as_of=AS_OF + timedelta(seconds=generation))
            await until(lambda generation=generation: self.log.saved().count(generation) == len(GROUP))
        await self.snapshots.stopService()
        return members

    async def restored(self, *members: DatasetSettings) -> list[int | None]:
        self.store(*members, start=False)
        await self.restore()
        snapshots = [dataset.snapshot for dataset in self.cache.datasets.values()]
        self.assertLessEqual(len({snapshot and snapshot.as_of for snapshot in snapshots}), 1)
        return [snapshot and self.generation_of(snapshot) for snapshot in snapshots]

    async def test_a_group(self) -> None:
        """What is saved of a group is restored together, of the newest moment at which all of it is there and good."""
        members = await self.save_group(1, 2, 3)
        self.assertEqual(await self.restored(*members), [3, 3])
        self.path(3, "prices").unlink()
        self.assertEqual(await self.restored(*members), [2, 2])
        for generation, place in ((3, 30), (2, -1)):  # in the header, and at the end
            content = bytearray(self.path(generation).read_bytes())
            content[place] ^= 1
            self.path(generation).write_bytes(content)
        self.assertEqual(await self.restored(*members), [1, 1])
        rejected = [self.path(generation).name for generation in (3, 2)]
        self.assertEqual([told["file"] for told in self.log.named("snapshot_rejected")], rejected)
        self.assertFalse(self.path(3).exists() or self.path(2).exists())
        self.assertEqual(self.log.named("group_not_restored"), [])

    async def test_a_group_of_different_moments(self) -> None:
        """If there is no moment at which all of it is saved, none of it is restored, and this is logged."""
        members = await self.save_group(1, 2)
        self.path(1).unlink()
        self.path(2, "prices").unlink()
        self.assertEqual(await self.restored(*members), [None, None])
        self.assertIn("products, prices", self.log.named("group_not_restored")[0]["error"])

    async def test_damaged_anywhere(self) -> None:
        """So is one whose damage is found only while its rows are read, wherever it is: each file is moved aside."""
        await self.save(self.store(), 1)
        good = self.path(1).read_bytes()
        for at in range(0, len(good), max(1, len(good) // 150)):
            damaged = bytearray(good)
            damaged[at] ^= 0x10
            self.path(1).write_bytes(damaged)
            dataset = self.store(start=False)
            await self.restore()
            self.assertIsNone(dataset.snapshot)
            self.assertFalse(self.path(1).exists(), f"byte {at} is damaged, and the file still there")
        self.assertEqual([told for told in self.log.named("snapshot_rejected") if told.get("exc_info")], [])

    async def test_truncated(self) -> None:
        """So is one that ends early."""
        self.assertIn("it is truncated", await self.refused(lambda: os.truncate(self.path(2), 100)))

    async def test_empty(self) -> None:
        """So is one that a crash of the machine left empty."""
        self.assertIn("it is truncated", await self.refused(lambda: os.truncate(self.path(2), 0)))

    async def test_of_another_dataset(self) -> None:
        """So is one that was another dataset's."""
        content = file_of(rows_of([]), dataset="prices", generation=2)
        message = await self.refused(lambda: self.path(2).write_bytes(content))
        self.assertIn("it belongs to another dataset, 'prices'", message)

    async def test_of_another_generation(self) -> None:
        """So is one that was renamed."""
        content = file_of(rows_of([]), generation=3)
        self.assertIn("another generation, 3", await self.refused(lambda: self.path(2).write_bytes(content)))

    async def test_another_format(self) -> None:
        """So is one of a format that only a later release knows."""

        def change() -> None:
            content = self.path(2).read_bytes()
            self.path(2).write_bytes(MAGIC + (9).to_bytes(2, "big") + content[8:])

        self.assertIn("format 9 is unknown", await self.refused(change))

    async def test_rows_that_are_too_few(self) -> None:
        """So is one that is well formed, but without as many rows as it claims."""
        rows = rows_of(noise(3, 3).items())
        content = file_of(rows, generation=2, size_bytes=rows.size_bytes + 1)
        self.assertIn(
            "declares other numbers of rows or bytes", await self.refused(lambda: self.path(2).write_bytes(content))
        )

    async def test_another_query(self) -> None:
        """Rows of another query are not served, however old: all of them are moved aside."""
        message = await self.refused(lambda: None, saved_dataset(query="SELECT 1 AS id"), left=None)
        self.assertIn(
            "the query, the key, the probe, watch, settings or search_path of the dataset has changed", message
        )

    async def test_another_key(self) -> None:
        """Neither are rows by another key."""
        self.assertIn("the key", await self.refused(lambda: None, saved_dataset(key=["id", "sku"]), left=None))

    async def test_limits(self) -> None:
        """What a refresh would refuse for its size is not served from the disk."""
        self.assertIn("max_rows = 9", await self.refused(lambda: None, saved_dataset(max_rows=9), left=None))

    async def test_what_cannot_be_read_stays(self) -> None:
        """A file that cannot be read now may be good: it stays, and is read when it can be."""
        await self.save(self.store(), 1)
        refusal = self.assertRaisesRegex(SnapshotRejected, "it cannot be read: too many open files$")
        with no_descriptor_left(), refusal:
            await self.snapshots.load("products", 1)
        self.assertEqual(self.generation_of(await self.snapshots.load("products", 1)), 1)

    async def test_what_is_no_file(self) -> None:
        """What has a file's name and is none is passed over."""
        await self.save(self.store(), 1)
        self.path(2).symlink_to(self.directory / "nowhere")
        self.path(3).mkdir()
        os.mkfifo(self.path(4))
        self.path(0).write_bytes(b"")
        dataset = self.store(start=False)
        await self.restore()
        self.assertEqual((self.generation_of(dataset.snapshot), self.saved("products")), (1, [1]))
        self.assertEqual(self.log.named("snapshot_rejected"), [])

    async def test_no_folder(self) -> None:
        """Without a folder there is nothing to restore, and nothing to report."""
        dataset = self.store(start=False)
        await self.restore()
        self.assertEqual((dataset.snapshot, self.log.events), (None, []))
        self.directory.write_bytes(b"no folder")
        await self.restore()
        (told,) = self.log.named("snapshot_restore_failed")
        problem = (
            f"persistence.directory: {self.directory}: it, or a folder above it, is a file and not a folder; "
            "remove that file, or name another folder"
        )
        self.assertEqual(told["error"], problem)
        self.store()
        self.publish(self.cache.dataset("products"), 1)
        await until(lambda: self.problems)
        self.assertEqual(self.problems, {"products": problem})

    async def test_leftovers(self) -> None:
        """What a killed process left half written is removed; what is not ours stays."""
        self.directory.mkdir()
        ours, others = ".products.000000000003.4711.tmp", [".hidden", "notes.tmp", "products.3.snapshot"]
        for name in (ours, *others):
            (self.directory / name).write_bytes(b"half")
        self.store(start=False)
        await self.restore()
        self.assertEqual((self.files(), self.log.events), (sorted(others), []))

    async def test_a_refresh_that_was_quicker(self) -> None:
        """What was read from PostgreSQL meanwhile is not replaced by something older."""
        await self.save(self.store(), 5)
        dataset = self.store(start=False)
        restored = Deferred.fromCoroutine(self.restore())
        self.publish(dataset, 1)
        await restored
        assert dataset.snapshot is not None
        self.assertEqual((dataset.snapshot.generation, dataset.snapshot.source), (1, "postgres"))

    async def test_the_age(self) -> None:
        """Exact within one run of the machine; across a restart of it by its own wall clock, not the database's."""
        here = clock.Host(clock.boot_id(), "machine")
        await self.save(self.store(host=here), 1)
        uptime_s = clock.seconds()
        for boot, passed_s, age_s in (
            (here.boot, 3600.0, 0.0),  # the wall clock was set
            (here.boot, -3600.0, 0.0),
            ("another", 0.0, uptime_s),  # it was read before the machine was started, at least
            ("another", uptime_s + 3600.0, uptime_s + 3600.0),
            ("another", -3600.0, uptime_s),  # set back
        ):
            self.wall_s = lambda passed_s=passed_s: time.time() + passed_s
            dataset = self.store(start=False, host=clock.Host(boot, "machine"))
            await self.restore()
            self.assert_age(dataset, age_s)

    def assert_age(self, dataset: Dataset, age_s: float) -> None:
        age = dataset.age_s()
        assert age is not None
        self.assertGreaterEqual(age, age_s)
        self.assertLess(age, age_s + GIVE_UP_S)

    async def test_the_age_on_another_machine(self) -> None:
        """The time since the start of that machine is not in it; that it is uncertain is known until a refresh."""
        self.patch(clock, "seconds", lambda: 30 * 86400.0)
        for saved_on in ("machine", ""):
            dataset = self.store(host=clock.Host("there", saved_on))
            self.publish(dataset, 1, as_of=datetime.now(UTC))
            await until(self.log.saved)
            self.assertIsNone(self.snapshot_of(dataset).age_uncertain)
            self.wall_s = lambda: time.time() + 600.0
            dataset = self.store(host=clock.Host("here", "another machine"))
            await self.restore()
            self.assert_age(dataset, 600.0)
            uncertain = "it was saved on another machine" if saved_on else "it may have been saved on another machine"
            self.assertEqual(self.snapshot_of(dataset).age_uncertain, uncertain)
            self.assertEqual(self.log.named("snapshot_restored")[-1]["age_uncertain"], uncertain)
            self.assertEqual(self.snapshot_of(await self.snapshots.load("products", 1)).age_uncertain, uncertain)
            self.publish(dataset, 2)
            self.assertIsNone(self.snapshot_of(dataset).age_uncertain)
            await self.snapshots.stopService()
            shutil.rmtree(self.directory)
            self.log.lines.clear()
            self.wall_s = time.time

    def snapshot_of(self, dataset: Dataset | Snapshot) -> Snapshot:
        snapshot = dataset.snapshot if isinstance(dataset, Dataset) else dataset
        assert snapshot is not None
        return snapshot

    async def test_of_another_database(self) -> None:
        """A file of another database is served until that is known, and refused from then on; it stays on disk."""
        dataset = self.store()
        self.publish(dataset, 1, server=PRIMARY)
        await until(self.log.saved)
        again = self.store(start=False)
        await self.restore()
        assert again.snapshot is not None
        self.assertEqual(again.snapshot.server, PRIMARY)
        others: list[dict[str, Any]] = [{"system_identifier": "1"}, {"database_oid": 1}, {"role": "other"}]
        for other in others:
            again = self.store(start=False)
            self.cache.database.seen(replace(PRIMARY, **other), NO_LAG)
            await self.restore()
            self.assertIsNone(again.snapshot)
            error = await self.failed(self.snapshots.load("products", 1))
            self.assertIsInstance(error, OfAnotherDatabase)
            self.assertEqual(self.files(), [self.path(1).name])
        again = self.store(start=False)
        self.cache.database.seen(replace(PRIMARY, started_us=1, timeline=2, in_recovery=True), NO_LAG)
        await self.restore()
        self.assertIsNotNone(again.snapshot)

    async def failed(self, loading: Coroutine[Any, Any, Any]) -> Exception:
        try:
            await loading
        except CacheServiceError as error:
            return error
        raise AssertionError("it was loaded")

    async def test_a_directory_of_another_process(self) -> None:
        """The second process reports that, and does not save, delete or restore; once the first is killed, it saves."""
        await self.save(self.store(), 1)
        await self.snapshots.stopService()
        program = (
            "import pathlib, sys, time\n"
            "from cacheservice.sources.disk.lock import DirectoryLock\n"
            "lock = DirectoryLock(pathlib.Path(sys.argv[1]))\n"
            "lock.take()\n"
            "print('taken', flush=True)\n"
            "time.sleep(600)"
        )
        arguments = [sys.executable, "-c", program, str(self.directory)]
        first = await deferToThread(lambda: subprocess.Popen(arguments, stdout=subprocess.PIPE))
        assert first.stdout is not None
        self.addCleanup(first.stdout.close)
        self.addCleanup(first.wait)
        self.addCleanup(first.kill)
        self.assertEqual(await deferToThread(first.stdout.readline), b"taken\n")
        before = self.files()
        dataset = self.store()
        await self.restore()
        self.assertIsNone(dataset.snapshot)
        self.assertIn("another process saves there", dataset.save_problem or "")
        self.assertTrue(self.log.named("persistence_locked"))
        self.publish(dataset, 7)
        await until(lambda: dataset.counts.save_failures)
        self.assertEqual(self.files(), before)
        first.kill()
        await until(lambda: 7 in self.log.saved())
        self.assertIsNone(dataset.save_problem)

    async def test_load(self) -> None:
        """Any generation on disk is available for a rollback; the reason is reported for those that are not."""
        await self.save(self.store(), 1, 2, 3)
        dataset = self.store()
        await self.restore()
        self.assertEqual(self.saved("products"), [3, 2, 1])
        snapshot = await self.snapshots.load("products", 2)
        self.assertEqual((self.generation_of(snapshot), snapshot.source), (2, "disk"))
        self.assertEqual(self.generation_of(dataset.snapshot), 3)
        self.path(1).write_bytes(b"CSSNAP")
        with self.assertRaises(SnapshotRejected):
            await self.snapshots.load("products", 1)
        self.assertEqual(self.saved("products"), [3, 2])
        self.assertTrue(self.path(1).with_suffix(".snapshot.rejected").exists())
        with self.assertRaises(UnknownGeneration):
            await self.snapshots.load("products", 1)
        with self.assertRaises(UnknownDataset):
            await self.snapshots.load("nothing", 1)

    async def test_rows_go_to_release(self) -> None:
        """Rows of a file that is found to be bad half-way are passed on to be freed slice by slice."""
        await self.save(self.store(), 1)
        self.publish(self.cache.dataset("products"), 2, noise(20_000, 300))
        await until(lambda: 2 in self.log.saved())
        os.truncate(self.path(2), self.path(2).stat().st_size - 1)
        released: list[int] = []
        dataset = self.store(
            start=False, release=lambda groups: released.append(sum(map(len, chain.from_iterable(groups))))
        )
        await self.restore()
        self.assertEqual(self.generation_of(dataset.snapshot), 1)
        self.assertEqual(len(released), 1)
        self.assertGreater(released[0], 1000)


class Stopping(Running):
    async def stopped(self) -> None:
        """Stop, after which no thread works for it and no timer is left (trial looks for those)."""
        await self.snapshots.stopService()
        self.assertEqual(self.snapshots._work.running, 0)
        # The pool's own thread needs a moment more to note that it has nothing to do.
        await until(lambda: not reactor.getThreadPool().working)

    async def test_while_saving(self) -> None:
        """A save that runs is abandoned: its temporary file is gone, the older generation is not."""
        dataset = self.store()
        await self.save(dataset, 1)
        self.publish(dataset, 2, noise(100_000, 100))
        await until(lambda: any(name.endswith(".tmp") for name in self.files()))
        await self.stopped()
        self.assertEqual(self.files(), [self.path(1).name])
        self.assertEqual((self.log.saved(), self.log.named("snapshot_save_failed")), ([1], []))
        self.publish(dataset, 3)
        self.snapshots.startService()
        await self.save(dataset, 4)

    async def test_at_any_moment(self) -> None:
        """Whenever it is stopped, there are whole files and nothing else."""
        for turns in range(40):
            dataset = self.store(keep=1)
            self.publish(dataset, turns + 1, noise(2000, 10))
            for _ in range(turns):
                await deferLater(reactor, 0)
            await self.stopped()
            for path in self.directory.iterdir() if self.directory.exists() else ():
                self.assertEqual(len(table_of(path)[1]), 2000)

    async def test_while_waiting(self) -> None:
        """A save that is planned is not done at the stop."""
        dataset = self.store(interval_s=1000.0)
        await self.save(dataset, 1)
        self.publish(dataset, 2)
        await self.stopped()
        self.assertEqual(self.files(), [self.path(1).name])

    async def test_while_loading(self) -> None:
        """A restore that runs ends without a word, a load with `Stopped`; their rows are freed."""
        dataset = self.store()
        self.publish(dataset, 1, noise(50_000, 100))
        await until(self.log.saved)
        dataset = self.store()
        await self.restore()
        before = len(self.log.events)
        loaded = Deferred.fromCoroutine(self.snapshots.load("products", 1))
        await deferLater(reactor, 0.01)
        await self.stopped()
        with self.assertRaises(Stopped):
            await loaded
        dataset = self.store(start=False)
        restored = Deferred.fromCoroutine(self.restore())
        await deferLater(reactor, 0.01)
        await self.stopped()
        await restored
        self.assertEqual((dataset.snapshot, self.log.events[before:]), (None, []))

    async def test_giving_up(self) -> None:
        """The caller that asked for a generation may give up; the thread ends what it began and nothing is logged."""
        dataset = self.store()
        self.publish(dataset, 1, noise(20_000, 100))
        await until(self.log.saved)
        loading = Deferred.fromCoroutine(self.snapshots.load("products", 1))
        await deferLater(reactor, 0.005)
        loading.addErrback(lambda _: None)
        loading.cancel()
        await self.stopped()


class Killed(Running):
    async def test_kill_9(self) -> None:
        """Killed at any moment, the next start serves the generation that was being saved or the one before, whole."""
        random_ = random.Random(1)
        for _ in range(KILLS):
            begun = await deferToThread(killed_after, self.directory, KILL_ROWS, random_.uniform(0.0, 0.15))
            dataset = self.store(start=False)
            await self.restore()
            self.assertEqual(self.log.named("snapshot_rejected"), [])
            if dataset.snapshot is None:
                self.assertEqual(begun, 1)
            else:
                self.assertIn(self.generation_of(dataset.snapshot, KILL_ROWS), (begun - 1, begun))
            self.assertEqual([name for name in self.files() if not name.endswith(".snapshot")], [])
            await self.snapshots.stopService()  # the next child needs the lock of the directory

    async def test_kill_9_while_renewed(self) -> None:
        """Killed at any moment, the next start has the moment of a renewal that was begun, never of an older one."""
        random_ = random.Random(1)
        for _ in range(KILLS // 3):
            begun, complete = await deferToThread(killed_while_renewing, self.directory, random_.uniform(0.0, 0.1))
            dataset = self.store(start=False)
            await self.restore()
            assert dataset.snapshot is not None
            self.generation_of(dataset.snapshot)
            moment = int((dataset.snapshot.as_of - dataset.snapshot.modified_as_of).total_seconds())
            self.assertIn(moment, range(complete, begun + 1))
            self.assertFalse([name for name in self.files() if name.endswith((".tmp", ".rejected"))])
            await self.snapshots.stopService()
            shutil.rmtree(self.directory)
