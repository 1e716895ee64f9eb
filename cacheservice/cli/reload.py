"""`cacheservice reload`: reloads the configuration and reports the result.

It is meant for service managers.
"""

from __future__ import annotations

import os
import socket
import time

import click

from cacheservice import config
from cacheservice.base.errors import AddressUnknown, NoAnswer, Refused
from cacheservice.cli.program import tell


@click.command()
@click.option("--socket", "path", metavar="PATH", help="The admin socket; else as configured.")
@click.option(
    "--timeout",
    "-t",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the result.",
)
def reload(path: str | None, timeout_s: float) -> None:
    """Make a running service read its configuration again, and wait for the result.

    Exit code 0 if it is in effect; 1 if it was refused, with every problem, and the service goes on as it was; 2 if
    nothing was sent, because the file that names the admin socket cannot be read.

    It goes over the admin socket (`admin.socket`). Without one, send SIGHUP: the log has the result.

    \b
    Examples:
      cacheservice reload
      cacheservice reload --socket /run/cacheservice/admin.sock
    """
    reply = _ask(path or _configured_socket(), "reload", timeout_s)
    if not reply.startswith("OK"):
        for line in reply.removeprefix("ERROR ").splitlines() or ["no reply"]:
            tell(line)
        raise click.exceptions.Exit(1)
    click.echo(reply)


def _configured_socket() -> str:
    """Return the admin socket of the configuration.

    :raises AddressUnknown: if the configuration cannot be read, and so may name a socket.
    """
    seen = config.glance(os.environ)
    if (problem := seen.problem("admin", "socket")) is not None:
        raise AddressUnknown(f"{problem}; nothing was sent: correct this first, or name the admin socket with --socket")
    if seen.admin.socket:
        return seen.admin.socket
    if seen.is_absent:
        raise AddressUnknown(
            f"{config.DEFAULT_FILE}: not found in the working directory; nothing was sent: name the file in "
            "CACHESERVICE_CONFIG, or the admin socket with --socket"
        )
    raise Refused("no admin socket is configured; set admin.socket, or send SIGHUP to the service")


def _ask(path: str, command: str, timeout_s: float) -> str:
    deadline_at = time.monotonic() + timeout_s
    reply = bytearray()
    try:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(timeout_s)
            admin.connect(path)
            admin.sendall(f"{command}\n".encode())
            while received := admin.recv(65536):
                reply += received
                admin.settimeout(max(0.001, deadline_at - time.monotonic()))
    except OSError as error:
        reason = (error.strerror or str(error) or type(error).__name__).lower()
        hint = "is the service running, and may you open its socket?"
        raise NoAnswer(f"no answer from {path}: {reason}; {hint}") from error
    return reply.decode("utf-8", "replace").rstrip("\n")
