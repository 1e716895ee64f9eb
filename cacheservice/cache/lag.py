"""Decides how far a standby is behind its primary, from the reports of the standby itself.

A standby is up to date while it has replayed all that its primary has reported and still hears from it. Otherwise the
lag is an upper bound: the time since it was last known to be up to date, or since the last commit that it replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

_ANSWER_S = 5.0
"""How long an answer to the receiver's question may take, the rounds of its loop included."""
_IN_FLIGHT_S = 1.0
"""A busy primary always has this much in flight, so less is not reported as a problem."""
GRANT = "GRANT pg_read_all_stats TO {role}"


@dataclass(frozen=True, slots=True)
class Lag:
    """How much older than their transaction the rows may be.

    `seconds` is an upper bound. `problem` is the reason why the standby is not up to date, empty if it is. `known` is
    False if an idle primary cannot be distinguished from one that is not followed.
    """

    seconds: float = 0.0
    known: bool = True
    problem: str = ""


NO_LAG = Lag()


@dataclass(frozen=True, slots=True)
class Receiver:
    """The WAL receiver, in seconds of the standby's clock; `status` is None if the role may not see it."""

    status: str | None
    heard_s: float | None
    clock_ahead_s: float
    """The sender's clock minus ours, at least 0: a delayed message looks like a clock that is behind."""
    sender_at: int | None
    """The position in the WAL that the sender last reported."""


@dataclass(frozen=True, slots=True)
class StandbyFacts:
    """The report of a standby about itself: times in seconds of its own clock, positions in bytes of WAL."""

    role: str
    started_us: int | None
    now_s: float
    received_at: int | None
    replayed_at: int | None
    replayed_s: float | None
    """When the primary committed the last transaction that was replayed, or made the last checkpoint."""
    paused: bool
    receiver_timeout_s: float
    delay_s: float
    receiver: Receiver | None
    """None if no receiver is running."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Earlier findings about the same standby, in seconds ago; None for never.

    `current_s`: since it had replayed everything. `heard_s`: since its primary confirmed that, as even an idle primary
    does from time to time.
    """

    current_s: float | None = None
    heard_s: float | None = None


_NEVER = Seen()


def lag_of(facts: StandbyFacts, seen: Seen = _NEVER) -> Lag:
    """Return the lag by the present report of the standby and its earlier ones."""
    receiver = facts.receiver
    sent_at = max(facts.received_at or 0, (receiver.sender_at or 0) if receiver else 0)
    if (facts.replayed_at or 0) < sent_at and receiver is not None:
        return _behind(facts, _bound_s(facts, seen.current_s))
    bound_s = _bound_s(facts, seen.heard_s)
    if receiver is None:
        problem = "the standby receives nothing; see that its primary runs and that primary_conninfo is right"
        return Lag(bound_s, seen.heard_s is not None, problem)
    if receiver.status is None:
        grant = GRANT.format(role=facts.role)
        return Lag(bound_s, False, f"this role may not see whether the standby hears from its primary; {grant}")
    if receiver.status != "streaming" or receiver.heard_s is None:
        return Lag(bound_s, False, f"the standby's receiver is {receiver.status}, not streaming")
    silent_s = max(0.0, facts.now_s - receiver.heard_s)
    # A silent receiver asks after half its timeout. Without a timeout an idle primary stays silent for ever.
    if silent_s <= facts.receiver_timeout_s / 2 + _ANSWER_S:
        return NO_LAG
    silent = f"the standby has heard nothing from its primary for {silent_s:.0f} s"
    if not facts.receiver_timeout_s:
        return Lag(silent_s, False, f"{silent}, and wal_receiver_timeout = 0 keeps it from asking")
    return Lag(silent_s, True, f"{silent}; the primary, the network or the receiver hangs")


def _behind(facts: StandbyFacts, bound_s: float) -> Lag:
    if facts.paused:
        return Lag(bound_s, True, "replay is paused on the standby; SELECT pg_wal_replay_resume() resumes it")
    if facts.delay_s:
        return Lag(bound_s, True, f"the standby replays {facts.delay_s:g} s late (recovery_min_apply_delay)")
    if bound_s < _IN_FLIGHT_S:
        return Lag(bound_s)
    return Lag(bound_s, True, "the standby has received more than it has replayed")


def _bound_s(facts: StandbyFacts, seen_s: float | None) -> float:
    bounds = [] if seen_s is None else [seen_s]
    if facts.replayed_s is not None:
        ahead_s = facts.receiver.clock_ahead_s if facts.receiver is not None else 0.0
        bounds.append(facts.now_s - facts.replayed_s + ahead_s)
    if not bounds:  # neither a commit nor a checkpoint is known: nothing better than its start
        bounds.append(facts.now_s - (facts.started_us or 0) / 1e6)
    return max(0.0, min(bounds))
