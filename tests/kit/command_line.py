"""Test cases of the programs that ask a service."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.ports import free_port
from tests.kit.postgres import query
from tests.kit.terminal import Terminal
from tests.kit.waiting import GIVE_UP_S, wait_until

ITEMS = """
[datasets.items]
query = "SELECT id, name FROM items"
key = "id"
interval_s = 0.3
timeout_s = 2
max_age_s = 2.5
retry_initial_s = 0.1
retry_max_s = 0.2
"""
GOOD = """
[datasets.good]
query = "SELECT 1 AS id"
key = "id"
interval_s = 0.3
max_age_s = 600
"""


class CommandLine(DaemonTestCase):
    """A service with some datasets, and programs that ask it, which find it by its configuration file."""

    def setUp(self) -> None:
        super().setUp()
        self.port = free_port()
        query(
            self.server,
            self.database,
            "CREATE TABLE items AS SELECT n AS id, 'n' AS name FROM generate_series(1, 10) n",
        )

    def environment(self, **more: str) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CACHESERVICE_", "PG", "COLUMNS", "NO_COLOR", "FORCE_COLOR"))
        }
        return {**inherited, "TERM": "xterm-256color", "LANG": "C.UTF-8", **more}

    def service(self, *tables: str) -> Daemon:
        return self.started(self.configuration(*tables, port=self.port))

    def command(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cacheservice", *arguments],
            check=False,
            cwd=self.directory,
            env=self.environment(**environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIVE_UP_S,
        )

    def succeed(self, *arguments: str, **environ: str) -> str:
        finished = self.command(*arguments, **environ)
        self.assertEqual((finished.returncode, finished.stderr), (0, ""))
        return finished.stdout

    def terminal(self, *arguments: str, columns: int = 80, **environ: str) -> Terminal:
        terminal = Terminal(
            [sys.executable, "-m", "cacheservice", *arguments],
            cwd=self.directory,
            environ=self.environment(**environ),
            columns=columns,
        )
        self.addCleanup(terminal.close)
        return terminal

    def lose_items(self, daemon: Daemon) -> None:
        """From now on the query of `items` fails; wait until its last good snapshot is expired."""
        query(self.server, self.database, "ALTER TABLE items RENAME TO gone")
        wait_until(lambda: daemon.json()["datasets"]["items"]["state"] == "expired", "items to expire")
