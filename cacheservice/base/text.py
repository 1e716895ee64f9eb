"""Renders single values as text, in the forms that the log, JSON and people share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime


def seconds(value: float) -> float:
    """Return a duration to the millisecond, at least 0."""
    return max(0.0, round(value, 3))


def iso(moment: datetime) -> str:
    """Return a time in ISO 8601, in UTC with a Z."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def in_short(problems: Sequence[str]) -> str:
    """Return the first problem of a configuration, and the number of the others."""
    first, *others = problems
    return f"{first} (and {len(others)} more)" if others else first


def printable(text: str) -> str:
    """Return `text` with escapes for characters that cannot be printed, so that it stays one line on a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
