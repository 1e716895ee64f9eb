"""A real standby: a copy of the server that follows it, and answers queries meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg2

from cacheservice.cli.embedded import EmbeddedPostgres, program_folder
from tests.kit.ports import free_port

START_LIMIT_S = 60


def server_identity(server: EmbeddedPostgres) -> dict[str, Any]:
    """The user as which `subprocess` has to run a program that runs beside the server and refuses root."""
    owner = server.socket_directory.stat()
    if os.getuid() == owner.st_uid:
        return {}
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}


@contextmanager
def folder_of_server_user(server: EmbeddedPostgres) -> Iterator[Path]:
    """An empty folder of the server's user, removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
    try:
        owner = server.socket_directory.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
        yield folder
    finally:
        shutil.rmtree(folder)


class Standby:
    """A running hot standby: a call of it returns what `server.dsn` does for the server itself."""

    def __init__(self, server: EmbeddedPostgres, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.process = process
        self._dsn = partial(server.dsn, port=port)

    def __call__(self, **more: Any) -> str:
        return self._dsn(**more)

    def sql(self, statement: str, **more: Any) -> list[tuple[Any, ...]]:
        """Run one statement in a session of its own, as superuser; the rows, or [] where it returns none."""
        with closing(psycopg2.connect(self(**more))) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def receiver(self) -> int:
        """The pid of the process that receives WAL."""
        ((pid,),) = self.sql("SELECT pid FROM pg_stat_wal_receiver")
        return int(pid)


@contextmanager
def running_standby(
    server: EmbeddedPostgres,
    settings: Mapping[str, str] = MappingProxyType({}),
    of: Standby | None = None,
    *,
    streaming: bool = True,
) -> Iterator[Standby]:
    """A hot standby of `server`, which must run, or of its standby `of`.

    It blocks for some seconds. `settings` go over those of the server. ``SELECT pg_promote()`` makes it a primary.
    Without `streaming` it has no primary to connect to, and waits for what `restore_command` brings.
    """
    with folder_of_server_user(server) as folder:
        data, port = folder / "data", free_port()
        common: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL, **server_identity(server)}
        primary = f"host={server.socket_directory} port={server.port} user=postgres"
        source = ["-h", server.socket_directory, "-p", str(server.port), "-U", "postgres"]
        copy = [program_folder() / "pg_basebackup", *source, "-D", data, "-X", "stream", "-c", "fast", "-R"]
        subprocess.run(copy, check=True, capture_output=True, **common)
        options = {
            **server.settings,
            # pg_basebackup writes what its own libpq knows, which an older server does not.
            **({"primary_conninfo": primary} if of is None else {}),
            **({} if streaming else {"primary_conninfo": ""}),
            **({} if of is None else {"primary_conninfo": of()}),
            **settings,
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
        }
        arguments = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (folder / "log").open("wb") as log:
            program = [server.programs / "postgres", "-D", data, *arguments]
            process = subprocess.Popen(program, stdout=log, stderr=log, start_new_session=True, **common)
        try:
            standby = Standby(server, port, process)
            _wait_until_ready(process, standby(), folder / "log")
            yield standby
        finally:
            process.send_signal(signal.SIGQUIT)  # an immediate stop
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], dsn: str, log: Path) -> None:
    limit = time.monotonic() + START_LIMIT_S
    while True:
        try:
            psycopg2.connect(dsn).close()
            return
        except psycopg2.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.02)
