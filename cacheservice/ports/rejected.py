"""Clients that a port turned away, counted by the reason; the metrics show the counts."""

from __future__ import annotations

from typing import Literal, get_args

Reason = Literal["too_many_connections", "auth_failed", "protocol_error", "slow_client"]
"""Over `limits.max_connections`; a wrong password, a wrong or missing token; what the port's protocol does not allow;
a client that did not take its answers, or did not send its request, in time."""

Rejected = dict[Reason, int]


def none_yet() -> Rejected:
    """Each reason, so that its series is there before the first time."""
    return dict.fromkeys(get_args(Reason), 0)
