"""Decides whether a session is kept for its next use. Pure decisions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

IDLE_LIMIT_S = 60.0
"""The maximum time between two uses. The kept session used last is used next, so that surplus sessions expire."""
NEAR_S = 30.0
"""If the next use is further away, an idle session on the server is not worthwhile."""
LIFETIME_S = 120.0
"""New results of name look-ups, a failover to a preferred host and new settings of the role are used within this time.
"""
SPARE_CONNECTIONS = 2
"""Connections of a limited role that stay free; otherwise its other sessions, perhaps of other services, would starve.
"""


class Window(NamedTuple):
    """The time in which a purpose will use a session again, on the reactor's clock."""

    opens_at: float
    ends_at: float


def planned(now: float, again_in_s: float) -> Window:
    """Return the window for the next use of a purpose whose use begins now.

    :param again_in_s: 0 if the next use may come at any moment.
    """
    return Window(now + again_in_s, now + again_in_s + IDLE_LIMIT_S)


def is_next_use_near(now: float, windows: Iterable[Window]) -> bool:
    return any(window.opens_at <= now + NEAR_S and now <= window.ends_at for window in windows)


def has_room(connection_limit: int, used: int) -> bool:
    """Return whether a role may hold an idle session.

    :param connection_limit: negative without a limit.
    :param used: the role's sessions, including this one.
    """
    return connection_limit < 0 or connection_limit - used >= SPARE_CONNECTIONS
