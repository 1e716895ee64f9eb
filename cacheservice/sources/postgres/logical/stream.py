"""One replication session: it creates a temporary slot, and collects the keys of each change until it ends.

A temporary slot belongs to its session, and the server drops it when that session ends, however that happens. So
nothing is left behind that would keep the log. Each session begins another stream, which knows nothing of what has
happened before.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from twisted.internet.defer import Deferred, succeed

from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import pause
from cacheservice.sources.postgres.guard import GuardedConnection, Replication
from cacheservice.sources.postgres.logical.kept import Committed, Transactions
from cacheservice.sources.postgres.logical.pgoutput import Decoder
from cacheservice.sources.postgres.quoting import literal, quoted

_TURN_S = 0.002
"""A turn of the reactor decodes for so long."""
_LOOK = 32
"""So many messages are decoded between two looks at the clock."""
_QUIET_S = 10.0
"""After so long without a message the server is asked for a keepalive."""
_ANSWER_WITHIN_S = 5.0
_SERVER_WAITS_S = 20
"""The server ends the session, and the slot with it, after so long without a message from here."""
_REPORT_S = 0.1
"""The server need not know sooner what it may forget, and each report takes time on both sides."""
_DENSE_S = 0.001
"""Commits that follow each other faster than this are taken together, which takes a fraction of the time."""
_PAGE_BYTES, _PAGE_HEADER_BYTES = 8192, 40
"""Of the log: XLOG_BLCKSZ, and the longest header of a page (xlog_internal.h)."""
_SHORTEST_S, _LONGEST_S = 0.0005, 0.02
"""The pause before the server is asked again for the position that a delta waits for."""
_SLOT_WITHIN_S = 30 * 24 * 3600.0
"""The creation of a slot waits for all transactions that write, however long they take."""


@dataclass(frozen=True, slots=True)
class StreamObserver:
    """The functions that a stream calls. They must be quick, and must not raise.

    :param began: with the position in the log from which on all changes are known.
    :param committed: with each transaction that has changed watched tables.
    """

    began: Callable[[int], object]
    committed: Callable[[Committed], object]


class ChangeStream:
    """Streams the changes of a publication over one session.

    It is asking for a slot at first, and then streams until the session ends.

    `passed` is how far in the log all changes are known; 0 before the slot exists.

    :param guard: a session that was opened with `ReplicationSession`.
    :param decoder: knows the watched tables.
    """

    def __init__(
        self,
        guard: GuardedConnection,
        decoder: Decoder,
        transactions: Transactions,
        observer: StreamObserver,
        clock: Clock,
    ) -> None:
        self.passed = 0
        self.slot = f"cacheservice_{secrets.token_hex(8)}"
        self._guard = guard
        self._decoder = decoder
        self._transactions = transactions
        self._observer = observer
        self._clock = clock
        self._replication: Replication | None = None
        self._waiting: list[tuple[int, Deferred[bool]]] = []
        self._has_ended = False
        self._reported_at = self._taken_at = 0.0

    def until_passed(self, lsn: int) -> Deferred[bool]:
        """Wait until all changes before a position in the log are known; fires with False if the session ends before.

        The server does not decode what it has not written to its disk yet, so that this may wait for that.
        """
        if lsn % _PAGE_BYTES <= _PAGE_HEADER_BYTES:
            lsn -= lsn % _PAGE_BYTES  # the last record ends before the page whose header has been skipped
        if self._has_ended or self.passed >= lsn:
            return succeed(not self._has_ended)
        waiting: Deferred[bool] = Deferred(self._forget)
        self._waiting.append((lsn, waiting))
        if self._replication is not None:
            self._send_feedback(self._replication, reply=True)
        return waiting

    async def run(self, publication: str) -> NoReturn:
        """Stream until the session ends.

        :raises RefreshFailed: why it has ended, or why it cannot stream.
        :raises BadChanges: if the server sends something else than changes.
        """
        try:
            await self._guard.execute(f"SET wal_sender_timeout = '{_SERVER_WAITS_S}s'")
            self._guard.renew(self._clock.seconds() + _SLOT_WITHIN_S)
            sql = f"CREATE_REPLICATION_SLOT {quoted(self.slot)} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT"
            ((_, began, *_),) = (await self._guard.execute(sql)).fetchall()
            self._guard.renew(self._clock.seconds() + _ANSWER_WITHIN_S)
            options = f"proto_version '1', publication_names {literal(quoted(publication))}"
            replication = await self._guard.start_replication(
                f"START_REPLICATION SLOT {quoted(self.slot)} LOGICAL 0/0 ({options})"
            )
            self.passed = position(began)
            self._observer.began(self.passed)
            self._replication = replication
            await self._stream(replication)
        finally:
            self._has_ended, self._replication = True, None
            waiting, self._waiting = self._waiting, []
            for _, each in waiting:
                self._clock.callLater(0, _fire, each, False)
        raise AssertionError("a stream ends with an error")

    async def _stream(self, replication: Replication) -> None:
        delay_s = _SHORTEST_S
        while True:
            while self._take_some(replication):
                self._guard.renew(self._clock.seconds() + _ANSWER_WITHIN_S)
                await pause(self._clock)
            if self._note_passed(replication.wal_end) or not self._waiting:
                delay_s = _SHORTEST_S
            else:
                # The server answers at once, so that without a pause it would be asked all the time.
                await pause(self._clock, delay_s)
                delay_s = min(2 * delay_s, _LONGEST_S)
            now = self._clock.seconds()
            is_dense, self._taken_at = now - self._taken_at < _DENSE_S, now
            if is_dense and not self._waiting:
                await pause(self._clock, _DENSE_S)
                continue
            # What has been taken is in our memory, and all rows would be read again after a loss: the server need not
            # keep it.
            asks_at = wakes_at = now + _QUIET_S
            if self._waiting or now >= self._reported_at + _REPORT_S:
                self._send_feedback(replication, reply=bool(self._waiting))
            else:
                wakes_at = self._reported_at + _REPORT_S
            self._guard.renew(asks_at + _ANSWER_WITHIN_S)
            await self._guard.readable(wakes_at)
            if self._clock.seconds() >= asks_at:
                self._send_feedback(replication, reply=True)
                await self._guard.readable(asks_at + 2 * _ANSWER_WITHIN_S)

    def _take_some(self, replication: Replication) -> bool:
        """Take the messages that have arrived, for a turn; return whether there may be more.

        :raises RefreshFailed: if the session is lost.
        """
        until = self._clock.seconds() + _TURN_S
        while self._clock.seconds() < until:
            for _ in range(_LOOK):
                message = replication.message()
                if message is None:
                    return False
                decoded = self._decoder.decode(message.payload)
                if decoded is not None and (committed := self._transactions.take(decoded)) is not None:
                    self._observer.committed(committed)
        return True

    def _note_passed(self, lsn: int) -> bool:
        """Note how far the server has decoded the log; return whether that is further than before."""
        if lsn <= self.passed:
            return False
        self.passed = lsn
        waiting, self._waiting = self._waiting, []
        for needed, each in waiting:
            if lsn >= needed:
                # In a turn of its own, because the stream cannot be cancelled while it runs.
                self._clock.callLater(0, _fire, each, True)
            else:
                self._waiting.append((needed, each))
        return True

    def _send_feedback(self, replication: Replication, *, reply: bool) -> None:
        """Report what is not needed any more; a reply has the position that the server has decoded up to."""
        self._reported_at = self._clock.seconds()
        replication.feedback(self.passed, reply=reply)

    def _forget(self, waiting: Deferred[bool]) -> None:
        self._waiting = [(lsn, each) for lsn, each in self._waiting if each is not waiting]


def _fire(waiting: Deferred[bool], has_passed: bool) -> None:
    if not waiting.called:  # cancelled meanwhile
        waiting.callback(has_passed)


def position(text: str | bytes) -> int:
    """Return a position in the log as a number.

    :param text: as the server writes it, such as 16/B374D848.
    """
    high, _, low = (text.decode() if isinstance(text, bytes) else text).partition("/")
    return (int(high, 16) << 32) + int(low, 16)
