"""The age of saved rows, by the clocks of the machine that read them and of the one that loads them. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from cacheservice.clock import Host


class Age(NamedTuple):
    """The age of saved rows, and why that is uncertain; None if it is not."""

    seconds: float
    uncertain: str | None = None


class ReadOn(NamedTuple):
    """When rows were read, by the clocks of the machine that read them.

    `wall_us` since 1970 by its wall clock; `boot_us` since it was started, in the run of its kernel named `boot`;
    `machine` identifies it. Both names are empty if they were not known.
    """

    wall_us: int
    boot: str
    boot_us: int
    machine: str = ""

    def age(self, as_of: datetime, wall_s: float, boot_s: float, host: Host) -> Age:
        """Return the age at these moments of the clocks of the machine `host`.

        Exact within one run of the kernel. On the same machine after a restart of it by its wall clock, and if that
        was set back, at least the time since the start: the rows were read before. That time means nothing for rows
        that were read elsewhere: their age is the greater one of those by the clock of the other machine and by that
        of the database, `as_of`.
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
