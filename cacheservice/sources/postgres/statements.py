"""The SQL around a dataset's query and probe, whose text is not changed."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.base.query_text import without_semicolon
from cacheservice.sources.postgres.keys import KeyForm
from cacheservice.sources.postgres.quoting import quoted

_PLAIN = KeyForm()
FEW_ROWS = 500
"""The most rows that are read in one answer. More rows need a cursor: three more statements, and no parallel plan."""


def rows_query(query: str, key: Sequence[str], form: KeyForm = _PLAIN) -> str:
    """Return the SQL for (key, document) of each row.

    PostgreSQL renders both, so values look as it shows them.
    """
    columns = form.sql([f"q.{quoted(column)}" for column in key])
    # q.* is the whole row even if a column is named q.
    return f"SELECT {columns}, row_to_json(q.*)::text FROM (\n{without_semicolon(query)}\n) AS q"  # noqa: S608  # the operator's own query


def first_rows(select: str, most: int) -> str:
    """Return the SQL for at most `most` rows, with the best plan for all rows.

    With a LIMIT in the SELECT itself, the planner prefers a plan that finds the first row soonest. If there are no
    further rows, that plan may take longer than another plan takes for all rows.
    """
    return f"WITH r AS MATERIALIZED (\n{select}\n) SELECT * FROM r LIMIT {most}"  # noqa: S608  # made here


def small_answer(rows: str, most: int, most_bytes: int) -> str:
    """Return the SQL for (key, document) of at most `most` + 1 rows.

    It is planned as in `first_rows`. If the documents exceed `most_bytes` in all, the last ones are NULL.

    :param rows: the SQL of `rows_query`, perhaps with a condition.
    """
    total = "sum(octet_length(document)) OVER (ROWS UNBOUNDED PRECEDING)"
    return (
        f"WITH r (key, document) AS MATERIALIZED (\n{rows}\n) "  # noqa: S608  # made here
        f"SELECT key, CASE WHEN {total} <= {most_bytes} THEN document END FROM r LIMIT {most + 1}"
    )


def columns_query(query: str) -> str:
    """Return the SQL whose result has the query's columns and no rows.

    PostgreSQL plans the query and does not run it.
    """
    return f"{whole_query(query)} LIMIT 0"


def whole_query(query: str) -> str:
    """Return the SQL for the query's rows with its columns."""
    return f"SELECT * FROM (\n{without_semicolon(query)}\n) AS q"  # noqa: S608  # the operator's own query


def probe_query(probe: str) -> str:
    """Return the SQL whose only value is the probe's, as text."""
    return f"SELECT (\n{without_semicolon(probe)}\n)::text"
