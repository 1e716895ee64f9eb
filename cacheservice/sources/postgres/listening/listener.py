"""Receives NOTIFYs over one session for all datasets, and opens another session when that one is lost."""

from __future__ import annotations

from collections.abc import Iterable

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.python.failure import Failure

from cacheservice.base.errors import DatabaseUnavailable, RefreshFailed
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.timers import pause
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.listening.calls import Calls, Observer
from cacheservice.sources.postgres.listening.canaries import Canaries
from cacheservice.sources.postgres.listening.failures import Failures, Problem
from cacheservice.sources.postgres.listening.opening import Access, ListenerSessions
from cacheservice.sources.postgres.listening.pace import Pace
from cacheservice.sources.postgres.listening.session import ListeningSession
from cacheservice.sources.postgres.target import Target

DEFAULT_PACE = Pace()


class Listener(Service):
    """Listens to all channels in one session, which is reopened when it is lost.

    It is idle while it does not run, or has no channel: there is no session. Otherwise its loop opens one session after
    the other, and waits between two of them.

    `canaries` counts the canaries that were sent, `failures` the failures since the last proof.

    :param observer: called with each notification, and when notifications may have been missed.
    :param status: records whether notifications arrive.
    :param reactor: its clock must be monotonic.
    """

    name = "listener"

    def __init__(
        self,
        access: Access,
        observer: Observer,
        status: DatabaseStatus,
        reactor: Reactor,
        log: Log,
        pace: Pace = DEFAULT_PACE,
    ) -> None:
        self._channels: frozenset[str] = frozenset()
        self._calls = Calls(observer, log)
        self._status = status
        self._reactor = reactor
        self._log = log
        self._pace = pace
        self._sessions = ListenerSessions(reactor, access, status, pace.answer_within_s)
        self._loop: Deferred[None] | None = None
        self._session: ListeningSession | None = None
        self.canaries = Canaries()
        self.failures = Failures(pace)

    def startService(self) -> None:
        super().startService()
        self._begin()

    def stopService(self) -> Deferred[None]:
        """Stop listening; fires when no session is left."""
        super().stopService()
        return self._end()

    def listen_to(self, channels: Iterable[str]) -> None:
        """Listen to these channels only, from now on, in the existing session."""
        self._channels = frozenset(channels)
        if self._session is not None:
            self._session.wake()
        if self.running:
            if self._channels:
                self._begin()
            else:
                self._end()

    def configure(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions with these settings; end the session if the database changed."""
        moved = self._sessions.configure(target, connect_timeout_s)
        if moved and self._session is not None:
            self._session.guard.abort(DatabaseUnavailable("postgres.dsn was changed"))

    def give_up_session(self) -> bool:
        """End the listener's sessions, because a refresh needs a connection.

        :returns: False if there was none to end.
        """
        return self._sessions.give_up()

    def heard_all(self) -> Deferred[bool]:
        """Wait until all earlier notifications have been received.

        Fires with False if that cannot be known. A listening session receives notifications in the order of the
        commits, so a canary arrives after all of them.
        """
        return succeed(False) if self._session is None else self._session.heard_all()

    def _begin(self) -> None:
        self._status.want_listening(bool(self._channels))
        if self._channels and self._loop is None:
            self._loop = Deferred.fromCoroutine(self._keep_listening())
            self._loop.addBoth(self._ended)

    def _end(self) -> Deferred[None]:
        self._status.want_listening(False)
        loop = self._loop
        if loop is None:
            return succeed(None)
        ended: Deferred[None] = Deferred()
        loop.addBoth(lambda _: ended.callback(None))
        if self._calls.running:
            self._reactor.callLater(0, loop.cancel)  # called by the observer: the loop waits for nothing now
        else:
            loop.cancel()
        return ended

    def _ended(self, result: object) -> None:
        self._loop = None
        self.failures = Failures(self._pace)
        self._status.stopped_listening()
        if isinstance(result, Failure) and not result.check(CancelledError):
            log_internal_error(self._log, result)
        if self.running:
            self._begin()  # channels were added again while it ended

    async def _keep_listening(self) -> None:
        """Open one session after the other, until cancelled."""
        while True:
            try:
                await self._sessions.use("listens", self._listen)
            except CancelledError:
                raise
            except RefreshFailed as error:
                problem = self.failures.failed(error)
            except Exception:
                log_internal_error(self._log, Failure())
                problem = self.failures.lost("an internal error; its traceback is in the log")
            self._report(problem)
            await pause(self._reactor, problem.retry_in_s)

    async def _listen(self, guard: GuardedConnection) -> None:
        session = ListeningSession(guard, self._sessions, self.canaries, self._calls, self._reactor, self._pace)
        self._session = session
        try:
            await session.listen(lambda: self._channels, self._proven)
        finally:
            self._session = None

    def _proven(self, at: float) -> None:
        """Report that notifications arrive; the log has a line for each change, not for each proof."""
        self._status.listens(at)
        if self.failures.proven():
            self._log.info("listening_began", channels=len(self._channels))

    def _report(self, problem: Problem) -> None:
        """Report why nothing listens; the log has a line for each change, not for each try."""
        self._status.hears_nothing(problem.text)
        if not problem.is_new:
            return
        if problem.kind == "lost":
            self._log.warning("listening_lost", error=problem.text, retry_in_s=round(problem.retry_in_s, 3))
        else:
            error = f"{problem.text}; datasets are refreshed on their intervals"
            self._log.warning("listening_impossible", error=error)
