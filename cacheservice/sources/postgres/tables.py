"""Looks up the tables that `cacheservice watch` and `unwatch` name.

Also has the transaction in which both commands change the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from psycopg2 import sql

from cacheservice.base.errors import WatchFailed
from cacheservice.base.interfaces import BlockingCursor
from cacheservice.sources.postgres import admin
from cacheservice.sources.postgres.admin import LOCK_TIMEOUT_MS, Refused, Session

TABLE_KINDS = "rp"
"""Ordinary and partitioned tables: the kinds whose changed rows can be captured."""
TEMPORARY = "t"
"""Stands for the kind of any temporary relation."""
_BEGIN = f"BEGIN;\nSET LOCAL lock_timeout = {LOCK_TIMEOUT_MS};"


class NotWatched(WatchFailed):
    """There is nothing to undo for this table."""


class Member(NamedTuple):
    """A table, or a partition or child below it.

    :param name: quoted for SQL, with the schema.
    :param kind: as in pg_class.relkind.
    :param persistence: as in pg_class.relpersistence: "p" permanent, "u" unlogged, "t" temporary.
    :param identity: as in pg_class.relreplident: "d" default, "i" an index, "f" full, "n" nothing.
    """

    oid: int
    name: str
    kind: str
    persistence: str
    identity: str
    is_partition: bool


FAMILY = """
WITH RECURSIVE family AS (
    SELECT %s::oid AS oid
    UNION
    SELECT i.inhrelid FROM pg_inherits AS i JOIN family AS f ON i.inhparent = f.oid
)
"""


@contextmanager
def transaction(dsn: str, dsn_source: str, *, restore: bool) -> Iterator[Session]:
    """Open a session in a transaction that is committed at the end.

    The driver's errors become ours.

    :param restore: grant the owners of our tables any right on them that was revoked.
    """
    try:
        with admin.session(dsn, "cacheservice watch", dsn_source) as session, session.transaction():
            session.cursor.execute("SET LOCAL search_path = pg_catalog, public, pg_temp")
            if restore:
                admin.restore_rights(session)
            yield session
    except Refused as refused:
        raise WatchFailed(str(refused)) from refused


def run(cursor: BlockingCursor, statements: Sequence[str], dry_run: bool, show: Callable[[str], None]) -> None:
    """Execute the statements; with `dry_run`, show them instead."""
    if dry_run:
        # One transaction, as in a real run: since_xid is the transaction that creates the triggers.
        show("\n".join([_BEGIN, *statements, "COMMIT;"]))
        return
    for statement in statements:
        cursor.execute(statement)


def named(cursor: BlockingCursor, table: str) -> tuple[int, str, str]:
    """Return the OID, the full name and the kind of a relation ("t": temporary)."""
    # The server splits and folds the name by its own rules.
    cursor.execute(
        "SELECT c.oid, n.nspname, c.relname, CASE c.relpersistence WHEN 't' THEN 't' ELSE c.relkind END::text "
        "FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = %s::regclass",
        (table,),
    )
    oid, schema, relation, kind = cursor.fetchone()
    return oid, sql.Identifier(schema, relation).as_string(cursor), kind


def columns(cursor: BlockingCursor, oid: int) -> dict[str, str]:
    """Return the columns of a relation by name, with pg_attribute.attgenerated of each."""
    cursor.execute(
        "SELECT attname, attgenerated::text FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped",
        (oid,),
    )
    return dict(cursor.fetchall())


def require_column(name: str, known: Mapping[str, str], column: str) -> None:
    """Check that a relation has a column.

    :raises WatchFailed: if it does not, with the columns that it has.
    """
    if column not in known:
        repeat = ", and --key is repeated for each column" if "," in column else ""
        raise WatchFailed(f"{name} has no column {column}; it has {', '.join(known)}{repeat}")


def family(cursor: BlockingCursor, oid: int) -> list[Member]:
    """Return a table and its descendants, the table first."""
    cursor.execute(
        f"""{FAMILY}
        SELECT c.oid, n.nspname, c.relname, c.relkind::text, c.relpersistence::text, c.relreplident::text,
               c.relispartition
        FROM family AS f JOIN pg_class AS c ON c.oid = f.oid
        JOIN pg_namespace AS n ON n.oid = c.relnamespace ORDER BY c.oid <> %s, c.oid
        """,  # noqa: S608  # constants
        (oid, oid),
    )
    return [
        Member(member, sql.Identifier(schema, name).as_string(cursor), *rest)
        for member, schema, name, *rest in cursor.fetchall()
    ]
