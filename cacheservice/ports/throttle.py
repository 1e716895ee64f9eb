"""How long a wrong password or token waits for its answer. Each port has a throttle of its own.

Real clients give up early and try again: redis-py waits 5 s for an answer and makes eleven attempts. So the first
failures of an address are answered almost at once, the rest after 2 s. The wait slows a guesser only if it cannot wait
for many answers at once, nor skip one by closing the connection: each failure occupies one of 32 places for its whole
wait, and with none left the next password of that address is not looked at. That is 16 guesses a second.

All clients behind a proxy have one address, and a guesser among them would lock out the others. So a right secret
proves its address for an hour: secrets of a proven address are compared although no place is left. A right one is
let in, a wrong one is refused as before. A guesser who shares a proven address therefore has as many guesses as it
can send.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable

SHORT_WAIT_S = 0.1
LONG_WAIT_S = 2.0
_FREE_FAILURES = 24
"""Two attempts of redis-py to connect, with its retries."""
_FORGIVEN_PER_S = 0.5
_MOST_WAITING = 32
_MOST_NETWORKS = 1024
PROVEN_S = 3600.0
_MOST_PROVEN = 1024


class _Failures:
    """Of one network: how many are not yet forgiven, as of `at`, and until when each of the last ones waits."""

    __slots__ = ("at", "level", "until")

    def __init__(self, at: float) -> None:
        self.at = at
        self.level = 0.0
        self.until: deque[float] = deque()


class Throttle:
    """Counts failures by network. Holds no timer: who is refused waits by itself.

    :param now: the monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._networks: OrderedDict[object, _Failures] = OrderedDict()
        self._proven_at: OrderedDict[tuple[str, str], float] = OrderedDict()

    def succeeded(self, host: str, secret: str) -> None:
        """Remember that the address has sent the right secret; the least recent ones are forgotten first.

        :param secret: the name of it: an address that knows one secret may guess at another.
        """
        proven_at, proof = self._proven_at, (host, secret)
        proven_at[proof] = self._now()
        proven_at.move_to_end(proof)
        if len(proven_at) > _MOST_PROVEN:
            proven_at.popitem(last=False)

    def is_proven(self, host: str, secret: str) -> bool:
        """Whether the address has sent that secret within the last hour, so that it is compared in any case."""
        at = self._proven_at.get((host, secret))
        return at is not None and self._now() - at <= PROVEN_S

    def is_full(self, host: str) -> bool:
        """Whether so many failures of that network wait that the next password of an unproven address must not be
        looked at."""
        failures = self._networks.get(_network(host))
        if failures is None:
            return False
        now = self._now()
        while failures.until and failures.until[0] <= now:
            failures.until.popleft()
        return len(failures.until) >= _MOST_WAITING

    def failed(self, host: str) -> float:
        """Count a failure; return the seconds that its answer has to wait."""
        now, network = self._now(), _network(host)
        failures = self._networks.setdefault(network, _Failures(now))
        self._networks.move_to_end(network)
        failures.level = max(0.0, failures.level - (now - failures.at) * _FORGIVEN_PER_S) + 1
        failures.at = now
        wait_s = SHORT_WAIT_S if failures.level <= _FREE_FAILURES else LONG_WAIT_S
        # In order: a short wait may follow a long one, but ends no earlier than the place before it.
        failures.until.append(max(now + wait_s, failures.until[-1] if failures.until else now))
        if len(self._networks) > _MOST_NETWORKS:
            self._networks.popitem(last=False)
        return wait_s

    def withdraw(self, host: str) -> None:
        """Take back a failure of that network: its password turned out to be right."""
        failures = self._networks.get(_network(host))
        if failures is not None:
            failures.level = max(0.0, failures.level - 1)
            if failures.until:
                failures.until.pop()


def _network(host: str) -> object:
    """What one guesser has to itself: an IPv4 address, or 64 bits of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.packed[:8]
    return address
