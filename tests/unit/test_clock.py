"""Laws of the clock of ages: it counts the time for which a machine is suspended, and is that of the service."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base import clock
from cacheservice.base.clock import Host
from cacheservice.sources.frames.age import Age, ReadOn
from tests.kit.paths import ROOT


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
        read_on = ReadOn(1_000_000_000, "here", 50_000_000, "machine")
        as_of = datetime.fromtimestamp(500.0, UTC)  # its clock is of no matter here

        def age(wall_s: float, boot: str, machine: str = "machine") -> Age:
            return read_on.age(as_of, wall_s, 60.0, Host(boot, machine))

        self.assertEqual(age(7.0, "here"), (10.0, None))
        self.assertEqual(age(7.0, "here", "renamed"), (10.0, None))
        self.assertEqual(age(1300.0, "other"), (300.0, None))
        set_back = "the clock of this machine was set back since it was saved; it is at least that old"
        self.assertEqual(age(900.0, "other"), (60.0, set_back))
        self.assertEqual(age(900.0, ""), (0.0, None))

    def test_ages_of_files_of_another_machine(self) -> None:
        """By the wall clocks, the time since its start not among them; of two that differ the older one."""
        month_s = 30 * 86400.0
        for machine, here, uncertain in (
            ("one", "another", "it was saved on another machine"),
            ("", "another", "it may have been saved on another machine"),
            ("one", "", "it may have been saved on another machine"),
            ("", "", "it may have been saved on another machine"),
        ):
            read_on = ReadOn(1_000_000_000, "there", 50_000_000, machine)
            ahead = f"{uncertain}, and the clock there was ahead of this one"
            for as_of_s, wall_s, expected in (
                (1000.1, 1022.0, (22.0, uncertain)),
                (400.0, 1022.0, (622.0, uncertain)),  # the clock there was 10 minutes ahead, the database's not
                (1600.0, 1022.0, (22.0, uncertain)),
                (1000.1, 900.0, (0.0, ahead)),
                (400.0, 900.0, (500.0, ahead)),
            ):
                as_of = datetime.fromtimestamp(as_of_s, UTC)
                self.assertEqual(read_on.age(as_of, wall_s, month_s, Host("here", here)), expected)

    def test_the_machine(self) -> None:
        """Its id is a hash that hides /etc/machine-id; none in a container, and none without a good file."""
        directory = Path(tempfile.mkdtemp(prefix="cacheservice-test-"))
        self.addCleanup(directory.rmdir)
        file, namespace = directory / "machine-id", directory / "pid"
        self.patch(clock, "_MACHINE_ID", file)
        self.patch(clock, "_PID_NAMESPACE", namespace)
        self.assertEqual(clock.machine_id(), "")
        namespace.symlink_to("pid:[4026531836]")
        self.addCleanup(namespace.unlink)
        for content in ("", "uninitialized\n", "ä"):
            file.write_text(content)
            self.addCleanup(file.unlink, missing_ok=True)
            self.assertEqual(clock.machine_id(), "")
        ids = []
        for content in ("0123456789abcdef" * 2, "0123456789abcdef" * 2, "fedcba9876543210" * 2):
            file.write_text(f"{content}\n")
            ids.append(clock.machine_id())
            self.assertRegex(ids[-1], "^[0-9a-f]{32}$")
            self.assertNotEqual(ids[-1], content)
        self.assertEqual((ids[0] == ids[1], ids[0] == ids[2]), (True, False))
        self.patch(os, "uname", lambda: os.uname_result(("Linux", "a-copy", "6", "", "x86_64")))
        self.assertNotEqual(clock.machine_id(), ids[2])
        namespace.unlink()
        namespace.symlink_to("pid:[4026532201]")
        self.assertEqual(clock.machine_id(), "")
