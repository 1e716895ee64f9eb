"""The triggers that record the keys of changed rows, and their functions, as SQL.

A trigger for each kind of statement, with static SQL in a function of its own, so that its plan is cached; one row with
an array of keys for each statement (one row a key by dynamic SQL cost three times as much).

The functions run as whoever made them, since writers have no rights in our schema. So that nobody makes them run
anything else, every name in them is qualified (as safe as a search_path of their own, which costs 1 to 3 µs a
statement), and nobody else may put them on a table: on one with a column whose cast to text is its maker's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from psycopg2 import sql

from cacheservice.config import OWN_CHANNEL

EVENTS = ("insert", "update", "delete", "truncate")
ROW = "row"
"""The event of the trigger for rows, which fires only where a replication applies changes."""
_NO_COLUMN = "cacheservice: no such column"
"""Stands for the key in a statement on a table whose key column is gone."""
_MOST_ROWS = 1_000_000
"""Of a statement that changes more rows no keys are recorded, as if it were a TRUNCATE: an array has 1 GB at most, and
the statement would fail."""


class Table(NamedTuple):
    """A table as the database knows it; names are quoted where they need it."""

    name: str
    oid: int
    family: tuple[str, ...]
    """Itself, its partitions and its children: a statement that names one of them fires the triggers of that alone."""
    holding_rows: tuple[str, ...]
    """Those of the family that hold rows themselves."""


# A writer's statement fails for no reason of ours. An exception handler would cost each statement a subtransaction, and
# with it a number of a transaction; instead it is seen before whether the table of changes is there and may be written
# to, which `cacheservice.changes()` notices, too. The key of a column that is gone becomes `_NO_COLUMN`: see `_ARRAY`.
_FUNCTION = """\
CREATE FUNCTION cacheservice.{function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS {quote}
#variable_conflict use_column
BEGIN
    IF (CASE WHEN pg_catalog.has_schema_privilege(pg_catalog.to_regnamespace('cacheservice'), 'USAGE')
             THEN pg_catalog.has_table_privilege(pg_catalog.to_regclass('cacheservice.changes'), 'INSERT') END)
    THEN
    INSERT INTO cacheservice.changes (watched, keys)
    {keys};{notify}
    END IF;
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
# The key's columns are named without their table, so that one that is gone is found in `_NONE`, a level above, instead.
_ARRAY = "ARRAY(SELECT {key} FROM {rows} AS r LIMIT {one_too_many})"
_NONE = "(SELECT {none}) AS none"
_ONE_ARRAY = (
    "SELECT {number}, CASE\n"
    "        WHEN {unknown_keys} THEN NULL\n"
    "        WHEN pg_catalog.cardinality(a.keys) OPERATOR(pg_catalog.<=) {most_keys} THEN a.keys\n"
    "    END\n"
    "    FROM (SELECT {array} AS keys FROM {none} OFFSET 0) AS a\n"
    "    WHERE a.keys OPERATOR(pg_catalog.<>) '{{}}'"
).replace("{none}", _NONE)
_KEYS = {
    "insert": _ONE_ARRAY.replace("{array}", _ARRAY.replace("{rows}", "new_rows")),
    "delete": _ONE_ARRAY.replace("{array}", _ARRAY.replace("{rows}", "old_rows")),
    # Both arrays are in the order in which the rows were updated, so they are alike unless a key was changed. One is
    # longer when a row was to move to another partition and a trigger of that refused it.
    "update": (
        "SELECT {number}, CASE\n"
        "        WHEN {unknown_before} OR {unknown_later} THEN NULL\n"
        "        WHEN pg_catalog.cardinality(a.before) OPERATOR(pg_catalog.>) {most_keys} THEN NULL\n"
        "        WHEN a.before OPERATOR(pg_catalog.=) a.later THEN a.later\n"
        "        ELSE a.before OPERATOR(pg_catalog.||) a.later\n"
        "    END\n"
        "    FROM (SELECT {before} AS before,\n"
        "                 {later} AS later FROM {none} OFFSET 0) AS a\n"
        "    WHERE a.before OPERATOR(pg_catalog.<>) '{{}}' OR a.later OPERATOR(pg_catalog.<>) '{{}}'"
    )
    .replace("{none}", _NONE)
    .replace("{before}", _ARRAY.replace("{rows}", "old_rows"))
    .replace("{later}", _ARRAY.replace("{rows}", "new_rows")),
    "truncate": "SELECT {number}, NULL",
    ROW: (
        "SELECT {number}, CASE WHEN {unknown_keys} THEN NULL ELSE a.keys END\n"
        "    FROM (SELECT CASE TG_OP WHEN 'INSERT' THEN {later} WHEN 'DELETE' THEN {before}\n"
        "                 ELSE {before} OPERATOR(pg_catalog.||) {later} END AS keys\n"
        "          FROM {none} OFFSET 0) AS a"
    )
    .replace("{none}", _NONE)
    .replace("{before}", "ARRAY(SELECT {key} FROM (SELECT OLD.*) AS r)")
    .replace("{later}", "ARRAY(SELECT {key} FROM (SELECT NEW.*) AS r)"),
}
_TRANSITION = {
    "insert": "\n    REFERENCING NEW TABLE AS new_rows",
    "update": "\n    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "delete": "\n    REFERENCING OLD TABLE AS old_rows",
    "truncate": "",
}


def recording(cursor: Any, number: int, key: Sequence[str], notify: bool) -> list[str]:
    """The functions of the triggers."""
    # "C": a nondeterministic collation of the column would take a key for another.
    value = sql.SQL('{}::pg_catalog.text COLLATE pg_catalog."C"')
    columns = [sql.Identifier(column) for column in key]
    values = [value.format(column) for column in columns]
    element = values[0] if len(values) == 1 else sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(values))
    none = [sql.SQL("{}::pg_catalog.text AS {}").format(sql.Literal(_NO_COLUMN), column) for column in columns]
    quote = "$$"
    while any(quote in column for column in key):
        quote = f"$_{quote[1:]}"
    telling = sql.SQL(_NOTIFY).format(channel=sql.Literal(OWN_CHANNEL), payload=sql.Literal(f"changed {number}"))
    return [
        text(
            cursor,
            _FUNCTION,
            function=sql.Identifier(f"record_{number}_{event}"),
            quote=sql.SQL(quote),
            keys=sql.SQL(_KEYS[event]).format(
                number=sql.Literal(number),
                key=element,
                none=sql.SQL(", ").join(none),
                unknown_keys=_unknown("keys", len(key)),
                unknown_before=_unknown("before", len(key)),
                unknown_later=_unknown("later", len(key)),
                one_too_many=sql.Literal(_MOST_ROWS + 1),
                most_keys=sql.Literal(_MOST_ROWS * len(key)),
            ),
            notify=telling if notify else sql.SQL(""),
        )
        for event in (*EVENTS, ROW)
    ]


def _unknown(array: str, width: int) -> sql.Composable:
    """Whether the first key of an array is of a column that is gone; all are then."""
    places = [f"[1][{place}]" for place in range(1, width + 1)] if width > 1 else ["[1]"]
    firsts = [
        sql.SQL(f"a.{array}{place} OPERATOR(pg_catalog.=) {{}}").format(sql.Literal(_NO_COLUMN)) for place in places
    ]
    return sql.SQL(" OR ").join(firsts)


def triggers(cursor: Any, number: int, table: Table) -> list[str]:
    # ALWAYS: for replicated sessions (session_replication_role) too; and whoever disables triggers for a while and
    # enables them again leaves them without it, which the next refresh notices.
    statements = [
        text(
            cursor,
            "CREATE TRIGGER {trigger} AFTER {event} ON {table}{transition}\n"
            "    FOR EACH STATEMENT EXECUTE FUNCTION cacheservice.{function}();\n"
            "ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger};",
            trigger=sql.Identifier(trigger(number, event)),
            event=sql.SQL(event.upper()),
            table=sql.SQL(member),
            transition=sql.SQL(_TRANSITION[event]),
            function=sql.Identifier(f"record_{number}_{event}"),
        )
        for member in table.family
        for event in EVENTS
    ]
    # What applies a replication (a subscription's worker, pglogical) fires triggers for rows alone. REPLICA: nobody
    # else does, so that it costs ordinary writers nothing.
    rows = [
        text(
            cursor,
            "CREATE TRIGGER {trigger} AFTER INSERT OR UPDATE OR DELETE ON {table}\n"
            "    FOR EACH ROW EXECUTE FUNCTION cacheservice.{function}();\n"
            "ALTER TABLE {table} ENABLE REPLICA TRIGGER {trigger};",
            trigger=sql.Identifier(trigger(number, ROW)),
            table=sql.SQL(member),
            function=sql.Identifier(f"record_{number}_{ROW}"),
        )
        for member in table.holding_rows
    ]
    return statements + rows


def trigger(number: int, event: str) -> str:
    return f"cacheservice_{number}_{event}"


def text(cursor: Any, template: str, *values: sql.Composable, **named: sql.Composable) -> str:
    text: str = sql.SQL(template).format(*values, **named).as_string(cursor)
    return text
