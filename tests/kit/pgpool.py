"""A real pgpool-II in front of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.pooler import program, running_pooler
from tests.kit.ports import free_port
from tests.kit.standby import folder_of_server_user

PROGRAM = program("pgpool")
NEEDED = "needs pgpool-II: apt-get install pgpool2"

_CONFIGURATION = """
backend_clustering_mode = 'streaming_replication'
listen_addresses = '127.0.0.1'
port = {port}
pcp_listen_addresses = ''
pcp_port = {pcp_port}
socket_dir = '{folder}'
unix_socket_directories = '{folder}'
pcp_socket_dir = '{folder}'
pid_file_name = '{folder}/pgpool.pid'
logdir = '{folder}'
backend_hostname0 = '127.0.0.1'
backend_port0 = {server_port}
backend_weight0 = {weight}
backend_flag0 = 'ALWAYS_PRIMARY|DISALLOW_TO_FAILOVER'
{standby}
sr_check_period = 0
health_check_period = 0
enable_pool_hba = on
pool_passwd = '{folder}/pool_passwd'
allow_clear_text_frontend_auth = off
num_init_children = 8
connection_cache = on
load_balance_mode = on
use_watchdog = off
"""


_STANDBY = """
backend_hostname1 = '127.0.0.1'
backend_port1 = {port}
backend_weight1 = 1
backend_flag1 = 'DISALLOW_TO_FAILOVER'
"""


@contextmanager
def running_pgpool(server: EmbeddedPostgres, standby_port: int | None = None) -> Iterator[Callable[..., str]]:
    """pgpool before `server`; yields what `server.dsn` is without it. Needs `PROGRAM`.

    With a standby, reads that are balanced go there.
    """
    assert PROGRAM is not None, NEEDED
    with folder_of_server_user(server) as folder:
        port = free_port()
        password = psycopg2.extensions.parse_dsn(server.dsn())["password"]
        (folder / "pool_passwd").write_text(f"postgres:TEXT{password}\n")
        (folder / "pool_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        (folder / "pcp.conf").write_text("")
        (folder / "pgpool.conf").write_text(
            _CONFIGURATION.format(
                server_port=server.port,
                port=port,
                pcp_port=free_port(),
                folder=folder,
                weight=1 if standby_port is None else 0,
                standby="" if standby_port is None else _STANDBY.format(port=standby_port),
            )
        )
        command = [
            PROGRAM,
            "-n",
            "-f",
            folder / "pgpool.conf",
            "-F",
            folder / "pcp.conf",
            "-a",
            folder / "pool_hba.conf",
        ]
        with running_pooler(server, command, folder, port) as dsn:
            yield dsn
