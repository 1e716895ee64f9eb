"""Limits the database time of refreshes to a share of one connection's time over a sliding minute."""

from __future__ import annotations

import math
from collections import deque

from cacheservice.base.interfaces import Clock

WINDOW_S = 60.0
_TOLERANCE_S = 1e-6
"""Tolerance for sums of times that slide out of the window."""


class Use:
    """The use of a session by a refresh: its start, its end, and its expected duration."""

    __slots__ = ("began_at", "ended_at", "expected_s")

    def __init__(self, began_at: float, expected_s: float) -> None:
        self.began_at = began_at
        self.ended_at = math.inf
        self.expected_s = expected_s


class Budget:
    """The time used in the last minute, and whether more fits.

    A running use counts with its expected duration, or with its actual one if that is longer. A use that expects more
    than the whole budget begins when nothing was used for a minute, so that it is not blocked for ever.

    :param share: of one connection's time; 0 for no limit.
    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, share: float, clock: Clock) -> None:
        self._share = share
        self.clock = clock
        self._ended: deque[Use] = deque()
        self._running: set[Use] = set()

    def set_share(self, share: float) -> None:
        """Limit refreshes to another share from now on."""
        self._share = share

    def begin(self, expected_s: float) -> Use:
        """Count a use from now on; the caller passes the result to `end`."""
        use = Use(self.clock.seconds(), expected_s)
        self._running.add(use)
        return use

    def end(self, use: Use) -> None:
        self._running.discard(use)
        use.ended_at = self.clock.seconds()
        self._ended.append(use)
        self._forget_old()

    def used_s(self) -> float:
        """Return the seconds used in the last minute, running uses included."""
        now: float = self.clock.seconds()
        start = now - WINDOW_S
        ended_s = sum(max(0.0, use.ended_at - max(use.began_at, start)) for use in self._ended)
        return ended_s + sum(max(now - max(use.began_at, start), use.expected_s) for use in self._running)

    def fits(self, expected_s: float) -> bool:
        """Return whether a use of that expected duration may begin now."""
        return not self._share or self._excess_s(expected_s) <= _TOLERANCE_S

    def fits_in_s(self, expected_s: float) -> float:
        """Return the seconds until it fits because ended uses leave the window; infinite if that never suffices."""
        excess_s, start = self._excess_s(expected_s), self._window_start()
        edges = sorted(
            edge
            for use in self._ended
            if use.ended_at > start
            for edge in ((max(use.began_at, start) - start, 1), (use.ended_at - start, -1))
        )
        freed_s = before_s = 0.0
        leaving = 0
        for in_s, change in edges:
            if leaving and freed_s + leaving * (in_s - before_s) >= excess_s - _TOLERANCE_S:
                return before_s + max(0.0, excess_s - freed_s) / leaving
            freed_s += leaving * (in_s - before_s)
            before_s, leaving = in_s, leaving + change
        return math.inf

    def _excess_s(self, expected_s: float) -> float:
        most_s = self._share * WINDOW_S
        return self.used_s() + min(expected_s, most_s) - most_s

    def _window_start(self) -> float:
        now: float = self.clock.seconds()
        return now - WINDOW_S

    def _forget_old(self) -> None:
        start = self._window_start()
        while self._ended and self._ended[0].ended_at <= start:
            self._ended.popleft()
