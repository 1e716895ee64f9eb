"""The oldest PostgreSQL version that the service and its commands support."""

from __future__ import annotations

OLDEST_VERSION = 140_000
"""The version in libpq's format."""


def too_old(version: int) -> str | None:
    """Return why a server of that version cannot be used; None if it can.

    None also if a proxy hides the version (0).
    """
    if version == 0 or version >= OLDEST_VERSION:
        return None
    shown = f"{version // 10_000}.{version % 10_000}"
    return f"PostgreSQL {shown} is too old; use PostgreSQL {OLDEST_VERSION // 10_000} or later"
