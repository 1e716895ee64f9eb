"""Decides which requests need a token, and which of the two.

Whether a token is needed is decided at the start, from the configuration: without a token, a port beyond the loopback
address serves no data.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from twisted.internet.defer import Deferred

from cacheservice.ports.http.guard import ADMIN_TOKEN, READ_TOKEN, Guard
from cacheservice.ports.http.messages import Request
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.rotation import Look, no_files

Rights = Literal["read", "admin"]

Checking = Coroutine[Deferred[object], object, None]
"""Ends once a wrong token has become right, because its file was read again; raises the refusal otherwise."""


class Level(Enum):
    """The access that a route needs.

    - OPEN: none, on any port: the probes and the metrics.
    - PUBLIC: none on a port that serves data: the files of the dashboard.
    - READ: the token for reading or the one for commands, if reading needs a token.
    - LISTEN: as READ. In addition, a token that is not needed must be right, so that a client can check it.
    - COMMAND: the token for commands.
    """

    OPEN = auto()
    PUBLIC = auto()
    READ = auto()
    LISTEN = auto()
    COMMAND = auto()


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """The part of the configuration that decides about access.

    :param token: required for /v1, / and /events; empty for none.
    :param admin_token: required for commands; empty for no commands.
    :param allow_data: False serves only the probes and the metrics while there is no token.
    :param look: reads the files of the tokens again.
    """

    token: str = field(default="", repr=False)
    admin_token: str = field(default="", repr=False)
    allow_data: bool = True
    look: Look = no_files


class Access:
    """Checks requests.

    :param guard: None if no token is configured.
    :param allow_data: see `AccessSettings`.
    """

    def __init__(self, guard: Guard | None, allow_data: bool) -> None:
        self._guard = guard
        self.reads_freely = allow_data and (guard is None or not guard.is_for_reading)
        self.has_commands = guard is not None and guard.is_for_commands

    def is_free(self, level: Level) -> bool:
        """Return True if every request has this access."""
        return level is Level.OPEN or (self.reads_freely and level in (Level.PUBLIC, Level.READ))

    def check(self, level: Level, request: Request) -> Checking | None:
        """Return None if the request has this access, or a refusal that takes a while.

        :raises Problem: 401 without a token, 403 for a token that may only read, and on a port that serves no data;
            429 if too many wrong tokens wait.
        """
        authorization = request.headers.get(b"authorization")
        is_optional = level is Level.LISTEN and self.reads_freely
        if self.is_free(level) or (is_optional and (self._guard is None or authorization is None)):
            return None
        guard = self.required_guard()
        if level is Level.PUBLIC:
            return None
        is_command = level is Level.COMMAND
        if authorization is None:
            guard.refuse_missing(ADMIN_TOKEN if is_command else READ_TOKEN)
        host = request.host()
        guard.admit(host, authorization)
        accepts = guard.accepts_commands if is_command else guard.accepts
        if accepts(host, authorization):
            return None
        if is_command and guard.accepts(host, authorization):
            raise Problem(403, f"this token may only read; send that of {ADMIN_TOKEN}")
        setting = ADMIN_TOKEN if is_command or is_optional else READ_TOKEN
        return guard.refuse_wrong(host, lambda: accepts(host, authorization), setting)

    def rights(self, request: Request) -> Rights:
        """Return the rights of a request that has been checked."""
        guard, authorization = self._guard, request.headers.get(b"authorization")
        if guard is None or authorization is None:
            return "read"
        return "admin" if guard.accepts_commands(request.host(), authorization) else "read"

    def required_guard(self) -> Guard:
        """Return the guard.

        :raises Problem: 403 without a guard: no client may read data.
        """
        if self._guard is None:
            raise Problem(
                403, "this port serves data beyond its own machine only with a token; set http.token and send it"
            )
        return self._guard
