"""Checks that the write-ahead log holds the keys of deleted rows and of old versions.

PostgreSQL writes only the columns of a table's replica identity of such rows. It is the primary key (DEFAULT), a unique
index (USING INDEX), the whole row (FULL) or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from psycopg2 import sql

from cacheservice.base.errors import WatchFailed
from cacheservice.sources.postgres.admin import Session
from cacheservice.sources.postgres.tables import Member


class Index(NamedTuple):
    """A unique index that PostgreSQL accepts as a replica identity, or would if no column could be NULL.

    :param name: quoted for SQL.
    :param is_chosen: whether REPLICA IDENTITY USING INDEX names it.
    """

    name: str
    columns: tuple[str, ...]
    is_primary: bool
    is_chosen: bool
    has_nulls: bool


_INDEXES = """
SELECT i.indrelid, c.relname, k.columns, i.indisprimary, i.indisreplident, k.has_nulls
FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
CROSS JOIN LATERAL (
    SELECT array_agg(a.attname::text ORDER BY u.place) AS columns, NOT bool_and(a.attnotnull) AS has_nulls
    FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS u (attnum, place)
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
    WHERE u.place <= i.indnkeyatts
) AS k
WHERE i.indrelid = ANY (%s::oid[]) AND i.indisunique AND i.indisvalid AND i.indimmediate
  AND i.indpred IS NULL AND i.indexprs IS NULL
ORDER BY i.indrelid, c.relname
"""


def require_key(session: Session, members: Sequence[Member], key: Sequence[str]) -> None:
    """Check that the replica identity of a table and of all tables below it contains the key.

    :param members: the table first.
    :raises WatchFailed: with the statements that change those that do not.
    """
    # A partitioned table below another one holds no rows, and the table itself stands for its partitions.
    checked = [member for member in members if member is members[0] or member.kind == "r"]
    indexes: dict[int, list[Index]] = {member.oid: [] for member in checked}
    for oid, name, columns, *rest in session.rows(_INDEXES, (list(indexes),)):
        indexes[oid].append(Index(sql.Identifier(name).as_string(session.cursor), tuple(columns), *rest))
    lacking = [member for member in checked if missing(member.identity, indexes[member.oid], key)]
    if not lacking:
        return
    first = lacking[0]
    statements = " ".join(
        f"ALTER TABLE {member.name} REPLICA IDENTITY {better(indexes[member.oid], key)};" for member in lacking
    )
    others = f" (the same applies to {len(lacking) - 1} more tables)" if len(lacking) > 1 else ""
    raise WatchFailed(
        f"{first.name} cannot be published with {', '.join(key)}: "
        f"{_reason(first.identity, indexes[first.oid], key)}{others}; as the owner, run: {statements}"
    )


def missing(identity: str, indexes: Sequence[Index], key: Sequence[str]) -> list[str]:
    """Return the columns of the key that a replica identity lacks.

    :param identity: as in pg_class.relreplident.
    :param indexes: the indexes of the table.
    """
    if identity == "f":
        return []
    index = _index(identity, indexes)
    return [column for column in key if index is None or column not in index.columns]


def better(indexes: Sequence[Index], key: Sequence[str]) -> str:
    """Return the smallest replica identity that contains the key, as ALTER TABLE takes it."""
    usable = [index for index in indexes if not index.has_nulls and set(key) <= set(index.columns)]
    if any(index.is_primary for index in usable):
        return "DEFAULT"
    if usable:
        return f"USING INDEX {min(usable, key=lambda index: len(index.columns)).name}"
    return "FULL"


def _index(identity: str, indexes: Sequence[Index]) -> Index | None:
    """Return the index whose columns are the replica identity; None if there is none."""
    if identity == "d":
        return next((index for index in indexes if index.is_primary), None)
    return next((index for index in indexes if index.is_chosen), None) if identity == "i" else None


def _reason(identity: str, indexes: Sequence[Index], key: Sequence[str]) -> str:
    index = _index(identity, indexes)
    if index is None:
        cause = {"d": "no primary key, or a deferrable one", "n": "REPLICA IDENTITY NOTHING"}
        return (
            f"it lacks a replica identity ({cause.get(identity, 'the index was dropped')}), without which UPDATE and "
            "DELETE of a published table fail"
        )
    kind = "primary key" if index.is_primary and identity == "d" else f"index {index.name}"
    return (
        f"its replica identity, the {kind} ({', '.join(index.columns)}), lacks "
        f"{', '.join(missing(identity, indexes, key))}, so that the log does not hold the keys of deleted rows"
    )
