"""Laws under faults of every kind: what `benchmarks.soak` does for half an hour, once and short."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from twisted.trial.unittest import SkipTest, SynchronousTestCase, TestCase

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.faults import (
    FAULTS,
    QUERY,
    TABLES,
    Claim,
    Counts,
    Ledger,
    Shelf,
    Storm,
    Version,
    flood,
    parsed,
    possible,
    storm,
)
from tests.kit.postgres import fresh_database
from tests.kit.waiting import wait_until

SEED = 1
HOLD_S = 0.3
SIXTY_FOUR = ("sh", "-c", 'ulimit -n 64; exec "$0" "$@"')
SLOW_IS_FINE = ("late",)
"""How long a recovery takes, a busy machine with two cores decides; `benchmarks.soak` measures it."""


@pytest.mark.usefixtures("server")
class StormTestCase(SynchronousTestCase):
    maxDiff = None
    server: EmbeddedPostgres

    @contextmanager
    def storm(self, **options: Any) -> Iterator[Storm]:
        database = fresh_database(self.server, self.addCleanup)
        try:
            with storm(self.server, database, Random(SEED), interval_s=0.5, timeout_s=2.0, **options) as made:
                yield made
        except PermissionError as error:
            raise SkipTest(str(error)) from error

    def assert_unharmed(self, made: Storm) -> None:
        """Nothing happened that must not, and every fault was recovered from, however late."""
        bad = {what: told for what, told in made.counts.bad().items() if what not in SLOW_IS_FINE}
        self.assertEqual(bad, {})
        self.assertEqual([struck for struck in made.struck if struck.recovery_s is None], [])


class Faults(StormTestCase):
    def test_one_of_each(self) -> None:
        """Through each fault of database, network, disk and process readers of all ports get whole answers, the ones
        that the database held, and none fails; then all is fresh again, and nothing is left over."""
        with self.storm() as made:
            made.measure()
            names = [name for name in possible(made) if "hour" not in name]
            for name in names:
                made.strike(name, HOLD_S)
            made.finish()
        self.assert_unharmed(made)
        self.assertEqual([struck.name for struck in made.struck], names)
        self.assertGreater(made.counts["answers"], 1000)

    def test_the_clock_an_hour_off(self) -> None:
        """With the wall clock an hour back or ahead all goes on; after a restart, too, where what is from the disk is
        as old as that clock indicates, and served."""
        with self.storm() as made:
            if made.clock is None:
                raise SkipTest("needs a C compiler to turn the clock: apt-get install gcc libc6-dev")
            for name in FAULTS:
                if "hour" in name:
                    made.strike(name, HOLD_S)
                    if name.startswith("process"):
                        self.assertEqual(set(made.life.restored), set(TABLES))
            made.finish()
        self.assert_unharmed(made)
        self.assertEqual(len(made.struck), 4)

    def test_sixty_four_descriptors(self) -> None:
        """With 64 descriptors in all and many more clients, those that were there are served on; what fails meanwhile
        reports why, and recovers when they go."""
        with self.storm(before=SIXTY_FOUR) as made:
            made.measure()
            made.strike("clients: more than descriptors", 3.0, flood)
            before = dict(made.life.saved_at)
            wait_until(lambda: all(made.life.saved_at[name] > at for name, at in before.items()), "saves")
            made.finish()
        self.assert_unharmed(made)


class Files(TestCase):
    timeout = 120

    def setUp(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="cacheservice-test-"))
        self.addCleanup(shutil.rmtree, directory)
        self.counts = Counts()
        self.shelf = Shelf(directory / "saved", Random(SEED), self.counts)

    async def test_damaged(self) -> None:
        """Whatever byte of a file is changed, and wherever it is cut off, the one before it is served."""
        await self.shelf.damage(corruptions=60, truncate_bytes=4096, rows=500)
        self.assertEqual(self.counts.bad(), {})
        self.assertEqual(self.counts["corruptions"], 60)
        self.assertGreater(self.counts["truncations"], 40)

    async def test_killed(self) -> None:
        """Killed at any moment of a save, the next start serves the old generation or the new one, whole."""
        await self.shelf.kill(kills=4, rows=5000, most_s=0.1)
        self.assertEqual(self.counts.bad(), {})
        self.assertEqual(self.counts["kills"], 4)


class Judges(StormTestCase):
    """A check for faults is of no use if it does not find existing ones."""

    def claim(self, version: int, seen: str, as_of_us: int = 2500, read_on_us: int = 2600) -> Claim:
        return Claim(1, "alone", 1, version, seen, as_of_us, read_on_us)

    def test_the_ledger(self) -> None:
        """A version is right if it is the newest that the snapshot saw, and of the time that the answer claims."""
        ledger = Ledger(self.server, "", "alone", 1.0)
        ledger.versions = [Version(n, 10 * n, 1000 * n - 100, 1000 * n) for n in range(1, 5)]
        self.assertIsNone(ledger.problem(self.claim(2, "21:21:")))
        self.assertIsNone(ledger.problem(self.claim(2, "20:35:30")), "30 was running")
        self.assertIsNone(ledger.problem(self.claim(3, "25:35:25", read_on_us=2950)), "it began its COMMIT in time")
        self.assertIn("held version 3", str(ledger.problem(self.claim(2, "31:31:"))))
        self.assertIn("held version 1", str(ledger.problem(self.claim(2, "20:35:20,30"))))
        self.assertIn("before its as_of", str(ledger.problem(self.claim(2, "21:21:", as_of_us=3001, read_on_us=3002))))
        self.assertIn("after it was read", str(ledger.problem(self.claim(3, "31:31:"))))

    def test_a_snapshot(self) -> None:
        """It is read as PostgreSQL writes it (the manual, 9.27.10)."""
        self.assertEqual(parsed("10:20:10,14,15"), (10, 20, {10, 14, 15}))
        self.assertEqual(parsed("10:10:"), (10, 10, set()))

    def test_what_is_wrong_is_found(self) -> None:
        """Lying queries, a missing row, a generation that goes back, saved files that are gone, a process that ends by
        itself, a port that does not answer: each is counted as what it is."""
        old = QUERY.replace("id, v, mark", "id, v - 7 AS v, (mark + 2147483648 - 7 * 7919) % 2147483648 AS mark")
        lies = {
            "alone": QUERY.format(table="alone") + " WHERE id > 20",
            "credits": old.format(table="credits"),
            "large": old.format(table="large"),
        }
        with self.storm(queries=lies) as made:
            wait_until(lambda: made.counts["mixed"] > 1 and made.counts["failed"], "what readers find")
            made.life.note_received("alone", 10**6, 0)
            wait_until(lambda: made.counts["back"], "a generation that went back")
            made.end(signal.SIGKILL)
            for path in made.saved.iterdir():
                path.unlink()
            made.start()
            self.assertIsNotNone(made.recovered(time.time()))
            made.check_restored()
            made.life.daemon.process.kill()
            made.life.daemon.process.wait()
            made.finish()
        bad = made.counts.bad()
        # What was saved when it was killed may be left, too.
        self.assertEqual(set(bad) - {"left"}, {"wrong", "mixed", "failed", "back", "lost", "ended", "stop"})
        self.assertIn("the database held version", str(bad["wrong"]))
        self.assertIn("in one MULTI", str(bad["mixed"]))
