"""What the service needs in the database: the schema `cacheservice`, and a reader with few rights.

It blocks: for the command line, never for the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import extensions, sql
from yoyo import read_migrations
from yoyo.backends.core.postgresql import PostgresqlBackend
from yoyo.connections import DatabaseURI
from yoyo.migrations import default_migration_table

from cacheservice.errors import MigrationFailed
from cacheservice.postgres.target import parse

SCHEMA = "cacheservice"
_CONNECT_TIMEOUT_S = 10
_FUNCTIONS = ("blocking_sessions(integer)", "changes(jsonb, pg_snapshot, integer)", "prune(interval, integer)")
"""What a reader may call."""

# Defaults, which a session can unset: the grants are the boundary, these are for mistakes.
_READER_DEFAULTS = {
    "default_transaction_read_only": "on",
    "statement_timeout": "60s",
    "lock_timeout": "30s",
    "idle_in_transaction_session_timeout": "60s",
    "search_path": "pg_catalog, public",
}


def migrate(dsn: str, directory: Path) -> list[str]:
    """Apply what has not been applied yet; gives the names, in order. All of it lies in the schema `cacheservice`.

    :raises MigrationFailed: if the database cannot be reached or refuses.
    """
    try:
        with closing(blocking_connection(dsn, "cacheservice migrate")) as connection, connection.cursor() as cursor:
            # Before yoyo makes its own tables, which are to lie in it.
            cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        uri = DatabaseURI("postgresql", None, None, None, None, None, {"dsn": dsn, "schema": SCHEMA})
        with PostgresqlBackend(uri, default_migration_table) as backend:
            backend.init_database()
            with backend.lock():
                migrations = backend.to_apply(read_migrations(str(directory)))
                names = [migration.id for migration in migrations]
                backend.apply_migrations(migrations)
        return names
    except psycopg2.Error as error:
        raise MigrationFailed(told_by(dsn, error)) from error


def create_reader(dsn: str, name: str, tables: Sequence[str] = (), password: str | None = None) -> None:
    """Make the role `name`, or bring it to this state: it may log in and read `tables`, nothing else.

    :param tables: as schema.table; without one nothing is granted but the service's own functions.
    :param password: sent as its SCRAM verifier, so that it is in no log of the server; None leaves it as it is.
    :raises MigrationFailed: if the database cannot be reached or refuses.
    """
    role = sql.Identifier(name)
    try:
        with closing(blocking_connection(dsn, "cacheservice migrate")) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,))
            verb = sql.SQL("ALTER" if cursor.fetchone() else "CREATE")
            cursor.execute(
                sql.SQL(
                    "{} ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 20"
                ).format(verb, role)
            )
            if password is not None:
                verifier = extensions.encrypt_password(password, name, connection, "scram-sha-256")
                cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(verifier)))
            for setting, value in _READER_DEFAULTS.items():
                # search_path takes a list, which must not be quoted as one.
                values = sql.SQL(", ").join(map(sql.Literal, value.split(", ")))
                cursor.execute(sql.SQL("ALTER ROLE {} SET {} = {}").format(role, sql.Identifier(setting), values))
            cursor.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(SCHEMA), role))
            for function in _FUNCTIONS:
                cursor.execute(
                    sql.SQL("GRANT EXECUTE ON FUNCTION {}.{} TO {}").format(
                        sql.Identifier(SCHEMA), sql.SQL(function), role
                    )
                )
            for table in tables:
                _grant_select(cursor, table, role)
    except psycopg2.Error as error:
        raise MigrationFailed(told_by(dsn, error)) from error


def _grant_select(cursor: Any, table: str, role: sql.Identifier) -> None:
    # The server splits and folds the name by its own rules.
    cursor.execute(
        "SELECT relnamespace::regnamespace::text, oid::regclass::text FROM pg_class WHERE oid = %s::regclass", (table,)
    )
    schema, relation = cursor.fetchone()
    # Both came back quoted where they need it.
    cursor.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.SQL(schema), role))
    cursor.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(sql.SQL(relation), role))


def blocking_connection(dsn: str, application_name: str) -> Any:
    """A session in autocommit."""
    connection = psycopg2.connect(dsn, connect_timeout=_CONNECT_TIMEOUT_S, application_name=application_name)
    connection.autocommit = True
    return connection


def told_by(dsn: str, error: psycopg2.Error) -> str:
    """What the server said, in one line without a password."""
    message = (error.diag.message_primary if error.diag else None) or str(error)
    return f"PostgreSQL: {parse(dsn).redact(message)}"
