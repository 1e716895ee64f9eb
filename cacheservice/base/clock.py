"""The clock of all ages and timers.

It ignores changes of the wall clock and continues while a machine is suspended.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MACHINE_ID = Path("/etc/machine-id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The inode of the PID namespace of the machine itself (PROC_PID_INIT_INO of Linux). Containers have others."""
_APPLICATION = bytes.fromhex("7f2b8d0c94e64c0fa1d35b6e0a9c4d21")
"""A fixed application ID: machine-id(5) asks applications to publish only a hash of the machine ID, keyed with it."""
CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Systems without CLOCK_BOOTTIME use CLOCK_MONOTONIC, which stops, with every age, while a machine is suspended."""


seconds: Callable[[], float] = partial(time.clock_gettime, CLOCK)
"""Seconds since the machine was started, including time when it was suspended.

This is a C function because the reactor calls it several times a turn. A Python function would take twice as long.
"""


class Host(NamedTuple):
    """Identifies a machine and the current run of its kernel. An unknown ID is empty."""

    boot: str
    machine: str

    @classmethod
    def here(cls) -> Host:
        return cls(boot_id(), machine_id())


def boot_id() -> str:
    """Return the ID of the current run of the kernel; empty if unknown.

    The values of `seconds` are comparable only within one run.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def machine_id() -> str:
    """Return a hash that identifies this machine across restarts; empty if unknown.

    It covers /etc/machine-id and the host name. Copies of a disk image may share the first, but rarely share both. In a
    container the hash is empty even if the file exists: the file belongs to the image, which runs on many machines.
    """
    try:
        namespace = os.readlink(_PID_NAMESPACE)
        machine = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    if namespace != _FIRST_PID_NAMESPACE or len(machine) != 32:
        return ""
    name = f"{machine} {os.uname().nodename}".encode()
    return hmac.digest(name, _APPLICATION, hashlib.sha256).hex()[:32]
