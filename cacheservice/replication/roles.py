"""Decides which role a process has for a unit. Pure: facts in, a role out."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Role(enum.Enum):
    """What a process does about a unit, which is a dataset or a group.

    - FOLLOWING: another process refreshes it, and this one serves what that publishes.
    - LEADING: it refreshes it, and publishes the results for the others.
    - ALONE: it refreshes it for itself, less often, because nothing has come from a leader for too long.
    """

    FOLLOWING = "replica"
    LEADING = "leader"
    ALONE = "alone"


class Facts(NamedTuple):
    """What is known about a unit.

    :param has_lead: whether this process has the lead.
    :param silent_s: seconds since the leader's results could be read, and were new enough; the start of the process
        counts as such a moment.
    :param may_refresh: whether a refresh can help: the database was reached, or no lead is possible there.
    """

    has_lead: bool
    silent_s: float
    may_refresh: bool


def role_of(facts: Facts, present: Role, fallback_after_s: float) -> Role:
    """Return the role.

    :param present: the role so far. A process that is alone stays so until a leader's results arrive, even if the
        database fails meanwhile: its own refreshes are tried again with backoff.
    """
    if facts.has_lead:
        return Role.LEADING
    if facts.silent_s < fallback_after_s:
        return Role.FOLLOWING
    if present is Role.ALONE or facts.may_refresh:
        return Role.ALONE
    return Role.FOLLOWING
