"""Admits clients up to the limits, and a few more so that probes get an answer.

The limits are that of the port and that of the open files of the process.

If a full port refused its probes, an orchestrator would take it for dead and restart the service. So each port that
serves probes has a few reserve places. A connection in reserve has little time for each step. If another connection
needs its place, the oldest one is closed, so idle clients cannot keep a probe out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from cacheservice.base.interfaces import Log

RESERVE_S = 2.0
"""The time that a connection in reserve has for each step: to send its request, and to receive the reply."""

_OWN_DESCRIPTORS = 28
"""Listening sockets, epoll sets, standard streams, files being saved, name look-ups. Measured: 20."""
_SPARE_SESSIONS = 3
"""The listening session, the session of an operator's refresh, and a session that is being closed."""
_MOST_RESERVE = 16
_MOST_ACCEPTED = 100
_LOG_INTERVAL_S = 60.0


class Plan(NamedTuple):
    """Divides the descriptors of the process.

    :param descriptors: the limit of open files.
    :param clients: the clients of all ports together.
    :param reserve: places of each port past its limit, for probes.
    :param accepted: connections that are accepted in one turn before those over the limit are closed.
    """

    descriptors: int
    clients: int
    reserve: int
    accepted: int


def plan(descriptors: int, sessions: int, ports: int) -> Plan:
    """Divide the descriptors: refreshes and saving first, clients get the rest.

    :param sessions: the most sessions that refreshes may have open at once, and the descriptors for workers.
    """
    free = max(0, descriptors - _OWN_DESCRIPTORS - _SPARE_SESSIONS - sessions)
    accepted = max(1, min(_MOST_ACCEPTED, free // 8))
    reserve = max(1, min(_MOST_RESERVE, free // 16))
    return Plan(descriptors, max(1, free - accepted - reserve * ports), reserve, accepted)


UNLIMITED = Plan(1 << 30, 1 << 30, _MOST_RESERVE, _MOST_ACCEPTED)


class Room:
    """Counts the descriptors that the clients of all ports of this process use.

    :param processes: the number of processes that serve the clients of the service.
    """

    def __init__(self, of: Plan = UNLIMITED, processes: int = 1) -> None:
        self.plan = of
        self._processes = processes
        self._taken = 0

    def limit(self, max_connections: int) -> int:
        """Return the part of a port's configured limit that the descriptors of all processes allow."""
        return min(max_connections, self.plan.clients * self._processes)

    def take(self) -> bool:
        """Take a place; return False if there is none."""
        if self._taken >= self.plan.clients:
            return False
        self._taken += 1
        return True

    def give_back(self) -> None:
        self._taken -= 1


class Guest(Protocol):
    """A connection over the limit."""

    def turn_away(self) -> None:
        """Report that there are too many connections, and close at once."""


class Tally(Protocol):
    """The clients that the other processes of the service have admitted to a port."""

    def note(self, inside: int) -> None:
        """Let the other processes know how many clients this process has admitted."""

    def others(self) -> int:
        """Return how many clients the other processes have admitted."""


class Alone:
    """The `Tally` of a service with one process."""

    def note(self, inside: int) -> None:
        """Do nothing."""

    def others(self) -> int:
        return 0


ALONE = Alone()


class Door:
    """Admits the clients of one port.

    Two processes may admit a client at the same moment. So a process notes a client before it counts all of them: if
    only one place is free, both clients may be refused, but not both admitted.

    :param port: its name in the log.
    :param reserve: places past the limit; 0 for a port that serves no probes.
    :param log: logs refused connections, at most once a minute; None for no log.
    :param now: the monotonic clock, in seconds.
    :param tally: the clients of this port in other processes.
    """

    def __init__(
        self,
        port: str,
        room: Room,
        reserve: int,
        log: Log | None,
        now: Callable[[], float],
        tally: Tally = ALONE,
    ) -> None:
        self._tally = tally
        self._port = port
        self._room = room
        self._reserve = reserve
        self._log = log
        self._now = now
        self._inside = 0
        self._in_reserve: dict[Guest, None] = {}
        self._logged_at: float | None = None
        self._not_logged = 0

    def admit(self, guest: Guest, limit: int) -> bool:
        """Return True if `guest` is below the limit.

        Otherwise it takes a place in reserve, if the port has any, or is turned away.
        """
        if self._inside + self._tally.others() < limit and self._room.take():
            self._inside += 1
            self._tally.note(self._inside)
            # Again: another process may have admitted a client since.
            if self._inside + self._tally.others() <= limit:
                return True
            self._free()
        if self._reserve:
            if len(self._in_reserve) >= self._reserve:
                oldest = next(iter(self._in_reserve))
                del self._in_reserve[oldest]
                oldest.turn_away()
            self._in_reserve[guest] = None
        return False

    def left(self, guest: Guest, *, was_admitted: bool) -> None:
        """Free the place of a connection that has ended."""
        if was_admitted:
            self._free()
        else:
            self._in_reserve.pop(guest, None)

    def _free(self) -> None:
        self._inside -= 1
        self._tally.note(self._inside)
        self._room.give_back()

    def note_refusal(self, limit: int) -> None:
        """Log, at most once a minute, that connections were refused."""
        self._not_logged += 1
        now = self._now()
        if self._log is not None and (self._logged_at is None or now - self._logged_at >= _LOG_INTERVAL_S):
            clients = self._inside + self._tally.others()
            by_files = clients < limit or self._room.limit(limit + 1) <= limit
            self._log.warning(
                "clients_turned_away",
                port=self._port,
                count=self._not_logged,
                clients=clients,
                limit=limit,
                open_files=self._room.plan.descriptors if by_files else None,
            )
            self._logged_at, self._not_logged = now, 0


def open_door(now: Callable[[], float]) -> Door:
    """Return a door that closes only at the port's own limit."""
    room = Room()
    return Door("", room, room.plan.reserve, None, now)
