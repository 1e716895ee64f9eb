"""Reads the planner's answer to EXPLAIN; pure functions of its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cacheservice.sources.postgres.inspect.findings import Node

PlanNode = Mapping[str, Any]
"""A node of the JSON of EXPLAIN, with the nodes below it. Its values are texts, numbers and lists of either."""


def worst_node(plan: PlanNode) -> Node:
    """Return the node with the highest cost of its own."""
    total = max(float(plan["Total Cost"]), 1e-9)
    own_cost, node = max(_own_costs(plan, 1.0), key=lambda found: found[0])
    return Node(_node_name(node), min(1.0, own_cost / total))


def _own_costs(node: PlanNode, times: float) -> Iterator[tuple[float, PlanNode]]:
    """Yield the own cost of this node and each node below, over all its runs.

    The planner adds the costs of the children to each node; they are subtracted again.

    :param times: the planner's number of runs of this node: the inner side of a nested loop runs once for each outer
        row.
    """
    children = list(node.get("Plans", ()))
    own = float(node["Total Cost"])
    for child in children:
        runs = 1.0
        cost = float(child["Total Cost"])
        if node["Node Type"] == "Nested Loop" and child.get("Parent Relationship") == "Inner" and cost > 0:
            # At most the rest of the loop's own total, which already allows for cheaper repeated runs (Memoize, a
            # cache).
            runs = max(1.0, min(float(children[0]["Plan Rows"]), (own / cost)))
        own -= cost * runs
        yield from _own_costs(child, times * runs)
    yield max(0.0, own) * times, node


def _node_name(node: PlanNode) -> str:
    """Return the name as in EXPLAIN.

    Examples are "Seq Scan on public.products" and "Index Scan using products_pkey on public.products".
    """
    name = str(node["Node Type"])
    if "Join Type" in node and node["Join Type"] != "Inner":
        name = f"{name} ({node['Join Type']})"
    if "Index Name" in node:
        name += f" using {node['Index Name']}"
    if "Relation Name" in node:
        name += f" on {node['Schema']}.{node['Relation Name']}" if "Schema" in node else f" on {node['Relation Name']}"
    elif "Function Name" in node:
        name += f" on {node['Function Name']}()"
    elif "CTE Name" in node:
        name += f" on {node['CTE Name']}"
    return name


def nodes(node: PlanNode) -> Iterator[PlanNode]:
    yield node
    for child in node.get("Plans", ()):
        yield from nodes(child)


def scanned_table(node: PlanNode) -> tuple[str, str]:
    """Return the schema and the name of the table that a node scans."""
    return str(node["Schema"]), str(node["Relation Name"])


_ROW_BY_ROW = {
    "Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Heap Scan", "Bitmap Index Scan", "Tid Scan", "Tid Range Scan",
    "Sort", "Incremental Sort", "Limit", "Gather", "Gather Merge", "Subquery Scan", "Unique", "Materialize",
    "BitmapAnd", "BitmapOr", "Result",
}  # fmt: skip
"""Nodes that return each row at most once."""


def only_table(plan: PlanNode) -> tuple[str, str] | None:
    """Return the schema and name of the table, if the plan reads only one.

    Each of its rows must occur at most once.
    """
    tables: list[tuple[str, str]] = []

    def walk(node: PlanNode) -> bool:
        if "Relation Name" in node:
            tables.append(scanned_table(node))
        # A sub-select adds no rows; it hangs below as SubPlan or InitPlan.
        below = [
            child for child in node.get("Plans", ()) if child["Parent Relationship"] not in ("InitPlan", "SubPlan")
        ]
        one_source = len(below) <= 1 or node["Node Type"] in ("BitmapAnd", "BitmapOr")
        return node["Node Type"] in _ROW_BY_ROW and one_source and all(map(walk, below))

    return tables[0] if walk(plan) and len(tables) == 1 else None
