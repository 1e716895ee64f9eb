"""The clock of all ages and timers: no setting of the wall clock moves it, and a suspended machine does not stop it."""

from __future__ import annotations

import time
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""CLOCK_MONOTONIC, for systems without the other, stands still while a machine is suspended, and with it every age."""


def seconds() -> float:
    """Seconds since the machine was started, the time for which it was suspended included."""
    return time.clock_gettime(CLOCK)


def boot_id() -> str:
    """The present run of the machine's kernel, which `seconds` is of; empty if it is not known."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
