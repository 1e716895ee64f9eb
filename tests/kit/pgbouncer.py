"""A real PgBouncer that pools transactions, in front of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.pooler import program, running_pooler
from tests.kit.ports import free_port
from tests.kit.standby import folder_of_server_user

PROGRAM = program("pgbouncer")
NEEDED = "needs PgBouncer: apt-get install pgbouncer"

_CONFIGURATION = """
[databases]
* = host=127.0.0.1 port={server_port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {users}
pool_mode = transaction
default_pool_size = {pool_size}
"""


@contextmanager
def running_pgbouncer(server: EmbeddedPostgres, pool_size: int = 2) -> Iterator[Callable[..., str]]:
    """PgBouncer in transaction mode before `server`; returns what `server.dsn` is without it. Needs `PROGRAM`."""
    assert PROGRAM is not None, NEEDED
    with folder_of_server_user(server) as folder:
        port, users = free_port(), folder / "users.txt"
        password = psycopg2.extensions.parse_dsn(server.dsn())["password"]
        users.write_text(f'"postgres" "{password}"\n')
        configuration = folder / "pgbouncer.ini"
        configuration.write_text(
            _CONFIGURATION.format(server_port=server.port, port=port, users=users, pool_size=pool_size)
        )
        with running_pooler(server, [PROGRAM, configuration], folder, port) as dsn:
            yield dsn
