"""Checks whether nodes that choose or number rows see the rows of only one key.

Examples are LIMIT, windows and DISTINCT ON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cacheservice.sources.postgres.inspect.expressions import Value
from cacheservice.sources.postgres.inspect.links import Links, sources_below
from cacheservice.sources.postgres.inspect.plans import PlanNode, nodes
from cacheservice.sources.postgres.inspect.texts import closes_at, inside, split

_PARTITION = re.compile(r"\bPARTITION\s+BY\b", re.IGNORECASE)
_OVER = re.compile(r"\bOVER\b", re.IGNORECASE)
_DISTINCT_ON = re.compile(r"\bDISTINCT\s+ON\s*(?=\()", re.IGNORECASE)
_AFTER_PARTITION = re.compile(r"\b(?:ORDER\s+BY|ROWS|RANGE|GROUPS)\b.*", re.IGNORECASE | re.DOTALL)
_OF_SORT_KEY = re.compile(r"(?: COLLATE \S+)?(?: DESC| USING \S+)?(?: NULLS (?:FIRST|LAST))?$")
_KEEP_ORDER = {
    "WindowAgg", "Gather Merge", "Result", "Subquery Scan", "Limit", "Unique", "Materialize", "ProjectSet",
    "LockRows", "Nested Loop", "Memoize",
}  # fmt: skip


class Picks:
    """The nodes of a plan that may combine rows of several keys."""

    def __init__(
        self,
        plan: PlanNode,
        links: Links,
        key: Sequence[Value | None],
        texts: Sequence[str],
        names: Sequence[set[str]],
    ) -> None:
        """Prepare the search.

        :param texts: the query and the definitions of its views, without strings and comments.
        :param names: the spellings of each column of the key in DISTINCT ON, beside the names of equal columns.
        """
        self._plan, self._links, self._key = plan, links, key
        self._has_windows = any(map(_OVER.search, texts))
        self._partitions = [clause for text in texts for clause in _partitions(text)]
        self._distinct = [clause for text in texts for clause in _distinct(text)]
        self._names = [
            names[number] | {column.lower() for _, column in ((value, *links.same_as(value)) if value else ())}
            for number, value in enumerate(key)
        ]

    def faults(self, kind: str) -> list[bool]:
        """Return, for each node that may see several keys, whether it certainly does.

        :param kind: the type of the nodes.
        """
        found = [self._fault(node) for node in nodes(self._plan) if node["Node Type"] == kind]
        return [fault for fault in found if fault is not None]

    def _fault(self, node: PlanNode) -> bool | None:
        kind = node["Node Type"]
        if (kind == "Unique" and not self._distinct) or self._links.within_key(node, self._key):
            return None
        certain = not self._links.partly_within_key(node, self._key)
        if kind == "Limit":
            return certain
        if kind == "Unique":
            uniques = sum(each["Node Type"] == kind for each in nodes(self._plan))
            return self._group_fault(node, self._distinct, certain=certain and uniques <= len(self._distinct))
        if "Window" in node:
            columns = [clause for text in _partitions(str(node["Window"])) for clause in text]
            return self._columns_fault(node, columns, certain=certain)
        return self._group_fault(node, self._partitions, certain=certain)

    def _group_fault(self, node: PlanNode, clauses: Sequence[Sequence[str]], *, certain: bool) -> bool | None:
        """Return the fault of a node that groups rows by the first columns of their order.

        `clauses` shows how many columns, which may differ between nodes.
        """
        if (order := _order_below(node)) is not None:
            most = max(map(len, clauses), default=0)
            # If the texts have no such clauses, they are in a function that the planner inlined.
            written = bool(clauses) or self._has_windows
            return self._columns_fault(node, order[:most] if written else order, certain=certain and written)
        held = bool(clauses) and all(
            all(names & {_name(column) for column in clause} for names in self._names) for clause in clauses
        )
        return None if held else certain and not clauses and self._has_windows

    def _columns_fault(self, node: PlanNode, columns: Sequence[str], *, certain: bool) -> bool | None:
        """Return whether groups of rows with equal `columns` hold several keys."""
        values = [value for value in map(self._links.column_behind, columns) if value is not None]
        unsure = False
        for part in self._key:
            if part is None:
                return certain
            if self._links.is_constant(part):
                continue
            linked = [value for value in values if self._links.linked(value, part)]
            if not linked:
                # A sub-select may have renamed a column, so it may be the key nevertheless.
                return certain and (not columns or not self._links.may_be_another(part))
            # Rows without a partner are one group, whatever their keys.
            unsure |= all(value != part and self._links.may_be_missing(value, node) for value in linked)
        return False if unsure else None


def _order_below(node: PlanNode) -> list[str] | None:
    """Return the sort columns of the rows that `node` reads.

    None if the plan does not show them.
    """
    while below := sources_below(node):
        node = below[0]
        if "Sort Key" in node:
            return [_OF_SORT_KEY.sub("", column) for column in node["Sort Key"]]
        if node["Node Type"] not in _KEEP_ORDER:
            return None
    return None


def _partitions(text: str) -> list[list[str]]:
    found = []
    for match in _PARTITION.finditer(text):
        end = closes_at("(" + text[match.end() :], 0) - 1
        columns = _AFTER_PARTITION.sub("", text[match.end() : match.end() + end])
        found.append([column.strip() for column in split(columns, ",")])
    return found


def _distinct(text: str) -> list[list[str]]:
    return [
        [column.strip() for column in split(text[match.end() + 1 : closes_at(text, match.end())], ",")]
        for match in _DISTINCT_ON.finditer(text)
    ]


def _name(column: str) -> str:
    return inside(column).rpartition(".")[2].strip().strip('"').lower()
