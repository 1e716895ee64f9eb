"""The log: one line for each event, including Twisted's own, on standard output.

The lines are JSON, or are formatted for a console.
"""

from __future__ import annotations

import os
import queue
import select
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

import structlog
from structlog.typing import EventDict, Processor
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

from cacheservice.base.interfaces import Log

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_MOST_WAITING_LINES = 10_000
_FLUSH_TIMEOUT_S = 0.3

_LEVEL_OF_TWISTED: Mapping[LogLevel, str] = {
    LogLevel.debug: "debug",
    LogLevel.info: "info",
    LogLevel.warn: "warning",
    LogLevel.error: "error",
    LogLevel.critical: "critical",
}


class LineWriter:
    """Writes lines to a descriptor in a thread.

    On the reactor's thread, a stalled pipe would block the service. With `path` the descriptor is that of a file, which
    `reopen` opens again. While no process reads the pipe, up to 10,000 lines wait. Further lines are dropped, and a
    line with their number is logged as soon as there is a reader again.

    :param flush_timeout_s: how long `stop` waits for each of its steps.
    """

    def __init__(
        self,
        descriptor: int,
        lost_line: Callable[[int], str],
        path: str | None = None,
        flush_timeout_s: float = _FLUSH_TIMEOUT_S,
    ) -> None:
        self._flush_timeout_s = flush_timeout_s
        self._path = path
        self._descriptor = descriptor
        self._lost_line = lost_line
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING_LINES)
        self._lost = 0
        # A daemon thread: a pipe without a reader must not block the exit of the process.
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reopen(self) -> str | None:
        """Open the file again after a rotation; return its path, None without a file.

        :raises OSError: if it cannot be opened; the old file stays in use.
        """
        if self._path is not None:
            new = destination(self._path)
            os.dup2(new, self._descriptor, inheritable=False)  # atomic, whatever the thread is writing
            os.close(new)
        return self._path

    def write(self, line: str) -> None:
        """Queue one line, without its end; never blocks, never raises."""
        try:
            if self._lost:
                self._lines.put_nowait(self._lost_line(self._lost))
                self._lost = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def stop(self) -> None:
        """Write the queued lines while there is a reader, and end the thread."""
        try:
            if self._lost:
                self._lines.put(self._lost_line(self._lost), timeout=self._flush_timeout_s)
            self._lines.put(None, timeout=self._flush_timeout_s)
        except queue.Full:
            return
        if self._thread.is_alive():
            self._thread.join(self._flush_timeout_s)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            data = line.encode("utf-8", "backslashreplace") + b"\n"
            try:
                while data:
                    data = data[self._write_some(data) :]
            except OSError:
                continue  # the reader of the log is gone; the service continues

    def _write_some(self, data: bytes) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            # Any process that shares the descriptor may have made it non-blocking for all.
            select.select([], [self._descriptor], [])
            return 0


class Threshold:
    """The lowest severity that is logged; it may change at any time.

    :param level: debug, info, warning or error.
    """

    def __init__(self, level: str) -> None:
        self.set(level)

    def set(self, level: str) -> None:
        self._least = _LEVELS[level]

    def __call__(self, _: object, level: str, event: EventDict) -> EventDict:
        """Drop events below the threshold, as a processor of structlog."""
        if _LEVELS[level] < self._least:
            raise structlog.DropEvent
        return event


def make_logger(threshold: Threshold, line_format: str, write: Callable[[str], None], *, colors: bool = False) -> Log:
    """Return a structlog logger that writes each event as one line.

    :param line_format: "json" or "console".
    """
    renderer: list[Processor]
    if line_format == "json":
        renderer = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    else:
        renderer = [
            structlog.processors.format_exc_info,
            _exception_in_line,
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=20, sort_keys=False, timestamp_key="time"),
        ]
    logger: Log = structlog.wrap_logger(
        _Lines(write),
        processors=[
            threshold,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            _in_order,
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS["debug"]),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger


class _Lines:
    """An underlying logger in structlog's terms: each method takes the rendered line."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = write


@implementer(ILogObserver)
class TwistedEvents:
    """Logs Twisted's events, including Python's warnings.

    Tracebacks stay within their line.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def __call__(self, event: LogEvent) -> None:
        if event.get("log_namespace") == "twisted.internet.protocol.Factory":
            return  # "Starting factory" and "Stopping factory" are of no use to an operator
        level = _LEVEL_OF_TWISTED.get(event.get("log_level", LogLevel.info), "info")
        if level == "info":
            level = "debug"  # Twisted's routine events; only its warnings and errors matter
        fields: dict[str, object] = {"source": event.get("log_namespace", "twisted"), "message": _in_one_line(event)}
        failure = event.get("log_failure")
        if failure is not None:
            fields["error"] = f"{failure.type.__name__}: {failure.getErrorMessage()}"
            # Frames without their variables, which may contain a secret.
            fields["exception"] = "".join(traceback.format_exception(failure.value))
            if failure.value.__traceback__ is None:
                fields["exception"] = failure.getTraceback()
        getattr(self._log, level)("twisted_event", **fields)


def _in_one_line(event: LogEvent) -> str:
    if "warning" in event and "category" in event:
        # Python's warnings, in the form of Twisted's legacy log.
        return f"{event['category']}: {event['warning']} ({event.get('filename')}:{event.get('lineno')})"
    return " ".join(formatEvent(event).split())


def _in_order(_: object, __: str, event: EventDict) -> EventDict:
    """Put the fields that every line has first, and drop those that are None."""
    first = {name: event.pop(name) for name in ("time", "level", "event")}
    return first | {name: value for name, value in event.items() if value is not None}


def _exception_in_line(_: object, __: str, event: EventDict) -> EventDict:
    """Keep a console event on one line.

    The renderer prints a field named `exception` on lines of its own.
    """
    if "exception" in event:
        event["traceback"] = event.pop("exception")
    return event


def lost_line(count: int) -> str:
    """Return the line that reports the number of lines lost."""
    return f'{{"event": "log_lines_lost", "level": "warning", "lines": {count}}}'


def destination(path: str | None) -> int:
    """Open the file at `path` to append (mode 640); None for standard output.

    :raises OSError: if it cannot be opened.
    """
    if path is None:
        return standard_output()
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def standard_output() -> int:
    """Return the real standard output.

    Twisted replaces sys.stdout by an object that logs.
    """
    return sys.__stdout__.fileno() if sys.__stdout__ is not None else 1
