"""`cacheservice run`: runs the service without twistd's options."""

from __future__ import annotations

import click
from twisted.scripts import twistd

from cacheservice.base import shipped


@click.command()
def run() -> None:
    """Run the service in the foreground, as `twistd -noy tac/cacheservice.tac --pidfile=` does.

    SIGTERM and Ctrl-C stop the service within 5 s. SIGHUP makes it read the configuration again. The log goes to
    standard output.

    \b
    Examples:
      cacheservice run
      CACHESERVICE_CONFIG=/etc/cacheservice.toml CACHESERVICE_POSTGRES__DSN_FILE=/run/secrets/dsn cacheservice run
    """
    options = twistd.ServerOptions()  # type: ignore[attr-defined]  # its class depends on the platform
    options.parseOptions(["-noy", str(shipped.folder("tac") / "cacheservice.tac"), "--pidfile="])
    twistd.runApp(options)
