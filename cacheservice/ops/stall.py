"""How long the reactor keeps everybody waiting, measured all the time by a tick that tells how late it came."""

from __future__ import annotations

from typing import Any

from twisted.application.service import Service
from twisted.internet.task import LoopingCall

from cacheservice.cache.counts import Histogram

TICK_S = 1 / 32
"""One costs up to 130 µs of CPU where nothing else wakes the reactor (measured), 0.4 % of a core, and less else. Its
multiples are exact, so that what is reckoned with them is as well."""
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StallWatch(Service):
    """Ticks while it runs, and counts by how many seconds each tick came too late.

    It is what a client has to wait that comes at that moment. A turn of the reactor that takes longer than a tick is
    always seen, as shorter than it was by at most one tick; one that takes less, as often as a tick falls into it. The
    ticks that were missed meanwhile are not made up for.

    :param clock: `IReactorTime`, monotonic.
    """

    name = "stall"

    def __init__(self, clock: Any) -> None:
        self.lateness = Histogram(BOUNDS_S)
        self._clock = clock
        self._loop = LoopingCall.withCount(self._tick)
        self._loop.clock = clock

    def startService(self) -> None:
        super().startService()
        self._loop.start(TICK_S, now=False)

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _tick(self, due: int) -> None:
        """:param due: 1, and one more for each tick that the reactor had no time for."""
        # As the loop itself reckons: the remainder of a division may be a whole tick for what is none.
        since_start_s = self._clock.seconds() - self._loop.starttime
        after_last_due_s = max(0.0, since_start_s - int(since_start_s / TICK_S) * TICK_S)
        self.lateness.observe((due - 1) * TICK_S + after_last_due_s)
