"""A wait for some time, or for somebody who wakes the waiter."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import is_active


class Wakeup:
    """Lets one coroutine wait. A call of `wake` while nothing waits ends the next wait at once.

    :param clock: `IReactorTime`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: Deferred[None] | None = None
        self._is_awake = False

    def wake(self) -> None:
        """End the wait now."""
        self._is_awake = True
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.callback(None)

    async def wait(self, seconds: float) -> None:
        """Wait for so long, or until `wake` is called."""
        if not self._is_awake:
            self._waiting = waiting = Deferred[None]()
            timer = self._clock.callLater(seconds, self.wake)
            try:
                await waiting
            finally:
                self._waiting = None
                if is_active(timer):
                    timer.cancel()
        self._is_awake = False
