"""Applies the files in `migrations/` to the schema `cacheservice`.

Each file is applied and recorded in one transaction. The records have the format of yoyo-migrations, which applied them
before, so a database that it has migrated can be migrated further. Each transaction waits for its own advisory lock,
which ends with the transaction. Therefore a killed command leaves nothing behind, and two concurrent commands do not
disturb each other. A lock row left by yoyo is ignored.
"""

from __future__ import annotations

import hashlib
import socket
import uuid
from pathlib import Path

import psycopg2
from psycopg2 import sql

from cacheservice.base.errors import MigrationFailed
from cacheservice.sources.postgres import admin
from cacheservice.sources.postgres.admin import SCHEMA, Refused, Session
from cacheservice.sources.postgres.watch import renew

_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('cacheservice.migrate', 0))"

_RECORDS = """
CREATE TABLE IF NOT EXISTS cacheservice._yoyo_migration (
    migration_hash varchar(64) PRIMARY KEY,
    migration_id varchar(255),
    applied_at_utc timestamp
);
CREATE TABLE IF NOT EXISTS cacheservice._yoyo_log (
    id varchar(36) PRIMARY KEY,
    migration_hash varchar(64),
    migration_id varchar(255),
    operation varchar(10),
    username varchar(255),
    hostname varchar(255),
    comment varchar(255),
    created_at_utc timestamp
);
CREATE TABLE IF NOT EXISTS cacheservice._yoyo_version (
    version integer PRIMARY KEY,
    installed_at_utc timestamp
);
INSERT INTO cacheservice._yoyo_version SELECT 2, now() AT TIME ZONE 'utc'
WHERE NOT EXISTS (SELECT FROM cacheservice._yoyo_version);
"""
_RECORD = """
INSERT INTO cacheservice._yoyo_migration VALUES (%(hash)s, %(name)s, clock_timestamp() AT TIME ZONE 'utc');
INSERT INTO cacheservice._yoyo_log VALUES
    (%(id)s, %(hash)s, %(name)s, 'apply', session_user, %(host)s, NULL, clock_timestamp() AT TIME ZONE 'utc');
"""

# yoyo committed a migration before it recorded it, and could fail in between.
_APPLIED_UNRECORDED = {
    "0001_schema": "to_regprocedure('cacheservice.blocking_sessions(integer)') IS NOT NULL",
    "0002_changes": "to_regclass('cacheservice.changes') IS NOT NULL",
}

_OBJECTS = """
SELECT format('SCHEMA %I', n.nspname), pg_get_userbyid(n.nspowner)
FROM pg_namespace AS n WHERE n.nspname = 'cacheservice'
UNION ALL
SELECT format('TABLE %s', c.oid::regclass), pg_get_userbyid(c.relowner)
FROM pg_class AS c WHERE c.relnamespace = 'cacheservice'::regnamespace AND c.relkind IN ('r', 'p')
UNION ALL
SELECT format('FUNCTION %s', p.oid::regprocedure), pg_get_userbyid(p.proowner)
FROM pg_proc AS p WHERE p.pronamespace = 'cacheservice'::regnamespace
"""
"""The objects in the schema, the schema itself first, and the role that owns each."""


_REMOVE_CHANGES = r"""
DO $$
DECLARE
    function regprocedure;
BEGIN
    FOR function IN
        SELECT p.oid FROM pg_proc AS p WHERE p.pronamespace = 'cacheservice'::regnamespace
        AND p.proname ~ '^(record_\d+_[a-z]+|changes|prune|note_deleted|oldest_change)$'
    LOOP
        EXECUTE format('DROP FUNCTION %s CASCADE', function);
    END LOOP;
END $$;
DROP TABLE IF EXISTS cacheservice.changes, cacheservice.watched, cacheservice.pruned;
DELETE FROM cacheservice._yoyo_migration WHERE migration_id >= '0002';
"""


def migrate(dsn: str, directory: Path, owner: str | None = None, dsn_source: str = "postgres.dsn") -> list[str]:
    """Apply the pending migrations; return their names in order.

    :param owner: the role that shall own the schema and everything in it. Without it, that is the role that already
        owns the tables, or the session's role.
    :param dsn_source: as for `admin.session`.
    :raises MigrationFailed: if the database cannot be reached or refuses.
    """
    applied = []
    try:
        with admin.session(dsn, "cacheservice migrate", dsn_source) as session:
            with session.transaction():
                session.cursor.execute(_LOCK)
                repair(session, owner)
            for file in migration_files(directory):
                with session.transaction():
                    session.cursor.execute(_LOCK)
                    if _apply(session, file, owner):
                        applied.append(file.stem)
            with session.transaction():
                session.cursor.execute(_LOCK)
                _renew_watches(session, owner)
    except Refused as refused:
        raise MigrationFailed(str(refused)) from refused
    return applied


def migration_files(directory: Path) -> list[Path]:
    """Return the migration files in the order of application."""
    return sorted(path for path in directory.glob("*.sql") if not path.name.endswith(".rollback.sql"))


def _apply(session: Session, file: Path, owner: str | None) -> bool:
    """Apply one migration in the current transaction; return whether it was pending."""
    _prepare(session, owner)
    name = file.stem
    record = {
        "hash": hashlib.sha256(name.encode()).hexdigest(),
        "name": name,
        "id": str(uuid.uuid1()),
        "host": socket.gethostname(),
    }
    if session.value("SELECT count(*) FROM cacheservice._yoyo_migration WHERE migration_hash = %s", (record["hash"],)):
        return False
    unrecorded = _APPLIED_UNRECORDED.get(name, "false")
    if not session.value(f"SELECT {unrecorded}"):  # constants
        session.cursor.execute(file.read_text(encoding="utf-8"))
    session.cursor.execute(_RECORD, record)
    return True


def _prepare(session: Session, owner: str | None) -> None:
    """Create the schema and its records if needed, and transfer them to their owner.

    The session then acts as the owner until the end of the transaction.
    """
    if not session.value("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (SCHEMA,)):
        authorization = sql.SQL(" AUTHORIZATION {}").format(sql.Identifier(owner)) if owner else sql.SQL("")
        session.cursor.execute(sql.SQL("CREATE SCHEMA {}{}").format(sql.Identifier(SCHEMA), authorization))
    if owner is not None:
        _give_all_to(session, owner)
    act_as_owner(session, owner)
    session.cursor.execute(_RECORDS)


def _give_all_to(session: Session, owner: str) -> None:
    role = sql.Identifier(owner)
    for what, has in session.rows(_OBJECTS):
        if has != owner:
            session.cursor.execute(sql.SQL("ALTER {} OWNER TO {}").format(sql.SQL(what), role))


def repair(session: Session, owner: str | None) -> None:
    """Repair damage to the tables for changes.

    The damage would make writers or `watch` fail. If one of the tables is missing, the others are useless. The tables
    are then created again, and the triggers, whose functions would not find their table, are removed; `watch` puts them
    back.
    """
    if not session.value("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (SCHEMA,)):
        return
    if owner is not None:
        _give_all_to(session, owner)
    act_as_owner(session, owner)
    admin.restore_rights(session)
    if not session.value("SELECT to_regclass('cacheservice._yoyo_migration') IS NOT NULL"):
        return
    if not session.value("SELECT count(*) FROM cacheservice._yoyo_migration WHERE migration_id = '0002_changes'"):
        return
    missing = session.value(
        "SELECT count(*) FROM unnest(ARRAY['changes', 'watched', 'pruned']) AS t (name) "
        "WHERE to_regclass('cacheservice.' || t.name) IS NULL"
    )
    if missing:
        session.cursor.execute(_REMOVE_CHANGES)
    elif session.value("SELECT to_regprocedure('cacheservice.note_deleted()') IS NOT NULL"):
        # This call resets records from a dump of another cluster. No change is that old, so it deletes nothing.
        session.cursor.execute("SELECT cacheservice.prune('100 years')")


def _renew_watches(session: Session, owner: str | None) -> None:
    # Without the column `form` the directory has fewer migrations, or one was rolled back.
    if session.value(
        "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('cacheservice.watched') AND attname = 'form'"
    ):
        act_as_owner(session, owner)
        renew(session)


def act_as_owner(session: Session, owner: str | None = None) -> None:
    """Act as the owner of our tables until the end of the transaction.

    New objects then belong to that role, too.

    :raises Refused: if the role was not requested and the session may not act as it. The advice then omits a GRANT: the
        session may be the reader's by mistake, and a reader must not get the rights of the owner.
    """
    owners = [
        name
        for (name,) in session.rows(
            "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)",
            (SCHEMA,),
        )
    ]
    current = session.value("SELECT current_user")
    role = acting_role(owner, current, owners)
    if role == current:
        return
    try:
        session.cursor.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
    except psycopg2.errors.InsufficientPrivilege as error:
        if owner is not None:
            raise
        raise Refused(
            f"the schema {SCHEMA} belongs to {role}, and {current} may not act as {role}; connect as {role}"
        ) from error


def acting_role(wanted: str | None, current: str, owners: list[str]) -> str:
    """Return the role to act as.

    It is the requested role, else the only role that owns our tables, else the session's own.
    """
    if wanted is not None:
        return wanted
    return owners[0] if len(owners) == 1 else current
