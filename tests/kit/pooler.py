"""A real proxy in front of the server, once its configuration is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg2

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.standby import server_identity

START_LIMIT_S = 60


def program(name: str) -> str | None:
    """Where it is installed; Debian keeps servers out of the PATH of users."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def running_pooler(
    server: EmbeddedPostgres, command: Sequence[str | Path], folder: Path, port: int
) -> Iterator[Callable[..., str]]:
    """Run `command` in `folder` until the end; yields what `server.dsn` is without it, once it answers at `port`."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **server_identity(server)
        )
    try:
        dsn = partial(server.dsn, port=port)
        limit = time.monotonic() + START_LIMIT_S
        while True:
            try:
                psycopg2.connect(dsn()).close()
                break
            except psycopg2.OperationalError as error:
                problem = f"{error} {(folder / 'log').read_text()}"
                assert process.poll() is None, problem
                assert time.monotonic() < limit, problem
                time.sleep(0.05)
        yield dsn
    finally:
        process.terminate()
        process.wait()
