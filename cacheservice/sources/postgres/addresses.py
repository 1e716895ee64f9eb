"""Decides in which order addresses are tried, and how long each may take.

The addresses are those of a connection string. Pure decisions, and the memory of failures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

DEMOTED_S = 30.0
DEMOTED_MAX_S = 300.0
TRIAL_S = 1.0
"""An address that did not answer gets this long at its next turn; a working address logs in faster."""


class Address(NamedTuple):
    """A host as in the connection string, its address, and the port.

    The address is empty for a unix socket.
    """

    host: str
    address: str
    port: str

    def __str__(self) -> str:
        host = self.host or "the default socket"
        return f"{host} port {self.port}" if self.address in ("", host) else f"{host} ({self.address}) port {self.port}"


class _Bad(NamedTuple):
    until: float
    demoted_s: float
    silent: bool


class Memory:
    """Addresses that failed recently.

    They are tried after the others for a while; the time doubles with each failure.
    """

    def __init__(self) -> None:
        self._bad: dict[Address, _Bad] = {}

    def ordered(self, addresses: Iterable[Address], now: float) -> list[Address]:
        """Return `addresses` in their order, with those that failed recently last."""
        return sorted(addresses, key=lambda address: address in self._bad and self._bad[address].until > now)

    def failed(self, address: Address, now: float, *, silent: bool) -> None:
        """Demote an address.

        :param silent: whether it did not answer at all.
        """
        self._bad = {each: bad for each, bad in self._bad.items() if bad.until > now - DEMOTED_MAX_S}
        before = self._bad.get(address)
        demoted_s = DEMOTED_S if before is None else before.demoted_s
        if before is not None and before.until <= now:
            demoted_s = min(2 * demoted_s, DEMOTED_MAX_S)
        self._bad[address] = _Bad(now + demoted_s, demoted_s, silent)

    def answered(self, address: Address) -> None:
        self._bad.pop(address, None)

    def trial_s(self, address: Address, now: float) -> float | None:
        """Return a time limit for an address that is due again after it did not answer.

        None for all others.
        """
        bad = self._bad.get(address)
        return TRIAL_S if bad is not None and bad.silent and bad.until <= now else None


def share_s(left_s: float, candidates: int, limit_s: float | None, trial_s: float | None) -> float:
    """Return the seconds for the first of `candidates` addresses that share `left_s`.

    :param limit_s: connect_timeout of the connection string, which libpq applies to each address.
    :param trial_s: from `Memory.trial_s`; not applied to the last candidate, which gets all remaining time.
    """
    limits = [left_s / candidates]
    if limit_s is not None:
        limits.append(limit_s)
    if trial_s is not None and candidates > 1:
        limits.append(trial_s)
    return max(0.0, min(limits))


def passes(session_attrs: str) -> Sequence[str]:
    """Return the values of target_session_attrs for each pass over the addresses.

    libpq makes the same passes (manual, 34.1.2).
    """
    return ("standby", "any") if session_attrs == "prefer-standby" else (session_attrs,)
