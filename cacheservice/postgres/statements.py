"""The SQL around a dataset's query and probe, whose text stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.postgres.keys import KeyForm
from cacheservice.query_text import without_semicolon

_PLAIN = KeyForm()
FEW_ROWS = 500
"""So many rows at most come in one answer, without a cursor, which takes three more and rules out parallel plans."""


def rows_query(query: str, key: Sequence[str], form: KeyForm = _PLAIN) -> str:
    """The SQL that gives (key, document) of each row: PostgreSQL renders both, so types look as it shows them."""
    columns = form.sql([f"q.{quoted(column)}" for column in key])
    # q.* is the whole row even where a column is named q.
    return f"SELECT {columns}, row_to_json(q.*)::text FROM (\n{without_semicolon(query)}\n) AS q"  # noqa: S608  # the operator's own query


def few_rows_query(query: str, key: Sequence[str], form: KeyForm = _PLAIN) -> str:
    """`rows_query` of a result that is thought small: one row more than `FEW_ROWS` says that there are too many."""
    return f"{rows_query(query, key, form)} LIMIT {FEW_ROWS + 1}"


def columns_query(query: str) -> str:
    """The SQL whose result has the query's columns and no row; PostgreSQL plans it and runs nothing."""
    return f"{whole_query(query)} LIMIT 0"


def whole_query(query: str) -> str:
    """The SQL that gives the query's rows with its columns."""
    return f"SELECT * FROM (\n{without_semicolon(query)}\n) AS q"  # noqa: S608  # the operator's own query


def probe_query(probe: str) -> str:
    """The SQL whose one value is the probe's, as text."""
    return f"SELECT (\n{without_semicolon(probe)}\n)::text"


def quoted(identifier: str) -> str:
    """`identifier` as SQL writes it, whatever characters it has."""
    return '"' + identifier.replace('"', '""') + '"'
