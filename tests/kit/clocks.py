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


def one_turn(clock: Clock) -> None:
    """Make the calls that are due now, but not those that they schedule, as a turn of the reactor does."""
    due = [call for call in clock.getDelayedCalls() if call.getTime() <= clock.seconds()]
    for call in due:
        if call.active():  # type: ignore[attr-defined]  # of IDelayedCall
            clock.calls.remove(call)  # type: ignore[arg-type]  # the same objects
            call.called = 1  # type: ignore[attr-defined]
            call.func(*call.args, **call.kw)  # type: ignore[attr-defined]
