"""Laws of the whole service as operators run it: under twistd, in a process of its own, on the real server."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cacheservice.app.signals import Signals
from tests.kit import clock_shim
from tests.kit.clock_shim import ClockShim
from tests.kit.daemon import PRODUCTS, SLOW, STOP_LIMIT_S, Daemon, DaemonTestCase
from tests.kit.ports import free_port
from tests.kit.postgres import query, sessions
from tests.kit.waiting import GIVE_UP_S, wait_until

# What a .tac may add: a stop that never ends, and a client that talks.
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
        """As PID 1, too, a second signal ends a slow stop at once, with the code that a shell would return."""
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
        """Without any configuration it reports where it looked."""
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
        """When nobody reads its log it goes on as usual: it answers, refreshes, and ends in time."""
        port = free_port()
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
        if clock_shim.COMPILER is None:
            raise SkipTest(clock_shim.NEEDED)
        super().setUp()

    def with_clocks(self, configuration: str) -> tuple[Daemon, Callable[..., None]]:
        """Start a service; return it with a function that sets its wall clock's offset and its suspended seconds."""
        clocks = ClockShim(self.directory)
        daemon = self.started(configuration, environ=clocks.environ)
        daemon.wait_until_ready()
        return daemon, clocks.turn

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
        """A wrong password is reported as such, in the log and in the status, and not shown."""
        dsn = self.server.dsn(password="hunter2-is-wrong", database=self.database)
        daemon = self.started(self.configuration(dsn=dsn, log='level = "debug"'))
        failed = daemon.event("refresh_failed")
        self.assertIn("password authentication failed", failed["error"])
        self.assertIn("password authentication failed", daemon.json()["postgres"]["error"])
        self.assertNotIn("hunter2", self.all_said(daemon))

    def test_from_a_file(self) -> None:
        """The DSN may come from a file that the environment names; neither is shown anywhere."""
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
