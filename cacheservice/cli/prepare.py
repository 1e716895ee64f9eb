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
from cacheservice.sources.postgres.watch import unwatch as remove_triggers
from cacheservice.sources.postgres.watch import watch as create_triggers

_VARIABLE = "CACHESERVICE_MIGRATE_DSN"
_PASSWORD = "CACHESERVICE_READER_PASSWORD"  # noqa: S105  # the name of a variable

_owner_dsn = click.option(
    "--dsn",
    envvar=_VARIABLE,
    show_envvar=True,
    help="The database, as the owner of the tables, who may create a schema.  [default: postgres.dsn of the "
    "configuration]",
)


@click.command()
@_owner_dsn
@click.option(
    "--owner",
    metavar="ROLE",
    help="The role that is to own the schema: the owner of the tables, so that it can run `watch`.  [default: the role "
    "of the session]",
)
@click.option("--reader", metavar="NAME", help="Also create this role for the service, with the right to log in.")
@click.option(
    "--select", "tables", metavar="TABLE", multiple=True, help="Grant the reader SELECT on this table; repeatable."
)
def migrate(dsn: str | None, owner: str | None, reader: str | None, tables: tuple[str, ...]) -> None:
    """Create or update the schema `cacheservice` in the database; with --reader, also create a role for the service.

    Each migration is one transaction: an interrupted run leaves nothing behind, and the next run continues.

    The reader's password comes from CACHESERVICE_READER_PASSWORD, or from the file that
    CACHESERVICE_READER_PASSWORD_FILE names. Without either, set one with psql's \\password.

    \b
    Examples (a DSN without a password may also be the value of --dsn):
      CACHESERVICE_MIGRATE_DSN=postgresql://owner@db/shop cacheservice migrate
      cacheservice migrate --reader cache_reader --select public.products --select public.prices
      CACHESERVICE_MIGRATE_DSN=postgresql://dba@db/shop cacheservice migrate --owner shop_owner
    """
    if tables and not reader:
        raise click.UsageError("--select requires --reader")
    for table in tables:
        if "," in re.sub(r'"(?:[^"]|"")*"', "", table):
            raise click.UsageError(f"--select {table}: a name does not contain a comma; repeat --select for each table")
    dsn, source = _checked(dsn)
    password = _reader_password() if reader else None
    names = apply_migrations(dsn, shipped.folder("migrations"), owner, source)
    click.echo("\n".join(f"applied {name}" for name in names) or "nothing to apply: the schema is up to date")
    if reader:
        made = create_reader(dsn, reader, tables, password, source)
        click.echo(f"the role {reader} may log in and read {', '.join(tables) or 'nothing yet: grant it SELECT'}")
        if made.has_password is False:
            click.echo(
                "it has no password yet, and cannot log in if the server requires one; set one with "
                f"\\password {made.name} in psql, or run this command again with {_PASSWORD} or {_PASSWORD}_FILE"
            )
        if made.grant is not None:
            click.echo(f"to read from a standby, it must see how far that is behind; as a superuser, run: {made.grant}")


@click.command()
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, required=True, help="A column of the key; repeatable.")
@click.option("--notify/--no-notify", default=True, show_default=True, help="Notify the service of each commit.")
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and change nothing.")
@_owner_dsn
def watch(table: str, key: tuple[str, ...], notify: bool, dry_run: bool, dsn: str | None) -> None:
    """Create triggers on TABLE that record the keys of changed rows, so that a refresh reads only these rows.

    Then add to the dataset: watch = [{table = "TABLE", key = "COLUMN"}]. A NOTIFY takes a lock that serialises the
    commits of the whole database, and PostgreSQL cannot prepare a transaction (PREPARE TRANSACTION) that has sent one.
    With --no-notify, writers avoid both, and changes are seen at the next interval.

    Run the command as the owner of the table: the triggers run with the privileges of the role that creates them. Run
    it again after partitions were attached or detached, or triggers disabled and enabled. It waits at most 5 s for
    writers.

    \b
    Examples:
      cacheservice watch public.products --key id --dry-run
      cacheservice watch public.prices --key product_id --key currency --no-notify
    """
    dsn, source = _checked(dsn)
    names = create_triggers(dsn, table, key, notify, dry_run, click.echo, source)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded by {', '.join(key)}")


@click.command()
@click.argument("table")
@click.option(
    "--key",
    metavar="COLUMN",
    multiple=True,
    help="A column of the key of the watch to remove; repeatable. Without it, all watches of the table are removed.",
)
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and change nothing.")
@_owner_dsn
def unwatch(table: str, key: tuple[str, ...], dry_run: bool, dsn: str | None) -> None:
    """Remove the triggers of `watch` from TABLE, and the changes that they recorded.

    \b
    Example:
      cacheservice unwatch public.products
    """
    dsn, source = _checked(dsn)
    names = remove_triggers(dsn, table, key, dry_run, click.echo, source)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are no longer recorded")


def _checked(dsn: str | None) -> tuple[str, str]:
    """Return the connection string to use and the name of its source.

    Connection strings with a password in the arguments are refused.
    """
    if dsn is None:
        try:
            dsn = config.load(os.environ, target.problem).postgres.dsn.get_secret_value()
        except ConfigError as error:
            hint = (
                f"{_VARIABLE}: not set, so the configuration was read for postgres.dsn; set the variable, or fix the "
                "configuration"
            )
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
                "a password in the arguments is visible in the process list; set CACHESERVICE_MIGRATE_DSN instead"
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
