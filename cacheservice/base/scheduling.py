"""How soon the kernel gives this thread a core when it has to do something while other threads use all cores.

Linux runs the thread whose slice ends first (EEVDF), so one that asks for short slices is given a core soon after it
wakes up. It gets no more time than others in the long run, and needs no privilege. See sched(7) and sched_setattr(2);
the slice is used since Linux 6.12, and ignored before.
"""

from __future__ import annotations

import ctypes
import os
import sys

SHORTEST_S, LONGEST_S = 0.0001, 0.1
"""The bounds of the kernel."""
_NUMBERS = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
"""Of the system call, by architecture: glibc has no function for it before 2.41."""


class _Attributes(ctypes.Structure):
    """``struct sched_attr``; the policy is SCHED_OTHER."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def ask_for_slices(seconds: float) -> bool:
    """Ask for slices of this length for the calling thread; return whether the kernel knows the call.

    Its priority stays as it is. A thread of another policy than SCHED_OTHER, such as SCHED_BATCH, stays as it is, too.
    """
    number = _NUMBERS.get(os.uname().machine)
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    wanted = _Attributes(
        ctypes.sizeof(_Attributes), nice=os.getpriority(os.PRIO_PROCESS, 0), runtime_ns=int(seconds * 1e9)
    )
    return int(ctypes.CDLL(None).syscall(number, 0, ctypes.byref(wanted), 0)) == 0
