"""The log of a worker, which the main process writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Self

from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain

_MOST_UNSENT_BYTES = 4 << 20


class LogSender:
    """Sends events of the log to the main process.

    Before there is a link, events go to standard error. If the main process does not read the link, events are dropped,
    and their number is logged as soon as it does again.
    """

    def __init__(self) -> None:
        self._link: Link | None = None
        self._lost = 0

    def send_over(self, link: Link) -> None:
        """Send all events over `link` from now on."""
        self._link = link

    def send(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        """Send one event, or count it as lost."""
        values = {name: plain(value) for name, value in fields.items()}
        if self._link is None:
            sys.stderr.write(json.dumps({"level": level, "event": event, **values}, default=str) + "\n")
            return
        if self._link.unsent_bytes > _MOST_UNSENT_BYTES:
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self._link.send("log", level="warning", event="log_lines_lost", fields={"lines": lost})
        self._link.send("log", level=level, event=event, fields=values)


class LinkLog:
    """A logger whose events are sent to the main process, which decides which levels are logged."""

    def __init__(self, sender: LogSender, bound: Mapping[str, object] | None = None) -> None:
        self._sender = sender
        self._bound = dict(bound or {})

    def bind(self, **fields: object) -> Self:
        return type(self)(self._sender, {**self._bound, **fields})

    def debug(self, event: str, **fields: object) -> None:
        self._sender.send("debug", event, {**self._bound, **fields})

    def info(self, event: str, **fields: object) -> None:
        self._sender.send("info", event, {**self._bound, **fields})

    def warning(self, event: str, **fields: object) -> None:
        self._sender.send("warning", event, {**self._bound, **fields})

    def error(self, event: str, **fields: object) -> None:
        self._sender.send("error", event, {**self._bound, **fields})


def plain(value: object) -> Plain:
    """Return a value as a link carries it. Other objects become text, as in the log of the main process."""
    if value is None or isinstance(value, bool | float | str | bytes):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 64 else str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [plain(each) for each in value]
    return str(value)
