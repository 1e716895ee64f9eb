"""Receives NOTIFYs over one session for all datasets.

Proofs at an interval show that they arrive. Two sessions seem to listen and do not (measured). A session whose peer is
gone stays silent for hours. LISTEN through a proxy that pools transactions succeeds, but on a server session that the
next client gets. There even our own notification comes back, with the answer to the statement that sent it (PgBouncer
1.18), and no other notification does. Therefore another session sends the first proof of each session; the session
itself sends the following ones.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.python.failure import Failure

from cacheservice.base.errors import DatabaseUnavailable, NoSessionLeft, NotHeard, QueryFailed, RefreshFailed
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.timers import pause
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.postgres.connector import Connector
from cacheservice.sources.postgres.guard import KEEPALIVES, GuardedConnection
from cacheservice.sources.postgres.target import Target

CANARY_INTERVAL_S = 10.0
ANSWER_WITHIN_S = 5.0
RETRY_INITIAL_S = 1.0
RETRY_MAX_S = 30.0
RETRY_SLOWLY_S = 60.0
"""The retry interval while LISTEN cannot work, until a promotion, a new connection string or a direct connection."""

_CANARY = "canary "
_SILENT_SESSIONS = 2
"""After this many sessions in a row that listened and received nothing, the cause is not chance."""
_READ_ONLY = "25006"
"""The SQLSTATE of LISTEN during recovery."""
_STANDBY = "the server is a standby, where LISTEN cannot work"
_NO_CONNECTION = "refreshes go first, and no connection is left to listen with"
_POOLED = (
    "LISTEN does not work here, as behind a proxy that pools transactions (PgBouncer); "
    "name a direct connection in postgres.dsn"
)

# A role's idle_session_timeout would end the session. Behind a proxy the setting would apply to another client.
_STAY_SQL = "SELECT CASE WHEN pg_backend_pid() = {pid} THEN set_config('idle_session_timeout', '0', false) END"

# The commit of a notification writes to the WAL. If it waited there for a synchronous standby that is gone, it would
# wait forever, even if the client no longer listens, and keep every other NOTIFY waiting.
_CANARY_SQL = "SELECT set_config('synchronous_commit', 'off', true), pg_notify('{channel}', '{payload}')"

# KEEPALIVES for the server's end. If the peer of a server session is gone, the session would wait in a write for hours,
# and the notifications of the whole server would pile up behind it. Sent only to a proven session, because behind a
# pool the server session would belong to another client.
_SERVER_KEEPALIVES = """
SET tcp_keepalives_idle = 10;
SET tcp_keepalives_interval = 5;
SET tcp_keepalives_count = 3;
SET tcp_user_timeout = 15000
"""


class Listener(Service):
    """Listens to all channels in one session, which is reopened when it is lost.

    Without a channel there is no session. `heard` and `missed` are called in the reactor's thread, and must be quick.

    :param connector: ``cacheservice.sources.postgres.database.Database.connector``.
    :param connect_timeout_s: for one session to open, name look-ups included.
    :param heard: called with the channel and the payload of each notification.
    :param missed: called when notifications may have been missed: after each proof that a new session listens,
        including the first, and when channels were added.
    :param status: records whether notifications arrive.
    :param reactor: its clock must be monotonic.
    :param random: returns a number from 0 to 1.
    """

    name = "listener"

    def __init__(
        self,
        target: Target,
        connector: Connector,
        connect_timeout_s: float,
        channels: Iterable[str],
        heard: Callable[[str, str], None],
        missed: Callable[[], None],
        status: DatabaseStatus,
        reactor: Reactor,
        random: Callable[[], float],
        log: Log,
        *,
        canary_interval_s: float = CANARY_INTERVAL_S,
        answer_within_s: float = ANSWER_WITHIN_S,
        retry_initial_s: float = RETRY_INITIAL_S,
        retry_max_s: float = RETRY_MAX_S,
        retry_slowly_s: float = RETRY_SLOWLY_S,
    ) -> None:
        self._target = target
        self._connector = connector
        self._connect_timeout_s = connect_timeout_s
        self._channels = frozenset(channels)
        self._heard = heard
        self._missed = missed
        self._status = status
        self._reactor = reactor
        self._random = random
        self._log = log
        self._canary_interval_s = canary_interval_s
        self._answer_within_s = answer_within_s
        self._retry_initial_s = retry_initial_s
        self._retry_max_s = retry_max_s
        self._retry_slowly_s = retry_slowly_s

        # The token identifies our own canaries, because several services may share a database. Canaries use our own
        # channel, because other programs that listen to the datasets' channels would receive them, too.
        self._token = f"{_CANARY}{secrets.token_hex(8)}"
        self._canaries = 0
        self._returned = 0  # the number of the newest canary that was received
        self._loop: Deferred[None] | None = None
        self._session: GuardedConnection | None = None
        self._guards: list[GuardedConnection] = []  # all sessions, from the start of their login
        self._proven = False  # whether this session has received a canary
        self._failures = 0  # failures in a row since a session was last proven
        self._silent = 0  # the newest of these failures in a row whose sessions listened and received nothing
        self._told: tuple[str, str] | None = None
        self._calling = False
        self._asking: list[Deferred[bool]] = []  # waits for a canary that is not sent yet
        self._asked: list[Deferred[bool]] = []  # waits for the newest canary

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
        moved, self._target, self._connect_timeout_s = target != self._target, target, connect_timeout_s
        if moved and self._session is not None:
            self._session.abort(DatabaseUnavailable("postgres.dsn was changed"))

    def give_up_session(self) -> bool:
        """End the listener's sessions, because a refresh needs a connection.

        A session that is still logging in holds a connection, too.

        :returns: False if there was none to end.
        """
        guards = list(self._guards)
        for guard in guards:
            guard.abort(NoSessionLeft("a refresh needed the connection"))
        return bool(guards)

    def heard_all(self) -> Deferred[bool]:
        """Wait until all earlier notifications have been received.

        Fires with False if that cannot be known. A listening session receives notifications in the order of the
        commits, so a canary arrives after all of them.
        """
        if self._session is None or not self._proven:
            return succeed(False)
        asking: Deferred[bool] = Deferred()
        self._asking.append(asking)
        self._session.wake()
        return asking

    def _answer(self, heard: bool) -> None:
        asked, self._asked = self._asked, []
        for each in asked:
            each.callback(heard)

    def _begin(self) -> None:
        self._status.listening_wanted = bool(self._channels)
        if self._channels and self._loop is None:
            self._loop = Deferred.fromCoroutine(self._keep_listening())
            self._loop.addBoth(self._ended)

    def _end(self) -> Deferred[None]:
        self._status.listening_wanted = False
        loop = self._loop
        if loop is None:
            return succeed(None)
        ended: Deferred[None] = Deferred()
        loop.addBoth(lambda _: ended.callback(None))
        if self._calling:
            self._reactor.callLater(0, loop.cancel)  # called by `heard` or `missed`: the loop waits for nothing now
        else:
            loop.cancel()
        return ended

    def _ended(self, result: object) -> None:
        self._loop = None
        self._failures = self._silent = 0
        self._told = None
        self._status.listening = False
        self._status.listening_proven_at = None
        self._status.listening_problem = None
        if isinstance(result, Failure) and not result.check(CancelledError):
            self._log_internal_error(result)
        if self.running:
            self._begin()  # channels were added again while it ended

    async def _keep_listening(self) -> None:
        """Open one session after the other, until cancelled."""
        while True:
            try:
                await self._with_session("listens", self._listen)
            except CancelledError:
                raise
            except RefreshFailed as error:
                retry_in_s = self._failed(error)
            except Exception:
                self._log_internal_error(Failure())
                retry_in_s = self._lost("an internal error, which the log tells")
            await pause(self._reactor, retry_in_s)

    async def _with_session(self, purpose: str, use: Callable[[GuardedConnection], Any]) -> None:
        guard = GuardedConnection(self._reactor, self._target, self._reactor.seconds() + self._connect_timeout_s)
        self._status.connections += 1
        self._guards.append(guard)
        try:
            await guard.connect(self._connector, purpose, self._connect_timeout_s, KEEPALIVES)
            guard.renew(self._reactor.seconds() + self._answer_within_s)
            await use(guard)
        finally:
            guard.close_and_passthrough(None)
            self._status.connections -= 1
            self._guards.remove(guard)

    async def _listen(self, guard: GuardedConnection) -> None:
        """Listen for as long as the session works.

        :raises RefreshFailed: always, when listening ends.
        """
        self._session, self._proven = guard, False
        in_force: frozenset[str] = frozenset()
        canary_at = self._reactor.seconds()
        try:
            await self._execute(guard, _STAY_SQL.format(pid=guard.pid))
            while True:
                wanted = self._channels | {OWN_CHANNEL}
                if in_force != wanted:
                    await self._execute(guard, _listen_sql(in_force, wanted))
                    added, in_force = wanted - in_force, wanted
                    if added and self._proven:
                        self._call(self._missed)
                elif self._asking or self._reactor.seconds() >= canary_at:
                    self._asked, self._asking = self._asking, []
                    await (self._prove_again if self._proven else self._prove_first)(guard)
                    self._answer(True)
                    canary_at = self._reactor.seconds() + self._canary_interval_s
                else:
                    guard.renew(canary_at + self._answer_within_s)
                    self._hear(await guard.notifications(canary_at))
        finally:
            self._session = None
            self._asked += self._asking
            self._asking = []
            self._answer(False)

    async def _prove_first(self, guard: GuardedConnection) -> None:
        guard.renew(self._reactor.seconds() + self._connect_timeout_s + 3 * self._answer_within_s)
        sql = self._canary_sql()
        await self._with_session("proves that it listens", lambda aside: aside.execute(sql))
        try:
            await self._canary_back(guard, self._reactor.seconds() + self._answer_within_s)
        except NotHeard:
            # If this is not answered either, the session is lost, and LISTEN is not to blame. Behind a pool UNLISTEN is
            # needed in any case: the next client of that server session would receive our notifications.
            await self._execute(guard, "UNLISTEN *")
            raise
        await self._execute(guard, _SERVER_KEEPALIVES)
        self._proven = True
        self._failures = self._silent = 0
        self._status.listening, self._status.listening_problem = True, None
        if self._tell("listening_began", ""):
            self._log.info("listening_began", channels=len(self._channels))
        self._call(self._missed)

    async def _prove_again(self, guard: GuardedConnection) -> None:
        by = self._reactor.seconds() + self._answer_within_s
        await self._execute(guard, self._canary_sql())
        guard.renew(by + self._answer_within_s)
        await self._canary_back(guard, by)

    def _canary_sql(self) -> str:
        self._canaries += 1
        return _CANARY_SQL.format(channel=OWN_CHANNEL, payload=f"{self._token} {self._canaries}")

    async def _canary_back(self, guard: GuardedConnection, by: float) -> None:
        """Wait until the newest canary is received.

        :raises NotHeard: if it is not received by the moment `by`.
        """
        while self._returned != self._canaries:
            if self._reactor.seconds() >= by:
                raise NotHeard(f"its own notification did not come back within {self._answer_within_s:.3g} s")
            self._hear(await guard.notifications(by))
        self._status.listening_proven_at = self._reactor.seconds()

    async def _execute(self, guard: GuardedConnection, sql: str) -> None:
        guard.renew(self._reactor.seconds() + self._answer_within_s)
        await guard.execute(sql)

    def _hear(self, notifications: Iterable[Any]) -> None:
        for notification in notifications:
            channel, payload = notification.channel, notification.payload
            if channel == OWN_CHANNEL and payload.startswith(_CANARY):
                if payload == f"{self._token} {self._canaries}":
                    self._returned = self._canaries
            else:
                self._call(self._heard, channel, payload)

    def _call(self, function: Callable[..., None], *arguments: str) -> None:
        self._calling = True
        try:
            function(*arguments)
        except Exception:
            self._log_internal_error(Failure())
        finally:
            self._calling = False

    def _failed(self, error: RefreshFailed) -> float:
        """Record and log why there is no session; return the seconds to the next try."""
        heard_nothing = isinstance(error, NotHeard) and not self._proven
        self._silent = self._silent + 1 if heard_nothing else 0
        if isinstance(error, QueryFailed) and error.sqlstate == _READ_ONLY:
            return self._impossible(_STANDBY)
        if isinstance(error, NoSessionLeft):
            return self._impossible(f"{_NO_CONNECTION}: {error}")
        if self._silent >= _SILENT_SESSIONS:
            return self._impossible(_POOLED)
        return self._lost(str(error))

    def _lost(self, problem: str) -> float:
        # Full jitter, as for refreshes.
        bound_s = min(self._retry_initial_s * 2.0 ** min(self._failures, 30), self._retry_max_s)
        retry_in_s = bound_s * self._random()
        self._failures += 1
        self._status.listening, self._status.listening_problem = False, problem
        if self._tell("listening_lost", ""):
            self._log.warning("listening_lost", error=problem, retry_in_s=round(retry_in_s, 3))
        return retry_in_s

    def _impossible(self, problem: str) -> float:
        self._status.listening, self._status.listening_problem = False, problem
        if self._tell("listening_impossible", problem):
            self._log.warning("listening_impossible", error=f"{problem}; datasets are refreshed on their intervals")
        return self._retry_slowly_s

    def _tell(self, event: str, problem: str) -> bool:
        """Return whether the state changed.

        The log has a line for each change, not for each try.
        """
        before, self._told = self._told, (event, problem)
        return before != self._told

    def _log_internal_error(self, failure: Failure) -> None:
        self._log.error("internal_error", error=failure.getErrorMessage(), traceback=failure.getTraceback())


def _listen_sql(in_force: frozenset[str], wanted: frozenset[str]) -> str:
    """Return the statements that change the channels, in one transaction.

    That way LISTEN takes effect together for all channels, including the canary's.
    """
    statements = [f"UNLISTEN {_quoted(channel)}" for channel in sorted(in_force - wanted)]
    statements += [f"LISTEN {_quoted(channel)}" for channel in sorted(wanted - in_force)]
    return "; ".join(["BEGIN", *statements, "COMMIT"])


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
