"""Creates the role that the service reads as.

It can log in and read granted tables only; on request it may also replicate, for logical decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import psycopg2
from psycopg2 import extensions, sql

from cacheservice.base.errors import MigrationFailed
from cacheservice.cache.lag import GRANT
from cacheservice.sources.postgres import admin
from cacheservice.sources.postgres.admin import SCHEMA, Refused, Session
from cacheservice.sources.postgres.migrate import act_as_owner

_FUNCTIONS = (
    "blocking_sessions(integer)",
    "changes(jsonb, pg_snapshot, integer)",
    "oldest_change()",
    "prune(interval, integer)",
    "wal_receiver()",
)
"""The functions that a reader may call."""

_SEES_RECEIVER = """
SELECT pg_has_role(%s::name, 'pg_read_all_stats', 'USAGE')
       OR pg_has_role(p.proowner, 'pg_read_all_stats', 'USAGE')
FROM pg_proc AS p WHERE p.oid = 'cacheservice.wal_receiver()'::regprocedure"""

_ATTRIBUTES = {
    "rolcanlogin": (True, "LOGIN"),
    "rolsuper": (False, "NOSUPERUSER"),
    "rolcreatedb": (False, "NOCREATEDB"),
    "rolcreaterole": (False, "NOCREATEROLE"),
    "rolbypassrls": (False, "NOBYPASSRLS"),
    "rolconnlimit": (20, "CONNECTION LIMIT 20"),
}

_RDS = "rds_replication"
"""The role of Amazon RDS whose members may replicate; nobody there may set the attribute REPLICATION."""

# Defaults only, which a session can change: the grants are the boundary, and these limits catch mistakes.
_DEFAULTS = {
    "default_transaction_read_only": "on",
    "statement_timeout": "60s",
    "lock_timeout": "30s",
    "idle_in_transaction_session_timeout": "60s",
    "search_path": "pg_catalog, public",
}


class Reader(NamedTuple):
    """The password and the rights that a reader may lack.

    :param name: quoted for SQL.
    :param has_password: None if the session may not see it.
    :param grant: the GRANT that lets it see how far a standby is behind; None if it already can.
    :param replicates: whether it may create the slots of logical decoding.
    """

    name: str
    has_password: bool | None
    grant: str | None
    replicates: bool


def create_reader(
    dsn: str,
    name: str,
    tables: Sequence[str] = (),
    password: str | None = None,
    dsn_source: str = "postgres.dsn",
    *,
    replication: bool | None = None,
) -> Reader:
    """Create or change the role `name`, so that it can only log in and read `tables`.

    Only differences are changed: ALTER ROLE needs rights over the role (PostgreSQL 16: ADMIN OPTION), and only a
    superuser may even repeat NOSUPERUSER.

    :param tables: as schema.table; if empty, only the service's own functions are granted.
    :param password: sent as its SCRAM verifier, so that it does not appear in the server's logs; None leaves it
        unchanged.
    :param dsn_source: as for `admin.session`.
    :param replication: whether it may replicate, which logical decoding needs; None leaves it as it is, and a new role
        may not.
    :raises MigrationFailed: if the database cannot be reached or refuses.
    """
    try:
        with admin.session(dsn, "cacheservice migrate", dsn_source) as session, session.transaction():
            if session.value("SELECT current_user = %s", (name,)):
                raise Refused(f"{name} is the role of this session; name another for the service to read as")
            is_new = _make_role(session, name, password)
            if replication is not None:
                _set_replication(session, name, replication, is_new)
            has_password = False if is_new else _has_password(session, name)
            role = sql.Identifier(name)
            for table in tables:
                _grant_select(session, table, role)
            act_as_owner(session)
            _grant_ours(session, role)
            quoted = role.as_string(session.cursor)
            grant = None if session.value(_SEES_RECEIVER, (name,)) else GRANT.format(role=quoted) + ";"
            return Reader(quoted, True if password is not None else has_password, grant, _may_replicate(session, name))
    except Refused as refused:
        raise MigrationFailed(str(refused)) from refused


def _has_password(session: Session, name: str) -> bool | None:
    """Return whether a role has a password; None if only a superuser may see that."""
    if not session.value("SELECT has_table_privilege('pg_authid', 'SELECT')"):
        return None
    found: bool = session.value("SELECT rolpassword IS NOT NULL FROM pg_authid WHERE rolname = %s", (name,))
    return found


def _make_role(session: Session, name: str, password: str | None) -> bool:
    """Create or alter the role; return whether it is new."""
    role = sql.Identifier(name)
    present = session.rows(f"SELECT {', '.join(_ATTRIBUTES)} FROM pg_roles WHERE rolname = %s", (name,))  # noqa: S608  # constants
    words = list(attributes_to_set(dict(zip(_ATTRIBUTES, present[0], strict=True)) if present else None))
    settings = session.rows(
        "SELECT unnest(s.setconfig) FROM pg_db_role_setting AS s JOIN pg_roles AS r ON r.oid = s.setrole "
        "WHERE s.setdatabase = 0 AND r.rolname = %s",
        (name,),
    )
    try:
        if words:
            verb = "ALTER" if present else "CREATE"
            session.cursor.execute(sql.SQL("{} ROLE {} {}").format(sql.SQL(verb), role, sql.SQL(" ".join(words))))
        if password is not None:
            verifier = extensions.encrypt_password(password, name, session.connection, "scram-sha-256")
            session.cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(verifier)))
        for setting, value in _DEFAULTS.items():
            if (f"{setting}={value}",) not in settings:
                # search_path takes a list, which must not be quoted as one value.
                values = sql.SQL(", ").join(map(sql.Literal, value.split(", ")))
                session.cursor.execute(
                    sql.SQL("ALTER ROLE {} SET {} = {}").format(role, sql.Identifier(setting), values)
                )
    except psycopg2.errors.InsufficientPrivilege as error:
        message = str(error.diag.message_primary)
        if not present or "create role" in message:
            raise
        reader = role.as_string(session.cursor)
        if "superuser" in message:  # before PostgreSQL 16, a role that may replicate
            raise Refused(
                f"PostgreSQL: {message}: {reader} may replicate, or is a superuser; run this command as a superuser"
            ) from error
        raise Refused(
            f"PostgreSQL: {message}: {reader} exists, and {session.role} may not change it; run as the "
            f"role that created it, or as a superuser: GRANT {reader} TO {session.role} WITH ADMIN OPTION;"
        ) from error
    return not present


def _set_replication(session: Session, name: str, wanted: bool, is_new: bool) -> None:
    if _may_replicate(session, name) == wanted:
        return
    reader = sql.Identifier(name).as_string(session.cursor)
    has_rds_role = session.value("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = %s)", (_RDS,))
    if wanted:
        statements = [f"GRANT {_RDS} TO {reader};" if has_rds_role else f"ALTER ROLE {reader} REPLICATION;"]
    else:
        has_attribute = session.value("SELECT rolreplication FROM pg_roles WHERE rolname = %s", (name,))
        statements = [f"ALTER ROLE {reader} NOREPLICATION;"] if has_attribute else []
        statements += [f"REVOKE {_RDS} FROM {reader};"] if has_rds_role and _is_member(session, name) else []
    try:
        for statement in statements:
            session.cursor.execute(statement)
    except psycopg2.errors.InsufficientPrivilege as error:
        verb, preposition = ("give", "to") if wanted else ("take", "from")
        first = "first run this command without --replication, then, " if is_new else ""
        raise Refused(
            f"PostgreSQL: {error.diag.message_primary}: {session.role} may not {verb} the right to replicate "
            f"{preposition} {reader}; {first}as an administrator, run: {' '.join(statements)}"
        ) from error
    if _may_replicate(session, name) != wanted:
        raise Refused(
            f"{reader} may still replicate: it is a member of {_RDS} through another role, or by a grant of another "
            "role; revoke that first"
        )


def _may_replicate(session: Session, name: str) -> bool:
    has_attribute = session.value("SELECT rolreplication FROM pg_roles WHERE rolname = %s", (name,))
    return bool(has_attribute) or _is_member(session, name)


def _is_member(session: Session, name: str) -> bool:
    """Return whether a role is a member of the role of Amazon RDS for replication."""
    found: bool = session.value(
        "SELECT coalesce(bool_or(pg_has_role(m.oid, r.oid, 'MEMBER')), false) FROM pg_roles AS m, pg_roles AS r "
        "WHERE m.rolname = %s AND r.rolname = %s",
        (name, _RDS),
    )
    return found


def attributes_to_set(present: Mapping[str, object] | None) -> Iterator[str]:
    """Yield the words for CREATE ROLE, or those of ALTER ROLE that change something.

    :param present: the role's columns of pg_roles; None if there is no such role.
    """
    for column, (wanted, words) in _ATTRIBUTES.items():
        if present is None or present[column] != wanted:
            yield words


def _grant_ours(session: Session, role: sql.Identifier) -> None:
    session.cursor.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(SCHEMA), role))
    for function in _FUNCTIONS:
        session.cursor.execute(
            sql.SQL("GRANT EXECUTE ON FUNCTION {}.{} TO {}").format(sql.Identifier(SCHEMA), sql.SQL(function), role)
        )


def _grant_select(session: Session, table: str, role: sql.Identifier) -> None:
    # The server splits, folds and resolves the name by its own rules, and with the session's own search_path.
    session.cursor.execute("SET LOCAL search_path TO DEFAULT")
    ((schema, relation),) = session.rows(
        "SELECT relnamespace::regnamespace::text, oid::regclass::text FROM pg_class WHERE oid = %s::regclass", (table,)
    )
    reader = role.as_string(session.cursor)
    # The server returned both names quoted where necessary.
    for what, name, kind, right in (("SCHEMA ", schema, "schema", "USAGE"), ("", relation, "table", "SELECT")):
        may = f"SELECT has_{kind}_privilege(%s::regrole, %s::{'regnamespace' if kind == 'schema' else 'regclass'}, %s)"
        session.cursor.execute("SAVEPOINT granting")
        try:
            session.cursor.execute(sql.SQL(f"GRANT {right} ON {what}{{}} TO {{}}").format(sql.SQL(name), role))
        except psycopg2.errors.InsufficientPrivilege:
            session.cursor.execute("ROLLBACK TO SAVEPOINT granting")
        # If the session's role may not pass the right on, the server refuses or only warns. The reader may have the
        # right already.
        if not session.value(may, (reader, name, right)):
            raise Refused(
                f"{session.role} may not grant {right} on {what.lower()}{name}; run it as the owner of {name}, or "
                f"have the owner run: GRANT {right} ON {what}{name} TO {reader};"
            )
