"""Counts rejected clients by reason, for the metrics."""

from __future__ import annotations

from typing import Literal, get_args

Reason = Literal["too_many_connections", "auth_failed", "protocol_error", "slow_client"]
"""In order: over `limits.max_connections`; a wrong password, or a wrong or missing token; a violation of the port's
protocol; a client that did not receive its replies, or did not send its request, in time."""

Rejected = dict[Reason, int]


def none_yet() -> Rejected:
    """Return a zero for each reason, so that every series exists from the start."""
    return dict.fromkeys(get_args(Reason), 0)
