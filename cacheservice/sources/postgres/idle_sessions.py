"""The sessions that are kept between two uses, and the uses that wait for one.

A kept session is used again if nothing has arrived on it meanwhile (its end, or the reason why the server ended it), if
it is not too old, and if its last use succeeded: after a failure its state is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Clock
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.keeping import IDLE_LIMIT_S, LIFETIME_S, Window, is_next_use_near, planned
from cacheservice.sources.postgres.target import Target


@dataclass(slots=True, eq=False)
class PooledSession:
    """A session of the pool, which is in use or idle.

    :param target: the target where it was opened.
    :param has_room: whether the role may hold it idle; None until asked.
    """

    guard: GuardedConnection
    target: Target
    opened_at: float
    has_room: bool | None = None

    def note_room(self, has_room: bool) -> None:
        """Note whether the role may hold the session idle."""
        self.has_room = has_room


class IdleSessions:
    """The idle sessions, and the times in which they will be used again.

    :param close: called with each idle session that ends.
    """

    def __init__(self, clock: Clock, close: Callable[[GuardedConnection], object]) -> None:
        self._clock = clock
        self._close = close
        self._idle: list[PooledSession] = []  # the session used last is last
        self._windows: dict[str, Window] = {}

    def plan(self, purpose: str, again_in_s: float) -> None:
        """Note that `purpose` uses a session now, and when again; 0 for any moment."""
        self._windows[purpose] = planned(self._clock.seconds(), again_in_s)

    def is_use_near(self) -> bool:
        """Return whether any purpose will soon use a session."""
        return is_next_use_near(self._clock.seconds(), self._windows.values())

    def is_young(self, session: PooledSession) -> bool:
        """Return whether a session may be used once more."""
        return self._clock.seconds() < session.opened_at + LIFETIME_S

    def add(self, session: PooledSession) -> None:
        """Keep a session until it is taken, or was idle for too long."""
        session.guard.renew(self._clock.seconds() + IDLE_LIMIT_S)
        session.guard.on_end(lambda: self._expired(session))
        self._idle.append(session)

    def take(self) -> PooledSession | None:
        """Return a kept session that is as good as a new one."""
        while self._idle:
            session = self._idle.pop()
            if self.is_young(session) and session.guard.is_quiet():
                return session
            self._close(session.guard)
        return None

    def end(self) -> None:
        """End the idle sessions, and forget when they would be used."""
        self._windows.clear()
        idle, self._idle = self._idle, []
        for session in idle:
            self._close(session.guard)

    def _expired(self, session: PooledSession) -> None:
        self._idle.remove(session)
        self._close(session.guard)


class Returns:
    """Waits for a session in use to be returned. The first that waits gets it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[Deferred[bool]] = []

    def __bool__(self) -> bool:
        """Return whether a use waits."""
        return bool(self._waiting)

    def returned(self) -> None:
        """End the first wait, if there is one, because a session was returned."""
        if self._waiting:
            self._answer(self._waiting[0], True)

    async def wait(self, until: float) -> bool:
        """Wait until a session is returned; return False if none is by the moment `until`."""
        returned: Deferred[bool] = Deferred()
        self._waiting.append(returned)
        timer = self._clock.callLater(max(0.0, until - self._clock.seconds()), self._answer, returned, False)
        try:
            return await returned
        finally:
            if timer.active():
                timer.cancel()
            if returned in self._waiting:
                self._waiting.remove(returned)

    def _answer(self, returned: Deferred[bool], is_back: bool) -> None:
        self._waiting.remove(returned)
        returned.callback(is_back)
