"""The clocks of this machine, from which the age of saved rows is counted across restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from cacheservice.base import clock
from cacheservice.base.clock import Host
from cacheservice.base.interfaces import Clock
from cacheservice.sources.frames.age import ReadOn
from cacheservice.sources.frames.header import Header


class ReadAt(NamedTuple):
    """The moment rows were read, in seconds of the monotonic clock, and the reason if it is uncertain."""

    seconds: float
    uncertain: str | None


class Clocks:
    """The clocks of one machine.

    :param monotonic: the clock of `Snapshot.read_at`.
    :param wall_s: the wall clock, in seconds since 1970. It counts the age of files that were written before the
        machine was started, or on another machine.
    :param host: the machine and the run of its kernel; this one unless given.
    :param boot_s: the clock since the start of the machine, in seconds.
    """

    def __init__(
        self,
        monotonic: Clock,
        wall_s: Callable[[], float] = time.time,
        host: Host | None = None,
        boot_s: Callable[[], float] = clock.seconds,
    ) -> None:
        self._monotonic = monotonic
        self._boot_s = boot_s
        self._wall_s = wall_s
        self._host = Host.here() if host is None else host

    def read_on(self, read_at: float) -> ReadOn:
        """Return a moment of the monotonic clock by the clocks that a file records."""
        age_s = self._monotonic.seconds() - read_at
        wall_s, boot_s = self._wall_s() - age_s, self._boot_s() - age_s
        return ReadOn(int(wall_s * 1e6), self._host.boot, int(boot_s * 1e6), self._host.machine)

    def read_at(self, header: Header) -> ReadAt:
        """Return the moment the rows of a file were read."""
        age = header.age(self._wall_s(), self._boot_s(), self._host)
        return ReadAt(self._monotonic.seconds() - age.seconds, age.uncertain)
