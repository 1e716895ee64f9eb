"""Checks tokens in constant time, and delays the answers to wrong ones.

The more wrong tokens an address sends, the longer the delay.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import NoReturn

from cacheservice.base.interfaces import Clock
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.passwords import Passwords
from cacheservice.ports.rejected import Rejected
from cacheservice.ports.rotation import Look, no_files
from cacheservice.ports.throttle import LONG_WAIT_S

_CHALLENGE = b'WWW-Authenticate: Bearer realm="cacheservice"'
READ_TOKEN, ADMIN_TOKEN = "http.token", "http.admin_token"
"""The names of the settings."""
CHALLENGE = _CHALLENGE + b"\r\n"


class Guard:
    """Admits clients that send a token.

    Whether a token is required, and for which requests, is decided at the start.

    :param token: for reading; empty if reading needs no token.
    :param admin_token: for commands and for reading; empty for no commands.
    :param rejected: counts refused clients.
    :param clock: `IReactorTime`, monotonic.
    :param look: reads the files of the tokens again before a wrong token is refused.
    """

    def __init__(
        self, token: str, admin_token: str, rejected: Rejected, clock: Clock, *, look: Look = no_files
    ) -> None:
        self.is_for_reading = bool(token)
        self.is_for_commands = bool(admin_token)
        self.passwords = Passwords(clock, rejected, look)
        self.replace(token, admin_token)

    def replace(self, token: str, admin_token: str) -> None:
        """Accept only these tokens from now on."""
        named = {READ_TOKEN: token, ADMIN_TOKEN: admin_token}
        self._tokens = {name: each.encode() for name, each in named.items() if each}
        self._admin_tokens = {ADMIN_TOKEN: admin_token.encode()} if admin_token else {}

    def accepts(self, host: str, authorization: bytes) -> bool:
        """Return True if an Authorization header has a token that may read.

        A correct token proves its address.
        """
        return self._accepts(host, authorization, self._tokens)

    def accepts_commands(self, host: str, authorization: bytes) -> bool:
        """Return True if an Authorization header has the token for commands.

        A correct token proves its address.
        """
        return self._accepts(host, authorization, self._admin_tokens)

    def _accepts(self, host: str, authorization: bytes, tokens: Mapping[str, bytes]) -> bool:
        found = _found(authorization, tokens)
        for name in found:
            self.passwords.accept(host, name)
        return bool(found)

    def admit(self, host: str, authorization: bytes) -> None:
        """Raise unless the header may be checked.

        It must not be checked if too many wrong tokens from its address are waiting for their answers, unless it has a
        token that the address has sent before.

        :raises Problem: 429.
        """
        if not self.passwords.is_full(host):
            return
        checked = {name: token for name, token in self._tokens.items() if self.passwords.is_checked(host, name)}
        if not _found(authorization, checked):
            self.passwords.count_refusal()
            raise Problem(429, "too many wrong tokens from this address", b"Retry-After: %d\r\n" % LONG_WAIT_S)

    def refuse_missing(self, setting: str = READ_TOKEN) -> NoReturn:
        """Refuse a request without a token.

        :raises Problem: 401, without delay: a missing token is not a guess.
        """
        self.passwords.count_refusal()
        raise Problem(401, f'this needs "Authorization: Bearer …" with the token of {setting}', CHALLENGE)

    async def refuse_wrong(self, host: str, is_right: Callable[[], bool], setting: str = READ_TOKEN) -> None:
        """Refuse a wrong token unless its file contains it by now.

        :param is_right: checks the token again after the files have been read.
        :raises Problem: 401, after the delay for the failures of this address.
        """
        if await self.passwords.refuse(host, is_right):
            return
        raise Problem(401, f"this is not the token of {setting}", _CHALLENGE + b', error="invalid_token"\r\n')


def _found(authorization: bytes, tokens: Mapping[str, bytes]) -> list[str]:
    """Return the names of the tokens that an Authorization header matches."""
    scheme, _, given = authorization.partition(b" ")
    given = given.strip(b" ")
    # All tokens are compared, so that the time does not depend on the match.
    matches = [name for name, token in tokens.items() if hmac.compare_digest(given, token)]
    return matches if scheme.lower() == b"bearer" else []
