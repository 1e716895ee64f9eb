"""`cacheservice migrate`, `watch` and `unwatch`: prepare the database."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from cacheservice import config
from cacheservice.base import shipped
from cacheservice.base.errors import ConfigError
from cacheservice.sources.postgres import target
from cacheservice.sources.postgres.migrate import migrate as apply_migrations
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.watch import unwatch as take_triggers
from cacheservice.sources.postgres.watch import watch as put_triggers

_VARIABLE = "CACHESERVICE_MIGRATE_DSN"
_PASSWORD = "CACHESERVICE_READER_PASSWORD"  # noqa: S105  # the name of a variable

_owner_dsn = click.option(
    "--dsn",
    envvar=_VARIABLE,
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
    for table in tables:
        if "," in re.sub(r'"(?:[^"]|"")*"', "", table):
            raise click.UsageError(f"--select {table}: a name has no comma; repeat --select for each table")
    dsn, source = _checked(dsn)
    password = _reader_password() if reader else None
    names = apply_migrations(dsn, shipped.folder("migrations"), owner, source)
    click.echo("\n".join(f"applied {name}" for name in names) or "nothing to apply: the schema is up to date")
    if reader:
        made = create_reader(dsn, reader, tables, password, source)
        click.echo(f"the role {reader} may log in and read {', '.join(tables) or 'nothing yet: grant it SELECT'}")
        if made.has_password is False:
            click.echo(
                "it has no password yet, and cannot log in where the server wants one; set it with "
                f"\\password {made.name} in psql, or run this again with {_PASSWORD} or {_PASSWORD}_FILE"
            )
        if made.grant is not None:
            click.echo(f"to read from a standby it has to see how far that is behind; as a superuser: {made.grant}")


@click.command()
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, required=True, help="The column that names a row; repeatable.")
@click.option("--notify/--no-notify", default=True, show_default=True, help="Whether each commit is told at once.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and do nothing.")
@_owner_dsn
def watch(table: str, key: tuple[str, ...], notify: bool, dry_run: bool, dsn: str | None) -> None:
    """Put triggers on TABLE that record the keys of changed rows, so that a refresh reads only these.

    Then add to the dataset: watch = [{table = "TABLE", key = "COLUMN"}]. A NOTIFY takes a lock that serialises the
    commits of the whole database, and PostgreSQL cannot prepare a transaction (PREPARE TRANSACTION) that has sent one.
    With --no-notify writers avoid both, and changes are seen each interval_s.

    Run it as the owner of the table: the triggers run with the privileges of the role that creates them. Run it again
    after partitions were attached or detached, or triggers disabled and enabled. It waits at most 5 s for writers.

    \b
    Examples:
      cacheservice watch public.products --key id --dry-run
      cacheservice watch public.prices --key product_id --key currency --no-notify
    """
    dsn, source = _checked(dsn)
    names = put_triggers(dsn, table, key, notify, dry_run, click.echo, source)
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
    dsn, source = _checked(dsn)
    names = take_triggers(dsn, table, key, dry_run, click.echo, source)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded no more")


def _checked(dsn: str | None) -> tuple[str, str]:
    """Return the connection string to use and the name of its source.

    Connection strings with a password in the arguments are refused.
    """
    if dsn is None:
        try:
            dsn = config.load(os.environ, target.problem).postgres.dsn.get_secret_value()
        except ConfigError as error:
            hint = f"{_VARIABLE}: not set, so that the configuration was read for postgres.dsn; set it, or correct that"
            raise ConfigError([*error.problems, hint]) from error
        source = config.dsn_source(os.environ)
    else:
        from_option = click.get_current_context().get_parameter_source("dsn") == ParameterSource.COMMANDLINE
        source = "--dsn" if from_option else _VARIABLE
    _refuse_password_in_arguments()
    try:
        parse(dsn)
    except ValueError as error:
        raise click.UsageError(f"{source}: {error}") from None
    return dsn, source


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
    variable = _PASSWORD
    password = os.environ.get(variable)
    if (path := os.environ.get(f"{variable}_FILE")) is not None:
        variable += "_FILE"
        try:
            password = Path(path).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, ValueError) as error:
            # Without the path: the variable may contain the password itself by mistake.
            why = config.why_unreadable(error)
            raise click.UsageError(f"{variable}: the file that it names cannot be read: {why}") from None
    if password == "":
        raise click.UsageError(f"{variable}: the password is empty; set one, or unset the variable")
    return password
