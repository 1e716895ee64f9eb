"""Limits concurrent refreshes and the database time they use. The most urgent dataset goes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from twisted.internet.defer import Deferred, fail, maybeDeferred

from cacheservice.base.errors import Stopped
from cacheservice.base.interfaces import DelayedCall
from cacheservice.base.timers import is_active
from cacheservice.refresh.budget import Budget, Use

T = TypeVar("T")

MOST_PASSED_OVER = 20
"""How many others go before a failing use; one failure must not keep a dataset from a busy database for good."""


@dataclass(eq=False, slots=True)
class _Waiting:
    need: Callable[[], float]
    failing: Callable[[], bool]
    urgent: Callable[[], bool]
    expected_s: Callable[[], float]
    put_off: Callable[[], None]
    granted: Deferred[None] = field(default_factory=Deferred)
    passed_over: int = 0
    """How many others were granted a slot while this one waited."""
    took_turn_failing: bool = False


class Slots:
    """Like `DeferredSemaphore`, but a free slot goes to the greatest need at that moment.

    Failing uses must not delay working ones: they go last, and never take the last slot while `any_healthy` returns
    True. After `MOST_PASSED_OVER` others a failing use has a turn like them, one failing use at a time.

    A use that does not fit the budget waits, and so does every use with less need behind it: otherwise quick datasets
    would use up the rest, and a slow one would never have its turn. An urgent use counts, but only waits for a slot.
    """

    def __init__(self, limit: int, any_healthy: Callable[[], bool], budget: Budget) -> None:
        self.budget = budget
        self._free = limit
        self._limit = limit
        self._any_healthy = any_healthy
        self._waiting: list[_Waiting] = []
        self._failing_uses = 0
        self._granting = False
        self._stopped = False
        self._timer: DelayedCall | None = None

    def set_limit(self, limit: int) -> None:
        """Allow `limit` uses at once from now on; running uses beyond it run to their end."""
        self._free += limit - self._limit
        self._limit = limit
        self.grant()

    @property
    def queue_depth(self) -> int:
        return len(self._waiting)

    def run(
        self,
        need: Callable[[], float],
        failing: Callable[[], bool],
        use: Callable[[], Deferred[T]],
        *,
        urgent: Callable[[], bool] = lambda: False,
        expected_s: Callable[[], float] = lambda: 0.0,
        put_off: Callable[[], None] = lambda: None,
    ) -> Deferred[T]:
        """Wait for a slot, call `use`, and free the slot when its Deferred has fired.

        Cancelling leaves the queue, or cancels the Deferred of `use`.

        :param urgent: returns whether the budget does not apply.
        :param expected_s: returns how long the use will probably take.
        :param put_off: is called, perhaps often, while a slot is free and only the budget delays the use.
        :raises Stopped: if `stop` was called.
        """
        if self._stopped:
            return fail(Stopped("the service is stopping"))
        waiting = _Waiting(need, failing, urgent, expected_s, put_off)
        d: Deferred[T] = waiting.granted.addCallback(lambda _: self._use(use, waiting))
        self._waiting.append(waiting)
        self.grant()
        return d.addBoth(self._forget_and_passthrough, waiting)

    def stop(self) -> None:
        """Fail everything in the queue with `Stopped`."""
        self._stopped = True
        self._forget_timer()
        queue, self._waiting = self._waiting, []
        for waiting in queue:
            waiting.granted.errback(Stopped("the service is stopping"))

    def _use(self, use: Callable[[], Deferred[T]], waiting: _Waiting) -> Deferred[T]:
        counted = self.budget.begin(waiting.expected_s())
        return maybeDeferred(use).addBoth(self._release_and_passthrough, counted, waiting)

    def _release_and_passthrough(self, result: T, counted: Use, waiting: _Waiting) -> T:
        self.budget.end(counted)
        self._free += 1
        self._failing_uses -= waiting.took_turn_failing
        self.grant()
        return result

    def _forget_and_passthrough(self, result: T, waiting: _Waiting) -> T:
        if waiting in self._waiting:  # it was cancelled before its turn
            self._waiting.remove(waiting)
            self.grant()  # the budget may have held back others behind it
        return result

    def grant(self) -> None:
        """Grant free slots, because something has changed."""
        if self._granting:
            return  # a use ended at once: the loop below continues, because nested calls would exhaust the stack
        self._granting = True
        self._forget_timer()
        try:
            while self._free > 0 and (waiting := self._next()) is not None:
                self._waiting.remove(waiting)
                self._free -= 1
                waiting.took_turn_failing = waiting.failing()
                self._failing_uses += waiting.took_turn_failing
                for other in self._waiting:
                    other.passed_over += 1
                waiting.granted.callback(None)
        finally:
            self._granting = False

    def _next(self) -> _Waiting | None:
        last_slot_is_kept = self._free == 1 and self._limit > 1 and self._any_healthy()
        candidates = [w for w in self._waiting if not (last_slot_is_kept and self._is_put_back(w))]
        first = self._neediest(candidates)
        if first is None or first.urgent() or self.budget.fits(first.expected_s()):
            return first
        urgent = self._neediest(w for w in candidates if w.urgent())
        if urgent is None:
            for waiting in candidates:
                waiting.put_off()
            in_s = self.budget.fits_in_s(first.expected_s())
            if in_s < math.inf:  # otherwise the end of a running use grants again
                self._timer = self.budget.clock.callLater(in_s, self.grant)
        return urgent

    def _is_put_back(self, waiting: _Waiting) -> bool:
        is_overdue = waiting.passed_over >= MOST_PASSED_OVER and not self._failing_uses
        return waiting.failing() and not is_overdue

    def _neediest(self, waiting: Iterable[_Waiting]) -> _Waiting | None:
        return max(waiting, key=lambda w: (not self._is_put_back(w), w.need()), default=None)

    def _forget_timer(self) -> None:
        if is_active(self._timer):
            self._timer.cancel()
