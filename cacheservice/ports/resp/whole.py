"""The facts about the whole service that clients of the RESP port may ask for.

A process that is the whole service takes them from its own objects. A worker is only a part of the service; its
`Server.whole` asks the main process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Json


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts and the usage of one process, or of all processes of a service, for INFO.

    :param blocked: clients whose command waits for an event.
    :param channels: those with subscribers.
    :param resident_bytes: the present memory; of a service, the sum over its processes. So are `peak_bytes` and the
        seconds of CPU.
    """

    clients: int = 0
    blocked: int = 0
    connections_received: int = 0
    commands_processed: int = 0
    rejected: int = 0
    channels: frozenset[str] = frozenset()
    resident_bytes: int = 0
    peak_bytes: int = 0
    user_s: float = 0.0
    system_s: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.clients + other.clients,
            self.blocked + other.blocked,
            self.connections_received + other.connections_received,
            self.commands_processed + other.commands_processed,
            self.rejected + other.rejected,
            self.channels | other.channels,
            self.resident_bytes + other.resident_bytes,
            self.peak_bytes + other.peak_bytes,
            self.user_s + other.user_s,
            self.system_s + other.system_s,
        )


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """The facts of INFO that do not depend on the client.

    :param pid: of the main process.
    :param uptime_s: since the start of the main process.
    """

    pid: int
    uptime_s: float
    totals: Totals


class Whole(Protocol):
    """Asks for the facts about a service that has other processes, too.

    Each Deferred fails with `MainUnavailable` if the main process does not answer.
    """

    def info(self) -> Deferred[ServiceInfo]:
        """Return the facts of INFO, as of now."""

    def client_list(self) -> Deferred[bytes]:
        """Return the lines of CLIENT LIST, of all processes."""

    def dataset(self, name: str) -> Deferred[Mapping[str, Json]]:
        """Return the fields of CACHE.INFO. It fails with `UnknownDataset` if none has that name."""
