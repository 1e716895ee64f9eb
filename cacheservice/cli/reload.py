"""`cacheservice reload`: reloads the configuration and reports the result, for service managers."""

from __future__ import annotations

import click

from cacheservice.cli import exit
from cacheservice.cli.addresses import admin_socket
from cacheservice.cli.client import ask_once
from cacheservice.cli.options import timeout
from cacheservice.cli.terminal import print_error


@click.command()
@click.option("--socket", "path", metavar="PATH", help="The admin socket.  [default: as configured]")
@timeout(60.0)
def reload(path: str | None, timeout_s: float) -> None:
    """Make a running service read its configuration again, and wait for the result.

    Exit code 0 if the configuration is in effect; 1 if it was refused, with every problem, and the service keeps its
    old one; 2 if nothing was sent, because the file that names the admin socket cannot be read.

    The command uses the admin socket (`admin.socket`). Without one, send SIGHUP: the result is in the log.

    \b
    Examples:
      cacheservice reload
      cacheservice reload --socket /run/cacheservice/admin.sock
    """
    reply = ask_once(admin_socket(path), "reload", timeout_s)
    if not reply.startswith("OK"):
        for line in reply.removeprefix("ERROR ").splitlines() or ["no reply"]:
            print_error(line)
        raise click.exceptions.Exit(exit.FAILURE)
    click.echo(reply)
