"""The conditions and columns in the texts of a plan; pure functions of texts.

Names of tables are the aliases of the plan, which are unique within it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cacheservice.sources.postgres.inspect.texts import inside, split

_NAME = r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'
_COLUMN = re.compile(rf"({_NAME})\.({_NAME})")
_CAST = re.compile(rf"\(({_NAME}\.{_NAME})\)::(?:text|character varying|bigint|integer|smallint)(?![\w(])")
"""A cast to a type in which different values stay different."""
_CONSTANT = re.compile(r"-?\d+|'(?:[^']|'')*'(?:::[a-z][\w.]*(?: [a-z]+)*)?|\$\d+")
_NUMBER = re.compile(r"'(-?\d+)'::(?:bigint|integer|smallint)")
_COALESCE = re.compile(r"COALESCE\((.*)\)", re.DOTALL)
_ANY = re.compile(r"(.+) = ANY \(ARRAY\[(.*)\]\)", re.DOTALL)
_SAME = re.compile(r"NOT \((.+?)( IS DISTINCT FROM )(.+)\)")

Value = tuple[str, str]
"""An alias and a column; the alias is empty for a constant."""


def is_expression(text: str) -> bool:
    """Return whether `text` of a plan is neither a column nor a constant, cast or not."""
    return bool(text) and value_of(text) is None


def column_of(text: str) -> Value | None:
    """Return the alias and the column, if `text` of a plan is a plain column."""
    match = _COLUMN.fullmatch(text)
    return None if match is None else (_plain(match[1]), _plain(match[2]))


def columns_in(text: str) -> set[Value]:
    """Return all columns that `text` of a plan names."""
    return {(_plain(alias), _plain(column)) for alias, column in _COLUMN.findall(text)}


def coalesced(text: str) -> list[str]:
    """Return the arguments of `text` of a plan if it is a COALESCE; an empty list otherwise."""
    coalesce = _COALESCE.fullmatch(inside(text))
    return [] if coalesce is None else list(split(coalesce[1], ", "))


def equal_sides(condition: str) -> Iterator[tuple[str, str]]:
    """Yield the two sides of each equality that holds if `condition` holds."""
    for part in conjuncts(_CAST.sub(r"\1", condition)):
        same = _SAME.fullmatch(part)
        left, equals, right = same.groups() if same else part.partition(" = ")
        if equals:
            yield left, right


def value_of(text: str) -> Value | None:
    """Return the column or constant in `text` of a plan.

    It may be below a cast that keeps its values distinct.
    """
    return bare_value(_CAST.sub(r"\1", text))


def bare_value(text: str) -> Value | None:
    """Return the column or constant that `text` of a plan is, without a cast."""
    text = inside(text)
    if (number := _NUMBER.fullmatch(text)) is not None:
        return "", number[1]
    return column_of(text) or (("", text) if _CONSTANT.fullmatch(text) else None)


def conjuncts(text: str) -> Iterator[str]:
    """Yield the conditions that all hold if `text` holds."""
    inner = inside(text)
    parts = list(split(inner, " AND "))
    if len(parts) > 1:
        for part in parts:
            yield from conjuncts(part)
    else:
        yield inner


def alternatives(condition: str) -> list[str]:
    """Return the alternatives of `condition`: if it holds, at least one of them holds."""
    inner = inside(condition)
    if (one_of := _ANY.fullmatch(inner)) is not None:
        return [f"{one_of[1]} = {each}" for each in split(one_of[2], ", ")]
    return list(split(inner, " OR "))


def numbered(alias: str) -> tuple[str, int]:
    """Split an alias that EXPLAIN made unique: o is ("o", 0), and o_3 is ("o", 3)."""
    name, _, number = alias.rpartition("_")
    return (name, int(number)) if name and number.isdecimal() else (alias, 0)


def _plain(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
