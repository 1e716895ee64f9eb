"""Finds the sessions that block another session, which waits for a lock."""

from __future__ import annotations

from datetime import UTC, datetime

from cacheservice.base.errors import Blocker, QueryFailed
from cacheservice.sources.postgres.guard import GuardedConnection

# The function from the migrations may see sessions that our role may not. Without it, only the sessions visible to our
# role are reported.
_WITH_FUNCTION = "SELECT {columns} FROM cacheservice.blocking_sessions({pid})"
_COLUMNS = (
    "pid, user_name::text, application_name::text, lock_mode::text, relation::text, "
    "extract(epoch FROM transaction_since)::float8, state::text, statement_kind::text"
)
_WITHOUT = """
SELECT b.pid, a.usename::text, a.application_name::text, l.mode::text, l.relation::regclass::text,
       extract(epoch FROM a.xact_start)::float8, a.state::text,
       CASE WHEN a.query <> '<insufficient privilege>' THEN upper(substring(a.query FROM '[[:alpha:]]+')) END
FROM unnest(pg_blocking_pids({pid})) AS b(pid)
LEFT JOIN pg_stat_activity a ON a.pid = b.pid
LEFT JOIN LATERAL (
    SELECT held.mode, held.relation
    FROM pg_locks waiting JOIN pg_locks held
      ON held.pid = b.pid AND held.granted AND held.locktype = waiting.locktype
     AND held.database IS NOT DISTINCT FROM waiting.database
     AND held.relation IS NOT DISTINCT FROM waiting.relation
    WHERE waiting.pid = {pid} AND NOT waiting.granted
    ORDER BY held.mode = 'AccessExclusiveLock' DESC  -- the strongest of several is the one that blocks
    LIMIT 1
) l ON true
"""
NO_FUNCTION = ("42883", "3F000", "42501")
"""undefined function, invalid schema name, insufficient privilege"""

_Text = str | bytes | None
BlockerRow = tuple[int, _Text, _Text, _Text, _Text, float | None, _Text, _Text]
"""The columns of either statement. Texts come as bytes over the sessions of refreshes."""


def by_function(pid: int) -> str:
    """Return the statement that calls the function from the migrations."""
    return _WITH_FUNCTION.format(columns=_COLUMNS, pid=pid)


def by_catalogs(pid: int) -> str:
    """Return the statement for a database without that function."""
    return _WITHOUT.format(pid=pid)


async def find_blockers(guard: GuardedConnection, pid: int) -> tuple[Blocker, ...]:
    """Return the sessions that block the server process `pid`.

    They are asked for over `guard`, another session.
    """
    try:
        cursor = await guard.execute(by_function(pid))
    except QueryFailed as error:
        if error.sqlstate not in NO_FUNCTION:
            raise
        cursor = await guard.execute(by_catalogs(pid))
    return tuple(blocker(row) for row in cursor.fetchall())


def blocker(row: BlockerRow) -> Blocker:
    """Return the blocker from a row of either statement, with text or bytes."""
    pid, user, application, mode, relation, since, state, kind = row
    return Blocker(
        pid,
        _text(user),
        _text(application),
        _text(mode),
        _text(relation),
        None if since is None else datetime.fromtimestamp(since, UTC),
        _text(state),
        _text(kind),
    )


def _text(value: _Text) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
