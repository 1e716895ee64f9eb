"""`cacheservice health`: the probe of a container, for where the configuration says that the service is."""

from __future__ import annotations

import click

from cacheservice.cli.asking import ask_once, status_address
from cacheservice.cli.options import where
from cacheservice.errors import Refused

_WANTED = {"ruok": "imok", "ready": "ready"}


@click.command()
@click.option("--ready", is_flag=True, help="Whether clients should be sent there, instead of whether it is alive.")
@where
def health(ready: bool, host: str | None, port: int | None, timeout_s: float) -> None:
    """Ask a running service whether it is alive: exit code 0 if it is, 1 if not.

    It goes where the configuration says that the status port is. A database that is down does not make it unhealthy.

    \b
    Examples:
      cacheservice health
      cacheservice health --ready --timeout 2
    """
    question = "ready" if ready else "ruok"
    address = status_address(host, port)
    answer = ask_once(address, question, timeout_s)
    if answer != _WANTED[question]:
        raise Refused(f"{address} answered {question} with {answer[:200]!r}")
    click.echo(answer)
