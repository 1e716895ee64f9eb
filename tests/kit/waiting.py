"""Waiting for what has to come, with the reactor and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import deferLater

GIVE_UP_S = 60.0
"""What has not come by then does not come: an answer, a line of the log, the end of a process."""
LONGEST_TEST_S = 600.0
"""The longest time that a test case allows for one test."""


async def until(
    true: Callable[[], object], limit_s: float = LONGEST_TEST_S, seen: Callable[[], object] = lambda: ""
) -> None:
    """Wait in the reactor for something true.

    Trial's own time limit ends a test where it does not come; a clean-up has none, and ends here.

    :param seen: what helps to find out why it did not come.
    """
    limit = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < limit, f"it did not come {seen()}"
        await deferLater(reactor, 0.005)


def wait_until(true: Callable[[], Any], what: str) -> Any:
    """Wait, blocking, for something true, and return it.

    :raises AssertionError: where it does not come; `what` names it.
    """
    limit = time.monotonic() + GIVE_UP_S
    while not (result := true()):
        assert time.monotonic() < limit, f"{what} did not come"
        time.sleep(0.02)
    return result
