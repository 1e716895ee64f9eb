"""Laws of `cacheservice status` and `why`, run as programs against a service on the real server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping

from cacheservice.base import shipped
from cacheservice.cli.options import QUESTIONS
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch
from tests.kit.command_line import GOOD, ITEMS, CommandLine
from tests.kit.ports import free_port
from tests.kit.postgres import query
from tests.kit.standby import running_standby
from tests.kit.terminal import Terminal
from tests.kit.waiting import GIVE_UP_S, wait_until

# The planner expects 100 rows a call of generate_series, which come one in 20 ms.
SLOW = """
[datasets.slow]
query = "SELECT a AS id, pg_sleep(0.02)::text AS slept FROM generate_series(1, 100000) AS a"
key = "id"
interval_s = 600
timeout_s = 600
required = false
"""
_PERFORMANCE = re.compile(r"(\w+)=(U|-?[\d.]+)([a-zA-Z%]*);([\d.]*);([\d.]*);([\d.]*)(?:;([\d.]*))?")


class BrokenFile(CommandLine):
    """The service runs with its old configuration, and the file on disk cannot be read."""

    def test_each_command_names_the_file(self) -> None:
        """A command that does not know the port names the file, its line and the option; exit code 2."""
        self.service(GOOD).wait_until_ready()
        file = self.directory / "cacheservice.toml"
        good = file.read_text()
        cases = (
            (good.replace("[status]", "[status"), r"cacheservice\.toml: line 3, column \d+: .*; close the .* with \]"),
            (
                good.replace(f"port = {self.port}", 'port = "x"'),
                r"cacheservice\.toml: status\.port: must be a whole num",
            ),
        )
        for text, problem in cases:
            file.write_text(text)
            for command in (("status",), ("status", "ready"), ("status", "--json"), ("why",), ("tail",)):
                told = self.command(*command)
                self.assertEqual((told.returncode, told.stdout), (2, ""), command)
                self.assertRegex(told.stderr, rf"^{problem}.*; the status port is not known: use --port \(and --host\)")
                self.assertEqual(told.stderr.count("\n"), 1)
            told = self.command("status", "--check")
            self.assertEqual(told.returncode, 3)
            self.assertRegex(told.stdout, rf"^CACHESERVICE UNKNOWN - {problem}.*use --port")

    def test_the_options_work(self) -> None:
        """With --port, or the port in the environment, the commands work as usual."""
        self.service(GOOD).wait_until_ready()
        (self.directory / "cacheservice.toml").write_text("[[[")
        port = str(self.port)
        self.assertIn("good", self.succeed("status", "--port", port))
        self.assertIn("good", self.succeed("status", CACHESERVICE_STATUS__PORT=port))
        self.assertIn("Nothing is wrong", self.succeed("why", "--port", port))
        self.assertEqual(self.command("status", "--check", "--port", port).returncode, 0)

    def test_a_missing_file(self) -> None:
        """One that is named is reported; without any, no answer from the default port points to the configuration."""
        told = self.command("status", CACHESERVICE_CONFIG="nowhere.toml")
        self.assertEqual(told.returncode, 2)
        self.assertRegex(
            told.stderr, r"^nowhere\.toml: cannot be read: no such file; the status port is not known: use "
        )
        told = self.command("status", CACHESERVICE_STATUS__PORT="0")
        self.assertEqual(told.returncode, 2)
        self.assertRegex(told.stderr, r"^status\.port is 0, any free port.*use --port")
        told = self.command("status", CACHESERVICE_STATUS__HOST="127.0.0.99")
        self.assertEqual(told.returncode, 1)
        self.assertRegex(
            told.stderr, r"no answer from 127\.0\.0\.99:8000: .* The working directory has no cacheservice\.toml; if "
        )

    def test_tail_without_the_resp_port(self) -> None:
        """Tail follows the status port, and reports once why it does not know the RESP port."""
        self.service(GOOD).wait_until_ready()
        (self.directory / "cacheservice.toml").write_text("[[[")
        tail = subprocess.Popen(
            [sys.executable, "-m", "cacheservice", "tail", "--port", str(self.port)],
            cwd=self.directory,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert tail.stderr is not None
            self.assertRegex(
                tail.stderr.readline(),
                r"publishes are detected by polling, .*: cacheservice\.toml: line 1, .*; see --resp-port\n$",
            )
        finally:
            tail.terminate()
            tail.communicate()


class Status(CommandLine):
    def test_all_is_well(self) -> None:
        """Without a question it is a head line and a line a dataset, in plain text where there is no terminal; the
        address is that of the configuration file, where all addresses mean this machine."""
        configuration = self.configuration(ITEMS, GOOD, port=self.port)
        daemon = self.started(configuration.replace("[status]\n", '[status]\nhost = "0.0.0.0"\n'))
        daemon.wait_until_ready()
        said = self.succeed("status")
        self.assertRegex(said, rf"^cacheservice \S+ at 127\.0\.0\.1:{self.port}: ready, PostgreSQL up, up ")
        self.assertRegex(said, r"(?m)^items +fresh +[\d.]+ s +2.50 s +10 +\d+ B +\d+ +(in [\d.]+ s|reading|waits) +\w+")
        self.assertNotRegex(said, r"\x1b|[ \t]\n|not ready|NOT READY")

    def test_a_question(self) -> None:
        """A question is asked as it stands, and its answer printed as it comes; an error is exit code 1."""
        self.service(GOOD).wait_until_ready()
        self.assertEqual(self.succeed("status", "ruok"), "imok\n")
        self.assertEqual(self.succeed("status", "ruok;", "ready"), "imok\nready\n")
        questions = [line.split()[0] for line in self.succeed("status", "help").splitlines()]
        self.assertEqual(questions, [*QUESTIONS, "prompt", "quit", "A;B"])  # which shells complete
        # A name is not a question: it chooses datasets.
        chosen = self.succeed("status", "good")
        self.assertRegex(chosen, r"(?m)^good +fresh")
        self.assertIn("unknown dataset 'gud'", self.command("status", "gud").stderr)
        for command in ("status", "why", "tail"):
            self.assertRegex(self.command(command, "good,good").stderr, "unknown dataset 'good,good'; .*by spaces\n$")
        told = self.command("status", "show", "nothing")
        self.assertEqual((told.returncode, told.stdout), (1, "ERROR unknown dataset 'nothing'; status lists them\n"))

    def test_what_is_wrong_comes_first(self) -> None:
        """Which data are old, since when, why, what to do and when it tries next stand above the table, whose first
        lines are those datasets; a narrow terminal has it all within its width."""
        daemon = self.service(GOOD, ITEMS)
        daemon.wait_until_ready()
        self.lose_items(daemon)
        for columns in (60, 80, 120):
            said = self.succeed("status", COLUMNS=str(columns))
            self.assertLessEqual(max(map(len, said.splitlines())), columns, said)
            whole = " ".join(said.split())
            self.assertIn(": ready, PostgreSQL up", whole)
            written_out, _, table = said.partition("\ndataset")
            self.assertRegex(written_out, r"(?m)^items expired, [\d.]+ s old, limit 2.50 s$")
            self.assertRegex(whole, r"since [\d.]+ s ago; the data are of 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC")
            self.assertRegex(whole, r"why failed .*times.*: PostgreSQL: relation \"items\" does not exist")
            self.assertIn("do create the table, name its schema in the query", whole)
            self.assertRegex(whole, r"next (in [\d.]+ s|reading now|due now)")
            self.assertLess(table.index("\nitems"), table.index("\ngood"))

    def test_colours_are_for_terminals_that_want_them(self) -> None:
        """A terminal gets the state as a colour and as a word; with NO_COLOR the word alone; no line is too wide."""
        daemon = self.service(GOOD, ITEMS)
        daemon.wait_until_ready()
        self.lose_items(daemon)
        coloured = self.terminal("status")
        self.assertEqual(coloured.wait(GIVE_UP_S), 0)
        self.assertRegex(coloured.raw, r"\x1b\[[\d;]*31mexpired")
        self.assertRegex(coloured.raw, r"\x1b\[[\d;]*32mfresh")
        self.assertLessEqual(max(map(len, coloured.text.splitlines())), 80, coloured.text)
        plain = self.terminal("status", NO_COLOR="1")
        self.assertEqual(plain.wait(GIVE_UP_S), 0)
        self.assertNotRegex(plain.raw, r"\x1b\[[\d;]*3[0-7]m")
        self.assertRegex(plain.text, r"items expired, .*\n")

    def test_json(self) -> None:
        """Standard output is the port's JSON: as one line in a pipe, indented on a terminal; names choose datasets."""
        self.service(GOOD, ITEMS).wait_until_ready()
        piped = self.succeed("status", "--json")
        self.assertEqual(piped.count("\n"), 1)
        self.assertEqual(sorted(json.loads(piped)["datasets"]), ["good", "items"])
        chosen = json.loads(self.succeed("status", "--json", "items"))
        self.assertEqual(list(chosen["datasets"]), ["items"])
        self.assertEqual(chosen["datasets"]["items"].keys(), json.loads(piped)["datasets"]["items"].keys())
        terminal = self.terminal("status", "--json")
        self.assertEqual(terminal.wait(GIVE_UP_S), 0)
        self.assertEqual(json.loads(terminal.text)["service"]["ready"], True)
        self.assertGreater(terminal.text.count("\n"), 30)

    def test_why(self) -> None:
        """`why NAME` is the port's answer; without a name it is that of each dataset with a problem, no other."""
        daemon = self.service(GOOD, ITEMS)
        daemon.wait_until_ready()
        self.assertEqual(self.succeed("why"), "Nothing is wrong: 2 datasets are fresh.\n")
        self.assertRegex(self.succeed("why", "good"), r"^good is fresh: ")
        self.lose_items(daemon)
        said = self.succeed("why")
        self.assertRegex(said, r"^items is expired: ")
        self.assertNotIn("good is", said)
        told = self.command("why", "item")
        self.assertEqual(told.returncode, 1)
        self.assertEqual(told.stderr, "cacheservice: unknown dataset 'item'; did you mean 'items'?\n")
        self.assertEqual(self.command("why", "items; ruok").returncode, 1)


class Watch(CommandLine):
    def test_it_survives_the_service(self) -> None:
        """While the service is away it shows that and how old its picture is; when it is back the picture is new;
        Ctrl-C ends it with exit code 130 and leaves the last picture, and the terminal as it was."""
        daemon = self.service(GOOD)
        daemon.wait_until_ready()
        terminal = self.terminal("status", "--watch")
        terminal.read_until_screen(r"^cacheservice \S+ at \S+: ready, PostgreSQL up, .*\n(.*\n)*good +fresh", GIVE_UP_S)
        daemon.kill()
        for age in (r"[\d.]+", r"[3-9][\d.]*"):
            notice = rf"^no answer from 127\.0\.0\.1:\d+: .*\nTrying again every second\. The last answer, {age} s ago:"
            terminal.read_until_screen(rf"{notice}(.*\n)*good +fresh", GIVE_UP_S)
        self.service(GOOD).wait_until_ready()
        terminal.read_until_screen(r"^cacheservice \S+ at \S+: ready", GIVE_UP_S)
        terminal.interrupt()
        self.assertEqual(terminal.wait(GIVE_UP_S), 130)
        last = terminal.raw.rpartition("\x1b[?1049l")[2]
        self.assertRegex(re.sub(r"\x1b\[[\d;]*m", "", last), r"^cacheservice (.*\n)*good")
        self.assertNotRegex(terminal.text, "Traceback|Aborted")

    def test_a_bar_for_what_is_loading(self) -> None:
        """A dataset that is being read has a bar, with the rows that came and those that the planner expects."""
        self.service(GOOD, SLOW).wait_until_ready()
        terminal = self.terminal("status", "--watch", "slow")
        terminal.read_until_screen(r"reading slow +━+ +[1-9]\d* of about [\d,]+ rows +\d+ %", GIVE_UP_S)
        self.assertNotIn("good", terminal.screen)
        terminal.interrupt()
        self.assertEqual(terminal.wait(GIVE_UP_S), 130)

    def test_ended_by_a_signal(self) -> None:
        """SIGTERM ends it with 143, and the terminal is as it was: its own screen, and a cursor."""
        self.service(GOOD).wait_until_ready()
        terminal = self.terminal("status", "--watch")
        terminal.read_until_screen("good", GIVE_UP_S)
        terminal.process.terminate()
        self.assertEqual(terminal.wait(GIVE_UP_S), 143)
        self.assertGreater(terminal.raw.rfind("\x1b[?1049l"), terminal.raw.rfind("\x1b[?1049h"))
        self.assertGreater(terminal.raw.rfind("\x1b[?25h"), terminal.raw.rfind("\x1b[?25l"))

    def test_in_a_pipe(self) -> None:
        """In a pipe each picture follows the one before; with --json each is a line."""
        self.service(GOOD).wait_until_ready()
        for arguments, wanted in ((["--json"], '{"service":'), ([], "cacheservice ")):
            watching = subprocess.Popen(
                [sys.executable, "-m", "cacheservice", "status", "--watch", *arguments],
                cwd=self.directory, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert watching.stdout is not None
            seen = 0
            while seen < 2:
                line = watching.stdout.readline()
                self.assertTrue(line)
                seen += line.startswith(wanted)
            watching.send_signal(signal.SIGINT)
            _, errors = watching.communicate(timeout=GIVE_UP_S)
            self.assertEqual((watching.returncode, errors.strip()), (130, ""))

    def test_nobody_there(self) -> None:
        """Without a service at the start, it reports that and waits, in a terminal and in a pipe; it can be ended."""
        waiting = r"^no answer from 127\.0\.0\.1:\d+: connection refused; .*\nTrying again every second"
        terminal = self.terminal("status", "--watch", "--port", str(self.port), columns=120)
        terminal.read_until_screen(waiting, GIVE_UP_S)
        pipes = [self.watching(*arguments, "--port", str(self.port)) for arguments in ((), ("--json",))]
        for pipe in pipes:
            assert pipe.stderr is not None
            self.assertRegex(
                pipe.stderr.readline(),
                r"^cacheservice: no answer from \S+: connection refused; .*\?.* Trying again every second\.\n$",
            )
        self.service(GOOD).wait_until_ready()
        terminal.read_until_screen(r"^cacheservice \S+ at \S+: ready(.*\n)*good +fresh", GIVE_UP_S)
        terminal.interrupt()
        self.assertEqual(terminal.wait(GIVE_UP_S), 130)
        for pipe, wanted in zip(pipes, ("cacheservice ", '{"service":'), strict=True):
            assert pipe.stdout is not None
            self.assertTrue(pipe.stdout.readline().startswith(wanted))
            pipe.send_signal(signal.SIGINT)
            _, errors = pipe.communicate(timeout=GIVE_UP_S)
            self.assertEqual((pipe.returncode, errors.strip()), (130, ""))

    def test_ended_while_it_waits(self) -> None:
        """Each signal ends it with its exit code, before a service has ever answered."""
        for end, code in ((Terminal.interrupt, 130), (lambda terminal: terminal.process.terminate(), 143)):
            terminal = self.terminal("status", "--watch", "--port", str(self.port))
            terminal.read_until_screen("Trying again every second", GIVE_UP_S)
            end(terminal)
            self.assertEqual(terminal.wait(GIVE_UP_S), code)
            self.assertGreater(terminal.raw.rfind("\x1b[?1049l"), terminal.raw.rfind("\x1b[?1049h"))
            self.assertNotIn("Traceback", terminal.text)
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
            pipe = self.watching("--port", str(self.port))
            assert pipe.stderr is not None
            self.assertTrue(pipe.stderr.readline())
            pipe.send_signal(number)
            printed = "".join(pipe.communicate(timeout=GIVE_UP_S))
            self.assertEqual((pipe.returncode, printed.strip()), (code, ""))

    def test_an_unknown_name(self) -> None:
        """A name that the service does not know ends it in one line."""
        self.service(GOOD).wait_until_ready()
        told = self.command("status", "--watch", "gud")
        self.assertEqual((told.returncode, told.stdout), (1, ""))
        self.assertRegex(told.stderr, r"^cacheservice: unknown dataset 'gud'; there are good\n$")

    def watching(self, *arguments: str) -> subprocess.Popen[str]:
        # A shell's background job ignores SIGINT, and so would its child.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        watching = subprocess.Popen(
            [sys.executable, "-m", "cacheservice", "status", "--watch", *arguments],
            cwd=self.directory,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(watching.communicate)
        self.addCleanup(lambda: watching.poll() is None and watching.kill())
        return watching


class Check(CommandLine):
    def check(self, *names: str) -> tuple[int, str, Mapping[str, tuple[str, ...]]]:
        """Exit code, text and performance data of the plugin, whose output has to be one line of the right form."""
        told = self.command("status", "--check", *names)
        self.assertEqual(told.stderr, "")
        self.assertRegex(told.stdout, r"^CACHESERVICE (OK|WARNING|CRITICAL|UNKNOWN) - [^|\n]+( \| [^|\n]+)?\n$")
        text, _, data = told.stdout.rstrip("\n").partition(" | ")
        measures = {}
        for each in data.split():
            found = _PERFORMANCE.fullmatch(each)
            assert found is not None, each
            measures[found[1]] = found.groups()[1:]
        return told.returncode, text, measures

    def test_ok(self) -> None:
        """All fresh: exit code 0; ages in seconds against the limits of stale and expired."""
        self.service(GOOD, ITEMS).wait_until_ready()
        code, text, measures = self.check("--perfdata", "all")
        self.assertEqual((code, text), (0, "CACHESERVICE OK - 2 datasets fresh, PostgreSQL up"))
        self.assertEqual(measures["items_rows"][0], "10")
        _, unit, warn, critical, least, _ = measures["items_age"]
        self.assertEqual((unit, warn, critical, least), ("s", "2.3", "2.5", "0"))
        self.assertEqual(measures["ready"][0], "1")
        _, _, summary = self.check()
        self.assertEqual((summary["ready"][0], summary["fresh"][0], summary["expired"][0]), ("1", "2", "0"))
        self.assertEqual((summary["age_of_limit"][1], summary["age_of_limit"][3]), ("%", "100"))
        self.assertNotIn("items_age", summary)
        self.assertIn("items_age", self.check("items")[2])
        self.assertEqual(self.check("--perfdata", "none")[2], {})

    def test_a_standby(self) -> None:
        """With `watch`, a service that reads a standby is OK, and expired because replay is paused, it shows that."""
        query(self.server, self.database, "ALTER TABLE items ADD PRIMARY KEY (id)")
        owner = self.server.dsn(database=self.database)
        migrate(owner, shipped.folder("migrations"))
        watch(owner, "public.items", ["id"], False, False, self.fail)
        items = ITEMS + 'watch = [{table = "public.items", key = "id"}]\n'
        with running_standby(self.server) as standby:
            daemon = self.started(self.configuration(items, dsn=standby(database=self.database), port=self.port))
            daemon.wait_until_ready()
            wait_until(lambda: daemon.json()["postgres"]["listening_problem"], "LISTEN to be refused")
            wait_until(lambda: self.check()[0] == 0, "all to be well")
            self.assertIn("PostgreSQL up, a standby", self.check()[1])
            standby.sql("SELECT pg_wal_replay_pause()")
            query(self.server, self.database, "UPDATE items SET name = 'm'")
            wait_until(lambda: daemon.json()["datasets"]["items"]["state"] == "expired", "items to expire")
            code, text, _ = self.check()
            self.assertEqual(code, 2)
            self.assertRegex(
                text, "items expired, .*read from a standby up to .* behind: replay is paused on the standby"
            )
            told = self.command("status", COLUMNS="300").stdout
            self.assertRegex(
                told, "(?s)^cacheservice .*, a standby up to .* behind: replay is paused.*why .*replay is paused"
            )

    def test_warning(self) -> None:
        """A held result and a refused configuration are warnings: exit code 1, and why."""
        daemon = self.service(GOOD, ITEMS.replace("max_age_s = 2.5", "max_age_s = 600"))
        daemon.wait_until_ready()
        query(self.server, self.database, "DELETE FROM items WHERE id > 1")
        wait_until(lambda: daemon.json()["datasets"]["items"]["held"], "items to be held")
        code, text, _ = self.check()
        self.assertEqual(code, 1)
        self.assertRegex(text, r"^CACHESERVICE WARNING - items (held|stale), .*would drop 10 to 1 rows")
        self.assertEqual(self.check("good")[0], 0)
        (self.directory / "cacheservice.toml").write_text("[nonsense]\n")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.event("config_rejected")
        told = self.command("status", "--check", "--port", str(self.port))
        self.assertEqual(told.returncode, 1)
        self.assertIn("the newest configuration was rejected", told.stdout)

    def test_critical(self) -> None:
        """An expired dataset, and a required one that was never loaded, are critical: exit code 2."""
        daemon = self.service(GOOD, ITEMS, ITEMS.replace("items", "never").replace("0.3", "600"))
        wait_until(lambda: daemon.json()["datasets"]["never"]["consecutive_failures"], "never to fail")
        self.lose_items(daemon)
        code, text, measures = self.check()
        self.assertEqual(code, 2)
        self.assertIn("items expired", text)
        self.assertIn("never never loaded", text)
        self.assertEqual((measures["expired"][0], measures["never_loaded"][0]), ("1", "1"))
        self.assertEqual(self.check("never")[2]["never_age"][0], "U")
        self.assertEqual(self.check("items")[0], 2)
        self.assertEqual(self.check("never")[0], 2)
        self.assertEqual(self.check("good")[0], 0)

    def test_dead_or_hung(self) -> None:
        """A service that is not there, is something else, hangs or answers too slowly is critical: exit code 2."""
        code, text, _ = self.check("--port", str(free_port()))
        self.assertEqual(code, 2)
        self.assertRegex(text, "CRITICAL - no answer .*: connection refused; is the service running")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = str(silent.getsockname()[1])
            code, text, _ = self.check("--port", port, "--timeout", "0.5")
            self.assertEqual(code, 2)
            self.assertRegex(text, "CRITICAL - no answer .* timed out")
        daemon = self.service(GOOD)
        daemon.wait_until_ready()
        daemon.process.send_signal(signal.SIGSTOP)
        self.addCleanup(daemon.process.send_signal, signal.SIGCONT)
        self.assertEqual(self.check("--timeout", "0.5")[0], 2)

    def test_the_time_is_that_of_all_answers(self) -> None:
        """A service that is slow with each answer does not take a plugin past its time."""
        with socket.create_server(("127.0.0.1", 0)) as slow:

            def answer_slowly() -> None:
                client, _ = slow.accept()
                with client:
                    for reply in (b"\n", b"{}\n\n", b"x\n\n"):
                        client.recv(100)
                        if done.wait(0.7):
                            return
                        client.sendall(reply)

            done = threading.Event()
            thread = threading.Thread(target=answer_slowly)
            thread.start()
            try:
                code, text, _ = self.check("--port", str(slow.getsockname()[1]), "--timeout", "1")
            finally:
                done.set()
                thread.join()
        self.assertEqual(code, 2)
        self.assertRegex(text, "timed out")

    def test_unknown(self) -> None:
        """No such dataset, wrong usage: exit code 3, one line of output."""
        self.service(GOOD).wait_until_ready()
        self.assertEqual(
            self.check("nothing")[:2], (3, "CACHESERVICE UNKNOWN - unknown dataset 'nothing'; there are good")
        )
        self.assertEqual(self.check("--port", "none")[0], 3)
        self.assertEqual(self.check("--nonsense")[0], 3)
        self.assertEqual(self.check("--json")[0], 3)


class Errors(CommandLine):
    def test_wrong_usage_is_one_line(self) -> None:
        """A slip is reported in one line that names the command, what is wrong, and where to read on; exit code 2."""
        for arguments, wanted in (
            (["statu"], r"cacheservice: no such command 'statu'. Did you mean 'status'\? See: cacheservice --help\n"),
            (
                ["status", "--wach"],
                r"cacheservice status: no such option '?--wach'?.*--watch.*See: cacheservice status --help\n",
            ),
            (["unwatch"], r"cacheservice unwatch: missing argument 'TABLE'. See: cacheservice unwatch --help\n"),
            (["status", "--check", "--port", "0"], None),
        ):
            told = self.command(*arguments)
            if wanted is None:
                self.assertEqual((told.returncode, told.stderr), (3, ""))
            else:
                self.assertEqual((told.returncode, told.stdout), (2, ""))
                self.assertRegex(told.stderr, f"^{wanted}$")

    def test_a_reader_that_has_gone(self) -> None:
        """Output that nobody reads any more, as after `head`, ends a command without a word."""
        self.service(GOOD).wait_until_ready()
        for arguments in (["status"], ["status", "json"], ["status", "--watch"], ["why"], ["--help"]):
            reader, writer = os.pipe()
            os.close(reader)
            told = subprocess.run(
                [sys.executable, "-m", "cacheservice", *arguments],
                check=False, cwd=self.directory, env=self.environment(), stdout=writer, stderr=subprocess.PIPE,
                timeout=GIVE_UP_S,
            )  # fmt: skip
            os.close(writer)
            self.assertEqual((told.returncode, told.stderr), (141, b""), arguments)

    def test_a_folder_that_cannot_be_made(self) -> None:
        """A failing system call is one line that names the option, the place, the cause and the fix."""
        (self.directory / "file").touch()
        told = self.command("demo", "--directory", "file/x")
        self.assertEqual(told.returncode, 1)
        self.assertEqual(
            told.stderr,
            "cacheservice: --directory: file/x: it, or a folder above it, is a file and not a folder; "
            "remove that file, or name another folder\n",
        )

    def test_help_teaches(self) -> None:
        """Each command's help has an example that begins with the command; the list of commands fits 80 columns."""
        overview = self.succeed("--help", COLUMNS="80")
        names = re.findall(r"(?m)^  ([a-z]+)  ", overview.partition("Try it:")[2])
        self.assertEqual(len(names), 12)
        self.assertNotIn("...", overview.partition("Try it:")[2])
        for name in names:
            self.assertRegex(self.succeed(name, "--help"), rf"Examples?.*:\n(.*\n)*.*cacheservice {name}\b", name)
