"""Settings of the role that render values differently from refreshes.

They come from ALTER ROLE and ALTER DATABASE.
"""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.base.interfaces import BlockingCursor
from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres.inspect.findings import Finding
from cacheservice.sources.postgres.session_settings import RENDERING

_CHOSEN = """
SELECT DISTINCT ON (lower(split_part(c.setting, '=', 1)))
       split_part(c.setting, '=', 1), substr(c.setting, strpos(c.setting, '=') + 1)
FROM pg_db_role_setting AS s CROSS JOIN LATERAL unnest(s.setconfig) AS c (setting)
WHERE s.setdatabase IN (0, (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()))
  AND s.setrole IN (0, (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = current_user))
ORDER BY lower(split_part(c.setting, '=', 1)), s.setrole = 0, s.setdatabase = 0
"""
"""Settings of a new session of this role. The more specific setting wins (PostgreSQL manual, ALTER ROLE)."""


def own_settings(cursor: BlockingCursor, datasets: Sequence[DatasetSettings]) -> list[Finding]:
    """Return a hint for each setting of the role that differs from a dataset's own.

    The dataset's setting is the pinned one.
    """
    cursor.execute(_CHOSEN)
    chosen = {name.lower(): value for name, value in cursor.fetchall()}
    findings = []
    for name, pinned in RENDERING.items():
        own = chosen.get(name.lower())
        if own is None or own.lower() == pinned.lower():
            continue
        names = [each.name for each in datasets if name.lower() not in map(str.lower, each.settings)]
        if names:
            shown = ", ".join(names)
            findings.append(
                Finding(
                    "hint",
                    f"this role has {name} = {own}, but refreshes use {pinned}: {shown} may look different in psql",
                    f'to use the role\'s value, set settings = {{{name} = "{own}"}} in [postgres] or the dataset',
                )
            )
    return findings
