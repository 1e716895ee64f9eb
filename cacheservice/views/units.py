"""The phrases that several renderers share."""

from __future__ import annotations

from datetime import UTC, datetime

from cacheservice.views.facts import ConnectionCap, Dataset, Lag, Rejection, Worker


def duration(value_s: float) -> str:
    """Format seconds for a person: 0.12 s, 47 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    value_s = max(0.0, value_s)
    if value_s < 10:
        return f"{value_s:.2f} s"
    whole = round(value_s)
    for limit, size_s, unit, smaller_s, smaller_unit in (
        (120, 1, "s", 0, ""),
        (7200, 60, "min", 1, "s"),
        (172800, 3600, "h", 60, "min"),
    ):
        if whole < limit:
            return _two_units(whole, size_s, unit, smaller_s, smaller_unit)
    return _two_units(whole, 86400, "d", 3600, "h")


def _two_units(whole: int, size_s: int, unit: str, smaller_s: int, smaller_unit: str) -> str:
    rest = whole % size_s // smaller_s if smaller_s else 0
    return f"{whole // size_s} {unit} {rest} {smaller_unit}" if rest else f"{whole // size_s} {unit}"


def size(count: int) -> str:
    """Format bytes in powers of 1024, as `du -h` does: 512 B, 1.9 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def moment(at: datetime | None) -> str:
    """Format a time in UTC, to the second."""
    return "an unknown time" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def times(count: int) -> str:
    """Return a count in words, such as "3 times"."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 dataset, 2 datasets."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def capped(cap: ConnectionCap) -> str:
    """Describe why fewer clients may connect than configured."""
    return f"clients capped at {cap.limit:,} of {cap.configured:,} by the limit of {cap.open_files:,} open files"


def worker(worker: Worker) -> str:
    """Describe a worker, such as "1 with 30 resp and 12 http clients, 210.5 MiB"."""
    if worker.state == "serving":
        clients = " and ".join(f"{count:,} {port}" for port, count in worker.connections.items())
        parts = [f"{worker.number} with {clients} clients", size(worker.memory_bytes)]
    else:
        parts = [f"{worker.number} is {worker.state}"]
    if worker.restarts:
        parts.append(f"restarted {times(worker.restarts)}")
    return ", ".join(parts)


def rejected(rejection: Rejection) -> str:
    """Describe how long ago a configuration was refused, and why."""
    return f"rejected {duration(rejection.ago_s)} ago: {rejection.problem}"


def lag(standby: Lag) -> str:
    """Describe how far a standby may be behind its primary."""
    return f"{'' if standby.known else 'perhaps '}up to {duration(standby.seconds)} behind"


def lag_and_reason(standby: Lag) -> str:
    """Describe how far a standby may be behind, and why."""
    return f"{lag(standby)}: {standby.problem}"


def standby(standby: Lag | None) -> str:
    """Describe the server of the last read; empty if it was a primary."""
    if standby is None:
        return ""
    return f"a standby {lag_and_reason(standby)}" if standby.problem else "a standby"


def last_attempt(dataset: Dataset) -> str:
    """Describe the outcome of the last attempt; empty before the first one has ended."""
    attempt = dataset.last_attempt
    if attempt is None:
        return ""
    if attempt.outcome == "failed":
        return f"failed {times(dataset.consecutive_failures)}: {attempt.error}"
    if attempt.outcome == "held":
        return f"held: the result {attempt.error}"
    return f"{attempt.outcome} in {duration(attempt.took_s)}"
