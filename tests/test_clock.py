"""Laws of the clock of ages: it counts the time for which a machine is suspended, and is that of the service."""

from __future__ import annotations

import time
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from cacheservice import clock
from cacheservice.persistence.files import ReadOn

ROOT = Path(__file__).parent.parent


class Clocks(SynchronousTestCase):
    def test_a_suspended_machine(self) -> None:
        """The clock is the one that does not stand still meanwhile, and the service's reactor has it."""
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.assertLessEqual(before, clock.seconds())
        self.assertLessEqual(clock.seconds(), time.clock_gettime(time.CLOCK_BOOTTIME))
        self.assertIn("reactor.seconds = clock.seconds", (ROOT / "tac" / "cacheservice.tac").read_text())
        self.assertTrue(clock.boot_id())

    def test_ages_of_files(self) -> None:
        """Exact within one run of the machine; else the wall clock's, and never less than the time since the start."""
        read_on = ReadOn(1_000_000_000, "here", 50_000_000)
        self.assertEqual(read_on.age_s(7.0, "here", 60.0), 10.0)
        self.assertEqual(read_on.age_s(1300.0, "other", 60.0), 300.0)
        self.assertEqual(read_on.age_s(900.0, "other", 60.0), 60.0)
        self.assertEqual(read_on.age_s(900.0, "", 60.0), 0.0)
