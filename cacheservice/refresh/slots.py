"""At most so many refreshes at once; who needs it most goes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from twisted.internet.defer import Deferred, fail, maybeDeferred

from cacheservice.errors import Stopped

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Waiting:
    need: Callable[[], float]
    failing: Callable[[], bool]
    granted: Deferred[None] = field(default_factory=Deferred)


class Slots:
    """Like `DeferredSemaphore`, but a free slot goes to the greatest need at that moment.

    What fails again and again must not delay what works: it goes after it, and never takes the last
    slot as long as `any_healthy` says that something works.
    """

    def __init__(self, limit: int, any_healthy: Callable[[], bool]) -> None:
        self._free = limit
        self._limit = limit
        self._any_healthy = any_healthy
        self._waiting: list[_Waiting] = []
        self._granting = False
        self._stopped = False

    def set_limit(self, limit: int) -> None:
        """At most `limit` from now on; what runs beyond it runs to its end."""
        self._free += limit - self._limit
        self._limit = limit
        self._grant()

    @property
    def queue_depth(self) -> int:
        return len(self._waiting)

    def run(
        self, need: Callable[[], float], failing: Callable[[], bool], use: Callable[[], Deferred[T]]
    ) -> Deferred[T]:
        """Wait for a slot, call `use`, give the slot back when its Deferred has fired.

        Cancelling gives the place in the queue back, or cancels `use`'s Deferred.

        :raises Stopped: if `stop` was called.
        """
        if self._stopped:
            return fail(Stopped("the service is stopping"))
        waiting = _Waiting(need, failing)
        d: Deferred[T] = waiting.granted.addCallback(lambda _: self._use(use))
        self._waiting.append(waiting)
        self._grant()
        return d.addBoth(self._forget_and_passthrough, waiting)

    def stop(self) -> None:
        """Send everybody in the queue away with `Stopped`."""
        self._stopped = True
        queue, self._waiting = self._waiting, []
        for waiting in queue:
            waiting.granted.errback(Stopped("the service is stopping"))

    def _use(self, use: Callable[[], Deferred[T]]) -> Deferred[T]:
        return maybeDeferred(use).addBoth(self._release_and_passthrough)

    def _release_and_passthrough(self, result: T) -> T:
        self._free += 1
        self._grant()
        return result

    def _forget_and_passthrough(self, result: T, waiting: _Waiting) -> T:
        if waiting in self._waiting:  # it was cancelled before its turn
            self._waiting.remove(waiting)
        return result

    def _grant(self) -> None:
        if self._granting:
            return  # a use that ended at once; the loop below goes on, where a call each would exhaust the stack
        self._granting = True
        try:
            while self._free > 0 and (waiting := self._next()) is not None:
                self._waiting.remove(waiting)
                self._free -= 1
                waiting.granted.callback(None)
        finally:
            self._granting = False

    def _next(self) -> _Waiting | None:
        last_slot_is_kept = self._free == 1 and self._limit > 1 and self._any_healthy()
        candidates = [w for w in self._waiting if not (last_slot_is_kept and w.failing())]
        return max(candidates, key=lambda w: (not w.failing(), w.need()), default=None)
