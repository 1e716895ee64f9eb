"""Checks whether the query means the same with the role's own search_path.

That is the path with which its author tried it in psql.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import psycopg2

from cacheservice.sources.postgres.dependency_search import operators_of, words_of
from cacheservice.sources.postgres.inspect.failures import step
from cacheservice.sources.postgres.inspect.look import Look
from cacheservice.sources.postgres.statements import whole_query

_OF_OPERATORS = re.compile(r'OPERATOR\((?:"[^"]*"|\w+)\.([^)]+)\)')
_OF_TYPES_AND_FUNCTIONS = re.compile(r'(?:(?<=::)(?:"[^"]*"|\w+)\.|\b\w+\.(?=\w+\())')

_MOST_NAMED = 5


class _Meaning(NamedTuple):
    """The interpretation of a query with one path.

    It has the plan, and the users' objects that words of the query may name.
    """

    plan: str
    objects: frozenset[str]


def compare_paths(look: Look) -> None:
    """Add a problem if the role's own path changes the meaning of the query.

    The query may then use other operators, functions, types or tables.
    """
    with step(look, "search_path"):
        look.cursor.execute("SELECT reset_val FROM pg_settings WHERE name = 'search_path'")
        (own_path,) = look.cursor.fetchone()
        ours = _meaning(look)
        theirs = _meaning_with(look, own_path)
        if theirs is not None and (differs := difference(ours, theirs)):
            look.add(
                "problem",
                f"search_path: with the role's own, {own_path}, the query means something else: {differs}",
                f'if that is intended, set search_path = "{own_path}" for the dataset or in [postgres]; '
                "if not, name the schemas in the query",
            )


def difference(ours: _Meaning, theirs: _Meaning) -> str | None:
    """Return the difference in words; None if it does not matter."""
    gained, lost = theirs.objects - ours.objects, ours.objects - theirs.objects
    # A replacement with the same arguments does not show in a plan, which names no schema.
    instead = {_without_schema(each) for each in gained} & {_without_schema(each) for each in lost}
    if ours.plan == theirs.plan and not instead:
        return None
    named = [f"{each} is found with it alone" for each in sorted(gained)]
    named += [f"{each} only without it" for each in sorted(lost)]
    return ", ".join(named[:_MOST_NAMED]) or "its plan has other operators or types"


def _without_schema(named: str) -> str:
    kind, _, name = named.partition(" ")
    return f"{kind} {name.partition('.')[2]}" if kind == "function" else named


def _meaning_with(look: Look, path: str) -> _Meaning | None:
    """Return the meaning with that path; None if the query cannot be planned with it."""
    look.cursor.execute("SAVEPOINT own_path")
    try:
        look.cursor.execute("SELECT set_config('search_path', %s, true)", (path,))
        return _meaning(look)
    except psycopg2.Error:
        if look.connection.closed:
            raise
        return None
    finally:
        if not look.connection.closed:
            look.cursor.execute("ROLLBACK TO SAVEPOINT own_path")


def _meaning(look: Look) -> _Meaning:
    query = look.dataset.query
    look.cursor.execute(f"EXPLAIN (VERBOSE, COSTS OFF) {whole_query(query)}")
    plan = "\n".join(line for (line,) in look.cursor.fetchall())
    # Objects that a path makes visible are shown without their schema, and that is not a difference.
    plan = _OF_TYPES_AND_FUNCTIONS.sub("", _OF_OPERATORS.sub(r"\1", plan))
    named = (words_of(query), called_in(query), operators_of(query))
    look.cursor.execute(_OBJECTS, [list(dict.fromkeys(names)) for names in named])
    return _Meaning(plan, frozenset(name for (name,) in look.cursor.fetchall()))


_OBJECTS = """
WITH words AS (SELECT unnest(%s::text[]) AS word)
SELECT format('table %%s.%%s', c.relnamespace::regnamespace, c.relname)
FROM words AS w JOIN pg_class AS c ON c.oid = to_regclass(quote_ident(w.word)) WHERE c.oid >= 16384
UNION
SELECT format('function %%s.%%s(%%s)', p.pronamespace::regnamespace, p.proname, oidvectortypes(p.proargtypes))
FROM pg_proc AS p WHERE p.proname = ANY (%s::name[]) AND pg_function_is_visible(p.oid)
UNION
SELECT format('operator %%s.%%s(%%s, %%s)', o.oprnamespace::regnamespace, o.oprname, l.typname, r.typname)
FROM pg_operator AS o LEFT JOIN pg_type AS l ON l.oid = o.oprleft JOIN pg_type AS r ON r.oid = o.oprright
WHERE o.oprname = ANY (%s::name[]) AND o.oid >= 16384 AND pg_operator_is_visible(o.oid)
"""


def called_in(query: str) -> Sequence[str]:
    """Return the names before a parenthesis."""
    return [name.lower() for name in re.findall(r"([^\W\d][\w$]*)\s*\(", query)]
