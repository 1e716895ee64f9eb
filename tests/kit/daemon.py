"""The whole service as operators run it, under twistd, on the real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit import status
from tests.kit.paths import ROOT
from tests.kit.postgres import fresh_database
from tests.kit.waiting import GIVE_UP_S, wait_until

TAC = ROOT / "tac" / "cacheservice.tac"
TWISTD = Path(sys.executable).with_name("twistd")
STOP_LIMIT_S = 5.0  # the contract's


# No two reads return the same, so that each refresh is another generation.
PRODUCTS = """
[datasets.products]
query = "SELECT id, 'row ' || id AS name, clock_timestamp() AS read_at FROM generate_series(1, 3) AS id"
key = "id"
interval_s = 0.3
max_age_s = 600
retry_initial_s = 0.1
retry_max_s = 0.3
"""
SLOW = """
[datasets.slow]
query = "SELECT 1 AS id FROM pg_sleep(600)"
key = "id"
timeout_s = 600
"""
# Each refresh reads the same, and is over at once.
QUICK = """
[datasets.products]
query = "SELECT 1 AS id"
key = "id"
interval_s = 0.3
retry_initial_s = 0.1
retry_max_s = 0.3
max_age_s = 600
"""
# What comes before the command of a service that may open few files.
OPEN_FILES = ("sh", "-c", 'ulimit -n 100; exec "$0" "$@"')


class Daemon:
    """One twistd in `directory`, which holds its configuration and gets its output."""

    def __init__(
        self,
        directory: Path,
        configuration: str,
        *,
        tac: Path = TAC,
        before: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: int | None = None,
    ) -> None:
        (directory / "cacheservice.toml").write_text(configuration)
        self._output, self._errors = directory / "stdout", directory / "stderr"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CACHESERVICE_", "PG"))}
        named = {"CACHESERVICE_CONFIG": str(directory / "cacheservice.toml")} if cwd is not None else {}
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*before, str(TWISTD), "-noy", str(tac), "--pidfile="],
                cwd=cwd or directory,
                env={**inherited, "PYTHONPATH": str(ROOT), **named, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=errors,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log. Each complete line must be a JSON object."""
        whole, _, _ = self.output.rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def event(self, name: str) -> dict[str, Any]:
        """Wait for a line of the log."""

        def found() -> dict[str, Any] | None:
            if self.process.poll() is not None:
                lines = self.lines
                assert name in [line["event"] for line in lines], f"it ended: {self.errors}{self.output}"
            return next((line for line in self.lines if line["event"] == name), None)

        line: dict[str, Any] = wait_until(found, name)
        return line

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.event("service_started")["status"].rpartition(":")
        return host, int(port)

    def ask(self, line: str) -> str:
        return status.ask(self.address, line)

    def json(self) -> dict[str, Any]:
        everything: dict[str, Any] = json.loads(self.ask("json"))
        return everything

    def generation(self) -> int:
        number: int = self.json()["datasets"]["products"]["generation"]
        return number

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.ask("ready") == "ready", "readiness")

    def end(self, number: signal.Signals = signal.SIGTERM, limit_s: float = STOP_LIMIT_S) -> int:
        """Send a signal; the code it ends with, which has to be soon."""
        self.process.send_signal(number)
        return self.process.wait(limit_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()


@pytest.mark.usefixtures("server")
class DaemonTestCase(SynchronousTestCase):
    server: EmbeddedPostgres

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.database = fresh_database(self.server, self.addCleanup)

    def configuration(self, *tables: str, dsn: str | None = None, log: str = "", port: int = 0) -> str:
        dsn = dsn or self.server.dsn(database=self.database)
        return (
            f'[postgres]\ndsn = "{dsn}"\n[status]\nport = {port}\n[resp]\nport = 0\n[http]\nport = 0\n[log]\n{log}\n'
            + "".join(tables or (PRODUCTS,))
        )

    def started(self, configuration: str | None = None, **options: Any) -> Daemon:
        daemon = Daemon(self.directory, self.configuration() if configuration is None else configuration, **options)
        self.addCleanup(daemon.kill)
        return daemon

    def assert_ended(self, daemon: Daemon, code: int, *, clean: bool = True) -> None:
        """It ended so, all of its output is log lines, and the last of them is about the stop."""
        self.assertEqual(daemon.process.returncode, code, daemon.output + daemon.errors)
        self.assertEqual(daemon.errors, "")
        self.assertTrue(daemon.output.endswith("\n"))
        self.assertNotIn("Traceback", daemon.output)
        stopped = daemon.lines[-1]
        self.assertEqual((stopped["event"], stopped["clean"]), ("service_stopped", clean))

    def refused(self, configuration: str, **options: Any) -> list[str]:
        """Its output on standard error when it refuses to start."""
        daemon = self.started(configuration, **options)
        self.assertNotIn(daemon.process.wait(GIVE_UP_S), (0, None))
        self.assertNotIn("Traceback", daemon.output + daemon.errors)
        return daemon.errors.splitlines()

    def admin(self, line: str) -> str:
        """Return the reply of the admin socket, which is configured in `directory`."""
        return status.ask(self.directory / "admin", line)

    def tac_with(self, source: str) -> Path:
        """The real .tac with something after it."""
        tac = self.directory / "more.tac"
        tac.write_text(f"exec(compile(open({str(TAC)!r}).read(), {str(TAC)!r}, 'exec'))\n{source}")
        return tac
