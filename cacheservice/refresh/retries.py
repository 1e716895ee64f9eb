"""The retry rule: when a failed attempt is tried again. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

from cacheservice.base.backoff import full_jitter
from cacheservice.config import DatasetSettings


class Retries:
    """Plans at most one retry: with exponential backoff and full jitter, and never past the next start.

    `at` is when it is due; infinite if none is planned.

    :param random: returns a number from 0 to 1. It is drawn from for each retry.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._wait_s: Callable[[int], float] = lambda _: math.inf
        self.at = math.inf

    def take(self, settings: DatasetSettings) -> None:
        """Use `retry_initial_s` and `retry_max_s` of these settings from the next failure on."""
        self._wait_s = full_jitter(settings.retry_initial_s, settings.retry_max_s, self._random)

    @property
    def is_planned(self) -> bool:
        return self.at < math.inf

    def failed(self, now: float, failures_before: int, next_start_at: float) -> None:
        """Plan a retry of a failed attempt, unless the next start comes first."""
        retry_at = now + self._wait_s(failures_before)
        if retry_at < next_start_at:
            self.at = retry_at

    def start_moved(self, next_start_at: float) -> None:
        """Drop a retry that would come after the next start."""
        if self.at >= next_start_at:
            self.forget()

    def forget(self) -> None:
        """Plan none, because an attempt begins."""
        self.at = math.inf
