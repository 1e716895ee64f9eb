"""Checks of the passwords and tokens that clients send: one object for each port.

A port compares a password only if `is_checked` allows it, reports a correct one with `accept`, and answers a wrong one
after `refuse`. See `cacheservice.ports.throttle` for the delays.
"""

from __future__ import annotations

from collections.abc import Callable

from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import pause
from cacheservice.ports.rejected import Rejected
from cacheservice.ports.rotation import Look, no_files
from cacheservice.ports.throttle import LONG_WAIT_S, Throttle


class Passwords:
    """Slows the guesses of the clients of one port.

    :param clock: `IReactorTime`, monotonic.
    :param rejected: counts refused clients.
    :param look: reads the files of the passwords again before a wrong one is refused.
    """

    def __init__(self, clock: Clock, rejected: Rejected, look: Look = no_files) -> None:
        self.throttle = Throttle(clock.seconds)
        self._clock = clock
        self._rejected = rejected
        self._look = look

    def is_full(self, host: str) -> bool:
        """Return whether too many wrong passwords from this address are waiting for their answers."""
        return self.throttle.is_full(host)

    def is_checked(self, host: str, secret: str) -> bool:
        """Return whether a password from this address may be compared.

        :param secret: the name of the password's setting: an address that knows one secret may guess another.
        """
        return not self.is_full(host) or self.throttle.is_proven(host, secret)

    def accept(self, host: str, secret: str) -> None:
        """Note that the address has sent the correct password, which proves the address."""
        self.throttle.succeeded(host, secret)

    def count_refusal(self) -> None:
        """Count a client that is refused without a delay."""
        self._rejected["auth_failed"] += 1

    async def refuse(self, host: str, is_right: Callable[[], bool]) -> bool:
        """Wait before a wrong password is refused; return True if it has proved correct.

        :param is_right: checks the password again after the files have been read.
        """
        if self.is_full(host):
            # The address is proven. Its guesses are answered slowly, and occupy no place.
            wait_s = LONG_WAIT_S
        else:
            # Counted first: otherwise guesses would be free while the files are read.
            wait_s = self.throttle.failed(host)
            looking = self._look()
            if looking is not None:
                await looking
                if is_right():
                    self.throttle.withdraw(host)
                    return True
        await self._refuse_after(wait_s)
        return False

    async def refuse_unchecked(self) -> None:
        """Wait before a password is refused that `is_checked` does not allow to compare."""
        await self._refuse_after(LONG_WAIT_S)

    async def _refuse_after(self, wait_s: float) -> None:
        self._rejected["auth_failed"] += 1
        await pause(self._clock, wait_s)
