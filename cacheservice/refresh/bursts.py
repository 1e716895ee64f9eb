"""Waits for the end of a burst of notifications, because an attempt within it would see only a part."""

from __future__ import annotations

from collections.abc import Callable

from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.timers import is_active

_BURST = 100
"""This many notifications in a row are a burst: a transaction that sends thousands."""
_PAUSE_S = 0.005
_LONGEST_S = 0.1


class Bursts:
    """Calls `ended` at the end of the turn, or of the burst, in which `heard` was called.

    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, clock: Clock, ended: Callable[[], None]) -> None:
        self._clock = clock
        self._ended = ended
        self._count = 0
        self._began_at = 0.0
        self._timer: DelayedCall | None = None

    def heard(self) -> None:
        """Note a notification."""
        if not is_active(self._timer):
            self._count, self._began_at = 0, self._clock.seconds()
            self._timer = self._clock.callLater(0, self._look, 0)
        self._count += 1

    def stop(self) -> None:
        """Call `ended` no more."""
        if is_active(self._timer):
            self._timer.cancel()

    def _look(self, count_before: int) -> None:
        more = self._count - count_before
        is_long = self._clock.seconds() - self._began_at > _LONGEST_S
        if self._count >= _BURST and more and not is_long:
            self._timer = self._clock.callLater(_PAUSE_S, self._look, self._count)
        else:
            self._ended()
