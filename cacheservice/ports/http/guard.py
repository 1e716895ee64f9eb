"""The token: compared in constant time, and whoever guesses at it from one address waits longer each time."""

from __future__ import annotations

import hmac
import ipaddress
from collections import OrderedDict
from typing import Any, NoReturn

from twisted.internet.task import deferLater

from cacheservice.ports.http.problem import Problem
from cacheservice.ports.rejected import Rejected

_FIRST_PENALTY_S = 0.1
_LONGEST_PENALTY_S = 5.0
_FORGIVEN_AFTER_S = 60.0
_MOST_WAITING = 10
"""Wrong tokens of one address that wait for their answer. With this many the next is refused unread, or a thousand
connections would guess a thousand times as fast: so it is two guesses a second, however many there are."""
_MOST_ADDRESSES = 1024

_CHALLENGE = b'WWW-Authenticate: Bearer realm="cacheservice"'
CHALLENGE = _CHALLENGE + b"\r\n"


class _Failures:
    """Of one address: how many in a row, when the last one was, and how many still wait for their answer."""

    __slots__ = ("count", "last_at", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.last_at = 0.0
        self.waiting = 0


class Guard:
    """Lets in who has a token.

    :param token: for reading; empty if that needs none.
    :param admin_token: for commands and for reading; empty for no commands.
    :param rejected: where who is not let in is counted.
    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, token: str, admin_token: str, rejected: Rejected, clock: Any) -> None:
        self.is_for_reading = bool(token)
        self.is_for_commands = bool(admin_token)
        self._tokens = [each.encode() for each in (token, admin_token) if each]
        self._admin_tokens = [admin_token.encode()] if admin_token else []
        self._rejected = rejected
        self._clock = clock
        self._failures: OrderedDict[object, _Failures] = OrderedDict()

    def accepts(self, authorization: bytes) -> bool:
        """Whether an Authorization header holds a token that may read."""
        return _holds(authorization, self._tokens)

    def accepts_commands(self, authorization: bytes) -> bool:
        """Whether an Authorization header holds the token that may change something."""
        return _holds(authorization, self._admin_tokens)

    def admit(self, host: str) -> None:
        """:raises Problem: 429 while too many wrong tokens of that address wait for their answer."""
        failures = self._failures.get(_network(host))
        if failures is not None and failures.waiting >= _MOST_WAITING:
            self._rejected["auth_failed"] += 1
            raise Problem(429, "too many wrong tokens from this address", b"Retry-After: %d\r\n" % _LONGEST_PENALTY_S)

    def refuse_missing(self, setting: str = "http.token") -> NoReturn:
        """:raises Problem: 401 at once: sending none is no guess."""
        self._rejected["auth_failed"] += 1
        raise Problem(401, f'this needs "Authorization: Bearer …" with the token of {setting}', CHALLENGE)

    async def refuse_wrong(self, host: str, setting: str = "http.token") -> NoReturn:
        """:raises Problem: 401, after the time that the failures of this address have earned."""
        self._rejected["auth_failed"] += 1
        failures = self._failed(_network(host))
        failures.waiting += 1
        try:
            await deferLater(
                self._clock, min(_FIRST_PENALTY_S * 2.0 ** min(failures.count - 1, 20), _LONGEST_PENALTY_S)
            )
        finally:
            failures.waiting -= 1
        raise Problem(401, f"this is not the token of {setting}", _CHALLENGE + b', error="invalid_token"\r\n')

    def _failed(self, network: object) -> _Failures:
        now: float = self._clock.seconds()
        failures = self._failures.setdefault(network, _Failures())
        self._failures.move_to_end(network)
        if now - failures.last_at > _FORGIVEN_AFTER_S:
            failures.count = 0
        failures.count += 1
        failures.last_at = now
        if len(self._failures) > _MOST_ADDRESSES:
            self._failures.popitem(last=False)
        return failures


def _holds(authorization: bytes, tokens: list[bytes]) -> bool:
    scheme, _, given = authorization.partition(b" ")
    given = given.strip(b" ")
    # All of them are compared, so that the time tells nothing of which.
    matches = [hmac.compare_digest(given, token) for token in tokens]
    return any(matches) and scheme.lower() == b"bearer"


def _network(host: str) -> object:
    """What one guesser has to itself: an IPv4 address, or 64 bits of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.packed[:8]
    return address
