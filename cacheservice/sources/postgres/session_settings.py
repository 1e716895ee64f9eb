"""The settings of a reading transaction.

They limit the transaction, decide where names are found, and how values are read and rendered. A document is text that
the server renders, so every setting that affects rendering belongs to the query. All are set LOCAL and after BEGIN:
otherwise a transaction-pooling proxy would leak them to other clients, just as it leaks the settings of those clients
to us.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from cacheservice.config import DatasetSettings
from cacheservice.config.session_rules import DEFAULT_SEARCH_PATH
from cacheservice.sources.postgres.quoting import literal, quoted

RENDERING: Mapping[str, str] = MappingProxyType(
    {
        "TimeZone": "UTC",
        "IntervalStyle": "postgres",
        "bytea_output": "hex",
        "extra_float_digits": "1",
        "lc_monetary": "C",
        "lc_numeric": "C",
        "lc_time": "C",
        "xmlbinary": "base64",
        "xmloption": "content",
        "quote_all_identifiers": "off",
    }
)
"""The settings that render values as text. "C" is the only locale that every server has."""
MEANING: Mapping[str, str] = MappingProxyType(
    {
        "standard_conforming_strings": "on",
        "array_nulls": "on",
        "backslash_quote": "safe_encoding",
        "transform_null_equals": "off",
        "row_security": "on",
        "gin_fuzzy_search_limit": "0",
    }
)
"""The settings that change the meaning of a query, at PostgreSQL's own defaults."""
OF_THE_ROLE = ("DateStyle", "default_text_search_config", "timezone_abbreviations", "role")
"""The settings that change the meaning of a query, and that initdb or the role chose.

Their choice stays; another client's SET does not. For DateStyle this is the order of day and month in input; output is
ISO.
"""


class Limits(NamedTuple):
    """The limits of a reading transaction, in milliseconds.

    None is 0, which would mean "no limit".
    """

    statement_ms: int
    lock_ms: int
    idle_ms: int


_STATEMENT_SHARE = 0.95
"""The server's own timeouts come a little before our deadline, because its errors are more specific than silence."""
_LOCK_SHARE = 0.9
_SIGNIFICANT_BITS = 7


def limits(remaining_s: float) -> Limits:
    """Return the limits of a transaction that may take this long."""
    remaining_ms = remaining_s * 1000
    return Limits(statement_ms(remaining_s), rounded(remaining_ms * _LOCK_SHARE), rounded(remaining_ms))


def statement_ms(remaining_s: float) -> int:
    """Return the limit of a statement that may take this long, in milliseconds."""
    return rounded(remaining_s * 1000 * _STATEMENT_SHARE)


def rounded(number: float) -> int:
    """Round a number for the text of a statement down, to 64 steps per octave.

    The server counts each text as another statement (pg_stat_statements), so few values are used. The result is at
    least 1, because 0 would mean "no limit".
    """
    whole = max(1, int(number))
    step = 1 << max(0, whole.bit_length() - _SIGNIFICANT_BITS)
    return whole // step * step


_TRANSACTION_TIMEOUT_SINCE = 170_000


def without_transaction_timeout(server_version: int) -> str:
    """Return the statement that lifts the role's transaction_timeout.

    That timeout would end the session, and we have limits of our own.
    """
    return "SET LOCAL transaction_timeout = 0;" if server_version >= _TRANSACTION_TIMEOUT_SINCE else ""


def begin_reading(dataset: DatasetSettings, limits: Limits, *, pinned: bool = True) -> str:
    """Return the statements that begin a transaction in which `dataset` is read.

    None of them takes the snapshot. The grants of a session limit its rights; these settings limit the damage of
    mistakes.

    :param pinned: False if `pinning_expression` is to follow.
    """
    return f"""
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET LOCAL search_path TO {dataset.search_path or DEFAULT_SEARCH_PATH};
SET LOCAL statement_timeout = {limits.statement_ms};
SET LOCAL lock_timeout = {limits.lock_ms};
SET LOCAL idle_in_transaction_session_timeout = {limits.idle_ms};
SET LOCAL client_connection_check_interval = 1000;
SET LOCAL cursor_tuple_fraction = 1;
{pinned_sql(dataset.settings) if pinned else ""}
"""


def pinned_sql(chosen: Mapping[str, str]) -> str:
    """Return the statements that pin rendering and meaning; `chosen` takes precedence."""
    return "\n".join(
        f"SET LOCAL {_setting(name)} TO {'DEFAULT' if value is None else literal(value)};"
        for name, value in _pinned(chosen)
    )


def pinning_expression(chosen: Mapping[str, str]) -> str:
    """Return the same as an expression for a SELECT, which takes the snapshot.

    It costs a third if it is prepared.
    """
    return _pinning_expression(tuple(chosen.items()))


@lru_cache(maxsize=100)
def _pinning_expression(chosen: tuple[tuple[str, str], ...]) -> str:
    calls = (
        f"set_config({literal(name)}, {'NULL' if value is None else literal(value)}, true)"
        for name, value in _pinned(dict(chosen))
    )
    return f"concat({', '.join(calls)})"


def _pinned(chosen: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yield names and values in their order; None is the role's or the server's own."""
    known = {name.lower() for name in chosen}
    for name in OF_THE_ROLE:
        if name.lower() not in known:
            yield name, None
    if "datestyle" not in known:
        yield "DateStyle", "ISO"
    for name, value in {**RENDERING, **MEANING}.items():
        if name.lower() not in known:
            yield name, value
    yield from chosen.items()


def _setting(name: str) -> str:
    """Return a setting's quoted name; that of an extension's setting has a dot between its parts."""
    return ".".join(map(quoted, name.split(".")))
