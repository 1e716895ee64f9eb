"""Finds the problems in a service's status.

The table and the plugin share this judgement.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, NamedTuple

from cacheservice.cache.cache import ConnectionCap
from cacheservice.cli.asking import Answer
from cacheservice.ports.report import behind, capped, duration, times


class Severity(IntEnum):
    """The severity of a problem.

    Its number is the exit code of a monitoring plugin (Monitoring Plugins guidelines, 2.4).
    """

    OK = 0
    WARNING = 1
    CRITICAL = 2


class Problem(NamedTuple):
    """A fact that an operator should know.

    :param dataset: None for the service as a whole.
    :param what: the fact, in words that follow the dataset's name: "expired, 5 min old, limit 3 min".
    :param since: its start, in words; empty if that is in the fact, or unknown.
    :param reasons: its causes.
    :param next: the time of the next attempt; empty if unknown.
    """

    severity: Severity
    dataset: str | None
    what: str
    since: str = ""
    reasons: tuple[str, ...] = ()
    next: str = ""


def problems(answer: Answer, names: Collection[str] = ()) -> list[Problem]:
    """Return the problems, the worst first; with `names`, of these datasets only."""
    chosen = {name: dataset for name, dataset in answer.datasets.items() if not names or name in names}
    of_service = [] if names else list(_of_service(answer))
    required = answer.facts["service"].get("not_ready", {})
    of_datasets = [
        problem
        for name, dataset in chosen.items()
        if (problem := _of_dataset(name, dataset, required=name in required)) is not None
    ]
    # The service before its datasets, because it is usually their cause; sorted() keeps the order of declaration.
    return [*of_service, *sorted(of_datasets, key=lambda problem: -problem.severity)]


def severity(found: Collection[Problem]) -> Severity:
    return max((problem.severity for problem in found), default=Severity.OK)


def _of_service(answer: Answer) -> Iterator[Problem]:
    postgres = answer.facts["postgres"]
    if postgres["state"] == "down":
        yield Problem(Severity.WARNING, None, f"PostgreSQL is down: {postgres['error'] or 'no reason was told'}")
    # A service of an older version does not report the cap, the listening or a refused configuration in its `json`.
    if cap := answer.facts["service"].get("connection_cap"):
        todo = "raise the limit of open files, or lower limits.max_connections; then restart"
        yield Problem(Severity.WARNING, None, f"{capped(ConnectionCap(**cap))}: {todo}")
    # Neither is possible on a standby. It reads deltas at the interval; cron on the primary deletes the changes.
    if not postgres.get("standby"):
        if not postgres["listening"] and (problem := postgres.get("listening_problem")):
            yield Problem(Severity.WARNING, None, f"notifications do not arrive, NOT listening: {problem}")
        if problem := postgres.get("prune_problem"):
            yield Problem(Severity.WARNING, None, f"old recorded changes are not deleted: {problem}")
    if rejected := answer.facts["service"].get("configuration_rejected"):
        what = f"the newest configuration rejected {duration(rejected['rejected_s'])} ago: {rejected['problem']}"
        yield Problem(Severity.WARNING, None, what)


def standby_words(answer: Answer) -> str:
    """Describe the standby of the last read; empty if it was not a standby."""
    standby = answer.facts["postgres"].get("standby")
    if not standby:
        return ""
    return f"a standby {_behind(standby)}" if standby["problem"] else "a standby"


def _of_dataset(name: str, dataset: Mapping[str, Any], *, required: bool) -> Problem | None:
    state, age_s = dataset["state"], dataset["age_s"]
    failures, held = dataset["consecutive_failures"], dataset["held"]
    reasons = tuple(_reasons(dataset))
    coming = next_attempt(dataset)
    if state == "never_loaded":
        level = Severity.CRITICAL if required else Severity.WARNING
        return Problem(level, name, "never loaded, readers get nothing", "", reasons, coming)
    old = f"{duration(age_s)} old, limit {duration(dataset['max_age_s'])}"
    data = f"the data are of {shown_time(dataset['as_of'])}"
    if state == "expired":
        past = f"{duration(age_s - dataset['max_age_s'])} ago; {data}"
        return Problem(Severity.CRITICAL, name, f"expired, {old}", past, reasons, coming)
    if state == "stale":
        past = f"{duration(age_s - dataset['interval_s'] - dataset['timeout_s'])} ago; {data}"
        return Problem(Severity.WARNING, name, f"stale, {old}", past, reasons, coming)
    # A service of an older version reports neither of the last two.
    if held or failures or dataset.get("save_problem") or dataset.get("age_uncertain"):
        what = "held" if held else "failing" if failures else "not saved"
        if what == "not saved" and not dataset.get("save_problem"):
            what = "of uncertain age"
        return Problem(Severity.WARNING, name, f"{what}, {old}", "", (*reasons, data), coming)
    return None


def _reasons(dataset: Mapping[str, Any]) -> Iterator[str]:
    failures, held, last = dataset["consecutive_failures"], dataset["held"], dataset["last_attempt"]
    if failures:
        # A group's attempt that failed because of another dataset may have no error of its own.
        error = (last or {}).get("error") or "no reason was told"
        yield f"failed {times(failures)}{ago(last)}: {error}"
    if standby := dataset.get("standby"):
        yield f"read from a standby {_behind(standby)}"
    if held:
        yield f"held for {duration(_elapsed_s(held['since']))}: the newest result {held['reason']}"
    if dataset["pinned"]:
        yield "pinned by an operator: nothing newer is served until it is unpinned"
    if uncertain := dataset.get("age_uncertain"):
        yield f"the age is uncertain until the next refresh: {uncertain}"
    if problem := dataset.get("save_problem"):
        yield f"saving fails: {problem}; a restart would begin with what was saved before"
    if not (failures or held or dataset["pinned"]) and last is None:
        yield "no attempt has ended yet"


def _behind(standby: Mapping[str, Any]) -> str:
    return f"{behind(standby['lag_s'], known=standby['known'])}: {standby['problem']}"


def ago(attempt: Mapping[str, Any] | None) -> str:
    """Describe how long ago an attempt ended, by the two machines' wall clocks."""
    if attempt is None:
        return ""
    return f", {duration(_elapsed_s(attempt['started_at']) - attempt['took_s'])} ago"


def next_attempt(dataset: Mapping[str, Any]) -> str:
    """Describe the current attempt, or the time of the next one."""
    progress, in_s = dataset["progress"], dataset["next_refresh_in_s"]
    if progress:
        expected = progress["expected_rows"]
        return f"reading now, {progress['rows']:,}{f' of about {expected:,}' if expected else ''} rows"
    if dataset["refreshing"]:
        return "due now, waits for its turn"
    return "" if in_s is None else f"in {duration(in_s)}"


def shown_time(iso: str | None) -> str:
    """Format a time of the status port's `json`, to the second."""
    return "an unknown time" if iso is None else f"{_moment(iso):%Y-%m-%d %H:%M:%S} UTC"


def _elapsed_s(iso: str) -> float:
    return max(0.0, (datetime.now(UTC) - _moment(iso)).total_seconds())


def _moment(iso: str) -> datetime:
    return datetime.fromisoformat(iso).astimezone(UTC)
