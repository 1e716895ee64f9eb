"""`cacheservice status --check`: one line for Nagios and compatible systems.

The format follows the Monitoring Plugins Development Guidelines: 2.6 (performance data), 2.4 (exit codes). A dead
service is CRITICAL, as in check_tcp; UNKNOWN is for wrong usage and bugs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from cacheservice.cli.asking import Answer
from cacheservice.cli.problems import Problem, Severity, problems, severity, standby_words

Detail = Literal["none", "summary", "all"]
"""The performance data: none; the service as a whole; also four figures of each dataset."""

UNKNOWN = 3
_MOST_TOLD = 5
_MOST_TOLD_CHARACTERS = 600
"""The most problems in the line. With the summary, the line stays below 1,024 bytes, where agents such as NRPE may
truncate it."""
_STATES = ("fresh", "stale", "expired", "never_loaded")


def verdict(answer: Answer, names: Collection[str] = (), detail: Detail = "summary") -> tuple[Severity, str]:
    """Return the exit code and the line; with `names`, for these datasets only."""
    found = problems(answer, names)
    level = severity(found)
    figures = " ".join(_figures(answer, names, detail))
    data = f" | {figures}" if figures else ""
    return level, f"CACHESERVICE {level.name} - {_summary(answer, found, names)}{data}"


def no_answer(why: object) -> tuple[Severity, str]:
    """Return the exit code and the line for a service that does not answer.

    It is down, hangs or refuses.
    """
    return Severity.CRITICAL, f"CACHESERVICE CRITICAL - {_plain(str(why))}"


def unknown(why: object) -> str:
    """Return the line for exit code 3: wrong usage, or a bug."""
    return f"CACHESERVICE UNKNOWN - {_plain(str(why))}"


def _summary(answer: Answer, found: Collection[Problem], names: Collection[str]) -> str:
    if not found:
        count = len(names) or len(answer.datasets)
        words = f"{count} dataset{'s' if count != 1 else ''} fresh, PostgreSQL {answer.facts['postgres']['state']}"
        standby = _plain(standby_words(answer))
        return f"{words}, {standby}" if standby else words
    worst_first = sorted(found, key=lambda problem: -problem.severity)
    first = worst_first[:_MOST_TOLD]
    told = [_shortened(_plain(_sentence(problem)), _MOST_TOLD_CHARACTERS // len(first)) for problem in first]
    if len(found) > _MOST_TOLD:
        told.append(f"and {len(found) - _MOST_TOLD} more")
    return "; ".join(told)


def _sentence(problem: Problem) -> str:
    name = f"{problem.dataset} " if problem.dataset else ""
    return ", ".join([name + problem.what, *problem.reasons])


def _plain(text: str) -> str:
    """Return a text on one line without bars, which start performance data."""
    return " ".join(text.replace("|", "/").split())


def _shortened(text: str, most_characters: int) -> str:
    return text if len(text) <= most_characters else f"{text[: most_characters - 1].rstrip()}…"


def _figures(answer: Answer, names: Collection[str], detail: Detail) -> Iterator[str]:
    """Yield 'label'=value[unit];warn;crit;min;max in order of importance."""
    if detail == "none":
        return
    if not names:
        yield f"ready={int(answer.facts['service']['ready'])};;;0;1"
    chosen = {name: dataset for name, dataset in answer.datasets.items() if not names or name in names}
    if detail == "summary":
        yield from _counts(list(chosen.values()))
        return
    for name, dataset in chosen.items():
        yield from _measures(name, dataset)


def _counts(datasets: Collection[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the datasets in each state, and the oldest age relative to its limit."""
    states = Counter(dataset["state"] for dataset in datasets)
    for state in _STATES:
        yield f"{state}={states[state]};;;0;{len(datasets)}"
    yield f"held={sum(bool(dataset['held']) for dataset in datasets)};0;;0;{len(datasets)}"
    yield f"failing={sum(bool(dataset['consecutive_failures']) for dataset in datasets)};0;;0;{len(datasets)}"
    shares = [dataset["age_s"] / dataset["max_age_s"] for dataset in datasets if dataset["age_s"] is not None]
    # U: the value could not be determined, because nothing has been loaded.
    oldest = f"{_number(100 * max(shares))}%" if shares else "U"
    yield f"age_of_limit={oldest};;100;0"


def _measures(name: str, dataset: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of one dataset.

    Its age is WARNING once the dataset is stale, and CRITICAL once it is expired.
    """
    stale_s = min(dataset["interval_s"] + dataset["timeout_s"], dataset["max_age_s"])
    age = "U" if dataset["age_s"] is None else f"{_number(dataset['age_s'])}s"
    yield f"{_label(name, 'age')}={age};{_number(stale_s)};{_number(dataset['max_age_s'])};0"
    yield f"{_label(name, 'rows')}={dataset['rows']};;;0"
    yield f"{_label(name, 'bytes')}={dataset['bytes']}B;;;0"
    yield f"{_label(name, 'failures')}={dataset['consecutive_failures']};0;;0"


def _number(value: float) -> str:
    """Format a number without an exponent.

    The guidelines do not allow exponents (2.6: a value is of the class [-0-9.]).
    """
    return f"{value:.3f}".rstrip("0").removesuffix(".")


def _label(name: str, measure: str) -> str:
    return re.sub(r"[^\w]", "_", f"{name}_{measure}")
