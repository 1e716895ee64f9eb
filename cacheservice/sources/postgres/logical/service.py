"""Captures the changes of watched tables from the write-ahead log, while a dataset needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import random

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.python.failure import Failure

from cacheservice.base.backoff import full_jitter
from cacheservice.base.errors import RefreshFailed
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.timers import pause
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.capture import CaptureState, CaptureStatus
from cacheservice.sources.postgres.connector import ReplicationSession
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.listening.opening import Access, ListenerSessions
from cacheservice.sources.postgres.logical import environment
from cacheservice.sources.postgres.logical.pgoutput import BadChanges
from cacheservice.sources.postgres.logical.streaming import Streaming, Surroundings
from cacheservice.sources.postgres.target import Target

_QUERY_WITHIN_S = 5.0
_ANSWER_WITHIN_S = 5.0
_RETRY_INITIAL_S, _RETRY_MAX_S = 0.5, 30.0
_RETRY_SLOWLY_S = 30.0
"""While the server or the role must be changed first."""
_FIRST_WITHIN_S = 0.5
"""The first reads after a start wait so long for the stream, because only a later read can be the start of a delta."""

_OF_A_POOLER = "unsupported startup parameter"
"""How PgBouncer before 1.23 answers a session for replication."""
_POOLED = "name a direct connection in postgres.dsn, or upgrade PgBouncer to 1.23"


class _Impossible(Exception):
    """Nothing can be streamed before something is changed."""


class Capture(Service):
    """Streams changes, and opens another stream when one is lost. Each stream has a slot of its own.

    It is `off` while no dataset needs it; otherwise its loop opens one stream after the other, and waits between two of
    them. See `CaptureStatus` for the states.
    """

    name = "capture"

    def __init__(
        self, access: Access, around: Surroundings, status: DatabaseStatus, jitter: Callable[[], float] = random
    ) -> None:
        self.publication = ""
        self._around = around
        self._jitter = jitter
        self._sessions = ListenerSessions(around.reactor, access, status, _ANSWER_WITHIN_S)
        self._loop: Deferred[None] | None = None
        self._streaming: Streaming | None = None
        self._state: CaptureState = "off"
        self._problem: str | None = None
        self._restarts: Counter[str] = Counter()
        self._before = CaptureStatus()
        self._settling: list[Deferred[None]] = []
        self._was_missed = self._has_streamed = False
        status.see_capture_by(self.status)

    def startService(self) -> None:
        super().startService()
        self._begin()

    def stopService(self) -> Deferred[None]:
        """End the stream; fires when no session is left."""
        super().stopService()
        return self._end()

    def capture(self, publication: str, datasets: Iterable[str]) -> None:
        """Stream the changes of a publication for these datasets from now on; without datasets, nothing."""
        names = set(datasets)
        if self._streaming is not None:
            self._streaming.captured.keep_only(names)
        wanted = publication if names else ""
        if wanted != self.publication:
            self.publication = wanted
            self._begin_again()

    def configure(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions with these settings; begin another stream if the database changed."""
        if self._sessions.configure(target, connect_timeout_s):
            self._begin_again()

    def status(self) -> CaptureStatus:
        """Return the state, with counts since the start of the service."""
        streaming = self._streaming
        now = CaptureStatus(self._state, self._problem) if streaming is None else streaming.status()
        return replace(
            now,
            restarts=dict(self._restarts),
            transactions=self._before.transactions + now.transactions,
            keys=self._before.keys + now.keys,
        )

    @property
    def streaming(self) -> Streaming | None:
        """The stream; None if there is none now, or its slot does not exist yet."""
        return self._streaming if self._streaming is not None and self._streaming.is_streaming else None

    def why_not(self) -> str:
        """Return why there is no stream now, which a read has found."""
        self._was_missed = True
        return self.status().problem or "the stream of changes from the log has not begun yet"

    async def settle(self) -> None:
        """Wait for a stream that is being opened, but not for long."""
        if self.running and self.publication and self.streaming is None and self.status().state == "starting":
            settled: Deferred[None] = Deferred()
            self._settling.append(settled)
            timer = self._around.reactor.callLater(_FIRST_WITHIN_S, self._settle)
            try:
                await settled
            finally:
                if timer.active():
                    timer.cancel()

    def _settle_soon(self) -> None:
        """Let the reads that wait go on in a turn of their own, not while an error is handled."""
        self._around.reactor.callLater(0, self._settle)

    def _settle(self) -> None:
        settling, self._settling = self._settling, []
        for each in settling:
            if not each.called:  # cancelled
                each.callback(None)

    def _begin(self) -> None:
        if self.running and self.publication and self._loop is None:
            self._state, self._problem = "starting", None
            self._loop = Deferred.fromCoroutine(self._keep_streaming(self.publication))
            self._loop.addBoth(self._ended)

    def _begin_again(self) -> None:
        if self._loop is None:
            self._begin()
        else:
            self._end()  # another one begins then

    def _end(self) -> Deferred[None]:
        loop = self._loop
        if loop is None:
            return succeed(None)
        ended: Deferred[None] = Deferred()
        loop.addBoth(lambda _: ended.callback(None))
        # In a turn of its own, because the stream cannot be cancelled while it runs.
        self._around.reactor.callLater(0, loop.cancel)
        return ended

    def _ended(self, result: object) -> None:
        self._loop = None
        self._state, self._problem = "off", None
        self._settle_soon()
        if isinstance(result, Failure) and not result.check(CancelledError):
            log_internal_error(self._around.log, result)
        self._begin()  # what is wanted since

    async def _keep_streaming(self, publication: str) -> None:
        """Open one stream after the other, until cancelled."""
        delay_s = full_jitter(_RETRY_INITIAL_S, _RETRY_MAX_S, self._jitter)
        failures = 0
        while True:
            try:
                await self._stream(publication)
            except CancelledError:
                raise
            except _Impossible as error:
                self._fail("impossible", str(error), _RETRY_SLOWLY_S)
                await pause(self._around.reactor, _RETRY_SLOWLY_S)
                continue
            except (RefreshFailed, BadChanges) as error:
                problem = f"{error}; {_POOLED}" if _OF_A_POOLER in str(error) else str(error)
            except Exception:
                log_internal_error(self._around.log, Failure())
                problem = "an internal error; its traceback is in the log"
            failures = 0 if self._has_streamed else failures + 1
            retry_in_s = delay_s(failures)
            self._fail("lost", problem, retry_in_s)
            await pause(self._around.reactor, retry_in_s)

    async def _stream(self, publication: str) -> None:
        self._has_streamed = False
        found = await self._around.database.environment(publication, _QUERY_WITHIN_S)
        if (problem := environment.problem(found, publication)) is not None:
            raise _Impossible(problem)

        async def use(guard: GuardedConnection) -> None:
            self._streaming = streaming = Streaming(guard, found, self._around, self._began)
            try:
                await streaming.run(publication)
            finally:
                self._before = self.status()
                self._streaming = None

        await self._sessions.use("changes", use, ReplicationSession)

    def _began(self) -> None:
        self._has_streamed = True
        self._problem = None
        self._around.log.info("capture_began", slot=self._streaming and self._streaming.slot)
        self._settle_soon()
        if self._was_missed:
            # In a turn of its own: the refreshes that this starts use the stream, which runs now.
            self._was_missed = False
            self._around.reactor.callLater(0, self._around.observer.missed)

    def _fail(self, state: CaptureState, problem: str, retry_in_s: float) -> None:
        """Note why nothing is streamed; the log has a line for each change, not for each try."""
        is_new = problem != self._problem
        self._state, self._problem = state, problem
        self._settle_soon()
        if state == "lost":
            self._restarts["lost"] += self._has_streamed
            self._was_missed = True
        if is_new:
            event = "capture_impossible" if state == "impossible" else "capture_lost"
            self._around.log.warning(event, error=problem, retry_in_s=round(retry_in_s, 3))
