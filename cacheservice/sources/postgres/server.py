"""Identifies a server.

Values that change while it runs are read with each transaction, the others once.
"""

from __future__ import annotations

from typing import NamedTuple

from cacheservice.cache.identity import ServerIdentity
from cacheservice.sources.postgres.guard import GuardedConnection

LIFE = """
pg_is_in_recovery(), (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
(CASE WHEN {crashes} OR current_setting('server_version_num')::int >= 150000
      THEN extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()) * 1000000 END)::bigint"""
"""Columns for the SELECT of each reading transaction.

PostgreSQL 14 reads a file for the statistics, which takes 10 ms and more. They are asked for only if a delta or a probe
needs them (`crashes`).
"""
# A function that the role may not call ends the transaction even in a branch that is not taken, because its rights are
# checked when the statement starts. Therefore a separate statement asks for the rights first.
_RIGHTS = """
SELECT current_database()::text, (SELECT d.oid::bigint FROM pg_database AS d WHERE d.datname = current_database()),
       session_user::text, has_function_privilege('pg_control_system()', 'EXECUTE'),
       has_function_privilege('pg_control_checkpoint()', 'EXECUTE'),
       has_function_privilege('pg_current_wal_lsn()', 'EXECUTE')
       AND has_function_privilege('pg_walfile_name(pg_lsn)', 'EXECUTE')"""
_SYSTEM_IDENTIFIER = "(SELECT s.system_identifier::text FROM pg_control_system() AS s)"
_TIMELINE_OF_PRIMARY = "left(pg_walfile_name(pg_current_wal_lsn()), 8)"
"""Hexadecimal. pg_control_checkpoint() has the new timeline only after the first checkpoint."""
_TIMELINE_OF_STANDBY = "(SELECT to_hex(c.timeline_id) FROM pg_control_checkpoint() AS c)"


class Life(NamedTuple):
    """The answer to `LIFE`."""

    in_recovery: bool
    started_us: int | None
    counted_since_us: int | None


class Servers:
    """Remembers the values that do not change while a server runs.

    :param lives: the number of server runs remembered, more than the servers behind one balancer.
    """

    def __init__(self, lives: int = 16) -> None:
        self._most = lives
        self._known: dict[tuple[bool, int | None], ServerIdentity] = {}

    def forget(self) -> None:
        """Forget all servers, because sessions are now opened elsewhere."""
        self._known.clear()

    async def identify(self, guard: GuardedConnection, life: Life) -> ServerIdentity:
        """Return the server of a transaction that answered `LIFE`.

        The first time takes two more statements.
        """
        key = (life.in_recovery, life.started_us)
        known = self._known.get(key)
        if known is None:
            known = await _ask(guard, life)
            while len(self._known) >= self._most:
                del self._known[next(iter(self._known))]
            self._known[key] = known
        if known.counted_since_us == life.counted_since_us:
            return known
        return _with_life(known, life)


async def _ask(guard: GuardedConnection, life: Life) -> ServerIdentity:
    cursor = await guard.execute(_RIGHTS)
    ((database, oid, role, may_system, may_checkpoint, may_wal),) = cursor.fetchall()
    may_timeline, timeline_sql = (
        (may_checkpoint, _TIMELINE_OF_STANDBY) if life.in_recovery else (may_wal, _TIMELINE_OF_PRIMARY)
    )
    system_identifier = timeline = None
    if may_system or may_timeline:
        columns = (_SYSTEM_IDENTIFIER if may_system else "NULL", timeline_sql if may_timeline else "NULL")
        cursor = await guard.execute(f"SELECT {columns[0]}::text, {columns[1]}::text")  # constants
        ((system_identifier, timeline),) = cursor.fetchall()
    return ServerIdentity(
        database.decode(),
        oid,
        role.decode(),
        life.in_recovery,
        life.started_us,
        life.counted_since_us,
        None if timeline is None else int(timeline, 16),
        None if system_identifier is None else system_identifier.decode(),
    )


def _with_life(known: ServerIdentity, life: Life) -> ServerIdentity:
    return ServerIdentity(
        known.database,
        known.database_oid,
        known.role,
        life.in_recovery,
        life.started_us,
        life.counted_since_us,
        known.timeline,
        known.system_identifier,
    )
