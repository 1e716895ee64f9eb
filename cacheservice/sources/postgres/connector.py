"""Opens sessions of the driver.

It looks names up, tries one address after the other, and remembers which addresses answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from fcntl import ioctl
from functools import partial
from termios import FIONREAD

import psycopg2
from psycopg2 import extensions, extras
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.python.failure import Failure

from cacheservice.base.interfaces import Reactor
from cacheservice.sources.postgres.addresses import Address, Memory, passes, share_s
from cacheservice.sources.postgres.handshake import Handshake, asynchronous
from cacheservice.sources.postgres.refusal import Tried, ends_the_search, not_connected, tried
from cacheservice.sources.postgres.target import Resolve, Target, is_address, is_name

_PARTS_PER_TURN = 3
"""libpq takes 16 KiB at a time. One turn of the reactor each took a fifth of a refresh; clients wait for a longer turn.
"""
_NOTHING_TO_READ = bytes(4)


class Session(extensions.connection):  # type: ignore[misc]  # psycopg2 has no types
    """The driver's session, with a limit on the work of one `poll`."""

    def poll(self) -> int:
        """Continue the operation with the data that has arrived, for at most three parts."""
        state: int = super().poll()
        parts = 1
        while (
            state == extensions.POLL_READ
            and parts < _PARTS_PER_TURN
            and self.isexecuting()
            and ioctl(self.fileno(), FIONREAD, _NOTHING_TO_READ) != _NOTHING_TO_READ
        ):
            state = super().poll()
            parts += 1
        return state


class ReplicationSession(extras.LogicalReplicationConnection):  # type: ignore[misc]  # psycopg2 has no types
    """The driver's session for logical replication, which runs the statements of its database, too."""


AnySession = Session | ReplicationSession


class Connector:
    """Opens all sessions to a database.

    There is one for all, so that each session benefits from the failures of the others.

    :param resolve: ``cacheservice.sources.postgres.resolve.Resolver.resolve``.
    :param shuffle: as in `random`; used for load_balance_hosts=random.
    """

    def __init__(
        self, reactor: Reactor, resolve: Resolve, shuffle: Callable[[list[Address]], None] = random.shuffle
    ) -> None:
        self._reactor = reactor
        self._resolve = resolve
        self._shuffle = shuffle
        self._memory = Memory()
        self._slow_names: set[str] = set()

    def open(
        self,
        target: Target,
        purpose: str,
        by: float,
        defaults: Mapping[str, object],
        factory: type[AnySession] = Session,
    ) -> Deferred[AnySession]:
        """Log in at the first suitable address.

        Cancelling the Deferred ends the attempt.

        :param by: on the reactor's clock; each address gets its share of the time until then.
        :param defaults: libpq's parameters that apply if the connection string does not set them.
        :param factory: the kind of session.
        :raises DatabaseUnavailable: with each address and its cause, in one line.
        """
        return Deferred.fromCoroutine(self._open(target, purpose, by, defaults, factory))

    async def _open(
        self, target: Target, purpose: str, by: float, defaults: Mapping[str, object], factory: type[AnySession]
    ) -> AnySession:
        began_at = self._reactor.seconds()
        addresses, failed = await _LookUps(self._reactor, self._resolve, target, self._slow_names).addresses(by)
        if target.random_order:
            self._shuffle(addresses)
        tries: dict[Address, Tried] = {}
        every_pass = passes(target.session_attrs)
        for passes_left, attrs in zip(range(len(every_pass) - 1, -1, -1), every_pass, strict=True):
            waiting = self._memory.ordered(addresses, self._reactor.seconds())
            for index, address in enumerate(waiting):
                now = self._reactor.seconds()
                candidates = len(waiting) - index + passes_left * len(waiting)
                limit_s = share_s(by - now, candidates, target.connect_timeout_s, self._memory.trial_s(address, now))
                arguments = {**defaults, **target.connect_arguments(address, attrs, purpose)}
                try:
                    session = await self._log_in(arguments, limit_s, factory)
                except psycopg2.Error as error:
                    tries[address] = tried(str(address), error)
                except _SilentError:
                    tries[address] = Tried(str(address), f"did not answer within {limit_s:.3g} s", silent=True)
                else:
                    self._memory.answered(address)
                    return session
                self._memory.failed(address, self._reactor.seconds(), silent=tries[address].silent)
                if ends_the_search(tries[address]):
                    raise not_connected([*failed, *tries.values()], target, self._reactor.seconds() - began_at)
        raise not_connected([*failed, *tries.values()], target, self._reactor.seconds() - began_at)

    async def _log_in(self, arguments: Mapping[str, object], limit_s: float, factory: type[AnySession]) -> AnySession:
        handshake = Handshake(self._reactor, asynchronous(factory, arguments))
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            handshake.opened.cancel()

        timer = self._reactor.callLater(limit_s, expire)
        try:
            session: AnySession = await handshake.opened
            return session
        except CancelledError:
            if expired:
                raise _SilentError from None
            raise
        finally:
            if timer.active():
                timer.cancel()


class _SilentError(Exception):
    """An address did not answer within its share."""


class _LookUps:
    """The look-ups of one connection string, started together.

    A name that hangs does not delay the use of the others.

    :param slow: names that hung recently. They are waited for only if no other name is known. This class updates the
        set.
    """

    def __init__(self, reactor: Reactor, resolve: Resolve, target: Target, slow: set[str]) -> None:
        self._reactor = reactor
        self._resolve = resolve
        self._hosts = target.hosts()
        self._slow = slow
        self._names = list(dict.fromkeys(host for host, _ in self._hosts if is_name(host)))
        self._found: dict[str, Sequence[str] | Failure] = {}
        self._changed: Deferred[None] | None = None

    async def addresses(self, by: float) -> tuple[list[Address], list[Tried]]:
        """Return the known addresses in the order of the hosts, and the failed look-ups."""
        for name in self._names:
            ensureDeferred(self._look_up(name)).addBoth(partial(self._looked_up, name))
        now = self._reactor.seconds()
        wait_until = now + (by - now) / (len(self._names) + 1) if len(self._hosts) > 1 else by
        await self._wait_for(self._quick_ones_known, wait_until)
        await self._wait_for(self._any_known, by)
        found: list[Address] = []
        failed: dict[str, Tried] = {}
        for host, port in self._hosts:
            if not is_name(host):
                found.append(Address(host, host if is_address(host) else "", port))
                continue
            addresses = self._found.get(host)
            if addresses is None:
                self._slow.add(host)
                failed[host] = Tried(host, "the name look-up did not end in time", silent=True)
            elif isinstance(addresses, Failure):
                failed[host] = Tried(host, addresses.getErrorMessage())
            else:
                found += [Address(host, address, port) for address in addresses]
        return found, list(failed.values())

    async def _look_up(self, name: str) -> Sequence[str]:
        return await self._resolve(name)

    def _looked_up(self, name: str, result: Sequence[str] | Failure) -> None:
        self._found[name] = result
        self._slow.discard(name)
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.callback(None)

    def _quick_ones_known(self) -> bool:
        return all(name in self._found or name in self._slow for name in self._names)

    def _any_known(self) -> bool:
        known = any(not isinstance(found, Failure) for found in self._found.values())
        return known or len(self._found) == len(self._names) or len(self._names) < len({h for h, _ in self._hosts})

    async def _wait_for(self, true: Callable[[], bool], until: float) -> None:
        while not true() and self._reactor.seconds() < until:
            changed: Deferred[None] = Deferred()
            self._changed = changed
            timer = self._reactor.callLater(max(0.0, until - self._reactor.seconds()), self._wake)
            try:
                await changed
            finally:
                self._changed = None
                if timer.active():
                    timer.cancel()

    def _wake(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.callback(None)
