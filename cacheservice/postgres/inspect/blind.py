"""What the triggers of a watch cannot see, by the plan of the query and the catalog."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheservice.postgres.inspect.look import Look
from cacheservice.postgres.inspect.plans import nodes, scanned_table

_NODES = {
    "Limit": "which rows it leaves out by LIMIT depends on other rows",
    "WindowAgg": "a window function computes a row from other rows",
}
_KINDS = {
    "m": "is a materialized view, whose REFRESH fires no trigger",
    "f": "is a foreign table, which others change unseen",
}
_EXPRESSIONS = (
    "Output",
    "Filter",
    "Index Cond",
    "Join Filter",
    "Hash Cond",
    "Merge Cond",
    "One-Time Filter",
    "Sort Key",
)
_CLOCKS = {"now", "statement_timestamp", "transaction_timestamp", "age"}
_CLOCK_WORDS = re.compile(r"\b(CURRENT_DATE|CURRENT_TIMESTAMP|CURRENT_TIME|LOCALTIME|LOCALTIMESTAMP)\b")


def look_for_blind_spots(
    look: Look, plan: Mapping[str, Any], origins: Sequence[tuple[int | None, int | None]], *, looks_fine: bool
) -> None:
    """Add a problem for each reason why a delta would miss changes; only for datasets with `watch`.

    :param origins: the table and the number of the column of each part of the key, as the server describes them.
    :param looks_fine: whether nothing is known against the watches yet; else what may follow from that is left out.
    """
    if not look.dataset.watch:
        return
    found = {str(node["Node Type"]) for node in nodes(plan)}
    for kind, why in _NODES.items():
        if kind in found:
            _add(look, why)
    if looks_fine:
        _look_at_tables(look, plan)
    _look_at_functions(look, plan)
    _look_at_key(look, origins, looks_fine=looks_fine)


def _add(look: Look, why: str, todo: str = "") -> None:
    look.add("problem", f"watch: {why}; a delta misses such changes", todo or "leave watch out, or change the query")


def _look_at_tables(look: Look, plan: Mapping[str, Any]) -> None:
    scanned = sorted({scanned_table(node) for node in nodes(plan) if "Relation Name" in node})
    look.cursor.execute(
        """
        WITH RECURSIVE named AS (
            SELECT c.oid, format('%%I.%%I', n.nspname, c.relname) AS name, c.relkind::text AS kind
            FROM unnest(%s::text[], %s::text[]) AS u (schema, name)
            JOIN pg_namespace AS n ON n.nspname = u.schema AND n.nspname NOT IN ('pg_catalog', 'information_schema')
            JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = u.name
        ), above AS (
            SELECT oid, oid AS ancestor FROM named
            UNION
            SELECT a.oid, i.inhparent FROM above AS a JOIN pg_inherits AS i ON i.inhrelid = a.ancestor
        )
        SELECT n.name, n.kind FROM named AS n
        WHERE NOT EXISTS (
            SELECT FROM above AS a JOIN unnest(%s::text[]) AS w (name) ON a.ancestor = to_regclass(w.name)::oid
            WHERE a.oid = n.oid)
        ORDER BY 1
        """,
        (
            [schema for schema, _ in scanned],
            [name for _, name in scanned],
            [watch.table for watch in look.dataset.watch],
        ),
    )
    for table, kind in look.cursor.fetchall():
        if kind in _KINDS:
            _add(look, f"{table} {_KINDS[kind]}")
        else:
            _add(look, f"{table} is read and not watched", f"watch {table} too, by the columns that hold the key")


def _look_at_functions(look: Look, plan: Mapping[str, Any]) -> None:
    texts = list(_expressions(plan))
    names = {name for text in texts for name in re.findall(r"\b([a-z_][a-z0-9_]*)\(", text)}
    look.cursor.execute(
        "SELECT DISTINCT proname::text FROM pg_proc WHERE proname = ANY (%s) AND provolatile = 'v' ORDER BY 1",
        (sorted(names),),
    )
    changing = {name for (name,) in look.cursor.fetchall()} | (names & _CLOCKS)
    shown = [f"{name}()" for name in sorted(changing)]
    shown += sorted({word for text in texts for word in _CLOCK_WORDS.findall(text)})
    if shown:
        _add(look, f"the value of {', '.join(shown)} changes by itself")


def _expressions(plan: Mapping[str, Any]) -> Iterator[str]:
    for node in nodes(plan):
        for field in _EXPRESSIONS:
            value = node.get(field, ())
            yield from [value] if isinstance(value, str) else map(str, value)


def _look_at_key(look: Look, origins: Sequence[tuple[int | None, int | None]], *, looks_fine: bool) -> None:
    computed = [column for column, (table, _) in zip(look.dataset.key, origins, strict=True) if not table]
    if computed:
        if looks_fine:
            _add(
                look,
                f"the key {', '.join(computed)} is an expression, and triggers record values of columns",
                "take a column of the watched table as key",
            )
        return
    for watch in look.dataset.watch:
        look.cursor.execute(
            "SELECT array_agg(a.attname::text ORDER BY k.place) "
            "FROM unnest(%s::oid[], %s::int[]) WITH ORDINALITY AS k (relation, number, place) "
            "JOIN pg_attribute AS a ON a.attrelid = k.relation AND a.attnum = k.number "
            "WHERE k.relation = to_regclass(%s)::oid",
            ([table for table, _ in origins], [number for _, number in origins], watch.table),
        )
        (columns,) = look.cursor.fetchone()
        wanted = list(watch.key)
        if columns and columns != wanted and sorted(columns) == sorted(wanted):
            _add(
                look,
                f"{watch.table} is watched by {', '.join(wanted)}, and the key is {', '.join(columns)}",
                "write the columns in the same order in both, and run cacheservice watch for that order",
            )
