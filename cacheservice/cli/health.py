"""`cacheservice health`: a probe for containers."""

from __future__ import annotations

import click

from cacheservice.base.errors import Refused
from cacheservice.cli.addresses import status_address
from cacheservice.cli.client import ask_once
from cacheservice.cli.options import where

_EXPECTED = {"ruok": "imok", "ready": "ready"}


@click.command()
@click.option("--ready", is_flag=True, help="Check that the service is ready for clients, not only alive.")
@where
def health(ready: bool, host: str | None, port: int | None, timeout_s: float) -> None:
    """Check that a running service is alive. Exit code 0 if it is, 1 if not.

    The command queries the status port of the configuration. If the configuration cannot be read, it queries the
    default port, unless --port is given. A service whose database is down is alive.

    \b
    Examples:
      cacheservice health
      cacheservice health --ready --timeout 2
    """
    command = "ready" if ready else "ruok"
    # A container must not be restarted for a broken file that the running service has rejected.
    address = status_address(host, port, guess=True)
    reply = ask_once(address, command, timeout_s)
    if reply != _EXPECTED[command]:
        raise Refused(f"{address} answered {command} with {reply[:200]!r}")
    click.echo(reply)
