"""Asks a standby how far it is behind its primary.

It asks before a transaction takes its snapshot, because a standby may catch up a moment after the snapshot. A
transaction that asked only then would take the snapshot for up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from cacheservice.cache.lag import NO_LAG, Lag, Receiver, Seen, StandbyFacts, lag_of
from cacheservice.sources.postgres.guard import GuardedConnection

_OWN_RIGHT = "pg_has_role('pg_read_all_stats', 'USAGE')"
_FUNCTION_SEES = """EXISTS (
    SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE n.nspname = 'cacheservice' AND p.proname = 'wal_receiver'
      AND has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE')
      AND pg_has_role(p.proowner, 'pg_read_all_stats', 'USAGE'))"""
"""The function has the rights of its owner, and does not help if the owner has no more rights than other roles."""
SEES_RECEIVER = f"({_OWN_RIGHT} OR {_FUNCTION_SEES})"
"""An SQL expression: whether this role can find out whether a standby receives from its primary."""
_RIGHTS = f"""
SELECT has_function_privilege('pg_control_checkpoint()', 'EXECUTE'),
       NOT {_OWN_RIGHT} AND {_FUNCTION_SEES}"""
_FACTS = """
SELECT session_user::text, pg_is_in_recovery(), (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
       extract(epoch FROM clock_timestamp()),
       (pg_last_wal_receive_lsn() - '0/0')::bigint, (pg_last_wal_replay_lsn() - '0/0')::bigint,
       extract(epoch FROM pg_last_xact_replay_timestamp()), {checkpoint},
       CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() <> 'not paused' END,
       extract(epoch FROM current_setting('wal_receiver_timeout')::interval),
       extract(epoch FROM current_setting('recovery_min_apply_delay')::interval),
       r.pid, r.status, extract(epoch FROM r.last_msg_receipt_time),
       extract(epoch FROM r.last_msg_send_time), (r.latest_end_lsn - '0/0')::bigint
FROM (SELECT) AS one LEFT JOIN {receiver} AS r ON true"""
_CHECKPOINT = "(SELECT extract(epoch FROM c.checkpoint_time) FROM pg_control_checkpoint() AS c)"
_MOST_STANDBYS = 16


class Standbys:
    """Knows whether to expect a standby, and when each standby was last up to date.

    A standby is expected if the last session was on a standby.
    """

    def __init__(self) -> None:
        self._expected = False
        self._rights: tuple[bool, bool] | None = None
        self._seen_at: dict[int | None, tuple[float, float]] = {}

    def forget(self) -> None:
        """Forget all standbys, because sessions are now opened elsewhere."""
        self._expected = False
        self._rights = None
        self._seen_at.clear()

    def expect(self, expected: bool) -> None:
        """Set whether the next session is likely to be on a standby."""
        self._expected = expected

    async def ask(self, guard: GuardedConnection) -> StandbyFacts | None:
        """Return the facts that the standby reports.

        None if no standby is expected, or if it has become a primary. Must not be called within a transaction.
        """
        if not self._expected:
            return None
        if self._rights is None:
            ((may_checkpoint, needs_function),) = (await guard.execute(_RIGHTS)).fetchall()
            self._rights = (may_checkpoint, needs_function)
        may_checkpoint, needs_function = self._rights
        facts_sql = _FACTS.format(
            checkpoint=_CHECKPOINT if may_checkpoint else "NULL::numeric",
            receiver="cacheservice.wal_receiver()" if needs_function else "pg_stat_wal_receiver",
        )
        self._rights = None  # until the answer has proven them
        (row,) = (await guard.execute(facts_sql)).fetchall()
        facts = _facts(row)
        if facts is not None and (facts.receiver is None or facts.receiver.status is not None):
            self._rights = (may_checkpoint, needs_function)
        return facts

    def lag(self, facts: StandbyFacts | None, asked_at: float) -> Lag:
        """Return the lag of a transaction that began after `facts` were asked for.

        :param asked_at: the time of asking, on the monotonic clock.
        """
        if facts is None:
            return NO_LAG
        current_at, heard_at = self._seen_at.get(facts.started_us, (None, None))
        seen = Seen(
            None if current_at is None else asked_at - current_at, None if heard_at is None else asked_at - heard_at
        )
        lag = lag_of(facts, seen)
        if lag == NO_LAG and facts.receiver is not None and facts.receiver.heard_s is not None:
            self._seen_at.pop(facts.started_us, None)
            while len(self._seen_at) >= _MOST_STANDBYS:
                del self._seen_at[next(iter(self._seen_at))]
            self._seen_at[facts.started_us] = asked_at, asked_at - max(0.0, facts.now_s - facts.receiver.heard_s)
        return lag


def _facts(row: Sequence[Any]) -> StandbyFacts | None:
    role, in_recovery, started_us, now, received, replayed, committed, checkpoint, paused, timeout, delay, *rest = row
    if not in_recovery:
        return None
    pid, status, heard, sent, sender_at = rest
    receiver = None
    if pid is not None:
        ahead_s = float(sent - heard) if sent is not None and heard is not None else 0.0
        receiver = Receiver(None if status is None else status.decode(), _seconds(heard), max(0.0, ahead_s), sender_at)
    moments = [float(each) for each in (committed, checkpoint) if each is not None]
    return StandbyFacts(
        role.decode(),
        started_us,
        float(now),
        received,
        replayed,
        max(moments, default=None),
        bool(paused),
        float(timeout),
        float(delay),
        receiver,
    )


def _seconds(moment: float | Decimal | None) -> float | None:
    return None if moment is None else float(moment)
