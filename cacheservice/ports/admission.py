"""Who is let in: clients up to the limit of a port and of the open files, and past it a few whose probes are answered.

A full port that refused its own probes would be taken for a dead one and restarted. So each port that probes ask has
some places of reserve. A connection in reserve has little time and, when another one needs its place, the oldest makes
room: clients that only wait cannot keep a probe out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

RESERVE_S = 2.0
"""What a connection in reserve may take for each step: to send its question, to take the answer."""

_OWN_DESCRIPTORS = 28
"""Listening sockets, epoll sets, standard streams, files that are saved, names that are looked up; measured: 20."""
_SPARE_SESSIONS = 3
"""That listens, that an operator's refresh opens, and one that is being closed."""
_MOST_RESERVE = 16
_MOST_ACCEPTED = 100
_TOLD_INTERVAL_S = 60.0


class Plan(NamedTuple):
    """What the descriptors of the process are for.

    :param descriptors: the limit of open files.
    :param clients: of all ports together.
    :param reserve: places of each port past its limit, for probes.
    :param accepted: connections that are accepted in one turn, before those too many are closed.
    """

    descriptors: int
    clients: int
    reserve: int
    accepted: int


def plan(descriptors: int, sessions: int, ports: int) -> Plan:
    """Divide the descriptors: refreshes and saving first, clients get the rest.

    :param sessions: that refreshes may have open at once.
    """
    free = max(0, descriptors - _OWN_DESCRIPTORS - _SPARE_SESSIONS - sessions)
    accepted = max(1, min(_MOST_ACCEPTED, free // 8))
    reserve = max(1, min(_MOST_RESERVE, free // 16))
    return Plan(descriptors, max(1, free - accepted - reserve * ports), reserve, accepted)


UNLIMITED = Plan(1 << 30, 1 << 30, _MOST_RESERVE, _MOST_ACCEPTED)


class Room:
    """What clients of all ports have taken of the process's descriptors."""

    def __init__(self, of: Plan = UNLIMITED) -> None:
        self.plan = of
        self._taken = 0

    def limit(self, max_connections: int) -> int:
        """Return what a port may have of its configured limit."""
        return min(max_connections, self.plan.clients)

    def take(self) -> bool:
        """Take a place; False if there is none."""
        if self._taken >= self.plan.clients:
            return False
        self._taken += 1
        return True

    def give_back(self) -> None:
        self._taken -= 1


class Guest(Protocol):
    """A connection past the limit."""

    def turn_away(self) -> None:
        """Say that there are too many, and close at once."""


class Door:
    """Lets the clients of one port in.

    :param port: its name in the log.
    :param reserve: places past the limit; 0 where no probe asks.
    :param log: hears who is turned away, at most once a minute; None for nobody.
    :param now: the monotonic clock, in seconds.
    """

    def __init__(self, port: str, room: Room, reserve: int, log: Any, now: Callable[[], float]) -> None:
        self._port = port
        self._room = room
        self._reserve = reserve
        self._log = log
        self._now = now
        self._inside = 0
        self._in_reserve: dict[Guest, None] = {}
        self._told_at: float | None = None
        self._not_told = 0

    def admit(self, guest: Guest, limit: int) -> bool:
        """Whether `guest` is a client like any other. If not it has a place in reserve, where there are any."""
        if self._inside < limit and self._room.take():
            self._inside += 1
            return True
        if self._reserve:
            if len(self._in_reserve) >= self._reserve:
                oldest = next(iter(self._in_reserve))
                del self._in_reserve[oldest]
                oldest.turn_away()
            self._in_reserve[guest] = None
        return False

    def left(self, guest: Guest, *, was_admitted: bool) -> None:
        """Note that a connection has ended."""
        if was_admitted:
            self._inside -= 1
            self._room.give_back()
        else:
            self._in_reserve.pop(guest, None)

    def note_refusal(self, limit: int) -> None:
        """Log that a connection was turned away."""
        self._not_told += 1
        now = self._now()
        if self._log is not None and (self._told_at is None or now - self._told_at >= _TOLD_INTERVAL_S):
            by_files = self._inside < limit or self._room.plan.clients <= limit
            self._log.warning(
                "clients_turned_away",
                port=self._port,
                count=self._not_told,
                clients=self._inside,
                limit=limit,
                open_files=self._room.plan.descriptors if by_files else None,
            )
            self._told_at, self._not_told = now, 0


def open_door(now: Callable[[], float]) -> Door:
    """A door that only the port's own limit closes."""
    room = Room()
    return Door("", room, room.plan.reserve, None, now)
