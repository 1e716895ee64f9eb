"""Blocking sessions for the commands that change the database.

Their errors have one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import psycopg2

from cacheservice.base.interfaces import BlockingConnection, BlockingCursor
from cacheservice.sources.postgres.advice import for_login
from cacheservice.sources.postgres.lock_watch import LockWatch
from cacheservice.sources.postgres.oldest import too_old
from cacheservice.sources.postgres.target import parse

SCHEMA = "cacheservice"
LOCK_TIMEOUT_MS = 5000
"""The time limit for a table lock, because all writers of the table queue behind a waiting command."""
_CONNECT_TIMEOUT_S = 10
_LOCK_NOT_AVAILABLE = "55P03"

# SET LOCAL, as in all our transactions: a proxy that pools transactions would otherwise pass the setting to other
# clients.
BEGIN = f"""\
BEGIN READ WRITE;
SET LOCAL search_path = pg_catalog, pg_temp;
SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS};
SET LOCAL statement_timeout = 0;
SET LOCAL client_connection_check_interval = 1000;
SET LOCAL client_min_messages = warning;"""


# Only if a right is missing: a repeated GRANT makes a new version of the table, and the next delta a full read.
_RESTORE_RIGHTS = """
DO $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT c.oid::regclass AS relation, c.relowner::regrole AS owner FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace('cacheservice') AND c.relkind = 'r'
    LOOP
        IF NOT (has_schema_privilege(found.owner, 'cacheservice', 'USAGE')
                AND has_schema_privilege(found.owner, 'cacheservice', 'CREATE')) THEN
            EXECUTE format('GRANT ALL ON SCHEMA cacheservice TO %s', found.owner);
        END IF;
        IF NOT (has_table_privilege(found.owner, found.relation, 'SELECT')
                AND has_table_privilege(found.owner, found.relation, 'INSERT')
                AND has_table_privilege(found.owner, found.relation, 'UPDATE')
                AND has_table_privilege(found.owner, found.relation, 'DELETE')) THEN
            EXECUTE format('GRANT ALL ON %s TO %s', found.relation, found.owner);
        END IF;
    END LOOP;
END $$;
"""


class Refused(Exception):
    """A command cannot continue.

    The message is one line with the cause and the next step, without a password.
    """


class Session:
    """A blocking session in autocommit; `cursor` and `connection` are the driver's."""

    def __init__(
        self, connection: BlockingConnection, cursor: BlockingCursor, dsn: str, role: str, database: str
    ) -> None:
        self._dsn = dsn
        self.connection = connection
        self.cursor = cursor
        self.role = role
        self.database = database
        """The role and the database, quoted for SQL."""

    def rows(self, statement: str, parameters: Sequence[object] | None = None) -> list[tuple[Any, ...]]:
        self.cursor.execute(statement, parameters)
        found: list[tuple[Any, ...]] = self.cursor.fetchall()
        return found

    def value(self, statement: str, parameters: Sequence[object] | None = None) -> Any:
        """Return the only value of the only row."""
        ((found,),) = self.rows(statement, parameters)
        return found

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run the enclosed statements in one transaction, rolled back on any error.

        :raises Refused: if a lock was not granted, with the table and the session that held it.
        """
        self.cursor.execute(BEGIN)
        try:
            with LockWatch(_connect_arguments(self._dsn), self.value("SELECT pg_backend_pid()")) as watch:
                yield
        except BaseException as error:
            if not self.connection.closed:
                self.cursor.execute("ROLLBACK")
            if isinstance(error, psycopg2.Error) and error.pgcode == _LOCK_NOT_AVAILABLE:
                raise Refused(_locked(watch)) from error
            raise
        self.cursor.execute("COMMIT")


def _connect_arguments(dsn: str) -> dict[str, object]:
    return parse(dsn).blocking_arguments() | {"connect_timeout": _CONNECT_TIMEOUT_S}


@contextmanager
def session(dsn: str, application_name: str, dsn_source: str = "postgres.dsn") -> Iterator[Session]:
    """Open a session for a command.

    :param dsn_source: the setting, the variable or the option that holds the DSN, for advice.
    :raises Refused: if the server cannot be reached, is too old, is a standby, or refuses a statement.
    """
    try:
        connection = psycopg2.connect(**_connect_arguments(dsn), application_name=application_name)
    except psycopg2.Error as error:
        todo = for_login(error.pgcode or "", str(error), dsn_source)
        raise Refused(message_of(dsn, error) + (f"; {todo}" if todo else "")) from error
    with closing(connection):
        connection.autocommit = True
        if (refusal := too_old(connection.server_version)) is not None:
            raise Refused(refusal)
        role = database = ""
        try:
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT format('%I', current_user), format('%I', current_database()), pg_is_in_recovery()"
                )
                role, database, is_standby = cursor.fetchone()
                if is_standby:
                    raise Refused("this server is a standby, which cannot be written to; run it on the primary")
                yield Session(connection, cursor, dsn, role, database)
        except psycopg2.Error as error:
            raise Refused(explained(dsn, error, role, database)) from error


def message_of(dsn: str, error: psycopg2.Error) -> str:
    """Return the server's message in one line without a password."""
    message = (error.diag.message_primary if error.diag else None) or str(error)
    return f"PostgreSQL: {parse(dsn).redact(message)}"


_NEXT_STEPS = (
    (r"permission denied for database (.+)", "GRANT CREATE ON DATABASE {database} TO {role};"),
    (
        r'(?:permission denied to set role|must be (?:member of|able to SET ROLE)(?: role)?) "(.+)"',
        'GRANT "{0}" TO {role};',
    ),
    (
        r"permission denied for schema (.+)",
        "run it as the owner of schema {0}, or: GRANT USAGE, CREATE ON SCHEMA {0} TO {role};",
    ),
    (r"must be owner of (?:\w+) (.+)", "run it as the owner of {0}"),
    (r"permission denied to create role", "ALTER ROLE {role} CREATEROLE; or create the reader yourself first"),
    (r"permission denied for (?:table|function|view|sequence) (.+)", "run it as the owner of {0}"),
)


def next_step(message: str, role: str, database: str) -> str:
    """Return the statement that grants the missing right, by the server's message.

    Empty if it is not known.

    :param role: quoted, as `database` is.
    """
    for pattern, advice in _NEXT_STEPS:
        if found := re.search(pattern, message):
            return advice.format(*found.groups(), role=role, database=database)
    return ""


def explained(dsn: str, error: psycopg2.Error, role: str, database: str) -> str:
    """Return the server's message, with the next step if it is known."""
    message = message_of(dsn, error)
    advice = next_step(message, role, database) if error.pgcode == "42501" else ""
    return f"{message}; {advice}" if advice else message


def _locked(watch: LockWatch) -> str:
    """Return the error for a lock that was not granted in time."""
    what = f"{watch.relation} is in use" if watch.relation else "another session blocks it"
    waited = f"the lock was not granted within {LOCK_TIMEOUT_MS // 1000} s"
    error = f"{what}: {waited}, and writers should not wait longer behind it"
    if watch.sessions:
        return f"{error}. It was blocked: {watch.sessions}; end that session, or wait for it, and try again"
    return f"{error}; try again when no long transaction uses the table and no other cacheservice command runs"


def restore_rights(session: Session) -> None:
    """Grant the owners of our tables any right on them that was revoked.

    Their triggers record changes with these rights.
    """
    session.cursor.execute(_RESTORE_RIGHTS)
