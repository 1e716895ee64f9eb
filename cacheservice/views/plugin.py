"""Renders facts as the line of a monitoring plugin, for Nagios and compatible systems.

The format follows the Monitoring Plugins Development Guidelines: 2.6 (performance data), 2.4 (exit codes). A dead
service is CRITICAL, as in check_tcp; UNKNOWN is for wrong usage and bugs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Literal

from cacheservice.views.facts import Dataset, Facts
from cacheservice.views.problems import Problem, Severity, problems, severity
from cacheservice.views.units import plural, standby

Detail = Literal["none", "summary", "all"]
"""The performance data: none; the service as a whole; also four figures of each dataset."""

_MOST_SHOWN = 5
_MOST_SHOWN_CHARACTERS = 600
"""The most problems in the line. With the summary, the line stays below 1,024 bytes, where agents such as NRPE may
truncate it."""
_STATES = ("fresh", "stale", "expired", "never_loaded")


def verdict(facts: Facts, names: Collection[str] = (), detail: Detail = "summary") -> tuple[Severity, str]:
    """Return the exit code and the line; with `names`, for these datasets without the service."""
    chosen, found = facts.only(names), problems(facts, names)
    level = severity(found)
    figures = " ".join(_figures(chosen, detail, with_service=not names))
    data = f" | {figures}" if figures else ""
    return level, f"CACHESERVICE {level.name} - {_summary(chosen, found)}{data}"


def no_answer(why: object) -> tuple[Severity, str]:
    """Return the exit code and the line for a service that does not answer.

    It is down, hangs or refuses.
    """
    return Severity.CRITICAL, f"CACHESERVICE CRITICAL - {_plain(str(why))}"


def unknown(why: object) -> str:
    """Return the line for exit code 3: wrong usage, or a bug."""
    return f"CACHESERVICE UNKNOWN - {_plain(str(why))}"


def _summary(facts: Facts, found: Collection[Problem]) -> str:
    if not found:
        parts = [f"{plural(len(facts.datasets), 'dataset')} fresh", f"PostgreSQL {facts.database.state}"]
        return ", ".join(filter(None, [*parts, _plain(standby(facts.database.standby))]))
    worst = sorted(found, key=lambda problem: -problem.severity)[:_MOST_SHOWN]
    shown = [_shortened(_plain(_sentence(problem)), _MOST_SHOWN_CHARACTERS // len(worst)) for problem in worst]
    if len(found) > len(worst):
        shown.append(f"and {len(found) - len(worst)} more")
    return "; ".join(shown)


def _sentence(problem: Problem) -> str:
    name = f"{problem.dataset} " if problem.dataset else ""
    return ", ".join([f"{name}{problem}", *problem.reasons])


def _plain(text: str) -> str:
    """Return a text on one line without bars, which start performance data."""
    return " ".join(text.replace("|", "/").split())


def _shortened(text: str, most_characters: int) -> str:
    return text if len(text) <= most_characters else f"{text[: most_characters - 1].rstrip()}…"


def _figures(facts: Facts, detail: Detail, *, with_service: bool) -> Iterator[str]:
    """Yield 'label'=value[unit];warn;crit;min;max in order of importance."""
    if detail == "none":
        return
    if with_service:
        yield f"ready={int(facts.service.ready)};;;0;1"
    datasets = list(facts.datasets.values())
    if detail == "summary":
        yield from _counts(datasets)
        return
    for dataset in datasets:
        yield from _measures(dataset)


def _counts(datasets: Collection[Dataset]) -> Iterator[str]:
    """Yield the datasets in each state, and the oldest age relative to its limit."""
    states = Counter(dataset.state for dataset in datasets)
    for state in _STATES:
        yield f"{state}={states[state]};;;0;{len(datasets)}"
    yield f"held={sum(dataset.held is not None for dataset in datasets)};0;;0;{len(datasets)}"
    yield f"failing={sum(dataset.consecutive_failures > 0 for dataset in datasets)};0;;0;{len(datasets)}"
    roles = Counter(dataset.fleet.role for dataset in datasets if dataset.fleet is not None)
    if roles:
        yield f"leading={roles['leader']};;;0;{len(datasets)}"
        yield f"alone={roles['alone']};0;;0;{len(datasets)}"
    shares = [dataset.age_s / dataset.max_age_s for dataset in datasets if dataset.age_s is not None]
    # U: the value could not be determined, because nothing has been loaded.
    oldest = f"{_number(100 * max(shares))}%" if shares else "U"
    yield f"age_of_limit={oldest};;100;0"


def _measures(dataset: Dataset) -> Iterator[str]:
    """Yield the figures of one dataset.

    Its age is WARNING once the dataset is stale, and CRITICAL once it is expired.
    """
    name, stale_s = dataset.name, min(dataset.interval_s + dataset.timeout_s, dataset.max_age_s)
    age = "U" if dataset.age_s is None else f"{_number(dataset.age_s)}s"
    yield f"{_label(name, 'age')}={age};{_number(stale_s)};{_number(dataset.max_age_s)};0"
    yield f"{_label(name, 'rows')}={dataset.rows};;;0"
    yield f"{_label(name, 'bytes')}={dataset.bytes}B;;;0"
    yield f"{_label(name, 'failures')}={dataset.consecutive_failures};0;;0"


def _number(value: float) -> str:
    """Format a number without an exponent.

    The guidelines do not allow exponents (2.6: a value is of the class [-0-9.]).
    """
    return f"{value:.3f}".rstrip("0").removesuffix(".")


def _label(name: str, measure: str) -> str:
    return re.sub(r"[^\w]", "_", f"{name}_{measure}")
