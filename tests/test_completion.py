"""Laws of shell completion, with real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

LIMIT_S = 60
# What bash does when Tab is pressed behind these words.
_PRESS_TAB = """
source <(cacheservice completion bash)
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_cacheservice_completion cacheservice
printf '%s\\n' "${COMPREPLY[@]}"
"""


class Completion(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cacheservice-empty-"))
        self.addCleanup(shutil.rmtree, self.folder)
        # No DSN: completion needs none.
        (self.folder / "cacheservice.toml").write_text(
            '[datasets.products]\nquery = "SELECT 1"\n[datasets.prices]\nkey = "x"\n[datasets.flags]\n'
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        self.environ = clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def complete(self, *words: str) -> list[str]:
        told = subprocess.run(
            ["bash", "--norc", "-c", _PRESS_TAB, "bash", "cacheservice", *words],
            check=True, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        self.assertEqual(told.stderr, "")
        return told.stdout.split()

    def test_bash(self) -> None:
        """Tab completes commands, options, questions, and the datasets of the configuration file."""
        self.assertEqual(self.complete("wh"), ["why"])
        self.assertEqual(self.complete("why", "pr"), ["products", "prices"])
        self.assertEqual(self.complete("tail", "products", "f"), ["flags"])
        self.assertEqual(self.complete("status", "--wa"), ["--watch"])
        self.assertEqual(self.complete("watch", "--lo"), ["--logical"])
        self.assertEqual(self.complete("unwatch", "public.products", "--p"), ["--publication"])
        self.assertEqual(self.complete("migrate", "--reader", "r", "--rep"), ["--replication"])
        self.assertEqual(self.complete("migrate", "--no-"), ["--no-replication"])
        self.assertEqual(self.complete("status", "r"), ["ruok", "ready"])
        self.assertEqual(self.complete("status", "show", "pro"), ["products"])
        self.assertEqual(self.complete("status", "ready", ""), [])
        self.assertEqual(self.complete("status", "--check", "p"), ["products", "prices"])
        (self.folder / "cacheservice.toml").write_text("[[[ no TOML")
        self.assertEqual(self.complete("why", "p"), [])

    def test_other_shells(self) -> None:
        """zsh and fish get a script that names the program and asks it for the words; they check it where they are."""
        for shell in ("zsh", "fish"):
            script = subprocess.run(
                ["cacheservice", "completion", shell],
                check=True, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=LIMIT_S,
            ).stdout  # fmt: skip
            self.assertIn(f"_CACHESERVICE_COMPLETE={shell}_complete", script)
            if (program := shutil.which(shell)) is not None:
                subprocess.run([program, "-n"], check=True, input=script, text=True, timeout=LIMIT_S)
