"""The plan of the query, and its facts about the tables that it reads."""

from __future__ import annotations

import json

from cacheservice.sources.postgres.inspect.failures import step
from cacheservice.sources.postgres.inspect.look import Look
from cacheservice.sources.postgres.inspect.plans import PlanNode, nodes, scanned_table, worst_node
from cacheservice.sources.postgres.statements import FEW_ROWS, whole_query


def explain(look: Look) -> PlanNode | None:
    with step(look, "EXPLAIN"):
        query = whole_query(look.dataset.query)
        plan = _plan(look, query)
        if int(plan["Plan Rows"]) > FEW_ROWS:
            # A refresh reads that many rows through a cursor, for which the planner makes no parallel plan.
            plan = _plan(look, f"DECLARE rows NO SCROLL CURSOR FOR {query}")
        look.found.note_worst(worst_node(plan))
        _warn_of_tables(look, plan)
        return plan
    return None


def _plan(look: Look, statement: str) -> PlanNode:
    look.cursor.execute(f"EXPLAIN (FORMAT JSON, VERBOSE) {statement}")
    (answer,) = look.cursor.fetchone()
    plan: PlanNode = (answer if isinstance(answer, list) else json.loads(answer))[0]["Plan"]
    return plan


def _warn_of_tables(look: Look, plan: PlanNode) -> None:
    """Add hints about tables that the result does not show.

    These are rows that are hidden, and estimates that are guesses.
    """
    scanned = sorted({scanned_table(node) for node in nodes(plan) if "Relation Name" in node})
    # By name, not to_regclass: behind a view there may be a schema that the role may not use.
    look.cursor.execute(
        """
        SELECT format('%%I.%%I', n.nspname, c.relname), row_security_active(c.oid), c.reltuples < 0
        FROM unnest(%s::text[], %s::text[]) AS u (schema, name)
        JOIN pg_namespace AS n ON n.nspname = u.schema
        JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = u.name
        ORDER BY 1
        """,
        ([schema for schema, _ in scanned], [name for _, name in scanned]),
    )
    for table, hidden, unknown in look.cursor.fetchall():
        if hidden:
            text = f"row security is active on {table}: {look.server.role} gets only the rows that its policies allow"
            look.add("hint", text, "check that these are all the rows that you need")
        if unknown:
            text = f"{table} has never been analyzed: rows, bytes and cost are guesses"
            look.add("hint", text, f"ANALYZE {table};")
