"""Laws of the command line and of the wheel, run as a user runs them: as programs, in an empty folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import redis
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cli.demo_texts import quoted
from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.paths import ROOT
from tests.kit.postgres import fresh_database, query
from tests.kit.status import ask

LIMIT_S = 120  # for what takes seconds on a quiet machine


@pytest.fixture(scope="session")
def unpacked_wheel() -> object:
    """A folder that holds what the wheel holds, and nothing of the checkout."""
    folder = Path(tempfile.mkdtemp(prefix="cacheservice-wheel-"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder / "wheel")], check=True
    )
    (wheel,) = (folder / "wheel").iterdir()
    subprocess.run(
        [*pip, "install", str(wheel), "--no-deps", "--no-index", "--target", str(folder / "lib")], check=True
    )
    yield folder / "lib"
    shutil.rmtree(folder)


def is_alive(process: psutil.Process) -> bool:
    """Return whether it runs; a process whose parent was killed may not have been reaped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


class FromTheWheel(SynchronousTestCase):
    """Everything here runs from the wheel, in an empty folder."""

    lib: Path
    server: EmbeddedPostgres

    @pytest.fixture(autouse=True)
    def wheel(self, unpacked_wheel: Path, postgres_server: EmbeddedPostgres) -> None:
        self.lib, self.server = unpacked_wheel, postgres_server

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cacheservice-empty-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def environment(self, **more: str) -> dict[str, str]:
        # The wheel comes before the checkout that the tests' environment may have installed.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        return clean | {"PYTHONPATH": str(self.lib)} | more

    def run_program(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cacheservice", *arguments],
            check=False,
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )


class Commands(FromTheWheel):
    def test_it_is_the_wheel_that_runs(self) -> None:
        """These tests exercise the wheel, not the checkout."""
        where = subprocess.run(
            [sys.executable, "-c", "import cacheservice; print(cacheservice.__file__)"],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        self.assertTrue(where.startswith(str(self.lib)), where)

    def test_the_dashboard_comes_along(self) -> None:
        """Each file of the dashboard is in the wheel."""
        folder = Path("cacheservice") / "ports" / "http" / "dashboard"
        shipped = {file.name: file.read_bytes() for file in (self.lib / folder).iterdir()}
        self.assertEqual(shipped, {file.name: file.read_bytes() for file in (ROOT / folder).iterdir()})
        self.assertIn("index.html", shipped)

    def test_help_names_the_commands(self) -> None:
        """--help teaches every command."""
        ended = self.run_program("--help")
        self.assertEqual(ended.returncode, 0)
        for command in ("run", "check", "migrate", "status", "demo"):
            self.assertRegex(ended.stdout, rf"(?m)^  {command} ")

    def test_check_reports_every_problem(self) -> None:
        """A bad configuration is reported on standard error, one line per problem, exit code 1, no traceback."""
        (self.folder / "cacheservice.toml").write_text(
            '[postgres]\ndsn = "x"\n[datasets.d]\nquery = "SELECT 1"\nkee = "a"'
        )
        ended = self.run_program("check")
        self.assertEqual((ended.returncode, ended.stdout), (1, ""))
        self.assertIn("cacheservice.toml: postgres.dsn: not a libpq connection string", ended.stderr)
        self.assertIn('cacheservice.toml: datasets.d.kee: unknown key; did you mean "key"?', ended.stderr)
        self.assertNotIn("Traceback", ended.stderr)

    def test_migrate_run_and_status(self) -> None:
        """From an empty folder: the database is prepared, the service runs as the reader, and reports that."""
        database = fresh_database(self.server, self.addCleanup)
        query(self.server, database, "CREATE TABLE items AS SELECT generate_series(1, 10) AS id")
        ended = self.run_program(
            "migrate",
            "--reader",
            "wheel_reader",
            "--select",
            "items",
            CACHESERVICE_MIGRATE_DSN=self.server.dsn(database=database),
            CACHESERVICE_READER_PASSWORD="hidden-word",
        )
        self.addCleanup(query, self.server, "postgres", "DROP ROLE wheel_reader")
        self.addCleanup(query, self.server, database, "DROP OWNED BY wheel_reader")
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertIn("applied 0001_schema", ended.stdout)
        (self.folder / "dsn").write_text(self.server.dsn("wheel_reader", "hidden-word", database) + "\n")
        (self.folder / "cacheservice.toml").write_text(
            "[status]\nport = 0\n[resp]\nport = 0\n[http]\nport = 0\n"
            '[datasets.items]\nquery = "SELECT * FROM items"\nkey = "id"\ninterval_s = 1\n'
        )
        with subprocess.Popen(
            [sys.executable, "-m", "cacheservice", "run"],
            cwd=self.folder,
            env=self.environment(CACHESERVICE_POSTGRES__DSN_FILE="dsn"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as service:
            try:
                assert service.stdout is not None
                lines = [json.loads(service.stdout.readline())]
                while lines[-1]["event"] != "refresh_published":
                    lines.append(json.loads(service.stdout.readline()))
                started = next(line for line in lines if line["event"] == "service_started")
                host, port = started["status"].split(":")
                ended = self.run_program("status", "--host", host, "--port", port)
                self.assertEqual(ended.returncode, 0, ended.stderr)
                self.assertRegex(ended.stdout, r"(?m)^items +fresh ")
                self.assertEqual(self.run_program("status", "--port", port, "ready").stdout, "ready\n")
                self.assertEqual(self.run_program("status", "--port", port, "nonsense").returncode, 1)
            finally:
                service.terminate()
                rest, _ = service.communicate(timeout=LIMIT_S)
        self.assertEqual(service.returncode, -signal.SIGTERM)
        self.assertEqual(json.loads(rest.splitlines()[-1])["event"], "service_stopped")
        self.assertNotIn("hidden-word", rest)

    def test_a_password_in_the_arguments_is_refused(self) -> None:
        """What would show in the process list is refused, and not repeated."""
        ended = self.run_program("migrate", "--dsn", "postgresql://me:hidden-word@127.0.0.1/x")
        self.assertEqual(ended.returncode, 2)
        self.assertIn("process list", ended.stderr)
        self.assertNotIn("hidden-word", ended.stderr + ended.stdout)

    def test_a_password_file_that_is_not_there(self) -> None:
        """It is one line that names the variable as it is written."""
        database = fresh_database(self.server, self.addCleanup)
        ended = self.run_program(
            "migrate",
            "--reader",
            "any_reader",
            CACHESERVICE_MIGRATE_DSN=self.server.dsn(database=database),
            CACHESERVICE_READER_PASSWORD_FILE="hidden-word",
        )
        self.assertEqual(
            (ended.returncode, ended.stderr),
            (
                2,
                "cacheservice migrate: CACHESERVICE_READER_PASSWORD_FILE: the file that it names cannot be read: "
                "no such file. See: cacheservice migrate --help\n",
            ),
        )

    def test_the_source_of_a_dsn_is_named(self) -> None:
        """An error about a DSN names the variable, the option or the setting that it comes from."""
        bad = {"CACHESERVICE_MIGRATE_DSN": "nonsense"}
        ended = self.run_program("migrate", **bad)
        self.assertRegex(
            ended.stderr, r"^cacheservice migrate: CACHESERVICE_MIGRATE_DSN: not a libpq connection string;"
        )
        ended = self.run_program("migrate", "--dsn", "nonsense", **bad)
        self.assertRegex(ended.stderr, r"^cacheservice migrate: --dsn: not a libpq connection string;")
        missing = self.server.dsn(database="no_such_database")
        steps = {
            "CACHESERVICE_MIGRATE_DSN": "check the database's name in CACHESERVICE_MIGRATE_DSN",
            "CACHESERVICE_POSTGRES__DSN": "check the database's name in CACHESERVICE_POSTGRES__DSN",
        }
        (self.folder / "cacheservice.toml").write_text('[datasets.d]\nquery = "SELECT 1 AS id"\nkey = "id"')
        for variable, step in steps.items():
            for command in (
                ("migrate", "--reader", "any_reader"),
                ("watch", "t", "--key", "id"),
                ("unwatch", "t"),
            ):
                ended = self.run_program(*command, **{variable: missing})
                self.assertEqual(ended.returncode, 1)
                self.assertRegex(ended.stderr, rf"database \"no_such_database\" does not exist; {step}\n$")
        (self.folder / "cacheservice.toml").unlink()
        ended = self.run_program("migrate")
        self.assertEqual(ended.returncode, 1)
        self.assertEqual(
            ended.stderr,
            "cacheservice.toml: not found in the working directory; create it, "
            "or name another file in CACHESERVICE_CONFIG\n"
            "CACHESERVICE_MIGRATE_DSN: not set, so the configuration was read for postgres.dsn; "
            "set the variable, or fix the configuration\n",
        )

    def test_a_list_with_commas(self) -> None:
        """An option that is repeated does not take a list, and its error reports how to write it."""
        database = fresh_database(self.server, self.addCleanup)
        dsn = {"CACHESERVICE_MIGRATE_DSN": self.server.dsn(database=database)}
        ended = self.run_program("migrate", "--reader", "any_reader", "--select", "a,b", **dsn)
        self.assertEqual(
            (ended.returncode, ended.stderr),
            (
                2,
                "cacheservice migrate: --select a,b: a name does not contain a comma; repeat --select for each table. "
                "See: cacheservice migrate --help\n",
            ),
        )
        self.assertEqual(query(self.server, database, "SELECT FROM pg_namespace WHERE nspname = 'cacheservice'"), [])
        self.assertEqual(self.run_program("migrate", **dsn).returncode, 0)
        query(self.server, database, "CREATE TABLE t (a int, b int)")
        ended = self.run_program("watch", "t", "--key", "a,b", **dsn)
        self.assertEqual(ended.returncode, 1)
        self.assertIn('"t" has no column a,b; it has a, b, and --key is repeated for each column', ended.stderr)

    def test_a_reader_without_a_password(self) -> None:
        """A new role without a password is reported, with how to set one; one that has a password is not."""
        database = fresh_database(self.server, self.addCleanup)
        name = f"reader of {database}"
        for statement in (f'DROP ROLE "{name}"', f'DROP OWNED BY "{name}"'):  # from the last one
            self.addCleanup(query, self.server, database, statement)
        dsn = {"CACHESERVICE_MIGRATE_DSN": self.server.dsn(database=database)}
        ended = self.run_program("migrate", "--reader", name, CACHESERVICE_READER_PASSWORD="", **dsn)
        self.assertEqual(ended.returncode, 2)
        self.assertIn("CACHESERVICE_READER_PASSWORD: the password is empty", ended.stderr)
        for _ in range(2):
            ended = self.run_program("migrate", "--reader", name, **dsn)
            self.assertEqual(ended.returncode, 0, ended.stderr)
            self.assertIn(
                "it has no password yet, and cannot log in if the server requires one; set one with "
                f'\\password "{name}" in psql, or run this command again with CACHESERVICE_READER_PASSWORD or '
                "CACHESERVICE_READER_PASSWORD_FILE\n",
                ended.stdout,
            )
        for password in ({"CACHESERVICE_READER_PASSWORD": "hidden-word"}, {}):
            ended = self.run_program("migrate", "--reader", name, **dsn, **password)
            self.assertEqual(ended.returncode, 0, ended.stderr)
            self.assertNotIn("no password", ended.stdout)

    def test_no_service_is_one_line(self) -> None:
        """A question where nobody listens gets one line with what to do."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            ended = self.run_program("status", "--port", str(unused.getsockname()[1]))
        self.assertEqual(ended.returncode, 1)
        self.assertRegex(
            ended.stderr, r"^cacheservice: no answer from 127\.0\.0\.1:\d+: .*; is the service running\?\n$"
        )


class Demo(FromTheWheel):
    def start(self, *arguments: str) -> subprocess.Popen[str]:
        for number in (signal.SIGINT, signal.SIGQUIT):
            # Tests that run in a shell's background ignore them, and so would the demo.
            before = signal.signal(number, signal.SIG_DFL if number == signal.SIGQUIT else signal.default_int_handler)
            self.addCleanup(signal.signal, number, before)
        demo = subprocess.Popen(
            [sys.executable, "-u", "-m", "cacheservice", "demo", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.addCleanup(demo.communicate)
        self.addCleanup(lambda: demo.poll() is None and demo.kill())
        return demo

    def read_until(self, demo: subprocess.Popen[str], ending: str) -> str:
        assert demo.stdout is not None
        text = ""
        while ending not in text:
            line = demo.stdout.readline()
            self.assertTrue(line, f"the demo ended before it printed {ending!r}:\n{text}")
            text += line
        return text

    def test_words_for_a_shell(self) -> None:
        """What the demo prints is one word to a shell, whatever is in the path."""
        for word in ("plain", "a b", "host='/a b/c' port=1", "it's", 'say "x"', "$HOME", "`id`"):
            ended = subprocess.run(["/bin/sh", "-c", f"printf %s {quoted(word)}"], capture_output=True, check=True)
            self.assertEqual(ended.stdout.decode(), word)

    def test_the_demo_lives_breaks_recovers_and_leaves_nothing(self) -> None:
        """A taken port is replaced, data change, a crash of the database is survived, Ctrl-C leaves no process."""
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind(("127.0.0.1", 8000))
                taken.listen()
            except OSError:
                pass  # taken by somebody else already, which is as good
            demo = self.start()
            output = self.read_until(demo, "Ctrl-C stops everything.")
        self.assertIn("Port 8000 is taken", output)
        port = int(re.search(r"the status port is (\d+) instead", output)[1])
        postmaster = int(re.search(r"kill -QUIT (\d+)", output)[1])
        family = psutil.Process(demo.pid).children(recursive=True)
        self.assertIn(postmaster, [process.pid for process in family])
        datasets = json.loads(ask(("127.0.0.1", port), "json"))["datasets"]
        self.assertGreaterEqual(sum(dataset["rows"] for dataset in datasets.values()), 50_000)

        # The example of docs/reading.md has the documented result.
        page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
        (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
        resp_port = re.search(r"redis-cli -p (\d+)", output)[1]
        read: dict[str, object] = {}
        exec(example.replace("6380", resp_port), read)
        self.assertEqual(read["product"]["id"], 42)
        self.assertEqual([price["currency"] for price in read["prices"]], ["EUR", "USD"])
        self.assertEqual(len(read["flags"]), 40)
        read["cache"].close()

        os.kill(postmaster, signal.SIGQUIT)
        self.read_until(demo, "PostgreSQL has ended")
        self.assertEqual(ask(("127.0.0.1", port), "ruok"), "imok")
        self.assertGreater(json.loads(ask(("127.0.0.1", port), "json"))["datasets"]["products"]["rows"], 0)
        self.read_until(demo, "PostgreSQL is running again")
        generation = json.loads(ask(("127.0.0.1", port), "json"))["datasets"]["products"]["generation"]
        limit = time.monotonic() + LIMIT_S
        while json.loads(ask(("127.0.0.1", port), "json"))["datasets"]["products"]["generation"] == generation:
            self.assertLess(time.monotonic(), limit, "the service did not recover")
            time.sleep(0.2)

        family += psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=LIMIT_S)
        self.assertEqual(demo.returncode, 130, rest)
        self.assertNotIn("Traceback", output + rest)
        self.assertEqual([process for process in family if process.is_running()], [])
        directory = re.search(r"embedded PostgreSQL in (\S+)", output)[1]
        self.assertFalse(Path(directory).exists())

    def test_a_fleet_outlives_its_leader(self) -> None:
        """Three services serve the same generations; another leads after a kill -9, and Ctrl-C leaves no process."""
        demo = self.start("--fleet")
        output = self.read_until(demo, "Ctrl-C stops everything.")
        rows = re.findall(r"^  service-\d +(\d+) +(\d+) +(\d+) +(\d+)$", output, re.M)
        pids, status_ports, resp_ports, _ = zip(*(map(int, row) for row in rows), strict=True)
        self.assertEqual(len(pids), 3)
        family = psutil.Process(demo.pid).children(recursive=True)
        for pid in pids:
            self.assertGreaterEqual(len(psutil.Process(pid).children()), 2, "workers")
        self.newest_everywhere(status_ports, 1)
        for port in resp_ports:
            self.assertIn(b'"id":42', self.get(port, "products:42") or b"")

        generation = self.generation(status_ports[1])
        os.kill(pids[0], signal.SIGKILL)
        self.newest_everywhere(status_ports[1:], generation + 2)
        self.assertIsNotNone(self.get(resp_ports[1], "products:42"))
        self.read_until(demo, "service-1 is running again")
        self.newest_everywhere(status_ports, self.generation(status_ports[1]))

        family += psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=LIMIT_S)
        self.assertEqual(demo.returncode, 130, rest)
        self.assertNotIn("Traceback", output + rest)
        self.assertEqual([process for process in family if is_alive(process)], [])
        directory = re.search(r"embedded PostgreSQL in (\S+)", output)[1]
        self.assertFalse(Path(directory).exists())

    def get(self, port: int, key: str) -> bytes | None:
        with redis.Redis(port=port) as client:
            return client.get(key)

    def generation(self, port: int) -> int:
        return json.loads(ask(("127.0.0.1", port), "json"))["datasets"]["products"]["generation"] or 0

    def newest_everywhere(self, ports: Sequence[int], least: int) -> None:
        """Wait until each service has at least a generation."""
        limit = time.monotonic() + LIMIT_S
        for port in ports:
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    if self.generation(port) >= least:
                        break
                self.assertLess(time.monotonic(), limit, f"generation {least} did not arrive at {port}")
                time.sleep(0.2)
