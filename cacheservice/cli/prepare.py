"""`cacheservice migrate`, `watch` and `unwatch`: prepare the database."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from cacheservice import config
from cacheservice.base import shipped
from cacheservice.base.errors import ConfigError
from cacheservice.config import DEFAULT_PUBLICATION
from cacheservice.sources.postgres import target
from cacheservice.sources.postgres.migrate import migrate as apply_migrations
from cacheservice.sources.postgres.publishing import Removal, publish, unpublish
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.unwatching import unwatch as undo_all
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
_publication = click.option(
    "--publication",
    metavar="NAME",
    help="The publication that the service reads.  [default: postgres.publication of the configuration, if it can be "
    f"read; otherwise {DEFAULT_PUBLICATION}]",
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
@click.option(
    "--replication/--no-replication",
    default=None,
    help="Grant the reader the right that logical decoding needs, or take it away: REPLICATION, or membership in "
    "rds_replication on Amazon RDS. It opens the log of all databases of the server.  [default: unchanged; a new role "
    "does not have it]",
)
def migrate(
    dsn: str | None, owner: str | None, reader: str | None, tables: tuple[str, ...], replication: bool | None
) -> None:
    """Create or update the schema `cacheservice` in the database; with --reader, also create a role for the service.

    Each migration is one transaction: an interrupted run leaves nothing behind, and the next run continues.

    The reader's password comes from CACHESERVICE_READER_PASSWORD, or from the file that
    CACHESERVICE_READER_PASSWORD_FILE names. Without either, set one with psql's \\password.

    \b
    Examples (a DSN without a password may also be the value of --dsn):
      CACHESERVICE_MIGRATE_DSN=postgresql://owner@db/shop cacheservice migrate
      cacheservice migrate --reader cache_reader --select public.products --select public.prices
      CACHESERVICE_MIGRATE_DSN=postgresql://dba@db/shop cacheservice migrate --owner shop_owner
      CACHESERVICE_MIGRATE_DSN=postgresql://dba@db/shop cacheservice migrate --reader cache_reader --replication
    """
    if tables and not reader:
        raise click.UsageError("--select requires --reader")
    if replication is not None and not reader:
        raise click.UsageError(f"--{'' if replication else 'no-'}replication requires --reader")
    for table in tables:
        if "," in re.sub(r'"(?:[^"]|"")*"', "", table):
            raise click.UsageError(f"--select {table}: a name does not contain a comma; repeat --select for each table")
    dsn, source = _checked(dsn)
    password = _reader_password() if reader else None
    names = apply_migrations(dsn, shipped.folder("migrations"), owner, source)
    click.echo("\n".join(f"applied {name}" for name in names) or "nothing to apply: the schema is up to date")
    if reader:
        made = create_reader(dsn, reader, tables, password, source, replication=replication)
        click.echo(f"the role {reader} may log in and read {', '.join(tables) or 'nothing yet: grant it SELECT'}")
        if made.has_password is False:
            click.echo(
                "it has no password yet, and cannot log in if the server requires one; set one with "
                f"\\password {made.name} in psql, or run this command again with {_PASSWORD} or {_PASSWORD}_FILE"
            )
        if made.grant is not None:
            click.echo(f"to read from a standby, it must see how far that is behind; as a superuser, run: {made.grant}")
        if made.replicates and replication:
            click.echo(
                "it may replicate: it can read the write-ahead log of all databases of the server, copy the server "
                "with pg_basebackup where pg_hba.conf lets it, and create slots that keep the log; the service itself "
                "creates only temporary slots"
            )
        elif replication is False:
            click.echo("it may not replicate")


@click.command()
@click.argument("table")
@click.option("--key", metavar="COLUMN", multiple=True, required=True, help="A column of the key; repeatable.")
@click.option("--notify/--no-notify", default=True, show_default=True, help="Notify the service of each commit.")
@click.option("--logical", is_flag=True, help="Add TABLE to a publication instead, for logical decoding.")
@_publication
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and change nothing.")
@_owner_dsn
def watch(
    table: str,
    key: tuple[str, ...],
    notify: bool,
    logical: bool,
    publication: str | None,
    dry_run: bool,
    dsn: str | None,
) -> None:
    """Create triggers on TABLE that record the keys of changed rows, so that a refresh reads only these rows.

    Then add to the dataset: watch = [{table = "TABLE", key = "COLUMN"}]. A NOTIFY takes a lock that serialises the
    commits of the whole database, and PostgreSQL cannot prepare a transaction (PREPARE TRANSACTION) that has sent one.
    With --no-notify, writers avoid both, and changes are seen at the next interval.

    With --logical the command creates no triggers. It adds the table to the publication through which the service reads
    changed keys from the write-ahead log, and creates the publication if it is missing. Before that it checks that the
    log holds the key of each deleted row. It does not need `cacheservice migrate`.

    Run the command as the owner of the table: the triggers run with the privileges of the role that creates them. Run
    it again after partitions were attached or detached, or triggers disabled and enabled. It waits at most 5 s for
    writers.

    \b
    Examples:
      cacheservice watch public.products --key id --dry-run
      cacheservice watch public.prices --key product_id --key currency --no-notify
      cacheservice watch --logical public.products --key id
    """
    if logical and _is_given("notify"):
        raise click.UsageError("--notify and --no-notify belong to triggers, and --logical creates none")
    if not logical and _is_given("publication"):
        raise click.UsageError("--publication requires --logical")
    dsn, source = _checked(dsn)
    if logical:
        _publish(dsn, table, key, _publication_of(publication), dry_run, source)
        return
    names = create_triggers(dsn, table, key, notify, dry_run, click.echo, source)
    if not dry_run:
        click.echo(f"changes of {', '.join(names)} are recorded by {', '.join(key)}")


def _publish(dsn: str, table: str, key: tuple[str, ...], publication: str, dry_run: bool, source: str) -> None:
    found = publish(dsn, table, key, publication, dry_run, click.echo, source)
    if not found.added:
        click.echo(f"{found.table} is already published by {found.publication}", err=dry_run)
    elif not dry_run:
        click.echo(f"changes of {', '.join(found.added)} are published by {found.publication}, with {', '.join(key)}")
    # The notes of a dry run go to standard error: its output is SQL.
    if found.identity_is_explicit:
        click.echo(
            "partitions do not inherit its REPLICA IDENTITY: set it for each new partition, and run this command again",
            err=dry_run,
        )
    if found.wal_level != "logical":
        click.echo(
            f'wal_level is "{found.wal_level}", so that no change is captured by logical decoding yet; as a superuser, '
            "run: ALTER SYSTEM SET wal_level = logical; and restart the server (on a managed service, set its "
            "parameter, such as rds.logical_replication = 1)",
            err=dry_run,
        )


@click.command()
@click.argument("table")
@click.option(
    "--key",
    metavar="COLUMN",
    multiple=True,
    help="A column of the key of the triggers to remove; repeatable. Without it, all triggers are removed.",
)
@click.option("--logical", is_flag=True, help="Only remove TABLE from the publication.")
@_publication
@click.option("--dry-run", is_flag=True, help="Print the SQL, one transaction, and change nothing.")
@_owner_dsn
def unwatch(
    table: str, key: tuple[str, ...], logical: bool, publication: str | None, dry_run: bool, dsn: str | None
) -> None:
    """Remove the triggers of `watch` from TABLE with the changes that they recorded, and TABLE from the publication.

    With --key only the triggers by that key are removed, and with --logical none. The publication `cacheservice` is
    dropped with its last table.

    \b
    Examples:
      cacheservice unwatch public.products
      cacheservice unwatch --logical public.products
    """
    if key and logical:
        raise click.UsageError("--key selects triggers, and --logical removes none")
    if key and _is_given("publication"):
        raise click.UsageError("--key selects triggers, and with it the publication is not changed")
    dsn, source = _checked(dsn)
    publication = _publication_of(publication)
    recorded: Sequence[str] = ()
    removal: Removal | None = None
    left = ""
    if key:
        recorded = remove_triggers(dsn, table, key, dry_run, click.echo, source)
    elif logical:
        removal = unpublish(dsn, table, publication, dry_run, click.echo, source)
    else:
        recorded, removal, left = undo_all(dsn, table, publication, dry_run, click.echo, source)
    if recorded and not dry_run:
        click.echo(f"changes of {', '.join(recorded)} are no longer recorded")
    if removal and not dry_run:
        click.echo(f"changes of {', '.join(removal.names)} are no longer published by {removal.publication}")
        if removal.drops:
            click.echo(f"the publication {removal.publication} was empty and is dropped")
    if left:
        click.echo(f"still published: {left}", err=dry_run)


def _publication_of(given: str | None) -> str:
    """Return the name of the publication. With a DSN of its own, a command needs no configuration."""
    if given is not None:
        return given
    try:
        return config.load(os.environ, target.problem).postgres.publication
    except ConfigError:
        return DEFAULT_PUBLICATION


def _is_given(option: str) -> bool:
    """Return whether an option is on the command line."""
    return click.get_current_context().get_parameter_source(option) == ParameterSource.COMMANDLINE


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
        source = "--dsn" if _is_given("dsn") else _VARIABLE
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
