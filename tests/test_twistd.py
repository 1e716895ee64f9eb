"""Laws of the whole service as operators run it: under twistd, in a process of its own, on the real server."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.process import Signals
from tests.kit.paths import ROOT
from tests.kit.postgres import fresh_database, query, sessions
from tests.kit.waiting import GIVE_UP_S, wait_until

TAC = ROOT / "tac" / "cacheservice.tac"
TWISTD = Path(sys.executable).with_name("twistd")
STOP_LIMIT_S = 5.0  # the contract's

# No two reads give the same, so that each refresh is another generation.
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

# What a .tac may add: a stop that never ends, and somebody who talks.
STUCK = """
from twisted.application.service import Service
from twisted.internet.defer import Deferred
class Stuck(Service):
    def stopService(self):
        return Deferred()
Stuck().setServiceParent(application)
"""
NOISY = """
import warnings
from twisted.application.service import Service
from twisted.internet.defer import fail
from twisted.python import log as legacy
class Noisy(Service):
    def startService(self):
        print("printed")
        warnings.warn("warned")
        legacy.msg("logged")
        fail(ZeroDivisionError("left unhandled"))
Noisy().setServiceParent(application)
"""

# Replaces the C library's clocks, so that a test can turn them at any time. A file holds two numbers of seconds: the
# offset of the wall clock and, if the file is long enough, the time for which the machine was suspended.
CLOCK_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static int (*real_clock_gettime)(clockid_t, struct timespec *);
static volatile long *offset_s;

__attribute__((constructor)) static void prepare(void) {
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int file = open(getenv("CLOCK_OFFSET_FILE"), O_RDONLY);
    offset_s = mmap(NULL, 2 * sizeof(long), PROT_READ, MAP_SHARED, file, 0);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = real_clock_gettime(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += offset_s[0];
    if (clock == CLOCK_BOOTTIME) now->tv_sec += offset_s[1];
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""


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
        """The log, each whole line of which has to be a JSON object."""
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
        with socket.create_connection(self.address, timeout=GIVE_UP_S) as client:
            client.sendall(f"{line}\n".encode())
            with client.makefile("r", encoding="utf-8") as reply:
                return reply.read().removesuffix("\n")

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
        """It ended so, all of its output is log lines, and the last of them tells of the stop."""
        self.assertEqual(daemon.process.returncode, code, daemon.output + daemon.errors)
        self.assertEqual(daemon.errors, "")
        self.assertTrue(daemon.output.endswith("\n"))
        self.assertNotIn("Traceback", daemon.output)
        stopped = daemon.lines[-1]
        self.assertEqual((stopped["event"], stopped["clean"]), ("service_stopped", clean))

    def refused(self, configuration: str, **options: Any) -> list[str]:
        """What it says on standard error when it refuses to start."""
        daemon = self.started(configuration, **options)
        self.assertNotIn(daemon.process.wait(GIVE_UP_S), (0, None))
        self.assertNotIn("Traceback", daemon.output + daemon.errors)
        return daemon.errors.splitlines()

    def tac_with(self, source: str) -> Path:
        """The real .tac with something after it."""
        tac = self.directory / "more.tac"
        tac.write_text(f"exec(compile(open({str(TAC)!r}).read(), {str(TAC)!r}, 'exec'))\n{source}")
        return tac


class StartAndStop(DaemonTestCase):
    def test_it_answers(self) -> None:
        """It starts, loads, answers, and each of its output's lines is JSON with the events of a life."""
        daemon = self.started()
        self.assertEqual(daemon.ask("ruok"), "imok")
        daemon.wait_until_ready()
        everything = daemon.json()
        self.assertEqual(everything["service"]["pid"], daemon.process.pid)
        self.assertEqual((everything["postgres"]["state"], everything["postgres"]["error"]), ("up", None))
        products = everything["datasets"]["products"]
        self.assertEqual((products["state"], products["rows"], products["source"]), ("fresh", 3, "postgres"))
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)
        events = [line["event"] for line in daemon.lines]
        self.assertEqual((events[0], events[-1]), ("service_started", "service_stopped"))
        published = daemon.event("refresh_published")
        self.assertEqual((published["dataset"], published["generation"], published["rows"]), ("products", 1, 3))
        self.assertTrue(all({"time", "level", "event"} <= line.keys() for line in daemon.lines))

    def test_signals_that_end_it(self) -> None:
        """SIGTERM and SIGINT end it in time and in order, by that signal, with a refresh in flight and a client."""
        for number in (signal.SIGTERM, signal.SIGINT):
            daemon = self.started(self.configuration(PRODUCTS, SLOW))
            wait_until(lambda: "slow" in str(sessions(self.server, self.database)), "the slow read")
            with socket.create_connection(daemon.address) as client:
                client.sendall(b"prompt\n")
                daemon.end(number)
            self.assert_ended(daemon, -number)
            wait_until(lambda: not sessions(self.server, self.database), "the end of its sessions")

    def test_a_second_signal(self) -> None:
        """While a stop takes its time, a second signal ends it at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            daemon = self.started(tac=self.tac_with(STUCK))
            daemon.event("service_started")
            daemon.process.send_signal(signal.SIGTERM)
            daemon.event("service_stopped")
            self.assertIsNone(daemon.process.poll())
            self.assertEqual(daemon.end(number), -number)
            self.assertNotIn("Traceback", daemon.output + daemon.errors)

    def test_a_signal_at_the_start(self) -> None:
        """A signal in the first moments, before anything is loaded, ends it as well."""
        daemon = self.started(self.configuration(SLOW))
        daemon.event("service_started")
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_hang_up(self) -> None:
        """SIGHUP does not end it."""
        daemon = self.started()
        daemon.wait_until_ready()
        for _ in range(3):
            daemon.process.send_signal(signal.SIGHUP)
            generation = daemon.generation()
            wait_until(lambda: daemon.generation() > generation, "another generation")  # noqa: B023  # called before it changes
        self.assertEqual(daemon.ask("ruok"), "imok")
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_a_working_directory_that_cannot_be_written(self) -> None:
        """It needs no place to write: it runs in a directory where nobody can make a file."""
        with self.assertRaises(OSError):
            Path("/proc/cacheservice-test").touch()
        daemon = self.started(cwd=Path("/proc"))
        daemon.wait_until_ready()
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_it_leaves_no_file(self) -> None:
        """After a life its working directory holds what it held before."""
        daemon = self.started()
        daemon.wait_until_ready()
        daemon.end()
        self.assertEqual(sorted(os.listdir(self.directory)), ["cacheservice.toml", "stderr", "stdout"])


class AsPidOne(DaemonTestCase):
    BEFORE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

    def setUp(self) -> None:
        if shutil.which("unshare") is None:
            raise SkipTest("needs unshare: apt-get install util-linux")
        tried = subprocess.run([*self.BEFORE, "true"], capture_output=True, text=True, check=False)
        if tried.returncode:
            raise SkipTest(f"may not make a PID namespace; run as root or with --cap-add SYS_ADMIN: {tried.stderr}")
        super().setUp()

    def first_process(self, daemon: Daemon) -> psutil.Process:
        """The process that is number 1 in its namespace."""
        daemon.event("service_started")
        self.assertEqual(daemon.json()["service"]["pid"], 1)
        [process] = psutil.Process(daemon.process.pid).children()
        return process

    def test_it_exits_with_0(self) -> None:
        """As PID 1, as in a container, SIGTERM ends it with exit code 0."""
        daemon = self.started(before=self.BEFORE)
        self.first_process(daemon).terminate()
        daemon.process.wait(STOP_LIMIT_S)
        self.assert_ended(daemon, 0)

    def test_a_second_signal(self) -> None:
        """As PID 1, too, a second signal ends at once a stop that takes its time, with the code a shell would give."""
        daemon = self.started(before=self.BEFORE, tac=self.tac_with(STUCK))
        process = self.first_process(daemon)
        process.terminate()
        daemon.event("service_stopped")
        self.assertTrue(process.is_running())
        process.terminate()
        self.assertEqual(daemon.process.wait(STOP_LIMIT_S), 128 + signal.SIGTERM)


class RefusedStarts(DaemonTestCase):
    def test_a_bad_configuration(self) -> None:
        """Every problem is a line on standard error, and the exit code is not 0."""
        problems = self.refused(
            '[postgres]\ndsn = "postgresql://u:hunter2@h:port/d"\n[status]\nprot = 1\n'
            '[datasets.products]\nquery = "SELECT 1"\ninterval_s = 0\n',
            environ={"CACHESERVICE_LOG__LEVEL": "loud"},
        )
        for start in (
            "CACHESERVICE_LOG__LEVEL: ",
            "cacheservice.toml: postgres.dsn: ",
            "cacheservice.toml: status.prot: ",
            "cacheservice.toml: datasets.products.interval_s: must be greater than 0",
            "cacheservice.toml: datasets.products.key: ",
        ):
            self.assertEqual(len([problem for problem in problems if problem.startswith(start)]), 1, problems)
        self.assertEqual(len(problems), 5)
        self.assertNotIn("hunter2", "\n".join(problems))

    def test_no_configuration(self) -> None:
        """Without any configuration it says what it looked for."""
        problems = self.refused("", environ={"CACHESERVICE_CONFIG": str(self.directory / "absent.toml")})
        self.assertEqual(len(problems), 1)
        self.assertIn("absent.toml: cannot be read: no such file", problems[0])

    def test_a_port_that_is_taken(self) -> None:
        """A port that is taken is one clear line, and the exit code is not 0."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            problems = self.refused(self.configuration(port=port))
        self.assertEqual(
            problems,
            [
                f"cacheservice: status.port: cannot listen on 127.0.0.1:{port}: address already in use; "
                "end what uses it, or set another"
            ],
        )

    def test_a_file_in_the_way_of_the_admin_socket(self) -> None:
        """A file where the admin socket should be is one clear line, and the file stays."""
        path = self.directory / "admin.sock"
        path.write_text("mine")
        problems = self.refused(f'[admin]\nsocket = "{path}"\n{self.configuration()}')
        self.assertEqual(len(problems), 1)
        self.assertIn(f"admin.socket: cannot listen on {path}: address already in use", problems[0])
        self.assertEqual(path.read_text(), "mine")


class TheDatabase(DaemonTestCase):
    def test_down_at_the_start(self) -> None:
        """With the database down it starts, answers that it is not ready, and is ready when the database has come."""
        configuration = self.configuration()
        self.server.stop()
        self.addCleanup(self.server.start)
        daemon = self.started(configuration)
        self.assertEqual(daemon.ask("ruok;ready"), "imok\nnotready products:never_loaded")
        failed = daemon.event("refresh_failed")
        self.assertEqual((failed["dataset"], failed["trigger"], failed["level"]), ("products", "start", "warning"))
        self.assertEqual(daemon.json()["postgres"]["state"], "down")
        self.server.start()
        daemon.wait_until_ready()
        self.assertEqual(daemon.json()["postgres"]["state"], "up")
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_restarted_meanwhile(self) -> None:
        """A restart of the database in the middle leaves it ready with the last good snapshot, and refreshes go on."""
        daemon = self.started()
        daemon.wait_until_ready()
        self.server.stop("immediate")
        self.addCleanup(self.server.start)
        daemon.event("refresh_failed")
        generation = daemon.generation()
        self.assertEqual(daemon.ask("ready"), "ready")
        self.server.start()
        wait_until(lambda: daemon.generation() > generation, "another generation")
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)


class Admin(DaemonTestCase):
    def test_refresh(self) -> None:
        """The admin socket, for its owner alone, starts a refresh at once."""
        path = self.directory / "admin.sock"
        hourly = PRODUCTS.replace("interval_s = 0.3", "interval_s = 3600")
        daemon = self.started(f'[admin]\nsocket = "{path}"\n{self.configuration(hourly)}')
        daemon.wait_until_ready()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"refresh products\n")
            self.assertEqual(client.recv(1000), b"OK products: refresh started\n")
        wait_until(lambda: daemon.generation() == 2, "the second generation")
        self.assertEqual(daemon.json()["datasets"]["products"]["last_attempt"]["trigger"], "manual")
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)
        self.assertFalse(path.exists())


class TheLog(DaemonTestCase):
    def test_console(self) -> None:
        """In console format it is a line an event, for a person."""
        daemon = self.started(self.configuration(log='format = "console"'))
        wait_until(lambda: "refresh_published" in daemon.output, "a refresh")
        daemon.end()
        self.assertEqual((daemon.process.returncode, daemon.errors), (-signal.SIGTERM, ""))
        lines = daemon.output.splitlines()
        self.assertIn("service_started", lines[0])
        self.assertIn("service_stopped", lines[-1])
        for line in lines:
            self.assertRegex(line, r"^\d{4}-\d\d-\d\dT[\d:.]+Z \[\w+ *\] \w+")

    def test_all_that_others_say(self) -> None:
        """What is printed, warned of, logged by Twisted or left unhandled is JSON lines as all the rest."""
        daemon = self.started(self.configuration(log='level = "debug"'), tac=self.tac_with(NOISY))
        daemon.wait_until_ready()
        daemon.end()
        self.assertEqual((daemon.process.returncode, daemon.errors), (-signal.SIGTERM, ""))
        said = {line["message"]: line for line in daemon.lines if line["event"] == "twisted_event"}
        self.assertIn("printed", said)
        self.assertIn("logged", said)
        warned = [line for message, line in said.items() if "UserWarning: warned" in message]
        self.assertEqual([line["level"] for line in warned], ["warning"])
        unhandled = [line for line in said.values() if line.get("error") == "ZeroDivisionError: left unhandled"]
        self.assertEqual([line["level"] for line in unhandled], ["critical"])

    def test_nobody_reads_it(self) -> None:
        """When nobody reads its log it goes on as ever: it answers, refreshes, and ends in time."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
        often = PRODUCTS.replace("interval_s = 0.3", "interval_s = 0.02")
        daemon = self.started(self.configuration(often, log='level = "debug"', port=port), stdout=write_end)
        os.close(write_end)

        def generation() -> int:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=GIVE_UP_S) as client:
                    client.sendall(b"json\n")
                    with client.makefile() as reply:
                        number: int = json.load(reply)["datasets"]["products"]["generation"]
                        return number
            except ConnectionRefusedError:
                return 0

        # Each generation is a line of more than 200 bytes, so this is many times what the pipe holds.
        wait_until(lambda: generation() > 100, "a hundred generations")
        self.assertEqual(daemon.end(), -signal.SIGTERM)
        self.assertEqual(daemon.errors, "")


class Time(DaemonTestCase):
    def setUp(self) -> None:
        self.compiler = shutil.which("gcc") or shutil.which("cc")
        if self.compiler is None:
            raise SkipTest("needs a C compiler to turn the clock: apt-get install gcc libc6-dev")
        super().setUp()

    def with_clocks(self, configuration: str) -> tuple[Daemon, Callable[..., None]]:
        """Start a service; return it with a function that sets its wall clock's offset and its suspended seconds."""
        assert self.compiler is not None
        source, shim, offsets = (self.directory / name for name in ("shim.c", "shim.so", "offset"))
        source.write_text(CLOCK_SHIM)
        subprocess.run([self.compiler, "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
        offsets.write_bytes(bytes(16))
        daemon = self.started(configuration, environ={"LD_PRELOAD": str(shim), "CLOCK_OFFSET_FILE": str(offsets)})
        daemon.wait_until_ready()

        def turn(*seconds: int) -> None:
            with offsets.open("r+b") as file:
                file.write(b"".join(each.to_bytes(8, sys.byteorder, signed=True) for each in seconds))

        return daemon, turn

    def test_a_suspended_machine(self) -> None:
        """Ages include the time for which the machine was suspended, and a refresh that is due starts at once."""
        declared = PRODUCTS.replace("interval_s = 0.3", "interval_s = 3600").replace(
            "max_age_s = 600", "max_age_s = 4000"
        )
        daemon, turn = self.with_clocks(self.configuration(declared))
        turn(1000, 1000)
        self.assertGreater(daemon.json()["datasets"]["products"]["age_s"], 1000)
        self.assertEqual(daemon.generation(), 1)
        turn(4000, 4000)
        wait_until(lambda: daemon.generation() > 1, "the refresh that was due")
        self.assertLess(daemon.json()["datasets"]["products"]["age_s"], GIVE_UP_S)
        self.assertEqual(daemon.end(), -signal.SIGTERM)

    def test_the_wall_clock_set_back(self) -> None:
        """A wall clock set back an hour, and forth again, delays no refresh and changes no age."""
        daemon, turn = self.with_clocks(self.configuration())
        day = daemon.json()["datasets"]["products"]["last_attempt"]["started_at"]
        for offset_s in (-3600, 7200):
            turn(offset_s, 0)
            generation = daemon.generation()
            wait_until(lambda: daemon.generation() > generation + 3, "three more generations")  # noqa: B023
            products = daemon.json()["datasets"]["products"]
            self.assertEqual((daemon.ask("ready"), products["state"]), ("ready", "fresh"))
            self.assertLess(products["age_s"], GIVE_UP_S)
            self.assertLess(products["next_refresh_in_s"], 1)
            # The shim did turn the clock that the service shows to people.
            self.assertEqual(products["last_attempt"]["started_at"] < day, offset_s < 0)
        self.assertLess(daemon.json()["service"]["uptime_s"], 3 * GIVE_UP_S)
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)


class EarlySignals(SynchronousTestCase):
    def test_sigterm_before_the_reactor_runs(self) -> None:
        """A SIGTERM that comes before there is anybody to stop in order stops in order as soon as there is."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        started: list[Callable[[], None]] = []
        stopped: list[int] = []

        class Reactor:
            callWhenRunning = started.append

        signals = Signals(Reactor(), Deferred, lambda: None, None)
        signals.startService()
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))  # as the reactor does when it starts
        self.assertEqual(stopped, [])
        for call in started:
            call()
        self.assertEqual(stopped, [signal.SIGTERM])


class Secrets(DaemonTestCase):
    QUESTIONS = "status;json;mntr;show products;why products;help;version;ready"

    def all_said(self, daemon: Daemon) -> str:
        replies = daemon.ask(self.QUESTIONS)
        process = psutil.Process(daemon.process.pid)
        said = replies + " ".join(process.cmdline()) + process.name()
        daemon.end()
        return said + daemon.output + daemon.errors

    def test_the_password(self) -> None:
        """The password is in no output, no reply and no process list, at the most talkative level."""
        dsn = self.server.dsn(database=self.database)
        password = dsn.split(":")[2].split("@")[0]
        daemon = self.started(self.configuration(log='level = "debug"'))
        daemon.wait_until_ready()
        said = self.all_said(daemon)
        self.assertNotIn(password, said)
        self.assertNotIn(dsn.partition("@")[2], said)

    def test_a_wrong_password(self) -> None:
        """A wrong password is told as such, in the log and in the status, and not shown."""
        dsn = self.server.dsn(password="hunter2-is-wrong", database=self.database)
        daemon = self.started(self.configuration(dsn=dsn, log='level = "debug"'))
        failed = daemon.event("refresh_failed")
        self.assertIn("password authentication failed", failed["error"])
        self.assertIn("password authentication failed", daemon.json()["postgres"]["error"])
        self.assertNotIn("hunter2", self.all_said(daemon))

    def test_from_a_file(self) -> None:
        """The DSN may come from a file that the environment names; neither is said anywhere."""
        secret = self.directory / "dsn"
        secret.write_text(self.server.dsn(database=self.database) + "\n")
        without = self.configuration().partition("[status]")[2]
        daemon = self.started(f"[status]{without}", environ={"CACHESERVICE_POSTGRES__DSN_FILE": str(secret)})
        daemon.wait_until_ready()
        password = secret.read_text().split(":")[2].split("@")[0]
        self.assertNotIn(password, self.all_said(daemon))

    def test_rows(self) -> None:
        """No row is in any output or reply."""
        query(self.server, self.database, "CREATE TABLE t AS SELECT 1 AS id, 'secret-row' AS name")
        daemon = self.started(self.configuration('[datasets.products]\nquery = "SELECT * FROM t"\nkey = "id"\n'))
        daemon.wait_until_ready()
        self.assertNotIn("secret-row", self.all_said(daemon))
