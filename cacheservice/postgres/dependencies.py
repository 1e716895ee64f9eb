"""What a query depends on beside the rows of its tables: whether its documents still have the form that they had.

A full read finds the views, functions, types, policies and roles that the query uses, and keeps that list. Each later
attempt asks in its own transaction for a digest of the versions of their catalog rows (`xmin`, or the columns that
matter where ANALYZE, CREATE INDEX and the like write to a row, too), by index, and reads everything if it differs.
The list is a superset: relations that the transaction has locked, and everything that words of the query and of the
bodies of functions may name, so that an object that takes another's place is seen as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from cacheservice.cache.dataset import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.postgres.keys import literal
from cacheservice.postgres.session_settings import OF_THE_ROLE, pinned_sql

_WORD = re.compile(r'"((?:[^"]|"")+)"|([^\W\d][\w$]*)')
_CALLED = re.compile(r'(?:"((?:[^"]|"")+)"|([^\W\d][\w$]*))\s*\(')
_SETTING = re.compile(r"current_setting\s*\(\s*'([^']+)'", re.I)
_MOST_WORDS = 2000
_MOST_REMEMBERED = 256
"""Datasets whose questions are not made again for each attempt."""

UNKNOWN = "what the query depends on is not known yet"
OTHER_SETTINGS = "settings or search_path changed"

_NAMED = """
    SELECT 'pg_proc'::regclass::oid, p.oid FROM pg_proc AS p
    WHERE p.proname = {word}::name AND p.oid >= 16384 AND p.pronamespace = ANY (s.visible)
    UNION ALL
    SELECT 'pg_class'::regclass::oid, c.oid FROM pg_class AS c
    WHERE c.relname = {word}::name AND c.oid >= 16384 AND c.relnamespace = ANY (s.visible)
      AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    UNION ALL
    SELECT 'pg_type'::regclass::oid, t.oid FROM pg_type AS t
    WHERE t.typname = {word}::name AND t.oid >= 16384 AND t.typnamespace = ANY (s.visible)
"""
_FIND = r"""
WITH RECURSIVE words AS (
    SELECT DISTINCT w.word FROM unnest(%(words)s::text[]) AS w (word)
), session AS (
    -- Schemas in which a name of the query may be found: those of search_path, and those that it names.
    SELECT ARRAY(SELECT n.oid FROM pg_namespace AS n
                 WHERE (n.nspname = ANY (current_schemas(true)) OR n.nspname IN (SELECT word FROM words))
                   AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'cacheservice')) AS visible
), found (class, obj) AS (
    SELECT 'pg_class'::regclass::oid, l.relation FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
    WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.relation >= 16384
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
      AND c.relnamespace NOT IN (SELECT n.oid FROM pg_namespace AS n WHERE n.nspname = 'cacheservice')
    UNION
    SELECT 'pg_type'::regclass::oid, t.oid FROM pg_type AS t WHERE t.oid = ANY (%(types)s::oid[]) AND t.oid >= 16384
    UNION
    SELECT n.* FROM session AS s CROSS JOIN words AS w CROSS JOIN LATERAL (@NAMED@) AS n
    UNION
    SELECT e.* FROM found AS f CROSS JOIN session AS s CROSS JOIN LATERAL (
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
        SELECT d.refclassid, d.refobjid FROM pg_depend AS d
        WHERE f.class IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_attrdef'::regclass, 'pg_proc'::regclass)
          AND d.classid = f.class AND d.objid = f.obj AND d.refobjid >= 16384
          AND d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_operator'::regclass)
        UNION ALL
        SELECT 'pg_type'::regclass::oid, a.type
        FROM pg_proc AS p
        CROSS JOIN LATERAL unnest(p.proargtypes::oid[] || p.prorettype || p.proallargtypes) AS a (type)
        WHERE f.class = 'pg_proc'::regclass AND p.oid = f.obj AND a.type >= 16384
        UNION ALL
        SELECT n.* FROM pg_proc AS p
        CROSS JOIN LATERAL (
            SELECT DISTINCT coalesce(replace(m.part[1], '""', '"'), lower(m.part[2])) AS word
            FROM regexp_matches(p.prosrc, '"((?:[^"]|"")+)"|([[:alpha:]_][\w$]*)', 'g') AS m (part)
        ) AS w
        CROSS JOIN LATERAL (@NAMED@) AS n
        WHERE f.class = 'pg_proc'::regclass AND p.oid = f.obj
        UNION ALL
        SELECT 'pg_type'::regclass::oid, o.type FROM pg_type AS t
        CROSS JOIN LATERAL (
            SELECT unnest(ARRAY[t.typelem, t.typbasetype])
            UNION ALL SELECT r.rngsubtype FROM pg_range AS r WHERE r.rngtypid = t.oid
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
    SELECT m.roleid FROM pg_auth_members AS m JOIN roles AS r ON m.member = r.oid
), relations AS (
    SELECT c.*, r.oid IS NOT NULL AS rewritten,
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
    'views', (SELECT jsonb_agg(oid) FROM relations WHERE rewritten),
    'generated', (SELECT jsonb_agg(oid) FROM relations WHERE generates),
    'secured', (SELECT jsonb_agg(oid) FROM relations WHERE relrowsecurity),
    'others', (SELECT count(*) FROM types WHERE typtype <> 'e' AND typelem = 0 AND typrelid = 0),
    'database', (SELECT oid FROM pg_database WHERE datname = current_database()),
    'login', session_user::regrole::oid,
    'parents', (SELECT jsonb_agg(oid) FROM relations WHERE relhassubclass),
    'functions', (SELECT jsonb_agg(DISTINCT proname) FROM (
        SELECT proname FROM functions UNION
        SELECT p.proname FROM pg_proc AS p WHERE p.proname = ANY (%(called)s::name[])) AS f),
    'bodies', (SELECT jsonb_agg(prosrc) FROM functions),
    'policies', (SELECT jsonb_agg(concat(pg_get_expr(p.polqual, p.polrelid))) FROM found AS f
                 JOIN pg_policy AS p ON p.oid = f.obj WHERE f.class = 'pg_policy'::regclass),
    'types', (SELECT jsonb_object_agg(oid, 'type ' || typnamespace::regnamespace || '.' || quote_ident(typname))
              FROM types WHERE typelem = 0 AND (typrelid = 0 OR NOT EXISTS
                  (SELECT FROM pg_class AS c WHERE c.oid = typrelid AND c.relkind <> 'c'))),
    'enums', (SELECT jsonb_agg(oid) FROM types WHERE typtype = 'e'),
    'schemas', (SELECT jsonb_object_agg(n.oid, n.nspname) FROM pg_namespace AS n WHERE n.oid IN (
        SELECT relnamespace FROM relations UNION SELECT pronamespace FROM functions
        UNION SELECT unnest(visible) FROM session)),
    'members', (SELECT jsonb_agg(oid) FROM roles),
    'roles', (SELECT jsonb_object_agg(r.oid, quote_ident(r.rolname)) FROM pg_roles AS r WHERE r.oid IN (
        SELECT oid FROM roles UNION SELECT relowner FROM relations UNION SELECT proowner FROM functions)),
    'names', (SELECT jsonb_object_agg(w.word, c.oid) FROM words AS w
              JOIN relations AS c ON c.oid = to_regclass(quote_ident(w.word)))
)::text
"""

_REASONS: Mapping[str, str] = {
    "session": "the query runs as another role",
    "view": "{} was replaced",
    "function": "the function {} was created, replaced or dropped",
    "labels": "the labels of {} changed",
    "type": "{} changed",
    "security": "row security of {} was switched on or off",
    "policy": "a policy of {} changed",
    "columns": "the columns of {} changed",
    "generated": "a generated column of {} changed",
    "rights": "the rights on {}, or its owner, changed",
    "relation": "{} was renamed, moved or altered",
    "parts": "the partitions or children of {} changed",
    "name": "the name {} stands for another relation",
    "member": "the memberships of the role {} changed",
    "role": "the attributes of the role {} changed",
    "schema": "the rights on the schema {} changed",
    "setting": "the setting {} changed",
    "altered": "settings of the role or the database were altered",
    "operators": "an operator was created or dropped",
    "casts": "a cast was created or dropped",
}
"""What to say of each kind of difference, the most telling first."""
_BY_NAME = frozenset({"function", "setting", "name"})
"""Kinds whose id is the name of the object."""


def words_of(text: str) -> list[str]:
    """Everything in `text` that may be a name, as the catalog spells it."""
    return _names(_WORD, text)


def _names(pattern: re.Pattern[str], text: str) -> list[str]:
    found = (quoted.replace('""', '"') or plain.lower() for quoted, plain in pattern.findall(text))
    return list(dict.fromkeys(found))


def find_sql(dataset: DatasetSettings, type_oids: Iterable[int]) -> str:
    """The question for what `dataset` depends on, to be asked in the transaction that has read it.

    :param type_oids: the types of the query's columns.
    """
    text = f"{dataset.query}\n{dataset.probe}"
    return _FIND.replace("@NAMED@", _NAMED.format(word="w.word")) % {
        "words": _array(words_of(text)[:_MOST_WORDS]),
        "called": _array(_names(_CALLED, text)[:_MOST_WORDS]),
        "types": _array(map(str, dict.fromkeys(type_oids))),
    }


def found_objects(answer: bytes, dataset: DatasetSettings) -> str:
    """The answer to `find_sql`, and with what settings it was read: what the other functions take."""
    objects = {kind: value for kind, value in json.loads(answer).items() if value is not None}
    texts = [dataset.query, dataset.probe, *objects.pop("bodies", ()), *objects.pop("policies", ())]
    settings = {name.lower() for text in texts for name in _SETTING.findall(text)}
    objects["settings"] = sorted(settings | {name.lower() for name in OF_THE_ROLE})
    objects["session"] = _session(dataset)
    objects.setdefault("schemas", {})
    return json.dumps(objects, sort_keys=True)


def _session(dataset: DatasetSettings) -> str:
    """Of how a query is read: another one renders other documents."""
    return _hashed(dataset.query, dataset.probe, dataset.search_path, tuple(dataset.settings.items()))


@lru_cache(_MOST_REMEMBERED)
def _hashed(query: str, probe: str, search_path: str, settings: tuple[tuple[str, str], ...]) -> str:
    text = "\0".join([query, probe, search_path, pinned_sql(dict(settings))])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def problem(since: Snapshot, dataset: DatasetSettings) -> str | None:
    """Why everything has to be read, without a question; None if the digest has to be asked for."""
    if since.dependencies is None:
        return UNKNOWN
    return None if _recorded_session(since.dependencies.found) == _session(dataset) else OTHER_SETTINGS


@lru_cache(_MOST_REMEMBERED)
def _recorded_session(found: str) -> str:
    session: str = json.loads(found)["session"]
    return session


def digest_of(since: Snapshot | None) -> str:
    """`digest_sql` for a snapshot that has no `problem`."""
    assert since is not None
    assert since.dependencies is not None
    return digest_sql(since.dependencies.found)


@lru_cache(_MOST_REMEMBERED)
def digest_sql(objects: str) -> str:
    """A scalar expression: the digest of the objects' versions, as text."""
    parts = "\nUNION ALL\n".join(_parts(json.loads(objects), detailed=False))
    return f"(SELECT coalesce(sum(v.version), 0)::text FROM (\n{parts}\n) AS v (version))"  # noqa: S608  # catalogs


def versions_sql(objects: str) -> str:
    """The versions of the objects as (kind, id, hash), one row or more for each, to find out which one differs."""
    return "\nUNION ALL\n".join(_parts(json.loads(objects), detailed=True))


_VERSION = "hashint8extended(xmin::text::bigint, oid::bigint)"
_RIGHTS = "concat_ws(' ', c.relowner, has_any_column_privilege(c.oid, 'SELECT'), c.relacl)"
_SECURITY = "concat(c.relrowsecurity, c.relforcerowsecurity, row_security_active(c.oid))"
_RELATION = "concat_ws(' ', c.relname, c.relnamespace, c.relkind, CASE WHEN c.relkind = 'v' THEN c.reloptions END)"


def _parts(objects: Mapping[str, Any], *, detailed: bool) -> list[str]:
    """A SELECT for each catalog that holds something of the objects; without details one of fewer and of fewer rows."""

    def part(kind: str, name: str, version: str, source: str) -> str:
        columns = f"'{kind}'::text, {name}::text, {version}" if detailed else version
        return f"SELECT {columns} FROM {source}"  # noqa: S608  # catalogs

    parts = [
        *_scalars(objects, detailed=detailed),
        part(
            "altered",
            "''",
            "hashint8extended(xmin::text::bigint, setrole::bigint)",
            f"pg_db_role_setting WHERE setdatabase IN (0, {objects['database']}) "
            f"AND setrole IN (0, {objects['login']})",
        ),
    ]
    if relations := list(objects.get("relations", ())):
        those = f"c.oid = ANY ({_array(relations)}::oid[])"
        for kind, value in (
            {"rights": _RIGHTS, "security": _SECURITY, "relation": _RELATION}
            if detailed
            else {"relation": f"concat_ws(' ', {_RIGHTS}, {_SECURITY}, {_RELATION})"}
        ).items():
            parts.append(
                part(kind, "c.oid", f"hashtextextended({value}, c.oid::bigint)", f"pg_class AS c WHERE {those}")
            )
    secured = objects.get("secured", ())
    for kind, name, version, table, ids in (
        (
            "columns",
            "attrelid",
            "hashint8extended(xmin::text::bigint, attrelid::bigint * 2048 + attnum)",
            "pg_attribute",
            relations,
        ),
        ("policy", "polrelid", _VERSION, "pg_policy", secured),
        ("view", "ev_class", _VERSION, "pg_rewrite", objects.get("views", ())),
        ("labels", "enumtypid", _VERSION, "pg_enum", objects.get("enums", ())),
        ("type", "oid", _VERSION, "pg_type", list(objects.get("types", ()))),
        ("generated", "adrelid", _VERSION, "pg_attrdef", objects.get("generated", ())),
        (
            "parts",
            "inhparent",
            "hashint8extended(xmin::text::bigint, inhrelid::bigint)",
            "pg_inherits",
            objects.get("parents", ()),
        ),
        (
            "role",
            "oid",
            "hashint8extended(rolsuper::int + 2 * rolbypassrls::int + 4 * rolinherit::int, oid::bigint)",
            "pg_roles",
            # Who may pass row security, and whom policies name: without any, the rights above say all.
            list(objects.get("roles", ())) if secured else (),
        ),
        (
            "member",
            "member",
            "hashint8extended(xmin::text::bigint, roleid::bigint)",
            "pg_auth_members",
            objects.get("members", ()) if secured else (),
        ),
    ):
        if ids:
            parts.append(part(kind, name, version, f"{table} WHERE {name} = ANY ({_array(ids)}::oid[])"))
    if functions := objects.get("functions"):
        where = (
            f"proname = ANY ({_array(functions)}::name[]) AND pronamespace = ANY ({_array(objects['schemas'])}::oid[])"
        )
        parts.append(part("function", "proname", _VERSION, f"pg_proc WHERE {where}"))
    return parts


def _scalars(objects: Mapping[str, Any], *, detailed: bool) -> list[str]:
    """What needs no scan: in details a row for each, otherwise one for all."""
    values = [("session", "", "concat_ws(' ', current_user, session_user)")]
    values += [("setting", name, f"current_setting({literal(name)}, true)") for name in objects["settings"]]
    values += [("name", name, f"to_regclass({literal(_quoted(name))})::oid") for name in objects.get("names", ())]
    values += [("schema", oid, f"has_schema_privilege({oid}::oid, 'USAGE')") for oid in objects["schemas"]]
    if objects.get("others"):
        # Each catalog's greatest oid comes from the end of its index.
        values += [
            ("operators", "", "(SELECT max(oid) FROM pg_operator)"),
            ("casts", "", "(SELECT max(oid) FROM pg_cast)"),
        ]
    if not detailed:
        # A NULL has to differ from nothing, and from what stands beside it.
        everything = ", ".join(f"coalesce(({value})::text, '<NULL>')" for _, _, value in values)
        return [f"SELECT hashtextextended(concat_ws(E'\\x01', {everything}), 0)"]
    return [
        f"SELECT {literal(kind)}::text, {literal(name)}::text, hashtextextended(concat({value}), {place})"
        for place, (kind, name, value) in enumerate(values)
    ]


Version = tuple[bytes, bytes, int]
"""What `versions_sql` gives: the kind, the id, a hash."""


def with_versions(objects: str, versions: Iterable[Version]) -> str:
    """What `Dependencies.found` holds: the objects, and their versions as they were then."""
    return json.dumps(json.loads(objects) | {"versions": [[*key, total] for key, total in _sums(versions).items()]})


def difference(found: str, now: Iterable[Version]) -> str:
    """Why documents may have another form, in words that name the object.

    :param now: the answer to `versions_sql`.
    """
    objects = json.loads(found)
    old = {(kind, name): total for kind, name, total in objects["versions"]}
    new = _sums(now)
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if not changed:
        return "something that the query depends on changed"
    kinds = list(_REASONS)
    kind, name = min(changed, key=lambda each: (kinds.index(each[0]), each[1]))
    named = {"role": "roles", "member": "roles", "schema": "schemas"}.get(kind)
    labels = objects.get(named, {}) if named else {**objects.get("relations", {}), **objects.get("types", {})}
    return _REASONS[kind].format(name if kind in _BY_NAME else labels.get(name, name))


def _sums(rows: Iterable[Version]) -> dict[tuple[str, str], int]:
    sums: dict[tuple[str, str], int] = {}
    for kind, name, version in rows:
        key = (kind.decode(), name.decode())
        sums[key] = sums.get(key, 0) + version
    return sums


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _array(values: Iterable[object]) -> str:
    escaped = (str(value).replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return literal("{" + ",".join(f'"{value}"' for value in escaped) + "}")
