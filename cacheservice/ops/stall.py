"""How long the reactor keeps everybody waiting, measured all the time by a tick that tells how late it came."""

from __future__ import annotations

from typing import Any

from twisted.application.service import Service
from twisted.internet.task import LoopingCall

from cacheservice.cache.counts import Histogram

TICK_S = 0.01
"""A hundred ticks cost 2 ms of CPU (measured): 0.2 % of a core."""
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StallWatch(Service):
    """Ticks while it runs, and counts by how many seconds each tick came too late.

    A turn of the reactor that takes longer than a tick is always seen, as shorter than it was by at most one tick; one
    that takes less, as often as a tick falls into it. After a long one the ticks that were missed are not made up for.

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
