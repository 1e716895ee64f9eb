"""When to try again after failures: exponential, with full jitter.

Full jitter (anywhere from 0 to the exponential bound) spreads many clients best; see Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.application.internet import backoffPolicy


def full_jitter(initial_s: float, most_s: float, random: Callable[[], float]) -> Callable[[int], float]:
    """A function of the number of failures before this one (0, 1, …) that gives seconds to wait.

    :param random: a number from 0 to 1.
    """
    # Twisted's own jitter is added, 0 to 1 s, to the exponential; ours multiplies it.
    bound = backoffPolicy(initial_s, most_s, factor=2.0, jitter=lambda: 0.0)

    def wait_s(failures_before: int) -> float:
        return bound(failures_before) * random()

    return wait_s
