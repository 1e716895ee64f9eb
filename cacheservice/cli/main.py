"""The command line: `cacheservice COMMAND`. The longer commands have modules of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from twisted.scripts import twistd

from cacheservice import __version__, app, shipped
from cacheservice.cli.check import check
from cacheservice.cli.completion import completion
from cacheservice.cli.demo import Demo
from cacheservice.cli.program import Program
from cacheservice.cli.status import status, why
from cacheservice.cli.tail import tail
from cacheservice.postgres.migrate import create_reader, migrate
from cacheservice.postgres.target import parse
from cacheservice.postgres.watch import unwatch, watch

_SECTIONS = {
    "Try it": ["demo"],
    "Prepare": ["check", "migrate", "watch", "unwatch"],
    "Run": ["run"],
    "Look": ["status", "why", "tail"],
    "Shell": ["completion"],
}


@click.group(
    cls=Program,
    sections=_SECTIONS,
    commands=[check, status, why, tail, completion],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="cacheservice")
def main() -> None:
    """Keeps the results of declared PostgreSQL queries hot in memory, with the age of every answer known.

    The configuration is cacheservice.toml in the working directory, or the file that CACHESERVICE_CONFIG names.

    \b
    To begin:
      cacheservice demo                  everything at once, on a sample database
      cacheservice check --db            are the configuration and the database ready?
      cacheservice run                   the service
      cacheservice status                how is it?      (--watch: live)
      cacheservice why products          why is this one old?
      cacheservice COMMAND --help        more of each, with examples
    """


@main.command(short_help="Run the service, in the foreground.")
def run() -> None:
    """Run the service in the foreground: what `twistd -noy tac/cacheservice.tac --pidfile=` runs.

    SIGTERM and Ctrl-C stop it within 5 s, SIGHUP makes it read the configuration again. It logs to standard output.

    \b
    Examples:
      cacheservice run
      CACHESERVICE_CONFIG=/etc/cacheservice.toml CACHESERVICE_POSTGRES__DSN_FILE=/run/secrets/dsn cacheservice run
    """
    options = twistd.ServerOptions()  # type: ignore[attr-defined]  # chosen by platform, and so not declared
    options.parseOptions(["-noy", str(shipped.folder("tac") / "cacheservice.tac"), "--pidfile="])
    twistd.runApp(options)


_owner_dsn = click.option(
    "--dsn",
    envvar="CACHESERVICE_MIGRATE_DSN",
    show_envvar=True,
    help="Where, as the tables' owner, who may create a schema. Without it, postgres.dsn of the configuration.",
)


@main.command("migrate", short_help="Bring the service's schema into the database; make a reader.")
@_owner_dsn
@click.option("--reader", metavar="NAME", help="Also make this role: it may log in and read what it is granted.")
@click.option(
    "--select", "tables", metavar="TABLE", multiple=True, help="A table that the reader may read; repeatable."
)
def migrate_command(dsn: str | None, reader: str | None, tables: tuple[str, ...]) -> None:
    """Bring what the service needs into the database: the schema `cacheservice`; with --reader, a role for the service.

    The reader's password is taken from CACHESERVICE_READER_PASSWORD, or the file that CACHESERVICE_READER_PASSWORD_FILE
    names; without either, set one with psql's \\password.

    \b
    Examples (a DSN without a password in it may also stand behind --dsn):
      CACHESERVICE_MIGRATE_DSN=postgresql://owner@db/shop cacheservice migrate
      cacheservice migrate --reader cache_reader --select public.products --select public.prices
    """
    if tables and not reader:
        raise click.UsageError("--select goes with --reader")
    dsn = _checked(dsn)
    names = migrate(dsn, shipped.folder("migrations"))
    click.echo("\n".join(f"applied {name}" for name in names) or "nothing to apply: the schema is up to date")
    if reader:
        create_reader(dsn, reader, tables, _reader_password())
        click.echo(f"the role {reader} may log in and read {', '.join(tables) or 'nothing yet: grant it SELECT'}")


@main.command("watch", short_help="Record the keys of a table's changed rows, for deltas.")
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, required=True, help="The column that names a row; repeatable.")
@click.option("--notify/--no-notify", default=True, show_default=True, help="Whether each commit is told at once.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and do nothing.")
@_owner_dsn
def watch_command(table: str, key: tuple[str, ...], notify: bool, dry_run: bool, dsn: str | None) -> None:
    """Put triggers on TABLE that record the keys of changed rows, so that a refresh reads those alone.

    Then say so in the configuration: watch = [{table = "TABLE", key = "COLUMN"}]. A NOTIFY takes a lock that serialises
    the commits of the whole database, and PostgreSQL prepares no transaction (PREPARE TRANSACTION) that has sent one;
    with --no-notify writers are spared both, and changes are seen each interval_s.

    Say it as the table's owner: the triggers run with the rights of whoever made them. Say it again after partitions
    were attached or detached, or triggers disabled and enabled. It waits 5 s for writers that are at work, no longer.

    \b
    Examples:
      cacheservice watch public.products --key id --dry-run
      cacheservice watch public.prices --key product_id --key currency --no-notify
    """
    names = watch(_checked(dsn), table, key, notify, dry_run, click.echo)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded by {', '.join(key)}")


@main.command("unwatch", short_help="Undo watch.")
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, help="Of which watch of the table; without it, of every one.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and do nothing.")
@_owner_dsn
def unwatch_command(table: str, key: tuple[str, ...], dry_run: bool, dsn: str | None) -> None:
    """Take the triggers of `watch` off TABLE again, with what they recorded.

    \b
    Example:
      cacheservice unwatch public.products
    """
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


@main.command(short_help="A sample database and the service in front of it, in one go.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep everything here for the next start. Without it, in a new folder that is removed at the end.",
)
def demo(directory: Path | None) -> None:
    """Start an embedded PostgreSQL with a small shop in it that never rests, and the service in front of it.

    Ctrl-C ends all of it.

    \b
    Examples:
      cacheservice demo
      cacheservice demo --directory ./shop      and again, with the data of before
    """
    with Demo(directory) as running:
        running.wait()
