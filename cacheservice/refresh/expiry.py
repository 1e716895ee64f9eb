"""Logs once that a dataset has expired, and once that it has recovered."""

from __future__ import annotations

from dataclasses import replace

from cacheservice.base.interfaces import Clock, DelayedCall, Log
from cacheservice.base.text import seconds
from cacheservice.base.timers import is_active
from cacheservice.cache.dataset import Dataset, State

_MARGIN_S = 0.001
"""A dataset is expired when its age is greater than its limit, not equal to it."""
_LONGEST_TIMER_S = 2_000_000.0
"""epoll accepts at most 2**31 ms."""


class ExpiryWatch:
    """Watches one dataset from its first publish on, until it is stopped.

    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, dataset: Dataset, clock: Clock, log: Log) -> None:
        self._dataset = dataset
        self._clock = clock
        self._log = log
        self._timer: DelayedCall | None = None

    def stop(self) -> None:
        if is_active(self._timer):
            self._timer.cancel()

    def published(self) -> None:
        """Note that another snapshot is served, or that the limit has changed."""
        self.stop()
        if self._dataset.snapshot is None:
            return
        if self._dataset.refresh.logged_expired:
            if self._dataset.state() is State.EXPIRED:
                return  # reading took longer than max_age_s
            self._note_logged(expired=False)
            self._log.info("dataset_recovered")
        age_s = self._dataset.age_s() or 0.0
        in_s = max(0.0, self._dataset.settings.max_age_s - age_s) + _MARGIN_S
        self._timer = self._clock.callLater(min(in_s, _LONGEST_TIMER_S), self._expired)

    def _expired(self) -> None:
        if self._dataset.state() is not State.EXPIRED:
            self.published()
            return
        self._note_logged(expired=True)
        age_s = self._dataset.age_s() or 0.0
        self._log.warning("dataset_expired", age_s=seconds(age_s), max_age_s=self._dataset.settings.max_age_s)

    def _note_logged(self, *, expired: bool) -> None:
        self._dataset.note_refresh(replace(self._dataset.refresh, logged_expired=expired))
