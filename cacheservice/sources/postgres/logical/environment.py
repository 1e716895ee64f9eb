"""Why the log of a server cannot be decoded, with the next step. `problem` is pure.

A session of the ordinary kind asks, because the server refuses a session for replication with fewer words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.quoting import literal, quoted
from cacheservice.sources.postgres.session_settings import statement_ms

_DECODES_ON_STANDBYS = 160000

# The limits count all kinds of slots and senders. Everybody may see how many there are.
_BEGIN = """
BEGIN READ ONLY;
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL client_connection_check_interval = 1000;
"""
_FACTS = """
SELECT current_setting('wal_level')::text, pg_is_in_recovery(), current_setting('server_version_num')::int,
       session_user::text,
       (SELECT r.rolsuper OR r.rolreplication OR EXISTS (
            SELECT FROM pg_roles AS x WHERE x.rolname = 'rds_replication' AND pg_has_role(r.oid, x.oid, 'MEMBER'))
        FROM pg_roles AS r WHERE r.rolname = session_user),
       EXISTS (SELECT FROM pg_publication AS p WHERE p.pubname = {publication}),
       current_setting('max_replication_slots')::int, (SELECT count(*) FROM pg_replication_slots)::int,
       current_setting('max_wal_senders')::int, (SELECT count(*) FROM pg_stat_replication)::int,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""
_LOOK = """
SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END::text,
       (SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
                - s.restart_lsn)::bigint
        FROM pg_replication_slots AS s WHERE s.slot_name = {slot}),
       (SELECT s.setting::bigint * 1048576 FROM pg_settings AS s WHERE s.name = 'max_slot_wal_keep_size')
"""

# Of the kinds of commits, only one with a number of its own waits for the disk.
_FLUSH = """
BEGIN;
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL synchronous_commit = local;
SELECT pg_logical_emit_message(true, 'cacheservice', '');
COMMIT
"""


class Environment(NamedTuple):
    """The facts that decide whether a server can decode its log for this role.

    :param next_xid: all 64 bits of the number of the next transaction.
    """

    wal_level: str
    in_recovery: bool
    server_version: int
    role: str
    may_replicate: bool
    has_publication: bool
    most_slots: int
    slots: int
    most_senders: int
    senders: int
    next_xid: int


class Retained(NamedTuple):
    """How much of the log the server keeps for a slot.

    :param written: the position up to which the server has written the log.
    :param retained_bytes: None if there is no such slot.
    :param limit_bytes: max_slot_wal_keep_size, beyond which the slot is invalidated; None without a limit.
    """

    written: str
    retained_bytes: int | None
    limit_bytes: int | None


def facts_sql(publication: str) -> str:
    """Return the statement that asks for the facts."""
    return _FACTS.format(publication=literal(publication))


def facts(answer: Sequence[Any]) -> Environment:
    """Return the meaning of the answer's row."""
    return Environment._make(each.decode() if isinstance(each, bytes) else each for each in answer)


async def ask(guard: GuardedConnection, publication: str) -> Environment:
    """Return the facts; must not be called within a transaction."""
    begin = _BEGIN.format(statement_ms=statement_ms(guard.remaining_s()))
    (answer,) = (await guard.execute(begin + facts_sql(publication))).fetchall()
    await guard.execute("COMMIT")
    return facts(answer)


async def look(guard: GuardedConnection, slot: str) -> Retained:
    """Return how much of the log is kept for a slot; must not be called within a transaction."""
    begin = _BEGIN.format(statement_ms=statement_ms(guard.remaining_s()))
    ((written, retained, limit),) = (await guard.execute(begin + _LOOK.format(slot=literal(slot)))).fetchall()
    await guard.execute("COMMIT")
    return Retained(
        written.decode(), None if retained is None else int(retained), None if limit is None or limit < 0 else limit
    )


async def flush(guard: GuardedConnection) -> None:
    """Have the server write its log to the disk; must not be called within a transaction."""
    await guard.execute(_FLUSH.format(statement_ms=statement_ms(guard.remaining_s())))


def problem(found: Environment, publication: str) -> str | None:
    """Return why the log cannot be decoded, with the statement or command that changes it; None if it can."""
    if found.in_recovery and found.server_version < _DECODES_ON_STANDBYS:
        return "the server is a standby, which can decode its log from PostgreSQL 16 on; read the primary, or upgrade"
    if found.wal_level != "logical":
        where = "on the primary and here " if found.in_recovery else ""
        return (
            f"wal_level is {found.wal_level}; run ALTER SYSTEM SET wal_level = logical {where}and restart the server "
            "(managed services have a parameter for that, such as rds.logical_replication = 1)"
        )
    if not found.may_replicate:
        return (
            f"the role {found.role} lacks the attribute REPLICATION; run cacheservice migrate --reader {found.role} "
            f"--replication, or ALTER ROLE {quoted(found.role)} REPLICATION"
        )
    if not found.has_publication:
        return f"there is no publication {publication}; run cacheservice watch --logical TABLE --key COLUMN"
    if found.slots >= found.most_slots:
        return (
            f"all {found.most_slots} replication slots are in use; drop one that nobody needs (pg_replication_slots), "
            f"or run ALTER SYSTEM SET max_replication_slots = {found.most_slots + 4} and restart the server"
        )
    if found.senders >= found.most_senders:
        return (
            f"all {found.most_senders} walsenders are in use (pg_stat_replication); "
            f"run ALTER SYSTEM SET max_wal_senders = {found.most_senders + 4} and restart the server"
        )
    return None
