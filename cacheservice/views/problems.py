"""Finds the problems in the facts about a service.

`status`, `why` without a name, and the monitoring plugin share this judgement.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from cacheservice.views import capture, fleet
from cacheservice.views.facts import Dataset, Facts
from cacheservice.views.units import capped, duration, lag_and_reason, moment, rejected, times


class Severity(IntEnum):
    """The severity of a problem.

    Its number is the exit code of a monitoring plugin (Monitoring Plugins guidelines, 2.4).
    """

    OK = 0
    WARNING = 1
    CRITICAL = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """A fact that an operator should know.

    :param dataset: None for the service as a whole.
    :param what: the problem in a few words, such as "expired"; for the service, a whole sentence without its end.
    :param figures: the age and its limit, in words.
    :param since: its start, in words; empty if the figures show that, or if it is unknown.
    :param reasons: its causes.
    :param blocked_by: the sessions that blocked the last attempt.
    :param todo: the next step for an operator; empty if there is none.
    :param next: the time of the next attempt; empty if unknown.
    """

    severity: Severity
    dataset: str | None
    what: str
    figures: str = ""
    since: str = ""
    reasons: tuple[str, ...] = ()
    blocked_by: tuple[str, ...] = ()
    todo: str = ""
    next: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.what, self.figures)))


def problems(facts: Facts, names: Collection[str] = ()) -> list[Problem]:
    """Return the problems of the service, then those of its datasets, the worst first.

    With `names`, return the problems of these datasets only.
    """
    found = [
        problem
        for dataset in facts.only(names).datasets.values()
        if (problem := _of_dataset(dataset, facts.at, required=dataset.name in facts.service.not_ready)) is not None
    ]
    # The service comes before its datasets, because it is usually their cause; sorted() keeps the order of declaration.
    service = () if names else (*_of_service(facts), *_of_fleet(facts))
    return [*service, *sorted(found, key=lambda problem: -problem.severity)]


def severity(found: list[Problem]) -> Severity:
    """Return the worst severity of the problems."""
    return max((problem.severity for problem in found), default=Severity.OK)


def _of_service(facts: Facts) -> Iterator[Problem]:
    """Yield the problems of the service as a whole; each is a warning."""
    service, database = facts.service, facts.database

    def warning(what: str) -> Problem:
        return Problem(Severity.WARNING, None, what)

    if database.state == "down":
        yield warning(f"PostgreSQL is down: {database.error or 'the reason is unknown'}")
    for each in service.workers:
        if each.state == "down":
            yield warning(f"worker {each.number} is down; the service starts it again, its log lines show why it ended")
    if service.connection_cap is not None:
        todo = "raise the limit of open files, or lower limits.max_connections; then restart"
        yield warning(f"{capped(service.connection_cap)}: {todo}")
    # Neither is possible on a standby. It reads deltas at the interval; cron on the primary deletes the changes.
    if database.standby is None:
        if not database.listening and database.listening_problem is not None:
            yield warning(f"notifications do not arrive, NOT listening: {database.listening_problem}")
        if database.prune_problem is not None:
            yield warning(f"old recorded changes are not deleted: {database.prune_problem}")
    if (problem := capture.problem(database.capture, facts.datasets.values())) is not None:
        yield warning(f"changes are not captured from the log: {problem}")
    if service.rejection is not None:
        yield warning(f"the newest configuration was {rejected(service.rejection)}")


def _of_fleet(facts: Facts) -> Iterator[Problem]:
    """Yield the problems of this process in its fleet; each is a warning."""
    fleets = {name: dataset.fleet for name, dataset in facts.datasets.items() if dataset.fleet is not None}
    for what in fleet.problems(fleets.values()):
        yield Problem(Severity.WARNING, None, what)
    alone = [name for name, each in fleets.items() if each.role == "alone"]
    if alone:
        more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
        since = duration(max(fleets[name].leader_silent_s for name in alone))
        yield Problem(
            Severity.WARNING,
            None,
            f"no leader's results of {alone[0]}{more} have come for {since}; this process refreshes alone",
        )


def _of_dataset(dataset: Dataset, now: datetime, *, required: bool) -> Problem | None:
    """Return the problem of a dataset; None if there is none.

    :param required: whether the service is not ready because of this dataset.
    """
    age_s, as_of = dataset.age_s, f"the data are of {moment(dataset.as_of)}"
    reasons = tuple(_reasons(dataset, now))

    def problem(level: Severity, what: str, figures: str, since: str, *more: str) -> Problem:
        return Problem(
            severity=level,
            dataset=dataset.name,
            what=what,
            figures=figures,
            since=since,
            reasons=(*reasons, *more),
            blocked_by=dataset.blocked_by,
            todo=dataset.advice or "",
            next=next_attempt(dataset),
        )

    if age_s is None:
        level = Severity.CRITICAL if required else Severity.WARNING
        return problem(level, "never loaded", "readers get nothing", "")
    old = f"{duration(age_s)} old, limit {duration(dataset.max_age_s)}"
    if dataset.state == "expired":
        since = f"{duration(age_s - dataset.max_age_s)} ago; {as_of}"
        return problem(Severity.CRITICAL, "expired", old, since)
    if dataset.state == "stale":
        since = f"{duration(age_s - dataset.interval_s - dataset.timeout_s)} ago; {as_of}"
        return problem(Severity.WARNING, "stale", old, since)
    for what, is_so in (
        ("held", dataset.held),
        ("failing", dataset.consecutive_failures),
        ("not saved", dataset.save_problem),
        ("of uncertain age", dataset.age_uncertain),
    ):
        if is_so:
            return problem(Severity.WARNING, what, old, "", as_of)
    return None


def _reasons(dataset: Dataset, now: datetime) -> Iterator[str]:
    last, held = dataset.last_attempt, dataset.held
    if dataset.consecutive_failures:
        # A group's attempt that failed because of another dataset may have no error of its own.
        error = (last.error if last is not None else None) or "the reason is unknown"
        ago = "" if last is None else f", {duration(_elapsed_s(last.started_at, now) - last.took_s)} ago"
        yield f"failed {times(dataset.consecutive_failures)}{ago}: {error}"
    if dataset.standby is not None:
        yield f"read from a standby {lag_and_reason(dataset.standby)}"
    if held is not None:
        yield f"held for {duration(_elapsed_s(held.since, now))}: the newest result {held.reason}"
    if dataset.pinned:
        yield "pinned by an operator: nothing newer is served until it is unpinned"
    if dataset.age_uncertain:
        yield f"the age is uncertain until the next refresh: {dataset.age_uncertain}"
    if dataset.save_problem:
        yield f"saving fails: {dataset.save_problem}; a restart would begin with the snapshot saved before"
    if not (dataset.consecutive_failures or held or dataset.pinned) and last is None:
        yield "no attempt has ended yet"


def next_attempt(dataset: Dataset) -> str:
    """Describe the current attempt, or the time of the next one; empty if that is unknown."""
    if (progress := dataset.progress) is not None:
        of = f" of about {progress.expected_rows:,}" if progress.expected_rows else ""
        return f"reading now, {progress.rows:,}{of} rows"
    if dataset.refreshing:
        return "due now, waits for its turn"
    return "" if dataset.next_refresh_in_s is None else f"in {duration(dataset.next_refresh_in_s)}"


def _elapsed_s(since: datetime, now: datetime) -> float:
    """Return the seconds since a moment, by the wall clocks of the two machines."""
    return max(0.0, (now - since).total_seconds())
