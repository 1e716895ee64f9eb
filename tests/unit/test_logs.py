"""Laws of the log: one event is one line, and nobody ever waits for its reader."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import fail
from twisted.logger import Logger, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ops.logs import LineWriter, Threshold, TwistedEvents, lost_line, make_logger

LONG_S = 60.0
MORE_THAN_FITS = 25_000  # lines: a pipe's 64 KiB hold 6,000 of them and the writer 10,000


class Writing(SynchronousTestCase):
    def setUp(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.writer = LineWriter(self.write_end, lost_line)
        self.taken = b""
        self.reader = threading.Thread(target=self.take)
        self.addCleanup(self.close_both)

    def close_both(self) -> None:
        self.close_write_end()
        if self.read_end >= 0:
            os.close(self.read_end)

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def take(self) -> None:
        while part := os.read(self.read_end, 65_536):
            self.taken += part

    def finish(self) -> list[str]:
        """Stop the writer; every line that came out."""
        self.writer.stop()
        self.close_write_end()
        self.reader.join()
        return self.taken.decode().splitlines()

    def assert_all_told(self, lines: list[str], written: int) -> None:
        """Each line came out whole and in order, or is counted by a lost-line in its place."""
        number = lost = 0
        for line in lines:
            if line.startswith("{"):
                event = json.loads(line)
                self.assertEqual(event["event"], "log_lines_lost")
                lost += event["lines"]
                number += event["lines"]
            else:
                self.assertEqual(line, f"line {number}")
                number += 1
        self.assertGreater(lost, 0)
        self.assertEqual(number, written)

    def test_in_order(self) -> None:
        """Every line comes out, in order and with its end, whatever characters are in it."""
        self.writer.start()
        self.reader.start()
        for number in range(100):
            self.writer.write(f"line {number} ä€ \udcff")
        expected = [f"line {number} ä€ \\udcff" for number in range(100)]
        self.assertEqual(self.finish(), expected)

    def test_a_full_pipe_holds_nobody(self) -> None:
        """While nobody reads, writing goes on at once; when somebody reads again, the lines lost are counted."""
        self.writer.start()
        for number in range(MORE_THAN_FITS):
            self.writer.write(f"line {number}")
        self.reader.start()
        written = MORE_THAN_FITS
        while b"log_lines_lost" not in self.taken and written < MORE_THAN_FITS + 1000:
            self.writer.write(f"line {written}")
            written += 1
            time.sleep(0.01)
        self.assert_all_told(self.finish(), written)

    def test_lines_lost_are_told_at_the_end(self) -> None:
        """Lost lines are reported even if no line is written after them."""
        self.writer = LineWriter(self.write_end, lost_line, flush_timeout_s=LONG_S)
        self.writer.start()
        for number in range(MORE_THAN_FITS):
            self.writer.write(f"line {number}")
        self.reader.start()
        self.assert_all_told(self.finish(), MORE_THAN_FITS)

    def test_a_pipe_that_does_not_block(self) -> None:
        """A descriptor that another process made non-blocking loses no line and cuts none."""
        os.set_blocking(self.write_end, False)
        self.writer.start()
        for number in range(9_000):
            self.writer.write(f"line {number} {'x' * 50}")
        self.reader.start()
        self.assertEqual(self.finish(), [f"line {number} {'x' * 50}" for number in range(9_000)])

    def test_stop_does_not_wait_for_ever(self) -> None:
        """Stop returns although nobody ever reads, whether the queue is full or not; reading ends what is left."""
        self.writer.start()
        for number in range(MORE_THAN_FITS):
            self.writer.write(f"line {number}")
        self.writer.stop()
        self.reader.start()
        self.finish()

    def test_a_reader_that_is_gone(self) -> None:
        """When the reader of the log is gone, writing and stopping go on in silence."""
        self.writer.start()
        os.close(self.read_end)
        self.read_end = -1
        for number in range(100):
            self.writer.write(f"line {number}")
        self.writer.stop()

    def test_stop_before_start(self) -> None:
        """A writer that was never started can be stopped."""
        self.writer.write("line")
        self.writer.stop()


class LogTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.lines: list[str] = []

    def logger(self, level: str = "debug", line_format: str = "json") -> Any:
        return make_logger(Threshold(level), line_format, self.lines.append)

    def only(self) -> dict[str, Any]:
        """The fields of the only line."""
        [line] = self.lines
        self.assertEqual(line.splitlines(), [line])
        fields: dict[str, Any] = json.loads(line)
        return fields


class Events(LogTestCase):
    def test_json(self) -> None:
        """A line begins with its time in UTC, its level and its event; what is None is left out."""
        self.logger().bind(dataset="products").info("refresh_published", rows=3, error=None, took_s=0.5)
        fields = self.only()
        self.assertEqual(list(fields), ["time", "level", "event", "dataset", "rows", "took_s"])
        self.assertRegex(fields.pop("time"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z$")
        expected = {"level": "info", "event": "refresh_published", "dataset": "products", "rows": 3, "took_s": 0.5}
        self.assertEqual(fields, expected)

    @settings(deadline=None)
    @given(st.text(), st.sampled_from(["json", "console"]))
    def test_any_text_is_one_line(self, text: str, line_format: str) -> None:
        """Whatever text is in a field, the event is one line, and JSON restores the text."""
        self.lines.clear()
        self.logger(line_format=line_format).warning("refresh_failed", error=text)
        [line] = self.lines
        self.assertNotIn("\n", line)
        if line_format == "json":
            self.assertEqual(json.loads(line)["error"], text)

    def test_levels(self) -> None:
        """What is less severe than the level is not written."""
        levels = ["debug", "info", "warning", "error"]
        for number, level in enumerate(levels):
            self.lines.clear()
            log = self.logger(level)
            for each in levels:
                getattr(log, each)("said")
            self.assertEqual([json.loads(line)["level"] for line in self.lines], levels[number:])

    def test_an_exception_is_in_its_line(self) -> None:
        """A traceback is within its event's line, in JSON and on the console."""
        for line_format in ("json", "console"):
            self.lines.clear()
            try:
                1 // 0  # noqa: B018
            except ZeroDivisionError:
                self.logger(line_format=line_format).error("refresh_broke", exc_info=True)
            [line] = self.lines
            self.assertEqual(line.splitlines(), [line])
            self.assertIn("ZeroDivisionError", line)
            self.assertIn("test_logs.py", line)


class FromTwisted(LogTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.observer = TwistedEvents(self.logger())
        self.log = Logger(namespace="some.module", observer=self.observer)

    def test_a_failure(self) -> None:
        """A failure is one line: Twisted's description, its kind and message, and the traceback without variables."""
        password = "hunter2"  # a variable of a frame in the traceback
        try:
            raise ValueError("two\nlines")
        except ValueError:
            self.log.failure("it broke\n{reason}", reason="badly")
        fields = self.only()
        self.assertEqual((fields["level"], fields["event"]), ("critical", "twisted_event"))
        self.assertEqual((fields["source"], fields["message"]), ("some.module", "it broke badly"))
        self.assertEqual(fields["error"], "ValueError: two\nlines")
        self.assertIn("Traceback (most recent call last)", fields["exception"])
        self.assertIn("test_a_failure", fields["exception"])
        self.assertNotIn(password, self.lines[0])

    def test_a_failure_that_was_never_raised(self) -> None:
        """A failure without a traceback is a line as well."""
        self.log.failure("it broke", Failure(KeyError("x")))
        self.assertEqual(self.only()["error"], "KeyError: 'x'")

    def test_an_unhandled_error_in_a_deferred(self) -> None:
        """A Deferred whose error nobody handled is logged once, as critical."""
        globalLogPublisher.addObserver(self.observer)
        self.addCleanup(globalLogPublisher.removeObserver, self.observer)
        fail(ZeroDivisionError("nobody cares"))
        gc.collect()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        told = [fields for line in self.lines if "error" in (fields := json.loads(line))]
        self.assertEqual(
            [(fields["level"], fields["error"]) for fields in told], [("critical", "ZeroDivisionError: nobody cares")]
        )
        self.assertTrue(all(line.splitlines() == [line] for line in self.lines))

    def test_a_python_warning(self) -> None:
        """A Python warning, as Twisted carries it, is one warning line with its place."""
        self.log.warn(
            "{filename}:{lineno}: {category}: {warning}",
            warning=DeprecationWarning("old\nstyle"),
            category="builtins.DeprecationWarning",
            filename="x.py",
            lineno=7,
        )
        fields = self.only()
        self.assertEqual(fields["level"], "warning")
        self.assertEqual(fields["message"], "builtins.DeprecationWarning: old\nstyle (x.py:7)")

    def test_levels(self) -> None:
        """Twisted's routine events are for debugging; its warnings and errors keep their level."""
        for method in (self.log.debug, self.log.info, self.log.warn, self.log.error, self.log.critical):
            method("said")
        levels = [json.loads(line)["level"] for line in self.lines]
        self.assertEqual(levels, ["debug", "debug", "warning", "error", "critical"])

    def test_an_event_that_cannot_be_formatted(self) -> None:
        """An event whose own format is broken is a line all the same."""
        self.log.error("{absent[0]} {}")
        self.assertEqual(self.only()["level"], "error")

    def test_factories_are_not_told(self) -> None:
        """That a factory starts or stops is nothing an operator wants to know."""
        Logger(namespace="twisted.internet.protocol.Factory", observer=self.observer).info("Starting factory")
        self.assertEqual(self.lines, [])
