"""Laws of the status port over a transport in memory: any bytes, and its timeouts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice import __version__
from cacheservice.ports.clients import Limits
from cacheservice.ports.operator_commands import Argument, Command, Commands
from cacheservice.ports.status import StatusFactory
from tests.kit.status_port import filled_cache
from tests.kit.wire import Wire

WORDS = [
    b"prompt",
    b"quit",
    b"ruok",
    b"json",
    b"show products",
    b"why prices",
    b"show ",
    b";",
    b"\n",
    b"\r\n",
    b" ",
    b"\0",
]


class AnyBytes(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = StatusFactory(Commands(filled_cache()), Limits(10, 60.0), self.clock)
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def talk(self, chunks: list[bytes]) -> list[str]:
        """What the server sends for the chunks and the end of input after them, until the connection is closed."""
        protocol = self.factory.buildProtocol(None)
        wire = Wire(protocol)
        for chunk in chunks:
            while wire.is_open and not wire.is_reading:
                self.clock.advance(0.001)
            if wire.is_open:
                protocol.dataReceived(chunk)
        while wire.is_open and not wire.is_reading:
            self.clock.advance(0.001)
        if wire.is_open:
            protocol.readConnectionLost()
        self.clock.advance(10)
        self.assertFalse(wire.is_open)
        self.assertEqual((self.factory.clients, self.flushLoggedErrors()), (set(), []))
        return wire.sent.decode().split("\n")

    @settings(deadline=None)
    @given(st.lists(st.binary(max_size=600), max_size=8))
    def test_garbage(self, chunks: list[bytes]) -> None:
        """Any bytes get ERROR lines at most, no traceback, and the end of the connection."""
        for line in self.talk(chunks):
            self.assertTrue(line == "" or line.startswith("ERROR "), line)

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(WORDS) | st.binary(max_size=4), max_size=60), st.integers(1, 100))
    def test_half_sensible(self, words: list[bytes], chunk_bytes: int) -> None:
        """Commands and garbage mixed, cut anywhere, break nothing, and get the same replies however they are cut."""
        data = b"".join(words)
        cut = [data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes)]
        self.assertEqual(self.talk(cut), self.talk([data]))


class Timeouts(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = StatusFactory(Commands(filled_cache()), Limits(10, 60.0), self.clock)
        self.protocol = self.factory.buildProtocol(None)
        self.wire = Wire(self.protocol)
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def test_each_line_counts(self) -> None:
        """Each line restarts the idle timeout; the first silence that lasts as long ends the connection."""
        self.protocol.dataReceived(b"prompt\n")
        for _ in range(5):
            self.clock.advance(59)
            self.protocol.dataReceived(b"ruok\n")
            self.protocol.dataReceived(b"half a li")
            self.protocol.dataReceived(b"ne\n")
            self.clock.advance(0)
        self.clock.advance(59)
        self.assertTrue(self.wire.is_open)
        self.clock.advance(1)
        self.assertFalse(self.wire.is_open)

    def test_a_client_that_does_not_close(self) -> None:
        """After the last word a client that does not close is dropped soon."""
        self.protocol.dataReceived(b"ruok\n")
        self.assertTrue(self.wire.is_open)
        self.clock.advance(5)
        self.assertFalse(self.wire.is_open)

    def test_a_bug_in_a_command(self) -> None:
        """A command that raises what nobody expected is an ERROR line and a traceback in the log."""
        broken = Command(Argument.NONE, "a bug", lambda _: str(1 // 0))
        self.patch(self.factory.commands, "_commands", {**self.factory.commands._commands, "ruok": broken})
        self.protocol.dataReceived(b"ruok;version\n")
        said = f"ERROR an internal error; its traceback is in the log\ncacheservice {__version__}\n"
        self.assertEqual(self.wire.sent.decode(), said)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.clock.advance(5)
