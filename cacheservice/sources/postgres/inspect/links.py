"""Decides which rows of a table belong to a key of the query.

The evidence is the equalities in the query's plan; these are pure functions of EXPLAIN's JSON. A column is linked to
the key if the plan compares the two with =, directly or through others, if both are the same column of an Append's
members, or if one is the output of a sub-select under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cacheservice.sources.postgres.inspect.expressions import (
    Value,
    alternatives,
    bare_value,
    coalesced,
    column_of,
    columns_in,
    conjuncts,
    equal_sides,
    numbered,
    value_of,
)
from cacheservice.sources.postgres.inspect.plans import PlanNode, nodes, scanned_table

_SUB_SELECT = re.compile(r"\b(?:SubPlan|InitPlan) \d|\$\d")
"""The value of a sub-select; PostgreSQL before 17 writes $0 for the value of an InitPlan."""
_CONDITIONS = ("Hash Cond", "Merge Cond", "Index Cond", "Recheck Cond", "Join Filter", "Filter", "TID Cond")
_WHOLE = "q"
"""The alias of the query in `SELECT * FROM (…) AS q` of statements.whole_query()."""
_BY_NAME = ("Subquery Scan", "CTE Scan")


class Scan(NamedTuple):
    """One scan of a table.

    Several scans are the partitions of one table, or the table is read several times.
    """

    schema: str
    table: str
    alias: str
    looked_up: bool
    """Whether the scan is the whole list of an IN or NOT IN, looked up with a hash."""


class Links:
    """The values that are equal in all combined rows of the plan."""

    def __init__(self, plan: PlanNode) -> None:
        self._above: dict[Value, Value] = {}
        found = list(nodes(plan))
        self._texts = texts = " ".join(_texts(found))
        self._renamed: set[Value] = set()
        self.scans = list(_scans(plan, texts, looked_up=False))
        self._parents: dict[str, str] = {}
        self._comparisons = [
            part for node in found for field in _CONDITIONS for part in conjuncts(str(node.get(field, "")))
        ]
        self._aliases = {str(node["Alias"]) for node in found if "Alias" in node}
        self.is_certain = self._join_partitions(texts) and not any(node["Node Type"] in _BY_NAME for node in found)
        """Whether each column in the plan is a column of a table that it scans."""
        named = {str(node["Subplan Name"]): node for node in found if "Subplan Name" in node}
        for node in found:
            for left, right in _equalities(node):
                self._join(left, right)
            for texts_of_members in zip(*map(output_of, members_of(node)), strict=False):
                columns = [value for value in map(value_of, texts_of_members) if value is not None and value[0]]
                for other in columns[1:]:
                    self._join(columns[0], other)
            if node["Node Type"] == "Subquery Scan":
                self._join_by_name(node, sources_below(node)[0], in_order=node is plan and node["Alias"] == _WHOLE)
            elif node["Node Type"] == "CTE Scan" and (below := named.get(f"CTE {node['CTE Name']}")) is not None:
                self._join_by_name(node, below, in_order=False)
        # Bottom up, because each FULL JOIN … USING compares the COALESCE of the one below it.
        for node in reversed(found):
            for sides in _compared(node):
                columns = [value for value in map(self.column_behind, sides) if value is not None]
                if len(columns) == len(sides):
                    self._join(*columns)

    def column_behind(self, text: str) -> Value | None:
        """Return the column whose values `text` has.

        It may be cast, or a COALESCE of linked columns.
        """
        if not (parts := coalesced(text)):
            value = value_of(text)
            return value if value is not None and value[0] else None
        first, *others = map(self.column_behind, parts)
        if first is None or any(other is None or not self.linked(first, other) for other in others):
            return None
        return first

    def may_be_missing(self, value: Value, node: PlanNode) -> bool:
        """Return whether a join at or below `node` may replace `value` by NULL.

        An outer join does so for a missing row.
        """
        return any(
            value[0] in (alias := str(each.get("Alias")), self._parents.get(alias))
            for join in nodes(node)
            for side in _sides_without_rows(join)
            for each in nodes(side)
        )

    def is_of_table(self, value: Value) -> bool:
        """Return whether the value is a table's column.

        A column of a sub-select may be computed.
        """
        return any(value[0] in (scan.alias, self._parents.get(scan.alias)) for scan in self.scans)

    def linked(self, one: Value, other: Value) -> bool:
        return self._root(one) == self._root(other)

    def within_key(self, node: PlanNode, key: Sequence[Value | None]) -> bool:
        """Return whether each table scanned below `node` is compared with an outside key."""
        tied = self._tied(node, key)
        return bool(tied) and all(map(all, tied))

    def partly_within_key(self, node: PlanNode, key: Sequence[Value | None]) -> bool:
        """Return whether a table below is compared with the key.

        The other tables may then be limited to its rows as well.
        """
        return any(map(any, self._tied(node, key)))

    def _tied(self, node: PlanNode, key: Sequence[Value | None]) -> list[list[bool]]:
        """Return for each scan below `node` which key columns it is compared with there.

        The key comes from outside of `node`.
        """
        below = Links(node)
        outside = [value for value in below._above if value[0] not in below._aliases]

        def compares(scan: Scan, value: Value) -> bool:
            columns = [each for each in below._above if each[0] == scan.alias]
            return any(
                self.linked(one, value) and any(below.linked(column, one) for column in columns) for one in outside
            )

        return [[value is not None and compares(scan, value) for value in key] for scan in below.scans]

    def is_constant(self, value: Value) -> bool:
        return any(not each[0] for each in self.same_as(value))

    def may_be_another(self, value: Value) -> bool:
        """Return whether `value` may be equal to further columns.

        A sub-select may give it another name.
        """
        return any(each in self._renamed for each in (value, *self.same_as(value)))

    def same_as(self, value: Value) -> list[Value]:
        return [each for each in self._above if self.linked(each, value)]

    def ties_by_one_or_another(self, scan: Scan, watched: Sequence[Sequence[str]], key: Sequence[Value]) -> bool:
        """Return whether a row of `scan` has the key in one of several columns.

        An example is `ON k.id IN (a.one, a.other)`.

        :param watched: the columns of each watch of the table, in the order of `key`.
        """

        aliases = {scan.alias, self._parents.get(scan.alias, scan.alias)}

        def compares(equal: Sequence[set[Value | None]], column: str, value: Value) -> bool:
            return self.linked((scan.alias, column), value) or any(
                {(alias, column), other} == pair
                for pair in equal
                for alias in aliases
                for other in (value, *self.same_as(value))
            )

        def ties(condition: str) -> bool:
            first, *others = alternatives(condition)
            if others:
                return all(map(ties, (first, *others)))
            equal = [{bare_value(side) for side in sides} for sides in equal_sides(first)]
            return any(
                all(compares(equal, column, value) for column, value in zip(columns, key, strict=True))
                for columns in watched
            )

        return any(map(ties, self._comparisons))

    def compares_others_alone(self, scan: Scan, columns: Sequence[str], key: Sequence[Value]) -> bool:
        """Return whether the rows of `scan` are found by columns other than `columns`.

        `columns` may hold the key nevertheless.

        :param columns: the columns by which the table is watched, in the order of `key`.
        """
        aliases = {scan.alias, self._parents.get(scan.alias, scan.alias)}
        open_parts = [
            (column, value)
            for column, value in zip(columns, key, strict=True)
            if not self.linked((scan.alias, column), value)
        ]
        found = False
        for condition in self._comparisons:
            values = columns_in(condition)
            ours = {column for alias, column in values if alias in aliases}
            if not ours or (all(alias in aliases for alias, _ in values) and not _SUB_SELECT.search(condition)):
                continue
            if any(column in ours for column, _ in open_parts):
                return False
            if any(self.linked((scan.alias, each), value) for each in ours for _, value in open_parts):
                return False
            found = True
        return found

    def _join(self, one: Value, other: Value) -> None:
        root = self._root(other)
        self._above[self._root(one)] = self._above[root] = root

    def _join_partitions(self, texts: str) -> bool:
        """Join the columns of a table with the columns of its partitions.

        For example, o_1 and o_2 are scanned, and o.id is read. A table that is read twice is o and o_1, or o and o_3,
        and the partitions of both have numbers in that order. A reading whose columns are compared only in its
        partitions has no name in the plan.

        :returns: whether it is known which partitions belong to which table.
        """
        columns = columns_in(texts)
        parents: dict[str, list[str]] = {}
        for alias in sorted({alias for alias, _ in columns} - self._aliases, key=numbered):
            parents.setdefault(numbered(alias)[0], []).append(alias)
        readings: dict[str, list[dict[tuple[str, str], str]]] = {}
        for scan in sorted(self.scans, key=lambda scan: numbered(scan.alias)):
            of_name, table = readings.setdefault(numbered(scan.alias)[0], [{}]), (scan.schema, scan.table)
            if table in of_name[-1]:
                of_name.append({})
            of_name[-1][table] = scan.alias
        is_known = True
        for name, aliases in parents.items():
            of_name = readings.get(name, [])
            first = min((numbered(part)[1] for parts in of_name for part in parts.values()), default=0)
            if of_name and first == len(of_name):
                # Tables come before partitions, so that the number of a table is that of its reading.
                pairs = [(parent, of_name[numbered(parent)[1]]) for parent in aliases if numbered(parent)[1] < first]
            elif of_name and len(of_name) != len(aliases):
                is_known = False
                continue
            else:
                pairs = list(zip(aliases, of_name, strict=False))
            for parent, parts in pairs:
                self._parents.update(dict.fromkeys(parts.values(), parent))
                for alias, column in columns:
                    if alias == parent:
                        for part in parts.values():
                            self._join((part, column), (parent, column))
        self._aliases.update(self._parents.values())
        return is_known

    def _join_by_name(self, node: PlanNode, below: PlanNode, *, in_order: bool) -> None:
        """Join the columns of a sub-select, or of a CTE, with those of its query.

        :param in_order: whether they have the same order.
        """
        alias = str(node["Alias"])
        columns = [column for column in map(column_of, output_of(below)) if column is not None]
        if in_order:
            for text, source in zip(output_of(node), output_of(below), strict=False):
                left, right = column_of(text), value_of(source)
                if left is not None and right is not None:
                    self._join(left, right)
            return
        for column in columns:
            self._join((alias, column[1]), column)
        names = {column for _, column in columns}
        ours = {column for each, column in columns_in(self._texts) if each == alias}
        if names - ours:
            self._renamed.update((alias, column) for column in ours - names)

    def _root(self, value: Value) -> Value:
        while (above := self._above.get(value, value)) != value:
            value = above
        return value


def sources_below(node: PlanNode) -> list[PlanNode]:
    """Return the nodes whose rows `node` reads, except sub-selects in its expressions."""
    return [each for each in node.get("Plans", ()) if each.get("Parent Relationship") not in ("InitPlan", "SubPlan")]


def _sides_without_rows(node: PlanNode) -> list[PlanNode]:
    """Return the sides of an outer join whose rows may be missing in the result."""
    sides = {"Left": ("Inner",), "Right": ("Outer",), "Full": ("Inner", "Outer")}.get(str(node.get("Join Type")), ())
    return [each for each in sources_below(node) if each.get("Parent Relationship") in sides]


def members_of(node: PlanNode) -> list[PlanNode]:
    """Return the nodes whose rows a set operation or a partitioned scan combines."""
    below = sources_below(node)
    if node["Node Type"] in ("Append", "Merge Append") or (node["Node Type"] == "SetOp" and len(below) > 1):
        return below
    return []


def sources_of(node: PlanNode, place: int) -> list[str]:
    """Return the expressions that a column of `node` comes from.

    There are several if members are combined below.
    """
    if members := members_of(node):
        return [source for member in members for source in sources_of(member, place)]
    output = output_of(node)
    text = output[place] if place < len(output) else ""
    if node["Node Type"] == "Subquery Scan" and node["Alias"] == _WHOLE and "Parent Relationship" not in node:
        return sources_of(sources_below(node)[0], place)
    for child in sources_below(node):
        below = output_of(child)
        if text in below:
            return sources_of(child, below.index(text))
    return [text]


def output_of(node: PlanNode) -> Sequence[str]:
    """Return the expressions of the rows of `node`.

    The plan shows the expressions of an Append, or the like, at its first member.
    """
    while "Output" not in node and (below := sources_below(node)):
        node = below[0]
    output: Sequence[str] = node.get("Output", ())
    return output


def _scans(node: PlanNode, texts: str, *, looked_up: bool) -> Iterator[Scan]:
    looked_up = looked_up or f"hashed {node.get('Subplan Name', ' ')}" in texts
    if "Relation Name" in node:
        yield Scan(*scanned_table(node), str(node["Alias"]), looked_up)
    for child in node.get("Plans", ()):
        yield from _scans(child, texts, looked_up=looked_up)


def _texts(found: Sequence[PlanNode]) -> Iterator[str]:
    for node in found:
        yield from node.get("Output", ())
        yield from (str(node[field]) for field in _CONDITIONS if field in node)


def _equalities(node: PlanNode) -> Iterator[tuple[Value, Value]]:
    for left, right in _compared(node):
        values = bare_value(left), bare_value(right)
        if values[0] is not None and values[1] is not None:
            yield values[0], values[1]


def _compared(node: PlanNode) -> Iterator[tuple[str, str]]:
    """Yield the two sides of each equality that holds for the rows of `node`."""
    for field in _CONDITIONS:
        yield from equal_sides(str(node.get(field, "")))
