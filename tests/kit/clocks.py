"""Clocks that stand still until a test moves them."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

START_S = 1000.0
"""Nothing may depend on a clock that begins at 0."""


def started_clock(at_s: float = START_S) -> Clock:
    """Return a clock that has been going for a while."""
    clock = Clock()
    clock.advance(at_s)
    return clock


class CountingClock(Clock):
    """Counts the turns of the reactor that somebody waits for."""

    turns = 0

    def callLater(self, *arguments: Any) -> Any:
        self.turns += 1
        return super().callLater(*arguments)
