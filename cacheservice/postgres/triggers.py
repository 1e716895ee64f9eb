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
_MOST_BYTES = 100_000_000
"""A statement that changes more rows, or rows with more bytes of keys, is recorded without keys, as a TRUNCATE is: an
array holds at most 1 GB, and the statement would fail."""


class Table(NamedTuple):
    """A table as the database knows it; names are quoted where they need it."""

    name: str
    oid: int
    family: tuple[str, ...]
    """Itself, its partitions and its children: a statement that names one of them fires the triggers of that alone."""
    holding_rows: tuple[str, ...]
    """Those of the family that hold rows themselves."""
    is_partitioned: bool


# A writer's statement fails for no reason of ours. An exception handler would cost each statement a subtransaction, and
# with it a number of a transaction; instead it is seen before whether the table of changes is there and may be written
# to, which `cacheservice.changes()` notices, too. The key of a column that is gone becomes `_NO_COLUMN`: see `_ARRAY`.
# Only the trigger for rows has a handler, which writes nothing and so takes no number: see `_ROW_KEYS`.
_FUNCTION = """\
{create} FUNCTION cacheservice.{function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS {quote}
#variable_conflict use_column{variables}
BEGIN
    IF (CASE WHEN pg_catalog.has_schema_privilege(pg_catalog.to_regnamespace('cacheservice'), 'USAGE')
             THEN pg_catalog.has_table_privilege(pg_catalog.to_regclass('cacheservice.changes'), 'INSERT') END)
    THEN{before}
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
# A MERGE that moves a row to another partition fires the triggers for UPDATE, and PostgreSQL shows them neither the old
# row nor the new one. So an update of a partitioned table is recorded without keys if its statement may be a MERGE. The
# trigger decides by texts alone:
#
# - The stack. Its first line is this function's. If it has no other, the client's statement fired the trigger. That is
#   not a MERGE if it has the word UPDATE or DELETE (of a foreign key with ON DELETE SET NULL), and no word that may
#   stand for a MERGE: EXECUTE runs a prepared statement, FETCH and MOVE run the statement of a cursor.
# - Otherwise a function ran the statement, and the second line quotes it. It does not if the function is in SQL or
#   reads a cursor: that may be a MERGE. lc_messages may translate the words around the quotation, so they are ignored.
#
# E'' and COLLATE "C": no setting of the writer's session or the database changes a pattern. The limit of 1 MB bounds
# the time, to 3 ms. Measured on short statements: 3 to 4 µs.
_VARIABLES = "\nDECLARE\n    stack pg_catalog.text;"
MAY_BE_MERGE = r"""CASE
        WHEN pg_catalog.octet_length({stack}) OPERATOR(pg_catalog.>) 1000000 THEN true
        WHEN pg_catalog.strpos({stack}, E'\n') OPERATOR(pg_catalog.>) 0 THEN
            {stack} COLLATE pg_catalog."C" OPERATOR(pg_catalog.!~*)
                E'^[^\n]*\n[^\n]*[^\\w\\s]\\s*(update|insert|delete|with)\\s'
            OR {stack} COLLATE pg_catalog."C" OPERATOR(pg_catalog.~*) E'\\mmerge\\M'
        WHEN pg_catalog.octet_length({statement}) OPERATOR(pg_catalog.<=) 1000000 THEN
            {statement} COLLATE pg_catalog."C" OPERATOR(pg_catalog.!~*) E'\\m(update|delete)\\M'
            OR {statement} COLLATE pg_catalog."C" OPERATOR(pg_catalog.~*) E'\\m(merge|execute|fetch|move)\\M'
        ELSE true
    END"""
_IF_MERGE = f"""
    GET DIAGNOSTICS stack = PG_CONTEXT;
    IF ({MAY_BE_MERGE.format(stack="stack", statement="pg_catalog.current_query()")}) THEN
        -- Apart, because a query costs more: an older server has no MERGE, and a partition that holds rows loses none.
        IF (pg_catalog.current_setting('server_version_num')::pg_catalog.int4 OPERATOR(pg_catalog.>=) 150000
            AND (SELECT c.relkind OPERATOR(pg_catalog.=) 'p' FROM pg_catalog.pg_class AS c
                 WHERE c.oid OPERATOR(pg_catalog.=) TG_RELID))
        THEN
            INSERT INTO cacheservice.changes (watched, keys) VALUES ({{number}}, NULL);{{notify}}
            RETURN NULL;
        END IF;
    END IF;"""  # noqa: S608  # constants
# OFFSET 0: each sub-select is run once, however often it is named.
# The key's columns are named without their table, so that one that is gone is found in `_NONE`, a level above, instead.
# The bytes are summed a level above the columns: an aggregate of nothing but `_NONE`'s would belong to that level.
# Measured: 1.4 µs a statement for each array. Toasted keys are not read for it.
_ARRAY = """CASE WHEN (SELECT {bytes} FROM (SELECT {lengths} FROM {rows} AS r) AS l) OPERATOR(pg_catalog.>) {most_bytes}
                 THEN NULL ELSE ARRAY(SELECT {key} FROM {rows} AS r LIMIT {one_too_many}) END"""
_NONE = "(SELECT {none}) AS none"
_ONE_ARRAY = (
    "SELECT {number}, CASE\n"
    "        WHEN {unknown_keys} THEN NULL\n"
    "        WHEN pg_catalog.cardinality(a.keys) OPERATOR(pg_catalog.<=) {most_keys} THEN a.keys\n"
    "    END\n"
    "    FROM (SELECT {array} AS keys FROM {none} OFFSET 0) AS a\n"
    "    WHERE (a.keys OPERATOR(pg_catalog.<>) '{{}}') IS NOT FALSE"
).replace("{none}", _NONE)
_KEYS = {
    "insert": _ONE_ARRAY.replace("{array}", _ARRAY.replace("{rows}", "new_rows")),
    "delete": _ONE_ARRAY.replace("{array}", _ARRAY.replace("{rows}", "old_rows")),
    # Both arrays are in the order in which the rows were updated, so they are alike unless a key was changed. One is
    # longer when a row was to move to another partition and a trigger of that refused it.
    "update": (
        "SELECT {number}, CASE\n"
        "        WHEN {unknown_before} OR {unknown_later} OR a.before IS NULL OR a.later IS NULL THEN NULL\n"
        "        WHEN pg_catalog.cardinality(a.before) OPERATOR(pg_catalog.>) {most_keys} THEN NULL\n"
        "        WHEN a.before OPERATOR(pg_catalog.=) a.later THEN a.later\n"
        "        ELSE a.before OPERATOR(pg_catalog.||) a.later\n"
        "    END\n"
        "    FROM (SELECT {before} AS before,\n"
        "                 {later} AS later FROM {none} OFFSET 0) AS a\n"
        "    WHERE (a.before OPERATOR(pg_catalog.<>) '{{}}' OR a.later OPERATOR(pg_catalog.<>) '{{}}') IS NOT FALSE"
    )
    .replace("{none}", _NONE)
    .replace("{before}", _ARRAY.replace("{rows}", "old_rows"))
    .replace("{later}", _ARRAY.replace("{rows}", "new_rows")),
    "truncate": "SELECT {number}, NULL",
    ROW: "VALUES ({number}, recorded)",
}
# A session keeps the plan of this statement. PostgreSQL replaces it when columns of a transition table change, but not
# when those of NEW and OLD do, and then each execution fails. A constant of the type regclass makes a plan depend on a
# table. It does not cover a child whose own columns change, or the OIDs of a restored dump: then
# the handler leaves the keys unknown, and all rows are read.
_ROW_VARIABLES = "\nDECLARE\n    recorded pg_catalog.text[];"
_ROW_KEYS = (
    """
    BEGIN
        SELECT CASE
            WHEN {unknown_before} OR {unknown_later} OR a.before IS NULL OR a.later IS NULL THEN NULL
            ELSE a.before OPERATOR(pg_catalog.||) a.later
        END INTO recorded
        FROM (SELECT CASE WHEN TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN '{{}}' ELSE {before} END AS before,
                     CASE WHEN TG_OP OPERATOR(pg_catalog.=) 'DELETE' THEN '{{}}' ELSE {later} END AS later
              FROM {none} OFFSET 0) AS a
        WHERE {relation}::pg_catalog.regclass IS NOT NULL;
    EXCEPTION WHEN others THEN
        recorded := NULL;
    END;""".replace("{none}", _NONE)
    .replace("{before}", _ARRAY.replace("{rows}", "(SELECT OLD.*)"))
    .replace("{later}", _ARRAY.replace("{rows}", "(SELECT NEW.*)"))
)
_TRANSITION = {
    "insert": "\n    REFERENCING NEW TABLE AS new_rows",
    "update": "\n    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "delete": "\n    REFERENCING OLD TABLE AS old_rows",
    "truncate": "",
}


def recording(
    cursor: Any,
    number: int,
    relation: int,
    key: Sequence[str],
    notify: bool,
    *,
    partitioned: bool,
    replace: bool = False,
) -> list[str]:
    """Return the statements that create the functions of the triggers, or replace them.

    :param relation: the OID of the watched table.
    """
    # "C": a nondeterministic collation of the column would take a key for another.
    value = sql.SQL('{}::pg_catalog.text COLLATE pg_catalog."C"')
    columns = [sql.Identifier(column) for column in key]
    values = [value.format(column) for column in columns]
    element = values[0] if len(values) == 1 else sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(values))
    lengths = [
        sql.SQL("pg_catalog.octet_length({}) AS {}").format(each, sql.Identifier(f"l{place}"))
        for place, each in enumerate(values)
    ]
    sums = [
        sql.SQL("COALESCE(pg_catalog.sum(l.{}), 0)").format(sql.Identifier(f"l{place}")) for place in range(len(values))
    ]
    none = [sql.SQL("{}::pg_catalog.text AS {}").format(sql.Literal(_NO_COLUMN), column) for column in columns]
    quote = "$$"
    while any(quote in column for column in key):
        quote = f"$_{quote[1:]}"
    notifying = sql.SQL(_NOTIFY).format(channel=sql.Literal(OWN_CHANNEL), payload=sql.Literal(f"changed {number}"))
    parts = {
        "number": sql.Literal(number),
        "relation": sql.Literal(str(relation)),
        "key": element,
        "none": sql.SQL(", ").join(none),
        "unknown_keys": _unknown("keys", len(key)),
        "unknown_before": _unknown("before", len(key)),
        "unknown_later": _unknown("later", len(key)),
        "bytes": sql.SQL(" OPERATOR(pg_catalog.+) ").join(sums),
        "lengths": sql.SQL(", ").join(lengths),
        "most_bytes": sql.Literal(_MOST_BYTES),
        "one_too_many": sql.Literal(_MOST_ROWS + 1),
        "most_keys": sql.Literal(_MOST_ROWS * len(key)),
        "notify": notifying if notify else sql.SQL(""),
    }
    statements = []
    for event in (*EVENTS, ROW):
        variables, before = "", ""
        if event == ROW:
            variables, before = _ROW_VARIABLES, _ROW_KEYS
        elif partitioned and event == "update":
            variables, before = _VARIABLES, _IF_MERGE
        statements.append(
            text(
                cursor,
                _FUNCTION,
                create=sql.SQL("CREATE OR REPLACE" if replace else "CREATE"),
                function=sql.Identifier(f"record_{number}_{event}"),
                quote=sql.SQL(quote),
                variables=sql.SQL(variables),
                before=sql.SQL(before).format(**parts),
                keys=sql.SQL(_KEYS[event]).format(**parts),
                notify=parts["notify"],
            )
        )
    return statements


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
