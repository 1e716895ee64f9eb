"""The clock of all ages and timers: no setting of the wall clock moves it, and a suspended machine does not stop it."""

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
"""That of a machine itself, PROC_PID_INIT_INO of Linux; containers have others."""
_APPLICATION = bytes.fromhex("7f2b8d0c94e64c0fa1d35b6e0a9c4d21")
"""Fixed: machine-id(5) asks applications to publish only a hash that is keyed with an id of their own."""
CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""CLOCK_MONOTONIC, for systems without the other, stands still while a machine is suspended, and with it every age."""


seconds: Callable[[], float] = partial(time.clock_gettime, CLOCK)
"""Seconds since the machine was started, the time for which it was suspended included.

The reactor asks several times a turn; a function of our own would take twice as long.
"""


class Host(NamedTuple):
    """Identifies the machine and the present run of its kernel. Each is empty if it is not known."""

    boot: str
    machine: str

    @classmethod
    def here(cls) -> Host:
        return cls(boot_id(), machine_id())


def boot_id() -> str:
    """The present run of the machine's kernel, which `seconds` is of; empty if it is not known."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def machine_id() -> str:
    """Return a hash that identifies this machine across restarts; empty if it is not known.

    It is of /etc/machine-id and the host name. Copies of a disk image may share the first, and rarely both. In a
    container it is empty, although the file may be there: it is that of the image, which runs on many machines.
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
