"""Nothing that Redis clients see depends on the process: not on its hash seed, nor on the order of its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.kit.paths import ROOT
from tests.kit.resp_replies import NAMES, ROWS


def replies_of_a_process(seed: int, *words: str) -> dict[str, Any]:
    """What a process with that hash seed replies; see `tests.kit.resp_replies`."""
    program = [sys.executable, "-m", "tests.kit.resp_replies", *words]
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    done = subprocess.run(program, capture_output=True, check=True, cwd=ROOT, env=environment)
    replies: dict[str, Any] = json.loads(done.stdout)
    return replies


class Processes(SynchronousTestCase):
    def test_the_same_rows(self) -> None:
        """Two processes with the same rows send the same bytes: every cursor and every other reply."""
        first, second = (replies_of_a_process(seed) for seed in (1, 2))
        self.assertGreater(len(first["replies"]), 100_000)
        self.assertEqual(first["scans"], second["scans"])
        self.assertTrue(first["replies"] == second["replies"], "the replies are not the same bytes")

    def test_a_cursor_of_another_process(self) -> None:
        """Processes page alike, whatever the order of their datasets and of their rows.

        A scan that goes to another replica with each page returns all that is on both.
        """
        replicas = [replies_of_a_process(1)["scans"], replies_of_a_process(2, "reversed")["scans"]]
        self.assertEqual(*replicas)
        everything = [f"{name}:{key}" for name in NAMES for key in range(ROWS)]
        for number, wanted in enumerate(([*NAMES, *everything], [str(key) for key in range(ROWS)])):
            pages = [replica[number] for replica in replicas]
            cursor, found, page = "0", [], 0
            while page == 0 or cursor != "0":
                cursor, some = pages[page % 2][cursor]
                found += some
                page += 1
            self.assertEqual(sorted(found), sorted(wanted))
