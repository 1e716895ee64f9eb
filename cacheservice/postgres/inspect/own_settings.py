"""Whether ALTER ROLE or ALTER DATABASE has chosen another form of values than refreshes have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cacheservice.config import DatasetSettings
from cacheservice.postgres.inspect.findings import Finding
from cacheservice.postgres.session_settings import RENDERING

_CHOSEN = """
SELECT DISTINCT ON (lower(split_part(c.setting, '=', 1)))
       split_part(c.setting, '=', 1), substr(c.setting, strpos(c.setting, '=') + 1)
FROM pg_db_role_setting AS s CROSS JOIN LATERAL unnest(s.setconfig) AS c (setting)
WHERE s.setdatabase IN (0, (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()))
  AND s.setrole IN (0, current_user::regrole)
ORDER BY lower(split_part(c.setting, '=', 1)), s.setrole = 0, s.setdatabase = 0
"""
"""What a session of this role begins with: a role's goes before a database's, one of both before either."""


def own_settings(cursor: Any, datasets: Sequence[DatasetSettings]) -> list[Finding]:
    """A hint for each setting that a session of this role has otherwise than a dataset that does not choose it."""
    cursor.execute(_CHOSEN)
    chosen = {name.lower(): value for name, value in cursor.fetchall()}
    findings = []
    for name, pinned in RENDERING.items():
        own = chosen.get(name.lower())
        if own is None or own.lower() == pinned.lower():
            continue
        names = [each.name for each in datasets if name.lower() not in {chosen.lower() for chosen in each.settings}]
        if names:
            shown = ", ".join(names)
            findings.append(
                Finding(
                    "hint",
                    f"{name} of this role is {own}, refreshes have {pinned}: in psql {shown} may look different",
                    f'if the role\'s is meant, settings = {{{name} = "{own}"}} for the dataset or in [postgres]',
                )
            )
    return findings
