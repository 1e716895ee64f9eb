"""The clients of one port: its limits, its factory, and the turns that the clients take."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from twisted.internet.protocol import ServerFactory
from twisted.logger import Logger

from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.timers import is_active
from cacheservice.ports import rejected
from cacheservice.ports.admission import Door, open_door
from cacheservice.ports.held import HeldSnapshots, Unlimited

BYTES_PER_TURN = 256 * 1024
"""The most bytes that one client gets before the other clients have their turn, without the last piece."""
TURN_S = 0.001
"""The time for which the clients that continue in one turn may block the reactor together, without the last step."""


class Client(Protocol):
    """A connection, as its factory and its turns know it."""

    def go_on(self) -> None:
        """Continue at the beginning of a turn."""

    def abort(self) -> None:
        """Close the connection at once."""

    def close_now(self) -> None:
        """Close the connection because the port stops."""


C = TypeVar("C", bound=Client)


class Turns:
    """Continues clients in the next turn of the reactor, in the order in which they yielded.

    Each of them takes one step. Those that do not fit into `TURN_S` follow in the turn after that.
    """

    _log = Logger()

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: OrderedDict[Client, None] = OrderedDict()
        self._call: DelayedCall | None = None

    def __contains__(self, client: Client) -> bool:
        return client in self._due

    def add(self, client: Client) -> None:
        """Call `go_on` of a client in a later turn; once, even if it is added again before."""
        self._due[client] = None
        if self._call is None:
            self._call = self._clock.callLater(0, self._run)

    def discard(self, client: Client) -> None:
        """Forget a client that has ended."""
        self._due.pop(client, None)
        if not self._due and is_active(self._call):
            self._call.cancel()
            self._call = None

    def _run(self) -> None:
        ends_at = time.perf_counter() + TURN_S
        for _ in range(len(self._due)):
            client, _ = self._due.popitem(last=False)
            try:
                client.go_on()
            except Exception:
                # It must not end the turn of the other clients.
                self._log.failure("a connection could not continue")
                client.abort()
            if not self._due or time.perf_counter() >= ends_at:
                break
        self._call = self._clock.callLater(0, self._run) if self._due else None


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the clients of a port.

    :param idle_timeout_s: a client is dropped if it does not read its replies, or does not complete its request, within
        this time.
    :param silence_timeout_s: a client is dropped if it sends no request within this time; 0 for never. Only of the RESP
        port: other ports drop silent clients after `idle_timeout_s`.
    :param door: admits clients; None for a door that closes only at `max_connections`.
    :param held: tracks the replies in progress; None for no limit.
    """

    max_connections: int
    idle_timeout_s: float
    silence_timeout_s: float = 0.0
    door: Door | None = None
    held: HeldSnapshots | None = None


class ClientFactory(ServerFactory, Generic[C]):
    """Creates the connections of a port, and keeps what they share.

    `rejected` counts refused clients by reason.

    :param clock: `IReactorTime`, monotonic.
    """

    noisy = False

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.max_connections = limits.max_connections
        self.idle_timeout_s = limits.idle_timeout_s
        self.door = limits.door or open_door(clock.seconds)
        self.held = limits.held or Unlimited()
        self.clock = clock
        self.turns = Turns(clock)
        self.clients: set[C] = set()
        self.rejected = rejected.none_yet()

    def set_limits(self, *, max_connections: int, idle_timeout_s: float) -> None:
        """Apply other limits from now on. Connected clients stay, even if they are too many."""
        self.max_connections = max_connections
        self.idle_timeout_s = idle_timeout_s

    def close_clients(self) -> None:
        """Close every connection now."""
        for client in list(self.clients):
            client.close_now()
