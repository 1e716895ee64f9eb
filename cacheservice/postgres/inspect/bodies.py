"""What the plan of a query does not show: tables that its functions read, and the definitions of its views."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from cacheservice.postgres.dependency_search import words_of
from cacheservice.postgres.inspect.look import Look

_MOST_ROUNDS = 20
_CALL = re.compile(r'([^\W\d][\w$]*|"(?:[^"]|"")+")\s*\(')


class Reading(NamedTuple):
    """A function that the query calls, also through others, and a table that its body names.

    :param certain: whether the table's name follows FROM or JOIN.
    """

    function: str
    schema: str
    table: str
    kind: str
    certain: bool


def calls_in(text: str) -> set[str]:
    """Names in `text` that an opening parenthesis follows."""
    return {name[1:-1].replace('""', '"') if name[0] == '"' else name.lower() for name in _CALL.findall(text)}


def tables_of_functions(look: Look, called: Iterable[str]) -> list[Reading]:
    """Return the tables that functions read, those that they read through views included.

    :param called: the names of the functions in the plan.
    """
    bodies: dict[int, tuple[str, str]] = {}
    names = set(called)
    for _ in range(_MOST_ROUNDS):
        found = _functions(look, names)
        new = [body for oid, (_, body) in found.items() if oid not in bodies]
        bodies |= found
        if not new:
            break
        names = set().union(*map(calls_in, new))
    readings: set[Reading] = set()
    for function, body in bodies.values():
        readings.update(_tables(look, function, body))
    return sorted(readings)


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


def _functions(look: Look, names: Iterable[str]) -> dict[int, tuple[str, str]]:
    look.cursor.execute(
        """
        SELECT p.oid, format('%%I.%%I()', n.nspname, p.proname),
               concat_ws(E'\n', pg_get_function_sqlbody(p.oid), nullif(p.prosrc, ''),
                         array_to_string(p.proconfig, E'\n'))
        FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace JOIN pg_language AS l ON l.oid = p.prolang
        WHERE p.proname = ANY (%s::name[]) AND p.oid >= 16384 AND n.nspname <> 'cacheservice'
          AND l.lanname NOT IN ('c', 'internal')
        """,
        (sorted(names),),
    )
    return {oid: (name, body) for oid, name, body in look.cursor.fetchall()}


def _tables(look: Look, function: str, body: str) -> Iterable[Reading]:
    words = sorted(set(words_of(body)))
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
    for schema, table, kind, word in look.cursor.fetchall():
        source = rf'\b(?:from|join)\s+(?:only\s+)?(?:[\w$"]+\.)?"?{re.escape(word)}(?![\w$])'
        yield Reading(function, schema, table, kind, re.search(source, body, re.IGNORECASE) is not None)
