"""Finds changes that the triggers of a watch cannot see.

The evidence is the query's plan and the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from cacheservice.sources.postgres.inspect.bodies import (
    Call,
    Reading,
    calls_in,
    definitions_of_views,
    tables_of_functions,
    volatile,
)
from cacheservice.sources.postgres.inspect.expressions import Value, is_expression, value_of
from cacheservice.sources.postgres.inspect.links import Links, Scan, output_of, sources_of
from cacheservice.sources.postgres.inspect.look import Look
from cacheservice.sources.postgres.inspect.picks import Picks
from cacheservice.sources.postgres.inspect.plans import PlanNode, nodes
from cacheservice.sources.postgres.inspect.texts import without_comments, without_strings

_PICKS = {
    "Limit": "which rows it leaves out by LIMIT depends on other rows",
    "WindowAgg": "a window function computes a row from other rows",
    "Unique": "which row DISTINCT ON takes depends on other rows",
}
"""Nodes that are harmless if they see only the rows of one key."""
_NODES = {
    "Recursive Union": "a recursive query computes a row from other rows",
    "Sample Scan": "TABLESAMPLE takes different rows each time",
}
_KINDS = {
    "m": "is a materialized view, whose REFRESH fires no trigger",
    "f": "is a foreign table, whose changes fire no trigger here",
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
    "Function Call",
)
_CLOCKS = {"now", "statement_timestamp", "transaction_timestamp", "age"}
_STATES = {"pg_current_snapshot", "txid_current_snapshot", "pg_current_xact_id_if_assigned", "txid_current_if_assigned"}
_STATISTICS = "pg_stat_get_"
_SET_OPERATION = re.compile(r"\b(?:UNION|INTERSECT|EXCEPT)\b", re.IGNORECASE)
_MOMENTS = re.compile(r"'\s*(now|today|tomorrow|yesterday)\s*'", re.IGNORECASE)
_CLOCK_WORDS = re.compile(r"\b(CURRENT_DATE|CURRENT_TIMESTAMP|CURRENT_TIME|LOCALTIME|LOCALTIMESTAMP)\b")


def look_for_blind_spots(
    look: Look,
    plan: PlanNode,
    places: Sequence[int],
    origins: Sequence[tuple[int | None, int | None]],
    *,
    looks_fine: bool,
) -> None:
    """Add a problem for each reason why a delta would miss changes.

    Only datasets with `watch` are checked.

    :param places: the places of the key's columns in the query's output.
    :param origins: the table and the number of the column of each part of the key, as the server describes them.
    :param looks_fine: whether no problem of the watches is known yet; if not, possible consequences of it are left out.
    """
    if not look.dataset.watch:
        return
    links = Links(plan)
    texts = [without_strings(without_comments(text)) for text in (look.dataset.query, *definitions_of_views(look))]
    of_sets = any(map(_SET_OPERATION.search, texts))
    key = [_key_column(plan, links, place, of_sets=of_sets) for place in places]
    found = {str(node["Node Type"]) for node in nodes(plan)}
    for kind, why in _NODES.items():
        if kind in found:
            _add(look, why)
    names = [{name.lower(), str(place + 1)} for name, place in zip(look.dataset.key, places, strict=True)]
    picks = Picks(plan, links, key, texts, names)
    for kind, why in _PICKS.items():
        faults = picks.faults(kind)
        if any(faults):
            _add(look, why)
        elif faults:
            _hint(
                look, f"{why}, unless these have the same key", "check that it takes only rows with the key of the row"
            )
    _look_at_functions(look, plan)
    found_before = len(look.found.findings)
    computed = [
        name
        for name, place, value, (table, _) in zip(look.dataset.key, places, key, origins, strict=True)
        if not table and not (_holds_columns(plan, place) if of_sets else value and links.is_of_table(value))
    ]
    _look_at_key(look, computed, origins, looks_fine=looks_fine)
    if looks_fine:
        key_is_fine = len(look.found.findings) == found_before
        watched = _look_at_tables(look, links.scans)
        if key_is_fine and "Recursive Union" not in found:
            _look_at_links(look, links, watched, key)
        _look_at_bodies(look, plan, links.scans)


def _add(look: Look, why: str, todo: str = "") -> None:
    look.add("problem", f"watch: {why}; a delta misses such changes", todo or "leave watch out, or change the query")


def _hint(look: Look, why: str, todo: str) -> None:
    look.add("hint", f"watch: {why}; a delta may miss such changes", todo)


def _look_at_tables(look: Look, scans: Sequence[Scan]) -> dict[tuple[str, str], list[int]]:
    """Add a problem for each table that is not watched; return the watched tables.

    :returns: the numbers of the watches that hold each table.
    """
    scanned = sorted({(scan.schema, scan.table) for scan in scans})
    watched: dict[tuple[str, str], list[int]] = {}
    for schema, name, table, kind, watches in _relations(look, scanned):
        if watches:
            watched[schema, name] = watches
        else:
            _add_unwatched(look, table, kind, f"{table} is read and not watched")
    return watched


def _add_unwatched(look: Look, table: str, kind: str, why: str) -> None:
    if kind in _KINDS:
        _add(look, f"{table} {_KINDS[kind]}")
    else:
        _add(look, why, f"watch {table} too, by the columns that hold the key")


def _relations(look: Look, names: Collection[tuple[str, str]]) -> list[tuple[str, str, str, str, list[int]]]:
    """Return the schema, name, quoted name, kind and watches of each relation.

    A watch is included if it holds the relation or a table above it.
    """
    look.cursor.execute(
        """
        WITH RECURSIVE named AS (
            SELECT c.oid, n.nspname::text AS schema, c.relname::text AS table, c.relkind::text AS kind
            FROM unnest(%s::text[], %s::text[]) AS u (schema, name)
            JOIN pg_namespace AS n ON n.nspname = u.schema AND n.nspname NOT IN ('pg_catalog', 'information_schema')
            JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = u.name
        ), above AS (
            SELECT oid, oid AS ancestor FROM named
            UNION
            SELECT a.oid, i.inhparent FROM above AS a JOIN pg_inherits AS i ON i.inhrelid = a.ancestor
        )
        SELECT n.schema, n.table, format('%%I.%%I', n.schema, n.table), n.kind, ARRAY(
            SELECT DISTINCT w.place::int - 1 FROM above AS a
            JOIN unnest(%s::text[]) WITH ORDINALITY AS w (name, place) ON a.ancestor = to_regclass(w.name)::oid
            WHERE a.oid = n.oid)
        FROM named AS n ORDER BY 3
        """,
        (
            [schema for schema, _ in names],
            [name for _, name in names],
            [watch.table for watch in look.dataset.watch],
        ),
    )
    found: list[tuple[str, str, str, str, list[int]]] = look.cursor.fetchall()
    return found


def _look_at_links(
    look: Look, links: Links, watched: Mapping[tuple[str, str], Sequence[int]], key: Sequence[Value | None]
) -> None:
    """Add each scan of a watched table that may change documents of unrecorded keys.

    Its rows then belong to other keys than the keys that its triggers record.
    """
    if not all(key):
        _add(
            look,
            f"the key {', '.join(look.dataset.key)} is an expression, and triggers record values of columns",
            "take a column of the watched table as key",
        )
        return
    values: list[Value] = [value for value in key if value is not None]
    reported: set[str] = set()
    for scan in links.scans:
        watches = [look.dataset.watch[number] for number in watched.get((scan.schema, scan.table), ())]
        if not watches or any(
            all(links.linked((scan.alias, column), value) for column, value in zip(watch.key, values, strict=True))
            for watch in watches
        ):
            continue
        if links.ties_by_one_or_another(scan, [watch.key for watch in watches], values):
            continue
        watch = watches[0]
        if watch.table in reported:
            continue
        reported.add(watch.table)
        columns = ", ".join(watch.key)
        why = f"rows of {watch.table} whose {columns} is not its {', '.join(look.dataset.key)}"
        todo = f"watch {watch.table} by columns that hold the key, leave watch out, or change the query"
        if (
            links.is_certain
            and not scan.looked_up
            and (not links.compares_others_alone(scan, watch.key, values) or _is_unique(look, watch.table, watch.key))
        ):
            _add(look, f"a row depends on {why}", todo)
        else:
            _hint(look, f"a row seems to depend on {why}", todo)


def _is_unique(look: Look, table: str, columns: Sequence[str]) -> bool:
    """Return whether `columns` are unique in the table."""
    look.cursor.execute(
        """
        SELECT EXISTS (
            SELECT FROM pg_index AS i
            WHERE i.indrelid = to_regclass(%s)::oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
              AND NOT EXISTS (
                  SELECT FROM unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) AS k (number)
                  LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number
                  WHERE k.number = 0 OR a.attname <> ALL (%s::name[])))
        """,
        (table, list(columns)),
    )
    (unique,) = look.cursor.fetchone()
    return bool(unique)


def _look_at_bodies(look: Look, plan: PlanNode, scans: Sequence[Scan]) -> None:
    readings: dict[tuple[str, str], Reading] = {}
    for reading in tables_of_functions(look, _called(plan)):
        other = readings.setdefault((reading.schema, reading.table), reading)
        if reading.certain and not other.certain:
            readings[reading.schema, reading.table] = reading
    scanned = {(scan.schema, scan.table) for scan in scans}
    for schema, name, table, kind, watches in _relations(look, list(readings)):
        reading = readings[schema, name]
        if watches:
            _hint(
                look,
                f"{reading.function} reads {table}, and may read rows with another key",
                f"check that it reads only rows of {table} with the key of the row",
            )
        elif (schema, name) in scanned:
            continue
        elif reading.certain:
            _add_unwatched(look, table, kind, f"{table} is read by {reading.function} and not watched")
        else:
            _hint(
                look,
                f"{reading.function} names {table}, which is not watched",
                f"watch {table} too if the function reads it",
            )


def _called(plan: PlanNode) -> set[Call]:
    functions = {
        Call(node.get("Schema"), str(node["Function Name"])) for node in nodes(plan) if "Function Name" in node
    }
    return functions.union(*map(calls_in, _expressions(plan)))


def _look_at_functions(look: Look, plan: PlanNode) -> None:
    calls = _called(plan)
    certain, possible = volatile(look, calls)
    builtin = {call.name for call in calls if call.is_builtin}
    changing = {*certain, *(builtin & (_CLOCKS | _STATES)), *(n for n in builtin if n.startswith(_STATISTICS))}
    shown = [f"{name}()" for name in sorted(changing)]
    texts = map(without_strings, _expressions(plan))
    shown += sorted({word for text in texts for word in _CLOCK_WORDS.findall(text)})
    if shown:
        _add(look, f"the value of {', '.join(shown)} changes by itself")
    if unsure := [f"{name}()" for name in possible if name not in changing]:
        _hint(
            look,
            f"a function named {' or '.join(unsure)} is VOLATILE, so its value may change by itself",
            "declare the function IMMUTABLE or STABLE if its value depends on its arguments and watched rows alone",
        )
    # PostgreSQL replaces these words by the time of planning, so the plan shows a constant.
    if moments := sorted({word.lower() for word in _MOMENTS.findall(without_comments(look.dataset.query))}):
        words = " and ".join(f"'{word}'" for word in moments)
        _hint(
            look,
            f"the value of {words} changes by itself if it is read as a date or a time",
            "leave watch out, unless it is compared with text",
        )


def _expressions(plan: PlanNode) -> Iterator[str]:
    for node in nodes(plan):
        for field in _EXPRESSIONS:
            value = node.get(field, ())
            yield from [value] if isinstance(value, str) else map(str, value)


def _key_column(plan: PlanNode, links: Links, place: int, *, of_sets: bool) -> Value | None:
    if of_sets:
        # A member may cast its column to the common type of all members, or have a constant instead.
        for value in map(value_of, sources_of(plan, place)):
            if value is not None and value[0]:
                return value
    output = output_of(plan)
    return links.column_behind(output[place]) if place < len(output) else None


def _holds_columns(plan: PlanNode, place: int) -> bool:
    """Return whether an output column is a table's column in each member of a UNION.

    True also if it only seems so.
    """
    output = output_of(plan)
    expressions = [*output[place : place + 1], *sources_of(plan, place)]
    return not any(map(is_expression, expressions))


def _look_at_key(
    look: Look, computed: Sequence[str], origins: Sequence[tuple[int | None, int | None]], *, looks_fine: bool
) -> None:
    """Add the problems of the key itself.

    :param computed: the columns of the key that are expressions.
    """
    if computed:
        if looks_fine:
            _add(
                look,
                f"the key {', '.join(computed)} is an expression, and triggers record values of columns",
                "take a column of the watched table as key",
            )
        return
    if not all(table for table, _ in origins):
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
