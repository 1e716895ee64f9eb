"""A real standby: a copy of the server that follows it, and answers queries meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg2

from cacheservice.cli.embedded import EmbeddedPostgres, _free_port, _programs

START_LIMIT_S = 60


def server_identity(server: EmbeddedPostgres) -> dict[str, Any]:
    """Whom `subprocess` has to run a program as that runs beside the server and refuses root."""
    owner = server.socket_directory.stat()
    if os.getuid() == owner.st_uid:
        return {}
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}


@contextmanager
def folder_of_server_user(server: EmbeddedPostgres) -> Iterator[Path]:
    """An empty folder of whom the server runs as, removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
    try:
        owner = server.socket_directory.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def running_standby(
    server: EmbeddedPostgres, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Callable[..., str]]:
    """A hot standby of `server`, which must run; gives what `server.dsn` is for the server itself.

    It blocks for some seconds. `settings` go over those of the server. ``SELECT pg_promote()`` makes it a primary.
    """
    with folder_of_server_user(server) as folder:
        data, port = folder / "data", _free_port()
        common: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL, **server_identity(server)}
        source = ["-h", server.socket_directory, "-p", str(server.port), "-U", "postgres"]
        copy = [_programs() / "pg_basebackup", *source, "-D", data, "-X", "stream", "-c", "fast", "-R"]
        subprocess.run(copy, check=True, capture_output=True, **common)
        options = {
            **server.settings,
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
            dsn = partial(server.dsn, port=port)
            _wait_until_ready(process, dsn(), folder / "log")
            yield dsn
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
