"""Delays the answers to wrong passwords and tokens.

Each port has its own throttle. With workers, each process has one for each port, and they share their guesses: a guess
at one process counts at all of them, a moment later.

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
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

SHORT_WAIT_S = 0.1
LONG_WAIT_S = 2.0
_FREE_FAILURES = 24
"""Two connection attempts of redis-py, with its retries."""
_FORGIVEN_PER_S = 0.5
_MOST_WAITING = 32
_MOST_NETWORKS = 1024
PROVEN_S = 3600.0
_MOST_PROVEN = 1024
_SHARED_AFTER_S = 60.0
"""A proven address is shared with the other processes at most this often."""


class _Failures:
    """The failures of one network.

    `level` counts those that are not yet forgiven, as of `at`. `until` has the end of each delay in progress.
    """

    __slots__ = ("at", "level", "until")

    def __init__(self, level: float, at: float, until: Iterable[float]) -> None:
        self.level = level
        self.at = at
        self.until = deque(until)


class Guess(NamedTuple):
    """A secret that an address has sent, to one process of the service.

    :param fate: "failed"; "withdrawn", if a failure has proved correct; or "succeeded".
    :param secret: the name of the secret that was correct; empty for the other fates.
    """

    fate: Literal["failed", "withdrawn", "succeeded"]
    host: str
    secret: str = ""


Failures = tuple[str, float, float, Sequence[float]]
"""An address of a network, the level of its failures, the time of the level, and the ends of the delays."""
Proof = tuple[str, str, float]
"""A proven address, the name of the secret, and when the address sent it last."""


class State(NamedTuple):
    """Everything that a throttle knows. Times are on the monotonic clock of the machine."""

    failures: Sequence[Failures]
    proven: Sequence[Proof]


class Throttle:
    """Counts failures by network.

    It has no timer: the refused connection runs its own.

    :param now: the monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._share: Callable[[Guess], object] | None = None
        self._networks: OrderedDict[object, _Failures] = OrderedDict()
        self._proven_at: OrderedDict[tuple[str, str], float] = OrderedDict()

    def share(self, share: Callable[[Guess], object]) -> None:
        """Call `share` with each guess, so that other processes can `take` it."""
        self._share = share

    def take(self, guess: Guess) -> None:
        """Count a guess that another process has received."""
        share, self._share = self._share, None
        try:
            if guess.fate == "failed":
                self.failed(guess.host)
            elif guess.fate == "withdrawn":
                self.withdraw(guess.host)
            else:
                self.succeeded(guess.host, guess.secret)
        finally:
            self._share = share

    def state(self) -> State:
        """Return everything that is known, for the throttle of another process on this machine."""
        return State(
            [
                (_host_in(network), failures.level, failures.at, list(failures.until))
                for network, failures in self._networks.items()
            ],
            [(host, secret, at) for (host, secret), at in self._proven_at.items()],
        )

    def restore(self, state: State) -> None:
        """Replace everything that is known."""
        self._networks = OrderedDict(
            (_network(host), _Failures(level, at, until)) for host, level, at, until in state.failures
        )
        self._proven_at = OrderedDict(((host, secret), at) for host, secret, at in state.proven)

    def succeeded(self, host: str, secret: str) -> None:
        """Remember that the address has sent the correct secret.

        The least recently used address is forgotten first.

        :param secret: the name of the secret: an address that knows one secret may guess another.
        """
        proven_at, proof, now = self._proven_at, (host, secret), self._now()
        if self._share is not None and now - proven_at.get(proof, -math.inf) > _SHARED_AFTER_S:
            self._share(Guess("succeeded", host, secret))
        proven_at[proof] = now
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
        failures = self._networks.setdefault(network, _Failures(0.0, now, ()))
        self._networks.move_to_end(network)
        failures.level = max(0.0, failures.level - (now - failures.at) * _FORGIVEN_PER_S) + 1
        failures.at = now
        wait_s = SHORT_WAIT_S if failures.level <= _FREE_FAILURES else LONG_WAIT_S
        # In order: a short delay may follow a long one, but ends no earlier than the delay before it.
        failures.until.append(max(now + wait_s, failures.until[-1] if failures.until else now))
        if len(self._networks) > _MOST_NETWORKS:
            self._networks.popitem(last=False)
        if self._share is not None:
            self._share(Guess("failed", host))
        return wait_s

    def withdraw(self, host: str) -> None:
        """Remove a failure of the network, because its password proved correct."""
        failures = self._networks.get(_network(host))
        if failures is not None:
            failures.level = max(0.0, failures.level - 1)
            if failures.until:
                failures.until.pop()
            if self._share is not None:
                self._share(Guess("withdrawn", host))


def _network(host: str) -> object:
    """Return the network that one attacker may own: an IPv4 address, or an IPv6 /64."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.packed[:8]
    return address


def _host_in(network: object) -> str:
    """Return an address of a network."""
    return str(ipaddress.IPv6Address(network + bytes(8))) if isinstance(network, bytes) else str(network)
