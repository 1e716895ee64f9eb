"""Checks the settings of a reading transaction: `search_path`, and `settings` of PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Mapping

DEFAULT_SEARCH_PATH = "pg_catalog, public, pg_temp"
IDENTIFIER = r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'
_SEARCH_PATH = re.compile(rf"{IDENTIFIER}(?:\s*,\s*{IDENTIFIER})*")
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)*")

_BY_THE_SERVICE = "the service sets it for each transaction, "
_READ_ONLY = "the service only reads"
_REFUSED: Mapping[str, str] = {
    "statement_timeout": _BY_THE_SERVICE + "by timeout_s",
    "lock_timeout": _BY_THE_SERVICE + "by timeout_s",
    "idle_in_transaction_session_timeout": _BY_THE_SERVICE + "by timeout_s",
    "transaction_timeout": _BY_THE_SERVICE + "by timeout_s",
    "idle_session_timeout": "the service keeps sessions as long as it needs them",
    "client_connection_check_interval": _BY_THE_SERVICE + "so that an abandoned query ends",
    "cursor_tuple_fraction": _BY_THE_SERVICE + "because it reads to the end",
    "application_name": "the service names its sessions for each attempt; set application_name in postgres.dsn",
    "search_path": "use the key search_path",
    "client_encoding": "documents are always UTF-8",
    "session_authorization": "log in as that role, in postgres.dsn",
    "role": "log in as that role, in postgres.dsn",
    "default_transaction_read_only": _READ_ONLY,
    "transaction_read_only": _READ_ONLY,
    "default_transaction_isolation": "a dataset is read from one snapshot",
    "transaction_isolation": "a dataset is read from one snapshot",
    "default_transaction_deferrable": "it has no effect on the transactions of the service",
    "transaction_deferrable": "it has no effect on the transactions of the service",
}


def search_path(value: str) -> str:
    """Return the search path with the schema of temporary objects last.

    :raises ValueError: if it is not a list of schemas as SQL writes it.
    """
    if not value:
        return value
    if not _SEARCH_PATH.fullmatch(value):
        raise ValueError('must be schemas as SQL writes them, such as "pg_catalog, public, ext"')
    # Unless it is named, temporary objects come first: behind a pooler they may be another client's.
    named = {name.strip().lower() for name in value.split(",")}
    return value if named & {"pg_temp", '"pg_temp"'} else f"{value}, pg_temp"


def session_settings(value: object) -> object:
    """Return a table of settings with its names and values as text.

    :raises ValueError: with the name that is refused, and the reason.
    """
    if not isinstance(value, Mapping):
        return value
    for name, chosen in value.items():
        if not _SETTING.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a setting of PostgreSQL")
        if (reason := _REFUSED.get(name.lower())) is not None:
            raise ValueError(f"{name} cannot be set here: {reason}")
        if not isinstance(chosen, str | int | float):
            raise ValueError(f"{name} must be text, a number, true or false")
    lowered = [name.lower() for name in value]
    if twice := sorted({name for name in lowered if lowered.count(name) > 1}):
        raise ValueError(f"{twice[0]} is set twice")
    return {name: _text(chosen) for name, chosen in value.items()}


def merged(general: Mapping[str, str], own: Mapping[str, str]) -> Mapping[str, str]:
    """Return both tables of settings, `own` over `general`; the case of names makes no difference."""
    names = {name.lower() for name in own}
    inherited = {name: value for name, value in general.items() if name.lower() not in names}
    return {**inherited, **own}


def _text(value: str | float) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
