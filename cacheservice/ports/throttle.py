"""Delays the answers to wrong passwords and tokens.

Each port has its own throttle.

Real clients time out early and retry: redis-py waits 5 s for an answer and makes eleven attempts. So the first failures
of an address are answered almost at once, the rest after 2 s. The delay slows an attacker only if the attacker can
neither wait for many answers in parallel nor skip the delay by closing the connection. So each failure occupies one of
32 places for its whole delay, and while none is free, the next password from that address is not checked. This allows
16 guesses per second.

All clients behind a proxy have one address, and an attacker among them would lock out the others. So a correct secret
proves its address for an hour: secrets from a proven address are checked even if no place is free. A correct one is
accepted, a wrong one is refused as before. An attacker who shares a proven address can therefore guess without limit.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable

SHORT_WAIT_S = 0.1
LONG_WAIT_S = 2.0
_FREE_FAILURES = 24
"""Two connection attempts of redis-py, with its retries."""
_FORGIVEN_PER_S = 0.5
_MOST_WAITING = 32
_MOST_NETWORKS = 1024
PROVEN_S = 3600.0
_MOST_PROVEN = 1024


class _Failures:
    """The failures of one network.

    `level` counts those that are not yet forgiven, as of `at`. `until` has the end of each delay in progress.
    """

    __slots__ = ("at", "level", "until")

    def __init__(self, at: float) -> None:
        self.at = at
        self.level = 0.0
        self.until: deque[float] = deque()


class Throttle:
    """Counts failures by network.

    It has no timer: the refused connection runs its own.

    :param now: the monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._networks: OrderedDict[object, _Failures] = OrderedDict()
        self._proven_at: OrderedDict[tuple[str, str], float] = OrderedDict()

    def succeeded(self, host: str, secret: str) -> None:
        """Remember that the address has sent the correct secret.

        The least recently used address is forgotten first.

        :param secret: the name of the secret: an address that knows one secret may guess another.
        """
        proven_at, proof = self._proven_at, (host, secret)
        proven_at[proof] = self._now()
        proven_at.move_to_end(proof)
        if len(proven_at) > _MOST_PROVEN:
            proven_at.popitem(last=False)

    def is_proven(self, host: str, secret: str) -> bool:
        """Return True if the address has sent this secret within the last hour.

        Its next secret is then checked even if no place is free.
        """
        at = self._proven_at.get((host, secret))
        return at is not None and self._now() - at <= PROVEN_S

    def is_full(self, host: str) -> bool:
        """Return True if all places of the network are occupied by delayed failures.

        The next password from an unproven address of it must not be checked.
        """
        failures = self._networks.get(_network(host))
        if failures is None:
            return False
        now = self._now()
        while failures.until and failures.until[0] <= now:
            failures.until.popleft()
        return len(failures.until) >= _MOST_WAITING

    def failed(self, host: str) -> float:
        """Count a failure; return the seconds by which its answer is delayed."""
        now, network = self._now(), _network(host)
        failures = self._networks.setdefault(network, _Failures(now))
        self._networks.move_to_end(network)
        failures.level = max(0.0, failures.level - (now - failures.at) * _FORGIVEN_PER_S) + 1
        failures.at = now
        wait_s = SHORT_WAIT_S if failures.level <= _FREE_FAILURES else LONG_WAIT_S
        # In order: a short delay may follow a long one, but ends no earlier than the delay before it.
        failures.until.append(max(now + wait_s, failures.until[-1] if failures.until else now))
        if len(self._networks) > _MOST_NETWORKS:
            self._networks.popitem(last=False)
        return wait_s

    def withdraw(self, host: str) -> None:
        """Remove a failure of the network, because its password proved correct."""
        failures = self._networks.get(_network(host))
        if failures is not None:
            failures.level = max(0.0, failures.level - 1)
            if failures.until:
                failures.until.pop()


def _network(host: str) -> object:
    """Return the network that one attacker may own: an IPv4 address, or an IPv6 /64."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.packed[:8]
    return address
