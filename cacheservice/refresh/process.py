"""The parts of the process that the refreshes use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cacheservice.base.interfaces import Clock, Log
from cacheservice.cache.drain import Drain


class Process(NamedTuple):
    """The clock, the log and the rest of the process.

    :param clock: `IReactorTime`, monotonic.
    :param random: returns a number from 0 to 1.
    :param drain: frees dropped rows; it is stopped with the refreshes.
    """

    clock: Clock
    random: Callable[[], float]
    log: Log
    drain: Drain
