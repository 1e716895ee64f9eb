"""A primary, its standby and two services under writers and readers: once what `benchmarks.jepsen` does for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tests.kit.paths import ROOT

LIMIT_S = 900
"""On a machine that is busy; on one that is not it takes less than a minute."""
FAULTS = ("one session ended, often", "service killed", "primary restarted", "promotion")
READERS = ("main over RESP", "main over HTTP", "replica over RESP", "replica over HTTP")


class Money(unittest.TestCase):
    def test_no_sum_that_never_was(self) -> None:
        """Through lost sessions, a killed service, a restart and a promotion each sum, row, moment, generation and age
        that is read, over both protocols, from the primary and from its standby, is one that was."""
        with tempfile.TemporaryDirectory(prefix="cacheservice-tests-") as directory:
            report = Path(directory) / "report.json"
            command = [sys.executable, "-m", "benchmarks.jepsen", "--seed", "1", "--report", str(report)]
            run = subprocess.run(
                [*command, "--strike", *FAULTS],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
            self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
            told = json.loads(report.read_text())
        self.assertEqual(told["wrong"], {})
        self.assertEqual(set(told["faults"]), set(FAULTS))
        for reader in READERS:
            self.assertGreater(told["counts"][f"answers of {reader}"], 20)
        self.assertGreater(told["counts"]["transactions"], 100)
