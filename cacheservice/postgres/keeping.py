"""Whether a session is kept for its next use: pure decisions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

IDLE_LIMIT_S = 60.0
"""Longest time between two uses. Of two kept sessions the one used last is used next, so that a surplus ends."""
NEAR_S = 30.0
"""A next use that is further away is not worth an idle session on the server."""
LIFETIME_S = 120.0
"""A new name look-up, a failover to a preferred host and a role's new settings are seen after this at the latest."""
SPARE_CONNECTIONS = 2
"""Connections of a limited role that stay free; else its other sessions, of other services perhaps, would starve."""


class Window(NamedTuple):
    """When a purpose will use a session again, on the reactor's clock."""

    opens_at: float
    ends_at: float


def planned(now: float, again_in_s: float) -> Window:
    """The next use of a purpose whose use begins now; 0 for one that may come at any moment."""
    return Window(now + again_in_s, now + again_in_s + IDLE_LIMIT_S)


def is_next_use_near(now: float, windows: Iterable[Window]) -> bool:
    return any(window.opens_at <= now + NEAR_S and now <= window.ends_at for window in windows)


def has_room(connection_limit: int, used: int) -> bool:
    """Whether a role may hold an idle session. `connection_limit` is negative without a limit; `used` has this one."""
    return connection_limit < 0 or connection_limit - used >= SPARE_CONNECTIONS
