"""Laws of how a command ends, of what it may ask, and of the addresses that it prints."""

from __future__ import annotations

import signal

import click
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import AddressUnknown, ConfigError, NoAnswer
from cacheservice.cli import demo_texts, exit
from cacheservice.cli.addresses import reachable
from cacheservice.cli.client import Address, UnixSocket, no_answer_from
from cacheservice.cli.demo_texts import USUAL_PORTS, Place, Ports
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
