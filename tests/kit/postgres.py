"""What tests do with the real server: fresh databases, SQL from the side, and who is still connected.

A test class gets the server as `self.server` by ``@pytest.mark.usefixtures("server")``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import psycopg2
from twisted.internet import reactor
from twisted.internet.task import deferLater

from cacheservice.cache.identity import ServerIdentity
from cacheservice.cli.embedded import EmbeddedPostgres

PRIMARY = ServerIdentity("shop", 16384, "reader", False, 1_000_000, 2_000_000, 1, "7312345678901234567")
"""The server of snapshots that came from none."""
OURS = "cacheservice tests"  # the application_name of the sessions opened here


class Session(NamedTuple):
    pid: int
    application_name: str
    state: str | None
    query: str


def connect(server: EmbeddedPostgres, database: str = "postgres", **options: Any) -> Any:
    """A blocking psycopg2 connection in autocommit, as superuser; `options` are psycopg2's, such as `port`."""
    connection = psycopg2.connect(server.dsn(database=database), application_name=OURS, **options)
    connection.autocommit = True
    return connection


def query(
    server: EmbeddedPostgres, database: str, statement: str, parameters: Sequence[Any] | None = None
) -> list[tuple[Any, ...]]:
    """Run one statement in a session of its own; the rows, or [] where it returns none."""
    with closing(connect(server, database)) as connection, connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def at_least(server: EmbeddedPostgres, major: int) -> bool:
    """Whether it is of this major version or a later one."""
    return int(query(server, "postgres", "SHOW server_version_num")[0][0]) >= 10_000 * major


def fresh_database(server: EmbeddedPostgres, add_cleanup: Callable[..., object] | None = None) -> str:
    """Create an empty database and return its name.

    `add_cleanup` (`self.addCleanup`, or `cls.addClassCleanup` in `setUpClass`) drops it, sessions and all.
    """
    name = f"test_{secrets.token_hex(6)}"
    query(server, "postgres", f"CREATE DATABASE {name}")
    if add_cleanup is not None:
        add_cleanup(query, server, "postgres", f"DROP DATABASE {name} WITH (FORCE)")
    return name


def drop_role(server: EmbeddedPostgres, database: str, name: str) -> None:
    """Drop a role, if there is one, and what it was granted in `database`; roles are the whole server's."""
    if query(server, database, "SELECT FROM pg_roles WHERE rolname = %s", (name,)):
        query(server, database, f"DROP OWNED BY {name}")
        query(server, database, f"DROP ROLE {name}")


def sessions(server: EmbeddedPostgres, database: str) -> list[Session]:
    """The sessions that clients hold in `database`, except those opened by `connect`."""
    statement = """
        SELECT pid, application_name, state, query FROM pg_stat_activity
        WHERE datname = %s AND backend_type = 'client backend' AND application_name <> %s ORDER BY pid
    """
    return [Session(*row) for row in query(server, "postgres", statement, (database, OURS))]


async def sessions_left(server: EmbeddedPostgres, database: str, within_s: float = 30) -> list[Session]:
    """Wait until `sessions` is empty; what is left of them after `within_s`.

    The server notices a closed connection a moment after the client closed it.
    """
    limit = reactor.seconds() + within_s
    while (left := sessions(server, database)) and reactor.seconds() < limit:
        await deferLater(reactor, 0.02)
    return left
