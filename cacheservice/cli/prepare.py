"""`cacheservice migrate`, `watch` and `unwatch`: what the service needs in the database."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from cacheservice import config, shipped
from cacheservice.postgres import target
from cacheservice.postgres.migrate import migrate as apply_migrations
from cacheservice.postgres.reader import create_reader
from cacheservice.postgres.target import parse
from cacheservice.postgres.watch import unwatch as take_triggers
from cacheservice.postgres.watch import watch as put_triggers

_owner_dsn = click.option(
    "--dsn",
    envvar="CACHESERVICE_MIGRATE_DSN",
    show_envvar=True,
    help="Where, as the tables' owner, who may create a schema. Without it, postgres.dsn of the configuration.",
)


@click.command()
@_owner_dsn
@click.option(
    "--owner",
    metavar="ROLE",
    help="The role that owns what is made, if it is not the session's: that of the tables, so that it can run `watch`.",
)
@click.option("--reader", metavar="NAME", help="Also make this role: it may log in and read what it is granted.")
@click.option(
    "--select", "tables", metavar="TABLE", multiple=True, help="A table that the reader may read; repeatable."
)
def migrate(dsn: str | None, owner: str | None, reader: str | None, tables: tuple[str, ...]) -> None:
    """Bring what the service needs into the database: the schema `cacheservice`; with --reader, a role for the service.

    Each migration is one transaction: a run that is interrupted leaves nothing behind, and the next one goes on.

    The reader's password is taken from CACHESERVICE_READER_PASSWORD, or the file that CACHESERVICE_READER_PASSWORD_FILE
    names; without either, set one with psql's \\password.

    \b
    Examples (a DSN without a password in it may also stand behind --dsn):
      CACHESERVICE_MIGRATE_DSN=postgresql://owner@db/shop cacheservice migrate
      cacheservice migrate --reader cache_reader --select public.products --select public.prices
      CACHESERVICE_MIGRATE_DSN=postgresql://dba@db/shop cacheservice migrate --owner shop_owner
    """
    if tables and not reader:
        raise click.UsageError("--select goes with --reader")
    dsn = _checked(dsn)
    names = apply_migrations(dsn, shipped.folder("migrations"), owner)
    click.echo("\n".join(f"applied {name}" for name in names) or "nothing to apply: the schema is up to date")
    if reader:
        grant = create_reader(dsn, reader, tables, _reader_password())
        click.echo(f"the role {reader} may log in and read {', '.join(tables) or 'nothing yet: grant it SELECT'}")
        if grant is not None:
            click.echo(f"to read from a standby it has to see how far that is behind; as a superuser: {grant}")


@click.command()
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, required=True, help="The column that names a row; repeatable.")
@click.option("--notify/--no-notify", default=True, show_default=True, help="Whether each commit is told at once.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and do nothing.")
@_owner_dsn
def watch(table: str, key: tuple[str, ...], notify: bool, dry_run: bool, dsn: str | None) -> None:
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
    names = put_triggers(_checked(dsn), table, key, notify, dry_run, click.echo)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded by {', '.join(key)}")


@click.command()
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, help="Of which watch of the table; without it, of every one.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and do nothing.")
@_owner_dsn
def unwatch(table: str, key: tuple[str, ...], dry_run: bool, dsn: str | None) -> None:
    """Take the triggers of `watch` off TABLE again, with what they recorded.

    \b
    Example:
      cacheservice unwatch public.products
    """
    names = take_triggers(_checked(dsn), table, key, dry_run, click.echo)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded no more")


def _checked(dsn: str | None) -> str:
    """The connection string to use, without a password in sight."""
    if dsn is None:
        dsn = config.load(os.environ, target.problem).postgres.dsn.get_secret_value()
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
    except (OSError, ValueError) as error:
        # Not its path: somebody may have put the password itself there.
        why = config.why_unreadable(error)
        raise click.UsageError(
            f"CACHESERVICE_READER_PASSWORD_FILE: the file that it names cannot be read: {why}"
        ) from None
