"""Finds the parts of a query that its plan does not show.

These are the tables that its functions read, and the definitions of its views.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from cacheservice.sources.postgres.dependency_search import words_of
from cacheservice.sources.postgres.inspect.look import Look
from cacheservice.sources.postgres.inspect.texts import closes_at, split, without_comments, without_strings

_MOST_ROUNDS = 20
_NAME = r'(?:[^\W\d][\w$]*|"(?:[^"]|"")+")'
_CALL = re.compile(rf"(?:({_NAME})\s*\.\s*)?({_NAME})\s*(?=\()")
_QUOTE = re.compile(r"'|\$(?:[^\W\d]\w*)?\$")
_FROM_AS_ARGUMENT = re.compile(r"\b(?:extract|substring|trim|overlay|position)\s*(?=\()", re.IGNORECASE)
_FROM = re.compile(r"\bfrom\b", re.IGNORECASE)
_DISTINCT_FROM = re.compile(r"\bdistinct\s+from\b", re.IGNORECASE)


class Call(NamedTuple):
    """A call of a function, with a schema if the text names it."""

    schema: str | None
    name: str

    @property
    def is_builtin(self) -> bool:
        """Return whether the function may be PostgreSQL's own."""
        return self.schema in (None, "pg_catalog")


class Reading(NamedTuple):
    """A function that the query calls, also indirectly, and a table in its body.

    :param certain: whether only that function can be meant, and the table's name follows FROM or JOIN.
    """

    function: str
    schema: str
    table: str
    kind: str
    certain: bool


class _Body(NamedTuple):
    function: str
    text: str
    parameters: tuple[str, ...]


def calls_in(text: str) -> set[Call]:
    """Return the names in `text` before an opening parenthesis, except in strings."""
    found = set()
    for match in _CALL.finditer(text := without_strings(text)):
        schema, name = match[1] and _folded(match[1]), _folded(match[2])
        # age(a, b) is the time between two others; age(a) reads the clock.
        if name == "age" and len(list(split(text[match.end() + 1 : closes_at(text, match.end())], ","))) > 1:
            continue
        found.add(Call(schema, name))
    return found


def tables_of_functions(look: Look, called: Iterable[Call]) -> list[Reading]:
    """Return the tables that functions read, also through views.

    :param called: the functions in the plan.
    """
    called = set(called)
    certain = _reach(look, called, certainly=True)
    readings: set[Reading] = set()
    for oid, body in _reach(look, called, certainly=False).items():
        readings.update(_tables(look, body, certain=oid in certain))
    return sorted(readings)


def _reach(look: Look, called: set[Call], *, certainly: bool) -> dict[int, _Body]:
    """Return the functions behind `called`, including indirect calls.

    :param certainly: leave out overloads, because the plan does not show which is called, and calls inside strings.
    """
    bodies: dict[int, _Body] = {}
    calls: dict[Call, set[str]] = {call: set() for call in called}
    look.cursor.execute("SELECT nspname::text FROM pg_namespace")
    schemas = {name for (name,) in look.cursor.fetchall()}
    for _ in range(_MOST_ROUNDS):
        found = _functions(look, calls, certainly=certainly)
        new = [body for oid, body in found.items() if oid not in bodies]
        bodies |= found
        if not new:
            break
        calls = {}
        for body in new:
            named = schemas.intersection(words_of(body.text))
            for text in [body.text] if certainly else [body.text, _QUOTE.sub(" ", body.text)]:
                for call in calls_in(text):
                    calls.setdefault(call, set()).update(named)
    return bodies


def definitions_of_views(look: Look) -> list[str]:
    """Return the definitions of the views that the query names, also within others."""
    look.cursor.execute(
        """
        WITH RECURSIVE views (oid) AS (
            SELECT c.oid FROM pg_class AS c
            WHERE c.relkind = 'v' AND c.oid >= 16384 AND c.relname = ANY (%s::name[])
            UNION
            SELECT d.refobjid FROM views AS v
            JOIN pg_rewrite AS r ON r.ev_class = v.oid
            JOIN pg_depend AS d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            JOIN pg_class AS c ON d.refclassid = 'pg_class'::regclass AND c.oid = d.refobjid AND c.relkind = 'v'
        ) SELECT pg_get_viewdef(oid) FROM views ORDER BY oid
        """,
        (sorted(set(words_of(look.dataset.query))),),
    )
    return [definition for (definition,) in look.cursor.fetchall()]


def volatile(look: Look, called: Iterable[Call]) -> tuple[list[str], list[str]]:
    """Return the certainly and the possibly volatile functions among `called`.

    A function in the database is volatile unless its author declared otherwise, so a function that is not volatile may
    lack the declaration.
    """
    calls = sorted({(call.schema or "", call.name) for call in called})
    look.cursor.execute(
        """
        SELECT u.name, bool_and(p.provolatile = 'v') AND max(p.oid::bigint) < 16384
        FROM unnest(%s::text[], %s::text[]) AS u (schema, name)
        JOIN pg_proc AS p ON p.proname = u.name
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
         AND CASE u.schema WHEN '' THEN n.nspname = ANY (current_schemas(true)) ELSE n.nspname = u.schema END
        GROUP BY u.schema, u.name HAVING bool_or(p.provolatile = 'v') ORDER BY 1
        """,
        ([schema for schema, _ in calls], [name for _, name in calls]),
    )
    found = look.cursor.fetchall()
    return [name for name, certain in found if certain], [name for name, certain in found if not certain]


def _functions(look: Look, calls: Mapping[Call, Collection[str]], *, certainly: bool) -> dict[int, _Body]:
    """Return the functions that match `calls`.

    :param calls: each with the names of schemas in which to look beside search_path.
    """
    places = sorted({(call.schema or "", call.name, "") for call in calls}) + sorted(
        {("", call.name, word) for call, words in calls.items() if call.schema is None for word in words}
    )
    look.cursor.execute(
        """
        WITH found AS (
            SELECT DISTINCT u.schema, u.name, p.oid
            FROM unnest(%s::text[], %s::text[], %s::text[]) AS u (schema, name, beside)
            JOIN pg_proc AS p ON p.proname = u.name
            JOIN pg_namespace AS n ON n.oid = p.pronamespace
             AND CASE WHEN u.schema <> '' THEN n.nspname = u.schema
                      ELSE n.nspname = ANY (current_schemas(true)) OR n.nspname = u.beside END
        ), counted AS (SELECT f.*, count(*) OVER (PARTITION BY schema, name) AS candidates FROM found AS f)
        SELECT DISTINCT p.oid, format('%%I.%%I()', n.nspname, p.proname),
               concat_ws(E'\n', pg_get_function_sqlbody(p.oid), nullif(p.prosrc, ''),
                         array_to_string(p.proconfig, E'\n')),
               coalesce(p.proargnames, '{}')
        FROM counted AS f JOIN pg_proc AS p ON p.oid = f.oid JOIN pg_namespace AS n ON n.oid = p.pronamespace
        JOIN pg_language AS l ON l.oid = p.prolang
        WHERE p.oid >= 16384 AND n.nspname <> 'cacheservice' AND l.lanname NOT IN ('c', 'internal')
          AND (f.candidates = 1 OR NOT %s)
        """,
        (
            [schema for schema, _, _ in places],
            [name for _, name, _ in places],
            [beside for _, _, beside in places],
            certainly,
        ),
    )
    return {
        oid: _Body(name, without_comments(text), tuple(parameters))
        for oid, name, text, parameters in look.cursor.fetchall()
    }


def _tables(look: Look, body: _Body, *, certain: bool) -> Iterator[Reading]:
    words = sorted(set(words_of(body.text)))
    look.cursor.execute(
        """
        WITH RECURSIVE read (oid, word) AS (
            SELECT c.oid, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
            WHERE c.relname = ANY (%(words)s::name[]) AND c.oid >= 16384 AND n.nspname <> 'cacheservice'
              AND (n.nspname = ANY (current_schemas(true)) OR n.nspname = ANY (%(words)s::name[]))
            UNION
            SELECT d.refobjid, v.word FROM read AS v
            JOIN pg_rewrite AS r ON r.ev_class = v.oid
            JOIN pg_class AS c ON c.oid = v.oid AND c.relkind = 'v'
            JOIN pg_depend AS d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
              AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
        )
        SELECT DISTINCT n.nspname::text, c.relname::text, c.relkind::text, r.word::text
        FROM read AS r JOIN pg_class AS c ON c.oid = r.oid JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'm', 'f')
        """,
        {"words": words},
    )
    text = _without_other_from(without_strings(body.text))
    for schema, table, kind, word in look.cursor.fetchall():
        source = rf'\b(?:from|join)\s+(?:only\s+)?(?:[\w$"]+\.)?"?{re.escape(word)}(?![\w$])'
        follows = re.search(source, text, re.IGNORECASE) is not None
        if follows or word not in body.parameters:
            yield Reading(body.function, schema, table, kind, certain and follows)


def _without_other_from(text: str) -> str:
    """Remove each FROM that is not followed by a table.

    Examples are IS DISTINCT FROM and extract(… FROM …).
    """
    text = _DISTINCT_FROM.sub("distinct ", text)
    for match in reversed(list(_FROM_AS_ARGUMENT.finditer(text))):
        end = closes_at(text, match.end())
        argument = text[match.end() + 1 : end]
        for word in _FROM.finditer(argument):
            if argument.count("(", 0, word.start()) == argument.count(")", 0, word.start()):
                argument = argument[: word.start()] + argument[word.end() :]
                break
        text = text[: match.end() + 1] + argument + text[end:]
    return text


def _folded(name: str) -> str:
    return name[1:-1].replace('""', '"') if name[0] == '"' else name.lower()
