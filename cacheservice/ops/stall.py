"""Measures how late the reactor is, by a tick that records its own delay."""

from __future__ import annotations

from twisted.application.service import Service

from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import counting_loop
from cacheservice.cache.counts import Histogram

TICK_S = 1 / 32
"""If nothing else wakes the reactor, a tick costs up to 130 µs of CPU (measured), 0.4 % of a core; otherwise less. The
multiples of the interval are exact as floats, and so are results computed with them."""
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StallWatch(Service):
    """Ticks while it runs, and counts by how many seconds each tick was late.

    This is the time that a client has to wait that arrives at that moment. A turn of the reactor that is longer than a
    tick is always detected, and underestimated by at most one tick. A shorter turn is detected if a tick falls into it.
    Missed ticks are not repeated.

    :param clock: `IReactorTime`, monotonic.
    """

    name = "stall"

    def __init__(self, clock: Clock) -> None:
        self.lateness = Histogram(BOUNDS_S)
        self._clock = clock
        self._loop = counting_loop(clock, self._tick)

    def startService(self) -> None:
        super().startService()
        self._loop.start(TICK_S, now=False)

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _tick(self, due: int) -> None:
        """Record the delay of a tick.

        :param due: 1, plus 1 for each tick that the reactor missed.
        """
        # The same computation as in LoopingCall: because of rounding, the remainder of a division may be a whole tick
        # instead of 0.
        assert self._loop.starttime is not None, "it is running"
        since_start_s = self._clock.seconds() - self._loop.starttime
        after_last_due_s = max(0.0, since_start_s - int(since_start_s / TICK_S) * TICK_S)
        self.lateness.observe((due - 1) * TICK_S + after_last_due_s)
