"""Tracks the objects that a query depends on beside the rows of its tables.

They decide whether the documents still have the same form. A full read finds the views, functions, types, policies and
roles that the query uses (`dependency_search`), and keeps that list. Each later attempt asks in its own transaction for
a digest of the versions of their catalog rows, by index, and reads everything if the digest differs. A version is
`xmin`, or the relevant columns if ANALYZE, CREATE INDEX and the like also write to the row. A statement sees the
catalog as it is now, which may be newer than its transaction's snapshot. Therefore the digest is asked for once more
when rows have been read and the transaction has ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres.dependency_search import Objects
from cacheservice.sources.postgres.quoting import array, literal
from cacheservice.sources.postgres.session_settings import pinned_sql

_MOST_REMEMBERED = 256
"""Datasets whose queries for the digest are cached between attempts."""

UNKNOWN = "what the query depends on is not known yet"
OTHER_SETTINGS = "settings or search_path changed"

_REASONS: Mapping[str, str] = {
    "session": "the query runs as another role",
    "view": "{} was replaced",
    "function": "the function {} was created, replaced or dropped",
    "labels": "the labels of {} changed",
    "type": "{} changed",
    "constraint": "a constraint of {} changed",
    "security": "row security of {} was switched on or off",
    "policy": "a policy of {} changed",
    "columns": "the columns of {} changed",
    "generated": "a generated column of {} changed",
    "rights": "the rights on {}, or its owner, changed",
    "relation": "{} was renamed, moved or altered",
    "parts": "the partitions or children of {} changed",
    "name": "the name {} may stand for another relation",
    "type_name": "a type named {} was created, altered or dropped",
    "member": "the memberships of the role {} changed",
    "role": "the attributes of the role {} changed",
    "path": "the schemas of search_path that the role may use changed",
    "schema": "the name of the schema {}, or the rights on it, changed",
    "setting": "the setting {} changed",
    "altered": "settings of the role or the database were altered",
    "operators": "an operator was created, altered or dropped",
    "text search": "a text search configuration or dictionary was created, altered or dropped",
    "collations": "a collation was created, altered or dropped",
    "casts": "a cast was created, altered or dropped",
}
"""The message for each kind of difference, the most specific first."""
_BY_NAME = frozenset({"function", "setting", "name", "type_name"})
"""Kinds whose id is the name of the object."""
PATH = "array(SELECT s FROM unnest(current_schemas(true)) AS s WHERE s NOT LIKE 'pg\\_temp%')"
"""Schemas that the role may not use, or that do not exist yet, are not included."""
ALTERED = _REASONS["altered"]
OWN_SETTINGS = """(
    SELECT concat(sum(hashint8extended(s.xmin::text::bigint, s.setrole::bigint))) FROM pg_db_role_setting AS s
    WHERE s.setdatabase IN (0, (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()))
      AND s.setrole IN (0, (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = session_user)))"""
"""A digest of the settings that a session takes when it begins."""


def with_session(objects: Objects, dataset: DatasetSettings) -> str:
    """Return the found objects, and a hash of the settings of the read, as text.

    The other functions take this text.
    """
    return json.dumps({"schemas": {}, **objects, "session": _session(dataset)}, sort_keys=True)


def _session(dataset: DatasetSettings) -> str:
    """Return a hash of the way a query is read; with another one documents may differ."""
    return _hashed(dataset.query, dataset.probe, dataset.search_path, tuple(dataset.settings.items()))


@lru_cache(_MOST_REMEMBERED)
def _hashed(query: str, probe: str, search_path: str, settings: tuple[tuple[str, str], ...]) -> str:
    text = "\0".join([query, probe, search_path, pinned_sql(dict(settings))])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def problem(since: Snapshot, dataset: DatasetSettings) -> str | None:
    """Return the reason for a full read that is known without asking the database.

    None if the digest has to be asked for.
    """
    if since.dependencies is None:
        return UNKNOWN
    return None if _recorded_session(since.dependencies.found) == _session(dataset) else OTHER_SETTINGS


@lru_cache(_MOST_REMEMBERED)
def _recorded_session(found: str) -> str:
    session: str = json.loads(found)["session"]
    return session


def digest_of(since: Snapshot | None) -> str:
    """Return `digest_sql` for a snapshot that has no `problem`."""
    assert since is not None
    assert since.dependencies is not None
    return digest_sql(since.dependencies.found)


@lru_cache(_MOST_REMEMBERED)
def digest_sql(found: str) -> str:
    """Return a scalar expression for the digests of the catalog and of the session.

    The first is that of `catalog_digest_sql`. The value holds no white space.
    """
    # A NULL has to differ from an empty text and from its neighbours.
    state = ", ".join(f"coalesce(({value})::text, '<NULL>')" for _, _, value in _session_state(json.loads(found)))
    return f"concat({catalog_digest_sql(found)}, '/', hashtextextended(concat_ws(E'\\x01', {state}), 0))"


@lru_cache(_MOST_REMEMBERED)
def catalog_digest_sql(found: str) -> str:
    """Return a scalar expression for the digest of the objects' catalog rows.

    It covers their versions. It does not depend on the transaction's settings, so it can be asked for again once that
    transaction has ended.
    """
    parts = "\nUNION ALL\n".join(_catalog(json.loads(found), detailed=False))
    return f"(SELECT coalesce(sum(v.version), 0)::text FROM (\n{parts}\n) AS v (version))"  # noqa: S608  # catalogs


def catalog_part(digest: str) -> str:
    """Return the part of a digest that comes from `catalog_digest_sql`."""
    return digest.partition("/")[0]


def versions_sql(found: str) -> str:
    """Return a query for the versions of the objects as (kind, id, hash).

    It returns one row or more for each object, and shows which one differs.
    """
    objects = json.loads(found)
    state = (
        f"SELECT {literal(kind)}::text, {literal(name)}::text, hashtextextended(concat({value}), {place})"
        for place, (kind, name, value) in enumerate(_session_state(objects))
    )
    return "\nUNION ALL\n".join((*state, *_catalog(objects, detailed=True)))


def _session_state(objects: Objects) -> list[tuple[str, str, str]]:
    """Return the digest's parts beside the catalog, as kind, name and expression."""
    return [
        ("session", "", "concat_ws(' ', current_user, session_user)"),
        ("path", "", PATH),
        *(("setting", name, f"current_setting({literal(name)}, true)") for name in objects["settings"]),
        *(("schema", oid, f"has_schema_privilege({oid}::oid, 'USAGE')") for oid in objects["schemas"]),
    ]


_VERSION = "hashint8extended(xmin::text::bigint, oid::bigint)"
_MAPPING = "hashoidextended(mapdict, (mapcfg::bigint << 32) + (maptokentype << 16) + mapseqno)"
"""PostgreSQL itself has hundreds of these rows, and `xmin` takes longer to hash."""
_GRANTED = (
    "(SELECT string_agg(concat_ws(' ', a.grantee, a.privilege_type), ',' ORDER BY a.grantee, a.privilege_type) "
    "FROM aclexplode({acl}) AS a WHERE a.grantee = ANY (@members::oid[]))"
)
"""Rights of other roles do not count, because some applications create and drop them every few minutes."""
_RIGHTS = f"concat_ws(' ', c.relowner, has_any_column_privilege(c.oid, 'SELECT'), {_GRANTED.format(acl='c.relacl')})"
_SCHEMA = f"hashtextextended(concat_ws(' ', nspname, nspowner, {_GRANTED.format(acl='nspacl')}), oid::bigint)"
_SECURITY = "concat(c.relrowsecurity, c.relforcerowsecurity, row_security_active(c.oid))"
_RELATION = "concat_ws(' ', c.relname, c.relnamespace, c.relkind, CASE WHEN c.relkind = 'v' THEN c.reloptions END)"


def _catalog(objects: Objects, *, detailed: bool) -> list[str]:
    """Return a SELECT for each catalog that holds rows of the objects.

    Without details they have fewer columns and fewer rows.
    """

    def part(kind: str, name: str, version: str, source: str) -> str:
        columns = f"'{kind}'::text, {name}::text, {version}" if detailed else version
        return f"SELECT {columns} FROM {source}"  # noqa: S608  # catalogs

    relations = list(objects.get("relations", ()))
    secured = objects.get("secured", ())
    in_schemas = f"= ANY ({array(objects['schemas'])}::oid[])"
    members = array([0, *objects.get("members", ())])  # 0 is PUBLIC
    settings = f"setdatabase IN (0, {objects['database']}) AND setrole IN (0, {objects['login']})"
    parts = [
        part(
            "altered",
            "''",
            "hashint8extended(xmin::text::bigint, setrole::bigint)",
            f"pg_db_role_setting WHERE {settings}",
        ),
        # Few of these rows are not PostgreSQL's own, and their oids are at the end of an index.
        part("operators", "''", _VERSION, "pg_operator WHERE oid >= 16384"),
        part("collations", "''", _VERSION, "pg_collation WHERE oid >= 16384"),
        part("casts", "''", _VERSION, "pg_cast WHERE oid >= 16384"),
        part("schema", "oid", _SCHEMA.replace("@members", members), f"pg_namespace WHERE oid {in_schemas}"),
        part("text search", "''", _VERSION, "pg_ts_config WHERE oid >= 16384"),
        # PostgreSQL's own rows can be altered, too.
        part("text search", "''", _VERSION, "pg_ts_dict"),
        part("text search", "''", _MAPPING, "pg_ts_config_map"),
    ]
    if relations:
        rights = _RIGHTS.replace("@members", members)
        those = f"c.oid = ANY ({array(relations)}::oid[])"
        for kind, value in (
            {"rights": rights, "security": _SECURITY, "relation": _RELATION}
            if detailed
            else {"relation": f"concat_ws(' ', {rights}, {_SECURITY}, {_RELATION})"}
        ).items():
            parts.append(
                part(kind, "c.oid", f"hashtextextended({value}, c.oid::bigint)", f"pg_class AS c WHERE {those}")
            )
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
        ("constraint", "contypid", _VERSION, "pg_constraint", list(objects.get("types", ()))),
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
            list(objects.get("roles", ())),
        ),
        (
            "member",
            "member",
            "hashint8extended(xmin::text::bigint, roleid::bigint)",
            "pg_auth_members",
            objects.get("members", ()),
        ),
    ):
        if ids:
            parts.append(part(kind, name, version, f"{table} WHERE {name} = ANY ({array(ids)}::oid[])"))
    # Objects that a name may refer to, including objects created later in a searched schema.
    for kind, name, version, table, schema, names in (
        ("function", "proname", _VERSION, "pg_proc", "pronamespace", objects.get("functions", ())),
        ("type_name", "typname", _VERSION, "pg_type", "typnamespace", objects.get("type_names", ())),
        ("name", "relname", "hashint8extended(oid::bigint, 0)", "pg_class", "relnamespace", objects.get("names", ())),
    ):
        if names:
            where = f"{name} = ANY ({array(names)}::name[]) AND {schema} {in_schemas}"
            parts.append(part(kind, name, version, f"{table} WHERE {where}"))
    return parts


Version = tuple[bytes, bytes, int]
"""A row of `versions_sql`: the kind, the id, a hash."""


def with_versions(objects: str, versions: Iterable[Version]) -> str:
    """Return the content of `Dependencies.found`: the objects and their versions."""
    return json.dumps(json.loads(objects) | {"versions": [[*key, total] for key, total in _sums(versions).items()]})


class Difference(NamedTuple):
    """Why documents may have another form, in words that name the object.

    :param of_settings: whether settings that sessions take at their start have changed.
    """

    reason: str
    of_settings: bool


def difference(found: str, now: Iterable[Version]) -> Difference:
    """Compare the recorded versions with the current ones.

    :param now: the answer to `versions_sql`.
    """
    objects = json.loads(found)
    old = {(kind, name): total for kind, name, total in objects["versions"]}
    new = _sums(now)
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if not changed:
        return Difference("something that the query depends on changed", of_settings=False)
    kinds = list(_REASONS)
    kind, name = min(changed, key=lambda each: (kinds.index(each[0]), each[1]))
    named = {"role": "roles", "member": "roles", "schema": "schemas"}.get(kind)
    labels = objects.get(named, {}) if named else {**objects.get("relations", {}), **objects.get("types", {})}
    of_relation = kind in ("security", "rights", "relation")
    words = "{} was dropped" if of_relation and ("relation", name) not in new else _REASONS[kind]
    reason = words.format(name if kind in _BY_NAME else labels.get(name, name))
    return Difference(reason, of_settings=any(each == "altered" for each, _ in changed))


def _sums(rows: Iterable[Version]) -> dict[tuple[str, str], int]:
    sums: dict[tuple[str, str], int] = {}
    for kind, name, version in rows:
        key = (kind.decode(), name.decode())
        sums[key] = sums.get(key, 0) + version
    return sums
