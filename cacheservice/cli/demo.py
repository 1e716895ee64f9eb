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
from shlex import quote
from types import FrameType, TracebackType
from typing import IO, NamedTuple

import click

from cacheservice.base import file_errors, shipped
from cacheservice.base.errors import DemoFailed, NoAnswer
from cacheservice.cli import exit
from cacheservice.cli.client import UnixSocket, ask_once
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
_STATUS_PORT = 8000
_RESP_PORT = 6380
_HTTP_PORT = 8080
_USUAL_PORTS = (_STATUS_PORT, _RESP_PORT, _HTTP_PORT)
_ADMIN_SOCKET = "admin.sock"
_MOST_STARTS = 5
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ANSWER_LIMIT_S = 30.0
_STOP_LIMIT_S = 10.0
_REVIVE_AFTER_S = 10.0
"""How long a database that another process ended stays down, so that users can watch the effect."""

_CONFIGURATION = """\
# Made by `cacheservice demo`. The database is named by CACHESERVICE_POSTGRES__DSN, which holds a password.
[status]
port = {status_port}

[resp]
port = {resp_port}

[http]
port = {http_port}
admin_token = "demo"

[admin]
socket = "{admin_socket}"

[log]
format = "console"

[defaults]
timeout_s = 5

[datasets.products]
query = "SELECT id, sku, name, category, stock FROM shop.products"
key = "id"
interval_s = 5
watch = [{{table = "shop.products", key = "id"}}]

[datasets.prices]
query = "SELECT product_id, currency, amount FROM shop.prices"
key = ["product_id", "currency"]
interval_s = 10
watch = [{{table = "shop.prices", key = ["product_id", "currency"]}}]

[datasets.feature_flags]
query = "SELECT name, enabled, rollout_percent FROM shop.feature_flags"
key = "name"
interval_s = 5
notify = "feature_flags"

[datasets.permissions]
query = '''
SELECT c.id AS customer_id, c.name, array_agg(p.permission ORDER BY p.permission) AS permissions
FROM shop.customers AS c JOIN shop.permissions AS p ON p.customer_id = c.id
GROUP BY c.id
'''
key = "customer_id"
interval_s = 15
required = false
watch = [{{table = "shop.customers", key = "id"}}, {{table = "shop.permissions", key = "customer_id"}}]
"""

_TO_TRY = """
The service is running. In another terminal:

  Look:     http://127.0.0.1:{http_port}/      in a browser (operator's token: demo)
            {program} status{port}      (live: add --watch)
            {program} tail{tail_ports}
            {program} why products{port}
            echo status | nc -N 127.0.0.1 {status_port}
  Check:    CACHESERVICE_CONFIG={configuration} CACHESERVICE_POSTGRES__DSN={owner} {program} check --db
  Read:     redis-cli -p {resp_port} GET products:42
            redis-cli -p {resp_port} HGETALL feature_flags
            curl -i http://127.0.0.1:{http_port}/v1/datasets/prices/rows/42:EUR
  Change:   {psql} -c "UPDATE shop.prices SET amount = 1.23 WHERE product_id = 42"
            redis-cli -p {resp_port} GET prices:42:EUR      (the new price is there at once)
  Lock it:  {psql} -c "BEGIN; LOCK TABLE shop.products; SELECT pg_sleep(20)"
            {program} why products{port}        (after 5 s: the session that holds the lock)
  Freeze:   kill -STOP {postgres_pid} $(pgrep -P {postgres_pid})     ages rise, nothing else changes
            kill -CONT {postgres_pid} $(pgrep -P {postgres_pid})     the service recovers
  Crash:    kill -QUIT {postgres_pid}       the demo restarts the database after {revive_after_s:.0f} s
  Refresh:  echo "refresh all" | nc -NU {admin_socket}
  Log:      tail -f {log}

Ctrl-C stops everything.{kept}
"""


class _Ports(NamedTuple):
    status: int
    resp: int
    http: int


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
        click.echo(f"Starting an embedded PostgreSQL in {directory} …")
        self._postgres = EmbeddedPostgres(directory / "postgres")
        self._resources.callback(self._postgres.stop)
        self._postgres.start()
        password = self._fill_shop()
        self._life = self._resources.enter_context(_child(self._life_command()))
        dsn = self._postgres.dsn(_READER, password, _DATABASE)
        for tries_left in range(_MOST_STARTS - 1, -1, -1):
            ports = _Ports(_port(_STATUS_PORT), _port(_RESP_PORT), _port(_HTTP_PORT))
            self._start_service(directory, dsn, ports)
            if self._is_ready(directory / _ADMIN_SOCKET):
                break
            # Another demo that starts at the same time may have taken a port that was free.
            if not tries_left or self._service.poll() is None or all(map(_is_free, ports)):
                raise DemoFailed(f"the service did not become ready; the last line of its log: {self._last_line()}")
        for name, port, usual in zip(("status", "RESP", "HTTP"), ports, _USUAL_PORTS, strict=True):
            if port != usual:
                click.echo(f"Port {usual} is taken: the {name} port is {port} instead.")
        click.echo(self._what_to_try(directory, *ports, directory / _ADMIN_SOCKET))

    def _start_service(self, directory: Path, dsn: str, ports: _Ports) -> None:
        configuration = directory / "cacheservice.toml"
        configuration.write_text(
            _CONFIGURATION.format(
                status_port=ports.status,
                resp_port=ports.resp,
                http_port=ports.http,
                admin_socket=directory / _ADMIN_SOCKET,
            )
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        environment |= {"CACHESERVICE_CONFIG": str(configuration), "CACHESERVICE_POSTGRES__DSN": dsn}
        click.echo("Starting the service …")
        command = [sys.executable, "-m", "cacheservice", "run"]
        # Into a file: on the terminal the log would push the instructions off the screen within half a minute.
        self._log = directory / "service.log"
        with self._log.open("wb") as log:
            self._service = self._resources.enter_context(
                _child(command, log, environment=environment, directory=directory)
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
            watch(owner, table, key, notify=True, dry_run=False, say=click.echo)
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
                click.echo(f"PostgreSQL has ended; the demo restarts it in {_REVIVE_AFTER_S:.0f} s.")
            elif time.monotonic() - self._down_since > _REVIVE_AFTER_S:
                self._down_since = None
                self._postgres.start()
                click.echo(f"PostgreSQL is running again, as process {self._postgres.pid}.")
        elif self._life.poll() is not None:
            self._life = self._resources.enter_context(_child(self._life_command()))

    def _is_ready(self, admin_socket: Path) -> bool:
        """Wait; return True if the service becomes ready in time.

        It asks over the admin socket, because a port might belong to another demo.
        """
        limit = time.monotonic() + _ANSWER_LIMIT_S
        while time.monotonic() < limit and self._service.poll() is None:
            with suppress(NoAnswer):
                if ask_once(UnixSocket(str(admin_socket)), "ready", 1.0) == "ready":
                    return True
            time.sleep(0.1)
        return False

    def _last_line(self) -> str:
        *_, last = ["its log is empty", *self._log.read_text(errors="replace").splitlines()]
        return last

    def _what_to_try(
        self, directory: Path, status_port: int, resp_port: int, http_port: int, admin_socket: Path
    ) -> str:
        port = "" if status_port == _STATUS_PORT else f" --port {status_port}"
        tail_ports = port if resp_port == _RESP_PORT else f"{port} --resp-port {resp_port}"
        return _TO_TRY.format(
            program=_program(),
            port=port,
            tail_ports=tail_ports,
            configuration=quote(str(directory / "cacheservice.toml")),
            owner=_quoted(self._psql()[-1]),
            status_port=status_port,
            psql=" ".join(map(_quoted, self._psql())),
            postgres_pid=self._postgres.pid,
            revive_after_s=_REVIVE_AFTER_S,
            admin_socket=quote(str(admin_socket)),
            log=quote(str(self._log)),
            resp_port=resp_port,
            http_port=http_port,
            kept=f" The data remain in {directory}." if self._directory else "",
        )


def _program() -> str:
    """Return the command that a user can enter: short if it is on the PATH."""
    if shutil.which("cacheservice"):
        return "cacheservice"
    beside = Path(sys.executable).with_name("cacheservice")
    return quote(str(beside)) if beside.exists() else f"{quote(sys.executable)} -m cacheservice"


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


def _quoted(word: str) -> str:
    """Quote a word for a shell; in double quotes if that is easier to read."""
    if re.fullmatch(r"[\w./ ='-]+", word) and re.search("[ ']", word):
        return f'"{word}"'
    return quote(word)


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
