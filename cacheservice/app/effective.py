"""Which changed keys of the configuration take effect without a restart."""

from __future__ import annotations

from typing import Any

from cacheservice import config
from cacheservice.config import Settings

AT_ONCE = frozenset(
    {
        "postgres.dsn",
        "postgres.connect_timeout_s",
        "postgres.max_connections",
        "postgres.max_load",
        "postgres.capture",
        "postgres.publication",
        "postgres.search_path",
        "postgres.settings",
        "limits.max_connections",
        "limits.idle_timeout_s",
        "log.level",
    }
)
"""Keys outside `datasets` that take effect without a restart."""
_AT_ONCE_IF_SET = frozenset(config.CLIENT_SECRETS)
"""Keys that take effect without a restart if a new secret replaces an old one."""
_OF_DATASETS = frozenset({"defaults", "datasets"})


def needs_restart(started: Settings, settings: Settings) -> list[str]:
    """Return the changed keys that need a restart; they keep their old values."""
    return [
        f"{table}.{key}"
        for table in Settings.model_fields
        if table not in _OF_DATASETS
        for key in type(getattr(settings, table)).model_fields
        if f"{table}.{key}" not in AT_ONCE
        if _differ(f"{table}.{key}", getattr(getattr(started, table), key), getattr(getattr(settings, table), key))
    ]


def effective(started: Settings, settings: Settings) -> Settings:
    """Return `settings` with the old values of the keys that need a restart."""
    kept: dict[str, dict[str, Any]] = {}
    for name in needs_restart(started, settings):
        table, _, key = name.partition(".")
        kept.setdefault(table, {})[key] = getattr(getattr(started, table), key)
    tables = {table: getattr(settings, table).model_copy(update=values) for table, values in kept.items()}
    return settings.model_copy(update=tables)


def _differ(key: str, started: object, now: object) -> bool:
    return bool(started) != bool(now) if key in _AT_ONCE_IF_SET else started != now
