"""One session that listens, and proves at an interval that notifications arrive.

Two sessions seem to listen and do not (measured). A session whose peer is gone stays silent for hours. LISTEN through a
proxy that pools transactions succeeds, but on a server session that the next client gets. There even our own
notification comes back, with the answer to the statement that sent it (PgBouncer 1.18), and no other notification does.
Therefore another session sends the first canary of each session; the session itself sends the following ones.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import NoReturn

from twisted.internet.defer import Deferred, succeed

from cacheservice.base.errors import NotHeard
from cacheservice.base.interfaces import Clock
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.listening.calls import Calls
from cacheservice.sources.postgres.listening.canaries import Canaries
from cacheservice.sources.postgres.listening.failures import HeardNothing
from cacheservice.sources.postgres.listening.opening import ListenerSessions
from cacheservice.sources.postgres.listening.pace import Pace
from cacheservice.sources.postgres.quoting import quoted
from cacheservice.sources.postgres.waits import Notification

# A role's idle_session_timeout would end the session. Behind a proxy the setting would apply to another client.
_STAY_SQL = "SELECT CASE WHEN pg_backend_pid() = {pid} THEN set_config('idle_session_timeout', '0', false) END"

# KEEPALIVES for the server's end. If the peer of a server session is gone, the session would wait in a write for hours,
# and the notifications of the whole server would pile up behind it. Sent only to a proven session, because behind a
# pool the server session would belong to another client.
_SERVER_KEEPALIVES = """
SET tcp_keepalives_idle = 10;
SET tcp_keepalives_interval = 5;
SET tcp_keepalives_count = 3;
SET tcp_user_timeout = 15000
"""


class State(enum.Enum):
    """The states of a listening session, in their order."""

    UNPROVEN = "no canary has come back yet"
    PROVEN = "at least one canary has come back"
    ENDED = "it was lost, or is not wanted any more"


class ListeningSession:
    """Listens in one session for as long as the session works.

    It is `UNPROVEN` at first, `PROVEN` once its first canary has come back, and `ENDED` when `listen` ends.

    :param sessions: opens the session that sends the first canary.
    :param calls: called with each notification, and when notifications may have been missed.
    """

    def __init__(
        self,
        guard: GuardedConnection,
        sessions: ListenerSessions,
        canaries: Canaries,
        calls: Calls,
        clock: Clock,
        pace: Pace,
    ) -> None:
        self.guard = guard
        self.state = State.UNPROVEN
        self._sessions = sessions
        self._canaries = canaries
        self._calls = calls
        self._clock = clock
        self._pace = pace
        self._in_force: frozenset[str] = frozenset()
        self._asking: list[Deferred[bool]] = []  # waits for a canary that is not sent yet
        self._asked: list[Deferred[bool]] = []  # waits for the newest canary

    def wake(self) -> None:
        """Look again at the channels now."""
        self.guard.wake()

    def heard_all(self) -> Deferred[bool]:
        """Wait until all earlier notifications have been received; see `Listener.heard_all`."""
        if self.state is not State.PROVEN:
            return succeed(False)
        asking: Deferred[bool] = Deferred()
        self._asking.append(asking)
        self.guard.wake()
        return asking

    async def listen(self, channels: Callable[[], frozenset[str]], proven: Callable[[float], object]) -> NoReturn:
        """Listen until the session ends.

        :param channels: returns the channels to listen to now.
        :param proven: called with the time of each proof.
        :raises RefreshFailed: when the session is lost.
        """
        canary_at = self._clock.seconds()
        try:
            await self._execute(_STAY_SQL.format(pid=self.guard.pid))
            while True:
                wanted = channels() | {OWN_CHANNEL}
                if self._in_force != wanted:
                    await self._change_channels(wanted)
                elif self._asking or self._clock.seconds() >= canary_at:
                    await self._prove(proven)
                    canary_at = self._clock.seconds() + self._pace.canary_interval_s
                else:
                    self.guard.renew(canary_at + self._pace.answer_within_s)
                    self._hear(await self.guard.notifications(canary_at))
        finally:
            self.state = State.ENDED
            self._asked += self._asking
            self._asking = []
            self._answer(False)

    async def _change_channels(self, wanted: frozenset[str]) -> None:
        await self._execute(listen_sql(self._in_force, wanted))
        added, self._in_force = wanted - self._in_force, wanted
        if added and self.state is State.PROVEN:
            self._calls.missed()

    async def _prove(self, proven: Callable[[float], object]) -> None:
        self._asked, self._asking = self._asking, []
        if self.state is State.PROVEN:
            proven(await self._prove_again())
        else:
            proven_at = await self._prove_first()
            self.state = State.PROVEN
            proven(proven_at)
            self._calls.missed()
        self._answer(True)

    async def _prove_first(self) -> float:
        """Prove that the session receives what another one sends; return the moment.

        :raises HeardNothing: if it does not.
        """
        answer_within_s = self._pace.answer_within_s
        self.guard.renew(self._clock.seconds() + self._sessions.connect_timeout_s + 3 * answer_within_s)
        sql = self._canaries.next_sql()
        await self._sessions.use("proves that it listens", lambda aside: aside.execute(sql))
        try:
            proven_at = await self._canary_back(self._clock.seconds() + answer_within_s)
        except NotHeard as error:
            # If this is not answered either, the session is lost, and LISTEN is not to blame. Behind a pool UNLISTEN is
            # needed in any case: the next client of that server session would receive our notifications.
            await self._execute("UNLISTEN *")
            raise HeardNothing(str(error)) from None
        await self._execute(_SERVER_KEEPALIVES)
        return proven_at

    async def _prove_again(self) -> float:
        """Prove that the session is alive; return the moment.

        :raises NotHeard: if it is not.
        """
        by = self._clock.seconds() + self._pace.answer_within_s
        await self._execute(self._canaries.next_sql())
        self.guard.renew(by + self._pace.answer_within_s)
        return await self._canary_back(by)

    async def _canary_back(self, by: float) -> float:
        """Wait until the newest canary is received; return the moment.

        :raises NotHeard: if it is not received by the moment `by`.
        """
        while not self._canaries.is_back():
            if self._clock.seconds() >= by:
                within_s = self._pace.answer_within_s
                raise NotHeard(f"its own notification did not come back within {within_s:.3g} s")
            self._hear(await self.guard.notifications(by))
        return self._clock.seconds()

    async def _execute(self, sql: str) -> None:
        self.guard.renew(self._clock.seconds() + self._pace.answer_within_s)
        await self.guard.execute(sql)

    def _hear(self, notifications: Iterable[Notification]) -> None:
        for notification in notifications:
            if not self._canaries.received(notification.channel, notification.payload):
                self._calls.heard(notification.channel, notification.payload)

    def _answer(self, heard: bool) -> None:
        asked, self._asked = self._asked, []
        for each in asked:
            each.callback(heard)


def listen_sql(in_force: frozenset[str], wanted: frozenset[str]) -> str:
    """Return the statements that change the channels, in one transaction.

    That way LISTEN takes effect together for all channels, including the canary's.
    """
    statements = [f"UNLISTEN {quoted(channel)}" for channel in sorted(in_force - wanted)]
    statements += [f"LISTEN {quoted(channel)}" for channel in sorted(wanted - in_force)]
    return "; ".join(["BEGIN", *statements, "COMMIT"])
