"""The triggers that record the keys of changed rows, and their functions, as SQL.

There is a trigger for each kind of statement, with static SQL in a function of its own, so that its plan is cached.
Each statement records one row with an array of keys (a row for each key by dynamic SQL cost three times as much).

The functions run with the rights of their creator, because writers have no rights in our schema. To keep other users
from running code with these rights, every name in the functions is qualified (as safe as a search_path of their own,
which costs 1 to 3 µs a statement), and only their owner may use them in a trigger: otherwise a user could attach one to
a table with a column whose cast to text is the user's own function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from psycopg2 import sql

from cacheservice.base.interfaces import BlockingCursor
from cacheservice.config import OWN_CHANNEL

EVENTS = ("insert", "update", "delete", "truncate")
ROW = "row"
"""The event of the row trigger, which fires only when replication applies changes."""
_NO_COLUMN = "cacheservice: no such column"
"""Stands for the key in a statement on a table whose key column is gone."""
_MOST_ROWS = 1_000_000
_MOST_BYTES = 100_000_000
"""A statement that changes more rows, or rows with more bytes of keys, is recorded without keys, as a TRUNCATE is: an
array holds at most 1 GB, and the statement would fail otherwise."""


class Table(NamedTuple):
    """A table as the database knows it; names are quoted where necessary."""

    name: str
    oid: int
    family: tuple[str, ...]
    """The table itself, its partitions and its children.

    A statement that names one of them fires only that one's triggers.
    """
    holding_rows: tuple[str, ...]
    """The members of the family that hold rows themselves."""
    is_partitioned: bool


# Our code must not make a writer's statement fail. An exception handler would cost each statement a subtransaction, and
# thereby a transaction id. Instead the function checks beforehand whether the table of changes exists and may be
# written to; `cacheservice.changes()` detects that, too. The key of a column that is gone becomes `_NO_COLUMN`: see
# `_ARRAY`. Only the row trigger has a handler, which writes nothing and so takes no transaction id: see `_ROW_KEYS`.
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
# PostgreSQL drops a notification that its transaction has already sent.
_NOTIFY = """
    IF FOUND THEN
        PERFORM pg_catalog.pg_notify({channel}, {payload});
    END IF;"""
# A MERGE that moves a row to another partition fires the triggers for UPDATE, and PostgreSQL shows them neither the old
# row nor the new one. Therefore an update of a partitioned table is recorded without keys if its statement may be a
# MERGE. The trigger decides that by texts alone:
#
# - The stack. Its first line is this function's. If there is no other line, the client's statement fired the trigger.
#   The statement is not a MERGE if it has the word UPDATE or DELETE (of a foreign key with ON DELETE SET NULL), and no
#   word that may stand for a MERGE: EXECUTE runs a prepared statement, FETCH and MOVE run the statement of a cursor.
# - Otherwise a function ran the statement, and the second line quotes it. It is not quoted if the function is in SQL or
#   reads a cursor: then it may be a MERGE. lc_messages may translate the words around the quotation, so those words are
#   ignored.
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
# OFFSET 0: each sub-select runs once, however often it is named. The key's columns are named without their table, so
# that a missing column is found in `_NONE`, a level above, instead. The bytes are summed a level above the columns: an
# aggregate of only `_NONE`'s columns would belong to that level. Measured: 1.4 µs a statement for each array. Toasted
# keys are not read for it.
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
    # Both arrays are in the order in which the rows were updated, so they are equal unless a key was changed. One is
    # longer if a row was to move to another partition and a trigger of that partition refused it.
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
# when the columns of NEW and OLD do, and then each execution fails. A constant of the type regclass makes a plan depend
# on a table. It does not cover a child whose own columns change, or the OIDs of a restored dump: then the handler
# leaves the keys unknown, and all rows are read.
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
    cursor: BlockingCursor,
    number: int,
    relation: int,
    key: Sequence[str],
    notify: bool,
    *,
    partitioned: bool,
    replace: bool = False,
) -> list[str]:
    """Return the statements that create or replace the functions of the triggers.

    :param relation: the OID of the watched table.
    """
    # "C", because a nondeterministic collation of the column would treat different keys as equal.
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
    """Return the condition that the first key of an array is of a column that is gone.

    All keys of the array are then.
    """
    places = [f"[1][{place}]" for place in range(1, width + 1)] if width > 1 else ["[1]"]
    firsts = [
        sql.SQL(f"a.{array}{place} OPERATOR(pg_catalog.=) {{}}").format(sql.Literal(_NO_COLUMN)) for place in places
    ]
    return sql.SQL(" OR ").join(firsts)


def triggers(cursor: BlockingCursor, number: int, table: Table) -> list[str]:
    # ALWAYS: the triggers also fire in replicated sessions (session_replication_role). A user who disables and enables
    # triggers removes ALWAYS, which the next refresh detects.
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
    # A process that applies replicated changes (a subscription's worker, pglogical) fires only row triggers. REPLICA:
    # no other session fires them, so ordinary writers pay nothing.
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


def text(cursor: BlockingCursor, template: str, *values: sql.Composable, **named: sql.Composable) -> str:
    text: str = sql.SQL(template).format(*values, **named).as_string(cursor)
    return text
