"""Leads: of each unit the one process that may refresh and publish it, by advisory locks of one session.

A lock is held as long as the session lives. The server ends the session once it has heard nothing for `silent_s`, so a
process that is suspended, or cut off by the network, loses its leads although its connection still exists. The process
itself gives them up earlier: it ends the session if a heartbeat is not answered in time. A suspended process cannot do
even that before it wakes up, so its publishes must be refused by an epoch as well.

Advisory locks do not work in two places where they seem to. A standby grants them, but its primary and other standbys
do not know of them. Behind a proxy that pools transactions, they belong to a server session that the next client gets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.python.failure import Failure

from cacheservice.base.backoff import full_jitter
from cacheservice.base.errors import DatabaseUnavailable, RefreshFailed
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.timers import pause
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.listening.opening import Access, ListenerSessions
from cacheservice.sources.postgres.target import Target

_STANDBY = "the server is a standby, whose advisory locks no other server knows; name the primary in postgres.dsn"
_POOLED = (
    "advisory locks do not work here, as behind a proxy that pools transactions (PgBouncer); "
    "name a direct connection in postgres.dsn"
)
# As for listening: the setting must not reach another client's session behind a proxy.
_BEGIN_SQL = (
    "SELECT CASE WHEN pg_backend_pid() = {pid} THEN set_config('idle_session_timeout', '{silent_ms}', false) END"
)
_HEARTBEAT_SQL = """
SELECT pg_backend_pid() = {pid}, pg_is_in_recovery(),
    CASE WHEN pg_backend_pid() = {pid} AND NOT pg_is_in_recovery() THEN ARRAY[{taken}]::boolean[] END,
    {locks}
"""
_LOCKS_SQL = """ARRAY(
    SELECT (l.classid::bigint << 32) | l.objid::bigint FROM pg_locks AS l
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.pid = pg_backend_pid()
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
)"""
_NO_LOCKS_SQL = "ARRAY[]::bigint[]"

_LOCKS = 1 << 64


@dataclass(frozen=True, slots=True)
class LeadSettings:
    """The prefix of the leads, and their intervals in seconds.

    - `prefix`: leads of other prefixes are independent.
    - `heartbeat_s`: from one heartbeat to the next; each also tries to take the leads that another process has.
    - `silent_s`: without a heartbeat for so long, the server ends the session.
    - `retry_initial_s`, `retry_max_s`: the bounds of the delay after the first failure, and after many.
    - `retry_slowly_s`: the delay while leads are impossible.
    - `random`: returns a number from 0 to 1, the share of a delay's bound that is waited.
    """

    prefix: str
    heartbeat_s: float = 1.0
    silent_s: float = 4.0
    retry_initial_s: float = 0.5
    retry_max_s: float = 4.0
    retry_slowly_s: float = 30.0
    random: Callable[[], float] = random.random


@dataclass(frozen=True, slots=True)
class LeadObserver:
    """The functions that are called with the name of a unit. They must be quick, and must not raise."""

    gained: Callable[[str], object]
    lost: Callable[[str], object]


class LeadsImpossible(RefreshFailed):
    """Advisory locks cannot work at this server; the message names the next step."""


class Leads(Service):
    """Competes for the leads of some units, and keeps those that it wins.

    It is idle while it does not run, or has no units: it has no session then. Otherwise its loop opens one session
    after the other; a session that is lost loses all leads.

    `problem` is why no lead can be won now, None while there is a session, or no units.
    """

    name = "leads"

    def __init__(
        self,
        settings: LeadSettings,
        access: Access,
        status: DatabaseStatus,
        reactor: Reactor,
        log: Log,
    ) -> None:
        self.problem: str | None = None
        self._is_impossible = False
        self._has_session = False
        self._observer = LeadObserver(lambda unit: None, lambda unit: None)
        self._failures = 0
        self._reactor = reactor
        self._log = log
        self._settings = settings
        self._sessions = ListenerSessions(reactor, access, status, self._settings.silent_s)
        self._wanted: frozenset[str] = frozenset()
        self._held: set[str] = set()
        self._loop: Deferred[None] | None = None
        self._guard: GuardedConnection | None = None

    @property
    def can_refresh(self) -> bool:
        """Whether the database is known to be readable from here, although another process may have the leads."""
        return self._has_session or self._is_impossible

    @property
    def held(self) -> frozenset[str]:
        """The units whose lead this process has."""
        return frozenset(self._held)

    def startService(self) -> None:
        super().startService()
        self._begin()

    def stopService(self) -> Deferred[None]:
        """Give up all leads; fires when no session is left."""
        super().stopService()
        if self._loop is None:
            return succeed(None)
        ended: Deferred[None] = Deferred()
        self._loop.addBoth(lambda _: ended.callback(None))
        self._loop.cancel()
        return ended

    def notify(self, observer: LeadObserver) -> None:
        """Notify `observer` from now on, and nobody else."""
        self._observer = observer

    def compete_for(self, units: Iterable[str]) -> None:
        """Compete for these units only, from now on; leads of others are given up. Without units, close the session."""
        self._wanted = frozenset(units)
        if not self._wanted and self._loop is not None:
            self._loop.cancel()
        if self.running:
            self._begin()
        if self._guard is not None:
            self._guard.wake()

    def configure(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions with these settings; give up all leads if the database changed."""
        if self._sessions.configure(target, connect_timeout_s) and self._guard is not None:
            self._guard.abort(DatabaseUnavailable("postgres.dsn was changed"))

    def resign(self, reason: str) -> None:
        """Give up all leads, and compete for them again."""
        if self._guard is not None:
            self._guard.abort(DatabaseUnavailable(reason))

    def _begin(self) -> None:
        if self._wanted and self._loop is None:
            self.problem = "no session has been opened yet"
            self._loop = Deferred.fromCoroutine(self._compete())
            self._loop.addBoth(self._ended)

    def _ended(self, result: object) -> None:
        self._loop = None
        self.problem, self._is_impossible, self._failures = None, False, 0
        if isinstance(result, Failure) and not result.check(CancelledError):
            log_internal_error(self._log, result)
        if self.running:
            self._begin()  # units that are wanted since

    async def _compete(self) -> None:
        """Open one session after the other, until cancelled."""
        delay_s = full_jitter(self._settings.retry_initial_s, self._settings.retry_max_s, self._settings.random)
        while True:
            retry_in_s = delay_s(self._failures)
            try:
                await self._sessions.use("leads", self._keep)
            except LeadsImpossible as error:
                self._is_impossible = True
                retry_in_s = self._settings.retry_slowly_s
                self._fail("leads_impossible", str(error), retry_in_s)
            except RefreshFailed as error:
                self._fail("lead_session_lost", str(error), retry_in_s)
            except CancelledError:
                raise
            except Exception:
                log_internal_error(self._log, Failure())
            self._failures += 1
            await pause(self._reactor, retry_in_s)

    def _fail(self, event: str, error: str, retry_in_s: float) -> None:
        """Note why there is no session; the log has a line for each change, not for each try."""
        if self.problem != error:
            self.problem = error
            self._log.warning(event, error=error, retry_in_s=round(retry_in_s, 3))

    async def _keep(self, guard: GuardedConnection) -> NoReturn:
        """Keep the leads that can be won, until the session is lost."""
        self._guard = guard
        try:
            await guard.execute(_BEGIN_SQL.format(pid=guard.pid, silent_ms=int(self._settings.silent_s * 1000)))
            while True:
                next_at = self._reactor.seconds() + self._settings.heartbeat_s
                await self._beat(guard)
                self.problem, self._is_impossible, self._failures = None, False, 0
                self._has_session = True
                guard.renew(next_at + self._settings.silent_s)
                await guard.notifications(next_at)  # also detects the end of the session at once
        finally:
            self._guard, self._has_session = None, False
            for unit in sorted(self._held):
                self._lose(unit)

    async def _beat(self, guard: GuardedConnection) -> None:
        """Take the leads that are free, release those that are not wanted, and check those that are held.

        :raises LeadsImpossible: if the locks of this session mean nothing.
        """
        for unit in sorted(self._held - self._wanted):
            self._lose(unit)
            await guard.execute(f"SELECT pg_advisory_unlock({lock_number(self._settings.prefix, unit)})")
        wanted = sorted(self._wanted - self._held)
        taken = ", ".join(f"pg_try_advisory_lock({lock_number(self._settings.prefix, unit)})" for unit in wanted)
        # The server's silence is counted from the end of a statement, which is not before its start.
        guard.renew(self._reactor.seconds() + self._settings.silent_s * 0.75)
        locks = _LOCKS_SQL if self._held else _NO_LOCKS_SQL
        cursor = await guard.execute(_HEARTBEAT_SQL.format(pid=guard.pid, taken=taken, locks=locks))
        is_own, is_standby, granted, numbers = cursor.fetchone()
        if not is_own:
            raise LeadsImpossible(_POOLED)
        if is_standby:
            raise LeadsImpossible(_STANDBY)
        won = [unit for unit, is_granted in zip(wanted, granted, strict=True) if is_granted]
        present = {int(lock) % _LOCKS for lock in numbers}
        if any(lock_number(self._settings.prefix, unit) % _LOCKS not in present for unit in self._held):
            raise LeadsImpossible(_POOLED)
        for unit in won:
            self._held.add(unit)
            self._log.info("lead_gained", unit=unit)
            self._observer.gained(unit)

    def _lose(self, unit: str) -> None:
        self._held.discard(unit)
        self._log.info("lead_lost", unit=unit)
        self._observer.lost(unit)


def lock_number(prefix: str, unit: str) -> int:
    """Return the number of a unit's advisory lock, a signed integer of 64 bits."""
    return int.from_bytes(blake2b(f"cacheservice {prefix} {unit}".encode(), digest_size=8).digest(), "big", signed=True)
