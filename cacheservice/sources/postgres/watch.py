"""`cacheservice watch` and `unwatch`: triggers that record changed keys.

They block, so they are for the command line and never for the service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from psycopg2 import sql

from cacheservice.base.errors import WatchFailed
from cacheservice.base.interfaces import BlockingCursor
from cacheservice.sources.postgres import tables
from cacheservice.sources.postgres.admin import SCHEMA, Session
from cacheservice.sources.postgres.tables import TABLE_KINDS, NotWatched
from cacheservice.sources.postgres.triggers import EVENTS, ROW, Table, recording, text, trigger, triggers

_ONE_AT_A_TIME = "LOCK TABLE cacheservice.watched IN SHARE ROW EXCLUSIVE MODE"
_FORM = 3
"""The version of a new watch's functions: see the comment on the column `form` of cacheservice.watched."""


class Removal(NamedTuple):
    """The statements that remove watches, and the names of the tables that were watched."""

    statements: list[str]
    names: list[str]


def watch(
    dsn: str,
    table: str,
    key: Sequence[str],
    notify: bool,
    dry_run: bool,
    show: Callable[[str], None],
    dsn_source: str = "postgres.dsn",
) -> list[str]:
    """Record the keys of all rows of `table` that change from now on.

    For a table that is already watched, the triggers are created again.

    :param key: the columns whose values identify a row.
    :param dry_run: only print the SQL.
    :param dsn_source: as for `admin.session`.
    :returns: the names of the watched tables.
    :raises WatchFailed: if the database cannot be reached or refuses, with the next step.
    """
    with tables.transaction(dsn, dsn_source, restore=not dry_run) as session:
        cursor = session.cursor
        _require_tables(session)
        cursor.execute(_ONE_AT_A_TIME)
        found = _find(cursor, table, key)
        cursor.execute(
            "SELECT id FROM cacheservice.watched WHERE relation = %s AND key_columns = %s::name[]",
            (found.oid, list(key)),
        )
        known = cursor.fetchone()
        cursor.execute("SELECT coalesce(max(id), 0) + 1 FROM cacheservice.watched")
        number: int = (known or cursor.fetchone())[0]
        statements = [
            *_tidying(session, found.oid),
            *(_removing(session, number, found.family) if known else ()),
            _registering(cursor, number, found, key, notify),
            *recording(cursor, number, found.oid, key, notify, partitioned=found.is_partitioned),
            *triggers(cursor, number, found),
            *_owning(session, number),
        ]
        tables.run(cursor, statements, dry_run, show)
    return list(found.family)


def unwatch(
    dsn: str,
    table: str,
    key: Sequence[str],
    dry_run: bool,
    show: Callable[[str], None],
    dsn_source: str = "postgres.dsn",
) -> list[str]:
    """Undo `watch`; without a key, undo every watch of the table.

    Neither our tables nor the watched table need to exist.

    :raises WatchFailed: if there is no such watch, or the database refuses.
    """
    with tables.transaction(dsn, dsn_source, restore=not dry_run) as session:
        removal = removal_of(session, table, key)
        tables.run(session.cursor, removal.statements, dry_run, show)
    return removal.names


def removal_of(session: Session, table: str, key: Sequence[str]) -> Removal:
    """Return the statements of `unwatch`.

    :raises NotWatched: if there is no such watch.
    """
    cursor = session.cursor
    if session.value("SELECT to_regnamespace(%s) IS NULL", (SCHEMA,)):
        raise NotWatched(f"{table} is not watched: the database has no schema {SCHEMA}")
    if has_records := _has(session, "watched"):
        cursor.execute(_ONE_AT_A_TIME)
    tidying = _tidying(session, None) if has_records else []
    if tidying and session.value("SELECT to_regclass(%s) IS NULL", (table,)):
        return Removal(tidying, [table])
    oid, name, _ = tables.named(cursor, table)
    numbers = []
    if has_records:
        chosen = session.rows(
            "SELECT id FROM cacheservice.watched WHERE relation = %s AND (%s OR key_columns = %s::name[]) ORDER BY id",
            (oid, not key, list(key)),
        )
        numbers = [number for (number,) in chosen]
    if not key:
        # Its triggers also name the watches, if the record is gone.
        numbers += [number for number in _numbers_of_triggers(session, oid) if number not in numbers]
    if not numbers:
        raise NotWatched(f"{name} is not watched{' by ' + ', '.join(key) if key else ''}")
    family = [member.name for member in tables.family(cursor, oid)]
    removing = [each for number in numbers for each in _removing(session, number, family)]
    return Removal([*tidying, *removing], family)


def renew(session: Session) -> None:
    """Replace the trigger functions of watches that an older version made.

    Triggers stay as they are, so that no table is locked. Functions of form 1 may belong to a role that this session
    cannot act as; only `watch` replaces those.
    """
    outdated = session.rows(
        """
        SELECT w.id, c.oid::bigint, w.key_columns::text[], w.notifies, c.relkind = 'p'
        FROM cacheservice.watched AS w JOIN pg_class AS c ON c.oid = w.relation
        WHERE w.form BETWEEN 2 AND %s AND %s = (
            SELECT count(*) FROM pg_proc AS p JOIN pg_class AS t ON t.relowner = p.proowner
            WHERE t.oid = 'cacheservice.changes'::regclass AND pg_has_role(p.proowner, 'USAGE')
              AND p.pronamespace = 'cacheservice'::regnamespace AND p.proname = ANY (ARRAY(
                  SELECT format('record_%%s_%%s', w.id, e.name) FROM unnest(%s::text[]) AS e (name))))
        ORDER BY w.id
        """,
        (_FORM - 1, len((*EVENTS, ROW)), [*EVENTS, ROW]),
    )
    for number, relation, key, notify, partitioned in outdated:
        for statement in recording(
            session.cursor, number, relation, key, notify, partitioned=partitioned, replace=True
        ):
            session.cursor.execute(statement)
        session.cursor.execute("UPDATE cacheservice.watched SET form = %s WHERE id = %s", (_FORM, number))


def _require_tables(session: Session) -> None:
    form = "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('cacheservice.watched') AND attname = 'form'"
    if not _has(session, "changes") or not session.value(form):
        raise WatchFailed(
            "this database lacks the tables that `cacheservice watch` needs; run cacheservice migrate first"
        )


def _has(session: Session, table: str) -> bool:
    return bool(session.value("SELECT to_regclass(%s) IS NOT NULL", (f"{SCHEMA}.{table}",)))


def _find(cursor: BlockingCursor, table: str, key: Sequence[str]) -> Table:
    oid, name, kind = tables.named(cursor, table)
    if kind not in TABLE_KINDS:
        raise WatchFailed(f"{name} cannot have such triggers; watch the tables that it reads")
    columns = tables.columns(cursor, oid)
    for column in key:
        tables.require_column(name, columns, column)
        if columns[column] == "v":
            raise WatchFailed(
                f"{name}: the column {column} is generated and not stored, so that no trigger sees its value; "
                "watch a stored column"
            )
    # A statement that names the parent changes the child's rows and fires none of the child's triggers.
    cursor.execute("SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = %s ORDER BY inhseqno", (oid,))
    if parent := cursor.fetchone():
        raise WatchFailed(f"{name} is a partition or a child of {parent[0]}; watch that, and it is watched with it")
    family = tables.family(cursor, oid)
    if other := _other_parent(cursor, oid):
        raise WatchFailed(
            f"{name}: its child {other[0]} also inherits from {other[1]}, and statements on {other[1]} fire no trigger "
            "that would record changes; remove `watch` from the dataset"
        )
    for member in family:
        if member.kind not in TABLE_KINDS:
            raise WatchFailed(
                f"{name} has the foreign table {member.name} below it: with our triggers, statements on {name} that "
                f"change rows of {member.name} would fail; remove `watch` from the dataset"
            )
    return Table(
        name,
        oid,
        family=tuple(member.name for member in family),
        holding_rows=tuple(member.name for member in family if member.kind == "r"),
        is_partitioned=kind == "p",
    )


def _other_parent(cursor: BlockingCursor, oid: int) -> tuple[str, str] | None:
    """Return a descendant of the table and a parent of it outside the family, or None."""
    cursor.execute(
        f"""{tables.FAMILY}
        SELECT i.inhrelid::regclass::text, i.inhparent::regclass::text FROM pg_inherits AS i
        WHERE i.inhrelid IN (SELECT f.oid FROM family AS f WHERE f.oid <> %s)
          AND i.inhparent NOT IN (SELECT f.oid FROM family AS f)
        ORDER BY 1, 2
        """,  # noqa: S608  # constants
        (oid, oid),
    )
    found: tuple[str, str] | None = cursor.fetchone()
    return found


def _numbers_of_triggers(session: Session, oid: int) -> list[int]:
    found = session.rows(
        r"SELECT DISTINCT substring(tgname FROM '^cacheservice_(\d+)_[a-z]+$')::int FROM pg_trigger "
        r"WHERE tgrelid = %s AND tgname ~ '^cacheservice_\d+_[a-z]+$' ORDER BY 1",
        (oid,),
    )
    return [number for (number,) in found]


def _registering(cursor: BlockingCursor, number: int, table: Table, key: Sequence[str], notify: bool) -> str:
    return text(
        cursor,
        "INSERT INTO cacheservice.watched (id, relation, key_columns, notifies, form)\n"
        "VALUES ({number}, {table}, {key}::pg_catalog.name[], {notify}, {form});",
        number=sql.Literal(number),
        form=sql.Literal(_FORM),
        table=sql.Literal(table.name),
        key=sql.Literal(list(key)),
        notify=sql.Literal(notify),
    )


def _owning(session: Session, number: int) -> list[str]:
    """Return statements that give the functions to the owner of the table they fill.

    The owner cannot lose its right to the table by another role's REVOKE.
    """
    owner = session.value("SELECT relowner::regrole::text FROM pg_class WHERE oid = 'cacheservice.changes'::regclass")
    if owner == session.role:
        return []
    return [
        f"ALTER FUNCTION cacheservice.record_{number}_{event}() OWNER TO {owner};"  # already quoted
        for event in (*EVENTS, ROW)
    ]


def _tidying(session: Session, oid: int | None) -> list[str]:
    """Return the statements that remove orphaned watches.

    These are the watches of tables that are gone, and the watches of `oid` by columns that are gone.
    """
    found = session.rows(
        """
        SELECT w.id FROM cacheservice.watched AS w
        WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = w.relation)
           OR w.relation = %s::oid AND EXISTS (
               SELECT FROM unnest(w.key_columns) AS k (name) WHERE NOT EXISTS (
                   SELECT FROM pg_attribute AS a
                   WHERE a.attrelid = w.relation AND a.attname = k.name AND NOT a.attisdropped))
        ORDER BY w.id
        """,
        (oid,),
    )
    return [each for (number,) in found for each in _removing(session, number, ())]


def _removing(session: Session, number: int, family: Sequence[str]) -> list[str]:
    cursor = session.cursor
    functions = [f"record_{number}_{event}" for event in (*EVENTS, ROW)]
    present = session.rows(
        "SELECT proname::text FROM pg_proc WHERE pronamespace = to_regnamespace(%s) AND proname = ANY (%s::text[])",
        (SCHEMA, functions),
    )
    is_whole = all(_has(session, table) for table in ("watched", "changes", "pruned"))
    records = ("watched", "changes") if is_whole else ()
    return [
        *(
            text(
                cursor,
                "DROP TRIGGER IF EXISTS {trigger} ON {table};",
                trigger=sql.Identifier(trigger(number, event)),
                table=sql.SQL(table),
            )
            for table in family
            for event in (*EVENTS, ROW)
        ),
        *(
            # CASCADE: a partition that was detached since may still have a trigger.
            text(cursor, "DROP FUNCTION cacheservice.{}() CASCADE;", sql.Identifier(function))
            for function in functions
            if (function,) in present
        ),
        # In this order, because rows deleted without a watch do not count as pruned.
        *(
            text(
                cursor,
                "DELETE FROM cacheservice.{} WHERE {} = {};",
                sql.Identifier(table),
                sql.Identifier("id" if table == "watched" else "watched"),
                sql.Literal(number),
            )
            for table in records
        ),
    ]
