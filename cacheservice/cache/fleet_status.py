"""What a process of a fleet does about a dataset, and what it knows of the dataset's leader."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FleetRole = Literal["replica", "leader", "alone"]
"""In order: it serves what the leader publishes; it refreshes and publishes; it refreshes for itself only."""


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The part of a process in the fleet, for one dataset. Its owner, the fleet's unit, replaces it.

    :param process: the name of this process.
    :param epoch: of the newest lead that is known; None if none is.
    :param leader: the name of the process that has that lead; None if it is not known.
    :param lag: how many generations the newest one that the leader has published is after the served one; None for a
        leader, and while nothing is known of its generations.
    :param heard_at: the last moment, on the monotonic clock, at which the leader's results could be read and were new
        enough, or the start of the process; None for a leader.
    :param valkey_problem: why the Valkey cannot be used; None if it can.
    :param publish_problem: why a leader's results cannot be published; None if they can.
    :param lead_problem: why this process cannot win a lead; None if it can, or if it does not compete for leads.
    :param lead_changes: how often this process has gained or lost the lead since its start.
    """

    role: FleetRole
    process: str
    epoch: int | None = None
    leader: str | None = None
    lag: int | None = None
    heard_at: float | None = None
    valkey_problem: str | None = None
    publish_problem: str | None = None
    lead_problem: str | None = None
    lead_changes: int = 0

    def silent_s(self, now: float) -> float:
        """Return for how many seconds no results of a leader have come; 0 for a leader."""
        return 0.0 if self.heard_at is None else max(0.0, now - self.heard_at)

    def differs_from(self, before: FleetStatus | None) -> bool:
        """Return whether more than the time of the last results has changed."""
        return before is None or replace(before, heard_at=self.heard_at) != self
