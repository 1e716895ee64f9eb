"""The SQL around a dataset's query and probe, whose text stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.postgres.keys import KeyForm
from cacheservice.query_text import without_semicolon

_PLAIN = KeyForm()
FEW_ROWS = 500
"""The most rows that are read in one answer. More need a cursor: three more statements, and no parallel plan."""


def rows_query(query: str, key: Sequence[str], form: KeyForm = _PLAIN) -> str:
    """The SQL that gives (key, document) of each row: PostgreSQL renders both, so types look as it shows them."""
    columns = form.sql([f"q.{quoted(column)}" for column in key])
    # q.* is the whole row even where a column is named q.
    return f"SELECT {columns}, row_to_json(q.*)::text FROM (\n{without_semicolon(query)}\n) AS q"  # noqa: S608  # the operator's own query


def first_rows(select: str, most: int) -> str:
    """The SQL that gives at most `most` rows of a SELECT, by the plan that is best for all of them.

    A LIMIT of the SELECT itself makes the planner look for the plan that has a first row soonest, and to find no more
    with that may take longer than all rows by another.
    """
    return f"WITH r AS MATERIALIZED (\n{select}\n) SELECT * FROM r LIMIT {most}"  # noqa: S608  # made here


def small_answer(rows: str, most: int, most_bytes: int) -> str:
    """The SQL that gives (key, document) of at most one row more than `most`, planned as that of `first_rows`.

    Where documents have more than `most_bytes` in all, the last ones are NULL.

    :param rows: what `rows_query` gives, perhaps with a condition.
    """
    total = "sum(octet_length(document)) OVER (ROWS UNBOUNDED PRECEDING)"
    return (
        f"WITH r (key, document) AS MATERIALIZED (\n{rows}\n) "  # noqa: S608  # made here
        f"SELECT key, CASE WHEN {total} <= {most_bytes} THEN document END FROM r LIMIT {most + 1}"
    )


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
