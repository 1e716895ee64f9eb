"""The recorded changes that the database keeps: deletes old ones, and asks how many are left.

The answer has their number, the age of the oldest, and the transaction that keeps the oldest from being deleted.
"""

from __future__ import annotations

from typing import NamedTuple

from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.session_settings import statement_ms

_PRUNED_A_CALL = 10_000
"""The default of `cacheservice.prune`, for each watch."""
_PRUNE = """
BEGIN READ WRITE;
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL lock_timeout = {statement_ms};
SET LOCAL client_connection_check_interval = 1000;
SELECT cacheservice.prune({keep_s} * interval '1 s')
"""
# Statistics are not replicated; the counts of the last VACUUM or ANALYZE are.
_BEGIN = """
BEGIN READ ONLY;
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL client_connection_check_interval = 1000;
SELECT pg_is_in_recovery(),
       CASE WHEN pg_is_in_recovery() THEN nullif(c.reltuples, -1)::bigint ELSE pg_stat_get_live_tuples(c.oid) END,
       EXISTS (
           SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
           WHERE n.nspname = 'cacheservice' AND p.proname = 'oldest_change'
             AND has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE'))
FROM (SELECT) AS one LEFT JOIN pg_class AS c ON c.oid = to_regclass('cacheservice.changes')
"""
_OLDEST = """
SELECT extract(epoch FROM clock_timestamp() - o.changed_at)::float8, o.xid >= pg_snapshot_xmin(pg_current_snapshot())
FROM cacheservice.oldest_change() AS o
"""
# Every role sees these columns of both views. The xmin of a snapshot is the oldest transaction that writes, in any
# database.
_HOLDER = """
SELECT format('session %s of %s (%s%s) has had a transaction open since before they were recorded; let it end, or run '
              'SELECT pg_terminate_backend(%s)',
              a.pid, coalesce(a.usename, 'no role'), coalesce(nullif(a.application_name, ''), 'no application_name'),
              CASE WHEN a.datname <> current_database() THEN ', database ' || a.datname END, a.pid)
FROM pg_stat_activity AS a WHERE a.backend_xid = pg_snapshot_xmin(pg_current_snapshot())::xid
UNION ALL
SELECT format('the prepared transaction %L of %s is older than they are; in the database %s run COMMIT PREPARED %L or '
              'ROLLBACK PREPARED %L', p.gid, p.owner, p.database, p.gid, p.gid)
FROM pg_prepared_xacts AS p WHERE p.transaction = pg_snapshot_xmin(pg_current_snapshot())::xid
LIMIT 1
"""


class Recorded(NamedTuple):
    """The recorded changes that the database keeps.

    :param kept: their number by the server's statistics; None if it has no statistics.
    :param may_ask: whether this role may call the function that finds the oldest.
    :param oldest_s: the age of the oldest; None if there is none, or the role may not ask for it.
    :param in_the_way: the transaction that keeps the oldest from being deleted; None if there is none.
    """

    in_recovery: bool
    kept: int | None
    may_ask: bool
    oldest_s: float | None = None
    in_the_way: str | None = None


class Pruned(NamedTuple):
    """How many recorded changes a call deleted, and whether it deleted all that are old enough."""

    rows: int
    is_complete: bool


async def prune(guard: GuardedConnection, keep_s: float) -> Pruned:
    """Delete recorded changes older than `keep_s`; must not be called within a transaction."""
    cursor = await guard.execute(_PRUNE.format(statement_ms=statement_ms(guard.remaining_s()), keep_s=keep_s))
    ((deleted,),) = cursor.fetchall()
    await guard.execute("COMMIT")
    return Pruned(int(deleted), int(deleted) < _PRUNED_A_CALL)


async def ask(guard: GuardedConnection) -> Recorded:
    """Return the recorded changes; must not be called within a transaction."""
    begin = _BEGIN.format(statement_ms=statement_ms(guard.remaining_s()))
    ((in_recovery, kept, may_ask),) = (await guard.execute(begin)).fetchall()
    recorded = Recorded(in_recovery, None if kept is None else int(kept), may_ask)
    if may_ask:
        for oldest_s, may_be_held in (await guard.execute(_OLDEST)).fetchall():
            recorded = recorded._replace(oldest_s=float(oldest_s))
            if may_be_held and not in_recovery:
                for (words,) in (await guard.execute(_HOLDER)).fetchall():
                    recorded = recorded._replace(in_the_way=words.decode() if isinstance(words, bytes) else words)
    await guard.execute("COMMIT")
    return recorded
