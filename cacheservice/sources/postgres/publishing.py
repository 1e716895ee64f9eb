"""`cacheservice watch --logical` and `unwatch --logical`: the tables of a publication.

The service reads the keys of changed rows from the write-ahead log, which it decodes with `pgoutput` and a publication.
Nothing of this needs the schema `cacheservice`. The functions block, as those of `watch` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from psycopg2 import sql

from cacheservice.base.errors import WatchFailed
from cacheservice.config import DEFAULT_PUBLICATION
from cacheservice.sources.postgres import replica_identity, tables
from cacheservice.sources.postgres.admin import Session
from cacheservice.sources.postgres.tables import TABLE_KINDS, TEMPORARY, Member, NotWatched

_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtextextended('cacheservice.publication', 0))"
_LISTS = 150_000
"""The version from which on publications have row filters, column lists and schemas."""
_FIRST_NORMAL_OID = 16_384
"""Tables with smaller OIDs are PostgreSQL's own."""
_EVENTS = "insert, update, delete, truncate"


class Published(NamedTuple):
    """A table that is in a publication, with the tables below it.

    :param added: the names of the tables that were not in it before.
    :param publication: quoted for SQL.
    :param identity_is_explicit: whether partitions that are added later need a REPLICA IDENTITY of their own.
    """

    table: str
    added: tuple[str, ...]
    publication: str
    wal_level: str
    identity_is_explicit: bool


class Removal(NamedTuple):
    """The statements that remove tables from a publication, and the names of these tables.

    :param publication: quoted for SQL.
    :param drops: whether the publication is dropped, because nothing would be left in it.
    """

    statements: tuple[str, ...]
    names: tuple[str, ...]
    publication: str
    drops: bool


class _Publication(NamedTuple):
    """A publication; its name and its owner are quoted."""

    oid: int
    name: str
    owner: str
    is_ours: bool
    has_all_tables: bool
    has_all_events: bool


class _Entry(NamedTuple):
    """A table that a publication names; its name is quoted.

    :param columns: the published columns; None for all.
    """

    oid: int
    table: str
    is_filtered: bool
    columns: list[str] | None


def publish(
    dsn: str,
    table: str,
    key: Sequence[str],
    publication: str,
    dry_run: bool,
    show: Callable[[str], None],
    dsn_source: str = "postgres.dsn",
) -> Published:
    """Add a table to a publication, which is created if it is missing.

    The tables that inherit from it are added, too; its partitions are published with it.

    :param key: the columns whose values identify a row.
    :param publication: its name, without quotes.
    :param dry_run: only print the SQL.
    :param dsn_source: as for `admin.session`.
    :raises WatchFailed: if the changes would not have the key, or the database refuses, with the next step.
    """
    with tables.transaction(dsn, dsn_source, restore=False) as session:
        session.cursor.execute(_ONE_AT_A_TIME)
        oid, name, kind = tables.named(session.cursor, table)
        members = tables.family(session.cursor, oid)
        _require_kinds(name, kind, members)
        _require_columns(session, name, members, key)
        found = _find(session, publication)
        if found is not None:
            _require_contents(session, found, members, key)
        replica_identity.require_key(session, members, key)
        missing = _missing(session, found, members)
        quoted = sql.Identifier(publication).as_string(session.cursor)
        if missing and found is not None:
            _require_ownership(session, found)
        tables.run(session.cursor, _adding(found, quoted, missing, members), dry_run, show)
        top = members[0]
        return Published(
            name,
            tuple(member.name for member in missing),
            quoted,
            session.value("SELECT current_setting('wal_level')"),
            identity_is_explicit=top.kind == "p" and top.identity != "d",
        )


def unpublish(
    dsn: str,
    table: str,
    publication: str,
    dry_run: bool,
    show: Callable[[str], None],
    dsn_source: str = "postgres.dsn",
) -> Removal:
    """Undo `publish`.

    :raises WatchFailed: if the table is not in the publication or cannot be removed from it, or the database refuses.
    """
    with tables.transaction(dsn, dsn_source, restore=False) as session:
        removal = removal_of(session, table, publication)
        tables.run(session.cursor, removal.statements, dry_run, show)
        return removal


def removal_of(session: Session, table: str, publication: str) -> Removal:
    """Return the statements of `unpublish`.

    :raises NotWatched: if the table is not published.
    :raises WatchFailed: if it is, and cannot be removed by itself.
    """
    session.cursor.execute(_ONE_AT_A_TIME)
    oid, name, _ = tables.named(session.cursor, table)
    found = _find(session, publication)
    if found is None:
        quoted = sql.Identifier(publication).as_string(session.cursor)
        raise NotWatched(f"{name} is not published: the database has no publication {quoted}")
    if found.has_all_tables:
        raise WatchFailed(
            f"{name} cannot be removed from the publication {found.name}, which is FOR ALL TABLES; to end it for all "
            f"of them, run: DROP PUBLICATION {found.name};"
        )
    lineage = _lineage(session, oid)
    if schema := _schema(session, found, lineage):
        raise WatchFailed(
            f"{name} cannot be removed from the publication {found.name}, which has all tables of the schema {schema}; "
            f"to end it for all of them, run: ALTER PUBLICATION {found.name} DROP TABLES IN SCHEMA {schema};"
        )
    entries = _entries(session, found, [member.oid for member in _named_by(tables.family(session.cursor, oid))])
    if not entries:
        if above := _entries(session, found, lineage):
            raise WatchFailed(
                f"{name} is published by {found.name} as a partition of {above[0].table}; unwatch {above[0].table}"
            )
        raise NotWatched(f"{name} is not published by {found.name}")
    _require_ownership(session, found)
    drops = publication == DEFAULT_PUBLICATION and _is_empty_without(session, found, entries)
    names = ", ".join(f"ONLY {entry.table}" for entry in entries)
    statement = f"DROP PUBLICATION {found.name};" if drops else f"ALTER PUBLICATION {found.name} DROP TABLE {names};"
    return Removal((statement,), tuple(entry.table for entry in entries), found.name, drops)


def _require_kinds(name: str, kind: str, members: Sequence[Member]) -> None:
    if kind not in TABLE_KINDS + TEMPORARY:
        raise WatchFailed(f"{name} cannot be published; watch the tables that it reads")
    if members[0].oid < _FIRST_NORMAL_OID:
        raise WatchFailed(f"{name} is a system table, which is never published; remove `watch` from the dataset")
    for member in members:
        below = name if member is members[0] else f"{name} has {member.name} below it, which"
        if member.kind not in TABLE_KINDS:
            raise WatchFailed(
                f"{below} is a foreign table, whose changes are not in the log of this server; remove `watch` from the "
                "dataset"
            )
        if member.persistence == "t":
            raise WatchFailed(f"{below} is a temporary table, whose changes are not logged; watch a permanent table")
        if member.persistence == "u":
            # ALTER TABLE … SET LOGGED has no effect on a partitioned table before PostgreSQL 18.
            step = f"run: ALTER TABLE {member.name} SET LOGGED;"
            if member.kind == "p":
                step = "create it again without UNLOGGED"
            raise WatchFailed(f"{below} is UNLOGGED, so that its changes are not logged; {step}")


def _require_columns(session: Session, name: str, members: Sequence[Member], key: Sequence[str]) -> None:
    known = tables.columns(session.cursor, members[0].oid)
    for column in key:
        tables.require_column(name, known, column)
    generated = session.rows(
        "SELECT attname::text FROM pg_attribute "
        "WHERE attrelid = ANY (%s::oid[]) AND attname = ANY (%s::name[]) AND attgenerated <> '' LIMIT 1",
        ([member.oid for member in members], list(key)),
    )
    for (column,) in generated:
        raise WatchFailed(
            f"{name}: the column {column} is generated, and generated columns are not published; watch another column, "
            "or use triggers: the command without --logical"
        )


def _find(session: Session, name: str) -> _Publication | None:
    found = session.rows(
        "SELECT oid, pubowner::regrole::text, pg_has_role(pubowner, 'USAGE'), puballtables, "
        "pubinsert AND pubupdate AND pubdelete AND pubtruncate FROM pg_publication WHERE pubname = %s::name",
        (name,),
    )
    if not found:
        return None
    oid, *rest = found[0]
    return _Publication(oid, sql.Identifier(name).as_string(session.cursor), *rest)


def _require_ownership(session: Session, publication: _Publication) -> None:
    if not publication.is_ours:
        raise WatchFailed(
            f"the publication {publication.name} belongs to {publication.owner}, and {session.role} may not change it; "
            f"run it as a role that may, or: GRANT {publication.owner} TO {session.role};"
        )


def _require_contents(
    session: Session, publication: _Publication, members: Sequence[Member], key: Sequence[str]
) -> None:
    """Check that an existing publication has all changes of these tables, with the key.

    :raises WatchFailed: with the statement that changes it.
    """
    if not publication.has_all_events:
        raise WatchFailed(
            f"the publication {publication.name} does not publish all changes; as its owner, run: "
            f"ALTER PUBLICATION {publication.name} SET (publish = '{_EVENTS}');"
        )
    oids = dict.fromkeys([*_lineage(session, members[0].oid), *(member.oid for member in members)])
    for entry in _entries(session, publication, list(oids)):
        lacking = [column for column in key if entry.columns is not None and column not in entry.columns]
        if not entry.is_filtered and not lacking:
            continue
        cause = "only with the rows of a WHERE" if entry.is_filtered else f"without the column {', '.join(lacking)}"
        only = f"TABLE ONLY {entry.table};"
        raise WatchFailed(
            f"the publication {publication.name} publishes {entry.table} {cause}; as the owner of both, run: BEGIN; "
            f"ALTER PUBLICATION {publication.name} DROP {only} ALTER PUBLICATION {publication.name} ADD {only} COMMIT;"
        )


def _named_by(members: Sequence[Member]) -> list[Member]:
    """Return the tables that a publication must name: the first one, and those that are not partitions."""
    return [member for member in members if member is members[0] or not member.is_partition]


def _missing(session: Session, publication: _Publication | None, members: Sequence[Member]) -> list[Member]:
    """Return the tables that the publication must name and does not have yet."""
    needed = _named_by(members)
    if publication is None:
        return needed
    if publication.has_all_tables:
        return []
    missing = []
    for member in needed:
        lineage = _lineage(session, member.oid)
        if not _schema(session, publication, lineage) and not _entries(session, publication, lineage):
            missing.append(member)
    return missing


def _adding(
    publication: _Publication | None, name: str, missing: Sequence[Member], members: Sequence[Member]
) -> list[str]:
    if not missing:
        return []
    # Without ONLY, PostgreSQL adds the children, too, and refuses those that are in it already.
    only = "ONLY " if len(_named_by(members)) > 1 else ""
    names = ", ".join(f"{only}{member.name}" for member in missing)
    if publication is not None:
        return [f"ALTER PUBLICATION {name} ADD TABLE {names};"]
    return [f"CREATE PUBLICATION {name} FOR TABLE {names} WITH (publish_via_partition_root = true);"]


def _lineage(session: Session, oid: int) -> list[int]:
    """Return the OIDs of a table and of the partitioned tables above it."""
    found = session.rows("SELECT %s::oid UNION SELECT relid FROM pg_partition_ancestors(%s::oid)", (oid, oid))
    return [each for (each,) in found]


def _schema(session: Session, publication: _Publication, oids: Sequence[int]) -> str:
    """Return the schema of one of these tables that the publication has as a whole, or ""."""
    if not _has_lists(session):
        return ""
    found = session.rows(
        "SELECT n.pnnspid::regnamespace::text FROM pg_publication_namespace AS n "
        "JOIN pg_class AS c ON c.relnamespace = n.pnnspid WHERE n.pnpubid = %s AND c.oid = ANY (%s::oid[]) LIMIT 1",
        (publication.oid, list(oids)),
    )
    return "".join(name for (name,) in found)


def _entries(session: Session, publication: _Publication, oids: Sequence[int]) -> list[_Entry]:
    """Return those of these tables that the publication names, in this order."""
    lists = "false, NULL::text[]"
    if _has_lists(session):
        lists = """r.prqual IS NOT NULL, CASE WHEN r.prattrs IS NOT NULL THEN ARRAY(
            SELECT a.attname::text FROM unnest(r.prattrs::int2[]) AS u (attnum)
            JOIN pg_attribute AS a ON a.attrelid = r.prrelid AND a.attnum = u.attnum) END"""
    found = session.rows(
        f"""
        SELECT r.prrelid, n.nspname, c.relname, {lists} FROM pg_publication_rel AS r
        JOIN pg_class AS c ON c.oid = r.prrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE r.prpubid = %s AND r.prrelid = ANY (%s::oid[]) ORDER BY array_position(%s::oid[], r.prrelid)
        """,  # noqa: S608  # constants
        (publication.oid, list(oids), list(oids)),
    )
    return [
        _Entry(oid, sql.Identifier(schema, name).as_string(session.cursor), *rest) for oid, schema, name, *rest in found
    ]


def _is_empty_without(session: Session, publication: _Publication, entries: Sequence[_Entry]) -> bool:
    if _has_lists(session) and session.rows(
        "SELECT FROM pg_publication_namespace WHERE pnpubid = %s LIMIT 1", (publication.oid,)
    ):
        return False
    others = session.rows(
        "SELECT FROM pg_publication_rel WHERE prpubid = %s AND prrelid <> ALL (%s::oid[]) LIMIT 1",
        (publication.oid, [entry.oid for entry in entries]),
    )
    return not others


def _has_lists(session: Session) -> bool:
    return bool(session.value("SELECT current_setting('server_version_num')::int >= %s", (_LISTS,)))
