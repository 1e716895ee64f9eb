"""A client of change streams, as docs/changes.md describes it: it keeps the rows of one dataset."""

from __future__ import annotations

import json
from typing import Any


class Mirror:
    """Applies events; `rows` are those of `generation`, and `position` is where to resume.

    `states` has a generation with its rows for each time that the rows were complete.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.generation = 0
        self.position = ""
        self.events: list[dict[str, Any]] = []
        self.states: list[tuple[int, dict[str, Any]]] = []
        self.is_ended = False
        self._pending: list[dict[str, Any]] = []

    def connected(self) -> None:
        """Forget the events of a generation that did not become complete."""
        self._pending = []

    def apply(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        kind = event["event"]
        assert not self.is_ended, "nothing follows the end"
        if kind in ("snapshot", "rows"):
            self._pending.append(event)
        elif kind == "generation":
            for each in self._pending:
                if each["event"] == "snapshot":
                    self.rows = {}
                else:
                    for key in each["removed"]:
                        self.rows.pop(key, None)
                    self.rows = self.rows | each["put"]
            self._complete(event)
        elif kind == "renewed":
            assert not self._pending, "a renewal has no rows"
            self._complete(event)
        elif kind == "ended":
            self.is_ended = True
        else:
            assert kind == "alive", kind

    def _complete(self, event: dict[str, Any]) -> None:
        self._pending = []
        assert event["rows"] == len(self.rows), event
        self.states.append((event["generation"], dict(self.rows)))
        # Last, because another thread may wait for it.
        self.position, self.generation = event["position"], event["generation"]

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.events]


class Parser:
    """Parses a stream of either form; `feed` returns the events that are complete.

    A server-sent event must have its name, and the position of the rows as its id.
    """

    def __init__(self, content_type: str) -> None:
        self.comments = 0
        self.retry_ms: int | None = None
        self._is_sse = content_type == "text/event-stream"
        self._buffer = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        end = b"\n\n" if self._is_sse else b"\n"
        *blocks, self._buffer = (self._buffer + data).split(end)
        if not self._is_sse:
            return [json.loads(block) for block in blocks]
        return [event for block in blocks if (event := self._event(block)) is not None]

    @property
    def is_between_events(self) -> bool:
        return not self._buffer

    def _event(self, block: bytes) -> dict[str, Any] | None:
        fields: dict[str, str] = {}
        for line in block.decode().split("\n"):
            name, _, value = line.partition(":")
            assert name not in fields, line
            fields[name] = value.removeprefix(" ")
        if "data" not in fields:
            self.comments += "" in fields
            self.retry_ms = int(fields.get("retry", self.retry_ms or 0))
            return None
        event: dict[str, Any] = json.loads(fields["data"])
        assert event["event"] == fields["event"], fields
        assert fields.get("id") == event.get("position"), fields
        return event
