"""The demo: an embedded PostgreSQL with a small shop, and the service.

The shop changes all the time. This process only starts the others, restarts the database, and ends the processes that
it started, by their IDs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import resources
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import click

from cacheservice.base import file_errors, shipped
from cacheservice.base.errors import DemoFailed, NoAnswer
from cacheservice.cli import demo_texts, exit
from cacheservice.cli.client import UnixSocket, ask_once
from cacheservice.cli.demo_texts import REVIVE_AFTER_S, USUAL_PORTS, Place, Ports
from cacheservice.cli.embedded import EmbeddedPostgres, free_port
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.watch import watch

_DATABASE = "shop"
_READER = "cache_reader"
_TABLES = ("shop.products", "shop.prices", "shop.feature_flags", "shop.customers", "shop.permissions")
_WATCHED = {
    "shop.products": ["id"],
    "shop.prices": ["product_id", "currency"],
    "shop.customers": ["id"],
    "shop.permissions": ["customer_id"],
}
_MOST_STARTS = 5
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ANSWER_LIMIT_S = 30.0
_STOP_LIMIT_S = 10.0


class Demo:
    """All processes of the demo, as a context manager that ends them.

    :param directory: the folder of the data; None for a folder that is removed at the end.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._resources = ExitStack()
        self._down_since: float | None = None

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
            click.echo("\nStopping the service and its PostgreSQL …")
        self._end()

    def _end(self) -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of the processes running
        self._resources.close()

    def wait(self) -> None:
        """Keep the shop running until the service ends or a signal arrives.

        :raises DemoFailed: if the service ends by itself.
        """
        while self._service.poll() is None:
            self._revive()
            time.sleep(0.5)
        code, line = self._service.returncode, self._last_line()
        raise DemoFailed(f"the service has ended with exit code {code}; the last line of its log: {line}")

    def _start(self) -> None:
        directory = self._resources.enter_context(_folder(self._directory))
        self._place = Place(directory, is_kept=self._directory is not None)
        click.echo(f"Starting an embedded PostgreSQL in {directory} …")
        self._postgres = EmbeddedPostgres(directory / "postgres")
        self._resources.callback(self._postgres.stop)
        self._postgres.start()
        password = self._fill_shop()
        self._life = self._resources.enter_context(_child(self._life_command()))
        dsn = self._postgres.dsn(_READER, password, _DATABASE)
        for tries_left in range(_MOST_STARTS - 1, -1, -1):
            ports = Ports(*map(_port, USUAL_PORTS))
            self._start_service(dsn, ports)
            if self._is_ready():
                break
            # Another demo that starts at the same time may have taken a port that was free.
            if not tries_left or self._service.poll() is None or all(map(_is_free, ports)):
                raise DemoFailed(f"the service did not become ready; the last line of its log: {self._last_line()}")
        for name, port, usual in zip(("status", "RESP", "HTTP"), ports, USUAL_PORTS, strict=True):
            if port != usual:
                click.echo(f"Port {usual} is taken: the {name} port is {port} instead.")
        click.echo(demo_texts.what_to_try(self._place, ports, self._psql(), self._postgres.pid))

    def _start_service(self, dsn: str, ports: Ports) -> None:
        place = self._place
        place.configuration.write_text(demo_texts.configuration(place, ports))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        environment |= {"CACHESERVICE_CONFIG": str(place.configuration), "CACHESERVICE_POSTGRES__DSN": dsn}
        click.echo("Starting the service …")
        command = [sys.executable, "-m", "cacheservice", "run"]
        # Into a file: on the terminal the log would push the instructions off the screen within half a minute.
        with place.log.open("wb") as log:
            self._service = self._resources.enter_context(
                _child(command, log, environment=environment, directory=place.directory)
            )

    def _fill_shop(self) -> str:
        """Create the shop, if missing, and its reader; return the reader's new password."""
        if _DATABASE not in self._postgres.run_sql("SELECT datname FROM pg_database").split():
            click.echo("Creating a small shop: 98,000 rows of products, prices, flags and permissions …")
            self._postgres.create_database(_DATABASE)
            self._postgres.run_sql(resources.files("cacheservice.cli").joinpath("shop.sql").read_text(), _DATABASE)
        owner = self._postgres.dsn(database=_DATABASE)
        migrate(owner, shipped.folder("migrations"))
        for table, key in _WATCHED.items():
            watch(owner, table, key, notify=True, dry_run=False, show=click.echo)
        password = secrets.token_urlsafe(24)
        create_reader(owner, _READER, _TABLES, password)
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

    def _revive(self) -> None:
        """Restart a database that another process ended, and the shop's changes.

        The restart comes after some seconds.
        """
        if not self._postgres.running:
            if self._down_since is None:
                self._down_since = time.monotonic()
                click.echo(f"PostgreSQL has ended; the demo restarts it in {REVIVE_AFTER_S:.0f} s.")
            elif time.monotonic() - self._down_since > REVIVE_AFTER_S:
                self._down_since = None
                self._postgres.start()
                click.echo(f"PostgreSQL is running again, as process {self._postgres.pid}.")
        elif self._life.poll() is not None:
            self._life = self._resources.enter_context(_child(self._life_command()))

    def _is_ready(self) -> bool:
        """Wait; return True if the service becomes ready in time.

        It asks over the admin socket, because a port might belong to another demo.
        """
        socket_path = UnixSocket(str(self._place.admin_socket))
        limit = time.monotonic() + _ANSWER_LIMIT_S
        while time.monotonic() < limit and self._service.poll() is None:
            with suppress(NoAnswer):
                if ask_once(socket_path, "ready", 1.0) == "ready":
                    return True
            time.sleep(0.1)
        return False

    def _last_line(self) -> str:
        *_, last = ["its log is empty", *self._place.log.read_text(errors="replace").splitlines()]
        return last


@contextmanager
def _folder(directory: Path | None) -> Iterator[Path]:
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
def _child(
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


def _port(wanted: int) -> int:
    """Return `wanted`, or another free port if it is in use."""
    return wanted if _is_free(wanted) else free_port()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _interrupt(number: int, _: FrameType | None) -> None:
    raise SystemExit(exit.by_signal(number))


@click.command()
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the data in this folder for the next start.  [default: a new folder that is removed at the end]",
)
def demo(directory: Path | None) -> None:
    """Start an embedded PostgreSQL with a small shop whose data keep changing, and the service in front of it.

    Ctrl-C stops everything (exit code 130), and so do Ctrl-\\ and closing the terminal. Under nohup it continues.

    \b
    Examples:
      cacheservice demo
      cacheservice demo --directory ./shop      the next start has the same data
    """
    with Demo(directory) as running:
        running.wait()
