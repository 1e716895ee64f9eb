"""A primary and its standby."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg2

from benchmarks.jepsen.judge import Judge
from benchmarks.jepsen.money import SCHEMA, START_LIMIT_S
from cacheservice.cli.embedded import EmbeddedPostgres, free_port, program_folder


class Node:
    """One PostgreSQL, a primary or a standby, at a port that stays."""

    def __init__(self, folder: Path, port: int, like: EmbeddedPostgres) -> None:
        self.folder, self.port = folder, port
        self._like = like
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: list[psutil.Process] = []
        owner = like.socket_directory.stat()
        self._owner = owner
        self._identity: dict[str, Any] = (
            {} if os.geteuid() == owner.st_uid else {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        )

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def dsn(self, database: str = "postgres") -> str:
        return self._like.dsn(database=database, port=self.port)

    def connect(self, database: str = "bank") -> Any:
        return psycopg2.connect(self.dsn(database), application_name="jepsen", connect_timeout=10)

    def copy_from(self, primary: Node) -> None:
        """Become a standby of `primary`, from an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        os.chown(self.folder, self._owner.st_uid, self._owner.st_gid)
        source = ["-h", primary.data, "-p", str(primary.port), "-U", "postgres"]
        command = [program_folder() / "pg_basebackup", *source, "-D", self.data, "-X", "stream", "-c", "fast", "-R"]
        subprocess.run(command, check=True, cwd=self.folder, stdin=subprocess.DEVNULL, **self._identity)

    def start(self) -> None:
        settings = {
            **self._like.settings,
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.data),
            "shared_buffers": "32MB",
            "hot_standby_feedback": "on",
            "max_standby_streaming_delay": "2s",
            "wal_receiver_status_interval": "1s",
            "wal_retrieve_retry_interval": "200ms",
        }
        arguments = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program_folder() / "postgres", "-D", self.data, *arguments],
                cwd=self.data,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._identity,
            )
        limit = time.monotonic() + START_LIMIT_S
        while True:
            with suppress(psycopg2.OperationalError):
                self.connect("postgres").close()
                return
            if time.monotonic() > limit or self._process.poll() is not None:
                raise RuntimeError(f"{self.folder} does not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGQUIT) -> None:
        self.thaw()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def freeze(self) -> None:
        if self._process is not None:
            postmaster = psutil.Process(self._process.pid)
            postmaster.suspend()
            self._frozen = [postmaster]
            for child in postmaster.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.suspend()
                    self._frozen.append(child)

    def thaw(self) -> None:
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []

    def sql(self, statement: str, database: str = "bank") -> list[tuple[Any, ...]]:
        with closing(self.connect(database)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []


class Cluster:
    """A primary and its standby, which change their parts."""

    def __init__(self, directory: Path, judge: Judge) -> None:
        self._judge = judge
        first = EmbeddedPostgres(directory / "first")
        first.start()
        first.create_database("bank")
        first.run_sql(SCHEMA, "bank")
        first.stop("fast")
        self.primary = Node(directory / "first", first.port, first)
        self.standby = Node(directory / "second", free_port(), first)
        self.primary.start()

    def add_standby(self) -> None:
        self.standby.copy_from(self.primary)
        self.standby.start()

    def dsn(self, attributes: str) -> str:
        """Both hosts, in an order that never changes."""
        nodes = sorted((self.primary, self.standby), key=lambda node: node.port)
        user = psycopg2.extensions.parse_dsn(self.primary.dsn())
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        return f"postgresql://{user['user']}:{user['password']}@{hosts}/bank?target_session_attrs={attributes}"

    def promote(self) -> None:
        """The primary is gone at once, with what the standby has not received; its port gets the next standby."""
        self._judge.promotion_begins()
        self.primary.stop()
        self.standby.sql("SELECT pg_promote()", "postgres")
        self.primary, self.standby = self.standby, self.primary
        survived = self.primary.sql("SELECT beat FROM plain WHERE id = 0")[0][0]
        self._judge.promotion_ended(survived)
        self.add_standby()

    def stop(self) -> None:
        self.primary.stop()
        self.standby.stop()
