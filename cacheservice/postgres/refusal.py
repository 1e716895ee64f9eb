"""Why no session opened: each address with its own cause, in one line, and what to do about the most telling one."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Sequence
from typing import NamedTuple

import psycopg2

from cacheservice.errors import DatabaseUnavailable, DeadlineExceeded, LoginRefused, NoSessionLeft
from cacheservice.postgres import advice
from cacheservice.postgres.target import Target

_FEW_DESCRIPTORS = 4
_TOO_MANY_CONNECTIONS = "53300"
_INVALID_LOGIN = "28"
_INVALID_LOGIN_WORDS = re.compile("(password|SASL) authentication failed|no password supplied")
"""PgBouncer refuses a login with the SQLSTATE 08P01, and libpq one that lacks a password without any."""
_SQLSTATE = re.compile(r"(?<=:  )([0-9A-Z]{5}): ")
_PREFIX = re.compile(r"^connection to server (at|on socket) .* failed: ")
"""libpq names the address, which stands before the cause already."""
_NOT_SHOWN = re.compile(r"^LOCATION: |^\s*Is the server running (on that host|locally)")
_OTHER_SERVERS_MAY_DIFFER = re.compile("08...|53...|57P0.|XX...|")
"""libpq tries no other host after a refused login. A server that is starting, stopping or full is left, too."""


NO_ANSWER = "PostgreSQL did not answer"
_SILENCE = re.compile(r"timeout expired|timed out|did not answer")
_NOT_REACHED = re.compile(
    rf"{_SILENCE.pattern}|translate host name|name look-up|No route to host|unreachable|No such file or directory"
)


class Tried(NamedTuple):
    """An address, or a host without one, that gave no session. `cause` is not redacted."""

    where: str
    cause: str
    sqlstate: str = ""
    silent: bool = False


def tried(where: str, error: psycopg2.Error) -> Tried:
    """What libpq's message, a verbose one, says of one address."""
    message = str(error)
    sqlstate = _SQLSTATE.search(message)
    lines = [line for line in _SQLSTATE.sub("", message).splitlines() if not _NOT_SHOWN.match(line)]
    # With sslmode=prefer libpq tries twice, with TLS and without.
    causes = dict.fromkeys(_PREFIX.sub("", line).strip() for line in lines)
    return Tried(where, "; ".join(filter(None, causes)), sqlstate[1] if sqlstate else "")


def lead(causes: Sequence[str]) -> str:
    """Return what happened in a few words: only a server, or a host, that answered has refused something."""
    for pattern, words in ((_SILENCE, NO_ANSWER), (_NOT_REACHED, "PostgreSQL could not be reached")):
        if causes and all(pattern.search(cause) for cause in causes):
            return words
    return "PostgreSQL refused the connection"


def lead_of(message: str) -> str:
    """Return the same for a message of libpq, which has a line for each address."""
    return lead([line for line in message.splitlines() if not _NOT_SHOWN.match(line)])


def ends_the_search(failed: Tried) -> bool:
    """Whether the server refused the login itself, which no other address is asked to overrule."""
    return _OTHER_SERVERS_MAY_DIFFER.fullmatch(failed.sqlstate) is None


def not_connected(failed: Sequence[Tried], target: Target, waited_s: float) -> DatabaseUnavailable:
    """The error for a session that did not open anywhere."""
    for each in failed:
        if (spent := no_descriptor_left(each.cause)) is not None:
            return spent
    told = target.redact("; ".join(f"{where}: {cause or 'it failed without a reason'}" for where, cause, *_ in failed))
    if all(each.silent for each in failed):
        return DeadlineExceeded(f"PostgreSQL did not accept a session within {waited_s:.3g} s ({told})")
    error = _kind(failed)(f"{lead([cause for _, cause, *_ in failed])}: {told}")
    by_weight = sorted(failed, key=lambda each: not each.sqlstate)  # a server that answered knows most
    best = next(filter(None, (advice.for_login(each.sqlstate, each.cause) for each in by_weight)), None)
    if best is not None:
        error.advice = target.redact(best)
    return error


def _kind(failed: Sequence[Tried]) -> type[DatabaseUnavailable]:
    if any(each.sqlstate == _TOO_MANY_CONNECTIONS for each in failed):
        return NoSessionLeft
    refused = any(
        each.sqlstate.startswith(_INVALID_LOGIN) or _INVALID_LOGIN_WORDS.search(each.cause) for each in failed
    )
    return LoginRefused if refused else DatabaseUnavailable


def no_descriptor_left(message: str) -> DatabaseUnavailable | None:
    """The error for a connection that no socket could be made for; None if that is not the cause."""
    if message and "Too many open files" not in message:
        return None
    open_files = _spent_open_files()  # asynchronous libpq fails without a word then
    if not open_files:
        return None
    spent = DatabaseUnavailable(f"no connection could be opened: all {open_files} open files of the process are used")
    spent.advice = "raise the limit of open files (LimitNOFILE=, ulimit -n), or lower limits.max_connections"
    return spent


def _spent_open_files() -> int:
    """The limit of open files if nearly all are used, else 0."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return 0
    except OSError:
        return limit
    return limit if limit - used < _FEW_DESCRIPTORS else 0
