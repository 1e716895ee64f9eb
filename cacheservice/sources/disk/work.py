"""The work of the store in threads, which a stop abandons and waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.base.errors import Stopped
from cacheservice.base.interfaces import Reactor
from cacheservice.base.threads import in_thread

P = ParamSpec("P")
T = TypeVar("T")


class Work:
    """The saves and loads that run.

    It is open at first: work may begin. `stop` closes it: running work ends at its next `go_on` with `Stopped`, and new
    work is refused. `open` opens it again.
    """

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._is_open = True
        self._idle: list[Deferred[None]] = []
        self.running = 0

    def open(self) -> None:
        """Allow work again."""
        self._is_open = True

    def stop(self) -> Deferred[None]:
        """Refuse work, and abandon the work that runs; fires when none is left."""
        self._is_open = False
        stopped: Deferred[None] = Deferred()
        if self.running:
            self._idle.append(stopped)
        else:
            stopped.callback(None)
        return stopped

    def go_on(self) -> None:
        """Check that the work may continue.

        :raises Stopped: if the service is stopping.
        """
        if not self._is_open:
            raise Stopped("the service is stopping")

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the enclosed work, which a stop has to wait for.

        :raises Stopped: if the service is stopping.
        """
        self.go_on()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                idle, self._idle = self._idle, []
                for stopped in idle:
                    stopped.callback(None)

    def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Run `work` in a thread."""
        return in_thread(self._reactor, work, *args, **kwargs)


def shielded(running: Deferred[T]) -> Deferred[T]:
    """Return the result of `running`, which continues if the wait is cancelled.

    A thread cannot be cancelled.
    """
    waiting: Deferred[T] = Deferred()

    def ended(result: T | Failure) -> None:
        if not waiting.called:
            waiting.callback(result)

    running.addBoth(ended)
    return waiting
