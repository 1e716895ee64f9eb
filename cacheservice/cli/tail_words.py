"""Renders the events of `tail` as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC
from types import MappingProxyType

from rich.text import Text

from cacheservice.cli.follow import Event, Value
from cacheservice.views.units import duration

_STYLES: Mapping[str, str] = MappingProxyType(
    {
        "refresh_published": "green",
        "refresh_failed": "red",
        "refresh_held": "yellow",
        "dataset_expired": "bold red",
        "dataset_recovered": "green",
        "service_lost": "bold red",
        "service_found": "green",
        "service_restarted": "yellow",
    }
)


def in_words(event: Event) -> Text:
    """Return one line: the time, the dataset, the event and its figures."""
    what = event.name.removeprefix("refresh_").removeprefix("dataset_").replace("_", " ")
    text = Text()
    text.append(f"{event.at.astimezone(UTC):%H:%M:%S.%f}"[:-3] + "Z  ", "dim")
    if event.dataset is not None:
        text.append(f"{event.dataset}  ", "bold")
    text.append(what, _STYLES.get(event.name, ""))
    details = _details(event)
    text.append(f"  {details}" if details else "")
    return text


def _details(event: Event) -> str:
    fields = event.fields
    if event.name == "refresh_published":
        return ", ".join(_publish(fields))
    if event.name in ("refresh_failed", "refresh_held"):
        return f"{fields['error']} ({', '.join(_attempt(fields))})"
    if event.name == "dataset_expired":
        return f"{_duration(fields['age_s'])} old, limit {_duration(fields['max_age_s'])}"
    return ", ".join(str(value) for value in fields.values() if isinstance(value, str))


def _publish(fields: Mapping[str, Value]) -> Iterator[str]:
    yield f"generation {fields['generation']}"
    if before := fields.get("generations_before_it"):
        yield f"{before} more before it"
    if fields.get("added") is not None:
        counts = [f"{fields[what]:,} {what}" for what in ("added", "changed", "removed") if fields[what]]
        # The first publish replaces nothing, so it is empty if it adds nothing.
        yield from counts or ["no rows" if fields["generation"] == 1 else "no row differs"]


def _attempt(fields: Mapping[str, Value]) -> Iterator[str]:
    yield f"after {_duration(fields['took_s'])}"
    count = fields["consecutive_failures"]
    if isinstance(count, int) and count > 1:
        yield f"{count} in a row"
    if fields["retry_in_s"] is not None:
        yield f"next try in {_duration(fields['retry_in_s'])}"


def _duration(value: Value) -> str:
    return duration(value) if isinstance(value, int | float) else "an unknown time"
