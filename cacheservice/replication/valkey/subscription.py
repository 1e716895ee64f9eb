"""Hears at once of what other processes publish; polling finds what this misses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import txredisapi  # type: ignore[import-untyped]  # ships no type information
from twisted.internet.defer import CancelledError, Deferred

from cacheservice.base.backoff import full_jitter
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import pause
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.errors import ValkeyDown, ValkeyRefused
from cacheservice.replication.valkey.node import Connection, RemembersTls, Word

_PROBE_S = 5.0
"""Between two proofs that the connection lives."""


class Subscription:
    """Subscribes to channels on one connection, which is opened again when it is lost.

    Messages of a cluster reach every node of it, so any node will do.

    :param heard: called with the channel of each message, and with None after each start of the subscription, because
        messages may have been missed.
    :param random: returns a number from 0 to 1.
    """

    def __init__(
        self,
        valkey: Valkey,
        heard: Callable[[bytes | None], object],
        reactor: Reactor,
        log: Log,
        random: Callable[[], float],
    ) -> None:
        self._valkey = valkey
        self._heard = heard
        self._reactor = reactor
        self._tasks = Tasks(log)
        self._delay_s = full_jitter(0.2, 5.0, random)
        self._channels: frozenset[bytes] = frozenset()
        self._running: Deferred[None] | None = None

    def subscribe(self, channels: Iterable[bytes]) -> None:
        """Subscribe to these channels only, from now on."""
        channels = frozenset(channels)
        if channels != self._channels:
            self.stop()
            self._channels = channels
            if channels:
                self._running = self._tasks.run(self._keep())

    def stop(self) -> None:
        """Close the connection."""
        self._channels = frozenset()
        self._tasks.cancel()

    async def _keep(self) -> None:
        failures = 0

        def began() -> None:
            nonlocal failures
            failures = 0

        while True:
            try:
                await self._listen(began)
            except CancelledError:
                raise
            except (ValkeyDown, ValkeyRefused):
                failures += 1  # logged where the unit is read
            await pause(self._reactor, self._delay_s(failures))

    async def _listen(self, began: Callable[[], None]) -> None:
        """Listen until the connection is lost.

        :param began: called once the subscription has begun.
        :raises ValkeyDown: when it is, or if it cannot be opened.
        """
        protocol = await self._valkey.open(lambda: cast("Connection", _Subscriber(self._heard)))
        try:
            await _answered(protocol, "SUBSCRIBE", *self._channels)
            began()
            self._heard(None)
            while True:
                await pause(self._reactor, _PROBE_S)
                await _answered(protocol, "PING")
        finally:
            protocol.transport.abortConnection()


async def _answered(protocol: Connection, *words: Word) -> None:
    try:
        await protocol.execute_command(*words)
    except txredisapi.RedisError as error:
        raise ValkeyDown(f"the subscription was lost: {error}") from None


class _Subscriber(RemembersTls, txredisapi.SubscriberProtocol):  # type: ignore[misc]  # the library has no types
    def __init__(self, heard: Callable[[bytes | None], object]) -> None:
        super().__init__(charset=None, replyTimeout=_PROBE_S, convertNumbers=False)
        self._heard = heard

    def messageReceived(self, pattern: object, channel: bytes, message: object) -> None:
        self._heard(channel)
