"""What a thread asks of the kernel's scheduler."""

from __future__ import annotations

import os
import threading

from cacheservice.base.scheduling import LONGEST_S, SHORTEST_S, ask_for_slices


def test_a_priority_is_kept() -> None:
    """The thread's policy and priority stay as they were."""
    found: list[object] = []

    def in_a_thread() -> None:
        before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        for seconds in (SHORTEST_S, LONGEST_S):
            ask_for_slices(seconds)
            after = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            found.append(after == before)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_another_policy_is_kept() -> None:
    """A thread that runs in batches goes on doing so."""
    found: list[object] = []

    def in_a_thread() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        found.extend((ask_for_slices(SHORTEST_S), os.sched_getscheduler(0)))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [False, os.SCHED_BATCH]
