"""SQL for a delta, and the interpretation of its answers.

`migrations/0002_changes.sql` records and finds the keys that changed. Their rows are then read from the dataset's own
query, with a predicate on its key that PostgreSQL pushes down as far as the query allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from cacheservice.base.errors import BadResult
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.sources.full_or_delta import Changes, Key
from cacheservice.sources.postgres.quoting import literal

# OIDs of pg_type.dat, which never change. Values of these types have the same text exactly if they are equal, whatever
# the settings of the session that renders them. That is not true of numeric (1.0 and 1.00), citext, floats, or dates.
_INTEGERS = frozenset({20, 21, 23, 26})
_TEXTS = frozenset({18, 19, 25, 1043})
_OTHERS = frozenset({16, 2950})

CAN_ASK = """
(SELECT EXISTS (
    SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE n.nspname = 'cacheservice' AND p.proname = 'changes'
      AND has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE')))"""
"""True if this role may call the function; a call without that right would end the transaction."""
CANNOT_ASK = (
    "the database does not know cacheservice.changes, or this role may not call it; "
    "run cacheservice migrate --reader NAME"
)


class ChangedRows:
    """Collects the rows found for some keys, as a `RowsBuilder` does."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes | None] = {}
        self.count = 0
        self.size_bytes = 0

    def add(self, chunk: Sequence[tuple[bytes | None, bytes]]) -> None:
        """Add a chunk of rows.

        :raises BadResult: for a key that was added before.
        """
        for key, document in chunk:
            assert key is not None, "NULL is equal to no key"
            if key in self.rows:
                raise BadResult(f'the key "{key.decode()}" occurs twice; a key must be unique')
            self.rows[key] = document
            self.size_bytes += len(key) + len(document)
        self.count += len(chunk)


def lock_sql(datasets: Iterable[DatasetSettings]) -> str:
    """Return the statement that keeps TRUNCATE away from the watched tables.

    It must run before the transaction takes its snapshot: a TRUNCATE that commits after the snapshot was taken would
    make the table look empty to it (PostgreSQL manual, 13.6).
    """
    tables = dict.fromkeys(watch.table for dataset in datasets for watch in dataset.watch)
    return f"LOCK TABLE {', '.join(tables)} IN ACCESS SHARE MODE;" if tables else ""


def changes_sql(dataset: DatasetSettings, since: Snapshot | None, most_keys: int) -> str:
    """Return the call of `cacheservice.changes` for a dataset.

    :param since: the snapshot that the delta starts from; None to ask for the state alone.
    """
    watches = ", ".join(
        f"jsonb_build_object('table', {literal(watch.table)}, 'relation', to_regclass({literal(watch.table)})::oid, "
        f"'key', {literal(json.dumps(watch.key))}::jsonb)"
        for watch in dataset.watch
    )
    previous = f"{literal(since.database_snapshot)}::pg_snapshot" if since is not None else "NULL"
    return f"SELECT state::text, problem, key FROM cacheservice.changes(jsonb_build_array({watches}), {previous}, {most_keys})"  # noqa: S608, E501  # literals


def changes(answer: Sequence[tuple[bytes | None, ...]], dataset: DatasetSettings, since: Snapshot | None) -> Changes:
    """Return the meaning of the answer to `changes_sql` for a delta from `since`."""
    (state_text, problem, _), *found = answer
    assert state_text is not None, "the first row has the state"
    state = state_text.decode()
    if problem is not None:
        return Changes(state, problem.decode(), ())
    if since is not None and since.watch_state != state and (moved := _moved(since.watch_state, state)) is not None:
        return Changes(state, moved, ())
    if len(dataset.key) == 1:
        keys: tuple[Key, ...] = tuple((None if key is None else key.decode(),) for *_, key in found)
    else:
        keys = tuple(tuple(json.loads(key)) for *_, key in found if key is not None)
    return Changes(state, None, keys)


def _moved(before: str, now: str) -> str | None:
    """Return why changes are not known although all are recorded.

    That is the case if they were recorded on another table, or on a table that was rewritten.
    """
    old, new = json.loads(before or "{}"), json.loads(now)
    if not old.get("tables"):
        return "it is the first read of the watched tables"
    if old.get("kept") != new.get("kept"):
        return "the table of recorded changes was truncated or rewritten, or rights on it have changed"
    for name, table in new["tables"].items():
        was = old["tables"].get(name)
        if was is None or was["watched"] != table["watched"] or was["since"] != table["since"]:
            return f"{name} has been watched only since the last refresh"
        if was["relations"] != table["relations"] or was["columns"] != table["columns"]:
            return f"the definition, the storage or the partitions of {name} changed"
        if was.get("triggers") != table.get("triggers"):
            return f"the triggers of {name} have been changed since the last refresh"
    return None


def key_types_sql(dataset: DatasetSettings, type_oids: Sequence[int]) -> str:
    """Return the query for the types of the key and of the watched tables' keys.

    Domains are resolved to their base types.

    :param type_oids: the types of the query's key columns, as the server describes them.
    """
    asked = [f"({place}, '', {oid}::oid, 0::oid)" for place, oid in enumerate(type_oids)]
    tables = [
        f"SELECT {place}, {literal(watch.table)}::text, a.atttypid, a.attcollation FROM pg_attribute AS a "  # noqa: S608
        f"WHERE a.attrelid = to_regclass({literal(watch.table)}) AND a.attname = {literal(column)}"
        for watch in dataset.watch
        for place, column in enumerate(watch.key)
    ]
    return f"""
WITH RECURSIVE base (place, name, type, collation_oid) AS (
    (VALUES {", ".join(asked)} UNION ALL {" UNION ALL ".join(tables)})
    UNION ALL
    SELECT b.place, b.name, t.typbasetype, b.collation_oid FROM base AS b JOIN pg_type AS t ON t.oid = b.type
    WHERE t.typtype = 'd'
)
SELECT b.place, b.name, b.type::bigint, t.typtype = 'e', coalesce(c.collisdeterministic, true)
FROM base AS b JOIN pg_type AS t ON t.oid = b.type AND t.typtype <> 'd'
LEFT JOIN pg_collation AS c ON c.oid = b.collation_oid ORDER BY b.name, b.place"""  # noqa: S608  # literals


KeyType = tuple[int, bytes | str, int, bool, bool]
"""The place in the key; the table, empty for the query; the type; whether it is an enum; whether it compares bytes."""


def unfit_key(types: Sequence[KeyType], dataset: DatasetSettings) -> str | None:
    """Return why equal keys of the query and its watched tables might look different.

    Deltas would then miss changes.

    :param types: the answer to `key_types_sql`.
    """
    ours = {place: (oid, is_enum) for place, name, oid, is_enum, _ in types if not name}
    for place, name, oid, is_enum, deterministic in types:
        if not name:
            continue
        table, column = name.decode() if isinstance(name, bytes) else name, dataset.key[place]
        if not deterministic:
            return f"the key of {table} has a nondeterministic collation: equal keys may have different texts"
        our_oid, our_enum = ours[place]
        alike = any({our_oid, oid} <= fit for fit in (_INTEGERS, _TEXTS))
        if not alike and not (our_oid == oid and is_fit(oid, is_enum=is_enum and our_enum)):
            return (
                f"the type of its key {column} or of that of {table} is not fit for deltas: both must be integers, "
                "or text, or of one type of uuid, boolean, enum"
            )
    return None


def is_fit(type_oid: int, *, is_enum: bool) -> bool:
    """Return whether deltas can use keys of that type.

    Equal values must have the same text, whatever the session's settings.
    """
    return is_enum or type_oid in _INTEGERS | _TEXTS | _OTHERS


def may_hold_text(type_oid: int) -> bool:
    """Return whether values of that type may hold a separator of keys."""
    return type_oid not in _INTEGERS | _OTHERS


def watched_ids(state: str) -> frozenset[int]:
    """Return the ids of the watched tables in the notifications of their triggers."""
    tables = json.loads(state).get("tables", {}) if state else {}
    return frozenset(table["watched"] for table in tables.values())


def value_of(probe: Any) -> str:
    """Return the result of a probe as it is compared and kept; NULL is a value, too."""
    return "NULL" if probe is None else f"={probe.decode()}"
