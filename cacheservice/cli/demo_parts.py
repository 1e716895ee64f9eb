"""The folder, the child processes and the ports of the demo."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cacheservice.base import file_errors
from cacheservice.base.errors import DemoFailed
from cacheservice.cli.embedded import free_port

_STOP_LIMIT_S = 10.0


@contextmanager
def folder(directory: Path | None) -> Iterator[Path]:
    """Yield a folder for all data.

    :param directory: None for a new folder that is removed at the end.
    :raises DemoFailed: if nothing can be written there.
    """
    if directory is None:
        made = Path(tempfile.mkdtemp(prefix="cacheservice-demo-"))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
    else:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise DemoFailed(file_errors.of_folder("--directory", directory, error, user="this user")) from error
        yield directory.resolve()


@contextmanager
def child(
    command: list[str],
    output: IO[bytes] | int = subprocess.DEVNULL,
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child process that the terminal's Ctrl-C does not reach.

    The demo ends its children itself, in order.
    """
    process = subprocess.Popen(  # noqa: S603  # our own programs, no shell
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def port_like(wanted: int) -> int:
    """Return `wanted`, or another free port if it is in use."""
    return wanted if is_free(wanted) else free_port()


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
