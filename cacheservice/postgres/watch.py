"""Triggers that record the keys of changed rows: what `cacheservice watch` and `unwatch` do. It blocks: for the command
line, never for the service.

A trigger for each kind of statement, with static SQL in a function of its own, so that its plan is cached; one row with
an array of keys for each statement (one row a key by dynamic SQL cost three times as much).

The functions run as whoever made them, since writers have no rights in our schema. So that nobody makes them run
anything else, every name in them is qualified (as safe as a search_path of their own, which costs 1 to 3 µs a
statement), and nobody else may put them on a table: on one with a column whose cast to text is its maker's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from psycopg2 import sql

from cacheservice.config import OWN_CHANNEL
from cacheservice.errors import WatchFailed
from cacheservice.postgres import admin
from cacheservice.postgres.admin import LOCK_TIMEOUT_MS, Refused

_TABLE_KINDS = "rp"
"""Ordinary and partitioned tables: what has triggers with transition tables."""
_EVENTS = ("insert", "update", "delete", "truncate")
_MOST_ROWS = 1_000_000
"""Of a statement that changes more rows no keys are recorded, as if it were a TRUNCATE: an array has 1 GB at most, and
the statement would fail."""
_ONE_AT_A_TIME = "LOCK TABLE cacheservice.watched IN SHARE ROW EXCLUSIVE MODE"
_BEGIN = f"BEGIN;\nSET LOCAL lock_timeout = {LOCK_TIMEOUT_MS};"


class _Table(NamedTuple):
    """A table as the database knows it; names are quoted where they need it."""

    name: str
    oid: int
    family: tuple[str, ...]
    """Itself, its partitions and its children: a statement that names one of them fires the triggers of that alone."""


def watch(
    dsn: str, table: str, key: Sequence[str], notify: bool, dry_run: bool, say: Callable[[str], None]
) -> list[str]:
    """Record the keys of all rows of `table` that change from now on; gives the names of the tables it is done for.

    Again for one that is watched, it makes its triggers anew.

    :param key: the columns whose values name a row.
    :param dry_run: only say the SQL.
    :raises WatchFailed: if the database cannot be reached or refuses, with what to do.
    """
    with _transaction(dsn) as cursor:
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
            *_tidying(cursor),
            *(_removing(cursor, number, found.family) if known else ()),
            _registering(cursor, number, found, key, notify),
            *_recording(cursor, number, key, notify),
            *_triggers(cursor, number, found.family),
        ]
        _run(cursor, statements, dry_run, say)
    return list(found.family)


def unwatch(dsn: str, table: str, key: Sequence[str], dry_run: bool, say: Callable[[str], None]) -> list[str]:
    """Undo `watch`; without a key, every watch of that table.

    :raises WatchFailed: if it is not watched so, or the database refuses.
    """
    with _transaction(dsn) as cursor:
        cursor.execute(_ONE_AT_A_TIME)
        found = _find(cursor, table, key)
        cursor.execute(
            "SELECT id FROM cacheservice.watched WHERE relation = %s AND (%s OR key_columns = %s::name[]) ORDER BY id",
            (found.oid, not key, list(key)),
        )
        numbers = [number for (number,) in cursor.fetchall()]
        if not numbers:
            raise WatchFailed(f"{found.name} is not watched{' by ' + ', '.join(key) if key else ''}")
        removing = [each for number in numbers for each in _removing(cursor, number, found.family)]
        _run(cursor, [*_tidying(cursor), *removing], dry_run, say)
    return list(found.family)


@contextmanager
def _transaction(dsn: str) -> Iterator[Any]:
    """A cursor in a transaction that is committed at the end; errors become ours."""
    try:
        with admin.session(dsn, "cacheservice watch") as session, session.transaction():
            session.cursor.execute("SET LOCAL search_path = pg_catalog, public, pg_temp")
            if not session.value("SELECT to_regclass('cacheservice.watched') IS NOT NULL"):
                raise WatchFailed("the database has no table cacheservice.watched; say first: cacheservice migrate")
            yield session.cursor
    except Refused as refused:
        raise WatchFailed(str(refused)) from refused


def _find(cursor: Any, table: str, key: Sequence[str]) -> _Table:
    # The server splits and folds the name by its own rules.
    cursor.execute(
        "SELECT c.oid, n.nspname, c.relname, c.relkind::text, c.relpersistence::text "
        "FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = %s::regclass",
        (table,),
    )
    oid, schema, relation, kind, persistence = cursor.fetchone()
    name = sql.Identifier(schema, relation).as_string(cursor)
    if kind not in _TABLE_KINDS or persistence == "t":
        raise WatchFailed(f"{name} is no table that can have such triggers; watch the tables that it reads")
    cursor.execute("SELECT attname FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped", (oid,))
    columns = [column for (column,) in cursor.fetchall()]
    for column in key:
        if column not in columns:
            raise WatchFailed(f"{name} has no column {column}; it has {', '.join(columns)}")
    # A statement that names the parent changes its rows and fires none of its triggers.
    cursor.execute("SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = %s ORDER BY inhseqno", (oid,))
    if parent := cursor.fetchone():
        raise WatchFailed(f"{name} is a partition or a child of {parent[0]}; watch that, and it is watched with it")
    cursor.execute(
        """
        WITH RECURSIVE family AS (
            SELECT %s::oid AS oid
            UNION
            SELECT i.inhrelid FROM pg_inherits AS i JOIN family AS f ON i.inhparent = f.oid
        )
        SELECT n.nspname, c.relname FROM family AS f JOIN pg_class AS c ON c.oid = f.oid
        JOIN pg_namespace AS n ON n.oid = c.relnamespace ORDER BY c.oid <> %s, c.oid
        """,
        (oid, oid),
    )
    family = tuple(sql.Identifier(*names).as_string(cursor) for names in cursor.fetchall())
    return _Table(name, oid, family)


def _registering(cursor: Any, number: int, table: _Table, key: Sequence[str], notify: bool) -> str:
    return _text(
        cursor,
        "INSERT INTO cacheservice.watched (id, relation, key_columns, notifies)\n"
        "VALUES ({number}, {table}, {key}::pg_catalog.name[], {notify});",
        number=sql.Literal(number),
        table=sql.Literal(table.name),
        key=sql.Literal(list(key)),
        notify=sql.Literal(notify),
    )


_FUNCTION = """\
CREATE FUNCTION cacheservice.{function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS {quote}
BEGIN
    INSERT INTO cacheservice.changes (watched, keys)
    {keys};{notify}
    RETURN NULL;
END
{quote};
REVOKE ALL ON FUNCTION cacheservice.{function}() FROM PUBLIC;"""
# PostgreSQL drops a notification that its transaction has sent already.
_NOTIFY = """
    IF FOUND THEN
        PERFORM pg_catalog.pg_notify({channel}, {payload});
    END IF;"""
# Without an aggregate: 2 µs less a statement. OFFSET 0: each sub-select is run once, however often it is named.
_ARRAY = "ARRAY(SELECT {key} FROM {rows} AS r LIMIT {one_too_many})"
_ONE_ARRAY = (
    "SELECT {number}, CASE WHEN pg_catalog.cardinality(a.keys) OPERATOR(pg_catalog.<=) {most_keys} THEN a.keys END\n"
    "    FROM (SELECT {array} AS keys OFFSET 0) AS a\n"
    "    WHERE a.keys OPERATOR(pg_catalog.<>) '{{}}'"
)
_KEYS = {
    "insert": _ONE_ARRAY.replace("{array}", _ARRAY.replace("{rows}", "new_rows")),
    "delete": _ONE_ARRAY.replace("{array}", _ARRAY.replace("{rows}", "old_rows")),
    # Both arrays are in the order in which the rows were updated, so they are alike unless a key was changed. One is
    # longer when a row was to move to another partition and a trigger of that refused it.
    "update": (
        "SELECT {number}, CASE\n"
        "        WHEN pg_catalog.cardinality(a.before) OPERATOR(pg_catalog.>) {most_keys} THEN NULL\n"
        "        WHEN a.before OPERATOR(pg_catalog.=) a.later THEN a.later\n"
        "        ELSE a.before OPERATOR(pg_catalog.||) a.later\n"
        "    END\n"
        "    FROM (SELECT {before} AS before,\n"
        "                 {later} AS later OFFSET 0) AS a\n"
        "    WHERE a.before OPERATOR(pg_catalog.<>) '{{}}' OR a.later OPERATOR(pg_catalog.<>) '{{}}'"
    )
    .replace("{before}", _ARRAY.replace("{rows}", "old_rows"))
    .replace("{later}", _ARRAY.replace("{rows}", "new_rows")),
    "truncate": "SELECT {number}, NULL",
}
_TRANSITION = {
    "insert": "\n    REFERENCING NEW TABLE AS new_rows",
    "update": "\n    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "delete": "\n    REFERENCING OLD TABLE AS old_rows",
    "truncate": "",
}


def _recording(cursor: Any, number: int, key: Sequence[str], notify: bool) -> list[str]:
    """The functions of the triggers."""
    # "C": a nondeterministic collation of the column would take a key for another.
    value = sql.SQL('r.{}::pg_catalog.text COLLATE pg_catalog."C"')
    values = [value.format(sql.Identifier(column)) for column in key]
    element = values[0] if len(values) == 1 else sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(values))
    quote = "$$"
    while any(quote in column for column in key):
        quote = f"$_{quote[1:]}"
    telling = sql.SQL(_NOTIFY).format(channel=sql.Literal(OWN_CHANNEL), payload=sql.Literal(f"changed {number}"))
    return [
        _text(
            cursor,
            _FUNCTION,
            function=sql.Identifier(f"record_{number}_{event}"),
            quote=sql.SQL(quote),
            keys=sql.SQL(_KEYS[event]).format(
                number=sql.Literal(number),
                key=element,
                one_too_many=sql.Literal(_MOST_ROWS + 1),
                most_keys=sql.Literal(_MOST_ROWS * len(key)),
            ),
            notify=telling if notify else sql.SQL(""),
        )
        for event in _EVENTS
    ]


def _triggers(cursor: Any, number: int, family: Sequence[str]) -> list[str]:
    # ALWAYS: for replicated sessions (session_replication_role) too; and whoever disables triggers for a while and
    # enables them again leaves them without it, which the next refresh notices.
    return [
        _text(
            cursor,
            "CREATE TRIGGER {trigger} AFTER {event} ON {table}{transition}\n"
            "    FOR EACH STATEMENT EXECUTE FUNCTION cacheservice.{function}();\n"
            "ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger};",
            trigger=sql.Identifier(_trigger(number, event)),
            event=sql.SQL(event.upper()),
            table=sql.SQL(table),
            transition=sql.SQL(_TRANSITION[event]),
            function=sql.Identifier(f"record_{number}_{event}"),
        )
        for table in family
        for event in _EVENTS
    ]


def _tidying(cursor: Any) -> list[str]:
    """What takes away the watches of tables that are gone, and their triggers with them."""
    cursor.execute(
        "SELECT id FROM cacheservice.watched AS w "
        "WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = w.relation) ORDER BY id"
    )
    return [each for (number,) in cursor.fetchall() for each in _removing(cursor, number, ())]


def _removing(cursor: Any, number: int, family: Sequence[str]) -> list[str]:
    identifier = sql.Identifier
    return [
        *(
            _text(
                cursor,
                "DROP TRIGGER IF EXISTS {trigger} ON {table};",
                trigger=identifier(_trigger(number, event)),
                table=sql.SQL(table),
            )
            for table in family
            for event in _EVENTS
        ),
        *(
            # CASCADE: a trigger of a partition that has been detached since.
            _text(cursor, "DROP FUNCTION cacheservice.{}() CASCADE;", identifier(f"record_{number}_{event}"))
            for event in _EVENTS
        ),
        _text(cursor, "DELETE FROM cacheservice.changes WHERE watched = {};", sql.Literal(number)),
        _text(cursor, "DELETE FROM cacheservice.watched WHERE id = {};", sql.Literal(number)),
    ]


def _trigger(number: int, event: str) -> str:
    return f"cacheservice_{number}_{event}"


def _text(cursor: Any, template: str, *values: sql.Composable, **named: sql.Composable) -> str:
    text: str = sql.SQL(template).format(*values, **named).as_string(cursor)
    return text


def _run(cursor: Any, statements: Sequence[str], dry_run: bool, say: Callable[[str], None]) -> None:
    if dry_run:
        # In one transaction as here: since_xid is the one that puts the triggers there.
        say("\n".join([_BEGIN, *statements, "COMMIT;"]))
        return
    for statement in statements:
        cursor.execute(statement)
