"""What a reading transaction has to know of the watched tables before it may use the stream of their changes.

One statement asks the catalogs, within the transaction, for the position in the log up to which changes must be known,
for the publication, and for each watched table. `problem` finds why the stream cannot show all changes of a dataset,
and `state` describes what must not have changed between two reads. Both are pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres.quoting import literal

_SCHEMAS_SINCE = _FILTERS_SINCE = 150000
"""FOR TABLES IN SCHEMA, row filters and column lists came with PostgreSQL 15."""

# The row versions (xmin) show whether a definition was changed and changed back between two reads. What a change of the
# replica identity means for a transaction is known from the stream itself, which describes a table again after it.
_ASK = """
WITH RECURSIVE watch (place, oid) AS (VALUES {watches}),
below (place, oid, link) AS (
    SELECT w.place, w.oid, '' FROM watch AS w WHERE w.oid IS NOT NULL
    UNION
    SELECT b.place, i.inhrelid, concat(i.inhparent, '/', i.xmin)
    FROM below AS b JOIN pg_inherits AS i ON i.inhparent = b.oid
),
above (place, oid, link) AS (
    SELECT w.place, w.oid, '' FROM watch AS w WHERE w.oid IS NOT NULL
    UNION
    SELECT a.place, i.inhparent, concat(i.inhrelid, '/', i.xmin)
    FROM above AS a JOIN pg_class AS c ON c.oid = a.oid AND c.relispartition JOIN pg_inherits AS i ON i.inhrelid = a.oid
),
published AS (SELECT p.*, p.xmin AS version FROM pg_publication AS p WHERE p.pubname = {publication}),
entry (oid, version, relation, narrowed, columns) AS (
    SELECT r.oid, r.xmin, r.prrelid, {narrowed}, {columns}
    FROM published AS p JOIN pg_publication_rel AS r ON r.prpubid = p.oid
),
schema_entry (oid, version, namespace) AS ({schemas})
SELECT
    CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END::text,
    EXISTS (SELECT FROM pg_replication_slots AS s WHERE s.slot_name = {slot}),
    (SELECT jsonb_build_object(
        'version', concat(p.oid, '/', p.version), 'all', p.puballtables,
        'publishes', p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate) FROM published AS p)::text,
    (SELECT jsonb_agg(jsonb_build_object(
        'place', w.place,
        'oid', w.oid::bigint,
        'columns', (
            SELECT jsonb_agg(concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod,
                CASE WHEN a.attgenerated <> '' THEN (
                    SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef AS d
                    WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum) END) ORDER BY a.attnum)
            FROM pg_attribute AS a WHERE a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped),
        'key_types', (
            SELECT jsonb_object_agg(a.attname, CASE WHEN a.attgenerated <> '' THEN 0
                                                    WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END::bigint)
            FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
            WHERE a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped),
        'above', (
            SELECT jsonb_agg(jsonb_build_array(a.oid::bigint, a.link) ORDER BY a.oid, a.link)
            FROM above AS a WHERE a.place = w.place),
        'entries', (
            SELECT jsonb_agg(jsonb_build_array(
                concat(e.oid, '/', e.version), e.relation::regclass::text, e.narrowed,
                (SELECT jsonb_agg(a.attname) FROM pg_attribute AS a
                 WHERE a.attrelid = e.relation AND a.attnum = ANY (e.columns))) ORDER BY e.oid)
            FROM entry AS e
            WHERE e.relation IN (SELECT b.oid FROM below AS b WHERE b.place = w.place
                                 UNION ALL SELECT a.oid FROM above AS a WHERE a.place = w.place)),
        'schemas', (SELECT jsonb_agg(concat(s.oid, '/', s.version) ORDER BY s.oid) FROM schema_entry AS s),
        'members', (
            SELECT jsonb_agg(jsonb_build_object(
                'oid', c.oid::bigint, 'name', c.oid::regclass::text, 'kind', c.relkind, 'permanence', c.relpersistence,
                'link', b.link, 'storage', c.relfilenode::bigint,
                'moved', CASE WHEN EXISTS (SELECT FROM schema_entry) THEN c.xmin::text END,
                'published', (SELECT p.puballtables FROM published AS p) OR EXISTS (
                    SELECT FROM pg_class AS o
                    WHERE (o.oid = c.oid OR c.relispartition AND o.oid IN (
                               SELECT a.relid FROM pg_partition_ancestors(c.oid) AS a (relid)))
                      AND (o.oid IN (SELECT e.relation FROM entry AS e)
                           OR o.relnamespace IN (SELECT s.namespace FROM schema_entry AS s))),
                'identity', CASE c.relreplident
                    WHEN 'n' THEN '[]'
                    WHEN 'f' THEN NULL
                    ELSE coalesce((
                        SELECT jsonb_agg(a.attname) FROM pg_index AS x JOIN pg_attribute AS a
                          ON a.attrelid = c.oid AND a.attnum = ANY (x.indkey)
                        WHERE x.indrelid = c.oid AND x.indisvalid AND x.indimmediate
                          AND CASE c.relreplident WHEN 'i' THEN x.indisreplident ELSE x.indisprimary END), '[]')
                END) ORDER BY c.oid, b.link)
            FROM below AS b JOIN pg_class AS c ON c.oid = b.oid WHERE b.place = w.place)
        ) ORDER BY w.place) FROM watch AS w)::text"""
_ROWS = "rp"
"""The kinds of relations whose changes are in the log: tables, and partitioned tables above them."""
_BOOLEAN = 16


class Facts(NamedTuple):
    """The answer to the statement.

    :param lsn: the position in the log before which all transactions that the snapshot includes have committed.
    :param is_here: whether the slot of the stream is on this server.
    :param publication: None if there is none of that name.
    :param tables: for each entry of `watch`, in their order.
    """

    lsn: str
    is_here: bool
    publication: Mapping[str, Any] | None
    tables: Sequence[Mapping[str, Any]]


def facts_sql(dataset: DatasetSettings, publication: str, slot: str, server_version: int) -> str:
    """Return the statement for a dataset."""
    watches = ", ".join(
        f"({place}, to_regclass({literal(watch.table)})::oid)" for place, watch in enumerate(dataset.watch)
    )
    has_schemas, has_filters = server_version >= _SCHEMAS_SINCE, server_version >= _FILTERS_SINCE
    return _ASK.format(
        watches=watches,
        publication=literal(publication),
        slot=literal(slot),
        narrowed="r.prqual IS NOT NULL" if has_filters else "false",
        columns="r.prattrs::int2[]" if has_filters else "NULL::int2[]",
        schemas="SELECT n.oid, n.xmin, n.pnnspid FROM published AS p "
        "JOIN pg_publication_namespace AS n ON n.pnpubid = p.oid"
        if has_schemas
        else "SELECT NULL::oid, NULL::xid, NULL::oid WHERE false",
    )


def facts(answer: Sequence[Any]) -> Facts:
    """Return the meaning of the answer's row."""
    lsn, is_here, publication, tables = answer
    return Facts(
        lsn.decode() if isinstance(lsn, bytes) else lsn,
        is_here,
        None if publication is None else json.loads(publication),
        json.loads(tables or "[]"),
    )


def problem(found: Facts, dataset: DatasetSettings, publication: str) -> str | None:
    """Return why the stream cannot show all changes of a dataset's tables, with the next step; None if it can."""
    if found.publication is None:
        table, key = dataset.watch[0].table, dataset.watch[0].key
        return f"there is no publication {publication}; run {watch_command(table, key)}"
    if not found.publication["publishes"]:
        return (
            f"the publication {publication} does not publish all kinds of changes; run ALTER PUBLICATION {publication} "
            "SET (publish = 'insert, update, delete, truncate')"
        )
    for each, watch in zip(found.tables, dataset.watch, strict=True):
        if (why := _problem(each, watch.table, watch.key, publication)) is not None:
            return why
    return None


def _problem(found: Mapping[str, Any], name: str, key: Sequence[str], publication: str) -> str | None:
    if found["oid"] is None:
        return f"there is no table {name}"
    for column in key:
        if column not in found["key_types"]:
            return f"{name} has no column {column}; watch it by another key, in the configuration"
        if not found["key_types"][column]:
            return f"{name}: the column {column} is generated and not in the log; watch a stored column"
    for member in found["members"]:
        if (why := _problem_of_member(member, name, key, publication)) is not None:
            return why
    for _, relation, is_narrowed, columns in found["entries"] or ():
        if is_narrowed:
            return f"the publication {publication} filters the rows of {relation}; name another one"
        if columns is not None and not set(key) <= set(columns):
            return f"the publication {publication} leaves out the key of {relation}; add it to its list of columns"
    return None


def _problem_of_member(found: Mapping[str, Any], name: str, key: Sequence[str], publication: str) -> str | None:
    """Return the problem of a table, or of a partition or child of it."""
    member = found["name"]
    if found["kind"] not in _ROWS:
        return f"{member}, which belongs to {name}, is not a table whose changes are in the log"
    if found["permanence"] != "p":
        return f"{member} is unlogged or temporary; run ALTER TABLE {member} SET LOGGED"
    if found["kind"] != "r":
        return None
    if not found["published"]:
        return f"{member} is not in the publication {publication}; run {watch_command(name, key)}, which adds it"
    if found["identity"] is not None and not set(key) <= set(found["identity"]):
        return (
            f"the replica identity of {member} does not contain {', '.join(key)}; "
            f"run ALTER TABLE {member} REPLICA IDENTITY FULL, or use an index that contains the key"
        )
    return None


def watch_command(table: str, key: Sequence[str]) -> str:
    """Return the command that adds a table to the publication."""
    return f"cacheservice watch --logical {table}{''.join(f' --key {column}' for column in key)}"


def state(found: Facts, dataset: DatasetSettings) -> dict[str, object]:
    """Return what must be equal at both ends of a delta, as JSON."""
    assert found.publication is not None, "a dataset with a problem has no state"
    return {
        "publication": found.publication["version"],
        "tables": {
            watch.table: {
                "oid": table["oid"],
                "key": list(watch.key),
                "columns": table["columns"],
                "above": table["above"],
                "entries": [entry[0] for entry in table["entries"] or ()],
                "schemas": table["schemas"],
                "members": [[each["oid"], each["storage"], each["link"], each["moved"]] for each in table["members"]],
            }
            for table, watch in zip(found.tables, dataset.watch, strict=True)
        },
    }


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return why changes between two states are not known; None if both are equal."""
    if before["publication"] != now["publication"]:
        return "the publication was changed or created again"
    for name, table in now["tables"].items():
        was = before["tables"].get(name)
        if was is None or was["key"] != table["key"]:
            return f"{name} has been watched by that key only since the last refresh"
        if was["entries"] != table["entries"] or was["schemas"] != table["schemas"]:
            return f"{name} was removed from the publication or added to it"
        if [each[1] for each in was["members"]] != [each[1] for each in table["members"]] and (
            was | {"members": [[*each[:1], *each[2:]] for each in was["members"]]}
            == table | {"members": [[*each[:1], *each[2:]] for each in table["members"]]}
        ):
            return f"{name} was truncated or rewritten"
        if was != table:
            return f"the definition, the storage or the partitions of {name} changed"
    return None


class Sent(NamedTuple):
    """The relations under which the changes of a watched table are sent, and its key.

    :param tables: those that hold rows; what is sent of their old rows depends on their replica identities.
    :param above: partitioned tables. With publish_via_partition_root, changes of partitions are sent as changes of one
        of these.
    :param booleans: the places in the key whose values are sent as t or f.
    """

    tables: frozenset[int]
    above: frozenset[int]
    key: tuple[str, ...]
    booleans: frozenset[int]

    @property
    def oids(self) -> frozenset[int]:
        return self.tables | self.above


def sent(found: Facts, dataset: DatasetSettings) -> tuple[Sent, ...]:
    """Return how the changes of each watched table are sent."""
    return tuple(
        Sent(
            tables=frozenset(each["oid"] for each in table["members"] if each["kind"] == "r"),
            above=frozenset(each["oid"] for each in table["members"] if each["kind"] == "p")
            | frozenset(oid for oid, _ in table["above"] if oid != table["oid"]),
            key=tuple(watch.key),
            booleans=frozenset(
                place for place, column in enumerate(watch.key) if table["key_types"][column] == _BOOLEAN
            ),
        )
        for table, watch in zip(found.tables, dataset.watch, strict=True)
    )
