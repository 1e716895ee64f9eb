"""Logs once that a dataset has expired, and once that it has recovered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.text import seconds
from cacheservice.base.timers import Alarm
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset, State
from cacheservice.cache.events import Changed, Ended, Event, Published, Renewed

_MARGIN_S = 0.001
"""A dataset is expired when its age is greater than its limit, not equal to it."""
_LONGEST_TIMER_S = 2_000_000.0
"""epoll accepts at most 2**31 ms."""


class Expiries:
    """Watches all datasets that serve something, whether this process has read it or another one.

    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, cache: Cache, clock: Clock, log: Log) -> None:
        self._cache = cache
        self._clock = clock
        self._log = log
        self._alarms: dict[str, Alarm] = {}
        self._unsubscribe: Callable[[], None] | None = None

    def start(self) -> None:
        """Watch from now on."""
        self._unsubscribe = self._cache.events.subscribe(self._happened, Published, Renewed, Changed, Ended)
        for dataset in self._cache.datasets.values():
            self._look(dataset)

    def stop(self) -> None:
        """Watch nothing any more."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        for alarm in self._alarms.values():
            alarm.clear()
        self._alarms.clear()

    def _happened(self, event: Event) -> None:
        if isinstance(event, Ended):
            self._clear(event.dataset)
        else:
            self._look(self._cache.dataset(event.dataset))

    def _clear(self, name: str) -> None:
        alarm = self._alarms.pop(name, None)
        if alarm is not None:
            alarm.clear()

    def _look(self, dataset: Dataset) -> None:
        """Note that another snapshot is served, or that the limit has changed."""
        self._clear(dataset.name)
        if dataset.snapshot is None:
            return
        if dataset.refresh.logged_expired:
            if dataset.state() is State.EXPIRED:
                return  # reading took longer than max_age_s
            dataset.note_refresh(replace(dataset.refresh, logged_expired=False))
            self._log.info("dataset_recovered", dataset=dataset.name)
        in_s = max(0.0, dataset.settings.max_age_s - (dataset.age_s() or 0.0)) + _MARGIN_S
        self._alarms[dataset.name] = alarm = Alarm(self._clock)
        alarm.set(min(in_s, _LONGEST_TIMER_S), lambda: self._due(dataset))

    def _due(self, dataset: Dataset) -> None:
        if dataset.state() is not State.EXPIRED:
            self._look(dataset)
            return
        dataset.note_refresh(replace(dataset.refresh, logged_expired=True))
        age_s, max_age_s = dataset.age_s() or 0.0, dataset.settings.max_age_s
        self._log.warning("dataset_expired", dataset=dataset.name, age_s=seconds(age_s), max_age_s=max_age_s)
