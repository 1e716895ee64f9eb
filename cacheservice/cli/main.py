"""The command line."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from twisted.scripts import twistd

from cacheservice import __version__, app, shipped
from cacheservice.cli.demo import Demo
from cacheservice.errors import CacheServiceError, ConfigError
from cacheservice.postgres.migrate import create_reader, migrate
from cacheservice.postgres.target import parse
from cacheservice.postgres.watch import unwatch, watch

_ANSWER_TIMEOUT_S = 10.0


def _plainly(command: Callable[..., None]) -> Callable[..., None]:
    """Our errors as one line and exit code 1, not as a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ConfigError as error:
            click.echo(str(error), err=True)
            sys.exit(1)
        except CacheServiceError as error:
            click.echo(f"cacheservice: {error}", err=True)
            sys.exit(1)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cacheservice")
def main() -> None:
    """Keeps the results of declared PostgreSQL queries hot in memory, with the age of every answer known.

    The configuration is cacheservice.toml in the working directory, or the file that CACHESERVICE_CONFIG names.
    Start with: cacheservice demo
    """


@main.command()
def run() -> None:
    """Run the service: what `twistd -noy tac/cacheservice.tac --pidfile=` runs."""
    options = twistd.ServerOptions()  # type: ignore[attr-defined]  # chosen by platform, and so not declared
    options.parseOptions(["-noy", str(shipped.folder("tac") / "cacheservice.tac"), "--pidfile="])
    twistd.runApp(options)


@main.command()
@_plainly
def check() -> None:
    """Validate the configuration; every problem on a line of its own, exit code 1 if there is one."""
    settings = app.load_settings(os.environ)
    count = len(settings.datasets)
    click.echo(f"the configuration is valid: {count} dataset{'s' if count != 1 else ''}")


_owner_dsn = click.option(
    "--dsn",
    envvar="CACHESERVICE_MIGRATE_DSN",
    show_envvar=True,
    help="Where, as the tables' owner, who may create a schema. Without it, postgres.dsn of the configuration.",
)


@main.command("migrate")
@_owner_dsn
@click.option("--reader", metavar="NAME", help="Also make this role: it may log in and read what it is granted.")
@click.option(
    "--select", "tables", metavar="TABLE", multiple=True, help="A table that the reader may read; repeatable."
)
@_plainly
def migrate_command(dsn: str | None, reader: str | None, tables: tuple[str, ...]) -> None:
    """Bring what the service needs into the database: the schema `cacheservice`; with --reader, a role for the service.

    The reader's password is taken from CACHESERVICE_READER_PASSWORD, or the file that CACHESERVICE_READER_PASSWORD_FILE
    names; without either, set one with psql's \\password.
    """
    if tables and not reader:
        raise click.UsageError("--select goes with --reader")
    dsn = _checked(dsn)
    names = migrate(dsn, shipped.folder("migrations"))
    click.echo("\n".join(f"applied {name}" for name in names) or "nothing to apply: the schema is up to date")
    if reader:
        create_reader(dsn, reader, tables, _reader_password())
        click.echo(f"the role {reader} may log in and read {', '.join(tables) or 'nothing yet: grant it SELECT'}")


@main.command("watch")
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, required=True, help="The column that names a row; repeatable.")
@click.option("--notify/--no-notify", default=True, show_default=True, help="Whether each commit is told at once.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and do nothing.")
@_owner_dsn
@_plainly
def watch_command(table: str, key: tuple[str, ...], notify: bool, dry_run: bool, dsn: str | None) -> None:
    """Put triggers on TABLE that record the keys of changed rows, so that a refresh reads those alone.

    Then say so in the configuration: watch = [{table = "TABLE", key = "COLUMN"}]. A NOTIFY takes a lock that serialises
    the commits of the whole database, and PostgreSQL prepares no transaction (PREPARE TRANSACTION) that has sent one;
    with --no-notify writers are spared both, and changes are seen each interval_s.

    Say it as the table's owner: the triggers run with the rights of whoever made them. Say it again after partitions
    were attached or detached, or triggers disabled and enabled. It waits 5 s for writers that are at work, no longer.
    """
    names = watch(_checked(dsn), table, key, notify, dry_run, click.echo)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded by {', '.join(key)}")


@main.command("unwatch")
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, help="Of which watch of the table; without it, of every one.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and do nothing.")
@_owner_dsn
@_plainly
def unwatch_command(table: str, key: tuple[str, ...], dry_run: bool, dsn: str | None) -> None:
    """Take the triggers of `watch` off TABLE again, with what they recorded."""
    names = unwatch(_checked(dsn), table, key, dry_run, click.echo)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded no more")


def _checked(dsn: str | None) -> str:
    """The connection string to use, without a password in sight."""
    if dsn is None:
        dsn = app.load_settings(os.environ).postgres.dsn.get_secret_value()
    _refuse_password_in_arguments()
    try:
        parse(dsn)
    except ValueError as error:
        raise click.UsageError(f"--dsn: {error}") from None
    return dsn


def _refuse_password_in_arguments() -> None:
    for argument in sys.argv[1:]:
        try:
            target = parse(argument.removeprefix("--dsn="))
        except ValueError:
            continue
        if target.has_password:
            raise click.UsageError(
                "a password in the arguments shows in the process list; put the DSN into CACHESERVICE_MIGRATE_DSN"
            )


def _reader_password() -> str | None:
    path = os.environ.get("CACHESERVICE_READER_PASSWORD_FILE")
    if path is None:
        return os.environ.get("CACHESERVICE_READER_PASSWORD")
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise click.UsageError(f"CACHESERVICE_READER_PASSWORD_FILE: cannot be read: {error.strerror}") from None


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the status port listens.")
@click.option("--port", default=8000, show_default=True, help="The status port.")
@click.argument("question", nargs=-1)
@_plainly
def status(host: str, port: int, question: tuple[str, ...]) -> None:
    """Ask a running service; without a QUESTION, for its status table. `help` lists the questions."""
    text = " ".join(question) or "status"
    try:
        with socket.create_connection((host, port), timeout=_ANSWER_TIMEOUT_S) as connection:
            connection.sendall(f"{text}\n".encode())
            connection.shutdown(socket.SHUT_WR)
            reply = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise CacheServiceError(f"no answer from {host}:{port}: {reason.lower()}; is the service running?") from error
    answer = reply.decode("utf-8", "replace").rstrip("\n")
    click.echo(answer)
    if answer.startswith("ERROR"):
        sys.exit(1)


@main.command()
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep everything here for the next start. Without it, in a new folder that is removed at the end.",
)
@_plainly
def demo(directory: Path | None) -> None:
    """Start an embedded PostgreSQL with a small shop in it that never rests, and the service in front of it.

    Ctrl-C ends all of it.
    """
    with Demo(directory) as running:
        running.wait()
