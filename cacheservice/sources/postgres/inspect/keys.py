"""Checks the dataset's key: its place and uniqueness, and the size of the rows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import psycopg2

from cacheservice.sources.postgres import deltas
from cacheservice.sources.postgres.inspect.failures import finding
from cacheservice.sources.postgres.inspect.findings import Key, Size
from cacheservice.sources.postgres.inspect.look import STATEMENT_TIMEOUT_MS, Look
from cacheservice.sources.postgres.inspect.plans import PlanNode, only_table
from cacheservice.sources.postgres.keys import KeyForm
from cacheservice.sources.postgres.quoting import literal
from cacheservice.sources.postgres.statements import rows_query

_SAMPLE_TIMEOUT_MS = 5000
SAMPLE_ROWS = 10_000


class KeyType(NamedTuple):
    oid: int
    name: str
    is_enum: bool


class Index(NamedTuple):
    name: str
    not_null: bool


class Sample(NamedTuple):
    """Statistics of up to `SAMPLE_ROWS` rows."""

    rows: int
    distinct: int
    nulls: int
    longest_key: int | None
    document_bytes: Decimal | None
    separated: int = 0
    """Rows with the separator within a value of the key."""

    @property
    def is_all(self) -> bool:
        return self.rows < SAMPLE_ROWS


def types_of(look: Look, oids: Sequence[int]) -> list[KeyType]:
    look.cursor.execute(
        "SELECT o.oid, format_type(o.oid, NULL), t.typtype = 'e' "
        "FROM unnest(%s::oid[]) WITH ORDINALITY AS o (oid, place) JOIN pg_type AS t ON t.oid = o.oid "
        "ORDER BY o.place",
        (list(oids),),
    )
    return [KeyType(*row) for row in look.cursor.fetchall()]


def warn_of_same_names(look: Look) -> None:
    names = [column.name for column in look.found.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        look.add("hint", f"columns of the same name: {', '.join(twice)}", "rename one with AS")


def key_places(look: Look) -> list[int] | None:
    """Return the places of the key's columns; None if a column is missing."""
    names = [column.name for column in look.found.columns]
    missing = [column for column in look.dataset.key if column not in names]
    for column in missing:
        near = difflib.get_close_matches(column, names, 1)
        todo = f'did you mean "{near[0]}"?' if near else f"the query has {', '.join(names) or 'no columns'}"
        look.add("problem", f"key: the query has no column {column}", todo)
    return None if missing else [names.index(column) for column in look.dataset.key]


def unique_index(look: Look, plan: PlanNode, origins: Sequence[tuple[int | None, int | None]]) -> Index | None:
    """Return the unique index that makes the key unique.

    That is only known if each row of the query is a row of a single table.
    """
    table_oid = origins[0][0]
    if not table_oid or any(oid != table_oid for oid, _ in origins):
        return None
    scanned = only_table(plan)
    if scanned is None:
        return None
    look.cursor.execute(
        "SELECT c.oid FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace "
        "WHERE (n.nspname, c.relname) = (%s, %s)",
        scanned,
    )
    if look.cursor.fetchone() != (table_oid,):
        return None
    look.cursor.execute(
        """
        SELECT i.indexrelid::regclass::text,
               (SELECT bool_and(a.attnotnull) FROM pg_attribute AS a
                WHERE a.attrelid = i.indrelid AND a.attnum = ANY (%(columns)s::smallint[]))
        FROM pg_index AS i
        WHERE i.indrelid = %(table)s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
          -- The columns after indnkeyatts are only INCLUDEd; 0 is an expression.
          AND (i.indkey::smallint[])[0:i.indnkeyatts - 1] <@ %(columns)s::smallint[]
        ORDER BY i.indisprimary DESC, 1 LIMIT 1
        """,
        {"table": table_oid, "columns": [number for _, number in origins]},
    )
    row = look.cursor.fetchone()
    return Index(*row) if row else None


def take_sample(look: Look) -> Sample | None:
    """Return statistics of some rows of the query.

    None, and a hint, if they could not be read in time.
    """
    look.cursor.execute("SAVEPOINT sample")
    try:
        look.cursor.execute(f"SET LOCAL statement_timeout = {_SAMPLE_TIMEOUT_MS}")
        rows = f"{rows_query(look.dataset.query, look.dataset.key, KeyForm.of(look.dataset))} LIMIT {SAMPLE_ROWS}"
        look.cursor.execute(
            "SELECT count(*), count(DISTINCT s.key), count(*) FILTER (WHERE s.key IS NULL), "  # noqa: S608
            f"max(octet_length(s.key)), avg(octet_length(s.document)), {_separated(look)} "
            f"FROM ({rows}) AS s (key, document)"
        )
        return Sample(*look.cursor.fetchone())
    except psycopg2.Error as error:
        if look.connection.closed:
            raise
        look.cursor.execute("ROLLBACK TO SAVEPOINT sample")
        if error.pgcode == "57014":
            text = f"no {SAMPLE_ROWS:,} rows of it came within {_SAMPLE_TIMEOUT_MS // 1000} s; its deadline is "
            look.add("hint", f"{text}timeout_s = {look.dataset.timeout_s:g}", "check that it is long enough")
        else:
            look.found.findings.append(finding(look, "the rows", error))
        return None
    finally:
        if not look.connection.closed:
            look.cursor.execute(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}")


def _separated(look: Look) -> str:
    """Return the SQL for the number of keys that could be split in several ways."""
    form = KeyForm.of(look.dataset)
    if form.escaped or len(look.dataset.key) == 1:
        return "0"
    pieces = f"cardinality(string_to_array(s.key, {literal(form.separator)}))"
    return f"count(*) FILTER (WHERE {pieces} > {len(look.dataset.key)})"


def warn_of_collisions(look: Look, types: Sequence[KeyType], sample: Sample | None) -> None:
    """Add a hint if two rows may have the same key because of the separator.

    That is possible if their values contain it.
    """
    able = [column for column, kind in zip(look.dataset.key, types, strict=True) if deltas.may_hold_text(kind.oid)]
    # If only one column may hold the separator, a joined key can be split in only one way.
    if sample is None or not sample.separated or len(able) < 2:
        return
    separator = look.dataset.key_separator
    look.add(
        "hint",
        f'key: {sample.separated:,} of {sample.rows:,} rows have "{separator}" within {" or ".join(able)}: two rows '
        "with the same joined key would fail each refresh",
        "set key_separator to text that no value holds, or key_escape = true",
    )


def judge_size(look: Look, plan: PlanNode, sample: Sample | None) -> None:
    rows, row_bytes = int(plan["Plan Rows"]), int(plan["Plan Width"])
    if sample is not None and sample.is_all:
        rows = sample.rows
    elif sample is not None:
        rows = max(rows, sample.rows)
    document_bytes = round(sample.document_bytes) if sample and sample.document_bytes is not None else None
    size = Size(rows, row_bytes, document_bytes, float(plan["Total Cost"]))
    look.found.note_size(size)
    dataset = look.dataset
    if dataset.max_rows and size.rows > dataset.max_rows:
        look.add(
            "problem", f"about {size.rows:,} rows exceed max_rows = {dataset.max_rows:,}", "raise it, or select less"
        )
    if dataset.max_bytes and size.bytes > dataset.max_bytes:
        look.add(
            "problem",
            f"about {size.bytes:,} bytes exceed max_bytes = {dataset.max_bytes:,}",
            "raise it, or select less",
        )
    if sample is not None and sample.is_all and sample.rows < dataset.min_rows:
        look.add("problem", f"{sample.rows:,} rows are fewer than min_rows = {dataset.min_rows:,}: it would be held")


def judge_key(
    look: Look, places: Sequence[int], types: Sequence[KeyType], index: Index | None, sample: Sample | None
) -> Key:
    columns = tuple(look.found.columns[place] for place in places)
    fit = all(deltas.is_fit(kind.oid, is_enum=kind.is_enum) for kind in types)
    warn_of_collisions(look, types, sample)
    if sample is not None and sample.nulls:
        look.add("problem", f"the key is NULL in {sample.nulls:,} of {sample.rows:,} rows", "leave them out with WHERE")
    elif index is not None and not index.not_null:
        look.add(
            "hint", "the key may become NULL, and then a refresh fails", "make the column NOT NULL, or leave them out"
        )
    if sample is not None and sample.longest_key is not None and sample.longest_key > 65536:
        look.add("problem", "a key is longer than 64 KiB", "choose another key")
    if index is not None:
        return Key(columns, True, f"unique index {index.name}", fit)
    if sample is None:
        return Key(columns, None, "neither an index nor a sample shows it", fit)
    how = f"all {sample.rows:,} rows counted" if sample.is_all else f"counted in a sample of {sample.rows:,} rows"
    twice = sample.rows - sample.nulls - sample.distinct
    if twice:
        look.add(
            "problem", f"the key is not unique: {twice:,} rows of {sample.rows:,} repeat one", "add a column to key"
        )
    return Key(columns, not twice, how, fit)
