"""`cacheservice health`: a probe for containers.

It uses the address in the configuration.
"""

from __future__ import annotations

import click

from cacheservice.base.errors import Refused
from cacheservice.cli.asking import ask_once, status_address
from cacheservice.cli.options import where

_WANTED = {"ruok": "imok", "ready": "ready"}


@click.command()
@click.option("--ready", is_flag=True, help="Whether clients should be sent there, instead of whether it is alive.")
@where
def health(ready: bool, host: str | None, port: int | None, timeout_s: float) -> None:
    """Ask a running service whether it is alive: exit code 0 if it is, 1 if not.

    It asks the status port of the configuration; if that cannot be read, the default port, unless --port is given.
    A database that is down does not make the service unhealthy.

    \b
    Examples:
      cacheservice health
      cacheservice health --ready --timeout 2
    """
    question = "ready" if ready else "ruok"
    # A container must not be restarted for a broken file that the running service has rejected.
    address = status_address(host, port, guess=True)
    answer = ask_once(address, question, timeout_s)
    if answer != _WANTED[question]:
        raise Refused(f"{address} answered {question} with {answer[:200]!r}")
    click.echo(answer)
