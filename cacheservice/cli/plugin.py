"""`cacheservice status --check`: one line for Nagios and those that run its plugins.

The form is that of the Monitoring Plugins Development Guidelines: 2.6 (performance data), 2.4 (exit codes).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from cacheservice.cli.asking import Answer
from cacheservice.cli.problems import Problem, Severity, problems, severity

UNKNOWN = 3
_MOST_TOLD = 5


def verdict(answer: Answer, names: Collection[str] = ()) -> tuple[Severity, str]:
    """The exit code and the line; with `names`, of these datasets alone."""
    found = problems(answer, names)
    level = severity(found)
    return level, f"CACHESERVICE {level.name} - {_summary(answer, found, names)} | {' '.join(_measures(answer, names))}"


def unknown(why: object) -> str:
    """The line of exit code 3: the plugin cannot tell."""
    return f"CACHESERVICE UNKNOWN - {_plain(str(why))}"


def _summary(answer: Answer, found: Collection[Problem], names: Collection[str]) -> str:
    if not found:
        count = len(names) or len(answer.datasets)
        return f"{count} dataset{'s' if count != 1 else ''} fresh, PostgreSQL {answer.facts['postgres']['state']}"
    worst_first = sorted(found, key=lambda problem: -problem.severity)
    told = [_plain(_sentence(problem)) for problem in worst_first[:_MOST_TOLD]]
    if len(found) > _MOST_TOLD:
        told.append(f"and {len(found) - _MOST_TOLD} more")
    return "; ".join(told)


def _sentence(problem: Problem) -> str:
    name = f"{problem.dataset} " if problem.dataset else ""
    return ", ".join([name + problem.what, *problem.reasons])


def _plain(text: str) -> str:
    """On one line; what follows a bar is performance data."""
    return " ".join(text.replace("|", "/").split())


def _measures(answer: Answer, names: Collection[str]) -> Iterator[str]:
    """'label'=value[unit];warn;crit;min: the age warns once stale, and is critical once expired."""
    if not names:
        yield f"ready={int(answer.facts['service']['ready'])};;;0;1"
    for name, dataset in answer.datasets.items():
        if names and name not in names:
            continue
        stale_s = min(dataset["interval_s"] + dataset["timeout_s"], dataset["max_age_s"])
        # U: the value could not be determined, for what has never been loaded.
        age = "U" if dataset["age_s"] is None else f"{dataset['age_s']:g}s"
        yield f"{_label(name, 'age')}={age};{stale_s:g};{dataset['max_age_s']:g};0"
        yield f"{_label(name, 'rows')}={dataset['rows']};;;0"
        yield f"{_label(name, 'bytes')}={dataset['bytes']}B;;;0"
        yield f"{_label(name, 'failures')}={dataset['consecutive_failures']};0;;0"


def _label(name: str, measure: str) -> str:
    return re.sub(r"[^\w]", "_", f"{name}_{measure}")
