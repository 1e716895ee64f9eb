"""Owns the timers of a timetable: the LoopingCall of the interval, and a timer for attempts between its starts."""

from __future__ import annotations

from collections.abc import Callable

from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.timers import counting_loop, is_active


class Starts:
    """Calls back at every start of an interval, and at the moment that the timetable asks for.

    :param clock: `IReactorTime`, monotonic.
    :param loop_started: is called when the loop starts, which may be later than planned.
    :param tick: is called with the number of starts since its last call, more than 1 if the reactor was blocked.
    :param wake: is called at the moment passed to `arm`.
    """

    def __init__(
        self,
        clock: Clock,
        loop_started: Callable[[], None],
        tick: Callable[[int], None],
        wake: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._loop_started = loop_started
        self._tick = tick
        self._wake = wake
        self._loop = counting_loop(clock, tick)
        self._interval_s = 0.0
        self._loop_timer: DelayedCall | None = None
        self._wake_timer: DelayedCall | None = None

    def begin(self, in_s: float, interval_s: float) -> None:
        """Start the loop after `in_s` seconds, and end a running one."""
        self._stop_loop()
        self._loop = counting_loop(self._clock, self._tick)  # a stopped loop would count the missed starts
        self._interval_s = interval_s
        self._loop_timer = self._clock.callLater(in_s, self._start)

    def _start(self) -> None:
        self._loop_started()
        self._loop.start(self._interval_s)

    def arm(self, wake_at: float | None) -> None:
        """Call `wake` at `wake_at` only; None for never."""
        if is_active(self._wake_timer):
            if self._wake_timer.getTime() == wake_at:
                return
            self._wake_timer.cancel()
        if wake_at is not None:
            self._wake_timer = self._clock.callLater(max(0.0, wake_at - self._clock.seconds()), self._wake)

    def stop(self) -> None:
        """End both timers."""
        self._stop_loop()
        self.arm(None)

    def _stop_loop(self) -> None:
        if self._loop.running:
            self._loop.stop()
        if is_active(self._loop_timer):
            self._loop_timer.cancel()
