"""Timers on a clock that is handed in: pauses, later calls, periodic calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, TypeVar, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall, deferLater

from cacheservice.base.interfaces import Clock, DelayedCall

T = TypeVar("T")


def pause(clock: Clock, seconds: float = 0.0) -> Deferred[None]:
    """Fire after so many seconds; with 0 in the next turn of the reactor, so that others have theirs."""
    return deferLater(cast("IReactorTime", clock), seconds)


def after(clock: Clock, seconds: float, call: Callable[[], T]) -> Deferred[T]:
    """Fire with the result of `call`, which is called after so many seconds; cancelling cancels the call."""
    return deferLater(cast("IReactorTime", clock), seconds, call)


def looping(clock: Clock, call: Callable[[], object]) -> LoopingCall:
    """Return a LoopingCall that uses `clock`, not started yet."""
    loop = LoopingCall(call)
    loop.clock = cast("IReactorTime", clock)
    return loop


def counting_loop(clock: Clock, call: Callable[[int], object]) -> LoopingCall:
    """Return a LoopingCall on `clock` that passes the number of starts since its last call."""
    loop = LoopingCall.withCount(call)
    loop.clock = cast("IReactorTime", clock)
    return loop


def next_turns(clock: Clock) -> Callable[[Callable[[], None]], IDelayedCall]:
    """Return a scheduler for a `Cooperator`: one step in each turn of the reactor."""
    return lambda step: cast("IDelayedCall", clock.callLater(0, step))


def is_active(call: DelayedCall | None) -> TypeGuard[DelayedCall]:
    """Return whether there is a call that is still to come."""
    return call is not None and call.active()


class Alarm:
    """One call at a later time, which replaces the one before."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._call: DelayedCall | None = None

    def set(self, seconds: float, call: Callable[[], object]) -> None:
        """Call after so many seconds, instead of what was set before."""
        self.clear()
        self._call = self._clock.callLater(seconds, call)

    def clear(self) -> None:
        """Make no call."""
        call, self._call = self._call, None
        if is_active(call):
            call.cancel()
