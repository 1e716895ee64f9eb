"""Which rows of a table belong to a key of the query, by the equalities in its plan; pure functions of EXPLAIN's JSON.

A column is linked to the key if the plan compares the two with =, directly or through others, if both are the same
column of an Append's members, or if one is the output of a sub-select under its own name. Names of tables are the
aliases of the plan, which are unique within it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cacheservice.postgres.inspect.plans import nodes, scanned_table

_NAME = r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'
_COLUMN = re.compile(rf"({_NAME})\.({_NAME})")
_CAST = re.compile(rf"\(({_NAME}\.{_NAME})\)::(?:text|character varying|bigint|integer|smallint)(?![\w(])")
"""To a type that tells all values apart that the other does."""
_CONSTANT = re.compile(r"-?\d+|'(?:[^']|'')*'(?:::[a-z][\w.]*(?: [a-z]+)*)?|\$\d+")
_CONDITIONS = ("Hash Cond", "Merge Cond", "Index Cond", "Recheck Cond", "Join Filter", "Filter", "TID Cond")
_BY_NAME = ("Subquery Scan", "CTE Scan")

Value = tuple[str, str]
"""An alias and a column; the alias is empty for a constant."""


class Scan(NamedTuple):
    """One scan of a table; several are one table's partitions, or the table is read several times."""

    schema: str
    table: str
    alias: str
    looked_up: bool
    """Whether it is the whole list that IN or NOT IN looks its values up in, with a hash."""


class Links:
    """Which values are equal wherever rows of the plan are put together."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self._above: dict[Value, Value] = {}
        found = list(nodes(plan))
        texts = " ".join(_texts(found))
        self.scans = list(_scans(plan, texts, looked_up=False))
        self._aliases = {str(node["Alias"]) for node in found if "Alias" in node}
        self._join_partitions(texts)
        self.is_certain = not any(node["Node Type"] in _BY_NAME for node in found)
        """Whether each column in the plan is one of a table that it scans."""
        named = {str(node["Subplan Name"]): node for node in found if "Subplan Name" in node}
        for node in found:
            for left, right in _equalities(node):
                self._join(left, right)
            members = [each for each in node.get("Plans", ()) if each.get("Parent Relationship") == "Member"]
            for first, *others in zip(*map(output_of, members), strict=False):
                for other in others:
                    self._join_texts(first, other)
            if node["Node Type"] == "Subquery Scan":
                self._join_by_name(str(node["Alias"]), node["Plans"][0])
            elif node["Node Type"] == "CTE Scan" and (below := named.get(f"CTE {node['CTE Name']}")) is not None:
                self._join_by_name(str(node["Alias"]), below)

    def linked(self, one: Value, other: Value) -> bool:
        return self._root(one) == self._root(other)

    def within_key(self, node: Mapping[str, Any], key: Sequence[Value | None]) -> bool:
        """Whether each table that is scanned below `node` is compared there with a key that comes from outside."""
        below = Links(node)
        outside = [value for value in below._above if value[0] and value[0] not in below._aliases]

        def compares(scan: Scan, value: Value) -> bool:
            columns = [each for each in below._above if each[0] == scan.alias]
            return any(
                self.linked(one, value) and any(below.linked(column, one) for column in columns) for one in outside
            )

        return bool(below.scans) and all(
            value is not None and compares(scan, value) for scan in below.scans for value in key
        )

    def _join(self, one: Value, other: Value) -> None:
        root = self._root(other)
        self._above[self._root(one)] = self._above[root] = root

    def _join_partitions(self, texts: str) -> None:
        """Join the columns of a table with those of its partitions: o_1 and o_2 are scanned, and o.id is read."""
        parts: dict[str, list[str]] = {}
        for scan in self.scans:
            parent, _, number = scan.alias.rpartition("_")
            if number.isdigit() and parent not in self._aliases:
                parts.setdefault(parent, []).append(scan.alias)
        for alias, column in {(_plain(alias), _plain(column)) for alias, column in _COLUMN.findall(texts)}:
            for part in parts.get(alias, ()):
                self._join((part, column), (alias, column))
        self._aliases.update(parts)

    def _join_texts(self, one: str, other: str) -> None:
        left, right = column_of(one), column_of(other)
        if left is not None and right is not None:
            self._join(left, right)

    def _join_by_name(self, alias: str, below: Mapping[str, Any]) -> None:
        for text in output_of(below):
            if (column := column_of(text)) is not None:
                self._join((alias, column[1]), column)

    def _root(self, value: Value) -> Value:
        while (above := self._above.get(value, value)) != value:
            value = above
        return value


def output_of(node: Mapping[str, Any]) -> Sequence[str]:
    """The expressions of the rows of `node`; the plan shows those of an Append, or the like, at its first member."""
    while "Output" not in node and node.get("Plans"):
        node = node["Plans"][0]
    output: Sequence[str] = node.get("Output", ())
    return output


def column_of(text: str) -> Value | None:
    """The alias and the column, if `text` of a plan is a column and not an expression."""
    match = _COLUMN.fullmatch(text)
    return None if match is None else (_plain(match[1]), _plain(match[2]))


def _scans(node: Mapping[str, Any], texts: str, *, looked_up: bool) -> Iterator[Scan]:
    looked_up = looked_up or f"hashed {node.get('Subplan Name', ' ')}" in texts
    if "Relation Name" in node:
        yield Scan(*scanned_table(node), str(node["Alias"]), looked_up)
    for child in node.get("Plans", ()):
        yield from _scans(child, texts, looked_up=looked_up)


def _texts(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for node in found:
        yield from node.get("Output", ())
        yield from (str(node[field]) for field in _CONDITIONS if field in node)


def _equalities(node: Mapping[str, Any]) -> Iterator[tuple[Value, Value]]:
    for field in _CONDITIONS:
        for part in _conjuncts(_CAST.sub(r"\1", str(node.get(field, "")))):
            left, equals, right = part.partition(" = ")
            values = _value(left), _value(right)
            if equals and values[0] is not None and values[1] is not None:
                yield values[0], values[1]


def _value(text: str) -> Value | None:
    return column_of(text) or (("", text) if _CONSTANT.fullmatch(text) else None)


def _conjuncts(text: str) -> Iterator[str]:
    """The conditions that all hold where `text` holds."""
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") and _closes_at(text, 0) == len(text) - 1 else text
    parts = list(_split(inner))
    if len(parts) > 1:
        for part in parts:
            yield from _conjuncts(part)
    else:
        yield inner


def _split(text: str) -> Iterator[str]:
    """The parts of `text` between the ANDs that stand in no parentheses."""
    begin = place = 0
    while place < len(text):
        if text[place] == "(":
            place = _closes_at(text, place)
        elif text[place] in "'\"":
            place = _quoted_to(text, place)
        elif text.startswith(" AND ", place):
            yield text[begin:place]
            begin = place + len(" AND ")
        place += 1
    yield text[begin:]


def _closes_at(text: str, place: int) -> int:
    """Where the parenthesis closes that opens at `place`; the end of the text if it does not."""
    depth = 0
    while place < len(text):
        if text[place] in "'\"":
            place = _quoted_to(text, place)
        elif text[place] in "()":
            depth += 1 if text[place] == "(" else -1
            if depth == 0:
                return place
        place += 1
    return len(text)


def _quoted_to(text: str, place: int) -> int:
    end = text.find(text[place], place + 1)
    return len(text) if end < 0 else end


def _plain(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
