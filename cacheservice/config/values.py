"""Validates single values. The text of a ValueError is the problem, word for word."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from cacheservice.base import query_text
from cacheservice.config import session_rules, valkey_url

OWN_CHANNEL = "cacheservice"
DEFAULT_PUBLICATION = "cacheservice"
"""The channel of the triggers of watch, on which the service also tests that it receives notifications."""


def held_by_a_timer(seconds: float) -> float:
    if seconds > 2_000_000:
        raise ValueError("must be at most 2000000 (23 days): the reactor's timers hold at most 24 days")
    return seconds


def without_lookup(host: str) -> str:
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(
                'must be an IP address or "localhost": other names would need a blocking look-up'
            ) from None
    return host


def columns(value: object) -> tuple[object, ...]:
    columns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not columns or not all(isinstance(column, str) and column for column in columns):
        raise ValueError("must be the name of a column, or a list of such names")
    return columns


def channel(name: str) -> str:
    if "\0" in name:
        raise ValueError("must not contain a NUL character")
    if len(name.encode()) > 63:
        raise ValueError("must be at most 63 bytes long, as PostgreSQL's names are")
    if name == OWN_CHANNEL:
        raise ValueError(f'must not be "{OWN_CHANNEL}", which is the channel of the triggers of watch')
    return name


def statsd_prefix(prefix: str) -> str:
    if prefix and not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", prefix):
        raise ValueError("must be words of letters, digits, _ and -, with dots between them")
    return prefix


def valkey(url: SecretStr) -> SecretStr:
    valkey_url.parse(url.get_secret_value())  # its error is a ValueError without the password
    return url


def relation(name: str) -> str:
    if not re.fullmatch(rf"{session_rules.IDENTIFIER}(?:\.{session_rules.IDENTIFIER})?", name):
        raise ValueError("must be the name of a table as SQL writes it, such as public.products")
    return name


def tables_of_watch(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError('must be a list of tables, such as [{table = "public.products", key = "id"}]')
    return tuple(value)


Sql = Annotated[str, AfterValidator(query_text.closed)]
SearchPath = Annotated[str, AfterValidator(session_rules.search_path)]
SessionSettings = Annotated[Mapping[str, str], BeforeValidator(session_rules.session_settings)]
# A duration that becomes a timer of the reactor.
TimerSeconds = Annotated[float, Field(gt=0), AfterValidator(held_by_a_timer)]
