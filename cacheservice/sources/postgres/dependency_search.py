"""Finds the objects that a query depends on beside the rows of its tables.

The search prefers too many objects to too few. It takes relations that the transaction has locked, and every object
that a word or an operator of the query may name. From these it follows views, types, and the bodies of functions.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.quoting import array
from cacheservice.sources.postgres.session_settings import OF_THE_ROLE

_PLAIN = re.compile(r"[^\W\d][\w$]*")
_CALLED = re.compile(r'([^\W\d][\w$]*|"(?:[^"]|"")+")\s*\(')
_WITH_QUOTES_INSIDE = re.compile(r'"((?:[^"]|"")+)"')
_OPERATOR = re.compile(r"[-+*/<>=~!@#%^&|`?]+")
_SETTING = re.compile(r"current_setting\s*\(\s*'([^']+)'", re.I)
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_MOST_CHARACTERS = 255
"""Longer text between quotation marks is not a name: PostgreSQL keeps 63 bytes of a name."""
_LONGEST_OPERATOR = 8
_SPELT_OTHERWISE = ("=", "<>", "<", "<=", ">", ">=", "~", "~~", "!~~", "~~*", "!~~*")
"""Operators behind IN, BETWEEN, LIKE, CASE, DISTINCT and the like."""
_MOST_ROUNDS = 20
"""Each round follows the names in the bodies that the previous round found."""

_FIND = r"""
WITH RECURSIVE words AS MATERIALIZED (
    SELECT DISTINCT w.word FROM unnest(%(words)s::text[]) AS w (word)
), session AS MATERIALIZED (
    -- Schemas in which a name may be found: those of search_path, and those that are named.
    SELECT ARRAY(SELECT n.oid FROM pg_namespace AS n
                 WHERE (n.nspname = ANY (current_schemas(true)) OR n.nspname IN (SELECT word FROM words))
                   AND n.nspname NOT IN ('information_schema', 'cacheservice')) AS visible
), found (class, obj) AS (
    SELECT 'pg_class'::regclass::oid, l.relation FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
    WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.relation >= 16384
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
      AND c.relnamespace NOT IN (SELECT n.oid FROM pg_namespace AS n WHERE n.nspname = 'cacheservice')
    UNION
    SELECT 'pg_type'::regclass::oid, t.oid FROM pg_type AS t WHERE t.oid = ANY (%(types)s::oid[]) AND t.oid >= 16384
    UNION
    SELECT 'pg_operator'::regclass::oid, o.oid FROM pg_operator AS o
    WHERE o.oprname = ANY (%(operators)s::name[]) AND o.oid >= 16384
    UNION
    SELECT 'pg_proc'::regclass::oid, k.castfunc FROM pg_cast AS k WHERE k.oid >= 16384 AND k.castfunc >= 16384
    UNION
    SELECT n.* FROM session AS s CROSS JOIN words AS w CROSS JOIN LATERAL (
        SELECT 'pg_proc'::regclass::oid, p.oid FROM pg_proc AS p
        WHERE p.proname = w.word::name AND p.oid >= 16384 AND p.pronamespace = ANY (s.visible)
        UNION ALL
        SELECT 'pg_class'::regclass::oid, c.oid FROM pg_class AS c
        WHERE c.relname = w.word::name AND c.oid >= 16384 AND c.relnamespace = ANY (s.visible)
          AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
        UNION ALL
        SELECT 'pg_type'::regclass::oid, t.oid FROM pg_type AS t
        WHERE t.typname = w.word::name AND t.oid >= 16384 AND t.typnamespace = ANY (s.visible)
    ) AS n
    UNION
    SELECT e.* FROM found AS f CROSS JOIN LATERAL (
        SELECT 'pg_rewrite'::regclass::oid, r.oid FROM pg_rewrite AS r
        WHERE f.class = 'pg_class'::regclass AND r.ev_class = f.obj
        UNION ALL
        SELECT 'pg_policy'::regclass::oid, p.oid FROM pg_policy AS p
        WHERE f.class = 'pg_class'::regclass AND p.polrelid = f.obj
        UNION ALL
        SELECT 'pg_attrdef'::regclass::oid, d.oid FROM pg_attrdef AS d
        JOIN pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
        WHERE f.class = 'pg_class'::regclass AND d.adrelid = f.obj AND a.attgenerated <> ''
        UNION ALL
        SELECT 'pg_type'::regclass::oid, a.atttypid FROM pg_attribute AS a
        WHERE f.class = 'pg_class'::regclass AND a.attrelid = f.obj AND a.attnum > 0 AND a.atttypid >= 16384
        UNION ALL
        SELECT 'pg_constraint'::regclass::oid, c.oid FROM pg_constraint AS c
        WHERE f.class = 'pg_type'::regclass AND c.contypid = f.obj
        UNION ALL
        SELECT d.refclassid, d.refobjid FROM pg_depend AS d
        WHERE f.class IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_attrdef'::regclass, 'pg_proc'::regclass,
                          'pg_constraint'::regclass)
          AND d.classid = f.class AND d.objid = f.obj AND d.refobjid >= 16384
          AND d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_operator'::regclass)
        UNION ALL
        SELECT 'pg_type'::regclass::oid, a.type
        FROM pg_proc AS p
        CROSS JOIN LATERAL unnest(p.proargtypes::oid[] || p.prorettype || p.proallargtypes) AS a (type)
        WHERE f.class = 'pg_proc'::regclass AND p.oid = f.obj AND a.type >= 16384
        UNION ALL
        SELECT 'pg_type'::regclass::oid, o.type FROM pg_type AS t
        CROSS JOIN LATERAL (
            SELECT unnest(ARRAY[t.typelem, t.typbasetype])
            UNION ALL SELECT r.rngsubtype FROM pg_range AS r WHERE r.rngtypid = t.oid
            UNION ALL SELECT r.rngtypid FROM pg_range AS r WHERE r.rngmultitypid = t.oid
        ) AS o (type)
        WHERE f.class = 'pg_type'::regclass AND t.oid = f.obj AND o.type >= 16384
        UNION ALL
        SELECT 'pg_class'::regclass::oid, t.typrelid FROM pg_type AS t
        WHERE f.class = 'pg_type'::regclass AND t.oid = f.obj AND t.typrelid <> 0
        UNION ALL
        SELECT 'pg_proc'::regclass::oid, o.oprcode::oid FROM pg_operator AS o
        WHERE f.class = 'pg_operator'::regclass AND o.oid = f.obj AND o.oprcode::oid >= 16384
    ) AS e
), roles (oid) AS (
    SELECT r.oid FROM pg_roles AS r WHERE r.rolname IN (current_user, session_user)
    UNION
    -- A view, and a function with SECURITY DEFINER, read as their owners.
    SELECT c.relowner FROM found AS f JOIN pg_class AS c ON c.oid = f.obj
    WHERE f.class = 'pg_class'::regclass AND c.relkind = 'v'
    UNION
    SELECT p.proowner FROM found AS f JOIN pg_proc AS p ON p.oid = f.obj
    WHERE f.class = 'pg_proc'::regclass AND p.prosecdef
    UNION
    SELECT m.roleid FROM pg_auth_members AS m JOIN roles AS r ON m.member = r.oid
), relations AS (
    SELECT c.*, r.oid AS rule,
           EXISTS (SELECT FROM found AS d JOIN pg_attrdef AS x ON x.oid = d.obj
                   WHERE d.class = 'pg_attrdef'::regclass AND x.adrelid = c.oid) AS generates
    FROM found AS f JOIN pg_class AS c ON c.oid = f.obj
    LEFT JOIN pg_rewrite AS r ON r.ev_class = c.oid AND r.rulename = '_RETURN'
    WHERE f.class = 'pg_class'::regclass
), functions AS (
    SELECT p.* FROM found AS f JOIN pg_proc AS p ON p.oid = f.obj WHERE f.class = 'pg_proc'::regclass
), types AS (
    SELECT t.* FROM found AS f JOIN pg_type AS t ON t.oid = f.obj WHERE f.class = 'pg_type'::regclass
)
SELECT jsonb_build_object(
    'relations', (SELECT jsonb_object_agg(oid, CASE relkind WHEN 'v' THEN 'view ' WHEN 'm' THEN 'materialized view '
                  WHEN 'c' THEN 'type ' WHEN 'f' THEN 'foreign table ' ELSE 'table ' END || relnamespace::regnamespace
                  || '.' || quote_ident(relname)) FROM relations),
    'views', (SELECT jsonb_agg(oid) FROM relations WHERE rule IS NOT NULL),
    'generated', (SELECT jsonb_agg(oid) FROM relations WHERE generates),
    'secured', (SELECT jsonb_agg(oid) FROM relations WHERE relrowsecurity),
    'parents', (SELECT jsonb_agg(oid) FROM relations WHERE relkind IN ('r', 'p', 'f')),
    'database', (SELECT oid FROM pg_database WHERE datname = current_database()),
    'login', (SELECT oid FROM pg_roles WHERE rolname = session_user),
    'functions', (SELECT jsonb_agg(DISTINCT proname) FROM (
        SELECT proname FROM functions UNION
        SELECT p.proname FROM words AS w JOIN pg_proc AS p ON p.proname = w.word::name UNION
        -- A type or a column that is called, until there is a function of that name.
        SELECT c.name::name FROM unnest(%(called)s::text[]) AS c (name)) AS f),
    'types', (SELECT jsonb_object_agg(oid, 'type ' || typnamespace::regnamespace || '.' || quote_ident(typname))
              FROM types WHERE typelem = 0 AND (typrelid = 0 OR NOT EXISTS
                  (SELECT FROM pg_class AS c WHERE c.oid = typrelid AND c.relkind <> 'c'))),
    'type_names', (SELECT jsonb_agg(DISTINCT t.typname) FROM words AS w JOIN pg_type AS t ON t.typname = w.word::name
                   WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = t.typrelid AND c.relkind <> 'c')),
    'enums', (SELECT jsonb_agg(oid) FROM types WHERE typtype = 'e'),
    'names', (SELECT jsonb_agg(DISTINCT c.relname) FROM relations AS c JOIN words AS w ON c.relname = w.word::name),
    'schemas', (SELECT jsonb_object_agg(n.oid, n.nspname) FROM pg_namespace AS n WHERE n.oid IN (
        SELECT relnamespace FROM relations UNION SELECT pronamespace FROM functions
        UNION SELECT unnest(visible) FROM session)),
    'members', (SELECT jsonb_agg(oid) FROM roles),
    'roles', (SELECT jsonb_object_agg(r.oid, quote_ident(r.rolname)) FROM pg_roles AS r WHERE r.oid IN (
        SELECT oid FROM roles UNION SELECT relowner FROM relations UNION SELECT proowner FROM functions)),
    'bodies', (SELECT jsonb_agg(concat_ws(E'\n', p.prosrc, array_to_string(p.proconfig, E'\n')))
               FROM functions AS p JOIN pg_language AS l ON l.oid = p.prolang
               WHERE l.lanname NOT IN ('c', 'internal')),
    -- To print a parsed text takes locks, so only those that call current_setting are (2077, 3294 in pg_proc.dat).
    'parsed', (SELECT jsonb_agg(t.parsed) FROM (
        SELECT CASE WHEN r.ev_action::text ~ ':funcid (2077|3294) ' THEN pg_get_viewdef(c.oid) END
        FROM relations AS c JOIN pg_rewrite AS r ON r.oid = c.rule
        UNION ALL
        SELECT CASE WHEN p.prosqlbody::text ~ ':funcid (2077|3294) ' THEN pg_get_function_sqlbody(p.oid) END
        FROM functions AS p
        UNION ALL
        SELECT CASE WHEN p.polqual::text ~ ':funcid (2077|3294) ' THEN pg_get_expr(p.polqual, p.polrelid) END
        FROM found AS f JOIN pg_policy AS p ON p.oid = f.obj WHERE f.class = 'pg_policy'::regclass) AS t (parsed)
        WHERE t.parsed IS NOT NULL)
)::text
"""


Objects = dict[str, Any]
"""Names and object identifiers by kind, as the JSON of the search returns them."""


async def find(guard: GuardedConnection, dataset: DatasetSettings, type_oids: Iterable[int]) -> Objects | None:
    """Find the dependencies of `dataset`, in the transaction that has read it.

    :param type_oids: the types of the query's columns.
    :returns: names and object identifiers by kind; None if functions call each other too deeply to follow.
    :raises QueryFailed: if this role may not read a catalog.
    """
    types = array(map(str, dict.fromkeys(type_oids)))
    texts = dict.fromkeys((dataset.query, dataset.probe))
    for _ in range(_MOST_ROUNDS):
        cursor = await guard.execute(
            _FIND
            % {
                "words": array(_every(words_of, texts)),
                "operators": array(_every(operators_of, texts)),
                "called": array(_every(_called_in, texts)),
                "types": types,
            }
        )
        objects: Objects = {kind: value for kind, value in json.loads(cursor.fetchone()[0]).items() if value}
        bodies, parsed = objects.pop("bodies", ()), objects.pop("parsed", ())
        if texts.keys() >= set(bodies):
            settings = {name.lower() for text in (*texts, *parsed) for name in _SETTING.findall(text)}
            objects["settings"] = sorted(settings | {name.lower() for name in OF_THE_ROLE})
            return objects
        texts |= dict.fromkeys(bodies)
    return None


def words_of(text: str) -> Iterator[str]:
    """Yield every part of `text` that may be a name, as the catalog may spell it."""
    for plain in _PLAIN.findall(text):
        # A server with a single-byte encoding folds all letters; other servers fold only ASCII letters.
        yield plain.translate(_ASCII_LOWER)
        yield plain.lower()
    # Between any two quotation marks, because a string before the name may hold a quotation mark of its own.
    yield from (part for part in text.split('"')[1:-1] if 0 < len(part) <= _MOST_CHARACTERS)
    yield from (name.replace('""', '"') for name in _WITH_QUOTES_INSIDE.findall(text) if '""' in name)


def _called_in(text: str) -> Iterator[str]:
    """Yield every name in `text` that stands before a parenthesis."""
    for name in _CALLED.findall(text):
        yield from words_of(name)


def operators_of(text: str) -> Iterator[str]:
    """Yield every part of `text` that may be an operator.

    `=-` may be two of them.
    """
    yield from _SPELT_OTHERWISE
    for run in _OPERATOR.findall(text):
        for start in range(len(run)):
            for end in range(start + 1, min(start + _LONGEST_OPERATOR, len(run)) + 1):
                yield run[start:end]


def _every(names: Callable[[str], Iterable[str]], texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for text in texts for name in names(text)))
