"""A log that keeps its lines, in the place of structlog's."""

from __future__ import annotations

from typing import Any, Self


class Log:
    """Keeps every line as (level, event, fields), and those of the logs it binds."""

    def __init__(self, lines: list[tuple[str, str, dict[str, Any]]] | None = None, **bound: Any) -> None:
        self.lines = [] if lines is None else lines
        self._bound = bound

    def bind(self, **fields: Any) -> Self:
        return type(self)(self.lines, **(self._bound | fields))

    def debug(self, event: str, **fields: Any) -> None:
        self.add("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self.add("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self.add("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self.add("error", event, fields)

    def add(self, level: str, event: str, fields: dict[str, Any]) -> None:
        self.lines.append((level, event, self._bound | fields))

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Every line without its level."""
        return [(event, fields) for _, event, fields in self.lines]

    def names(self, *wanted: str) -> list[str]:
        """Return the event of every line, or of those that are `wanted`."""
        return [event for _, event, _ in self.lines if not wanted or event in wanted]

    def named(self, event: str) -> list[dict[str, Any]]:
        """Return the fields of every line of an event."""
        return [fields for _, name, fields in self.lines if name == event]
