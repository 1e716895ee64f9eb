"""The age of saved rows, by the clocks of two machines. No I/O.

The machine that read the rows and the machine that loads them may differ.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from cacheservice.base.clock import Host


class Age(NamedTuple):
    """The age of saved rows, and the reason if it is uncertain; None if it is certain."""

    seconds: float
    uncertain: str | None = None


class ReadOn(NamedTuple):
    """The moment rows were read, by the clocks of the machine that read them.

    `wall_us` counts from 1970 by its wall clock; `boot_us` counts from its start, in the run of its kernel named
    `boot`; `machine` identifies it. Both names are empty if they were not known.
    """

    wall_us: int
    boot: str
    boot_us: int
    machine: str = ""

    def age(self, as_of: datetime, wall_s: float, boot_s: float, host: Host) -> Age:
        """Return the age at these clock readings of the machine `host`.

        Within one run of the kernel the age is exact. After a restart of the same machine it is counted by the wall
        clock. If that clock was set back, the age is at least the time since the start, because the rows were read
        before the start. The time since the start means nothing for rows from another machine: their age is the greater
        of the ages by the other machine's clock and by the database's clock, `as_of`.
        """
        if host.boot and host.boot == self.boot:
            return Age(max(0.0, boot_s - self.boot_us / 1e6))
        by_wall_s = wall_s - self.wall_us / 1e6
        if host.machine and host.machine == self.machine:
            if host.boot and self.boot and by_wall_s < boot_s:
                return Age(boot_s, "the clock of this machine was set back since it was saved; it is at least that old")
            return Age(max(0.0, by_wall_s))
        known = host.machine and self.machine
        uncertain = "it was saved on another machine" if known else "it may have been saved on another machine"
        if by_wall_s < 0:
            uncertain += ", and the clock there was ahead of this one"
        return Age(max(0.0, by_wall_s, wall_s - as_of.timestamp()), uncertain)
